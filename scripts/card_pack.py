"""What another machine needs, in pieces of at most 30 MiB, and how it is put together there.

    python scripts/on_a_card.py --pack pack [--wheels DIR] [--model DIR] [--data locomo:FILE]   # makes the pieces
    python pack/card_pack.py pack here     # on the other machine: checks them, and unpacks them into the folder `here`
    cd here && python scripts/on_a_card.py --wheels wheels --out card     # with --model model, --data locomo:data/FILE
"""
import hashlib, json, shutil, subprocess, sys, tarfile, tempfile
from pathlib import Path

PIECE = 30 * 2**20 # bytes
WHEELS = ("trl", "datasets", "gguf", "dill", "multiprocess") # what a machine with torch and transformers may lack

class Refused(ValueError): "Bad input, in one line."

def fetch_wheels(folder, constraints):
    "Pure Python, or for Linux and Python 3.12."
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:",
                    "--python-version", "3.12", "-c", str(constraints), "-d", str(folder), *WHEELS], check=True)

def pack(out, wheels=None, model=None, data=()):
    "The package, its scripts and benchmarks, wheels, and maybe a model and files of data, in pieces. Raises `Refused`."
    root = Path(__file__).resolve().parents[1]
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()): raise Refused(f"{out}: not empty: name another directory")
    with tempfile.TemporaryDirectory() as scratch:
        if not wheels: fetch_wheels(scratch, root / "constraints.txt")
        whole = Path(scratch) / "all.tar.gz"
        with tarfile.open(whole, "w:gz") as tar:
            keep = lambda x: None if "__pycache__" in x.name else x
            for name in ("comam_nb", "scripts", "benchmarks", "nbs/logs/card"): tar.add(root / name, name, filter=keep)
            for wheel in sorted(Path(wheels or scratch).glob("*.whl")): tar.add(wheel, f"wheels/{wheel.name}")
            if model: tar.add(model, "model" + (".gguf" if str(model).endswith(".gguf") else ""))
            for file in data: tar.add(file, f"data/{Path(file).name}")
        sums = {}
        with open(whole, "rb") as f:
            while part := f.read(PIECE):
                name = f"piece-{len(sums):03}"
                (out / name).write_bytes(part)
                sums[name] = hashlib.sha256(part).hexdigest()
    (out / "pieces.json").write_text(json.dumps(sums, indent=1))
    shutil.copy(__file__, out)
    print(f"{len(sums)} pieces in {out}; on the other machine: python {out.name}/card_pack.py {out.name} here")

def unpack(folder, out):
    "The pieces of `pack`, checked, put together and unpacked. Raises `Refused`."
    if not (folder / "pieces.json").exists(): raise Refused(f"{folder}: no pieces.json: name the directory of --pack")
    with tempfile.TemporaryFile() as whole:
        for name, expected in json.loads((folder / "pieces.json").read_text()).items():
            part = (folder / name).read_bytes() if (folder / name).exists() else b""
            if hashlib.sha256(part).hexdigest() != expected: raise Refused(f"{folder / name}: missing or damaged")
            whole.write(part)
        whole.seek(0)
        with tarfile.open(fileobj=whole) as tar: tar.extractall(out, filter="data")
    print(f"unpacked into {out}: cd {out} && python scripts/on_a_card.py --wheels wheels --out card")

def main(argv):
    if len(argv) != 2: print(__doc__); return 2
    try: unpack(Path(argv[0]), Path(argv[1]))
    except (Refused, OSError) as e: print(f"card_pack: {e}", file=sys.stderr); return 2
    return 0

if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
