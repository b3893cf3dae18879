"""How often Python speaks to the processor: kernels and host syncs, counted on a CPU, for what a card would be asked.

    python benchmarks/launches.py              # SmolLM2's layers, 30 of them, random weights: about 3 minutes
    python benchmarks/launches.py --json launches.jsonl   # append the counts

On a card a small model waits for Python, so its time follows these counts and not the arithmetic. They do not depend
on the processor, and grow by the same number with every layer (tests/test_benchmarks.py counts three), so one layer and
two are counted, and the line through them gives the rest. Weights are bfloat16 under three LoRA adapters, as on a
card; the vocabulary has 8,192 words instead of 49,152, which changes no count.

A kernel is a call of an aten operator below autograd that computes, fills or copies something, forwards or backwards.
Left out are views (`OpOverload.is_view`) and what only reserves or renames memory (NOT_KERNELS). A call that a card
breaks into several counts once; so do small tensors that are put together on the host. Masked products, random numbers
and the optimiser (fused) count like any other. Autocast casts what it casts on a CPU, which differs a little.

A sync is a place where Python waits for a number: `.item()`, `bool()`, `int()` and `float()` of a tensor
(`_local_scalar_dense`), `.tolist()`, `.cpu()`, `.numpy()`, `nonzero`, `unique`, `masked_select`, `equal`, an index by a
mask, and `repeat_interleave` by a tensor of counts without `output_size`. An upload is a tensor made of Python numbers
(`torch.tensor`, seen as `lift_fresh`): on a card it is a copy from the host. What is copied with `.to(device)` cannot
be seen on a CPU.

For a written token the counts of two lengths are subtracted, so that reading the prompt is not among them. Scoring is
the first pass of a step, when no gradients are there to be added to. What only a CPU does is switched off. `--kernels
off` switches off `comam_nb.lm.cpu_kernels` altogether: PEFT's own adapters. `--kernels on` counts what this CPU
does."""
import argparse, json, os, tempfile, warnings
from collections import Counter
from dataclasses import replace

warnings.filterwarnings("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1"); os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = ("extraction", "profile", "retrieval")
NOT_KERNELS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "resize_",
               "set_", "lift", "lift_fresh", "_local_scalar_dense", "_has_same_storage_numel", "record_stream"}
WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "equal",
         "is_nonzero"}
ASKED = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy} # of them `.cpu()` is not seen below

class _Asked(TorchFunctionMode):
    "Counts what leads to the host without an operator of its own."
    def __init__(self, counts): super().__init__(); self.counts = counts
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in ASKED: self.counts["syncs"] += 1
        return func(*args, **kwargs or {})

class Counted(TorchDispatchMode):
    "Counts kernels, syncs and uploads while it is entered; `ops` says which operators they were."
    def __init__(self):
        super().__init__()
        self.counts, self.ops = Counter(kernels=0, syncs=0, uploads=0), Counter()
        self.asked = _Asked(self.counts)

    def __enter__(self): self.asked.__enter__(); return super().__enter__()
    def __exit__(self, *problem): super().__exit__(*problem); return self.asked.__exit__(*problem)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        masks = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        repeats = name == "repeat_interleave" and func._overloadname == "Tensor" and not kwargs.get("output_size")
        self.counts["syncs"] += name in WAITS or masks or repeats
        self.counts["uploads"] += name == "lift_fresh"
        if not func.is_view and name not in NOT_KERNELS:
            self.counts["kernels"] += 1
            self.ops[name] += 1
        return func(*args, **kwargs)

def count(work):
    "Counts of one call."
    with Counted() as seen: work()
    return seen

def per_token(work, few, many):
    "Counts for each token between `few` and `many`, so that reading the prompt is not among them."
    a, b = count(lambda: work(few)).counts, count(lambda: work(many)).counts
    return {k: (b[k] - a[k]) / (many - few) for k in b}

def make(layers, vocab=8192, hidden=576, heads=9, kv_heads=3, middle=1536):
    "A model of SmolLM2's shape with random weights, a tokenizer that knows a word for each id, three adapters."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from comam_nb.lm.backbone import Backbone
    from comam_nb.lm.lora import add_adapters
    class Endless(Backbone):
        eos_ids = () # all write as many tokens as they may
    words = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, vocab))])}
    tok = Tokenizer(models.WordLevel(words, unk_token="<unk>")); tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                  padding_side="left")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=middle, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=8192, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=1, pad_token_id=0)).bfloat16().eval()
    model.generation_config.eos_token_id = None
    return Endless(add_adapters(model, NAMES), tok, NAMES, "SmolLM2's shape")

def writing(backbone, G, prompt, few, many):
    "part -> counts for a written token: of a group, with a stop text that never comes, greedy; of plain `generate`."
    from comam_nb.lm.decoding import sample_group
    from comam_nb.lm.lora import without_adapters
    text, ids = " ".join(["w9"] * prompt), torch.full((1, prompt), 9)
    def write(T, policy=backbone, **kw): sample_group(policy, [text], adapter=NAMES[0], max_new_tokens=T, **kw)
    def plain(T): backbone.model.get_base_model().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=T, pad_token_id=0, top_k=0, do_sample=True,
        num_return_sequences=G)
    stopping = replace(backbone, stop="never said")
    with without_adapters(backbone.model):
        found = {"token, plain generate, no adapter": per_token(plain, few, many)}
    return found | {"token, group": per_token(lambda T: write(T, G=G), few, many),
                    "token, group, stop text": per_token(lambda T: write(T, stopping, G=G), few, many),
                    "token, greedy": per_token(lambda T: write(T, temperature=0.0), few, many)}

def scoring(backbone, G, prompt, new):
    "Counts of one agent's log-probabilities in a step, forwards and backwards, as the trainer asks for them."
    from comam_nb.lm.cpu_kernels import direct_adapter
    from comam_nb.lm.scoring import shared_logprobs
    words = len(backbone.tokenizer)
    prompts = [tuple(3 + i % (words - 3) for i in range(prompt))] * G
    completions = torch.randint(3, words, (G, new)).tolist()
    def score():
        with torch.autocast("cpu", torch.bfloat16), direct_adapter(backbone.model):
            logps, _ = shared_logprobs(backbone.model.get_base_model(), prompts, completions)
        logps.sum().backward()
    seen = count(score)
    backbone.model.zero_grad()
    return seen

def judging(backbone, E, G, turns):
    "Counts for a judge question: E x G profiles of E histories, each with the questions of the rubric."
    from types import SimpleNamespace
    from comam_nb.rewards import RubricJudge, lm_yes
    from comam_nb.rl.team import FrozenModel
    from comam_nb.data import Message
    say = lambda n, *words: " ".join(f"w{n + 3 + w}" for w in words)
    histories = [[Message("user", say(e, *range(8)), t) for t in range(turns)] for e in range(E)]
    profiles = [[SimpleNamespace(text=say(e + g, 5, g))] for e in range(E) for g in range(G)]
    judge = RubricJudge(lm_yes(FrozenModel(backbone)))
    seen = count(lambda: judge.batch(profiles, [h for h in histories for _ in range(G)])).counts
    return {k: n / (E * G * len(judge.rubric)) for k, n in seen.items()}

def joint_step(backbone, E, G, prompt, new):
    "Counts of a step of `CoMAMTrainer`, the second of a run."
    from transformers import TrainerCallback
    from comam_nb.data import example_episode
    from comam_nb.rl.settings import CoMAMConfig
    from comam_nb.rl.team import make_team
    from comam_nb.training import CoMAMTrainer
    seen = []
    class Step(TrainerCallback):
        def on_step_begin(self, *a, **k): seen.append(Counted()); seen[-1].__enter__()
        def on_step_end(self, *a, **k): seen[-1].__exit__(None, None, None)
    team = make_team(backbone, **{n: {"max_new_tokens": new} for n in NAMES})
    for i, agent in enumerate(team.values()):
        agent.prompt = lambda state, i=i: " ".join(f"w{i + 3 + k % 50}" for k in range(prompt))
    rewards = lambda groups: (torch.rand(len(groups), 3, G), torch.rand(len(groups), G))
    with tempfile.TemporaryDirectory() as folder:
        config = CoMAMConfig(folder, max_steps=2, episodes_per_step=E, num_generations=G, max_completion_length=new,
                             learning_rate=1e-5, bf16=True, use_cpu=True, disable_tqdm=True, keep_prompts=0)
        CoMAMTrainer(team, [example_episode()] * E, rewards, config, callbacks=[Step()]).train()
    return seen[-1]

def counted(layers, E=2, G=4, prompt=64, new=8, few=16, many=32, kernels="card", **shape):
    "part -> counts; the last is scoring's operators."
    import transformers
    from comam_nb.lm.cpu_kernels import use_kernels
    transformers.utils.logging.set_verbosity_error()
    with use_kernels(kernels != "off", cpu=kernels == "on"):
        backbone = make(layers, **shape)
        found = writing(backbone, G, prompt, few, many)
        scored = scoring(backbone, E * G, prompt, new)
        found["judge question"] = judging(backbone, E, G, turns=6)
        found["one agent's scoring, with gradients"] = dict(scored.counts)
        found["joint step"] = dict(joint_step(backbone, E, G, prompt, new).counts)
    return found | {"operators of scoring": dict(scored.ops)}

def measure(layers=30, **settings):
    "part -> counts for a model of so many layers, from those of one layer and of two."
    one, two = counted(1, **settings), counted(2, **settings)
    line = lambda a, b: {k: a.get(k, 0) + (layers - 1) * (b.get(k, 0) - a.get(k, 0)) for k in b}
    return {part: line(one[part], two[part]) for part in one}

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, value, says in (("--layers", 30, "of the model"), ("--E", 2, "episodes of a step"),
                              ("--G", 4, "of a group"), ("--prompt", 64, "tokens of a prompt"),
                              ("--new", 8, "tokens of a completion")):
        p.add_argument(flag, type=int, default=value, help=f"{says} (default {value})")
    p.add_argument("--kernels", choices=["card", "off", "on"], default="card", help="see above")
    p.add_argument("--ops", type=int, default=0, help="print this many of scoring's most frequent operators")
    p.add_argument("--json", help="append the counts to this file, one line")
    a = p.parse_args()
    from machine import about, processor
    print(about())
    print(f"torch {torch.__version__}; {a.layers} layers, E {a.E}, G {a.G}, prompt {a.prompt}, "
          f"completion {a.new}, kernels {a.kernels}", flush=True)
    found = measure(a.layers, E=a.E, G=a.G, prompt=a.prompt, new=a.new, kernels=a.kernels)
    ops = Counter(found.pop("operators of scoring"))
    plain = found["token, plain generate, no adapter"]["kernels"]
    print(f"{'':36} {'kernels':>9} {'syncs':>7} {'uploads':>8}  of plain generate")
    for part, n in found.items():
        ratio = f"{n['kernels'] / plain:12.2f}x" if part.startswith("token") else ""
        print(f"{part:36} {n['kernels']:9.1f} {n['syncs']:7.2f} {n['uploads']:8.2f}  {ratio}")
    for name, n in ops.most_common(a.ops): print(f"  {name:32} {n:6}")
    if a.json:
        line = dict(torch=torch.__version__, processor=processor(), **{k: v for k, v in vars(a).items() if k != "json"},
                    counts=found)
        with open(a.json, "a", encoding="utf-8") as f: f.write(json.dumps(line) + "\n")
