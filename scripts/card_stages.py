"""The stages of scripts/on_a_card.py: each a function of its settings that yields parts of its result as they come.

Settings are those of the command, and device, dtype, run (the folder of the real run) and limit, the stage's seconds.
"""
import argparse, gc, json, shutil, statistics, tempfile, time, traceback
from pathlib import Path

MOST_ADAPTERS = 16 * 10**6 # bytes
SHAPES = { # as their config.json has them; Qwen's without the biases
    "SmolLM2-135M": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                         num_attention_heads=9, num_key_value_heads=3, rope_theta=1e5),
    "Qwen2.5-0.5B": dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                         num_attention_heads=14, num_key_value_heads=2, rope_theta=1e6)}
TOY = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
           vocab_size=41000) # joint_step.py's prompts have words up to 40,000

def place():
    "Device and number type: bfloat16 where the card has it itself. A T4 has not, and computes in float32."
    import torch
    if not torch.cuda.is_available(): return "cpu", "float32"
    return "cuda", "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"

def wait(device):
    import torch
    if device == "cuda": torch.cuda.synchronize()

def seconds_of(work, device, times=1):
    "Of one call, after one that is not counted."
    work(); wait(device)
    start = time.perf_counter()
    for _ in range(times): work()
    wait(device)
    return (time.perf_counter() - start) / times

def random_tokens(n, length, seed=0, most=900):
    import random
    rng = random.Random(seed)
    return [[rng.randrange(3, most) for _ in range(length)] for _ in range(n)]

def words(vocabulary):
    "A tokenizer with a word for every id."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    ids = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, vocabulary))])}
    tok = Tokenizer(models.WordLevel(ids, unk_token="<unk>")); tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                   padding_side="left")

def shaped(a, shape):
    "A model of that shape with random weights; two narrow layers where it is dry."
    import torch, transformers
    size = {**SHAPES[shape], **(TOY if a.dry else {})}
    config = transformers.LlamaConfig(**size, max_position_embeddings=8192, tie_word_embeddings=True,
                                      bos_token_id=None, eos_token_id=1, pad_token_id=0)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, a.dtype))
    return model, words(config.vocab_size)

def out_of_memory(e): return "OutOfMemory" in type(e).__name__ or "out of memory" in str(e).lower()

def tried(name, work, lower):
    "What one of several found, or its traceback, so that the others go on."
    try: found = work()
    except Exception as e:
        found = {"error": traceback.format_exc()}
        if out_of_memory(e): found["lower"] = lower
    gc.collect()
    return {name: found}


# ---- stages: (settings) -> parts of the result, one after the other

def equality(a):
    "Five families, tiny, random, float32: shared prefix against naive, and greedy texts against `generate`."
    import torch, transformers
    from comam_nb.lm.backbone import Backbone
    from comam_nb.lm.decoding import sample_rows
    from comam_nb.lm.lora import add_adapters
    from comam_nb.lm.scoring import shared_logprobs, token_logprobs
    size = dict(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                bos_token_id=None, eos_token_id=1, pad_token_id=0, initializer_range=0.3, max_position_embeddings=512)
    few = dict(num_key_value_heads=2)
    window = dict(head_dim=16, sliding_window=64, layer_types=["sliding_attention", "full_attention"])
    families = {"Llama": ("LlamaConfig", few), "Qwen2": ("Qwen2Config", few), "GPT-NeoX": ("GPTNeoXConfig", {}),
                "Qwen3": ("Qwen3Config", dict(head_dim=16, **few)), "Gemma 3": ("Gemma3TextConfig", {**few, **window})}
    def compared(kind, more, length):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**size, **more}))
        model = add_adapters(model.float().to(a.device).eval(), ["extraction"])
        for k, p in model.named_parameters():
            if "lora_B" in k: torch.nn.init.normal_(p, 0, 0.1)
        policy = Backbone(model, words(1000), ("extraction",))
        rows = [r[:length - 3 * i] for i, r in enumerate(random_tokens(3, length))]
        prompts, wrote = [r for r in rows for _ in range(4)], random_tokens(12, 8, seed=1)
        parameters = [p for p in model.parameters() if p.requires_grad]
        naive, shared = (x[0] for x in (token_logprobs(policy, prompts, wrote, "extraction"),
                                        shared_logprobs(model, prompts, wrote)))
        grads = [torch.cat([g.flatten() for g in torch.autograd.grad(x.sum(), parameters)]) for x in (naive, shared)]
        far = lambda x, y: float((x - y).abs().max() / x.abs().max())
        said = [sample_rows(policy, rows, 2, "extraction", temperature=0.0, max_new_tokens=12, shared_prefix=s)
                for s in (True, False)]
        equal = sum(x.ids == y.ids for gs in zip(*said) for x, y in zip(*gs))
        return dict(logprobs=far(naive.detach(), shared.detach()), gradients=far(*grads), greedy=equal, of=6)
    for name, (kind, more) in families.items(): yield tried(name, lambda: compared(kind, more, 32), "nothing")
    yield tried("Gemma 3, prompts longer than its window", lambda: compared(*families["Gemma 3"], 100), "nothing")

def _kernels(work, device):
    "Kernels that a call ran, and how often Python started something; counted on a CPU by benchmarks/launches.py."
    if device == "cpu":
        from launches import count
        return {"kernels": count(work).counts["kernels"]}
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen: work(); wait(device)
    names = [(e.name, str(e.device_type)) for e in seen.events()]
    return {"kernels": sum("CUDA" in d and not n.startswith(("Memcpy", "Memset")) for n, d in names),
            "launches": sum(n in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cudaGraphLaunch")
                            for n, _ in names)}

def room(a):
    "How much memory continuous batching lays out: half of the card's, as TRL has it, or little."
    if a.dry: return dict(num_blocks=16, max_batch_tokens=256, max_memory_percent=0.1)
    return dict(max_memory_percent=0.5 if a.device == "cuda" else 0.02)

def writers(a, policy):
    "name -> callable(rows, tokens): every engine that runs here, or the reason why it does not."
    from comam_nb.lm.decoding import sample_rows
    G = a.group_size
    def ours(shared): return lambda rows, T: sample_rows(policy, rows, G, "extraction", max_new_tokens=T,
                                                         shared_prefix=shared)
    def batching(rows, T):
        from transformers import GenerationConfig
        from transformers.generation import ContinuousBatchingConfig
        from comam_nb.lm.lora import use_adapter
        use_adapter(policy.model, "extraction")
        many = GenerationConfig(max_new_tokens=T, do_sample=True, eos_token_id=-1, pad_token_id=0)
        policy.model.generate_batch([r for r in rows for _ in range(G)], generation_config=many, progress_bar=False,
                                    continuous_batching_config=ContinuousBatchingConfig(**room(a)))
    return {"shared prefix": ours(True), "generate": ours(False), "generate_batch": batching, **engine(policy, G)}

def engine(policy, G):
    "The same engine as the package keeps it between acts, with and without CUDA graphs."
    from comam_nb.lm.engines import make_engine
    from comam_nb.lm.lora import use_adapter
    def through(graphs):
        kept = []
        def write(rows, T):
            use_adapter(policy.model, "extraction")
            if not kept: kept.append(make_engine("continuous", policy, graphs=graphs))
            kept[0]([tuple(r) for r in rows], G, T)
        return write
    if policy.device.type == "cpu": return {"engine": through(False)}
    return {"engine": through(False), "engine, CUDA graphs": through(True)}

def engines(a):
    "Milliseconds and kernels a token, for every engine that runs here."
    from comam_nb.lm.backbone import Backbone
    from comam_nb.lm.lora import add_adapters
    model, tok = shaped(a, "SmolLM2-135M")
    model.generation_config.eos_token_id = tok.eos_token = None # all write as much as they may
    policy = Backbone(add_adapters(model.to(a.device).eval(), ["extraction"]), tok, ("extraction",))
    rows, few, many = random_tokens(a.episodes, 24 if a.dry else 256), 4, 12 if a.dry else 68
    def measured(write):
        took = [seconds_of(lambda: write(rows, T), a.device) for T in (few, many)]
        one = (took[1] - took[0]) / (many - few) # reading and setting up are in both; they may hide the difference
        counts = [_kernels(lambda: write(rows, T), a.device) for T in (few, many)]
        # on a CPU nobody sees what a thread of the engine's own does: None, and not 0
        each = {k: (counts[1][k] - n) / (many - few) or None for k, n in counts[0].items()}
        return dict(rows=len(rows) * a.group_size, prompt=len(rows[0]), ms_a_token=1000 * one if one > 0 else None,
                    tokens_a_second=len(rows) * a.group_size / one if one > 0 else None, call_seconds=took[1], **each)
    for name, write in writers(a, policy).items():
        yield tried(name, lambda: measured(write), "--group-size, --episodes")

def joint(shape):
    "A stage: a joint step of ours, TRL's and TRL's with continuous batching, by benchmarks/joint_step.py."
    def stage(a):
        import joint_step, torch
        with tempfile.TemporaryDirectory() as folder:
            for part in shaped(a, shape): part.save_pretrained(f"{folder}/model")
            s = argparse.Namespace(model=f"{folder}/model", new=6 if a.dry else 96, G=a.group_size, E=a.episodes,
                                   dtype=a.dtype, own=False, keep=None, common=0, micro=a.micro,
                                   room=room(a), steps=2 if a.dry else 3)
            trainers = {"comam": "comam", "trl": "trl", "trl-batching": "trl-batching"}
            if a.device == "cuda": trainers["comam, own decoding"] = "comam"
            def measured(system, prompt):
                if a.device == "cuda": torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
                s.out, s.prompt, s.engine = f"{folder}/out", prompt, "own" if "own" in system else None
                shutil.rmtree(s.out, ignore_errors=True)
                took = joint_step.SYSTEMS[trainers[system]](s)
                peak = torch.cuda.max_memory_allocated() / 1e9 if a.device == "cuda" else None
                return dict(first=took[0], seconds=statistics.median(took[1:]), all=took, gigabytes=peak,
                            E=s.E, G=s.G, prompt=s.prompt, new=s.new)
            for prompt in (48,) if a.dry else (1024, 4096):
                for system in trainers:
                    yield tried(f"{system}, {prompt}", lambda: measured(system, prompt),
                                "--group-size, --episodes or, for TRL, --micro")
    return stage

def ceilings(a):
    "Products, memory and launches: what the card can do at most."
    import torch
    n, size = (256, 2**20) if a.dry else (8192, 2**30)
    for kind in ("float32", "float16", "bfloat16"):
        def rate():
            x = torch.randn(n, n, device=a.device, dtype=getattr(torch, kind))
            return {"tflops": 2 * n**3 / seconds_of(lambda: x @ x, a.device, 2 if a.dry else 10) / 1e12}
        yield tried(f"products, {kind}", rate, "nothing")
    x = torch.empty(size, dtype=torch.uint8, device=a.device); y = torch.empty_like(x)
    yield {"copying": {"gigabytes_a_second": 2 * size / seconds_of(lambda: y.copy_(x), a.device, 10) / 1e9}}
    small = torch.zeros(16, device=a.device)
    yield {"launching": {"microseconds": 1e6 * seconds_of(lambda: small.add_(1), a.device, 2000)}}

def comam(*args):
    from comam_nb.cli.__main__ import main
    print("comam", *args, flush=True)
    if code := main([str(x) for x in args]): raise RuntimeError(f"comam {args[0]} ended with {code}; see log.txt")

def lines_of(path): return [json.loads(l) for l in Path(path).read_text(encoding="utf-8").splitlines()]

def fitting(trial, enough, left, few):
    "Steps that fit into the seconds left, by what a short trial run says about one."
    one = trial()
    return max(1, min(enough, few if left is None else int(left() / one)))

def fresh(run, name):
    "Without what an earlier try left, which would be refused."
    for folder in (f"{name}-trial", name): shutil.rmtree(run / folder, ignore_errors=True)

def model_of(a):
    if not a.model: return ()
    tiny = ("--max-new-tokens", "24") if a.dry else ()
    return "--backbone", a.model, "--rank", 4, *tiny, "--data", a.data

def start(a):
    "A supervised start of --model."
    if not a.model: yield {"not run": "no --model: the micro-world's own agents have had theirs"}; return
    begun, run = time.time(), a.run
    fresh(run, "start")
    def teach(out, steps, rows): comam("warm-start", *model_of(a), "--steps", steps, "--eval-rows", rows, "--out", out)
    def trial():
        teach(run / "start-trial", 3, 4)
        last = [l for l in lines_of(run / "start-trial" / "warm_start.jsonl") if l.get("step") == 3 and "seconds" in l]
        return sum(l["seconds"] for l in last) # three steps of each agent, with what they began with
    steps = 3 * fitting(trial, 67, lambda: 0.8 * a.limit - (time.time() - begun), 1) if not a.dry else 2
    yield {"steps": steps}
    teach(run / "start", steps, 16 if not a.dry else 4)
    yield {"policies": json.loads((run / "start" / "summary.json").read_text())["policies"],
           "curve": [l for l in lines_of(run / "start" / "warm_start.jsonl") if "loss" in l]}

def train(a):
    "Joint training, from the start if there is one; its adapters, in bfloat16."
    begun, run = time.time(), a.run
    fresh(run, "train")
    sizes = {"--episodes-per-step": 2, "--group-size": 4, "--eval-episodes": 4} if a.dry else {
             "--episodes-per-step": a.episodes, "--group-size": a.group_size, "--eval-episodes": 32}
    if not a.model and not a.dry: sizes |= {"--episodes-per-step": 16, "--eval-episodes": 500}
    taught = ("--from", run / "start") if (run / "start" / "summary.json").exists() else ()
    def learn(out, steps):
        comam("train", *model_of(a), *taught, "--steps", steps, *(x for p in sizes.items() for x in p), "--out", out)
    def trial():
        learn(run / "train-trial", 2)
        return lines_of(run / "train-trial" / "metrics.jsonl")[-1]["seconds"]
    left = lambda: 0.85 * a.limit - 1.5 * (time.time() - begun)
    steps = fitting(trial, 200, left, 1) if not a.dry else 2
    yield {"steps": steps, "from": bool(taught)}
    learn(run / "train", steps)
    kept = ("step", "seconds", "r_cons_f", "r_cons_c", "r_ret", "answer_accuracy", "w_extraction", "w_profile",
            "w_retrieval", "entropy")
    yield {"curve": [{k: m[k] for k in kept if k in m} for m in lines_of(run / "train" / "metrics.jsonl")],
           **{k: v for k, v in json.loads((run / "train" / "summary.json").read_text()).items() if k != "versions"}}
    yield {"adapters": keep_adapters(run / "train" / "weights", a.out / "adapters")}

def keep_adapters(weights, out):
    "Copies in bfloat16; their bytes. Raises `ValueError` above 16 MB."
    import torch
    from safetensors.torch import load_file, save_file
    total = 0
    for file in sorted(weights.rglob("adapter_model.safetensors")):
        own = out / file.parent.relative_to(weights); own.mkdir(parents=True, exist_ok=True)
        save_file({k: v.to(torch.bfloat16) for k, v in load_file(file).items()}, own / file.name)
        shutil.copy(file.parent / "adapter_config.json", own)
        total += (own / file.name).stat().st_size
    if total > MOST_ADAPTERS:
        raise ValueError(f"the adapters have {total / 1e6:.0f} MB, more than 16: take a lower rank")
    return total

def evaluate(a):
    "Scores on what was held out, beside untrained agents and rows that remember nothing."
    run = a.run
    if not (run / "train" / "summary.json").exists(): yield {"not run": "there is no trained team"}; return
    fresh(run, "eval")
    comam("eval", "--run", run / "train", "--system", run / "train" / "weights", "comam", "--questions",
          4 if a.dry else a.questions, "--out", run / "eval")
    yield {"report": (run / "eval" / "report.md").read_text(encoding="utf-8")}


# name -> (function, share of the minutes at most, what to lower where the card's memory does not suffice). The last
# three, the real run, get shares of what is left by then.
STAGES = {
    "equality": (equality, 0.09, "nothing: this needs no memory to speak of"),
    "engines": (engines, 0.12, "--group-size, --episodes"),
    **{f"joint step, {shape}": (joint(shape), share, "--group-size, --episodes, --micro")
       for shape, share in (("SmolLM2-135M", 0.27), ("Qwen2.5-0.5B", 0.22))},
    "ceilings": (ceilings, 0.05, "nothing: 2 GB are needed"),
    "start": (start, 0.3, "--group-size, --episodes"), "train": (train, 0.7, "--group-size, --episodes"),
    "evaluate": (evaluate, 1.0, "--questions")}
LAST = ("start", "train", "evaluate")
