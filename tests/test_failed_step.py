"A step that fails is one line with episode and agent, and a file that `comam replay` computes again."
import re
from pathlib import Path

import pytest, torch
from transformers.utils import logging

from comam_nb.base.errors import BackboneError, CreditError, RewardError
from comam_nb.cli.__main__ import main
from comam_nb.microworld import MicroWorld, make_episodes
from comam_nb.mdp import example_group
from comam_nb.rl.failed_step import StepRecord, check_scores, replay
from comam_nb.rl.settings import CoMAMConfig
from comam_nb.training import CoMAMTrainer
from comam_nb.worlds.warm_start import micro_agents, micro_rewards

logging.disable_progress_bar()
WORLD, EPISODES = MicroWorld(), make_episodes(MicroWorld(), 4)
REWARDS = micro_rewards(WORLD)

def step_that_fails(folder, kind, change=lambda local, answers: (local, answers), credit=None, damage=None, **kw):
    "(message, what the file holds) of a run of two steps of two episodes and four rollouts."
    team, settings = micro_agents(WORLD, "adapters", r=4), dict(max_steps=2, episodes_per_step=2, num_generations=4)
    if damage: damage(team)
    config = CoMAMConfig(str(folder), use_cpu=True, disable_tqdm=True, max_completion_length=24, **settings | kw)
    with pytest.raises(kind) as e:
        CoMAMTrainer(team, EPISODES, lambda g: change(*map(torch.tensor, REWARDS(g))), config, credit=credit).train()
    said = "\n".join([str(e.value), *getattr(e.value, "__notes__", ())])
    assert len(str(e.value).splitlines()) == 1
    path = Path(re.search(r"comam replay (\S+)", said)[1])
    return str(e.value), StepRecord.load(path)

def put(where, value):
    def change(local, answers):
        (local if len(where) == 3 else answers)[where] = value
        return local, answers
    return change

NAN = float("nan")

@pytest.mark.parametrize("change,said", [
    (lambda l, a: None, "the reward function returned NoneType, where a pair is expected: local rewards [1, 3, 4]"),
    (lambda l, a: (l, None), "answer rewards: the table: None is no list"),
    (lambda l, a: (l[:, :2], a), "2 entries, where 3 are expected, one for each of the extraction agent, the profile"),
    (lambda l, a: (l[:0], a[:0]), "local rewards: the table: 0 entries, where 1 are expected"),
    (lambda l, a: (l.transpose(1, 2), a), ": 4 entries, where 3 are expected"),
    (lambda l, a: (l, a[..., None]), "answer rewards: their shape is [1, 4, 1], where [1, 4] is expected"),
    (lambda l, a: ([[[None] * 4] * 3], a), "the extraction agent, rollout 1: None is no number"),
    (put((0, 2, 3), NAN), "local rewards: episode 'example', the retrieval agent, rollout 4: the number is nan"),
    (put((0, 1), float("inf")), "answer rewards: episode 'example', rollout 2: the number is inf")])
def test_rewards_of_a_wrong_shape_name_episode_and_agent(change, said):
    with pytest.raises(CreditError, match=re.escape(said)):
        check_scores(change(torch.ones(1, 3, 4), torch.ones(1, 4)), [example_group()])

def test_a_reward_that_is_no_number_names_its_episode(tmp_path):
    message, record = step_that_fails(tmp_path, CreditError, put((1, 2, 3), NAN))
    said = f"local rewards: episode {record.episodes[1].id!r}, the retrieval agent, rollout 4: the number is nan"
    assert f"step 1: {said}; look at it with" in message and list(replay(record))[-1] == f"rewards: {said}"
    assert [e.id for e in record.episodes] == [g[0].episode.id for g in record.groups] and record.weights

def test_a_credit_function_that_returns_nan_names_its_episode(tmp_path):
    seen = []
    def by_zero(local, answers):
        seen.append(1)
        return [1 / 3, 1 / 3, NAN if len(seen) % 2 == 1 and len(seen) > 1 else 1 / 3] # the second episode's
    message, record = step_that_fails(tmp_path, CreditError, credit=by_zero)
    assert "credit of episode" in message and "agents extraction, profile, retrieval: the scheme returned" in message
    assert "credit: by by_zero, whose code is not in the file" in list(replay(record))

@pytest.mark.slow
def test_weights_that_became_nan_name_their_agent(tmp_path):
    def damage(team): next(iter(team.groups()["profile",])).data.fill_(NAN)
    for sampling in ("per_group", "stream"):
        message, record = step_that_fails(tmp_path / sampling, BackboneError, damage=damage, sampling=sampling)
        assert message.startswith("step 1: the profile agent: the model's scores are not numbers")
        assert "weights at the step's start: damaged: profile" in list(replay(record))

def test_a_learning_rate_that_breaks_the_weights_ends_the_step_that_broke_them(tmp_path):
    message, record = step_that_fails(tmp_path, BackboneError, learning_rate=1e30, max_steps=1)
    assert re.match(r"step 1: the weights of the extraction agent: \d+ of \d+ tensors are NaN, infinite or", message)
    assert f"after the update on episodes {record.episodes[0].id!r}, " in message and "below 1e+30" in message
    lines = list(replay(record, micro_agents(WORLD, "adapters", r=4), REWARDS))
    assert "weights at the step's start: whole" in lines and "local rewards again: as recorded" in lines
    assert [l.split(":")[0] for l in lines[-3:]] == ["extraction", "profile", "retrieval"]
    assert all("mean log-probability -" in l and "gradient's norm" in l for l in lines[-3:])

@pytest.mark.slow
def test_an_error_that_is_not_ours_keeps_its_kind_and_says_where_the_step_is(tmp_path):
    step_that_fails(tmp_path, ZeroDivisionError, lambda l, a: 1 / 0)
    step_that_fails(tmp_path, RewardError, lambda l, a: (_ for _ in ()).throw(RewardError("no gold answer")))

@pytest.mark.slow
def test_comam_replay_shows_a_failed_run_of_the_command_line(tmp_path, capsys):
    run = tmp_path / "run"
    few = "--steps 2 --episodes-per-step 1 --group-size 4 --eval-episodes 2".split()
    assert main(["train", *few, "--lr", "1e30", "--out", str(run)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("comam: step 1: the weights of the ")
    path = said.split("comam replay ")[1]
    assert main(["replay", path]) == 0
    shown = capsys.readouterr().out
    assert "answer rewards again: as recorded" in shown and "profile: mean log-probability" in shown
    Path(path).rename(tmp_path / "elsewhere.safetensors")
    assert main(["replay", str(tmp_path / "elsewhere.safetensors")]) == 0
    assert "no team to compute with" in capsys.readouterr().out
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "elsewhere.safetensors").read_bytes()[:1000])
    assert main(["replay", str(tmp_path / "torn.safetensors")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
