"""How busy a pool keeps its endpoints: attempts per second with one, two and four that take the same time to answer.

The servers are stubs in this process; each request takes `--delay` seconds, each endpoint serves two at once.

    python benchmarks/endpoints.py
"""
import argparse, json, os, platform, statistics, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from comam_nb.checks.tasks import Task
from comam_nb.memcollab.attempts import Solver
from comam_nb.memcollab.solving import solve
from comam_nb.lm.recorded import open_chat


class Stub(BaseHTTPRequestHandler):
    delay = 0.2
    def log_message(self, *a): pass
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        time.sleep(self.delay)
        body = json.dumps({"choices": [{"message": {"content": "5"}, "finish_reason": "stop"}]}).encode()
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--delay", type=float, default=0.2, help="seconds per request (default 0.2)")
    p.add_argument("--tasks", type=int, default=80)
    p.add_argument("--rounds", type=int, default=3)
    args = p.parse_args()
    from machine import about
    print(about(), flush=True)
    Stub.delay = args.delay
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Stub) for _ in range(4)]
    for s in servers: threading.Thread(target=s.serve_forever, daemon=True).start()
    tasks = [Task(f"t{i}", f"Number {i}") for i in range(args.tasks)]
    seconds = {n: [] for n in (1, 2, 4)}
    for _ in range(args.rounds):
        for n in seconds:
            chat = open_chat(",".join(f"http://127.0.0.1:{s.server_port}/v1" for s in servers[:n]) + "#stub", workers=2)
            start = time.perf_counter()
            solve(tasks, Solver("stub", chat, "plain"), progress=False)
            seconds[n].append(time.perf_counter() - start)
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {args.tasks} tasks, {args.delay:g} s per "
          f"request, 2 requests at once per endpoint, {args.rounds} rounds")
    rate = {n: args.tasks / statistics.median(s) for n, s in seconds.items()}
    for n, r in rate.items():
        print(f"{n} endpoints: {r:.1f} attempts/s, {r * args.delay / 2 / n:.0%} of what they could do")
    print(f"endpoints: {rate[2] / rate[1]:.2f}x with 2, {rate[4] / rate[1]:.2f}x with 4")


if __name__ == "__main__": main()
