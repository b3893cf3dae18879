"""What sampling with random numbers of one's own (`sampling="per_group"`) costs, against torch's stream.

    python benchmarks/own_draws.py

Both are trained in the micro-world for a few steps, in turns, in one process on one thread.
The first step of a run is not counted. About two minutes.
"""
import argparse, os, platform, statistics, tempfile, time, warnings
warnings.filterwarnings("ignore")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
import torch, transformers, trl
from transformers import TrainerCallback
from comam_nb.microworld import MicroWorld, make_episodes
from comam_nb.worlds.warm_start import micro_agents, micro_rewards
from comam_nb.rl.settings import CoMAMConfig
from comam_nb.training import CoMAMTrainer

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for flag, value in (("--rounds", 6), ("--steps", 8), ("--episodes-per-step", 16), ("--group-size", 8)):
    p.add_argument(flag, type=int, default=value)
args = p.parse_args()
from machine import about # noqa: E402
print(about(), flush=True)
torch.set_num_threads(1); transformers.utils.logging.disable_progress_bar()
world = MicroWorld()

class Clock(TrainerCallback):
    "Seconds of each step."
    def __init__(self): self.seconds = []
    def on_step_begin(self, *a, **k): self.start = time.perf_counter()
    def on_step_end(self, *a, **k): self.seconds.append(time.perf_counter() - self.start)

def seconds(sampling):
    "Of the steps of one run, the first aside."
    with tempfile.TemporaryDirectory() as folder:
        config = CoMAMConfig(folder, max_steps=args.steps, episodes_per_step=args.episodes_per_step,
                             num_generations=args.group_size, learning_rate=6e-4,
                             use_cpu=True, disable_tqdm=True, sampling=sampling)
        episodes = make_episodes(world, args.steps * args.episodes_per_step)
        CoMAMTrainer(micro_agents(world), episodes, micro_rewards(world), config, callbacks=[clock := Clock()]).train()
    return clock.seconds[1:]

print(f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}, Python "
      f"{platform.python_version()}, one thread; {vars(args)}")
all_seconds = {"stream": [], "per_group": []}
for r in range(args.rounds):
    for sampling in (("stream", "per_group") if r % 2 else ("per_group", "stream")):
        all_seconds[sampling] += seconds(sampling)
median = {k: statistics.median(v) for k, v in all_seconds.items()}
for k, v in median.items(): print(f"{k:9} {v:.3f} s a step, the median of {len(all_seconds[k])}")
print(f"draws of one's own vs torch's stream: {median['per_group'] / median['stream']:.2f}x the time")
