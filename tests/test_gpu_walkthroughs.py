"""Walkthroughs for a card, whole, on a processor: a tiny model stands in the place of the hub's, made-up data in that
of the data sets. What takes minutes there must not end at a misspelt name."""
import ast
import importlib
import inspect
import json
import random
import re
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "nbs" / "walkthroughs"
COMAM, MEMCOLLAB = (FOLDER / n for n in ("09_comam_on_a_gpu.ipynb", "10_memcollab_on_a_gpu.ipynb"))
both = pytest.mark.parametrize("path", [COMAM, MEMCOLLAB], ids=lambda p: p.stem)

def code_cells(path):
    "Sources of the code cells, but for the one that installs on Colab."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    return [s for s in sources if "#| eval: false" not in s]


# ---- without running anything

@both
def test_cells_that_need_a_card_say_so(path):
    sources = code_cells(path)
    gpu = [s for s in sources if s.startswith("#| gpu\n")]
    assert len(gpu) >= 8
    for s in sources: # a model is loaded, taught or asked in these only
        if not s.startswith("#| gpu"):
            assert not re.search(r"\b(load_backbone|open_chat|evaluate|solve|run_arms)\(|\.train\(\)", s), s

@both
def test_a_cell_that_ci_runs_needs_none_that_it_skips(path):
    made = {"gpu": set(), "all": set()}
    for s in code_cells(path):
        kind = "gpu" if s.startswith("#| gpu") else "all"
        tree = ast.parse(s)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): made[kind].add(node.id)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)): made[kind].add(node.name)
        if kind == "all":
            own = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            assert not own & (made["gpu"] - made["all"]), s

def imported(sources):
    "name -> what it is, for everything that the cells import from this package."
    out = {}
    for s in sources:
        for node in ast.walk(ast.parse(s)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("comam_nb"):
                module = importlib.import_module(node.module)
                out.update({a.asname or a.name: getattr(module, a.name) for a in node.names})
    return out

@both
def test_every_call_fits_the_function_that_is_called(path):
    "Names exist, and arguments have names and places in the signature."
    sources = code_cells(path)
    known, calls = imported(sources), 0
    for s in sources:
        for node in ast.walk(ast.parse(s)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known): continue
            if any(isinstance(x, ast.Starred) for x in node.args) or any(k.arg is None for k in node.keywords): continue
            inspect.signature(known[node.func.id]).bind(*node.args, **{k.arg: k.value for k in node.keywords})
            calls += 1
    assert calls >= 8

@both
def test_minutes_and_memory_stand_at_the_head_and_are_called_estimates(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    head = "".join(cells[1]["source"])
    assert "minutes on a T4" in head and "memory of the card" in head and "nothing was measured on a T4" in head

@both
def test_what_was_not_run_shows_nothing(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert [c["id"] for c in cells if "".join(c["source"]).startswith("#| gpu") and c["outputs"]] == []


# ---- whole

TEMPLATE = ("{% for m in messages %}{{ m.role }}: {{ m.content }}<turn>{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}")

def tiny_model(folder, seed=0):
    "A random Llama, with a tokenizer that knows bytes and has a chat template."
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    bpe = ByteLevelBPETokenizer()
    texts = [" ".join(f"The user has {c} in May. [{i}]" for i, c in enumerate(COLOURS)), str(locomo(1))]
    bpe.train_from_iterator(texts, 500, special_tokens=["<pad>", "<eos>", "<turn>"])
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>")
    tok.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=8192,
                         eos_token_id=1, pad_token_id=0, bos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)

COLOURS = "red green blue black white brown pink grey".split()
THINGS = "kite boat lamp bike coat".split()

def locomo(people):
    "Conversations in LoCoMo's format: three sessions each, of which everybody says what they own."
    rng, out = random.Random(0), []
    for p in range(people):
        talk, qa = {"speaker_a": f"Ann{p}", "speaker_b": f"Bob{p}"}, []
        for s, thing in enumerate(THINGS[:3], 1):
            colour = rng.choice(COLOURS)
            talk[f"session_{s}_date_time"] = f"1:0{s} pm on {s} May, 2023"
            talk[f"session_{s}"] = [
                {"speaker": f"Ann{p}", "dia_id": f"D{s}:1", "text": f"I bought a {colour} {thing}."},
                {"speaker": f"Bob{p}", "dia_id": f"D{s}:2", "text": "How nice for you."}]
            qa.append({"question": f"What colour is the {thing} of Ann{p}?", "answer": colour,
                       "evidence": [f"D{s}:1"], "category": 4})
        out.append({"sample_id": f"conv-{p}", "conversation": talk, "qa": qa})
    return out

def run(path, monkeypatch, folder, **settings):
    "The notebook's cells in order, with other settings; the namespace afterwards."
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    nb, left = read_nb(path), dict(settings)
    nb.cells = [c for c in nb.cells if c.cell_type == "code" and "#| eval: false" not in c.source]
    for c in nb.cells:
        lines = []
        for line in c.source.splitlines():
            assigned = re.match(r"[A-Z_]+(, [A-Z_]+)* = ", line)
            names = assigned[0].removesuffix(" = ").split(", ") if assigned else []
            if names and all(n in left for n in names):
                line = f"{', '.join(names)} = {', '.join(repr(left.pop(n)) for n in names)}"
            lines.append(line)
        c.source = "\n".join(lines)
    assert left == {}, "settings that the notebook does not have"
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(FOLDER.parents[1] / "scripts"))
    shell = CaptureShell()
    shell.run_all(nb, exc_stop=True)
    errors = [o for c in nb.cells for o in c.outputs if o["output_type"] == "error"]
    assert errors == []
    return shell.user_ns, nb.cells

@pytest.mark.slow
def test_comam_on_a_gpu_runs_whole(tmp_path, monkeypatch):
    (tmp_path / "small.json").write_text(json.dumps(locomo(5)))
    names, cells = run(COMAM, monkeypatch, tmp_path, MODEL=tiny_model(tmp_path / "model"), DATA="locomo:small.json",
                       START=3, STEPS=2, E=1, G=2, WRITE=120, READ=600, WATCHED=2, QUESTIONS=2,
                       OUT=tmp_path / "out", PUSH_TO="")
    assert [l["step"] for l in names["curves"].lines] == [1, 2]
    assert {a for a in names["AGENTS"]} == {p.name for p in (tmp_path / "out" / "weights").iterdir()}
    assert names["before"].keys() == names["after"].keys() == names["base"].keys()
    text = (tmp_path / "out" / "scores" / "trained.jsonl").read_text()
    assert len(text.splitlines()) == 3
    assert not {e.user for e in names["questions"]} & {e.user for e in names["training"]}

@pytest.mark.slow
def test_comam_on_a_gpu_takes_the_readers_own_chats(tmp_path, monkeypatch):
    said = lambda t, c, m: [{"role": "user", "content": f"I painted the {t} {c} in {m}."},
                            {"role": "assistant", "content": "Nice."}]
    sessions = [said(t, c, m) for t, c, m in zip(THINGS, COLOURS, ("January", "March", "April", "June", "July"))]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, sessions)))
    names, _ = run(COMAM, monkeypatch, tmp_path, MODEL=tiny_model(tmp_path / "model"), DATA="chat:chats.jsonl",
                   START=2, STEPS=1, E=1, G=2, WRITE=120, READ=600, WATCHED=2, QUESTIONS=2,
                   OUT=tmp_path / "out", PUSH_TO="")
    assert len(names["curves"].lines) == 1

def gsm8k(path, start, n):
    "Sums, in the benchmark's format."
    rows = [{"question": f"Mia has {i} pens and buys {i + 1} more. How many pens does she have?",
             "answer": f"{i} + {i + 1} = {2 * i + 1}\n#### {2 * i + 1}"} for i in range(start, start + n)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)

def memcollab(tmp_path, monkeypatch):
    models = [tiny_model(tmp_path / n, seed) for seed, n in enumerate(("first", "second"))]
    return run(MEMCOLLAB, monkeypatch, tmp_path, FIRST=models[0], SECOND=models[1], TRAIN=6, TEST=4, WRITE=8,
               AT_ONCE=4, TRAIN_FILE=gsm8k(tmp_path / "train.jsonl", 1, 6),
               TEST_FILE=gsm8k(tmp_path / "test.jsonl", 20, 4), OUT=tmp_path / "out")[0]

@pytest.mark.slow
def test_memcollab_on_a_gpu_runs_whole_where_nobody_is_right(tmp_path, monkeypatch):
    names = memcollab(tmp_path, monkeypatch)
    assert not names["pairs"] and not names["lessons"].constraints and (tmp_path / "out" / "bank.md").exists()
    assert names["results"].arms == ["vanilla", "memcollab", "no_category", "placebo"]

@pytest.mark.slow
def test_memcollab_on_a_gpu_runs_whole(tmp_path, monkeypatch):
    "The models are asked, and then something else stands in their replies, so that there are pairs and lessons."
    from comam_nb.lm import recorded
    lesson = "When equal things are added, enforce adding both counts once; avoid counting one of them twice."
    really = recorded.open_chat
    def open_chat(spec, **options):
        chat = really(spec, **options)
        ask, good = chat.chat_many, "second" in spec
        def chat_many(conversations, *args, **kwargs):
            replies = ask(conversations, *args, **kwargs)
            return [said(c[-1]["content"], r, good) for c, r in zip(conversations, replies)]
        chat.chat_many = chat_many
        return chat
    def said(prompt, reply, good):
        if "preferred attempt" in prompt: return type(reply)(lesson)
        i = int(re.search(r"Mia has (\d+)", prompt)[1])
        return type(reply)(f"The answer is \\boxed{{{2 * i + 1 if good or i % 3 == 0 else i}}}.")
    monkeypatch.setattr(recorded, "open_chat", open_chat)
    names = memcollab(tmp_path, monkeypatch)
    assert len(names["pairs"]) == 4 and len(names["lessons"].constraints) == 4
    assert names["results"].arms == ["vanilla", "memcollab", "no_category", "placebo"]
    assert names["found"][names["task"].hash] == [lesson] and (tmp_path / "out" / "results.json").exists()
