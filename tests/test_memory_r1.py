"Operations, the three agents, shipped adapters and daily use of the Memory-R1-style system."
import json, random
from pathlib import Path
import comam_nb
import pytest
import torch
from hypothesis import given, settings, strategies as st

from comam_nb.agents import Note
from comam_nb.data import Query, example_episode
from comam_nb.mdp import Scripted, State, rollout
from comam_nb.systems.memory_r1 import (_MEMORY_WORLD, _OPERATIONS, _ManagerAgent, _MemoryAnswerAgent, MemoryR1,
                                        _SessionExtraction, _answer_only, _carry_out,
                                        _manager_demonstrations, memory_r1_agents, _memory_r1_trainer, _micro_team,
                                        _read_operations, _renumber)
from comam_nb.microworld import make_episodes

lines = st.lists(st.one_of(st.text(max_size=30), st.builds(lambda k, n: f"{k} " + " ".join(f"[{i}]" for i in n),
                                                           st.sampled_from(_OPERATIONS), st.lists(st.integers(0, 7),
    max_size=3))), max_size=8)

@settings(max_examples=150, deadline=None)
@given(lines, st.integers(0, 3), st.integers(0, 3))
def test_any_text_can_be_read_and_carried_out(text, memory, facts):
    text = "\n".join(text)
    old, new = tuple(Note(f"m{i}", (i + 1,)) for i in range(memory)), tuple(Note(f"f{i}", (i + 10,))
        for i in range(facts))
    ops, malformed = _read_operations(text, memory, facts, 4)
    assert len(ops) + malformed == sum(bool(l.strip()) for l in text.splitlines()) and len(ops) <= 4
    count = lambda k: sum(o.kind == k for o in ops)
    assert len(_carry_out(ops, old, new)) == memory + count("ADD") - count("DELETE")
    sources = [o.source for o in ops if o.source]
    assert len(sources) == len(set(sources)) # no fact is used twice

@settings(max_examples=80, deadline=None)
@given(lines, st.sets(st.integers(0, 5), max_size=4), st.integers(0, 3))
def test_renumbered_operations_do_to_the_memory_what_they_did_to_the_prompt(text, places, facts):
    memory, where = tuple(Note(f"m{i}", (i + 1,)) for i in range(6)), sorted(places)
    new, shown = tuple(Note(f"f{i}", (i + 10,)) for i in range(facts)), tuple(Note(f"m{i}", (i + 1,))
        for i in sorted(places))
    ops, _ = _read_operations("\n".join(text), len(shown), facts, 10)
    small, large = _carry_out(ops, shown, new), _carry_out([_renumber(o, where, 6) for o in ops], memory, new)
    hidden = [m for i, m in enumerate(memory) if i not in places]
    assert sorted(large, key=str) == sorted([*small, *hidden], key=str) and [n for n in large if n in hidden] == hidden

def test_news_is_what_the_last_session_said():
    agent = _SessionExtraction(Scripted([""]))
    action = agent.parse("Has a cat. [1]\nDrinks tea. [7]\nNo citation.", State(0, history=example_episode().history))
    assert [n.news for n in action.notes] == [False, True, True]
    memory, facts = _ManagerAgent().split(State(1, fine=action.notes, coarse=(Note("Old.", (2,)),)))
    assert [n.text for n in memory] == ["Old.", "Has a cat."] and len(facts) == 2

def test_the_answer_agent_reads_only_what_the_manager_kept():
    state = State(2, fine=(Note("secret", (1,)),), coarse=(Note("kept", (2,)),), query=Query("?"))
    assert "secret" not in _MemoryAnswerAgent().prompt(state) and "kept" in _MemoryAnswerAgent().prompt(state)

def test_demonstrations_are_well_formed_and_in_the_vocabulary():
    team = _micro_team(); tok = team["profile"].policy.tokenizer; rng = random.Random(1)
    for _ in range(40):
        for prompt, text in _manager_demonstrations(team, _MEMORY_WORLD, rng).values():
            assert tok.unk_token_id not in tok(prompt + text).input_ids

def test_training_leaves_the_extraction_agent_alone(tmp_path):
    team = _micro_team(); model = team["profile"].policy.model
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    _memory_r1_trainer(team, make_episodes(_MEMORY_WORLD, 2), 1, tmp_path, episodes_per_step=2,
                       num_generations=4).train()
    for k, p in model.named_parameters():
        if not any(f".{n}." in k for n in ("profile", "retrieval")): assert torch.equal(p, before[k]), k

def test_the_shipped_adapters_are_small_and_safetensors_only():
    files = [f for f in (Path(comam_nb.__file__).parent / "weights" / "memory_r1").rglob("*") if f.is_file()]
    assert {f.suffix for f in files} == {".safetensors", ".json"} and sum(f.stat().st_size for f in files) < 1e6

def test_the_trained_team_beats_the_warm_one():
    episodes, right = make_episodes(_MEMORY_WORLD, 80, seed=77, held_out=True), {}
    for stage in ("warm", "trained"):
        torch.manual_seed(0)
        _, r = _answer_only()(rollout(memory_r1_agents(stage), episodes, 1, temperature=0.8))
        right[stage] = sum(x[0] for x in r) / len(episodes)
    assert right["trained"] > right["warm"] # 300 episodes gave .81 and .57

def test_an_unknown_stage_is_refused():
    with pytest.raises(ValueError, match="warm"): memory_r1_agents("best")

def test_the_log_behind_the_plot_is_whole():
    log = Path(__file__).resolve().parents[1] / "nbs" / "logs" / "memory_r1.jsonl"
    lines = [json.loads(l) for l in log.read_text().splitlines()]
    assert [l.get("stage") for l in (lines[0], lines[-1])] == ["warm", "trained"] and [l["step"]
        for l in lines[1:-1]] == list(range(1, len(lines) - 1))

def test_a_long_session_is_managed_piece_by_piece_with_every_fact_seen():
    texts = ["".join(f"fact {i} [{i % 4 + 1}]\n" for i in range(9))]
    kinds = {"extraction": _SessionExtraction(Scripted(texts)), "profile": _ManagerAgent(Scripted(["NOOP"]), budget=4),
             "retrieval": _MemoryAnswerAgent(Scripted([""]))}
    system = MemoryR1(kinds)
    system.observe(example_episode().history[0])
    assert system.usage.calls == 1 + 3 and len(system.events) == 3 and system.memory() == () # 9 facts, 4 at a time
