"Properties of the generated world that every result on it rests on."
from dataclasses import replace
from pathlib import Path

import comam_nb
from hypothesis import given, settings, strategies as st

from comam_nb.mdp import AGENTS, Scripted, rollout
from comam_nb.microworld import (KIND_OF, SUBJECTS, MicroWorld, best_accuracy, exact_profile_reward, make_episode,
                                 make_episodes, understudy, user_facts)
from comam_nb.worlds.warm_start import _demonstrations, micro_rewards, _world_agents, _world_tokenizer

worlds = st.builds(MicroWorld, facts=st.integers(1, 10), budget=st.integers(1, 6), profile_budget=st.integers(1, 4),
                   hot=st.integers(1, 10), skew=st.floats(0, 3),
                   superseded=st.floats(0, 1), noise=st.integers(0, 4), profile_share=st.floats(0, 1))

@settings(max_examples=60, deadline=None)
@given(worlds, st.integers(0, 10**6))
def test_the_evidence_is_the_last_statement_about_the_subject_and_holds_the_answer(world, seed):
    e = make_episode(world, seed)
    told = [(t, v) for t, s, v in user_facts(e.history) if s == e.meta["subject"]]
    turn, value = told[-1]
    assert e.evidence == {turn} and len({s for _, s, _ in user_facts(e.history)}) == world.facts
    assert e.answer == (KIND_OF[e.meta["subject"], value] if e.query.kind == "profile" else value)
    # the old statement would give a wrong answer
    if len(told) == 2: assert KIND_OF[e.meta["subject"], told[0][1]] != KIND_OF[e.meta["subject"], value]

@settings(max_examples=40, deadline=None)
@given(worlds, st.integers(0, 10**6))
def test_the_vocabulary_is_closed(world, seed):
    import random
    tok = _world_tokenizer()
    for prompt, text in _demonstrations(world, random.Random(seed)):
        assert tok.unk_token_id not in tok(prompt + text).input_ids

@settings(max_examples=25, deadline=None)
@given(worlds)
def test_understudies_reach_the_best_when_everything_fits_and_never_an_impossible_reward(world):
    roomy = replace(world, budget=10, profile_budget=10)
    agents = {n: type(a)(Scripted([""]), budget=a.budget) for n, a in _world_agents(roomy).items()}
    episodes = make_episodes(roomy, 5)
    local, answers = micro_rewards(roomy)(rollout(agents, episodes, 1, intervene=understudy(roomy, AGENTS)))
    assert answers == [[1.0]] * 5 and best_accuracy(roomy, episodes) > 1 - 1e-9
    assert all(0 <= r <= 1 for group in local for agent in group for r in agent)

def test_best_accuracy_grows_with_the_budget():
    episodes = make_episodes(MicroWorld(), 50)
    values = [best_accuracy(MicroWorld(budget=b, profile_budget=b), episodes) for b in range(1, 6)]
    assert values == sorted(values) and values[0] < values[-1]

def test_training_and_evaluation_share_no_episode():
    talk = lambda es: {tuple(m.content for m in e.turns) for e in es}
    seeds = lambda es: {e.id for e in es}
    train, test = make_episodes(MicroWorld(), 300, seed=3), make_episodes(MicroWorld(), 300, held_out=True)
    assert not seeds(train) & seeds(test) and len(talk(train) & talk(test)) == 0

def test_the_warm_start_ships_and_is_small():
    files = list((Path(comam_nb.__file__).parent / "weights" / "microworld").iterdir())
    assert any(f.suffix == ".safetensors" for f in files) and sum(f.stat().st_size for f in files) < 4e6

def test_a_wrong_profile_scores_less_than_a_right_one():
    world, e = MicroWorld(), make_episode(MicroWorld(), 1)
    from comam_nb.agents import Note
    turn, s, v = user_facts(e.history)[-1]
    right = KIND_OF[s, v]; wrong = next(k for k in SUBJECTS[s] if k != right)
    assert exact_profile_reward(world, (Note(f"prefers the {s} {right}", (turn,)),),
                                e.history) > exact_profile_reward(world, (Note(f"prefers the {s} {wrong}", (turn,)),),
        e.history)
