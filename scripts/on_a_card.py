"""What this package does on a card, in one command that needs no network.

    python scripts/on_a_card.py --out card --wheels wheels --minutes 7     # random weights, and the micro-world
    python scripts/on_a_card.py --out card --model DIR --data locomo:locomo10.json
    python scripts/on_a_card.py --out dry --dry                            # every stage on a CPU, toy sizes: 2 minutes
    python scripts/on_a_card.py --pack pack --model DIR --data locomo:FILE # all that the above needs, in small pieces
    python pack/card_pack.py pack here                                     # puts it together on the other machine

Needs torch, transformers, peft and accelerate; --wheels is a folder with wheels of what else is missing (trl, datasets,
gguf, dill, multiprocess), which are put into DIR/site. faiss, scipy, a compiler and a network are not needed.

The stages come in the order of their worth. Each runs in a process of its own, for its share of the minutes at most,
and adds a line to DIR/record.jsonl: what it found, or a traceback, with seconds, versions, device and number type. A
stage that fails does not end the others, and the same command again does those that are missing. What stages print
stands in DIR/log.txt. The last three are a real run: a supervised start of --model, joint training from there, scores
on what was held out, and adapters under 16 MB; without --model the micro-world's own agents are trained.

The record.jsonl that a card made belongs into nbs/logs/card/; nbs/logs/card/card_record.py shows it.
"""
import argparse, importlib.metadata, json, os, signal, subprocess, sys, time, traceback
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORMAT = 1 # of the record's lines
NEEDED = ("torch", "transformers", "peft", "accelerate", "trl", "datasets", "dill", "multiprocess", "numpy", "tqdm",
          "safetensors", "filelock", "matplotlib")
sys.path.insert(0, str(ROOT / "scripts")) # a stage's process has it anyway
from card_pack import Refused, pack
from card_stages import LAST, STAGES, lines_of, out_of_memory, place


# ---- one process for each stage

def about(device, dtype):
    import torch
    have = ("torch", "transformers", "trl", "peft", "accelerate")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    from comam_nb import __version__
    versions = {"python": sys.version.split()[0], "cuda": torch.version.cuda,
                **{p: importlib.metadata.version(p) for p in have}}
    return {"format": FORMAT, "comam_nb": __version__, "versions": versions, "device": name, "dtype": dtype}

def child(stage, settings, file):
    "Runs one stage and writes what it found into a file, part by part."
    a = argparse.Namespace(**settings)
    a.out = Path(a.out); a.run = a.out / "run"; a.run.mkdir(parents=True, exist_ok=True)
    a.device, a.dtype = place()
    print(f"\n=== {stage}: {a.device}, {a.dtype}", flush=True)
    work, _, lower = STAGES[stage]
    head, result = about(a.device, a.dtype), {}
    def write(**more): file.write_text(json.dumps({**head, "result": result, **more}), encoding="utf-8")
    write()
    try:
        for part in work(a): result.update(part); write()
    except Exception as e:
        traceback.print_exc()
        write(error=traceback.format_exc(), **({"lower": lower} if out_of_memory(e) else {}))

def process(stage, settings, file, limit):
    "The stage in a process, which is ended after `limit` seconds; None, or the reason why it ended early."
    path = [str(Path(settings["out"]) / "site"), str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    quiet = dict(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="disabled",
                 TRL_EXPERIMENTAL_SILENCE="1", MPLBACKEND="Agg", PYTHONPATH=os.pathsep.join(filter(None, path)))
    with open(Path(settings["out"]) / "log.txt", "a", encoding="utf-8") as log:
        done = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--stage", stage, json.dumps(settings),
                                 str(file)], env={**os.environ, **quiet}, stdout=log, stderr=log,
                                stdin=subprocess.DEVNULL, start_new_session=True)
        try: return None if done.wait(limit) == 0 else f"the process ended with {done.returncode}; see log.txt"
        except subprocess.TimeoutExpired: return f"ended after {limit:.0f} s, its share of the time"
        finally:
            for how in (signal.SIGTERM, signal.SIGKILL): # with all that it started
                try: os.killpg(done.pid, how)
                except ProcessLookupError: break
                try: done.wait(5)
                except subprocess.TimeoutExpired: continue

def run(a, start=process):
    "All stages that the record lacks."
    record, have, end = a.out / "record.jsonl", done_in(a.out, a.dry), time.time() + 60 * a.minutes
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items()}
    file = a.out / "stage.json"
    for stage, (_, share, _) in STAGES.items():
        if stage in have: print(f"{stage}: stands in the record"); continue
        began, left = time.time(), end - time.time()
        limit = share * left if stage in LAST else min(left, 60 * a.minutes * share)
        file.unlink(missing_ok=True)
        why = "the minutes were over"
        if limit > 5 or a.dry: why = start(stage, {**settings, "limit": limit}, file, limit if not a.dry else 120)
        line = {"stage": stage, "dry": a.dry, "seconds": round(time.time() - began, 1),
                **(json.loads(file.read_text(encoding="utf-8")) if file.exists() else {})}
        if why: line["error"] = why if "error" not in line else line["error"]
        with open(record, "a", encoding="utf-8") as f: f.write(json.dumps(line) + "\n")
        said = line.get("error", "").strip().splitlines()
        print(f"{stage}: {line['seconds']:.0f} s, {line.get('device', '')} {line.get('dtype', '')}"
              f"{', ' + said[-1] if said else ''}{'; lower ' + line['lower'] if 'lower' in line else ''}", flush=True)
    file.unlink(missing_ok=True)
    print(f"{record}: `python nbs/logs/card/card_record.py {a.out}` shows it")


# ---- what is needed

def done_in(out, dry):
    "Stages that a record holds. Raises `Refused` for a record of another version."
    from comam_nb import __version__
    lines = lines_of(out / "record.jsonl") if (out / "record.jsonl").exists() else []
    ours = {"format": FORMAT, "comam_nb": __version__, "dry": dry}
    for l in lines:
        other = [f"{k} {l[k]}, not {v}" for k, v in ours.items() if k in l and l[k] != v]
        if other: raise Refused(f"{out}/record.jsonl was made with {' and '.join(other)}: name another --out")
    return {l["stage"] for l in lines if "error" not in l}

def check(a):
    if a.model:
        path = Path(a.model)
        if not (path.is_dir() and (path / "config.json").exists() or path.is_file() and path.suffix == ".gguf"):
            raise Refused(f"{a.model}: no model: name a directory with a config.json, or a .gguf file")
        a.model = str(path.resolve())
    if a.wheels and not list(Path(a.wheels).glob("*.whl")): raise Refused(f"{a.wheels}: no wheels (*.whl) there")
    kind, _, where = a.data.partition(":")
    for file in filter(None, where.split(",")):
        if not Path(file).exists(): raise Refused(f"{file}: no such file (--data {a.data})")
    if where: a.data = f"{kind}:{','.join(str(Path(f).resolve()) for f in where.split(','))}"

def prepare(a):
    "Wheels into DIR/site, and a line about what is missing still."
    site = a.out / "site"
    a.out.mkdir(parents=True, exist_ok=True)
    if a.wheels and not site.is_dir():
        done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target",
                               str(site), *map(str, sorted(Path(a.wheels).glob("*.whl")))],
                              capture_output=True, text=True)
        if done.returncode: raise Refused(f"{a.wheels}: {done.stderr.strip().splitlines()[0]}")
    sys.path.insert(0, str(site))
    missing = [n for n in (*NEEDED, *(["gguf"] if str(a.model or "").endswith(".gguf") else [])) if not find_spec(n)]
    if missing: raise Refused(f"{', '.join(missing)}: not installed: give a folder with their wheels as --wheels")

def main(argv=None, start=process):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, help="directory of the record; a second call goes on with it")
    p.add_argument("--model", help="directory or .gguf file, for the real run")
    p.add_argument("--data", default="microworld", help="for the real run with --model: microworld, locomo:FILE, …")
    p.add_argument("--minutes", type=float, default=7.0, help="for everything (default 7)")
    p.add_argument("--wheels", help="directory with wheels of what is not installed")
    for flag, value, what in (("--episodes", 4, "E, episodes of a step"), ("--group-size", 8, "G, rollouts of each"),
                              ("--micro", 8, "rows of a pass of TRL's"), ("--questions", 40, "asked at the end")):
        p.add_argument(flag, type=int, default=value, help=f"{what} (default {value})")
    p.add_argument("--dry", action="store_true", help="every stage with toy sizes, on any machine")
    p.add_argument("--pack", metavar="DIR", help="write what another machine needs, in pieces of 30 MiB at most")
    a = p.parse_args(argv)
    try:
        if a.out is None and not a.pack: raise Refused("name a directory with --out")
        check(a)
        if a.pack:
            pack(Path(a.pack), a.wheels, a.model, [f for f in a.data.partition(":")[2].split(",") if f])
            return 0
        sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
        done_in(a.out, a.dry)
        prepare(a)
        if a.dry: a.episodes, a.group_size, a.micro = 2, 2, 2
        if a.dry and not a.model: a.model = str(ROOT / "comam_nb" / "weights" / "microworld")
        run(a, start)
    except (Refused, OSError, subprocess.CalledProcessError) as e:
        print(f"on_a_card: {str(e).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    if sys.argv[1:2] == ["--stage"]:
        told = json.loads(sys.argv[3])
        if told["dry"]: sys.modules.update(faiss=None, scipy=None, sklearn=None) # what a card's machine may lack
        child(sys.argv[2], told, Path(sys.argv[4]))
        sys.exit()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) # the stage's process ends with this one
    sys.exit(main())
