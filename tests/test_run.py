"A run's folder: it goes on with the same settings only, from the last whole files, and says what it was trained on."
import json, os, shutil, signal, subprocess, sys, time
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import comam_nb
from comam_nb.base.errors import MemCollabError
from comam_nb.base.files import last_checkpoint, write_json, write_whole
from comam_nb.cli.__main__ import main
from comam_nb.data import Episode, Message, Query, Session
from comam_nb.runs.reports import read_scores
from comam_nb.runs.folder import CommandError, Run

SMALL = ["--steps", "3", "--episodes-per-step", "2", "--group-size", "4", "--eval-episodes", "4"]
PROGRAM = [sys.executable, "-c", "import sys; from comam_nb.cli.__main__ import main; sys.exit(main())"]

@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "Three steps without a break, checkpoints 2 and 3."
    out = tmp_path_factory.mktemp("runs") / "straight"
    assert main(["train", "--out", str(out), "--save-steps", "1", *SMALL]) == 0
    return out

@pytest.fixture
def stopped(straight, tmp_path):
    "The same run as if it had been killed after its last checkpoint."
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "weights")
    (out / "summary.json").unlink()
    return out

def same_end(a, b):
    "Equal weights, equal steps, equal scores before."
    for agent in ("extraction", "profile", "retrieval"):
        x, y = (load_file(run / "weights" / agent / "adapter_model.safetensors") for run in (a, b))
        assert all(torch.equal(x[k], y[k]) for k in x)
    steps = [[(m["step"], m["loss"], m["r_ret"]) for m in Run(run).metrics()] for run in (a, b)]
    assert steps[0] == steps[1] and [s[0] for s in steps[0]] == [1, 2, 3]
    assert Run(a).read("before.json") == Run(b).read("before.json")

def test_other_settings_are_refused_and_named(stopped, capsys):
    before = (stopped / "config.json").read_bytes()
    argv = ["train", "--out", str(stopped), "--resume", *SMALL, "--credit", "equal", "--lr", "0.001", "--seed", "3"]
    assert main(argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("comam: ") and "\n" not in err
    for words in ("credit was adaptive, now equal", "lr was 0.0006, now 0.001", "seed was 0, now 3"):
        assert words in err
    assert "steps" not in err and (stopped / "config.json").read_bytes() == before

def test_which_settings_may_differ(tmp_path):
    settings = dict(out="a", resume=False, device=None, device_type="cuda", save_steps=0, micro_batches=1,
                    eval_batch=256,
                    steps=10, credit="adaptive")
    run, said = Run(tmp_path / "run"), []
    run.begin(settings)
    run.check({**settings, "out": "b", "resume": True, "device": "cuda:1", "save_steps": 5, "micro_batches": 2,
               "eval_batch": 4})
    with pytest.raises(CommandError, match="device_type was cuda, now cpu"):
        run.check({**settings, "device_type": "cpu"})
    with pytest.raises(CommandError, match="steps was 10, now 20"): run.check({**settings, "steps": 20})
    run.check({**settings, "a new setting": 1}) # a run of an older version does not have it
    run = Run(tmp_path / "run", said.append)
    data = json.loads((tmp_path / "run" / "config.json").read_text())
    write_json(tmp_path / "run" / "config.json", {**data, "credit": "equal"})
    run.check({**settings, "credit": "equal"})
    assert "edited" in said[0] # the hash of the settings says so
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(CommandError, match="nobody knows what was run"): run.check(settings)

def cut(path): path.write_bytes(path.read_bytes()[:-5])
def empty(path): path.write_bytes(b"")

@pytest.mark.parametrize("damage", [cut, empty, Path.unlink])
@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
                                  "profile/adapter_model.safetensors"])
def test_a_torn_checkpoint_is_passed_over(stopped, name, damage):
    damage(stopped / "checkpoints" / "checkpoint-3" / name)
    said = []
    assert last_checkpoint(stopped / "checkpoints", said.append).name == "checkpoint-2"
    assert len(said) == 1 and "checkpoint-3 is not whole" in said[0] and name.split("/")[0] in said[0]

@pytest.mark.parametrize("torn", [
    {"checkpoints/checkpoint-3/optimizer.pt": cut, "metrics.jsonl": cut, "before.json": cut},
    pytest.param({"checkpoints/checkpoint-3/trainer_state.json": cut, "metrics.jsonl": empty, "before.json": empty},
                 marks=pytest.mark.slow),
    pytest.param({"checkpoints/checkpoint-3/rng_state.pth": Path.unlink, "before.json": Path.unlink},
                 marks=pytest.mark.slow)], ids=["cut", "empty", "missing"])
def test_a_torn_run_goes_on_from_what_is_whole(straight, stopped, torn, capsys):
    for name, damage in torn.items(): damage(stopped / name)
    assert main(["train", "--out", str(stopped), "--save-steps", "1", "--resume", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "checkpoint-3 is not whole" in out
    if torn["before.json"] is not Path.unlink: assert "before.json is not whole" in out
    if torn.get("metrics.jsonl") is empty: # what was lost stays lost, and the rest is as it was
        assert [m["step"] for m in Run(stopped).metrics()] == [3]
        shutil.copy(straight / "metrics.jsonl", stopped)
    same_end(straight, stopped)

@pytest.mark.slow
def test_a_run_without_any_whole_checkpoint_begins_again(straight, stopped, capsys):
    for n in (2, 3): empty(stopped / "checkpoints" / f"checkpoint-{n}" / "scheduler.pt")
    assert main(["train", "--out", str(stopped), "--save-steps", "1", "--resume", *SMALL]) == 0
    assert capsys.readouterr().out.count("is not whole") == 2
    same_end(straight, stopped)

def started(out, ready, how, *argv):
    "Start `comam train`, send a signal when `ready()` is true: exit code and standard error."
    env = {**os.environ, "PYTHONPATH": str(Path(comam_nb.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*PROGRAM, "train", "--out", str(out), *SMALL, *argv], env=env, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as p:
        for _ in range(1200):
            if ready() or p.poll() is not None: break
            time.sleep(.05)
        p.send_signal(how)
        err = p.communicate(timeout=120)[1]
    return p.returncode, err

@pytest.mark.slow
def test_ctrl_c_ends_with_one_line_after_the_step_and_the_run_goes_on(straight, tmp_path):
    out = tmp_path / "run"
    metrics = out / "metrics.jsonl"
    code, err = started(out, lambda: metrics.exists() and metrics.read_bytes().count(b"\n"), signal.SIGINT)
    [line] = [l for l in err.splitlines() if "comam: " in l]
    assert code == 130 and "Traceback" not in err
    assert "stopped after step" in line and "--resume goes on from" in line and "checkpoint-" in line
    assert not (out / "weights").exists()
    assert main(["train", "--out", str(out), "--resume", *SMALL]) == 0
    same_end(straight, out)

@pytest.mark.slow
def test_sigterm_before_the_first_step(tmp_path):
    "While the scores before are taken: there is nothing to save, and the line says where the run would begin."
    out = tmp_path / "run"
    code, err = started(out, (out / "episodes.json").exists, signal.SIGTERM, "--eval-episodes", "3000")
    [line] = [l for l in err.splitlines() if "comam: " in l]
    assert code == 130 and "Traceback" not in err
    assert "--resume goes on from the beginning, because there is no checkpoint yet" in line

def test_what_was_trained_on_is_kept_and_refused(straight, tmp_path, capsys):
    ids = Run(straight).read("episodes.json")
    assert ids["training"] == [f"micro{i}" for i in range(6)] and len(ids["validation"]) == 4
    assert not set(ids["training"]) & set(ids["validation"])
    eval_ = ["eval", "--questions", "2", "--run", str(straight), "--out", str(tmp_path / "eval")]
    assert main(eval_) == 0 # held-out questions of the micro-world
    assert "| comam-straight |" in capsys.readouterr().out

    chat = tmp_path / "chat.jsonl"
    chat.write_text("\n".join(json.dumps({"role": "user", "content": f"I love the drink {x}"}) for x in ("tea",
        "cola")) + "\n")
    tiny = str(Path(comam_nb.__file__).parent / "weights" / "microworld")
    few = ["--backbone", tiny, "--data", f"chat:{chat}", "--max-new-tokens", "8"]
    out = tmp_path / "own"
    assert main(["train", *few, "--steps", "1", "--group-size", "2", "--eval-episodes", "1", "--out", str(out)]) == 0
    capsys.readouterr()
    argv = ["eval", *few, "--system", str(out / "weights"), "--out", str(tmp_path / "never")]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "questions were trained on by" in err and "\n" not in err.strip() and not (tmp_path / "never").exists()
    assert main(["eval", "--run", str(out), "--out", str(tmp_path / "never")]) == 2 # a log of one session
    assert "held nothing back for a test" in capsys.readouterr().err
    assert main([*argv[:-2], "--also-trained", "--out", str(tmp_path / "again")]) == 0
    (out / "episodes.json").unlink()
    assert main([*argv[:-2], "--out", str(tmp_path / "unknown")]) == 0
    assert "nothing says what these weights were trained on" in capsys.readouterr().out

def drinks(path, users=4):
    "A log of some users, three sessions each; every drink is said once."
    names = ("".join(letters) + "ade" for letters in product("bdfgk", "aeiou", "lmnrs"))
    lines = [{"user": f"u{u}", "messages": [{"role": "user", "content": f"I love the drink {next(names)}"}]}
             for u in range(users) for _ in range(3)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return f"chat:{path}"

def test_users_are_kept_apart_from_training_to_the_test(tmp_path, capsys):
    tiny = str(Path(comam_nb.__file__).parent / "weights" / "microworld")
    few = ["--backbone", tiny, "--data", drinks(tmp_path / "chat.jsonl"), "--max-new-tokens", "8"]
    more = ["--steps", "1", "--group-size", "2", "--eval-episodes", "2"]
    out = tmp_path / "run"
    assert main(["train", *few, *more, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "no user is in two of them" in said and "held-out episodes, mean" in said
    ids = Run(out).read("episodes.json")
    users = [{i.split("/")[0] for i in ids[part]} for part in ("training", "validation", "test")]
    assert [len(u) for u in users] == [2, 1, 1] and len(set.union(*users)) == 4
    assert main(["eval", "--run", str(out), "--out", str(tmp_path / "eval")]) == 0
    said = capsys.readouterr().out
    assert f"{len(ids['test'])} questions of 1 users, 1 systems" in said and "| comam-run |" in said

    shared = tmp_path / "shared" # the run says how its team is made
    assert main(["train", *few, *more, "--policy", "shared", "--out", str(shared)]) == 0
    assert main(["eval", "--run", str(shared), "--questions", "1", "--out", str(tmp_path / "eval2")]) == 0
    capsys.readouterr()

    later = tmp_path / "later" # goes on from these weights, with the same users held out
    assert main(["train", *few, *more, "--from", str(out), "--out", str(later)]) == 0
    header = next(l for l in capsys.readouterr().out.splitlines() if "difference" in l)
    assert header.split() == ["base", "before", "after", "difference"]
    assert set(Run(later).read("summary.json")) >= {"base", "before", "after"}
    before, after = (Run(r).read(f) for r, f in ((later, "before.json"), (out, "summary.json")))
    assert sum(before["r_ret"]) / len(before["r_ret"]) == pytest.approx(after["after"]["r_ret"]["mean"])
    capsys.readouterr()

    windows = ["eval", "--windows", "--run", str(later), "--against", str(out / "weights")]
    assert main([*windows, "--out", str(tmp_path / "windows")]) == 0
    said = capsys.readouterr().out
    assert f"{len(ids['test'])} windows, 3 teams" in said and "difference to comam-run |" in said
    assert all(f"| {name} |" in said for name in ("untrained", "comam-run", "comam-later", "dont_know", "question_lm"))
    assert all(f"## {r} " in said for r in ("r_cons_f", "r_cons_c", "r_ret"))
    teams, _ = read_scores(tmp_path / "windows" / "scores.csv")
    assert {len(rows) for rows in teams.values()} == {len(ids["test"])}
    assert all(r["session"] for r in teams["untrained"])
    assert main([*windows, "--out", str(tmp_path / "windows")]) == 0 # nobody is asked twice
    assert "untrained: " not in capsys.readouterr().out
    twice = ["--system", str(out), str(out / "weights")]
    for bad, why in ((["--system", "rag"], "asks teams: 'rag'"), (["--against", "zoe"], "--against zoe"),
                     (twice, "two systems would be called comam-run")):
        assert main([*windows[:-2], *bad, "--out", str(tmp_path / "none")]) == 2 and why in capsys.readouterr().err
    assert main(["eval", "--windows", "--system", str(out / "weights")]) == 2
    assert "--windows goes with --run" in capsys.readouterr().err
    held = next(iter(users[0]))
    bad = ["train", *few, *more, "--from", str(out), "--test-users", held, "--out", str(tmp_path / "never")]
    assert main(bad) == 2 and "were trained on by" in capsys.readouterr().err and not (tmp_path / "never").exists()
    assert main([*bad[:-4], "--test-users", "zoe", *bad[-2:]]) == 2
    assert "no such user: zoe; the users are u0" in capsys.readouterr().err
    assert main(["train", *few, *more, "--from", str(tmp_path / "none"), *bad[-2:]]) == 2
    assert "no such directory" in capsys.readouterr().err

def test_a_run_that_goes_on_gets_the_episodes_that_it_had(tmp_path):
    episodes = [Episode((Session("s", (Message("user", "tea", 1),)),), Query("?"), answer="tea", id=i) for i in "abc"]
    run = Run(tmp_path / "run")
    run.begin({})
    run.keep_episodes(episodes[:2])
    with pytest.raises(CommandError, match="other training episodes"): run.keep_episodes(episodes)

@pytest.mark.parametrize("flag", [("--dtype", "bfloat16"), ("--context", "100"), ("--prompts", "few-shot"),
                                  ("--max-new-tokens", "5"), ("--max-prompt-tokens", "9")])
def test_an_argument_that_reaches_nobody_is_refused(flag, tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path / "x"), *SMALL, *flag]) == 2
    assert f"{flag[0]} goes with other --data" in capsys.readouterr().err
    if flag[0] != "--max-prompt-tokens":
        assert main(["eval", "--system", "rag", "--out", str(tmp_path / "x"), *flag]) == 2
        assert f"{flag[0]} goes with other --data" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()

def test_a_long_chat_template_is_measured():
    "100 tokens around every prompt: with the 64 that were assumed once, the shortened prompt did not fit."
    from comam_nb.lm.backbone import prompt_ids
    from comam_nb.mdp import MemoryMDP
    from comam_nb.microworld import MicroWorld
    from comam_nb.runs.sources import fit_episodes
    from comam_nb.worlds.warm_start import micro_agents
    agents = micro_agents(MicroWorld())
    agent = agents["extraction"]
    agent.policy.tokenizer.chat_template = "{{ 'tea ' * 100 }}{{ messages[0]['content'] }}"
    turns = tuple(Message("user", "I love the drink tea", t) for t in range(1, 201))
    [e] = fit_episodes([Episode((Session("s", turns),), Query("?"), answer="tea", evidence={100})], agents)
    prompt = agent.prompt(MemoryMDP(e).reset())
    assert 1 < len(e.turns) < 200 and prompt_ids(agent.policy, prompt, reserve=agent.max_new_tokens)

def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_whole(tmp_path / "x.txt", "old")
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MemCollabError, match="No space left on device"): write_whole(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.txt"]
