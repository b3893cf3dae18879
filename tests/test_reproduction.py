"The ablation's runs on tiny budgets: what is written, resumed and refused; and the trainer's options that they use."
import json

import pytest
import torch

from comam_nb.agents import ProfileAgent
from comam_nb.cli.__main__ import main
from comam_nb.base.errors import DataError
from comam_nb.mdp import AGENTS, Scripted
from comam_nb.microworld import MicroWorld, make_episodes
from comam_nb.worlds.warm_start import load_warm_start, micro_agents, micro_rewards
from comam_nb.studies.ablation import (VARIANTS, Budget, _do_without, read_table, reproduce, _run_variant, steps_to,
                                       train_variant)
from comam_nb.rl.settings import CoMAMConfig
from comam_nb.training import CoMAMTrainer
from comam_nb.rl.sampler import PrioritySampler
from comam_nb.rl.team import make_team

TINY = Budget(steps=2, episodes_per_step=1, group_size=4, lr=1e-2, eval_episodes=4)

def adapters(agents):
    weights = agents["extraction"].policy.model.named_parameters()
    return {k: p.detach().clone() for k, p in weights if ".lora_" in k}

def moved(before, after, names=AGENTS):
    return {a for a in names if any(not torch.equal(before[k], after[k]) for k in before if f".{a}." in k)}

@pytest.mark.slow
def test_runs_are_written_resumed_and_repeatable(tmp_path):
    said = []
    def go(budget=TINY):
        return reproduce(tmp_path / "out", ("warm_start", "equal"), (0, 1), budget, workers=1, progress=said.append)
    rows = go()
    done = [("warm_start", 0, 0), ("warm_start", 1, 0), ("equal", 0, 2), ("equal", 1, 2)]
    assert [(r["arm"], r["seed"], r["steps"]) for r in rows] == done
    made = {"runs", "weights", "config.json", "table.csv", "table.md", "curves.jsonl", "curves.png"}
    assert len(said) == 4 and {p.name for p in (tmp_path / "out").iterdir()} == made
    assert [r["arm"] for r in read_table(tmp_path / "out" / "table.csv")] == [r["arm"] for r in rows]
    gone = tmp_path / "out" / "runs" / "equal-1.json"
    old = json.loads(gone.read_text()); gone.unlink(); said.clear()
    new = go()[3]
    assert len(said) == 1 and {**new, "seconds": 0} == {**old, "seconds": 0}
    with pytest.raises(DataError, match="begun with other settings"): go(Budget(steps=3))

@pytest.mark.parametrize("name", ["independent", "freeze_profile", "without_extraction", "shared", "fixed"])
def test_an_arm_trains_those_that_it_says(name):
    variant, budget = VARIANTS[name], Budget(steps=2, episodes_per_step=2, group_size=4, lr=1e-2, eval_episodes=4)
    agents, curve = train_variant(variant, budget, seed=1)
    before, after = adapters(micro_agents(MicroWorld(), variant.policy, seed=1)), adapters(agents)
    assert len(curve) == 2
    if name == "shared": assert any(not torch.equal(before[k], after[k]) for k in before)
    else: assert moved(before, after) and moved(before, after) <= set(variant.trained)
    if name == "fixed": assert all(c[f"w_{a}"] == 1 for c in curve for a in AGENTS)

def test_an_agent_that_is_done_without_decides_nothing():
    "Whatever the profile agent writes, the retrieval agent sees no coarse memory."
    from comam_nb.mdp import rollout
    agents = micro_agents(MicroWorld())
    agents["profile"] = ProfileAgent(Scripted(["prefers the food japanese [1]"]))
    [[t]] = rollout(agents, make_episodes(MicroWorld(), 1), 1, intervene=_do_without("profile"))
    assert t["retrieval"].state.coarse == () and t["profile"].action.notes

def config(folder, **settings):
    return CoMAMConfig(str(folder), max_steps=2, episodes_per_step=2, use_cpu=True, disable_tqdm=True,
                       max_completion_length=40, **settings)

def test_agents_that_only_act_need_no_model(tmp_path):
    world = MicroWorld()
    agents = micro_agents(world)
    agents["profile"] = ProfileAgent(Scripted(["prefers the food japanese [1]"]))
    before = adapters(agents)
    args = config(tmp_path, num_generations=4, learning_rate=1e-2, trained_agents=["extraction", "retrieval"])
    CoMAMTrainer(agents, make_episodes(world, 4), micro_rewards(world), args).train()
    assert moved(before, adapters(agents)) == {"extraction", "retrieval"}

def test_three_agents_on_three_architectures(tmp_path):
    "Heterogeneous backbones: a narrow and a wide Llama and a GPT-NeoX, trained together, all three move."
    from dataclasses import replace
    from transformers import AutoConfig, AutoModelForCausalLM
    from comam_nb.worlds.warm_start import tiny_llama
    warm = load_warm_start(); V = len(warm.tokenizer)
    torch.manual_seed(0)
    neox = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "gpt_neox", vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=None))
    other = lambda model: replace(warm, model=model.eval())
    models = {"extraction": warm, "profile": other(neox), "retrieval": other(tiny_llama(V, hidden=32))}
    team = make_team(models, "separate", **{a: dict(max_new_tokens=20) for a in AGENTS})
    before = {n: [p.detach().clone() for p in a.policy.model.parameters()] for n, a in team.items()}
    world = MicroWorld()
    args = config(tmp_path, num_generations=8, learning_rate=1e-3)
    def ranked(groups):
        local = [[[float(len(t[a].action_ids)) + i for i, t in enumerate(g)] for a in AGENTS] for g in groups]
        return torch.tensor(local), torch.tensor([[float(i % 2) for i, _ in enumerate(g)] for g in groups])
    CoMAMTrainer(team, make_episodes(world, 4), ranked, args).train()
    for n, a in team.items():
        assert any(not torch.equal(x, y) for x, y in zip(before[n], a.policy.model.parameters())), n

def test_the_sampler_goes_where_there_is_something_to_learn(tmp_path):
    "Two of six episodes teach something; after a while they are chosen more often than the rest."
    sampler = PrioritySampler(6, epsilon=0.01, seed=1)
    seen = []
    for _ in range(60):
        chosen = sampler.choose(2); seen += chosen
        assert len(set(chosen)) == 2
        sampler.update(chosen, [0.5 if e < 2 else 0.0 for e in chosen])
    assert sum(e < 2 for e in seen[20:]) > 0.5 * len(seen[20:]) and set(seen) == set(range(6))

def test_steps_to_by_hand():
    assert steps_to([1, 0, 1, 1], 0.8, window=2) == 4 and steps_to([0, 1], 0.5, window=2) == 2
    assert steps_to([1], 0.8, window=5) is None

def test_bad_input(tmp_path, capsys):
    full = tmp_path / "full"; full.mkdir(); (full / "x").touch()
    new = str(tmp_path / "new")
    for argv, words in (([str(full)], "something else"), ([str(full / "x")], "a file"),
                        ([new, "--arms", "clever"], "unknown arm"), ([new, "--steps", "0"], "steps is 0"),
                        ([new, "--group-size", "1"], "group_size is 1"), ([new, "--seeds", "0"], "at least 1")):
        assert main(["reproduce", "--out", *argv]) == 2
        err = capsys.readouterr().err.strip()
        assert words in err and "\n" not in err, err
    assert not (tmp_path / "new").exists()
    with pytest.raises(DataError): _do_without("judge")

@pytest.mark.slow
def test_the_same_seed_gives_the_same_run():
    a, b = (_run_variant("adaptive", 3, TINY) for _ in range(2))
    assert a == b
