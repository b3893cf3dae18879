"""MemCollab end to end with a real model: SmolLM2-135M under two prompts, 20 GSM8K and 10 MBPP tasks, killed once and
resumed, through the command line. `pytest -m slow` runs it (about ten minutes on one core); with -s it prints the
figures, with COMAM_REAL_OUT=DIR it keeps the files. A model of this size is mostly wrong. What is tested is that the
pipeline goes through, repeats nothing, loses nothing, and counts honestly."""
import json, os, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path

import pytest

from comam_nb.memcollab.solving import load_attempts

pytestmark = pytest.mark.slow # minutes with a 135M model
ROOT = Path(__file__).resolve().parents[1]
MAIN = "from comam_nb.cli.memcollab import main; raise SystemExit(main())"
ROLES = ["--system", "weak", "You are a careful tutor. Write one short line for each step.", "--system", "strong",
         "Answer with the result only."]


def memcollab(*argv):
    env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "-c", MAIN, *map(str, argv)], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)

def finish(process):
    out, err = process.communicate(timeout=3000)
    print(out, flush=True)
    assert process.returncode == 0, err[-2000:]
    return out

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = Path(os.environ.get("COMAM_REAL_OUT") or tmp_path_factory.mktemp("real"))
    path.mkdir(parents=True, exist_ok=True)
    return path

def build(folder, smollm2, tasks, path, limit):
    return ["build", "--bank", folder / "bank.db", "--tasks", tasks, "--path", path, "--limit", limit, "--weak",
            f"cot:{smollm2}", "--strong", f"plain:{smollm2}", *ROLES,
            "--max-tokens", 96, "--distill-tokens", 96, "--batch-size", 10, "--quiet", "--report",
            folder / f"{tasks}.json"]


def test_gsm8k_killed_once_and_resumed(shared, smollm2, folder):
    command, log = build(folder, smollm2, "gsm8k", shared / "gsm8k" / "train.jsonl",
                         20), folder / "bank.trajectories.jsonl"
    first = memcollab(*command)
    while first.poll() is None and not (log.exists() and b"\n" in log.read_bytes()): time.sleep(0.5)
    time.sleep(2) # in the middle of the next batch
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = log.read_bytes()
    before = load_attempts(log)
    print(f"killed after {len(before)} of 40 attempts")
    assert 0 < len(before) < 40 and not (folder / "bank.db").exists()
    out = finish(memcollab(*command))
    assert f"holds {len(before)} attempts at these tasks already" in out
    after = load_attempts(log)
    assert len(after) == 40 and set(Counter(t.key for t in after).values()) == {1}
    assert log.read_bytes().startswith(kept[:kept.rfind(b"\n") + 1])
    report = json.loads((folder / "gsm8k.json").read_text())
    assert [s["attempts"] for s in report["solvers"].values()] == [20, 20] and sum(s["right"]
        for s in report["solvers"].values()) == sum(t.right for t in after)


def test_mbpp_into_the_same_bank(shared, smollm2, folder):
    out = finish(memcollab(*build(folder, smollm2, "mbpp", shared / "mbpp" / "sanitized-mbpp.json", 10)))
    assert "10 tasks" in out and len(load_attempts(folder / "bank.trajectories.jsonl")) == 60
    again = finish(memcollab(*build(folder, smollm2, "mbpp", shared / "mbpp" / "sanitized-mbpp.json", 10)))
    assert "\n0 replies about them are new" in again and "\n0 entries are new" in again


@pytest.mark.parametrize("tasks,path,limit", [("gsm8k", "gsm8k/train.jsonl", 20), ("mbpp", "mbpp/sanitized-mbpp.json",
    10)])
def test_the_papers_own_pairs_from_the_same_attempts(shared, smollm2, folder, tasks, path, limit):
    "Eq. 2 as printed prefers the strong attempt even if both are wrong, so that there is something to contrast."
    command = build(folder, smollm2, tasks, shared / path, limit) + ["--policy", "paper", "--trajectories",
        folder / "bank.trajectories.jsonl", "--report", folder / f"{tasks}-paper.json"]
    command[2] = folder / "paper.db"
    out = finish(memcollab(*command))
    report = json.loads((folder / f"{tasks}-paper.json").read_text())
    assert f"\n{limit} pairs" in out and len(load_attempts(folder / "bank.trajectories.jsonl")) == 60
    assert report["calls"] == limit and report["failed"] == 0
    # every reply gives a lesson or a refusal with its reason
    assert len(report["constraints"]) + len(report["rejected"]) >= limit


@pytest.mark.parametrize("tasks,path,limit", [("gsm8k", "gsm8k/test_first660.jsonl", 8),
                                              ("mbpp", "mbpp/sanitized-mbpp.json", 8)])
def test_evaluation_on_other_tasks(shared, smollm2, folder, tasks, path, limit):
    out = finish(memcollab("eval", "--bank", folder / "paper.db", "--agent", f"plain:{smollm2}", "--system", "agent",
                           ROLES[-1], "--tasks", tasks, "--path", shared / path, "--limit", limit,
                           "--max-tokens", 96, "--batch-size", 8, "--quiet", "--report", folder / f"eval-{tasks}.json"))
    outcomes = json.loads((folder / f"eval-{tasks}.json").read_text())["outcomes"]
    assert {arm: sum(o["arm"] == arm for o in outcomes) for arm in ("vanilla", "memcollab", "no_category",
        "placebo")} == dict.fromkeys(("vanilla", "memcollab", "no_category", "placebo"), limit)
    assert f"{limit} tasks, 1 seed" in out
