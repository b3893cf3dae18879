"One process, two and four: the same texts, losses and weights. A killed process ends the run with one line."
import json, os, shutil, signal, subprocess, sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
STEPS = ["--steps", "3", "--episodes-per-step", "4", "--group-size", "4", "--eval-episodes", "4", "--sampling",
         "per_group", "--device", "cpu"]

# What a user starts is `comam`. This is `comam`: with AdamW, with plain SGD and priorities, and with faults on demand.
PROGRAM = '''
import os, signal, sys, time
from transformers import Trainer, TrainerState
from comam_nb import training
from comam_nb.rl.sampler import PrioritySampler

class Faulty(training.CoMAMTrainer):
    def __init__(self, team, episodes, rewards, args, **kwargs):
        args.optim = os.environ.get("OPTIM", args.optim)
        if os.environ.get("PRIORITIES"): kwargs["sampler"] = PrioritySampler(len(episodes))
        super().__init__(team, episodes, rewards, args, **kwargs)
    def _rollout(self, labels, trainer):
        dies = os.environ.get("DIES") == f"{self.accelerator.process_index}"
        if dies and self.state.global_step == 2: os.kill(os.getpid(), signal.SIGKILL)
        return super()._rollout(labels, trainer)
training.CoMAMTrainer = Faulty
from comam_nb.cli.__main__ import main

write, save = TrainerState.save_to_json, Trainer._save_rng_state
def write_slowly(self, path): # the first process is at a checkpoint's last file, the second would be a step ahead
    if os.environ.get("DIES") == "1": time.sleep(3)
    write(self, path)
def save_or_die(self, folder): # the first would be done with the checkpoint while the second has yet to write its part
    dies = os.environ.get("DIES") == "1 while it saves" and self.accelerator.process_index == 1
    if dies and self.state.global_step == 2:
        time.sleep(3)
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)
TrainerState.save_to_json, Trainer._save_rng_state = write_slowly, save_or_die

if os.environ.get("FSDP_ON_CPU"): # Accelerate shares weights out on accelerators only; PyTorch can do it on any device
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    init = PartialState.__init__
    def as_if_on_cards(self, cpu=False, **kwargs):
        init(self, cpu, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU: self.distributed_type = DistributedType.MULTI_GPU
    PartialState.__init__ = as_if_on_cards

out, *argv = sys.argv[1:]
code = main(["train", "--out", f"{out}/adamw", *argv])
if code == 0 and os.environ.get("SGD"):
    os.environ.update(OPTIM="sgd", PRIORITIES="1")
    code = main(["train", "--out", f"{out}/sgd", *argv, "--lr", "1"])
sys.exit(code)
'''

@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    "launch(out, processes, *argv, config=…, **env): what ended; killed after four minutes, gloo waits thirty."
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo, with which processes on a CPU talk to each other")
    program = tmp_path_factory.mktemp("program") / "program.py"
    program.write_text(PROGRAM)
    def run(out, processes, *argv, config="cpu_2", **env):
        start = [] if processes == 1 else ["-m", "accelerate.commands.launch", "--config_file",
                                           str(ROOT / "configs" / f"{config}.yaml"), "--num_processes", str(processes),
                                           "--num_machines", "1", "--main_process_port", "0"]
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR",
            "MASTER_PORT") and not k.startswith("ACCELERATE_")}
        clean.update(env, OMP_NUM_THREADS="1",
                     PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        with subprocess.Popen([sys.executable, *start, str(program), str(out), *STEPS, *argv], env=clean,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as p:
            try: said, errors = p.communicate(timeout=240)
            except subprocess.TimeoutExpired: os.killpg(p.pid, signal.SIGKILL); raise # the launcher's children too
        return subprocess.CompletedProcess(p.args, p.returncode, said, errors)
    return run

@pytest.fixture(scope="module")
def alone(launch, tmp_path_factory):
    "One process, unbroken."
    out = tmp_path_factory.mktemp("alone")
    done = launch(out, 1, SGD="1")
    assert done.returncode == 0, done.stderr
    return out

def weights(run):
    return {f"{f.parent.name}.{k}": v for f in sorted((run / "weights").rglob("*.safetensors")) for k,
            v in load_file(f).items()}
def log(run): return [json.loads(l) for l in (run / "metrics.jsonl").read_text().splitlines()]

def assert_same_log(a, b):
    "Every number of every step: losses, gradients' norms, rewards, shares, lengths, entropies."
    assert [l["step"] for l in log(a)] == [l["step"] for l in log(b)] == [1, 2, 3]
    for x, y in zip(log(a), log(b)):
        assert x.keys() == y.keys() and {"loss", "grad_norm", "w_profile", "r_ret", "advantage_std_extraction",
                                         "malformed_retrieval", "cut_off"} <= x.keys()
        for k in x.keys() - {"seconds", "step_time"}:
            assert y[k] == pytest.approx(x[k], rel=1e-5, abs=1e-5), (x["step"], k)

def assert_same_weights(a, b):
    "AdamW divides a gradient by its own size, so an entry that is all rounding moves too: a handful may differ."
    x, y = weights(a), weights(b)
    apart = torch.cat([(x[k] - y[k]).abs().flatten() for k in x])
    print(f"{(apart > 1e-5).sum()} of {len(apart):,} weights are more than 1e-5 apart, at most {apart.max():.1e}")
    assert x.keys() == y.keys() and (apart > 1e-5).sum() <= 10 and apart.max() < 3 * 6e-4

@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_n_processes_are_one(launch, alone, tmp_path, processes):
    done = launch(tmp_path, processes, SGD="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training episodes") == 2 # only the first process speaks
    for optimizer in ("adamw", "sgd"): assert_same_log(alone / optimizer, tmp_path / optimizer)
    assert_same_weights(alone / "adamw", tmp_path / "adamw")
    x, y = weights(alone / "sgd"), weights(tmp_path / "sgd")
    assert all((x[k] - y[k]).abs().max() < 1e-5 for k in x)
    assert max(v.abs().max() for k, v in x.items() if "lora_B" in k) > 1e-2 # from zero: something was learned

@pytest.mark.slow
@pytest.mark.parametrize("dies, last", [("0", 2), ("1", 2), ("1 while it saves", 1)])
def test_a_killed_process_ends_the_run_and_the_run_goes_on(launch, alone, tmp_path, dies, last):
    "A checkpoint counts from when every process has written its part, and no process goes on before that."
    done = launch(tmp_path, 2, "--save-steps", "1", DIES=dies)
    assert done.returncode != 0
    [line] = [l for l in done.stderr.splitlines() if "comam: " in l]
    for words in (f"process {1 - int(dies[0])} of 2 stops in step 3", "another process", f"checkpoint-{last}",
                  "--resume"):
        assert words in line, line
    assert "SIGKILL" in done.stderr # the launcher says which process it was
    if dies == "0": return
    shutil.copytree(tmp_path / "adamw", tmp_path / "fewer" / "adamw")
    for out, processes in ((tmp_path, 2), (tmp_path / "fewer", 1)): # as many as before, and fewer
        done = launch(out, processes, "--save-steps", "1", "--resume")
        assert done.returncode == 0, done.stderr
        assert_same_log(alone / "adamw", out / "adamw")
        assert_same_weights(alone / "adamw", out / "adamw")

@pytest.mark.slow
def test_weights_that_are_shared_out(launch, alone, tmp_path):
    "FSDP 2: each of two processes holds half of every layer."
    done = launch(tmp_path, 2, "--save-steps", "2", config="multinode_fsdp", FSDP_ON_CPU="1")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "adamw" / "checkpoints").rglob("*.distcp")) # shared out indeed
    assert_same_log(alone / "adamw", tmp_path / "adamw")
    assert_same_weights(alone / "adamw", tmp_path / "adamw")

@pytest.mark.slow
def test_a_run_with_shared_out_weights_is_not_resumed_wrongly(launch, tmp_path):
    "Accelerate's checkpoint holds the active adapter only: going on from it would be another run."
    done = launch(tmp_path, 2, "--steps", "1", "--save-steps", "1", config="multinode_fsdp", FSDP_ON_CPU="1")
    assert done.returncode == 0, done.stderr
    done = launch(tmp_path, 2, "--steps", "1", "--resume", config="multinode_fsdp", FSDP_ON_CPU="1")
    assert done.returncode != 0 and "comam: " in done.stderr and "cannot be resumed" in done.stderr

@pytest.mark.slow
def test_bad_input_is_one_line(launch, tmp_path):
    done = launch(tmp_path, 2, "--episodes-per-step", "3")
    assert done.returncode != 0
    [line] = [l for l in done.stderr.splitlines() if l.startswith("comam: ")]
    assert "3 episodes per step do not divide over 2 processes" in line

def test_configs_are_what_accelerate_reads():
    "Parsed by Accelerate itself; the head of each says how to start it, what was run and what was not."
    from accelerate.commands.config.config_args import load_config_from_file
    read = {p.stem: load_config_from_file(str(p)) for p in CONFIGS}
    assert {n: c.num_processes for n, c in read.items()} == {"cpu_2": 2, "gpu_1": 1, "gpu_2": 2, "gpu_8": 8,
        "multinode_fsdp": 16, "deepspeed_zero2": 8}
    assert read["multinode_fsdp"].num_machines == 2 and read["multinode_fsdp"].fsdp_config["fsdp_version"] == 2
    assert read["deepspeed_zero2"].deepspeed_config["zero_stage"] == 2
    table = (ROOT / "configs" / "README.md").read_text()
    for p in CONFIGS:
        head = "".join(l for l in p.read_text().splitlines(keepends=True) if l.startswith("#"))
        told = f"accelerate launch --config_file configs/{p.name}", "Was run:", "Was not run:"
        assert all(t in head for t in told), p
        assert p.name in table
