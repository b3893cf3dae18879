"""Cut the power, by proxy: record what our own code asks of the disk, replay it up to any point, and look what is left.

    python scripts/power.py store bank journal eval files --points 300     # of each; needs strace (Linux)

A process works with a real store, bank, journal, run file, or with whole files and folders, while strace writes down
every call that changes a file, with its bytes. The calls are replayed on a model of a disk up to a random point. What
was not forced to the disk by then (fsync of the file; of the folder, for names) is lost, or kept, or kept in part: any
of the writes, sectors of 512 bytes of them, or names up to some change. What the disk then holds is opened with our own
code: it must be sound and hold all that was acknowledged before that point, and nothing that was forgotten.

Ends with 1 if it does not; `--out FILE` appends a line of JSON for each.
"""
import argparse, json, os, platform, random, re, shutil, sqlite3, subprocess, sys, tempfile, time, traceback, warnings
from collections.abc import Iterator
from pathlib import Path

import kills # beside this file: workers, and what is checked
from comam_nb.base.files import put_in_place, write_whole
from comam_nb.checks.constraints import Constraint
from comam_nb.memcollab.bank import ConstraintBank
from comam_nb.store.items import MemoryItem

Tell = kills.Tell
MODES = "nothing", "everything", "some", "sectors", "first"

# ---- a disk

class File:
    "What it holds, what of it is on the disk for sure, and the changes in between."
    def __init__(self) -> None: self.live, self.disk, self.pending = bytearray(), b"", list[tuple[int, bytes | None]]()
    def change(self, at: int, data: bytes | None) -> None: # None: the file ends at `at`
        put(self.live, at, data)
        self.pending.append((at, data))
    def force(self) -> None: self.disk, self.pending = bytes(self.live), []
    def after(self, mode: str, rng: random.Random) -> bytes:
        "What a cut leaves."
        left, until = bytearray(self.disk), rng.randint(0, len(self.pending))
        for n, (at, data) in enumerate(self.pending):
            kept = {"nothing": False, "everything": True, "some": rng.random() < .5, "first": n < until}.get(mode)
            if kept: put(left, at, data)
            elif kept is None or (mode == "first" and n == until): # a part of it
                if data is None: rng.random() < .5 and put(left, at, data)
                else:
                    for i in range(0, len(data), 512):
                        if rng.random() < .5: put(left, at + i, data[i:i + 512])
        return bytes(left)

def put(live: bytearray, at: int, data: bytes | None) -> None:
    if data is None and at < len(live): del live[at:]
    elif len(live) < at: live.extend(bytes(at - len(live)))
    if data is not None: live[at:at + len(data)] = data

class Folder:
    "Names; a change of names is on the disk once the folder is forced there, and never before an earlier change."
    def __init__(self) -> None:
        self.live, self.disk = dict[str, "File | Folder"](), dict[str, "File | Folder"]()
        self.pending = list[tuple[str, str | None, "File | Folder | None"]]()
    def change(self, name: str, became: str | None = None, node: "File | Folder | None" = None) -> None:
        "A node gets a name, or a name another one, or goes."
        rename(self.live, name, became, node)
        self.pending.append((name, became, node))
    def force(self) -> None: self.disk, self.pending = dict(self.live), []
    def leave(self, place: Path, mode: str, rng: random.Random) -> None:
        "Write what a cut leaves."
        names, until = dict(self.disk), rng.randint(0, len(self.pending))
        until = {"nothing": 0, "everything": len(self.pending)}.get(mode, until)
        for change in self.pending[:until]: rename(names, *change)
        place.mkdir()
        for name, node in names.items():
            if isinstance(node, Folder): node.leave(place / name, mode, rng)
            elif not name.endswith(("-shm", ".lock")): (place / name).write_bytes(node.after(mode, rng))

def rename(names: dict, name: str, became: str | None, node: "File | Folder | None") -> None:
    if node is not None: names[name] = node
    elif became is None: names.pop(name, None)
    elif name in names: names[became] = names.pop(name)

# ---- what strace wrote

CALLS = ("open,openat,creat,close,dup,dup2,dup3,lseek,write,pwrite64,writev,pwritev,pwritev2,sendfile,copy_file_range,"
         "fallocate,fsync,fdatasync,ftruncate,truncate,unlink,unlinkat,rename,renameat,renameat2,link,linkat,symlink,"
         "symlinkat,mkdir,mkdirat,rmdir")
LINE = re.compile(r"(\d+) +(?:(\w+)\((.*)\) += (-?\d+)|(.*) <unfinished \.\.\.>|<\.\.\. \w+ resumed>(.*))", re.ASCII)

def calls(path: Path) -> Iterator[tuple[str, list[str], int]]:
    "Calls that succeeded, in the order in which they ended."
    begun = dict[str, str]()
    for line in path.open():
        if not (m := LINE.match(line)): continue # a signal, an exit
        pid, name, args, result, start, rest = m.groups()
        if start is not None:
            begun[pid] = start
            continue
        if rest is not None:
            if not (m := LINE.match(f"{pid} {begun.pop(pid)}{rest}")): continue
            _, name, args, result, _, _ = m.groups()
        if int(result) >= 0: yield name, re.split(", ", args), int(result)

def text(shown: str) -> bytes: # of -xx: "\x61\x62"
    if shown.endswith("..."): raise ValueError("a write is longer than strace was told to keep")
    return bytes.fromhex(shown.strip('"').replace("\\x", ""))

class Disk:
    "A folder under the calls of a process, and what it has told."
    def __init__(self, root: Path) -> None:
        self.root, self.top, self.told = root, Folder(), list[str]()
        self.open = dict[int, tuple["File | Folder | None", str, int, bool]]() # fd -> node, path, position, appends
    def path(self, shown: str, at: str = "AT_FDCWD") -> str:
        found = text(shown).decode()
        return found if at == "AT_FDCWD" or found[0] == "/" else f"{self.open[int(at)][1]}/{found}"
    def find(self, path: str) -> tuple[Folder, str] | None: # the folder and the name; None: elsewhere
        if not path.startswith(f"{self.root}/"): return None
        at, *rest = self.top, *Path(path).relative_to(self.root).parts
        for part in rest[:-1]: at = at.live[part]
        return at, rest[-1]
    def node(self, path: str) -> "File | Folder | None":
        if path.rstrip("/") == str(self.root): return self.top
        found = self.find(path)
        return found and found[0].live.get(found[1])
    def do(self, name: str, args: list[str], result: int) -> bool:
        "One call. Whether it changed something, or told something."
        if name in ("write", "fsync", "fdatasync", "ftruncate", "pwrite64"): return self.on_file(name, args, result)
        if name in ("open", "openat", "creat"): return self.opens(name, args, result)
        if name == "close": self.open.pop(int(args[0]), None)
        elif name == "lseek":
            node, path, _, appends = self.open.get(int(args[0]), (None, "", 0, False))
            if path: self.open[int(args[0])] = node, path, result, appends
        elif name in ("mkdir", "mkdirat", "unlink", "unlinkat", "rmdir"):
            found = self.find(self.path(*(reversed(args[:2]) if name.endswith("at") else args[:1])))
            if found: found[0].change(found[1], node=Folder() if name.startswith("mk") else None)
            return found is not None
        elif name.startswith("rename"):
            pairs = [args[:2], args[2:4]] if "at" in name else [["AT_FDCWD", a] for a in args]
            old, new = (self.find(self.path(p, at)) for at, p in pairs)
            if old is None and new is None: return False
            if old is None or new is None or old[0] is not new[0]: raise ValueError("a name goes to another folder")
            old[0].change(old[1], new[1])
            return True
        elif any(a.isdigit() and int(a) in self.open and self.open[int(a)][0] for a in args[:1]) or \
                any(str(self.root) in text(a).decode(errors="replace") for a in args if a[:1] == '"'):
            raise ValueError(f"the model of a disk has no {name}")
        return False
    def opens(self, name: str, args: list[str], result: int) -> bool:
        at, shown, how = args[:3] if name == "openat" else ("AT_FDCWD", args[0], (*args, "O_CREAT|O_TRUNC")[1])
        path, changed = self.path(shown, at), False
        if (found := self.find(path)) and "O_CREAT" in how and found[1] not in found[0].live:
            found[0].change(found[1], node=File())
            changed = True
        node = self.node(path)
        self.open[result] = node, path, 0, "O_APPEND" in how
        if isinstance(node, File) and "O_TRUNC" in how and node.live:
            node.change(0, None)
            changed = True
        return changed
    def on_file(self, name: str, args: list[str], result: int) -> bool:
        fd = int(args[0])
        node, path, position, appends = self.open.get(fd, (None, "", 0, False))
        if fd == 1 and name == "write" and node is None:
            self.told += text(args[1]).decode().splitlines()
            return True
        if node is None: return False
        if name in ("fsync", "fdatasync"): node.force()
        elif isinstance(node, Folder): raise ValueError(f"{name} on a folder")
        elif name == "ftruncate": node.change(int(args[1]), None)
        else:
            data = text(args[1])[:result]
            start = int(args[3]) if name == "pwrite64" else len(node.live) if appends else position
            node.change(start, data)
            if name == "write": self.open[fd] = node, path, start + result, appends
        return True

# ---- lives that `kills` has not, and what is checked

def work_bank(folder: Path, tell: Tell) -> None:
    "As in `kills`, and now and then all that came from a model is forgotten."
    rng, n = random.Random(os.getpid()), 0
    with ConstraintBank(folder / "bank.db") as bank:
        while True:
            n += 1
            pair = {"task": "t", "right": "r", "wrong": "w", "right_model": f"model{n}", "wrong_model": "m"}
            new = [Constraint(f"case MARK{n:04d} {i}", "check the unit", "haste", "c", source={"pairs": [pair]})
                   for i in range(rng.choice([1, 3]))]
            tell("added " + " ".join(bank.add(new, check=False)))
            if rng.random() < .2:
                gone = rng.choice([c for c in bank.entries() if "pairs" in c.source])
                model = gone.source["pairs"][0]["right_model"]
                theirs = [c.id for c in bank.entries() if model in json.dumps(c.source)]
                tell("removing " + " ".join(theirs))
                bank.forget("model", model)
                tell("removed " + " ".join(theirs))
                tell(f"wiped MARK{int(model[5:]):04d}")

def check_bank(folder: Path, told: list[str]) -> list[str]:
    before = b"".join(p.read_bytes() for p in folder.iterdir())
    wiped = [line.split()[1] for line in told if line.startswith("wiped ")]
    bad = [f"{mark} is on the disk" for mark in wiped if mark.encode() in before]
    with ConstraintBank(folder / "bank.db") as bank: # versions before it hold less than they did
        last = max((v.version for v, _ in bank.removals()), default=0)
    for found in kills.check_bank(folder, told):
        torn = re.fullmatch(r"version (\d+) is torn", found)
        if not torn or int(torn[1]) > last: bad.append(found)
    return bad

def whole(n: int) -> str: return json.dumps({"n": n, "text": "tea " * 3000})

def work_files(folder: Path, tell: Tell) -> None:
    "A file written again and again, and now and then a folder of files, as checkpoints are."
    for n in range(10**9):
        write_whole(folder / "state.json", whole(n))
        tell(f"wrote {n}")
        if n % 3: continue
        part = folder / f".checkpoint-{n}.part"
        (part / "weights").mkdir(parents=True)
        for name in ("one.json", "weights/two.json"): (part / name).write_text(whole(n))
        put_in_place(part, folder / f"checkpoint-{n}")
        tell(f"placed {n}")

def check_files(folder: Path, told: list[str]) -> list[str]:
    last = {w: int(n) for w, n in map(str.split, told)}
    path, placed = folder / "state.json", {int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*")}
    now = json.loads(path.read_text())["n"] if path.exists() else -1
    bad = [f"{last['wrote']} was acknowledged, {now} is there"] if now < last.get("wrote", -1) else []
    if now >= 0 and path.read_text() != whole(now): bad.append("state.json is another one")
    bad += [f"checkpoint {n} is lost" for n in range(0, last.get("placed", -1) + 1, 3) if n not in placed]
    return bad + [f"checkpoint {n} is torn" for n in placed for name in ("one.json", "weights/two.json")
                  if (folder / f"checkpoint-{n}" / name).read_text() != whole(n)]

def work_eval(folder: Path, tell: Tell) -> None: kills.work_eval(folder / "runs" / "eval", tell)

def check_eval(folder: Path, told: list[str]) -> list[str]:
    "When a question is asked, the answers to all before it are on the disk."
    kept = kills.state_eval(folder / "runs" / "eval")
    if len(kept) < len(told) - 1: return [f"{len(told) - 1} acknowledged, {len(kept)} kept"]
    if random.random() > .1: return []
    _, status, error = kills.in_a_fork(work_eval, folder)
    return [f"does not go on: {error}"] if status or len(kills.state_eval(folder / "runs" / "eval")) != 20 else []

def go_on(kind: str, folder: Path) -> None:
    "What is left can be written to."
    if kind == "store":
        with kills.items_of(folder) as store: store.add(MemoryItem("new", "ana", "tea"))
    if kind == "bank":
        with ConstraintBank(folder / "bank.db") as bank:
            bank.add(Constraint("case new", "check the sum", "", "c"), check=False)

LIVES = {"store": (kills.work_store, kills.check_store), "bank": (work_bank, check_bank),
         "journal": (kills.work_journal, kills.check_journal), "eval": (work_eval, check_eval),
         "files": (work_files, check_files)}

# ---- the command

def live(kind: str, folder: Path, steps: int) -> None:
    "Tell so much on standard output, and end without closing anything."
    left = steps
    def tell(line: str) -> None:
        nonlocal left
        os.write(1, f"{line}\n".encode())
        left -= 1
        if not left: os._exit(0)
    LIVES[kind][0](folder, tell)

def record(kind: str, folder: Path, steps: int, log: Path) -> None:
    command = [shutil.which("strace"), "-f", "-o", str(log), "-xx", "-s", "4000000", "-e", f"trace={CALLS}",
               sys.executable, __file__, kind, "--live", str(folder), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: raise SystemExit(f"power.py: strace cannot record here: {done.stderr.strip()[-500:]}")

def cut(kind: str, points: int, steps: int, rng: random.Random) -> dict:
    base = Path(os.path.realpath(tempfile.mkdtemp(dir=kills.WHERE)))
    folder, log, bad, modes = base / "life", base / "calls", list[str](), dict.fromkeys(MODES, 0)
    folder.mkdir()
    record(kind, folder, steps, log)
    disk = Disk(folder)
    total = sum(disk.do(*call) for call in calls(log)) # changes, and what was told
    if not disk.told: raise SystemExit(f"power.py: {kind}: nothing was recorded")
    whole_life, chosen = disk.top, sorted(rng.choices(range(1, total + 1), k=points))
    bad += differs(whole_life, folder)
    disk, n = Disk(folder), 0
    for call in calls(log):
        if not disk.do(*call): continue
        n += 1
        for _ in range(chosen.count(n)):
            mode = rng.choice(MODES)
            modes[mode] += 1
            left = base / "left"
            disk.top.leave(left, mode, rng)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = LIVES[kind][1](left, disk.told)
                    go_on(kind, left)
            except Exception: found = [traceback.format_exc()[-900:]]
            bad += [f"call {n} of {total}, {mode}: {b}" for b in found]
            shutil.rmtree(left)
    shutil.rmtree(base)
    return {"points": points, "calls": total, "told": len(disk.told), "modes": modes, "problems": bad}

def differs(top: Folder, folder: Path) -> list[str]:
    "The model of the disk, compared with the disk: a call that it does not know would show."
    bad = []
    for name, node in top.live.items():
        if isinstance(node, Folder): bad += differs(node, folder / name)
        elif not name.endswith("-shm") and (folder / name).read_bytes() != node.live:
            bad.append(f"{name} is replayed badly")
    return bad + [f"{p} is not replayed" for p in folder.iterdir() if p.name not in top.live]

def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="+", choices=LIVES)
    p.add_argument("--points", type=int, default=300, help="at which the power is cut, of each (default 300)")
    p.add_argument("--steps", type=int, default=60, help="that are acknowledged in a recorded life (default 60)")
    p.add_argument("--seed", type=int, default=0, help="of the points, and of what is lost")
    p.add_argument("--where", help="a folder to work in (default: the system's place for temporary files)")
    p.add_argument("--out", help="append a line of JSON for each")
    p.add_argument("--live", metavar="DIR", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.live:
        live(args.what[0], Path(args.live), args.steps)
        return 0
    if not shutil.which("strace"):
        print("power.py: strace records the calls and is not here: install it (Debian: apt-get install strace)",
              file=sys.stderr)
        return 2
    kills.WHERE, lost = args.where, False
    for what in args.what:
        random.seed(args.seed)
        began = time.monotonic()
        found = cut(what, args.points, args.steps, random.Random(args.seed))
        line = {"what": what, **found, "seconds": round(time.monotonic() - began, 1), "processor": kills.processor(),
                "cores": os.cpu_count(), "python": platform.python_version(), "sqlite": sqlite3.sqlite_version,
                "date": time.strftime("%Y-%m-%d"),
                "command": "python scripts/power.py " + " ".join(argv if argv is not None else sys.argv[1:])}
        print(json.dumps(line, ensure_ascii=False), flush=True)
        if args.out:
            with open(args.out, "a", encoding="utf-8") as f: f.write(json.dumps(line, ensure_ascii=False) + "\n")
        lost = lost or bool(found["problems"])
    return int(lost)

if __name__ == "__main__": sys.exit(main())
