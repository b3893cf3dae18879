"A server that speaks the chat-completions protocol and misbehaves on demand, and a chat model that knows its lines."
import json, socket, struct, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from comam_nb.lm.chat import Reply
from comam_nb.lm.endpoints import EndpointChat

ask = lambda text="hello": [{"role": "user", "content": text}]


def completion(text, **changes):
    "The JSON of a good answer, with fields replaced; a field that becomes None is left out."
    body = {"id": "c1", "object": "chat.completion", "model": "m", "usage": {"prompt_tokens": 7, "completion_tokens": 3,
        "total_tokens": 10},
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            **changes}
    return json.dumps({k: v for k, v in body.items() if v is not None}).encode()


class Server(ThreadingHTTPServer):
    """Speaks the chat-completions protocol. `moods` holds what to do with the next requests;
    `log` all requests as (seconds, prompt, mood, body)."""
    daemon_threads, request_queue_size = True, 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.moods, self.log, self.answer = [], [], lambda prompt: rf"It is \boxed{{{prompt.split()[-1]}}}"
        self.always, self.delay, self.busy, self.most_busy, self.dribbled = None, 0.0, 0, 0, 0
        self.lock, self.hold = threading.Lock(), threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self): return f"http://127.0.0.1:{self.server_port}/v1"
    def chat(self, **options):
        return EndpointChat(self.url, "m", **{"backoff": 0.01, "timeout": 5, "api_key": "secret-key", **options})
    def handle_error(self, *a): pass # clients that hang up are part of the tests
    def prompts(self): return [p for _, p, _, _ in self.log]
    def stop(self):
        self.hold.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *a): pass
    def send(self, status, body=b"{}", kind="application/json", length=None, **headers):
        self.send_response(status)
        for k, v in {"content-type": kind, "content-length": str(len(body) if length is None else length),
                     **headers}.items():
            self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        self.wfile.write(body); self.wfile.flush()
    def hang_up(self, reset):
        if reset: self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close(); self.wfile.close(); self.connection.close()
    def do_POST(self):
        s, body = self.server, json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body["messages"][-1]["content"]
        with s.lock:
            mood = s.moods.pop(0) if s.moods else s.always or "well"
            s.log.append((time.monotonic(), prompt, mood, body)); s.busy += 1; s.most_busy = max(s.most_busy, s.busy)
        try: self.act(mood, completion(s.answer(prompt)))
        except OSError: pass
        finally:
            with s.lock: s.busy -= 1
    def act(self, mood, good): # noqa: C901 (a list of moods)
        if callable(mood): return mood(self)
        if self.server.delay: time.sleep(self.server.delay)
        if isinstance(mood, int): return self.send(mood, b'{"error": {"message": "because"}}')
        if isinstance(mood, bytes): return self.send(200, mood)
        if mood == "well": self.send(200, good)
        elif mood == "silent": self.server.hold.wait(1.5)
        elif mood == "dribble":
            self.send_response(200); self.send_header("content-length", "1000"); self.end_headers()
            for _ in range(1000): self.wfile.write(b" "); self.wfile.flush(); time.sleep(0.06)
            self.server.dribbled += 1 # somebody has waited for the whole of it
        elif mood == "cut": self.send(200, good[:40], length=len(good)); self.hang_up(False)
        elif mood == "reset": self.send(200, good[:40], length=len(good)); time.sleep(0.02); self.hang_up(True)
        elif mood == "reset at once": self.hang_up(True)
        elif mood == "cut chunks":
            self.send_response(200); self.send_header("transfer-encoding", "chunked"); self.end_headers()
            self.wfile.write(b"10\r\n" + good[:16] + b"\r\n"); self.wfile.flush(); self.hang_up(False)
        elif mood == "html": self.send(200, b"<html><body>Bad gateway</body></html>", "text/html")
        elif mood == "wrong type": self.send(200, good, "text/html; charset=latin-1")
        elif mood == "wrong type, events": self.send(200, good, "text/event-stream")
        elif mood == "no http": self.connection.sendall(b"220 mail.example ESMTP\r\n"); self.hang_up(False)
        else: raise AssertionError(mood)


class Script:
    "A chat model that knows its lines; `reply` is a function of the messages."
    def __init__(self, reply, name="script", workers=1):
        self.reply, self.name, self.workers, self.seen = reply, name, workers, []
    def chat(self, messages, max_tokens=512, temperature=0.0, seed=None):
        self.seen.append((messages, max_tokens, temperature, seed))
        text = self.reply(messages)
        return text if isinstance(text, Reply) else Reply(text, 10, 5, 0.1, "stop")

echo = lambda messages: rf"\boxed{{{messages[-1]['content'].split()[-1]}}}"
