"The trainer's fast ways, and the models that it cannot serve so."
from types import SimpleNamespace
import pytest, torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Lfm2Config, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from comam_nb import training
from comam_nb.lm.backbone import Backbone
from comam_nb.data import example_episode
from comam_nb.mdp import AGENTS
from comam_nb.rl.settings import CoMAMConfig
from comam_nb.training import CoMAMTrainer
from comam_nb.rl.team import make_agents


@pytest.mark.parametrize("config", [Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"], attn_implementation="sdpa"),
                                    LlamaConfig(attn_implementation="flash_attention_2")])
def test_a_model_that_takes_no_mask_is_scored_the_simple_way_and_the_trainer_says_so(config):
    trainer = SimpleNamespace(args=SimpleNamespace(shared_prefix=True), _readings={}, _key=lambda *x: x, agents={"extraction": SimpleNamespace(adapter=None, policy=SimpleNamespace(model=SimpleNamespace(config=config)))}, _agent="extraction")
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 7, 8]])
    with pytest.warns(UserWarning, match="cannot share a prompt"):
        assert CoMAMTrainer._packed(trainer, None, ids, torch.ones_like(ids), 2) is None


# ---- prompts that are read once, for writing and for scoring

def reader(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    words = ["<pad>", "<eos>", "<unk>", *AGENTS, *map(str, range(40))]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left")
    config = LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                         eos_token_id=1, pad_token_id=0, bos_token_id=None, initializer_range=0.3, attention_dropout=dropout)
    return Backbone(LlamaForCausalLM(config).eval(), tok, (), "reader")

def long_prompt(name, own):
    "700 words. With `own`, an episode's for the extraction agent, and for the others different ones in each rollout, behind 100 that are always the same. Without, all read the same."
    asked = [0]
    def prompt(state):
        asked[0] += 1
        k = asked[0] if own else 3
        return " ".join([name if own else "1", *(str(i % 7) for i in range(100)), *(str((i * k) % 40) for i in range(600 + k))])
    return prompt

def trained(tmp_path, monkeypatch, keep, policy="adapters", own=True, dropout=0.0, E=2, **kw):
    "Weights after two steps, what was read, and what was scored with a reading."
    read, scored = [], []
    monkeypatch.setattr(training, "read_prompts", lambda model, prompts, f=training.read_prompts: read.append(len(prompts)) or f(model, prompts))
    monkeypatch.setattr(training, "shared_logprobs", lambda *a, reading=None, f=training.shared_logprobs: scored.append(reading is not None) or f(*a, reading=reading))
    agents = make_agents({a: reader(i, dropout) for i, a in enumerate(AGENTS)} if policy == "separate" else reader(0, dropout), policy, r=4, **{a: dict(max_new_tokens=6) for a in AGENTS})
    for name, agent in agents.items(): agent.prompt = long_prompt(name, own)
    rewards = lambda groups: (torch.tensor([[[len(set(t[a].action_ids)) / 6 for t in g] for a in AGENTS] for g in groups]), torch.tensor([[float(len(t["retrieval"].action_ids) > 4) for t in g] for g in groups]))
    config = CoMAMConfig(str(tmp_path), max_steps=2, episodes_per_step=E, num_generations=4, learning_rate=1.0, optim="sgd", use_cpu=True, disable_tqdm=True, max_completion_length=6, sampling="per_group", keep_prompts=keep, **kw)
    trainer = CoMAMTrainer(agents, [example_episode()] * 2, rewards, config)
    trainer.train()
    monkeypatch.undo()
    assert all(a.policy.reader is None for a in agents.values())
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}, read, scored, trainer

@pytest.mark.parametrize("policy, own", [("adapters", True), ("adapters", False), ("shared", False), ("separate", False)])
def test_prompts_kept_from_writing_to_scoring_change_nothing_but_the_time(tmp_path, monkeypatch, policy, own):
    simple, read, scored, _ = trained(tmp_path, monkeypatch, 0, policy, own)
    assert not read and not any(scored) and (policy == "separate" or all(v.abs().max() > 1e-3 for k, v in simple.items() if ".lora_B" in k)) # they have learned something
    kept, read, scored, trainer = trained(tmp_path, monkeypatch, 10**6, policy, own)
    assert scored == [True, policy != "shared", policy != "shared"] * 2 and not trainer._readings # two steps; one policy for all keeps one prompt once; nothing is left in memory
    assert read == ([2, 8, 8] if own else [1] if policy == "shared" else [1, 1, 1]) * 2 # of two episodes with four rollouts each
    for k in simple: torch.testing.assert_close(kept[k], simple[k], rtol=1e-4, atol=1e-5, msg=k)

def test_no_more_prompts_are_kept_than_allowed(tmp_path, monkeypatch):
    _, read, scored, _ = trained(tmp_path, monkeypatch, 1500) # an episode's prompt has some 700 tokens, the eight others have thousands
    assert read == [2, 2] and scored == [True, False, False] * 2

@pytest.mark.parametrize("kw", [dict(dropout=0.1), dict(gradient_checkpointing=True), dict(shared_prefix=False)])
def test_prompts_are_read_twice_where_that_is_not_the_same(tmp_path, monkeypatch, kw):
    _, read, scored, _ = trained(tmp_path, monkeypatch, 10**6, **kw)
    assert not read and not any(scored)

def test_micro_batches_of_one_prompt_do_not_share_a_reading(tmp_path, monkeypatch):
    simple, *_ = trained(tmp_path, monkeypatch, 0, own=False, E=1, micro_batches_per_agent=2)
    kept, read, scored, _ = trained(tmp_path, monkeypatch, 10**6, own=False, E=1, micro_batches_per_agent=2)
    assert read == [1] * 6 and scored == [True, False] * 6 # the first has used it up
    for k in simple: torch.testing.assert_close(kept[k], simple[k], rtol=1e-4, atol=1e-5, msg=k)

def test_a_second_update_with_the_same_texts_reads_again(tmp_path, monkeypatch):
    simple, *_ = trained(tmp_path, monkeypatch, 0, own=False, num_iterations=2)
    kept, read, scored, _ = trained(tmp_path, monkeypatch, 10**6, own=False, num_iterations=2)
    assert sum(scored) == len(read) == 3 # the weights have changed since
    for k in simple: torch.testing.assert_close(kept[k], simple[k], rtol=1e-4, atol=1e-5, msg=k)
