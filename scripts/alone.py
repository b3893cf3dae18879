"""Does every notebook run alone, as on Colab: the notebook, the installed wheel, and an empty folder?

    python scripts/alone.py                          # all of them, one at a time
    python scripts/alone.py walkthroughs book/01     # those whose path holds one of these texts
    python scripts/alone.py --out runs/alone.jsonl   # what is ok in there and has not changed is not run again

Makes a wheel and an environment that holds it; libraries it borrows from the environment that runs this script, but not
the repository. Every cell runs, also slow ones, and those that `nbdev_test` never runs; cells marked *gpu* are left out
where there is no card. Exit code 1 if a notebook fails.
"""
import argparse, hashlib, json, os, re, shutil, subprocess, sys, sysconfig, tempfile, time
from pathlib import Path

from address import ROOT, notebooks

def environment(folder: Path):
    "An environment with a wheel of this repository: its Python."
    python, pip = folder / "env" / "bin" / "python", [sys.executable, "-m", "pip"]
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    subprocess.run([*pip, "wheel", "-q", str(ROOT), "--no-deps", "-w", str(folder)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
    wheel, = folder.glob("*.whl")
    subprocess.run([*pip, "--python", str(python), "install", "-q", "--no-deps", str(wheel)], check=True)
    # .pth files in what it borrows from, such as an editable install's, are not followed
    site, borrowed = next((folder / "env" / "lib").glob("*/site-packages")), dict.fromkeys(
        p for p in [sysconfig.get_path("purelib"), *sys.path] if Path(p).name == "site-packages")
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return python

def run_alone(notebook: Path, python: Path, limit: int):
    "Run All in an empty folder: status, seconds, cells left out, and why it failed."
    nb, began = json.loads(notebook.read_text(encoding="utf-8")), time.time()
    card = shutil.which("nvidia-smi")
    for_a_card = [c for c in nb["cells"] if not card and re.search(r"^#\| *gpu", "".join(c["source"]), re.M)]
    nb["cells"] = [c for c in nb["cells"] if c not in for_a_card]
    # as if its environment were activated: the kernel is its Python
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"VIRTUAL_ENV": str(python.parent.parent), "PATH": os.pathsep.join([str(python.parent), env["PATH"]])}
    with tempfile.TemporaryDirectory() as empty:
        (Path(empty) / notebook.name).write_text(json.dumps(nb), encoding="utf-8")
        command = [str(python), "-m", "nbconvert", "--execute", "--to", "notebook", "--stdout", notebook.name]
        try: done = subprocess.run(command, cwd=empty, env=env, timeout=limit, capture_output=True, text=True)
        except subprocess.TimeoutExpired: status, why = "failed", f"took more than {limit} s"
        else:
            status = "failed" if done.returncode else "ok"
            why = re.sub(r"\x1b\[[\d;]*m", "", done.stderr).strip().splitlines()[-1][:300] if done.returncode else ""
    return {"status": status, "seconds": round(time.time() - began), "left_out": len(for_a_card), "why": why}

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("texts", nargs="*", help="texts of which a notebook's path holds one; none: all notebooks")
    parser.add_argument("--out", type=Path, help="a .jsonl file that keeps what was found")
    parser.add_argument("--python", type=Path, help="of an environment that has the wheel already")
    parser.add_argument("--limit", type=int, default=1200, help="seconds for one notebook")
    a = parser.parse_args(argv)
    named = {p.relative_to(ROOT / "nbs").as_posix(): p for p in notebooks()}
    if a.python and not a.python.exists(): parser.error(f"{a.python}: no such file: name an environment's Python")
    if unknown := [t for t in a.texts if not any(t in n for n in named)]:
        parser.error(f"no notebook's path holds {', '.join(unknown)}: look into nbs/")
    chosen = {n: p for n, p in named.items() if not a.texts or any(t in n for t in a.texts)}
    try: lines = a.out.read_text(encoding="utf-8").splitlines() if a.out and a.out.exists() else []
    except OSError as e: parser.error(f"{a.out}: {e.strerror}: name a .jsonl file")
    try: found = {r["notebook"]: r for r in map(json.loads, lines)}
    except (ValueError, TypeError, KeyError): parser.error(f"{a.out}: not what this script writes: name another file")
    with tempfile.TemporaryDirectory() as folder:
        python = a.python.absolute() if a.python else environment(Path(folder))
        for n, p in chosen.items():
            sha = hashlib.sha256(p.read_bytes()).hexdigest()[:16]
            if (r := found.get(n)) and (r["status"], r["sha"]) == ("ok", sha): continue
            found[n] = {"notebook": n, "sha": sha, **run_alone(p, python, a.limit)}
            if a.out:
                a.out.parent.mkdir(parents=True, exist_ok=True)
                with open(a.out, "a", encoding="utf-8") as f: f.write(json.dumps(found[n]) + "\n")
            print(row(found[n]), flush=True)
    results = [found[n] for n in chosen]
    failed = sum(r["status"] != "ok" for r in results)
    print(f"{len(results) - failed} of {len(results)} notebooks ran alone, {sum(r['seconds'] for r in results)} s")
    return int(failed > 0)

def row(r):
    "One notebook's line."
    return f"{r['status']:6} {r['seconds']:5} s  {r['notebook']}" + (
        f", without {r['left_out']} cells for a card" if r["left_out"] else "") + (f": {r['why']}" if r["why"] else "")

if __name__ == "__main__": sys.exit(main())
