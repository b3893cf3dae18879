"""What this package does on a card, in one command that needs no network.

    python scripts/on_a_card.py --out card --wheels wheels --minutes 7     # random weights, and the micro-world
    python scripts/on_a_card.py --out card --model DIR --data locomo:locomo10.json
    python scripts/on_a_card.py --out dry --dry                            # every stage on a CPU, toy sizes: 2 minutes
    python scripts/on_a_card.py --pack pack --model DIR --data locomo:FILE # all that the above needs, in small pieces
    python pack/on_a_card.py --unpack pack --out here                      # on the other machine

Needs torch, transformers, peft and accelerate; --wheels is a folder with wheels of what else is missing (trl, datasets,
gguf, dill, multiprocess), which are put into DIR/site. faiss, scipy, a compiler and a network are not needed.

The stages come in the order of their worth. Each runs in a process of its own, for its share of the minutes at most,
and adds a line to DIR/record.jsonl: what it found, or a traceback, with seconds, versions, device and number type. A
stage that fails does not end the others, and the same command again does those that are missing. What stages print
stands in DIR/log.txt. The last three are a real run: a supervised start of --model, joint training from there, scores
on what was held out, and adapters under 16 MB; without --model the micro-world's own agents are trained.

A record that was made on a card belongs into nbs/logs/card/; scripts/card_record.py shows it.
"""
import argparse, gc, hashlib, importlib.metadata, json, os, shutil, signal, subprocess, sys, tarfile, tempfile, time
import traceback
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORMAT = 1 # of the record's lines
PIECE = 30 * 2**20 # bytes of a piece of --pack
MOST_ADAPTERS = 16 * 10**6 # bytes
NEEDED = ("torch", "transformers", "peft", "accelerate", "trl", "datasets", "dill", "multiprocess", "numpy", "tqdm",
          "safetensors", "filelock", "matplotlib")
WHEELS = ("trl", "datasets", "gguf", "dill", "multiprocess") # what --pack fetches
SHAPES = { # as their config.json has them
    "SmolLM2-135M": ("LlamaConfig", dict(vocab_size=49152, hidden_size=576, intermediate_size=1536,
                     num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, rope_theta=1e5)),
    "Qwen2.5-0.5B": ("Qwen2Config", dict(vocab_size=151936, hidden_size=896, intermediate_size=4864,
                     num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, rope_theta=1e6))}
TOY = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
           vocab_size=41000) # joint_step.py's prompts have words up to 40,000

class Refused(ValueError): "Bad input, in one line."

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

def shaped(a, shape, **more):
    "A model of that shape with random weights; two narrow layers where it is dry."
    import torch, transformers
    kind, size = SHAPES[shape]
    config = getattr(transformers, kind)(**{**size, **(TOY if a.dry else {})}, max_position_embeddings=8192,
                                         tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, a.dtype)), words(config.vocab_size)

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
    import torch
    if device == "cpu":
        if find_spec("launches") is None: return {"kernels": None, "why": "benchmarks/launches.py is not there"}
        from launches import count
        return {"kernels": count(work).counts["kernels"]}
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen: work(); wait(device)
    names = [(e.name, str(e.device_type)) for e in seen.events()]
    return {"kernels": sum("CUDA" in d and not n.startswith(("Memcpy", "Memset")) for n, d in names),
            "launches": sum(n in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cudaGraphLaunch")
                            for n, _ in names)}

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
        room = ContinuousBatchingConfig(max_memory_percent=0.02 if a.device == "cpu" else 0.5)
        policy.model.generate_batch([r for r in rows for _ in range(G)], generation_config=many, progress_bar=False,
                                    continuous_batching_config=room)
    return {"shared prefix": ours(True), "generate": ours(False), "continuous batching": batching}

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
        one = (took[1] - took[0]) / (many - few) # reading and setting up are in both
        counts = [_kernels(lambda: write(rows, T), a.device) for T in (few, many)]
        each = {k: (counts[1][k] - n) / (many - few) if isinstance(n, int) else n for k, n in counts[0].items()}
        return dict(rows=len(rows) * a.group_size, prompt=len(rows[0]), ms_a_token=1000 * one,
                    tokens_a_second=len(rows) * a.group_size / one, call_seconds=took[1], **each)
    for name, write in writers(a, policy).items(): yield tried(name, lambda: measured(write), "--group-size, --episodes")

def joint(shape, prompt):
    "A stage: a joint step of ours, TRL's and TRL's with continuous batching, by benchmarks/joint_step.py."
    def stage(a):
        import joint_step, torch
        with tempfile.TemporaryDirectory() as folder:
            for part in shaped(a, shape): part.save_pretrained(f"{folder}/model")
            s = argparse.Namespace(model=f"{folder}/model", prompt=48 if a.dry else prompt, new=6 if a.dry else 96,
                                   G=a.group_size, E=a.episodes, dtype=a.dtype, own=False, keep=None, common=0,
                                   micro=a.micro, steps=2 if a.dry else 3)
            def measured(system):
                if a.device == "cuda": torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
                s.out = f"{folder}/{system}"
                took = joint_step.SYSTEMS[system](s)
                peak = torch.cuda.max_memory_allocated() / 1e9 if a.device == "cuda" else None
                return dict(first=took[0], seconds=sorted(took[1:])[len(took[1:]) // 2], all=took, gigabytes=peak,
                            E=s.E, G=s.G, prompt=s.prompt, new=s.new)
            for system in ("comam", "trl", "trl-batching"):
                yield tried(system, lambda: measured(system), "--group-size, --episodes or, for TRL, --micro")
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
    from comam_nb.cli.comam import main
    print("comam", *args, flush=True)
    if code := main([str(x) for x in args]): raise RuntimeError(f"comam {args[0]} ended with {code}; see log.txt")

def lines_of(path): return [json.loads(l) for l in Path(path).read_text(encoding="utf-8").splitlines()]

def fitting(trial, enough, left, few):
    "Steps that fit into the seconds left, by what a short trial run says about one."
    one = trial()
    return max(1, min(enough, few if left is None else int(left() / one)))

def model_of(a):
    if not a.model: return ()
    tiny = ("--max-new-tokens", "24") if a.dry else ()
    return "--backbone", a.model, "--rank", 4, *tiny, "--data", a.data

def start(a):
    "A supervised start of --model."
    if not a.model: yield {"not run": "no --model: the micro-world's own agents have had theirs"}; return
    begun, run = time.time(), a.run
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
    "Copies in bfloat16; their bytes. Raises `Refused` above 16 MB."
    import torch
    from safetensors.torch import load_file, save_file
    total = 0
    for file in sorted(weights.rglob("adapter_model.safetensors")):
        own = out / file.parent.relative_to(weights); own.mkdir(parents=True, exist_ok=True)
        save_file({k: v.to(torch.bfloat16) for k, v in load_file(file).items()}, own / file.name)
        shutil.copy(file.parent / "adapter_config.json", own)
        total += (own / file.name).stat().st_size
    if total > MOST_ADAPTERS: raise Refused(f"the adapters have {total / 1e6:.0f} MB, more than 16: take a lower rank")
    return total

def evaluate(a):
    "Scores on what was held out, beside untrained agents and rows that remember nothing."
    run = a.run
    comam("eval", "--run", run / "train", "--system", run / "train" / "weights", "comam", "--questions",
          4 if a.dry else a.questions, "--out", run / "eval")
    yield {"report": (run / "eval" / "report.md").read_text(encoding="utf-8")}


# name -> (function, share of the minutes at most, what to lower where the card's memory does not suffice). The last
# three, the real run, get shares of what is left by then.
STAGES = {
    "equality": (equality, 0.09, "nothing: this needs no memory to speak of"),
    "engines": (engines, 0.12, "--group-size, --episodes"),
    **{f"joint step, {shape}, {prompt}": (joint(shape, prompt), share, "--group-size, --episodes, --micro")
       for shape, prompt, share in (("SmolLM2-135M", 1024, 0.15), ("SmolLM2-135M", 4096, 0.13),
                                    ("Qwen2.5-0.5B", 1024, 0.12), ("Qwen2.5-0.5B", 4096, 0.12))},
    "ceilings": (ceilings, 0.05, "nothing: 2 GB are needed"),
    "start": (start, 0.3, "--group-size, --episodes"), "train": (train, 0.7, "--group-size, --episodes"),
    "evaluate": (evaluate, 1.0, "--questions")}
LAST = ("start", "train", "evaluate")


# ---- one process for each stage

def about(device, dtype):
    import torch
    have = ("torch", "transformers", "trl", "peft", "accelerate")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    from comam_nb import __version__
    versions = {"python": sys.version.split()[0], "cuda": torch.version.cuda,
                **{p: importlib.metadata.version(p) for p in have}}
    return {"format": FORMAT, "comam_nb": __version__, "versions": versions, "device": name, "dtype": dtype}

def child(stage, settings, file):
    "Runs one stage and writes what it found into a file, part by part."
    a = argparse.Namespace(**settings)
    a.out = Path(a.out); a.run = a.out / "run"; a.run.mkdir(parents=True, exist_ok=True)
    a.device, a.dtype = place()
    print(f"\n=== {stage}: {a.device}, {a.dtype}", flush=True)
    work, _, lower = STAGES[stage]
    head, result = about(a.device, a.dtype), {}
    def write(**more): file.write_text(json.dumps({**head, "result": result, **more}), encoding="utf-8")
    write()
    try:
        for part in work(a): result.update(part); write()
    except Exception as e:
        traceback.print_exc()
        write(error=traceback.format_exc(), **({"lower": lower} if out_of_memory(e) else {}))

def process(stage, settings, file, limit):
    "The stage in a process, which is ended after `limit` seconds; None, or the reason why it ended early."
    path = [str(Path(settings["out"]) / "site"), str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    quiet = dict(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="disabled",
                 TRL_EXPERIMENTAL_SILENCE="1", MPLBACKEND="Agg", PYTHONPATH=os.pathsep.join(filter(None, path)))
    with open(Path(settings["out"]) / "log.txt", "a", encoding="utf-8") as log:
        done = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--stage", stage, json.dumps(settings),
                                 str(file)], env={**os.environ, **quiet}, stdout=log, stderr=log,
                                stdin=subprocess.DEVNULL, start_new_session=True)
        try: return None if done.wait(limit) == 0 else f"the process ended with {done.returncode}; see log.txt"
        except subprocess.TimeoutExpired: return f"ended after {limit:.0f} s, its share of the time"
        finally:
            for how in (signal.SIGTERM, signal.SIGKILL): # with all that it started
                try: os.killpg(done.pid, how)
                except ProcessLookupError: break
                try: done.wait(5)
                except subprocess.TimeoutExpired: continue

def run(a, start=process):
    "All stages that the record lacks."
    record, have, end = a.out / "record.jsonl", done_in(a.out, a.dry), time.time() + 60 * a.minutes
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items()}
    for stage, (_, share, _) in STAGES.items():
        if stage in have: print(f"{stage}: stands in the record"); continue
        began, left = time.time(), end - time.time()
        limit = share * left if stage in LAST else min(left, 60 * a.minutes * share)
        file, why = a.out / "stage.json", "the minutes were over"
        file.unlink(missing_ok=True)
        if limit > 5 or a.dry: why = start(stage, {**settings, "limit": limit}, file, limit if not a.dry else 120)
        line = {"stage": stage, "dry": a.dry, "seconds": round(time.time() - began, 1),
                **(json.loads(file.read_text(encoding="utf-8")) if file.exists() else {})}
        if why: line["error"] = why if "error" not in line else line["error"]
        with open(record, "a", encoding="utf-8") as f: f.write(json.dumps(line) + "\n")
        said = line.get("error", "").strip().splitlines()
        print(f"{stage}: {line['seconds']:.0f} s, {line.get('device', '')} {line.get('dtype', '')}"
              f"{', ' + said[-1] if said else ''}{'; lower ' + line['lower'] if 'lower' in line else ''}", flush=True)
    file.unlink(missing_ok=True)
    print(f"{record}: `python scripts/card_record.py {a.out}` shows it")


# ---- what is needed

def done_in(out, dry):
    "Stages that a record holds. Raises `Refused` for a record of another version."
    from comam_nb import __version__
    lines = lines_of(out / "record.jsonl") if (out / "record.jsonl").exists() else []
    ours = {"format": FORMAT, "comam_nb": __version__, "dry": dry}
    for l in lines:
        other = [f"{k} {l[k]}, not {v}" for k, v in ours.items() if k in l and l[k] != v]
        if other: raise Refused(f"{out}/record.jsonl was made with {' and '.join(other)}: name another --out")
    return {l["stage"] for l in lines if "error" not in l}

def check(a):
    if a.model:
        path = Path(a.model)
        if not (path.is_dir() and (path / "config.json").exists() or path.is_file() and path.suffix == ".gguf"):
            raise Refused(f"{a.model}: no model: name a directory with a config.json, or a .gguf file")
        a.model = str(path.resolve())
    if a.wheels and not list(Path(a.wheels).glob("*.whl")): raise Refused(f"{a.wheels}: no wheels (*.whl) there")
    kind, _, where = a.data.partition(":")
    for file in filter(None, where.split(",")):
        if not Path(file).exists(): raise Refused(f"{file}: no such file (--data {a.data})")
    if where: a.data = f"{kind}:{','.join(str(Path(f).resolve()) for f in where.split(','))}"

def prepare(a):
    "Wheels into DIR/site, and a line about what is missing still."
    site = a.out / "site"
    a.out.mkdir(parents=True, exist_ok=True)
    if a.wheels and not site.is_dir():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site),
                        *map(str, sorted(Path(a.wheels).glob("*.whl")))], check=True)
    sys.path.insert(0, str(site))
    missing = [n for n in (*NEEDED, *(["gguf"] if str(a.model or "").endswith(".gguf") else [])) if not find_spec(n)]
    if missing: raise Refused(f"{', '.join(missing)}: not installed: give a folder with their wheels as --wheels")

def pack(a):
    "Everything that another machine needs, in pieces."
    out = Path(a.pack); out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()): raise Refused(f"{out}: not empty: name another directory")
    with tempfile.TemporaryDirectory() as scratch:
        wheels = Path(a.wheels or scratch) # pure Python, or for Linux and Python 3.12
        if not a.wheels:
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:",
                            "--python-version", "3.12", "-c", str(ROOT / "constraints.txt"), "-d", scratch, *WHEELS],
                           check=True)
        with tarfile.open(Path(scratch) / "all.tar.gz", "w:gz") as tar:
            keep = lambda x: None if "__pycache__" in x.name else x
            for name in ("comam_nb", "scripts", "benchmarks"): tar.add(ROOT / name, name, filter=keep)
            for wheel in sorted(wheels.glob("*.whl")): tar.add(wheel, f"wheels/{wheel.name}")
            if a.model: tar.add(a.model, "model" + (".gguf" if a.model.endswith(".gguf") else ""))
            for file in filter(None, a.data.partition(":")[2].split(",")): tar.add(file, f"data/{Path(file).name}")
        sums = {}
        with open(Path(scratch) / "all.tar.gz", "rb") as whole:
            while data := whole.read(PIECE):
                name = f"piece-{len(sums):03}"
                (out / name).write_bytes(data); sums[name] = hashlib.sha256(data).hexdigest()
    (out / "pieces.json").write_text(json.dumps(sums, indent=1))
    shutil.copy(__file__, out)
    print(f"{len(sums)} pieces in {out}; on the other machine: python {out.name}/on_a_card.py --unpack {out.name} "
          "--out WHERE, then cd WHERE; python scripts/on_a_card.py --wheels wheels --out card")

def unpack(a):
    "The pieces of --pack, checked, into --out."
    folder = Path(a.unpack)
    if not (folder / "pieces.json").exists(): raise Refused(f"{folder}: no pieces.json: name the directory of --pack")
    sums = json.loads((folder / "pieces.json").read_text())
    with tempfile.TemporaryFile() as whole:
        for name, expected in sums.items():
            data = (folder / name).read_bytes() if (folder / name).exists() else b""
            if hashlib.sha256(data).hexdigest() != expected: raise Refused(f"{folder / name}: missing or damaged")
            whole.write(data)
        whole.seek(0)
        with tarfile.open(fileobj=whole) as tar: tar.extractall(a.out, filter="data")
    print(f"unpacked into {a.out}")

def main(argv=None, start=process):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, help="directory of the record; a second call goes on with it")
    p.add_argument("--model", help="directory or .gguf file, for the real run")
    p.add_argument("--data", default="microworld", help="for the real run with --model: microworld, locomo:FILE, …")
    p.add_argument("--minutes", type=float, default=7.0, help="for everything (default 7)")
    p.add_argument("--wheels", help="directory with wheels of what is not installed")
    for flag, value, what in (("--episodes", 4, "E, episodes of a step"), ("--group-size", 8, "G, rollouts of each"),
                              ("--micro", 8, "rows of a pass of TRL's"), ("--questions", 40, "asked at the end")):
        p.add_argument(flag, type=int, default=value, help=f"{what} (default {value})")
    p.add_argument("--dry", action="store_true", help="every stage with toy sizes, on any machine")
    p.add_argument("--pack", metavar="DIR", help="write what another machine needs, in pieces of 30 MiB at most")
    p.add_argument("--unpack", metavar="DIR", help="put the pieces in DIR together again, in --out")
    a = p.parse_args(argv)
    try:
        if a.out is None and not a.pack: raise Refused("name a directory with --out")
        if a.unpack: unpack(a); return 0
        check(a)
        if a.pack: pack(a); return 0
        sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
        done_in(a.out, a.dry)
        prepare(a)
        if a.dry: a.episodes, a.group_size, a.micro = 2, 2, 2
        if a.dry and not a.model: a.model = str(ROOT / "comam_nb" / "weights" / "microworld")
        run(a, start)
    except (Refused, OSError, subprocess.CalledProcessError) as e:
        print(f"on_a_card: {str(e).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    if sys.argv[1:2] == ["--stage"]:
        told = json.loads(sys.argv[3])
        if told["dry"]: sys.modules.update(faiss=None, scipy=None) # what a card's machine may lack
        child(sys.argv[2], told, Path(sys.argv[4]))
        sys.exit()
    sys.exit(main())
