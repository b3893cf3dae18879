"The trainer with models that it cannot serve the fast way."
from types import SimpleNamespace
import pytest, torch
from transformers import Lfm2Config, LlamaConfig
from comam_nb.training import CoMAMTrainer


@pytest.mark.parametrize("config", [Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"], attn_implementation="sdpa"),
                                    LlamaConfig(attn_implementation="flash_attention_2")])
def test_a_model_that_takes_no_mask_is_scored_the_simple_way_and_the_trainer_says_so(config):
    trainer = SimpleNamespace(args=SimpleNamespace(shared_prefix=True), agents={"extraction": SimpleNamespace(policy=SimpleNamespace(model=SimpleNamespace(config=config)))}, _agent="extraction")
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 7, 8]])
    with pytest.warns(UserWarning, match="cannot share a prompt"):
        assert CoMAMTrainer._packed(trainer, None, ids, torch.ones_like(ids), 2) is None
