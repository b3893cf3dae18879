"""Shows a record that scripts/on_a_card.py made: tables, and the curves of its real run.

    python nbs/logs/card/card_record.py nbs/logs/card     # Markdown; says so where there is no record
"""
import json, sys
from pathlib import Path

NONE = ("There is no record from a card yet: nothing in this repository was timed on one. Anyone with a card can make "
        "it, offline, with `python scripts/on_a_card.py --out card`; `card/record.jsonl` then belongs into "
        "`nbs/logs/card/`.")

def read_card(folder):
    "The lines of a folder's record, without a torn last one; none where there is no record."
    path = Path(folder) / "record.jsonl"
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try: lines.append(json.loads(text))
        except ValueError: break
    return lines

def _table(head, rows):
    return "\n".join("| " + " | ".join(map(str, r)) + " |" for r in (head, ["---"] * len(head), *rows))

def _number(x, digits=2): return "" if x is None else f"{x:.{digits}f}"

def _failed(found): return "failed: " + found["error"].strip().splitlines()[-1][:80]

def _equality(found):
    row = lambda f: ([f"{f['logprobs']:.1e}", f"{f['gradients']:.1e}", f"{f['greedy']} of {f['of']}"]
                     if "error" not in f else [_failed(f), "", ""])
    return _table(["family", "log-probabilities differ by", "gradients", "greedy texts equal"],
                  [[name, *row(f)] for name, f in found.items()])

def _engines(found):
    row = lambda f: ([_number(f["ms_a_token"]), _number(f["tokens_a_second"], 0), _number(f.get("kernels"), 0),
                      _number(f.get("launches"), 0)] if "error" not in f else [_failed(f), "", "", ""])
    return _table(["engine", "ms a token", "tokens a second", "kernels a token", "launches a token"],
                  [[name, *row(f)] for name, f in found.items()])

def _joint(found):
    "A row for each prompt length and trainer; how many times as long as ours."
    rows = []
    for key, f in found.items():
        system, prompt = key.rsplit(", ", 1)
        ours = found.get(f"comam, {prompt}", {}).get("seconds")
        if "error" in f: rows.append([prompt, system, _failed(f), "", ""])
        else: rows.append([prompt, system, _number(f["seconds"]), f"{f['seconds'] / ours:.1f}x" if ours else "",
                           _number(f.get("gigabytes"), 1)])
    return _table(["prompt", "trainer", "s a step", "as long as ours", "GB"], rows)

def _ceilings(found):
    units = {"tflops": "Tflop/s", "gigabytes_a_second": "GB/s", "microseconds": "µs each"}
    return _table(["what", "measured"], [[name, " ".join(f"{v:.3g} {units[k]}" for k, v in f.items() if k in units)
                                          or _failed(f)] for name, f in found.items()])

def _train(found):
    when = [w for w in ("base", "before", "after") if w in found]
    interval = lambda x: f"{x['mean']:.3f} [{x['low']:.3f}, {x['high']:.3f}]"
    return _table(["", *when], [[m, *(interval(found[w][m]) for w in when)] for m in found["after"]])

def _start(found):
    columns = ("train_before", "train_after", "validation_before", "validation_after")
    return _table(["policy", "steps", "training loss", "after", "validation loss", "after"],
                  [[name, p["steps"], *(_number(p[k], 3) or "–" for k in columns)]
                   for name, p in found["policies"].items()])

def _evaluate(found): # its headings two levels further down
    return "\n".join("###" + l if l.startswith("#") else l for l in found["report"].strip().splitlines())

PARTS = {"equality": _equality, "engines": _engines, "joint step": _joint, "ceilings": _ceilings, "start": _start,
         "train": _train, "evaluate": _evaluate}

def _stage(line):
    title = f"### {line['stage']} ({line['seconds']:.0f} s)"
    found, render = line.get("result") or {}, PARTS.get(line["stage"].split(",")[0])
    parts = [title]
    if "not run" in found: parts.append(found["not run"])
    elif render:
        try: parts.append(render(found))
        except KeyError: pass # it ended before it had come so far; the error below says so
    if "error" in line: parts.append(_failed(line) + (f"; lower {line['lower']}" if "lower" in line else ""))
    return "\n\n".join(p for p in parts if p)

def render(folder):
    "Markdown: what the record says, by which card and versions; or that there is none."
    lines = read_card(folder)
    if not lines: return NONE
    from comam_nb import __version__
    first = next((l for l in lines if "device" in l), lines[0])
    about = ", ".join(f"{k} {v}" for k, v in first.get("versions", {}).items())
    said = [f"{first.get('device', 'no device')}, {first.get('dtype', '')}; comam_nb {first.get('comam_nb')}, {about}."]
    if first.get("dry"): said.append("A dry run with toy sizes: its figures say nothing about anything.")
    if first.get("comam_nb") != __version__:
        said.append(f"The record was made with comam_nb {first.get('comam_nb')}; this is {__version__}.")
    newest = {l["stage"]: l for l in lines} # a stage that was run again
    return "\n\n".join([*said, *map(_stage, newest.values())])

def headline(folder):
    "One sentence for a front page: the joint step of SmolLM2's shape beside TRL's; or that there is no record."
    lines = [l for l in read_card(folder) if l["stage"].startswith("joint step") and "comam, 1024" in l["result"]]
    took = {k.rsplit(", ", 1)[0]: f["seconds"] for l in lines[:1] for k, f in l["result"].items()
            if k.endswith(", 1024") and "seconds" in f}
    if "comam" not in took: return NONE
    peers = {"trl": "TRL's", "trl-batching": "TRL's with continuous batching"}
    rest = "".join(f", {say} {took[k]:.1f} ({took[k] / took['comam']:.1f}x)" for k, say in peers.items() if k in took)
    first, shape = lines[0], lines[0]["stage"].split(", ")[1]
    return (f"{first['device']}, {first['dtype']}, {shape}'s shape, prompt 1,024: a joint step takes "
            f"{took['comam']:.1f} s{rest}.")

def curves(folder):
    "A figure of the real run, rewards and shares over its steps; None without one."
    lines = [l for l in read_card(folder) if l["stage"] == "train" and (l.get("result") or {}).get("curve")]
    if not lines: return None
    import matplotlib.pyplot as plt
    from comam_nb.studies.plots import plot_rewards, plot_weights
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), dpi=64, layout="constrained")
    plot_rewards(lines[-1]["result"]["curve"], axes[0]); plot_weights(lines[-1]["result"]["curve"], axes[1])
    return figure

if __name__ == "__main__":
    if len(sys.argv) != 2: print(__doc__); sys.exit(2)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    print(render(sys.argv[1]))
