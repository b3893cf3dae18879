"""How long each notebook runs: nbs/logs/minutes.csv, measured.

    python scripts/minutes.py                          # what has no row yet, or other code than when it was measured
    python scripts/minutes.py walkthroughs book/01     # those whose path holds one of these texts, again

Run All in a fresh kernel and an empty folder, one notebook after the other, without the cells that `nbdev_test` leaves
out (marked *slow* or *gpu*). A row is written as soon as it is measured, so that the next call goes on where one was cut
off. `seconds` are of the clock, `cpu_seconds` of a core: those say more where others use the machine, too. Exit code 1
if a notebook fails; it gets no row.
"""
import argparse, csv, hashlib, json, os, platform, re, resource, sys, tempfile, time
from pathlib import Path

from address import ROOT, notebooks

FILE = ROOT / "nbs" / "logs" / "minutes.csv"
COLUMNS = ["notebook", "seconds", "cpu_seconds", "left_out", "needs", "processor", "cores", "load", "date", "code"]

def read_minutes(file: Path = FILE):
    "notebook -> its row."
    if not file.exists(): return {}
    with open(file, encoding="utf-8", newline="") as f: return {r["notebook"]: r for r in csv.DictReader(f)}

def write_minutes(rows: dict, file: Path = FILE):
    "All rows, in the order of the notebooks' names; the old file stays until the new one is whole."
    new = file.with_suffix(".new")
    with open(new, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[n] for n in sorted(rows))
    new.replace(file)

def code_of(cells):
    "A short hash of a notebook's code."
    code = [c for c in cells if c["cell_type"] == "code"]
    return hashlib.sha256("\0".join("".join(c["source"]) for c in code).encode()).hexdigest()[:8]

def processor():
    "The processor's name."
    try: return re.search(r"model name\s*: *(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError): return platform.processor() or platform.machine()

def measure(notebook: Path, limit: int):
    "A notebook's row. Raises what nbclient raises where a cell fails."
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(notebook, as_version=4)
    code, every = code_of(nb.cells), len(nb.cells)
    nb.cells = [c for c in nb.cells if not re.search(r"^#\| *(slow|gpu)\b", c.source, re.M)]
    left_out = every - len(nb.cells)
    nb.cells = [c for c in nb.cells if not re.search(r"^#\| *eval: *false", c.source, re.M)]
    spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    load, before, began = os.getloadavg()[0], spent(), time.perf_counter()
    with tempfile.TemporaryDirectory() as empty:
        NotebookClient(nb, timeout=limit, kernel_name="python3", resources={"metadata": {"path": empty}}).execute()
    return dict(notebook=notebook.relative_to(ROOT / "nbs").as_posix(), seconds=round(time.perf_counter() - began, 1),
                cpu_seconds=round(spent() - before, 1), left_out=left_out,
                needs="GPU" if nb.metadata.get("accelerator") == "GPU" else "CPU", processor=processor(),
                cores=os.cpu_count(), load=round(load, 1), date=time.strftime("%Y-%m-%d"), code=code)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("texts", nargs="*", help="texts of which a notebook's path holds one")
    parser.add_argument("--limit", type=int, default=1200, help="seconds for one cell")
    a, failed = parser.parse_args(argv), 0
    named = {p.relative_to(ROOT / "nbs").as_posix(): p for p in notebooks()}
    if unknown := [t for t in a.texts if not any(t in n for n in named)]:
        parser.error(f"no notebook's path holds {', '.join(unknown)}: look into nbs/")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for n, p in named.items():
        row = read_minutes().get(n)
        now = code_of(json.loads(p.read_text(encoding="utf-8"))["cells"])
        if not any(t in n for t in a.texts) if a.texts else row and row["code"] == now: continue
        try: row = measure(p, a.limit)
        except Exception as e:
            print(f"failed  {n}: {str(e).strip().splitlines()[-1][:200]}", file=sys.stderr, flush=True)
            failed += 1
            continue
        write_minutes({k: r for k, r in read_minutes().items() if k in named} | {n: row})
        print(f"{row['seconds']:7} s, {row['cpu_seconds']:7} s of a core  {n}", flush=True)
    return int(failed > 0)

if __name__ == "__main__": sys.exit(main())
