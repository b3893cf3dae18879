"The trainer: its fast ways, its settings, what it keeps to itself, and how it goes on."
import json, os, sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest, torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (Gemma3ForCausalLM, Gemma3TextConfig, Lfm2Config, LlamaConfig, LlamaForCausalLM, Phi3Config,
                          PreTrainedTokenizerFast,
                          TrainerCallback, TrainingArguments)

from comam_nb.base.errors import BackboneError, CreditError
from comam_nb.credit import assign
from comam_nb.data import example_episode
from comam_nb.lm.backbone import Backbone
from comam_nb.lm.lora import without_adapters
from comam_nb.lm.scoring import token_logprobs
from comam_nb.mdp import AGENTS
from comam_nb.rl import scorer as scoring
from comam_nb.rl.launch import check_run, settle
from comam_nb.rl.sampler import PrioritySampler
from comam_nb.rl.scorer import Scorer
from comam_nb.rl.settings import CoMAMConfig
from comam_nb.rl.team import make_team
from comam_nb.training import CoMAMTrainer


@pytest.mark.parametrize("config", [Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"],
                                               attn_implementation="sdpa"),
                                    LlamaConfig(attn_implementation="flash_attention_2"),
                                    Phi3Config(sliding_window=3, attn_implementation="sdpa", pad_token_id=0)])
def test_a_model_that_takes_no_mask_is_scored_the_simple_way_and_the_trainer_says_so(config):
    policy = Backbone(SimpleNamespace(config=config), SimpleNamespace(pad_token_id=0, eos_token_id=1))
    args = SimpleNamespace(shared_prefix=True, trained_agents=["extraction"], beta=0, entropy_coef=0,
                           use_adaptive_entropy=False,
                           per_device_train_batch_size=2, micro_batches_per_agent=1)
    team = {"extraction": SimpleNamespace(adapter=None, policy=policy)}
    scorer = Scorer(team, args, Accelerator(cpu=True))
    scorer.texts, scorer.rows = {"extraction": [((3, 4), (5, 6)), ((3, 4), (7, 8))]}, ("extraction", 0, 2)
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 7, 8]])
    with pytest.warns(UserWarning, match="cannot share a prompt"):
        assert scorer(lambda *a, **k: "TRL's own way", None, ids, torch.ones_like(ids), 2) == "TRL's own way"


def test_a_run_without_a_number_of_steps_is_refused():
    with pytest.raises(CreditError, match="set max_steps"): check_run({}, SimpleNamespace(max_steps=-1))


def windowed(window):
    "A Gemma 3 of two layers, one of which looks back `window` tokens."
    torch.manual_seed(0)
    tok = words_tokenizer()
    config = Gemma3TextConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                              head_dim=8, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                              pad_token_id=0,
                              layer_types=["sliding_attention", "full_attention"], sliding_window=window,
                              eos_token_id=1, bos_token_id=None, initializer_range=0.3, attn_implementation="sdpa")
    return Backbone(Gemma3ForCausalLM(config).eval(), tok, (), "windowed")

@pytest.mark.slow
@pytest.mark.parametrize("window", [8, 200])
def test_a_step_of_a_model_with_windows_is_that_of_the_simple_way(tmp_path, monkeypatch, window):
    "CoMAM Alg. 1: one step, with shared prompts and without."
    moved, shared = [], []
    monkeypatch.setattr(scoring, "shared_logprobs", lambda *a, f=scoring.shared_logprobs, **kw:
                        shared.append(1) or f(*a, **kw))
    for share in (True, False):
        team = make_team(windowed(window), r=4, **{a: dict(max_new_tokens=6) for a in AGENTS})
        for i, agent in enumerate(team.values()): agent.prompt = lambda state, i=i: "3 4 5 6 7 8 9 " * 2 + f"{i} 2"
        config = settings(tmp_path, max_steps=1, learning_rate=1.0, optim="sgd", shared_prefix=share, keep_prompts=0)
        CoMAMTrainer(team, [example_episode()] * 2, wordy, config).train()
        moved.append(torch.cat([p.detach().flatten() for ps in team.groups().values() for p in ps]))
    assert len(shared) == 3 # one for each agent, of the first run alone
    fresh = make_team(windowed(window), r=4)
    assert (moved[0] - moved[1]).abs().max() < 1e-5
    began = torch.cat([p.detach().flatten() for ps in fresh.groups().values() for p in ps])
    assert (moved[0] - began).abs().max() > 1e-3


# ---- prompts that are read once, for writing and for scoring

def words_tokenizer(extra=()):
    words = ["<pad>", "<eos>", "<unk>", *AGENTS, *map(str, range(40)), *extra]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                   padding_side="left")

def reader(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    tok = words_tokenizer()
    config = LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=2048, eos_token_id=1, pad_token_id=0,
                         bos_token_id=None,
                         initializer_range=0.3, attention_dropout=dropout)
    return Backbone(LlamaForCausalLM(config).eval(), tok, (), "reader")

def long_prompt(name, own):
    """700 words. With `own`, an episode's for the extraction agent, and for the others different ones in each rollout,
    behind 100 that are always the same. Without, all read the same."""
    asked = [0]
    def prompt(state):
        asked[0] += 1
        k = asked[0] if own else 3
        return " ".join([name if own else "1", *(str(i % 7) for i in range(100)),
                         *(str((i * k) % 40) for i in range(600 + k))])
    return prompt

def wordy(groups):
    "Rewards: how many different words; the answer is right if it is long."
    local = [[[len(set(t[a].action_ids)) / 6 for t in g] for a in AGENTS] for g in groups]
    return torch.tensor(local), torch.tensor([[float(len(t["retrieval"].action_ids) > 4) for t in g] for g in groups])

def settings(folder, **kw):
    few = dict(max_steps=2, episodes_per_step=2, num_generations=4, use_cpu=True, disable_tqdm=True,
               max_completion_length=6,
               sampling="per_group")
    return CoMAMConfig(str(folder), **few | kw)

def trained(tmp_path, monkeypatch, keep, policy="adapters", own=True, dropout=0.0, E=2, **kw):
    "Weights after two steps, what was read, and what was scored with a reading."
    read, scored = [], []
    monkeypatch.setattr(scoring, "read_prompts", lambda model, prompts,
                        f=scoring.read_prompts: read.append(len(prompts)) or f(model, prompts))
    monkeypatch.setattr(scoring, "shared_logprobs", lambda *a, reading=None, f=scoring.shared_logprobs:
                        scored.append(reading is not None) or f(*a, reading=reading))
    backbones = {a: reader(i, dropout) for i, a in enumerate(AGENTS)} if policy == "separate" else reader(0, dropout)
    team = make_team(backbones, policy, r=4, **{a: dict(max_new_tokens=6) for a in AGENTS})
    for name, agent in team.items(): agent.prompt = long_prompt(name, own)
    config = settings(tmp_path, episodes_per_step=E, learning_rate=1.0, optim="sgd", keep_prompts=keep, **kw)
    trainer = CoMAMTrainer(team, [example_episode()] * 2, wordy, config)
    trainer.train()
    monkeypatch.undo()
    assert all(a.policy.reader is None for a in team.values())
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}, read, scored, trainer

@pytest.mark.parametrize("policy, own", [("adapters", False)] + [
    pytest.param(*x, marks=pytest.mark.slow) for x in (("adapters", True), ("shared", False), ("separate", False))])
def test_prompts_kept_from_writing_to_scoring_change_nothing_but_the_time(tmp_path, monkeypatch, policy, own):
    simple, read, scored, _ = trained(tmp_path, monkeypatch, 0, policy, own)
    learned = all(v.abs().max() > 1e-3 for k, v in simple.items() if ".lora_B" in k)
    assert not read and not any(scored) and (policy == "separate" or learned)
    kept, read, scored, trainer = trained(tmp_path, monkeypatch, 10**6, policy, own)
    # two steps; one policy for all keeps one prompt once
    assert scored == [True, policy != "shared", policy != "shared"] * 2
    assert not trainer.scorer.readings.kept # nothing is left in memory
    # of two episodes with four rollouts each
    assert read == ([2, 8, 8] if own else [1] if policy == "shared" else [1, 1, 1]) * 2
    for k in simple: torch.testing.assert_close(kept[k], simple[k], rtol=1e-4, atol=1e-5, msg=k)

@pytest.mark.slow
def test_no_more_prompts_are_kept_than_allowed(tmp_path, monkeypatch):
    # an episode's prompt has some 700 tokens, the eight others have thousands
    _, read, scored, _ = trained(tmp_path, monkeypatch, 1500)
    assert read == [2, 2] and scored == [True, False, False] * 2

@pytest.mark.slow # the rarer ways to train
@pytest.mark.parametrize("kw", [dict(dropout=0.1), dict(gradient_checkpointing=True), dict(shared_prefix=False)])
def test_prompts_are_read_twice_where_that_is_not_the_same(tmp_path, monkeypatch, kw):
    _, read, scored, _ = trained(tmp_path, monkeypatch, 10**6, **kw)
    assert not read and not any(scored)

@pytest.mark.slow
def test_micro_batches_of_one_prompt_do_not_share_a_reading(tmp_path, monkeypatch):
    simple, *_ = trained(tmp_path, monkeypatch, 0, own=False, E=1, micro_batches_per_agent=2)
    kept, read, scored, _ = trained(tmp_path, monkeypatch, 10**6, own=False, E=1, micro_batches_per_agent=2)
    assert read == [1] * 6 and scored == [True, False] * 6 # the first has used it up
    for k in simple: torch.testing.assert_close(kept[k], simple[k], rtol=1e-4, atol=1e-5, msg=k)

@pytest.mark.slow
def test_a_second_update_with_the_same_texts_reads_again(tmp_path, monkeypatch):
    simple, *_ = trained(tmp_path, monkeypatch, 0, own=False, num_iterations=2)
    kept, read, scored, _ = trained(tmp_path, monkeypatch, 10**6, own=False, num_iterations=2)
    assert sum(scored) == len(read) == 3 # the weights have changed since
    for k in simple: torch.testing.assert_close(kept[k], simple[k], rtol=1e-4, atol=1e-5, msg=k)


# ---- what TRL and Accelerate do otherwise than a joint run needs

class Lines(TrainerCallback):
    "Keeps the log lines."
    def __init__(self): self.lines = []
    def on_log(self, args, state, control, logs=None, **kw):
        if "r_ret" in logs: self.lines.append(logs)

def team_of(backbone, policy="adapters", **kw):
    return make_team(backbone, policy, r=4, **{a: dict(max_new_tokens=6, **kw) for a in AGENTS})

def weights(team): return {ns: torch.cat([p.detach().flatten() for p in ps]) for ns, ps in team.groups().items()}

TEXTS = [] # of the last run's last step

def run(folder, team, rewards=wordy, n=4, sampler=None, resume=None, **kw):
    trainer = CoMAMTrainer(team, [example_episode()] * n, rewards, settings(folder, **kw), sampler=sampler,
                           callbacks=[log := Lines()])
    trainer.train(resume_from_checkpoint=resume)
    TEXTS[:] = trainer.last_groups
    return log.lines

@pytest.mark.parametrize("clip, alone", [("per_agent", True), ("together", False)])
def test_an_agents_gradient_is_clipped_as_by_an_optimiser_of_its_own(tmp_path, clip, alone):
    "Its step among three is the step that it takes alone; TRL's one limit for all makes it smaller."
    sgd = dict(optim="sgd", max_steps=1, max_grad_norm=1e-3, lr_scheduler_type="constant")
    joint, single, start = (team_of(reader()) for _ in range(3))
    run(tmp_path, joint, learning_rate=3.0, clip=clip, **sgd) # TRL's loss is the mean over three agents
    run(tmp_path, single, learning_rate=1.0, trained_agents=["profile"], **sgd)
    moved = [weights(t)["profile",] - weights(start)["profile",] for t in (joint, single)]
    assert moved[1].norm() == pytest.approx(1e-3, rel=1e-3) # the limit was reached
    assert torch.allclose(*moved, atol=1e-7) == alone

def test_a_policy_that_all_share_is_clipped_as_one(tmp_path):
    sgd = dict(optim="sgd", max_steps=1, max_grad_norm=1e-3, learning_rate=1.0)
    one, other = team_of(reader(), "shared"), team_of(reader(), "shared")
    run(tmp_path, one, **sgd)
    run(tmp_path, other, clip="together", **sgd)
    assert torch.equal(*(weights(t)[AGENTS] for t in (one, other)))

def by_hand(team, groups, lr, updates, beta, epsilon):
    "CoMAM Alg. 1 with plain SGD, one text at a time: Eq. 7 and 8 for each agent on its own action, after Eq. 13-15."
    rewards = assign(*wordy(groups)).rewards
    advantages = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-4)
    old = {}
    for _ in range(updates):
        for p in (p for ps in team.groups().values() for p in ps): p.grad = None
        for i, name in enumerate(AGENTS):
            agent = team[name]
            for e, g in ((e, g) for e in range(len(groups)) for g in range(len(groups[e]))):
                t, A = groups[e][g][name], advantages[e, i, g]
                texts = [t.prompt_ids], [t.action_ids]
                with torch.no_grad(), without_adapters(agent.policy.model):
                    reference, _ = token_logprobs(agent.policy, *texts)
                logps, _ = token_logprobs(agent.policy, *texts, adapter=agent.adapter)
                ratio = (logps - old.setdefault((i, e, g), logps.detach())).exp()
                gain = torch.min(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon) * A)
                off = reference - logps
                kl = off.exp() - off - 1 # Eq. 8
                (-(gain - beta * kl).mean() / (len(AGENTS) * len(groups) * len(groups[e]))).backward()
        with torch.no_grad():
            for p in (p for ps in team.groups().values() for p in ps): p -= lr * p.grad

@pytest.mark.parametrize("policy, passes", [("adapters", 1), pytest.param("shared", 2, marks=pytest.mark.slow)])
def test_two_updates_on_one_batch_with_a_kl_term_are_those_by_hand(tmp_path, policy, passes):
    teams = [team_of(reader(), policy) for _ in range(2)]
    for team in teams: # away from the reference, and from what both began with
        torch.manual_seed(1)
        for i, agent in enumerate(team.values()): agent.prompt = lambda state, i=i: f"3 4 5 6 7 8 9 {i} 2"
        for p in (p for ps in team.groups().values() for p in ps): p.data += .05 * torch.randn_like(p)
    start, (team, other) = weights(teams[0]), teams
    run(tmp_path, team, n=2, max_steps=2, num_iterations=2, beta=.3, optim="sgd", learning_rate=.05, max_grad_norm=1e9,
        lr_scheduler_type="constant", micro_batches_per_agent=passes)
    by_hand(other, TEXTS, .05, 2, .3, .2)
    for names, w in weights(team).items():
        assert torch.allclose(w, weights(other)[names], atol=1e-6) and (w - start[names]).abs().max() > 1e-3

@pytest.mark.parametrize("policy", ["adapters", "separate"])
def test_before_and_after_are_measured_alike(tmp_path, policy):
    "With a learning rate of 0 a run in bfloat16 changes no logit; Accelerate's autocast used to stay on the model."
    team = team_of({a: reader(i) for i, a in enumerate(AGENTS)} if policy == "separate" else reader(), policy)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    asked = lambda: [a.policy.model.eval()(ids).logits.detach() for a in team.values()]
    before = asked()
    run(tmp_path, team, learning_rate=0.0, max_steps=1, bf16=True)
    for x, y in zip(before, asked()): assert x.dtype == y.dtype == torch.float32 and torch.equal(x, y)
    run(tmp_path, team, learning_rate=0.0, max_steps=1, bf16=True) # and it can be trained again
    for x, y in zip(before, asked()): assert torch.equal(x, y)

def test_a_stop_text_is_an_end_and_not_a_cut(tmp_path):
    "A base model's texts end at a stop text. mask_truncated_completions took all for cut, the gradient was 0."
    tok = words_tokenizer()
    tok.add_special_tokens({"eos_token": "<never>"}) # an end token that the model does not have
    team = team_of(replace(reader(), tokenizer=tok))
    backbone = team["profile"].policy
    backbone.model.generation_config.eos_token_id = tok.eos_token_id
    for agent in team.values(): agent.prompt = lambda state: "3 4 5"
    [line] = run(tmp_path, team, learning_rate=0.0, max_steps=1, mask_truncated_completions=True)
    assert line["completions/clipped_ratio"] == 1 and line["grad_norm"] == 0 # all are cut indeed
    said = [i for g in TEXTS for t in g for i in t["profile"].action_ids[2:]]
    backbone.stop = tok.decode([max(set(said), key=said.count)]) # a word that it says often
    [line] = run(tmp_path, team, learning_rate=0.0, max_steps=1, mask_truncated_completions=True)
    # TRL sees no end token, the rollout knows better
    assert line["completions/clipped_ratio"] == 1 and line["grad_norm"] > 0

def test_an_entropy_bonus_reaches_the_weights(tmp_path):
    "Scoring with shared prompts has no gradient of the entropy; with a bonus the way is TRL's own."
    plain, bonus, own = team_of(reader()), team_of(reader()), team_of(reader())
    for t, kw in ((plain, {}), (bonus, dict(entropy_coef=1.0)), (own, dict(entropy_coef=1.0, shared_prefix=False))):
        run(tmp_path, t, optim="sgd", learning_rate=1.0, max_steps=1, clip="together", **kw)
    assert not torch.allclose(weights(plain)["profile",], weights(bonus)["profile",], atol=1e-5)
    assert torch.allclose(weights(own)["profile",], weights(bonus)["profile",], atol=1e-6)

@pytest.mark.parametrize("name, value", [("top_p", 0.9), ("top_k", 50), ("min_p", 0.1), ("repetition_penalty", 1.2),
                                         ("generation_kwargs", {"top_k": 3}),
                                         ("steps_per_generation", 2), ("generation_batch_size", 48),
                                         ("shuffle_dataset", True),
                                         ("sync_ref_model", True), ("per_device_eval_batch_size", 2)])
def test_a_setting_that_would_be_ignored_is_refused(tmp_path, name, value):
    with pytest.raises(CreditError, match=f"{name}=.* would be ignored"): settings(tmp_path, **{name: value})

def test_batch_settings_are_honoured_or_refused(tmp_path):
    config = settings(tmp_path, per_device_train_batch_size=4) # of an agent's 8 rows
    assert (config.per_device_train_batch_size, config.micro_batches_per_agent,
            config.gradient_accumulation_steps) == (4, 2, 6)
    assert settings(tmp_path, gradient_accumulation_steps=3).gradient_accumulation_steps == 3
    with pytest.raises(CreditError, match="per_device_train_batch_size=5"):
        settings(tmp_path, per_device_train_batch_size=5)
    with pytest.raises(CreditError, match="gradient_accumulation_steps=8"):
        settings(tmp_path, gradient_accumulation_steps=8)

def test_two_cards_and_one_process_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(CreditError, match="2 cards are visible to one process.*accelerate launch.*cuda:0"):
        settings(tmp_path)

def test_the_card_that_is_named_is_the_card_that_is_used(tmp_path, monkeypatch):
    "`--device cuda:1` used to end on cuda:0. Two cards that are not there:"
    from accelerate.state import AcceleratorState, PartialState
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **k: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: taken.append(torch.device(d)))
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        config = settings(tmp_path, use_cpu=False, run_on="cuda:1")
        assert (config.device, config.n_gpu, taken[-1]) == (torch.device("cuda:1"), 1, torch.device("cuda:1"))
        with pytest.raises(CreditError, match="no such card, 2 can be seen"):
            settings(tmp_path, use_cpu=False, run_on="cuda:2")
        with pytest.raises(CreditError, match="2 cards are visible"): settings(tmp_path, use_cpu=False)
        team = team_of(reader())
        monkeypatch.setattr(torch.nn.Module, "parameters", lambda self,
                            recurse=True: iter([SimpleNamespace(device=torch.device("cuda:0"))]))
        from comam_nb.rl.launch import check_run
        with pytest.raises(BackboneError, match="is on cuda:0 and the run on cuda:1"): check_run(team, config)
    finally:
        monkeypatch.undo()
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(cpu=True)

@pytest.mark.slow
def test_the_samplers_state_is_part_of_a_checkpoint(tmp_path):
    "A run that is resumed rolls out the episodes that the unbroken one rolls out, and ends with the same weights."
    episodes = [replace(example_episode(), id=str(i)) for i in range(6)]
    class Seen:
        def __init__(self): self.ids = []
        def __call__(self, groups):
            self.ids.append([g[0].episode.id for g in groups])
            return wordy(groups)
    def go(folder, resume=None, **kw):
        torch.manual_seed(0)
        team, seen, sampler = team_of(reader()), Seen(), PrioritySampler(6, decay=0.5, epsilon=0.0001, seed=3)
        trainer = CoMAMTrainer(team, episodes, seen, settings(folder, max_steps=4, sampling="stream",
            learning_rate=1e-2, **kw), sampler=sampler)
        trainer.train(resume_from_checkpoint=resume)
        return team, seen.ids, sampler.state_dict()
    whole, ids, state = go(tmp_path / "a")
    go(tmp_path / "b", save_strategy="steps", save_steps=2)
    kept = json.loads((tmp_path / "b" / "checkpoint-2" / "sampler.json").read_text())
    assert kept["t"] == 2 and kept["known"]
    resumed, later, end = go(tmp_path / "b", str(tmp_path / "b" / "checkpoint-2"))
    assert later == ids[2:] and end == state
    assert all(torch.equal(weights(whole)[k], weights(resumed)[k]) for k in weights(whole))
    os.remove(tmp_path / "b" / "checkpoint-2" / "sampler.json")
    with pytest.raises(CreditError, match="of a run without a sampler"):
        go(tmp_path / "b", str(tmp_path / "b" / "checkpoint-2"))

# ---- who writes

class TRLEngine:
    "As TRL's `VLLMGeneration` looks from outside, in this process."
    top_p, top_k, min_p, repetition_penalty, generation_kwargs = 1.0, 0, None, 1.0, {}
    def __init__(self): self.sent, self.asked, self.llm = 0, [], self
    def sync_weights(self): self.sent += 1

def vllm_stand_in(monkeypatch):
    "vLLM's two classes that are asked for: they keep what they are given."
    keep = lambda *names: type("Kept", (SimpleNamespace,), {"__init__": lambda self, *a, **k:
                                                            self.__dict__.update(zip(names, a), **k)})
    for name, kind in (("vllm", dict(SamplingParams=keep())), ("vllm.lora", {}),
                       ("vllm.lora.request", dict(LoRARequest=keep("name", "number", "path")))):
        module = ModuleType(name)
        module.__dict__.update(kind)
        monkeypatch.setitem(sys.modules, name, module)

def test_vllm_is_given_the_adapter_of_the_agent_whose_turn_it_is_and_no_weights(tmp_path, monkeypatch):
    "No card to run it on: a stand-in reads the adapter that it is pointed at, and writes by itself."
    class Engine(TRLEngine):
        def generate(self, prompts, sampling_params, lora_request, use_tqdm):
            weights, rows = load_file(f"{lora_request.path}/adapter_model.safetensors"), len(prompts)
            self.asked.append((rows, sampling_params, lora_request, weights))
            text = lambda k: SimpleNamespace(token_ids=[*range(5, 6 + k % 4), 1, 7])
            return [SimpleNamespace(outputs=[text(i + k) for k in range(sampling_params.n)]) for i in range(rows)]
    vllm_stand_in(monkeypatch)
    team = team_of(reader())
    trainer = CoMAMTrainer(team, [example_episode()], wordy,
                           settings(tmp_path, max_steps=2, sampling="stream", learning_rate=0.1))
    trainer.vllm_generation = engine = Engine()
    settle(trainer, trainer.team)
    trainer.train()
    rows, wishes, adapters, weights = zip(*engine.asked)
    assert [a.name.split("-")[0] for a in adapters] == list(AGENTS) * 2
    assert len({a.number for a in adapters}) == 6 # vLLM keeps what it has read under a number
    # only extraction's prompts are equal for sure: two, four times; then eight, once
    assert list(zip(rows, (w.n for w in wishes))) == [(2, 4), (8, 1), (8, 1)] * 2
    assert {(w.temperature, w.max_tokens) for w in wishes} == {(1.0, 6)}
    model = team["profile"].policy.model
    for i, name in enumerate(AGENTS):
        assert all(v.shape == model.state_dict()[k.replace(".weight", f".{name}.weight")].shape
                   for k, v in weights[i].items())
        assert any(not torch.equal(v, weights[i + 3][k]) for k, v in weights[i].items()) # a step lies between
    assert {t["extraction"].action_ids for g in trainer.last_groups for t in g} == \
        {(*range(5, n), 1) for n in (6, 7, 8, 9)} # cut behind the end
    assert not engine.sent # what TRL calls before each step does nothing
    engine.__class__.sync_weights(engine)
    assert engine.sent and team["profile"].policy.writer is None

def whole_team():
    "One model without adapters, which is trained whole."
    return make_team(dict.fromkeys(AGENTS, reader()), "separate", **{a: dict(max_new_tokens=6) for a in AGENTS})

def test_vllm_gets_whole_weights_of_a_policy_without_adapters_and_draws_its_numbers_itself(tmp_path):
    class Engine(TRLEngine):
        def generate(self, rows, images, G):
            self.asked.append((len(rows), G))
            return rows, [[5 + self.sent, 6, 1, 7] for _ in rows], None, None
    def go(sampling):
        trainer = CoMAMTrainer(whole_team(), [example_episode()], wordy,
                               settings(tmp_path, max_steps=1, sampling=sampling))
        trainer.vllm_generation = engine = Engine()
        settle(trainer, trainer.team)
        trainer.train()
        return engine
    engine = go("stream")
    assert engine.sent == 3 and engine.asked == [(8, 4), (8, 1), (8, 1)]
    with pytest.raises(BackboneError, match="vLLM draws its numbers itself"): go("per_group")

def test_vllm_is_started_for_adapters_where_there_are_some(tmp_path, monkeypatch):
    from trl.generation import vllm_generation
    monkeypatch.setattr(vllm_generation, "LLM", lambda **kw: kw, raising=False)
    start = vllm_generation.LLM
    def check(whole=False, **kw):
        check_run(whole_team() if whole else team_of(reader()), settings(tmp_path, use_vllm=True, sampling=None, **kw))
        return vllm_generation.LLM
    for _ in range(2): assert check()(model="x") == dict(model="x", enable_lora=True, max_lora_rank=8)
    assert check(whole=True) is start
    for kw in (dict(vllm_mode="server"), dict(vllm_tensor_parallel_size=2), dict(vllm_enable_sleep_mode=True)):
        with pytest.raises(CreditError, match="adapters reach vLLM in the run's own process alone"): check(**kw)
    assert check(whole=True, vllm_mode="server") is start

@pytest.mark.slow
@pytest.mark.parametrize("policy, steps", [("adapters", 1), ("adapters", 2), ("shared", 2), ("separate", 2)])
def test_a_joint_step_written_by_continuous_batching_is_the_step_written_without(tmp_path, policy, steps):
    "The same draws give the same texts, and so the same weights, also where a manager is kept from step to step."
    def go(engine):
        backbones = {a: reader(i) for i, a in enumerate(AGENTS)} if policy == "separate" else reader()
        team = make_team(backbones, policy, r=4, **{a: dict(max_new_tokens=6) for a in AGENTS})
        trainer = CoMAMTrainer(team, [example_episode()] * 2, wordy, settings(
            tmp_path, max_steps=steps, engine=engine, engine_memory=0.01, learning_rate=0.5, optim="sgd"))
        opened, start, close = [], weights_of(trainer), trainer.joint.close
        trainer.joint.close = lambda: opened.extend(e for _, e in trainer.joint.engines.values() if e) or \
            opened.extend(len(e.managers) for e in opened[:]) or close()
        trainer.train()
        assert all(a.policy.writer is None for a in team.values()) and not trainer.joint.engines
        assert any((v - start[k]).abs().max() > 1e-3 for k, v in weights_of(trainer).items())
        return weights_of(trainer), [t[a].action_ids for g in trainer.last_groups for t in g for a in AGENTS], opened
    plain, texts, none = go("own")
    written, found, opened = go("continuous")
    assert found == texts and not none
    assert opened[len(opened) // 2:] == {"adapters": [3], "shared": [1], "separate": [1, 1, 1]}[policy]
    for k in plain: torch.testing.assert_close(written[k], plain[k], rtol=1e-4, atol=1e-5, msg=k)

def weights_of(trainer):
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}
