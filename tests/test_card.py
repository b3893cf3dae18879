"A run's model card, its way to the hub (a stand-in for `HfApi`), other logs, and a base in few bits (a stand-in too)."
import importlib.machinery, json, sys, types
from pathlib import Path

import pytest
import torch

from comam_nb.base.errors import BackboneError
from comam_nb.cli import __main__, train
from comam_nb.runs.card import push_run, write_card
from comam_nb.runs.folder import CommandError, Run

HALF = {"mean": .5, "low": .4, "high": .6}
EVIL = "/home/ana/`<script>`\n# x](http://e.vil)|"

@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    run.begin({"backbone": EVIL, "data": "chat:/home/ana/secret talk.jsonl", "start": "/home/ana/start", "seed": 0,
               "test_users": ["Ana Secret"], "rank": 4, "prompts": "instruct", "policy": "adapters"})
    episodes = {"training": ["Ana Secret 1"], "validation": ["b"], "test": []}
    (run.folder / "episodes.json").write_text(json.dumps(episodes))
    run.finish({k: {"r_ret": HALF} for k in ("base", "before", "after")} | {"seconds": 2.0})
    weights = run.folder / "weights" / "profile"
    weights.mkdir(parents=True)
    (weights / "adapter_config.json").write_text(json.dumps({"r": 4, "base_model_name_or_path": "/home/ana/model"}))
    (weights / "adapter_model.safetensors").write_bytes(b"weights")
    return run

class Hub:
    "What is asked of `HfApi`, noted; `fails` is raised by the upload."
    def __init__(self): self.made, self.files, self.fails = [], {}, None
    def create_repo(self, repo, private, exist_ok): self.made.append((repo, private, exist_ok))
    def upload_folder(self, repo_id, folder_path, commit_message):
        if self.fails: raise self.fails
        self.files = {p.relative_to(folder_path).as_posix(): p.read_bytes()
                      for p in Path(folder_path).rglob("*") if p.is_file()}
        return types.SimpleNamespace(repo_url=f"https://hub/{repo_id}")

@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", hub.create_repo)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", hub.upload_folder)
    return hub


def test_the_card_tells_what_the_run_was_and_quotes_what_comes_from_outside(run):
    card = write_card(run, "ana/memory").read_text()
    assert "| r_ret | 0.500 [0.400, 0.600] | 0.500 [0.400, 0.600] | 0.500 [0.400, 0.600] |" in card
    assert "- seed: `0`" in card and "`chat:secret talk.jsonl`" in card and "1 episodes trained on, 1 for valid" in card
    assert "hf download ana/memory --local-dir run" in card and "--adapters run/weights --prompts instruct" in card
    for secret in ("/home", "Ana Secret"): assert secret not in card
    outside = card.split("```")[::2] # not the block of shell
    assert "<script>" not in "".join("".join(part.split("`")[::2]) for part in outside)
    assert all(not line.startswith("# x") for line in card.splitlines())

def test_what_is_sent_names_no_path_and_nobody(run, hub):
    assert push_run(run, "ana/memory") == "https://hub/ana/memory" and hub.made == [("ana/memory", True, True)]
    assert set(hub.files) == {"README.md", "summary.json", "weights/profile/adapter_config.json",
                              "weights/profile/adapter_model.safetensors"}
    assert not any(b"/home" in f or b"Ana Secret" in f for f in hub.files.values())
    kept = json.loads((run.folder / "weights/profile/adapter_config.json").read_text())
    assert kept["base_model_name_or_path"] == "/home/ana/model" # the run's own is as it was
    push_run(run, "ana/memory", public=True)
    assert hub.made[-1] == ("ana/memory", False, True)

def test_without_a_network_nothing_is_lost_and_the_line_says_how_to_go_on(run, hub, capsys):
    hub.fails = ConnectionError("no route to the hub\nsecond line")
    assert __main__.main(["push", "--run", str(run.folder), "--repo", "ana/memory"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no route to the hub" in err
    assert f"later: comam push --run {run.folder} --repo ana/memory" in err and (run.folder / "README.md").exists()
    hub.fails = None
    assert __main__.main(["push", "--run", str(run.folder), "--repo", "ana/memory"]) == 0 and hub.files

@pytest.mark.parametrize("repo", ["", "memory", "a/b/c", "a b/c", "../x", "ana/" + "x" * 200, "ana/me\nmory"])
def test_no_repository_of_the_hub(run, hub, repo):
    with pytest.raises(CommandError, match="name one as USER/NAME") as e: push_run(run, repo)
    assert "\n" not in str(e.value) and not hub.made

def test_what_is_no_finished_run(run, hub, tmp_path):
    for torn in ("{}", "[]", '{"after": 7}', '{"after": {"r_ret": {"mean": 1}}}'):
        (run.folder / "summary.json").write_text(torn)
        with pytest.raises(CommandError, match="no finished run"): push_run(run, "ana/memory")
    with pytest.raises(CommandError, match="no finished run"): push_run(Run(tmp_path / "nowhere"), "ana/memory")

@pytest.mark.parametrize("args, said", [
    (["--report-to", "wandb"], "pip install wandb"), (["--push-to-hub", "memory"], "name one as USER/NAME"),
    (["--public"], "--public goes with --push-to-hub"), (["--load-in", "4bit"], "--load-in goes with other --data")])
def test_bad_flags_are_refused_before_anything_is_made(args, said, tmp_path, capsys, monkeypatch):
    find = train.find_spec
    monkeypatch.setattr(train, "find_spec", lambda name: None if name == "wandb" else find(name))
    assert __main__.main(["train", *args, "--out", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()

def test_a_broken_package_is_named_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    (tmp_path / "trackio.py").write_text("raise KeyError('half\\ninstalled')")
    monkeypatch.syspath_prepend(tmp_path)
    assert __main__.main(["train", "--report-to", "trackio", "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "--report-to trackio" in err and "cannot be imported (KeyError" in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()

@pytest.mark.slow
def test_a_run_that_reports_and_is_sent(tmp_path, hub, monkeypatch, capsys):
    "Into a stand-in for tensorboard, by transformers' own table of integrations."
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils
    seen = []
    class Board(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kw): seen.append(logs)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Board)
    monkeypatch.setattr(train, "find_spec", lambda name: True)
    out = tmp_path / "run"
    assert __main__.main(["train", "--steps", "2", "--episodes-per-step", "2", "--group-size", "4", "--eval-episodes",
                          "8", "--out", str(out), "--report-to", "tensorboard", "--push-to-hub", "ana/memory"]) == 0
    assert sum("r_ret" in (logs or {}) for logs in seen) == 2
    assert "sent to https://hub/ana/memory" in capsys.readouterr().out
    assert {"README.md", "metrics.jsonl", "rewards.png"} <= set(hub.files) and "config.json" not in hub.files


def test_few_bits_are_passed_on(monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from comam_nb.lm import backbone
    (tmp_path / "config.json").write_text("{}")
    fake = types.ModuleType("bitsandbytes")
    fake.__spec__ = importlib.machinery.ModuleSpec("bitsandbytes", None)
    with pytest.raises(BackboneError, match="use 4bit or 8bit"): backbone.load_backbone(tmp_path, load_in="2bit")
    monkeypatch.setattr(backbone, "find_spec", lambda name: None)
    with pytest.raises(BackboneError, match="pip install bitsandbytes"):
        backbone.load_backbone(tmp_path, load_in="4bit", device="cuda")
    monkeypatch.setattr(backbone, "find_spec", lambda name: fake.__spec__)
    with pytest.raises(BackboneError, match="needs a CUDA card, and this runs on cpu"):
        backbone.load_backbone(tmp_path, load_in="4bit", device="cpu")
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    asked = []
    class Rounded(torch.nn.Linear):
        def to(self, *args, **kw): raise AssertionError("weights in few bits cannot be moved")
    def model(where, **kw):
        asked.append(kw)
        return Rounded(2, 2)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda where, **kw: types.SimpleNamespace(pad_token="x"))
    for bits in ("4bit", "8bit"):
        backbone.load_backbone(tmp_path, adapters=None, load_in=bits, device="cuda", dtype="bfloat16", verbose=False)
    four, eight = (kw["quantization_config"] for kw in asked)
    assert four.load_in_4bit and four.bnb_4bit_compute_dtype == torch.bfloat16 and eight.load_in_8bit
    assert asked[0]["device_map"] == {"": "cuda"}
