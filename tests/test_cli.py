"The command line as a user meets it: whole runs, and one clear line with exit code 2 for everything that cannot work."
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from comam_nb.agents import Action, Note
from comam_nb.cli.__main__ import main

SMALL = ["--steps", "2", "--episodes-per-step", "2", "--group-size", "4", "--eval-episodes", "6"]

def fails(capsys, argv, *words):
    "main(argv) prints one line that holds all words, and returns 2."
    assert main(argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("comam: ") and "\n" not in err
    for w in words: assert w in err, err

@pytest.fixture
def chat(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps([{"role": "user", "content": "I love the drink tea"},
                                {"role": "assistant", "content": "Noted"}]) + "\n")
    return path

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "The micro-world's own model as a directory that any command takes for a language model."
    import comam_nb
    return str(Path(comam_nb.__file__).parent / "weights" / "microworld")

def test_train_writes_everything(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), *SMALL]) == 0
    assert "answer_accuracy" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    for when in ("before", "after"):
        for metric in ("answer_accuracy", "r_cons_f", "r_cons_c", "r_ret"):
            m = summary[when][metric]
            assert 0 <= m["low"] <= m["mean"] <= m["high"] <= 1
    assert (summary["steps"], summary["seed"]) == (2, 0) and summary["seconds"] > 0 and "torch" in summary["versions"]
    assert json.loads((out / "config.json").read_text())["credit"] == "adaptive"
    lines = [json.loads(l) for l in (out / "metrics.jsonl").read_text().splitlines()]
    assert [l["step"] for l in lines] == [1, 2]
    for key in ("r_cons_f", "r_cons_c", "r_ret", "answer_accuracy", "w_extraction", "w_profile", "w_retrieval",
                "advantage_std_profile", "frac_reward_zero_std", "entropy", "seconds"):
        assert key in lines[0], key
    assert abs(sum(lines[0][f"w_{a}"] for a in ("extraction", "profile", "retrieval")) - 1) < 1e-6
    for name in ("rewards.png", "weights.png"): assert (out / name).read_bytes().startswith(b"\x89PNG")
    for a in ("extraction", "profile", "retrieval"):
        assert load_file(str(out / "weights" / a / "adapter_model.safetensors"))

@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(tmp_path):
    for name in "ab": main(["train", "--out", str(tmp_path / name), *SMALL, "--seed", "7"])
    a, b = (load_file(str(tmp_path / n / "weights" / "retrieval" / "adapter_model.safetensors")) for n in "ab")
    assert all((a[k] == b[k]).all() for k in a)

@pytest.mark.slow
def test_another_engine_writes_the_same_run(tmp_path):
    for name in ("own", "continuous"):
        assert main(["train", "--out", str(tmp_path / name), *SMALL, "--sampling", "per_group", "--engine", name]) == 0
    a, b = (load_file(str(tmp_path / n / "weights" / "retrieval" / "adapter_model.safetensors"))
            for n in ("own", "continuous"))
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a) and any(v.any() for v in a.values())
    a, b = ((tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("own", "continuous"))
    for x, y in zip(map(json.loads, a), map(json.loads, b)): assert x["answer_accuracy"] == y["answer_accuracy"]

@pytest.mark.parametrize("policy", [pytest.param("shared", marks=pytest.mark.slow), "separate"]) # test_run: shared
def test_policy_modes(tmp_path, policy):
    assert main(["train", "--out", str(tmp_path / "run"), "--policy", policy, *SMALL]) == 0
    assert list((tmp_path / "run" / "weights").rglob("*.safetensors"))

def test_own_model_on_a_chat_log(tmp_path, chat, tiny, capsys):
    assert main(["train", "--backbone", tiny, "--data", f"chat:{chat}", "--steps", "1", "--group-size", "2",
                 "--max-new-tokens", "12", "--eval-episodes", "1", "--out", str(tmp_path / "run")]) == 0
    assert main(["answer", "--backbone", tiny, "--history", str(chat), "--query", "What is my favourite drink?",
                 "--max-new-tokens", "12",
                 "--adapters", str(tmp_path / "run" / "weights"), "--memory", str(tmp_path / "memory.db")]) == 0
    out = capsys.readouterr().out
    for words in ("fine-grained memory", "coarse-grained memory", "retrieved", "answer:", "tokens read"):
        assert words in out
    assert (tmp_path / "memory.db").exists()

def test_a_judge_on_the_base_leaves_every_adapter_to_the_optimizer(tmp_path, chat, tiny):
    "Scores before training put rubric questions to the base; PEFT then leaves only the active adapter trainable."
    from comam_nb.cli.__main__ import _parser
    from comam_nb.cli.train import _build_team, _fill_defaults, _joint_config
    from comam_nb.rl.evaluation import evaluate
    from comam_nb.training import CoMAMTrainer
    args = _parser().parse_args(["train", "--backbone", tiny, "--data", f"chat:{chat}", "--steps", "1", "--group-size",
                                "2", "--max-new-tokens", "12", "--eval-episodes", "1"])
    _fill_defaults(args)
    agents, split, rewards = _build_team(args)
    trainer = CoMAMTrainer(agents, split.training, rewards, _joint_config(args, tmp_path))
    for a in agents.values(): # somebody must write a valid line, or the judge is not asked
        a.parse = lambda text, state, name=a.name: Action((Note("a line", (1,)),), frozenset({1}), "tea")
    evaluate(agents, split.training[:1], rewards)
    chosen = {id(p) for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert {k for k, p in trainer.model.named_parameters() if id(p) in chosen} == {k for k,
        p in trainer.model.named_parameters() if ".lora_" in k}

def test_bad_input(tmp_path, chat, tiny, capsys):
    full = tmp_path / "full"; full.mkdir(); (full / "x").touch()
    empty = tmp_path / "empty.jsonl"; empty.write_text("")
    broken = tmp_path / "broken.json"; broken.write_text("[{")
    kind = tmp_path / "chat.pdf"; kind.write_text("x")
    out = ["--out", str(tmp_path / "new")]
    fails(capsys, ["train", "--out", str(full)], "not empty", "--resume")
    fails(capsys, ["train", "--resume", *out], "no run to resume")
    fails(capsys, ["train", "--group-size", "1", *out], "group size 1")
    fails(capsys, ["train", "--credit", "clever", *out], "clever", "adaptive")
    fails(capsys, ["train", "--rule", "eq99", *out], "eq99")
    fails(capsys, ["train", "--policy", "alone", *out], "unknown policy mode")
    fails(capsys, ["train", "--steps", "0", *out], "--steps must be at least 1")
    fails(capsys, ["train", "--temperature", "0", *out], "--temperature must be above 0")
    fails(capsys, ["train", "--data", "tweets:x", "--backbone", tiny, *out], "unknown data")
    fails(capsys, ["train", "--data", f"chat:{chat}", *out], "--backbone")
    fails(capsys, ["train", "--data", f"chat:{empty}", "--backbone", tiny, *out], "empty.jsonl")
    ask = ["answer", "--query", "Who?", "--backbone"]
    fails(capsys, [*ask, tiny, "--history", str(broken)], "broken.json", "line 1")
    fails(capsys, [*ask, tiny, "--history", str(kind)], "chat.pdf")
    fails(capsys, [*ask, tiny, "--history", str(empty)], "empty.jsonl")
    fails(capsys, [*ask, tiny, "--history", str(tmp_path / "none.json")], "none.json")
    fails(capsys, [*ask, tiny, "--history", f"locomo:{empty}"], "empty.jsonl")
    fails(capsys, [*ask, str(full), "--history", str(chat)], "holds no model")
    fails(capsys, [*ask, tiny, "--history", str(chat), "--options", "one"], "--options")
    fails(capsys, ["answer", "--query", " ", "--backbone", tiny, "--history", str(chat)], "query is empty")
    fails(capsys, [*ask, tiny, "--history", str(chat), "--adapters", str(full)], "no such file")
    assert not (tmp_path / "new").exists() # nothing half-written

def test_a_history_longer_than_the_context_is_split_and_nothing_is_lost(tmp_path, tiny, capsys):
    "The tiny model reads 512 tokens; this session has about 900."
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps([{"role": "user",
                                 "content": "I love the drink tea and the food ramen and the music jazz"}
                                for _ in range(60)]))
    assert main(["answer", "--backbone", tiny, "--history", str(path), "--query", "What is my favourite drink?",
                 "--max-new-tokens", "8"]) == 0
    assert "session 1 of 1: 60 turns in 3 pieces" in capsys.readouterr().out
    long = tmp_path / "huge.jsonl"
    long.write_text(json.dumps([{"role": "user", "content": "tea " * 3000}]))
    fails(capsys, ["answer", "--backbone", tiny, "--history", str(long), "--query", "?"], "turn 1", "longer context")

def test_eval_compares_systems_and_goes_on_where_it_was(tmp_path, capsys):
    "A named system, one with trained weights, and the rows without memory; the second call asks nothing again."
    out, argv = tmp_path / "eval", ["--questions", "6", "--system", "rag", "comam"]
    assert main(["eval", *argv, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert (out / "report.md").read_text() in text
    for row in ("| rag |", "| comam |", "| dont_know |", "| question_lm |", "## Cost for each question"):
        assert row in text, row
    before = {p.name: p.read_bytes() for p in out.glob("*.jsonl")}
    assert main(["eval", *argv, "--out", str(out)]) == 0
    assert before == {p.name: p.read_bytes() for p in out.glob("*.jsonl")}
    fails(capsys, ["eval", "--questions", "6", "--system", "rag", "--seed", "1", "--out", str(out)], "another settings")

def test_eval_on_a_chat_log_with_an_own_model(tmp_path, tiny, capsys):
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"role": "user", "content": f"I love the drink {x}"}) for x in ("tea",
        "cola")) + "\n")
    assert main(["eval", "--backbone", tiny, "--data", f"chat:{path}", "--system", "base", "mem1", "--max-new-tokens",
                 "12", "--out", str(tmp_path / "eval")]) == 0
    assert "| mem1 |" in capsys.readouterr().out

def test_eval_bad_input(tmp_path, tiny, chat, capsys):
    out = ["--out", str(tmp_path / "new")]
    fails(capsys, ["eval", "--system", "telepathy", *out], "unknown system 'telepathy'", "memorybank")
    fails(capsys, ["eval", "--system", "rag", "rag", *out], "named twice")
    fails(capsys, ["eval", "--system", "rag", "--questions", "0", *out], "--questions must be at least 1")
    fails(capsys, ["eval", "--system", "rag", "--against", "cam", *out], "--against")
    fails(capsys, ["eval", "--system", "rag", "--data", f"chat:{chat}", *out], "--backbone")
    fails(capsys, ["eval", "--system", "rag", "--dtype", "float32", *out], "--dtype goes with other --data")
    fails(capsys, ["eval", *out], "name what to ask, with --system or --run")
    fails(capsys, ["eval", "--run", str(tmp_path / "none"), *out], "no training run")
    fails(capsys, ["eval", "--system", "rag", "--data", "tweets:x", "--backbone", tiny, *out], "unknown data")
    fails(capsys, ["eval", "--system", "rag", "--data", f"chat:{chat}", "--backbone", tiny, "--user", "nobody", *out],
          "no question with a right answer")
    fails(capsys, ["eval", "--system", str(tmp_path), *out], "no such file")
    assert not (tmp_path / "new").exists()
