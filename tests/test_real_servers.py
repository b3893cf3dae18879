"""The installed commands against servers that nobody here wrote: `transformers serve` and llama.cpp's own, with
SmolLM2-135M. Its answers are poor; what is tested is that both halves of the package can be used with either server."""
import json, shutil, socket, subprocess, sys, time, urllib.error, urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow # two servers and a language model: minutes
pytest.importorskip("openai", reason="endpoints need the package `openai`")

LLAMA = """import sys, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.port, p.n_ctx, p.n_parallel = sys.argv[1], int(sys.argv[2]), 2048, 1
p.cpuparams.n_threads = 1
server = xllamacpp.Server(p)
sys.stdin.read()
"""
# as Gemma's does
NO_SYSTEM = """{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}<|im_start|>assistant
"""

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def up(url):
    try: return urllib.request.urlopen(url, timeout=2).status == 200
    except (urllib.error.URLError, OSError): return False

class Running:
    "A server as a process of its own, until `stop`."
    def __init__(self, argv, port, log):
        self.url, self.log = f"http://127.0.0.1:{port}/v1", log
        with open(log, "w") as f:
            self.process = subprocess.Popen([sys.executable, *argv], stdin=subprocess.PIPE, stdout=f, stderr=f)
        end = time.monotonic() + 180
        while not up(f"http://127.0.0.1:{port}/health"):
            if self.process.poll() is None and time.monotonic() < end: time.sleep(0.2); continue
            self.stop()
            pytest.fail(f"{argv[1]} did not come up:\n{log.read_text()[-2000:]}")
    def stop(self):
        self.process.kill()
        self.process.communicate()

def llama_cpp(gguf, folder):
    pytest.importorskip("xllamacpp", reason="llama.cpp's server: pip install -c constraints.txt xllamacpp")
    port = free_port()
    server = Running(["-c", LLAMA, str(gguf), str(port)], port, folder / "llama.log")
    server.spec = f"{server.url}#smollm2"
    return server

def transformers_serve(gguf, folder):
    for name in ("fastapi", "uvicorn"):
        pytest.importorskip(name, reason="its server: pip install -c constraints.txt 'transformers[serving]'")
    from comam_nb.lm.backbone import load_backbone
    plain, no_system, port = folder / "smollm2", folder / "no_system", free_port()
    model = load_backbone(gguf, adapters=None, verbose=False) # it reads a GGUF of a hub only
    for place in (plain, no_system): model.tokenizer.save_pretrained(place)
    model.model.save_pretrained(plain)
    for f in plain.iterdir():
        if not (no_system / f.name).exists(): (no_system / f.name).symlink_to(f)
    (no_system / "chat_template.jinja").write_text(NO_SYSTEM)
    server = Running(["-m", "transformers.cli.transformers", "serve", "--port", str(port), "--device", "cpu"], port,
                     folder / "serve.log")
    server.spec, server.no_system = f"{server.url}#{plain}", f"{server.url}#{no_system}"
    return server

@pytest.fixture(scope="module", params=[llama_cpp, transformers_serve])
def real(request, smollm2, tmp_path_factory):
    server = request.param(smollm2, tmp_path_factory.mktemp("server"))
    yield server
    server.stop()

def run(*argv, said=None):
    "An installed command, as in a shell: (status, out, err)."
    found = shutil.which(argv[0], path=Path(sys.executable).parent) or shutil.which(argv[0])
    if not found: pytest.skip(f"the command {argv[0]} is not installed: pip install -e .")
    p = subprocess.run([found, *map(str, argv[1:])], input=said, capture_output=True, text=True, timeout=900)
    print(f"$ {' '.join(map(str, argv))}\n{said or ''}{p.stdout}{p.stderr}")
    return p.returncode, p.stdout, p.stderr


def test_a_memory_is_made_asked_and_talked_to(real, tmp_path):
    memory, log = tmp_path / "me.db", tmp_path / "log.jsonl"
    said = ("My cat is called Miso.", "I drink tea now, no more coffee.")
    log.write_text("".join(json.dumps({"messages": [{"role": "user", "content": s}]}) + "\n" for s in said))
    model = ["--backbone", real.spec, "--memory", memory, "--max-new-tokens", "32"]
    ask = ["comam", "answer", *model, "--query", "What is my cat called?"]
    code, out, err = run(*ask, "--history", log)
    assert code == 0 and not err, err
    assert out.index("session 1 of 2: 1 turns") < out.index("session 2 of 2: 1 turns") < out.index("\nanswer: ")
    code, out, err = run("comam", "chat", *model, said="Hello, I am Ana.\n/memory\n")
    assert code == 0 and not err and len(out.splitlines()) >= 2, err
    assert run(*ask)[0] == 0 # tomorrow, without a log


def test_lessons_are_made_and_used(real, server, tmp_path):
    bank, tasks, report = tmp_path / "bank.db", tmp_path / "tasks.jsonl", tmp_path / "report.json"
    sums = [(3748, 921), (5127, 386), (2293, 747)] # a 135M model cannot
    server.answer = lambda asked: next(rf"It is \boxed{{{a * b}}}." for a, b in sums if f"{a} * {b}" in asked)
    tasks.write_text("".join(json.dumps({"id": str(a), "prompt": f"What is {a} * {b}?", "domain": "math", "check":
        {"kind": "math", "answer": str(a * b)}}) + "\n" for a, b in sums))
    short = ["--max-tokens", "64", "--quiet", "--workers", "2", "--timeout", "600"] # a busy machine
    build = ["memcollab", "build", "--bank", bank, "--tasks", tasks, "--weak", f"plain:{real.spec}", "--strong",
             f"plain:{server.url}#m", "--distiller", real.spec, "--distill-tokens", "120", "--tries", "0", *short]
    code, out, err = run(*build, "--report", report)
    told = json.loads(report.read_text())
    assert code == 0 and told["solvers"]["strong"]["right"] == 3, (out, err)
    assert told["solvers"]["weak"]["attempts"] == 3 and told["solvers"]["weak"]["tokens"] > 0
    assert told["pairs"] and told["calls"] >= 1 # its own mistakes were put before it
    code, again, err = run(*build)
    assert code == 0 and "holds 6 attempts at these tasks already" in again, err
    assert "0 replies about them are new" in again
    agent = ["memcollab", "solve", "--bank", bank, "--agent", f"plain:{real.spec}"]
    code, out, err = run(*agent, "--prompt", "What is 2 + 2?", "--max-tokens", "32")
    assert code == 0 and "tokens read" in out and "0 written" not in out, (out, err)
    code, out, err = run(*agent, "--tasks", tasks, *short)
    assert code == 0 and "trajectories are in" in out, (out, err)


def test_what_a_server_lacks_is_said_and_survived(real, tmp_path):
    if not hasattr(real, "no_system"): pytest.skip("llama.cpp moves a system message itself, and answers to any name")
    talk = ["comam", "chat", "--backbone", real.no_system, "--max-new-tokens", "8"]
    code, out, err = run(*talk, said="Hello.\nBye.\n")
    assert code == 0 and "no reply" not in out and err.count("takes no system message") == 1, (out, err)
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"messages": [{"role": "user", "content": "I drink tea."}]}))
    code, out, err = run("comam", "answer", "--backbone", f"{real.url}#no-such", "--history", log, "--query", "tea?")
    where = real.url.removesuffix("/v1").removeprefix("http://")
    assert code == 2 and err.startswith(f"comam: no-such at {where}: ") and err.count("\n") == 1, err
