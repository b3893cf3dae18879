"""How long each notebook runs: nbs/logs/minutes.csv, measured.

    python scripts/minutes.py                          # what has no row yet, or other code than when it was measured
    python scripts/minutes.py walkthroughs book/01     # those whose path holds one of these texts, again

Run All in a fresh kernel and an empty folder, one notebook after the other, without the cells that `nbdev_test` leaves
out (marked *slow* or *gpu*). A row is written as soon as it is measured: the next call goes on where one was cut off.
`seconds` are of the clock, `cpu_seconds` of a core: those say more where others use the machine, too. Exit code 1
if a notebook fails; it gets no row.

    python scripts/minutes.py --page     # measure nothing; write nbs/reference/notebooks.md from rows and titles
    python scripts/minutes.py --check    # exit code 1 if a notebook has no row, or the page is out of step
"""
import argparse, csv, hashlib, json, os, platform, re, resource, sys, tempfile, time
from pathlib import Path

from address import ROOT, notebooks

FILE = ROOT / "nbs" / "logs" / "minutes.csv"
PAGE = ROOT / "nbs" / "reference" / "notebooks.md"
FOLDERS = { # in the order of the page -> what is there
    "book": "The papers, in the order in which one learns them. Each chapter stands on those before it.",
    "solutions": "The exercises of the chapters, worked out in words.",
    "walkthroughs": "They use the package as its users do, and export nothing.",
    "source/base": "Errors, files, SQLite, PostgreSQL, embedders, statistics; the book's objects, drawings, exercises.",
    "source/lm": "A language model with adapters, decoding, scoring, chat with local and remote models, kernels.",
    "source/checks": "Running code of a model, equal math answers, categories, what is refused as a constraint.",
    "source/readers": "Benchmarks and chat logs, and how each scores an answer; task files.",
    "source/store": "The memory store and the bank's file, the lexical index, import and export, both on a server.",
    "source/rl": "The parts of joint training: team, settings, rollout, scorer, log.",
    "source/memcollab": "The parts behind MemCollab's chapters.",
    "source/worlds": "How the tiny policies of the two small worlds are made.",
    "source/systems": "Ten memory systems behind one interface.",
    "source/runs": "A run's folder, where episodes come from, benchmarks, reports, where a fact was lost.",
    "source/studies": "The paper's ablation, the credit laboratory, memory across backbones, transfer, plots.",
    "source/cli": "The commands `comam` and `memcollab`, a file for each.",
}
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

def subtitle(notebook: Path):
    "A notebook's title, and the line under it."
    text = "\n".join("".join(c["source"]) for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"][:2])
    title, below = re.search(r"^# (.+)\n\n> (.+)", text, re.M).groups()
    there = lambda target: os.path.relpath(notebook.parent / target, PAGE.parent) # links are counted from the page
    return title, re.sub(r"\]\(([^:)]*)\)", lambda m: f"]({there(m[1])})", below)

def spoken(row):
    "How long a notebook takes, for a reader."
    if row["needs"] == "GPU": return "GPU"
    seconds = max(1, round(float(row["cpu_seconds"])))
    return f"{seconds} s" + (f", without {row['left_out']} slow cells" if row["left_out"] not in ("0", 0) else "")

def page(rows: dict):
    "nbs/reference/notebooks.md: every notebook, with its folder, what it says of itself, and how long it runs."
    named = {p.relative_to(ROOT / "nbs").as_posix(): p for p in notebooks()}
    measured = [r for n, r in rows.items() if n in named]
    on = ", ".join(sorted({f"{r['processor']} with {r['cores']} cores" for r in measured}))
    days = sorted(r["date"] for r in measured)
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    out = ["# All notebooks", "",
           "One notebook, one idea, one module. [The book](#book) and the [walkthroughs](#walkthroughs) are for "
           "readers; **source notebooks** hold everything else that is exported (fast paths, file formats, "
           "retries, checks of input), and nobody has to read them to understand the papers. They lie in a "
           "folder for each floor of the house and import downwards only.", "",
           "![The floors of comam_nb, the modules on them, and who imports whom](../map.svg)", "",
           f"Seconds are those of one core, for Run All in a fresh kernel, measured by `python scripts/minutes.py` on "
           f"{on}, {when}, beside other work; [minutes.csv](../logs/minutes.csv) also has the clock's "
           "seconds and the load. Cells that take minutes, or need a real model, are marked *slow* and left out.", ""]
    for folder, what in FOLDERS.items():
        out += [f"## {folder.rpartition('/')[2]}", "", what, "", "| notebook | what it says of itself | runs in |",
                "|---|---|---:|"]
        for n, p in named.items():
            if n.rpartition("/")[0] != folder: continue
            title, below = subtitle(p)
            out.append(f"| [{p.stem}](../{n}) | **{title}.** {below} | {spoken(rows[n]) if n in rows else '?'} |")
        out.append("")
    return "\n".join([*out, "<!-- Made by `python scripts/minutes.py --page`. -->"]) + "\n"

def out_of_step():
    "What is missing in minutes.csv and notebooks.md, a line each."
    rows, names = read_minutes(), {p.relative_to(ROOT / "nbs").as_posix() for p in notebooks()}
    if lost := names - rows.keys():
        yield f"nbs/logs/minutes.csv has no row for {', '.join(sorted(lost))}: run `python scripts/minutes.py`"
    if gone := rows.keys() - names:
        yield f"nbs/logs/minutes.csv has rows for {', '.join(sorted(gone))}: run `python scripts/minutes.py`"
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page(rows):
        yield "nbs/reference/notebooks.md is out of step: run `python scripts/minutes.py --page`"

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("texts", nargs="*", help="texts of which a notebook's path holds one")
    parser.add_argument("--limit", type=int, default=1200, help="seconds for one cell")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if something is out of step")
    a, failed = parser.parse_args(argv), 0
    if a.check:
        found = list(out_of_step())
        print("\n".join(found), file=sys.stderr)
        return int(bool(found))
    named = {p.relative_to(ROOT / "nbs").as_posix(): p for p in notebooks()}
    if unknown := [t for t in a.texts if not any(t in n for n in named)]:
        parser.error(f"no notebook's path holds {', '.join(unknown)}: look into nbs/")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for n, p in named.items() if not a.page else ():
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
    rows = {n: r for n, r in read_minutes().items() if n in named}
    write_minutes(rows)
    PAGE.write_text(page(rows), encoding="utf-8")
    return int(failed > 0)

if __name__ == "__main__": sys.exit(main())
