"""Kill what writes, at random moments and without warning, and look whether anything acknowledged is lost.

    python scripts/kills.py store bank journal eval trajectories --kills 500
    python scripts/kills.py adapters separate per_group priorities accumulation --kills 10   # of each way to train
    python scripts/kills.py fair --seconds 300       # no kill: four writers and six readers, the longest wait of each
    python scripts/kills.py full                     # no kill: a disk without room, by a limit and by a small tmpfs

`--kills` is for each word. Ends with 1 if anything was lost; `--out FILE` appends a line of JSON for each word.
"""
import argparse, importlib, json, os, platform, random, re, resource, select, shutil, signal, sqlite3, subprocess
import sys, tempfile, time, traceback, uuid, warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import filelock # noqa: F401 a fork shall not spend its short life on imports

from comam_nb.base.embedders import HashingEmbedder
from comam_nb.base.files import Journal, read_lines
from comam_nb.checks.constraints import Constraint
from comam_nb.memcollab.bank import ConstraintBank
from comam_nb.store.items import MemoryItem, MemoryStore

Tell = Callable[[str], None] # what a worker acknowledges goes through it, one line at a time

# ---- workers: each does its work in a folder, and goes on with what it finds there

def items_of(folder: Path) -> MemoryStore: return MemoryStore(folder / "memory.db", HashingEmbedder(64))

def work_store(folder: Path, tell: Tell) -> None:
    rng = random.Random(os.getpid())
    with items_of(folder) as store:
        while True:
            ids = [uuid.uuid4().hex for _ in range(3)]
            store.add([MemoryItem(i, "ana", f"<{i}> {'likes tea ' * rng.choice([1, 9, 60])}") for i in ids])
            tell("added " + " ".join(ids))
            if rng.random() < .4:
                gone = rng.choice(store.items("ana")).id
                tell(f"forgetting {gone}")
                store.forget("ana", gone)
                tell(f"forgotten {gone}")

def check_store(folder: Path, told: list[str]) -> list[str]:
    words = [line.split() for line in told]
    some = lambda word: {i for w, *ids in words if w == word for i in ids}
    on_disk = lambda: b"".join(p.read_bytes() for p in folder.iterdir())
    before = on_disk()
    bad = [f"forgotten {i} is on the disk" for i in some("forgotten") if i.encode() in before]
    with items_of(folder) as store:
        kept, after = {i.id for i in store.items("ana")}, on_disk()
        with store.file.session() as db: sound = db.execute("PRAGMA integrity_check").fetchone()[0]
    bad += [f"acknowledged {i} is lost" for i in some("added") - some("forgetting") - kept]
    bad += [f"forgotten {i} is back" for i in some("forgotten") & kept]
    bad += [f"{i} is deleted and on the disk" for i in some("forgetting") - kept if i.encode() in after]
    for w, *ids in words:
        if w == "added" and 0 < len(set(ids) - some("forgetting") - kept) < 3: bad.append(f"{ids} is torn")
    return bad + ([] if sound == "ok" else [sound])

def work_bank(folder: Path, tell: Tell) -> None:
    rng = random.Random(os.getpid())
    with ConstraintBank(folder / "bank.db") as bank:
        while True:
            new = [Constraint(f"case {uuid.uuid4().hex}", "check the unit", "haste", "c") for _ in range(3)]
            tell("added " + " ".join(bank.add(new, check=False)))
            if rng.random() < .3:
                gone = rng.choice(bank.entries()).id
                tell(f"removing {gone}")
                bank.remove(gone)
                tell(f"removed {gone}")

def check_bank(folder: Path, told: list[str]) -> list[str]:
    words = [line.split() for line in told]
    some = lambda word: {i for w, *ids in words if w == word for i in ids}
    with ConstraintBank(folder / "bank.db") as bank:
        kept, versions = {c.id for c in bank.entries()}, bank.versions()
        torn = [v.version for v in versions[-9:] if len(bank.entries(version=v.version)) != v.entries]
        bad = [f"version {v} is torn" for v in torn]
        if kept and not bank.retrieve("case", "c", ""): bad.append("nothing is found")
        with bank.file.session() as db: sound = db.execute("PRAGMA integrity_check").fetchone()[0]
    bad += [f"acknowledged {i} is lost" for i in some("added") - some("removing") - kept]
    bad += [f"removed {i} is back" for i in some("removed") & kept]
    return bad + ([] if sound == "ok" else [sound])

def number(record: dict) -> int: return record["n"]

def work_journal(folder: Path, tell: Tell) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore") # a torn line
        with Journal(folder / "journal.jsonl", number, '{"n"') as journal:
            for n in range(len(journal.records), 10**9):
                journal.append({"n": n, "text": "tea " * (n % 50)})
                tell(f"wrote {n}")

def check_journal(folder: Path, told: list[str]) -> list[str]:
    path = folder / "journal.jsonl"
    if not path.exists(): return ["there is no journal"] if told else []
    found = read_lines(path.read_bytes(), path, number, '{"n"', "record")[0]
    last = max((int(line.split()[1]) for line in told), default=-1)
    if random.random() < .3:
        with open(path, "a") as f: f.write('{"n": 7, "te') # as if the last line had been torn
    return [] if found == list(range(len(found))) and len(found) > last else [f"{last} acknowledged, {len(found)} kept"]

def questions() -> list:
    "Five users, four sessions each, and after each of them a question."
    from comam_nb.data import Episode, Message, Query, Session
    made = []
    for user in ("ana", "ben", "eve", "ida", "leo"):
        said = [Session(f"s{n}", (Message("user", f"I drink {user}-{n} now.", n),)) for n in range(1, 5)]
        made += [Episode(said[:n], Query("Which drink?", f"{user}{n}"), answer=f"{user}-{n}", evidence={n}, user=user,
                         id=f"{user}{n}") for n in range(1, 5)]
    return made

def run_file(folder: Path) -> Path: return folder / "run.jsonl"

def work_eval(folder: Path, tell: Tell) -> None:
    from comam_nb.lm.usage import Usage
    from comam_nb.runs.bench import run_system
    from comam_nb.systems.interface import Answer, MemorySystem
    class Last(MemorySystem):
        name = "last"
        def __init__(self, user): self.said, self.usage = [], Usage()
        def observe(self, session): self.said += [m.content for m in session.messages]
        def memory(self): return ()
        def answer(self, query, options=None):
            tell("asked")
            time.sleep(.002)
            return Answer(self.said[-1].split()[-2])
    run_system(Last, questions(), run_file(folder), name="last")

def state_eval(folder: Path) -> dict:
    from comam_nb.runs.bench import read_run
    if not run_file(folder).exists() or b"\n" not in run_file(folder).read_bytes(): return {}
    return {i: (r["text"], r["right"]) for i, r in read_run(run_file(folder))[1].items()}

def work_trajectories(folder: Path, tell: Tell) -> None:
    from comam_nb.checks.tasks import Task
    from comam_nb.lm.chat import Reply
    from comam_nb.memcollab.attempts import Solver
    from comam_nb.memcollab.solving import solve
    class Echo:
        name, workers = "echo", 2
        def chat(self, messages, max_tokens=512, temperature=0.0, seed=None):
            time.sleep(.002)
            return Reply(rf"\boxed{{{messages[-1]['content'].split()[-1]}}}", 10, 5, .1, "stop")
    tasks = [Task(f"n{i}", f"Write down the number {i}", check={"kind": "math", "answer": str(i)}, domain="math")
             for i in range(30)]
    solve(tasks, Solver("a", Echo(), "plain"), run_file(folder))

def state_trajectories(folder: Path) -> dict:
    from comam_nb.memcollab.solving import load_attempts
    if not run_file(folder).exists(): return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_attempts(run_file(folder))
    twice = [i for i, n in Counter(t.task_id for t in found).items() if n > 1]
    return {t.task_id: (t.answer, t.right) for t in found} | ({"twice": twice} if twice else {})

def work_training(kind: str) -> Callable[[Path, Tell], None]:
    def work(folder: Path, tell: Tell) -> None:
        import torch
        from comam_nb.microworld import MicroWorld, make_episodes
        from comam_nb.rl.sampler import PrioritySampler
        from comam_nb.rl.settings import CoMAMConfig
        from comam_nb.runs.folder import Run
        from comam_nb.runs.training import train_run
        from comam_nb.worlds.warm_start import micro_agents, micro_rewards
        torch.set_num_threads(1)
        sys.stdout = sys.stderr = open(os.devnull, "w")
        world, run = MicroWorld(), Run(folder)
        resume = (folder / "config.json").exists()
        if not resume: run.begin({})
        team = micro_agents(world, "separate" if kind == "separate" else "adapters")
        episodes = make_episodes(world, 8, seed=0)
        config = CoMAMConfig(str(folder / "checkpoints"), max_steps=4, episodes_per_step=2, num_generations=4,
                             learning_rate=6e-4, lr_scheduler_type="linear", max_completion_length=64, use_cpu=True,
                             disable_tqdm=True, save_strategy="steps", save_steps=1, save_total_limit=2,
                             sampling="per_group" if kind == "per_group" else "stream",
                             micro_batches_per_agent=2 if kind == "accumulation" else 1)
        sampler = PrioritySampler(8) if kind == "priorities" else None
        train_run(run, team, episodes, make_episodes(world, 4, held_out=True), micro_rewards(world), config, resume,
                  sampler=sampler)
        (folder / "ended").touch()
    return work

def state_training(folder: Path) -> dict:
    "Metrics without times, and a hash of all weights; nothing before the end."
    import hashlib
    if not (folder / "ended").exists(): return {}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = {m["step"]: {k: v for k, v in m.items() if not re.search("time|second", k)} for m in lines}
    weights = sorted((folder / "weights").rglob("*.safetensors"))
    hashes = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in weights}
    if not hashes or len(lines) != len(told): raise ValueError("no weights, or a step twice")
    return {"metrics": told, "weights": hashes}

TRAINING = "adapters", "separate", "per_group", "priorities", "accumulation"
ENDLESS = {"store": (work_store, check_store), "bank": (work_bank, check_bank),
           "journal": (work_journal, check_journal)}
ENDING = {"eval": (work_eval, state_eval), "trajectories": (work_trajectories, state_trajectories),
          **{k: (work_training(k), state_training) for k in TRAINING}}

# ---- the one who kills

def in_a_fork(work: Callable[[Path, Tell], None], folder: Path, lines: int = 0, seconds: float | None = None,
              limit: int = 0) -> tuple[list[str], int, str]:
    """Let a fork work: what it told, its exit status, its error. It is killed so many seconds after it has told so many
    lines, or never (None); `limit` is of the bytes in a file."""
    out, told = os.pipe()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            work(folder, lambda line: os.write(told, f"{line}\n".encode()) and None)
            code = 0
        except BaseException as e:
            known = type(e).__module__.startswith("comam_nb")
            os.write(told, f"error {e if known else traceback.format_exc()}\n".encode())
        finally: os._exit(code)
    os.close(told)
    text, end = b"", None if seconds is None or lines else time.monotonic() + seconds
    while True: # until the pipe is closed: it has ended
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0:
            os.kill(pid, signal.SIGKILL)
            end = None
        elif select.select([out], [], [], left)[0]:
            if not (piece := os.read(out, 2**16)): break
            text += piece
            if seconds is not None and end is None and text.count(b"\n") >= lines: end = time.monotonic() + seconds
    os.close(out)
    status = os.waitpid(pid, 0)[1]
    said, _, error = text.decode().partition("error ")
    return [line.strip() for line in said.splitlines(True) if line.endswith("\n")], status, error

def killed(status: int) -> bool: return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL

def kill_endless(kind: str, kills: int, rng: random.Random) -> dict:
    "A worker that never ends: killed again and again, in a new folder after 40 kills."
    (work, check), told, bad, folder = ENDLESS[kind], list[str](), list[str](), None
    total = 0
    for n in range(kills):
        if folder is None or n % 40 == 0:
            if folder: shutil.rmtree(folder)
            folder, told = Path(tempfile.mkdtemp(dir=WHERE)), []
        lines, status, error = in_a_fork(work, folder, rng.randint(0, 12), rng.uniform(0, .02))
        if not killed(status): bad.append(f"kill {n}: ended by itself: {error}")
        told += lines
        total += len(lines)
        bad += [f"kill {n}: {b}" for b in check(folder, told)]
    if folder: shutil.rmtree(folder)
    return {"kills": kills, "acknowledged": total, "problems": bad}

def kill_ending(kind: str, kills: int, rng: random.Random) -> dict:
    "A worker that comes to its end when it is left alone: killed until then, and its end is that of an unkilled one."
    (work, state), bad, ends, done = ENDING[kind], list[str](), 0, 0
    folder = Path(tempfile.mkdtemp(dir=WHERE))
    began = time.monotonic()
    _, status, error = in_a_fork(work, folder)
    whole, length = state(folder), time.monotonic() - began
    if status: raise SystemExit(f"{kind} does not run even if nobody kills it: {error}")
    while done < kills:
        shutil.rmtree(folder)
        folder, before = Path(tempfile.mkdtemp(dir=WHERE)), {}
        while True: # from the third kill of a run on it gets more and more time
            _, status, error = in_a_fork(work, folder, 0, rng.uniform(0, length) if done < kills else None)
            now = state(folder)
            if lost := [k for k in before if now.get(k) != before[k]]: bad.append(f"kill {done}: {lost[:3]} lost")
            before = now
            if not killed(status): break
            done += 1
        if status: bad.append(f"after {done} kills it does not go on: {error}")
        elif now != whole: bad.append(f"after {done} kills its end is another one")
        ends += 1
    shutil.rmtree(folder)
    return {"kills": done, "runs": ends, "seconds_unkilled": round(length, 2), "problems": bad}

# ---- fair turns

def fair(seconds: float, writers: int = 4, readers: int = 6) -> dict:
    "Everybody as fast as they can, on one file: how often each was served, and its longest wait, in seconds."
    folder, pipes = Path(tempfile.mkdtemp(dir=WHERE)), {}
    with items_of(folder) as store: store.add([MemoryItem(user="all", text=f"tea {n}") for n in range(50)])
    start = time.time() + 1
    for i in range(writers + readers):
        who, (out, told) = f"{'writer' if i < writers else 'reader'} {i}", os.pipe()
        if os.fork() == 0:
            try: os.write(told, json.dumps(busy(folder, who, start, start + seconds)).encode())
            finally: os._exit(0)
        os.close(told)
        pipes[who] = out
    found = {}
    for who, out in pipes.items():
        with open(out, "rb") as f: found[who] = json.loads(f.read() or b'{"error": "it died"}')
    for _ in pipes: os.wait()
    shutil.rmtree(folder)
    bad = [f"{who}: {x['error']}" for who, x in found.items() if "error" in x]
    return {"run_for": seconds, "served": found, "problems": bad}

def busy(folder: Path, who: str, start: float, end: float) -> dict:
    "One of them."
    n, worst = 0, 0.0
    try:
        with items_of(folder) as store:
            while time.time() < start: time.sleep(.001)
            while time.time() < end:
                began = time.monotonic()
                if who.startswith("writer"): store.add([MemoryItem(user=who, text=f"tea {n} {i}") for i in range(3)])
                else: store.search("tea 3", "all", 5)
                worst, n = max(worst, time.monotonic() - began), n + 1
    except ValueError as e: return {"error": str(e), "times": n, "longest_wait": round(worst, 3)}
    return {"times": n, "longest_wait": round(worst, 3)}

# ---- a disk without room

def full(kinds: tuple[str, ...] = (*ENDLESS, "eval", "trajectories", "adapters")) -> dict:
    "Every worker under a limit on the size of a file, then on a small tmpfs, then with room again."
    bad, said, tmpfs = list[str](), {}, small_disk()
    for kind in kinds:
        limit = 200_000 if kind in ENDLESS else 20_000 if kind == "adapters" else 1500
        for how in ("limit", *(["tmpfs"] if tmpfs else [])):
            folder = Path(tempfile.mkdtemp(dir=WHERE if how == "limit" else tmpfs))
            work, check = {**ENDLESS, **ENDING}[kind]
            if how == "tmpfs":
                (folder / "filler").write_bytes(bytes(free(folder) - (limit if kind in ENDLESS else 4096)))
            told, status, error = in_a_fork(work, folder, 0, 60, limit if how == "limit" else 2**40)
            said[f"{kind}, {how}"] = error.strip()
            if "\n" in error.strip() or not error: bad.append(f"{kind}, {how}: no single line: {error[-300:]!r}")
            (folder / "filler").unlink(missing_ok=True)
            if kind in ENDLESS:
                bad += [f"{kind}, {how}: {b}" for b in check(folder, told)]
                again, status, error = in_a_fork(work, folder, 3, 0)
                if not killed(status) or not again: bad.append(f"{kind}, {how}: does not go on: {error}")
            else:
                _, status, error = in_a_fork(work, folder)
                if status or not check(folder): bad.append(f"{kind}, {how}: does not go on: {error}")
            shutil.rmtree(folder)
    if tmpfs: subprocess.run(["umount", tmpfs], check=False)
    return {"said": said, "tmpfs": bool(tmpfs) or "cannot be mounted here", "problems": bad}

def free(folder: Path) -> int:
    at = os.statvfs(folder)
    return at.f_bavail * at.f_bsize

def small_disk() -> str | None: # None: it may not be mounted
    "A tmpfs of four megabytes."
    place = tempfile.mkdtemp()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True)
    return None if done.returncode else place

# ---- the command

WHERE: str | None = None # folders are made here; None: the system's place

def processor() -> str:
    try: return re.search(r"model name\s*: *(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError): return platform.processor() or platform.machine()

def main(argv: list[str] | None = None) -> int:
    global WHERE
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="+", choices=[*ENDLESS, *ENDING, "fair", "full"])
    p.add_argument("--kills", type=int, default=20, help="of each (default 20)")
    p.add_argument("--seconds", type=float, default=300, help="of `fair` (default 300)")
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    p.add_argument("--where", help="a folder on the disk to try (default: the system's place for temporary files)")
    p.add_argument("--out", help="append a line of JSON for each")
    args = p.parse_args(argv)
    WHERE, lost = args.where, False
    first = ["comam_nb.runs.training", "comam_nb.worlds.warm_start"] if set(args.what) & {*TRAINING, "full"} else []
    if set(args.what) & {"eval", "trajectories", "full"}:
        first += ["comam_nb.memcollab.solving", "comam_nb.runs.bench", "comam_nb.systems.interface"]
    for module in first: importlib.import_module(module) # a fork shall not spend its short life on imports
    for what in args.what:
        rng, began, load = random.Random(args.seed), time.monotonic(), os.getloadavg()[0]
        if what == "fair": found = fair(args.seconds)
        elif what == "full": found = full()
        else: found = (kill_endless if what in ENDLESS else kill_ending)(what, args.kills, rng)
        record = {"what": what, **found, "seconds": round(time.monotonic() - began, 1), "load": round(load, 1),
                  "processor": processor(), "cores": os.cpu_count(), "python": platform.python_version(),
                  "sqlite": sqlite3.sqlite_version, "date": time.strftime("%Y-%m-%d"),
                  "command": "python scripts/kills.py " + " ".join(argv if argv is not None else sys.argv[1:])}
        print(json.dumps(record, ensure_ascii=False), flush=True)
        if args.out:
            with open(args.out, "a", encoding="utf-8") as f: f.write(json.dumps(record, ensure_ascii=False) + "\n")
        lost = lost or bool(found["problems"])
    return int(lost)

if __name__ == "__main__": sys.exit(main())
