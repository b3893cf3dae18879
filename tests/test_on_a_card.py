"The command that proves on a card what cannot be proved here: its stages with toy sizes, its record, its packing."
import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import comam_nb

ROOT = Path(__file__).resolve().parents[1]
TINY = str(Path(comam_nb.__file__).parent / "weights" / "microworld")

@pytest.fixture(autouse=True)
def paths(monkeypatch):
    for folder in ("benchmarks", "scripts", "nbs/logs/card"): monkeypatch.syspath_prepend(str(ROOT / folder))

def module(name): return importlib.import_module(name)

def inside(stage, settings, file, limit):
    "A stage in this process."
    module("on_a_card").child(stage, settings, file)

def lines(out): return [json.loads(l) for l in (out / "record.jsonl").read_text().splitlines()]

def main(*args, start=inside): return module("on_a_card").main([str(a) for a in args], start)


# ---- stages

@pytest.mark.slow
def test_every_stage_runs_dry_without_faiss_and_scipy(tmp_path, monkeypatch, capsys):
    for name in ("faiss", "scipy", "sklearn"): monkeypatch.setitem(sys.modules, name, None)
    toy = {n: s for n, s in module("on_a_card").STAGES.items() if "Qwen" not in n} # which, dry, is SmolLM2 once more
    monkeypatch.setattr(module("on_a_card"), "STAGES", toy)
    assert main("--dry", "--out", tmp_path) == 0
    found = {l["stage"]: l for l in lines(tmp_path)}
    assert list(found) == list(toy)
    assert {n: l["error"] for n, l in found.items() if "error" in l} == {}
    for name, l in found.items():
        assert l["device"] == "CPU" and l["dtype"] == "float32" and l["versions"]["torch"] and l["dry"], name
        assert [k for k, part in l["result"].items() if isinstance(part, dict) and "error" in part] == [], name
    for family, f in found["equality"]["result"].items():
        assert f["logprobs"] < 1e-5 and f["gradients"] < 1e-5 and f["greedy"] == f["of"], family
    assert len(found["equality"]["result"]) == 6
    engines = found["engines"]["result"]
    assert engines.keys() == {"shared prefix", "generate", "generate_batch", "engine"}
    assert 0 < engines["shared prefix"]["kernels"] < engines["generate"]["kernels"]
    assert all(f["kernels"] != 0 and f["ms_a_token"] != 0 for f in engines.values()) # None: not counted, and why
    steps = found["joint step, SmolLM2-135M"]["result"]
    assert {"comam, 48", "trl, 48", "trl-batching, 48"} <= steps.keys() and all(s["E"] == 2 for s in steps.values())
    assert [m["step"] for m in found["train"]["result"]["curve"]] == [1, 2] and found["train"]["result"]["from"]
    assert sum(f.stat().st_size for f in (tmp_path / "adapters").rglob("*.safetensors")) == \
        found["train"]["result"]["adapters"] < 16e6
    assert "dont_know" in found["evaluate"]["result"]["report"]
    text = module("card_record").render(tmp_path)
    assert "A dry run" in text and "| Qwen3 |" in text and "trl-batching" in text and "answer_accuracy" in text
    assert module("card_record").curves(tmp_path) is not None
    capsys.readouterr()
    assert main("--dry", "--out", tmp_path) == 0 # nothing is left to do
    assert "train: stands in the record" in capsys.readouterr().out and len(lines(tmp_path)) == len(found)

@pytest.mark.slow
def test_the_command_itself_runs_dry(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "scripts" / "on_a_card.py", "--dry", "--out", tmp_path],
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert [l["stage"] for l in lines(tmp_path)] == list(module("on_a_card").STAGES)
    assert [l["error"] for l in lines(tmp_path) if "error" in l] == [] and "shows it" in done.stdout

def test_a_stage_is_a_process_that_ends_with_its_time(tmp_path):
    card, file = module("on_a_card"), tmp_path / "stage.json"
    settings = {"out": str(tmp_path), "dry": True}
    assert card.process("ceilings", settings, file, 120) is None
    assert json.loads(file.read_text())["result"]["launching"]["microseconds"] > 0
    assert "=== ceilings: cpu, float32" in (tmp_path / "log.txt").read_text()
    assert "ended after 0 s" in card.process("ceilings", settings, file, 0.2)

def test_a_command_that_is_ended_leaves_no_process(tmp_path):
    import os, signal, time
    done = subprocess.Popen([sys.executable, ROOT / "scripts" / "on_a_card.py", "--dry", "--out", tmp_path],
                            stdout=subprocess.DEVNULL)
    log, start = tmp_path / "log.txt", time.time()
    while not log.exists() and time.time() - start < 60: time.sleep(0.05)
    children = Path(f"/proc/{done.pid}/task/{done.pid}/children")
    if not children.exists(): done.kill(); pytest.skip("this system does not list a process's children")
    while not (child := children.read_text().split()) and time.time() - start < 60: time.sleep(0.05)
    done.send_signal(signal.SIGTERM)
    assert done.wait(20) == 143
    with pytest.raises(ProcessLookupError): os.kill(int(child[0]), 0)

def stages(monkeypatch, **them):
    monkeypatch.setattr(module("on_a_card"), "STAGES", {k: (f, 0.5, "--group-size") for k, f in them.items()})

def broken(a):
    yield {"part": 1}
    raise ValueError("no such thing")

def hungry(a):
    yield {"part": 1}
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

def test_what_fails_does_not_end_the_others_and_is_done_again(tmp_path, monkeypatch, capsys):
    stages(monkeypatch, broken=broken, hungry=hungry, good=lambda a: iter([{"whole": 1}]))
    assert main("--out", tmp_path) == 0
    first, second, third = lines(tmp_path)
    assert "no such thing" in first["error"] and "Traceback" in first["error"] and first["result"] == {"part": 1}
    assert second["lower"] == "--group-size" and "lower" not in first and third["result"] == {"whole": 1}
    assert "hungry" in (said := capsys.readouterr().out) and "lower --group-size" in said
    stages(monkeypatch, broken=lambda a: iter([{"whole": 2}]), good=broken)
    assert main("--out", tmp_path) == 0
    assert [(l["stage"], l["result"]) for l in lines(tmp_path)[3:]] == [("broken", {"whole": 2})]

def test_when_the_minutes_are_over_the_record_says_what_was_not_run(tmp_path, monkeypatch):
    stages(monkeypatch, good=broken)
    assert main("--out", tmp_path, "--minutes", "0.001") == 0
    assert lines(tmp_path)[0]["error"] == "the minutes were over"

def test_a_t4_computes_in_float32(monkeypatch):
    "It says that it takes bfloat16, and imitates it."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert module("card_stages").place() == ("cuda", "float32")
    from comam_nb.lm import backbone
    assert backbone._pick_dtype(torch.device("cuda")) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert module("card_stages").place() == ("cuda", "bfloat16")
    assert backbone._pick_dtype(torch.device("cuda")) == torch.bfloat16

def test_adapters_are_kept_in_half_the_bytes_and_refused_above_the_limit(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file
    own = tmp_path / "weights" / "profile"
    own.mkdir(parents=True)
    (own / "adapter_config.json").write_text("{}")
    save_file({"x": torch.tensor([1.5, 3.0])}, own / "adapter_model.safetensors")
    s = module("card_stages")
    size = s.keep_adapters(tmp_path / "weights", tmp_path / "kept")
    kept = load_file(tmp_path / "kept" / "profile" / "adapter_model.safetensors")["x"]
    assert kept.dtype == torch.bfloat16 and kept.tolist() == [1.5, 3.0] and size < 200
    monkeypatch.setattr(s, "MOST_ADAPTERS", 10)
    with pytest.raises(ValueError, match="lower rank"): s.keep_adapters(tmp_path / "weights", tmp_path / "kept")

def test_episodes_of_a_benchmarked_step_have_prompts_of_their_own():
    from argparse import Namespace
    step, tok = module("joint_step"), module("card_stages").words(41000)
    prompts = step.each_episode(tok, Namespace(prompt=20, E=3))
    assert len({p[n] for p in prompts for n in step.NAMES}) == 9 and prompts[0] == step.texts(tok, 20)


# ---- bad input: a line, and exit code 2

@pytest.mark.parametrize("args, says", [
    (["--model", "nowhere"], "nowhere: no model: name a directory with a config.json"),
    (["--wheels", "."], "no wheels"),
    (["--model", TINY, "--data", "locomo:missing.json"], "missing.json: no such file"),
    (["--pack", "full"], "full: not empty")])
def test_bad_input(args, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert main("--out", "out", *args) == 2
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) == 1 and not (tmp_path / "out").exists()

def test_no_directory_is_a_line_too(capsys):
    assert main("--dry") == 2 and "--out" in capsys.readouterr().err

@pytest.mark.parametrize("change, says", [({"comam_nb": "0.0.9"}, "comam_nb 0.0.9"), ({"format": 0}, "format 0"),
                                          ({"dry": True}, "dry True")])
def test_a_record_of_another_version_is_not_gone_on_with(change, says, tmp_path, capsys):
    ours = {"stage": "equality", "format": 1, "comam_nb": comam_nb.__version__, "dry": False}
    (tmp_path / "record.jsonl").write_text(json.dumps({**ours, **change}) + "\n")
    assert main("--out", tmp_path) == 2
    assert f"made with {says}, not" in capsys.readouterr().err

def test_what_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
    card = module("on_a_card")
    monkeypatch.setattr(card, "find_spec", lambda name: None if name in ("trl", "dill") else object())
    assert main("--out", tmp_path) == 2
    assert "trl, dill: not installed: give a folder with their wheels as --wheels" in capsys.readouterr().err


# ---- wheels and pieces

def wheel(folder):
    "A package of one line."
    path = folder / "onlyhere-1.0-py3-none-any.whl"
    about = "onlyhere-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("onlyhere.py", "there = True\n")
        z.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: onlyhere\nVersion: 1.0\n")
        z.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{about}/RECORD", f"onlyhere.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n")
    return path

def test_wheels_are_put_beside_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "wheels").mkdir()
    wheel(tmp_path / "wheels")
    stages(monkeypatch, good=lambda a: iter([{"there": importlib.import_module("onlyhere").there}]))
    assert main("--out", tmp_path / "out", "--wheels", tmp_path / "wheels") == 0
    assert lines(tmp_path / "out")[0]["result"] == {"there": True}
    sys.modules.pop("onlyhere")

def test_a_wheel_for_another_machine_is_named(tmp_path, capsys):
    (tmp_path / "wheels").mkdir()
    wheel(tmp_path / "wheels").rename(tmp_path / "wheels" / "onlyhere-1.0-cp27-none-win32.whl")
    assert main("--out", tmp_path / "out", "--wheels", tmp_path / "wheels") == 2
    assert "onlyhere-1.0-cp27-none-win32.whl is not a supported wheel" in capsys.readouterr().err

def test_pieces_are_put_together_again_and_a_damaged_one_is_named(tmp_path, monkeypatch, capsys):
    packing = module("card_pack")
    monkeypatch.setattr(packing, "PIECE", 2**20)
    (tmp_path / "wheels").mkdir()
    wheel(tmp_path / "wheels")
    (tmp_path / "talk.json").write_text("[]")
    assert main("--pack", tmp_path / "pack", "--wheels", tmp_path / "wheels", "--model", TINY,
                "--data", f"locomo:{tmp_path / 'talk.json'}") == 0
    pieces = sorted((tmp_path / "pack").glob("piece-*"))
    assert len(pieces) > 1 and max(p.stat().st_size for p in pieces) <= 2**20
    done = subprocess.run([sys.executable, tmp_path / "pack" / "card_pack.py", tmp_path / "pack", tmp_path / "here"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here = tmp_path / "here"
    for name in ("comam_nb/training.py", "comam_nb/weights/microworld/config.json", "scripts/card_stages.py",
                 "benchmarks/joint_step.py", "wheels/onlyhere-1.0-py3-none-any.whl", "model/config.json",
                 "data/talk.json"):
        assert (here / name).exists(), name
    assert not list(here.rglob("__pycache__"))
    done = subprocess.run([sys.executable, here / "scripts" / "on_a_card.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "needs no network" in done.stdout
    pieces[1].write_bytes(b"x")
    assert packing.main([str(tmp_path / "pack"), str(tmp_path / "there")]) == 2
    assert "piece-001: missing or damaged" in capsys.readouterr().err
    assert packing.main([str(tmp_path), str(tmp_path / "there")]) == 2 and "pieces.json" in capsys.readouterr().err


# ---- the record, shown

def test_without_a_record_it_says_so(tmp_path):
    assert "no record from a card yet" in module("card_record").render(tmp_path)
    assert module("card_record").curves(tmp_path) is None

def test_the_repository_shows_what_lies_in_its_folder():
    folder = ROOT / "nbs" / "logs" / "card"
    made_here = [l for l in module("card_record").read_card(folder) if l.get("dry") or l.get("device") in (None, "CPU")]
    assert made_here == []

@pytest.mark.parametrize("page", ["index", "walkthroughs/08_speed", "walkthroughs/09_comam_on_a_gpu"])
def test_the_pages_show_what_lies_there(page):
    cells = json.loads((ROOT / "nbs" / f"{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    shown, = ["".join(o["data"]["text/markdown"]) for c in cells if "from card_record import" in "".join(c["source"])
              for o in c["outputs"] if "text/markdown" in o.get("data", {})]
    say = module("card_record").headline if page == "index" else module("card_record").render
    assert shown == say(ROOT / "nbs" / "logs" / "card"), "run the page again"

def test_the_front_page_has_a_sentence(tmp_path):
    result = {"comam, 1024": {"seconds": 2.0}, "trl, 1024": {"seconds": 7.0}, "trl, 4096": {"seconds": 9.0},
              "trl-batching, 1024": {"error": "x"}}
    line = {"stage": "joint step, SmolLM2-135M", "result": result, "device": "NVIDIA T4", "dtype": "float32"}
    (tmp_path / "record.jsonl").write_text(json.dumps(line) + "\n")
    assert module("card_record").headline(tmp_path) == (
        "NVIDIA T4, float32, SmolLM2-135M's shape, prompt 1,024: a joint step takes 2.0 s, TRL's 7.0 (3.5x).")

def test_a_record_of_another_version_says_which_and_failures_are_shown(tmp_path):
    known = {"versions": {"torch": "2.11"}, "device": "NVIDIA T4", "dtype": "float32", "comam_nb": "0.0.9"}
    step = {"comam, 1024": {"seconds": 2.0, "gigabytes": 3.1}, "trl, 1024": {"seconds": 7.0, "gigabytes": 9.0},
            "trl-batching, 1024": {"error": "Traceback\nOutOfMemoryError: 80 GiB", "lower": "--micro"}}
    some = [{"stage": "equality", "seconds": 3, "error": "Traceback\nRuntimeError: it broke", **known},
            {"stage": "joint step, SmolLM2-135M", "seconds": 9, "result": step, **known},
            {"stage": "train", "seconds": 1, "result": {"steps": 3}, "error": "ended after 1 s", **known}]
    (tmp_path / "record.jsonl").write_text("\n".join(map(json.dumps, some)) + '\n{"torn')
    text = module("card_record").render(tmp_path)
    assert "made with comam_nb 0.0.9" in text and "NVIDIA T4, float32" in text and "RuntimeError: it broke" in text
    assert "| 1024 | trl | 7.00 | 3.5x | 9.0 |" in text and "OutOfMemoryError: 80 GiB" in text
    assert "ended after 1 s" in text
