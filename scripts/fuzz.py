"""Feeds every reader and parser with damaged input:
`python scripts/fuzz.py --inputs 2000000 [--seconds S] [--target NAME]`.

A target is a function of bytes, of a text or of a JSON value, with the exceptions that it documents. Inputs are small
valid ones, changed at random: values swapped and replaced, deep nesting, huge numbers, halves of characters, NUL, bytes
flipped. One process; a clock stops an input that takes more than ten seconds. The table at the end says of each target
how many inputs it had, which undocumented exceptions came, each with its shortest input, and the slowest input.
`--atheris` lets atheris (https://pypi.org/project/atheris) choose the changes by what code they reach; it must be
installed, and runs one target. Ends with 1 if anything undocumented came.
"""
import argparse, contextlib, json, logging, os, platform, random, signal, sys, tempfile, time, traceback, warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from comam_nb import agents, mdp
from comam_nb.base import citations, conversations, errors, fields, files, unspaced, words
from comam_nb.checks import code_answers, constraints, math_answers, tasks, taxonomy
from comam_nb.cli import memory as cli_memory
from comam_nb.lm import chat, endpoints, recorded
from comam_nb.memcollab import attempts, bank, results, showing
from comam_nb.readers import (chat_logs, locomo, longmemeval, memoryctrl, personamem, prefeval, reading, scores,
                              task_files)
from comam_nb.rl import failed_step, sampler
from comam_nb.runs import bench, folder
from comam_nb.store import items, lexical
from comam_nb.systems import memory_r1

PLACE = Path(tempfile.mkdtemp(prefix="fuzz", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
CLOCK = 10 # seconds for one input

@dataclass
class Target:
    "What is called, with what, and which exceptions it documents."
    call:Callable
    seeds:list # valid inputs: bytes, texts or JSON values
    errors:tuple=() # documented
    kind:str="text" # bytes, text or value

def file_of(suffix, read):
    "A function of bytes that reads them from a file."
    path = PLACE / f"input{suffix}"
    def call(data):
        path.write_bytes(data)
        return read(path)
    return call

# ---- small valid inputs

_turns = [{"role": "user", "content": "I moved to Porto in May. [3]"}, {"role": "assistant", "content": "Nice."}]
_chats = [
    {"user": "ana", "sessions": [{"id": "s1", "date": "2024-05-01", "messages": _turns}],
     "queries": [{"question": "Where?", "answer": "Porto", "options": ["Porto", "Faro"], "evidence": [1]}]},
    {"conversations": [{"from": "human", "value": "I grow lemons"}, {"from": "gpt", "value": "Good"}]},
    {"title": "t", "create_time": 1.7e9, "current_node": "b", "mapping": {
        "a": {"parent": None, "message": {"author": {"role": "user"}, "create_time": 1.7e9, "recipient": "all",
              "content": {"content_type": "text", "parts": ["I like tea", {"text": "x"}]}, "metadata": {}}},
        "b": {"parent": "a", "message": {"author": {"role": "assistant"}, 
              "content": {"parts": ["Fine \ue200cite\ue201"]}}}}},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": {"value": "My cat is Tiger"}}]},
                  {"role": "assistant", "content": None, "refusal": "no", "tool_calls": []}]}]
_episode = conversations.make_history([[("user", "I drink tea now."), ("assistant", "Good.")]])
_episode = conversations.Episode(_episode, conversations.Query("What do I drink?"), answer="tea", evidence={1}, id="e1")
_trajectory = mdp.example_group()[0].to_json()
_locomo = {"sample_id": "c1", "conversation": {"speaker_a": "Ana", "speaker_b": "Bo", "session_1": [
    {"speaker": "Ana", "dia_id": "D1:1", "text": "Hi"}, {"speaker": "Bo", "dia_id": "D1:2", "text": "Hello"}],
    "session_1_date_time": "1 May"}, "qa": [{"question": "Who?", "answer": "Ana", "evidence": ["D1:1"], "category": 1}]}
_longmem = {"question_id": "q1", "question_type": "single", "question": "What?", "answer": "tea", "question_date": "",
            "haystack_sessions": [[{"role": "user", "content": "tea", "has_answer": True}]],
            "haystack_session_ids": ["a"], "haystack_dates": ["2023/05/01 (Mon) 10:00"], "answer_session_ids": ["a"]}
_prefeval = {"preference": "I like tea", "question": "What now?", "classification_task_options": ["tea", "coffee"],
             "conversation": {"1": {"user": "I like tea", "assistant": "ok"}}}
_memoryctrl = [{"sample_id": "u", "conversation": ["Side_Note: 01/02/2024", "User: help me", "Assistant: yes"]},
               {"sample_id": "u", "qa_family": "f", "question": "What?", "choice_a": "x", "choice_b": "y",
                "correct_choice": "a", "user_turn": "help me", "timestamp": "01/02/2024"}]
_constraint = {"when": "a sum is asked for", "enforce": "add all parts", "avoid": "rounding early",
               "category": "algebra", "subcategory": "sums", "support": 2, "models": ["a"], "status": "active",
               "source": {"pairs": [{"task": "h1", "preferred": 1}]}}
_bank = {"format": "comam_nb constraint bank", "format_version": 1, "bank_version": 1, "entries": [_constraint]}
_tasks = [{"id": "a", "prompt": "1+1?", "check": {"kind": "math", "answer": "2"}},
          {"id": "b", "prompt": "f", "check": {"kind": "code", "tests": ["assert f(1) == 2"], "setup": "import math"}}]
_item = {"id": "m1", "user": "ana", "text": "Likes tea", "granularity": "fine", "cites": [1, 2],
         "created": "", "by": ""}
_attempt = dict(task_id="a", task_hash="h", solver="s", model="m", messages=[{"role": "user", "content": "x"}],
                verdict={"passed": True, "reason": "passed"}, memory=["x"])
_reply = {"choices": [{"message": {"role": "assistant", "content": "tea", "reasoning_content": None},
                       "finish_reason": "stop"}], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
_csv = ("persona_id,question_id,question_type,user_question_or_message,correct_answer,all_options,shared_context_id,"
        "end_index_in_shared_context\n0,q,recall,User: hi,(a),\"['(a) x', '(b) y']\",c,2\n")
_contexts = json.dumps({"c": [{"role": "system", "content": "s"}, {"role": "user", "content": "User: hi"}]}).encode()
_texts = ["<think>Ana [1]</think>Likes tea. [1]\n- Has a cat named Miso [2, 3]\n",
          "<information> tea [1] </information> <final_answer> tea </final_answer>",
          "When a sum is asked for, enforce adding all parts; avoid rounding early.\n1. When x, ensure y; never z.",
          "The answer is \\boxed{\\frac{1}{2}}.\n#### 18\n<answer>12</answer> so 1,000 and twenty-one",
          "Here:\n```python\ndef f(x):\n    return x + 1\n```\nand ~~~\nimport os\n~~~",
          "ADD [2]\nUPDATE [1] [2]\nNOOP",
          "我每天喝咖啡。 Ana’s brother's [asy] draw(); [/asy] 1/2! 【3†source】 [turn 4] (5)"]

def lines_of(*records): return b"".join(json.dumps(r).encode() + b"\n" for r in records)
def whole(*records): return [json.dumps(r).encode() for r in records] + [json.dumps(list(records)).encode()]

# ---- calls that need more than one argument

def _bank_import(path):
    with bank.ConstraintBank() as b:
        b.import_(path, trust=True)
        b.import_(path)
        b.retrieve("a sum")

def _store_row(value):
    try: value = (value if isinstance(value, str) else json.dumps(value)).encode("utf-8", "replace").decode()
    except (TypeError, ValueError, RecursionError): return # no row can hold it
    with items.MemoryStore() as store:
        store.add(items.MemoryItem(user="ana", text="Likes tea", cites=[1]))
        with store.file.transaction(write=True) as db:
            db.execute("UPDATE items SET cites=?", (value,))
        store.items("ana")
        store.search("tea", "ana", 1)

def _thaw(value):
    if not isinstance(value, list) or len(value) != 2: return
    import zlib
    try: layout, data = json.dumps(value[0]), bytes(x % 256 for x in value[1])
    except (TypeError, ValueError, RecursionError): return
    found = lexical._thaw(zlib.crc32(data, zlib.crc32(layout.encode(), lexical._CUT)), layout, data, 1)
    if found is not None:
        found.scores("tea sum", "tfidf"), found.scores("tea sum", "bm25"), found.fits("a", {"h1"}, {"active"})
        for i in range(min(found.n, 3)): found.samples_of(i)

def _frozen():
    entries = [(1, ["tea", "sum"], ["s1"], ["h1"], ["a"], ["active"]), (2, ["sum"], ["s2"], ["h2"], ["b"], ["active"])]
    _, layout, data = lexical.Bucket.of(entries, 1).freeze()
    return [json.loads(layout), list(data)]

def _cloze(text): chat_logs.cloze_queries(conversations.make_history([[("user", text)]]), 3)
def _constraint_of(text):
    task = tasks.Task("a", "Natalia's shop sold 48 clips. " + text, check={"kind": "math", "answer": "72"})
    for c in constraints.parse_constraints(text)[0][:20]: constraints.validate(c, task)
def _task_words(text):
    c = constraints.Constraint("a sum is asked for", "add all parts")
    constraints.validate(c, tasks.Task("a", text or "x", check={"kind": "math", "answer": "72"}))
def _math(text):
    answer, _ = math_answers._final_answer(text)
    if answer is not None and len(answer) <= 1000:
        for gold in ("18", r"\frac{1}{2}", "[1,2)"): math_answers._decide(gold, math_answers._latex(answer))
def _code(text):
    code = code_answers._extract_code(text, ["f"])
    code_answers._complete_code(code, "import math\n\n\ndef f(x):\n    'Add.'\n", "f")
    code_answers._without_demo(code), code_answers._finished(text, code, ["f"])
def _scores(text):
    for match in ("auto", "contains", "f1", "choice"): scores.answer_reward(text, "tea", match, text)
    scores.answer_reward(text, conversations.Episode(_episode.history, _episode.query, answer="tea", evidence={1},
                                                     meta={"benchmark": "locomo", "category": 1}))
def _said(text):
    attempts._split_action(text), showing.quote(text), chat.Reply(text)
def _sorted(text):
    taxonomy.classify(text, taxonomy={"a": ("b", "c"), "d": ("e",)})
    taxonomy._parse_choice(text, ["Algebra", "Geometry"])
def _memory(text): memory_r1._read_operations(text, 3, 3, 5)
def _notes(text):
    handles = {1: (1,), 2: (3,), 3: (5, 7)}
    agents._parse_notes(text, handles, 10), agents.parse_answer(text, handles)

_data, _collab, _plain = (errors.DataError,), (errors.MemCollabError,), (ValueError, KeyError, TypeError)

def _targets():
    file, T = file_of, Target
    chats = [*whole(*_chats), lines_of(*_turns), lines_of(*_chats)]
    chatml = b"<|im_start|>user name=Ana\nI live in Porto<|im_end|>\n<|im_start|>assistant\nNice<|im_end|>"
    contexts = PLACE / "contexts.jsonl"
    contexts.write_bytes(_contexts)
    questions = PLACE / "questions.csv"
    questions.write_text(_csv)
    by_file = {
        "read_chat .json": (".json", chat_logs.read_chat, chats, _data),
        "read_chat .jsonl": (".jsonl", chat_logs.read_chat, chats, _data),
        "read_chat .txt": (".txt", chat_logs.read_chat, [chatml], _data),
        "read_history": (".json", chat_logs.read_history, chats, _data),
        "read_locomo": (".json", lambda p: locomo.read_locomo(p, "keep"), whole(_locomo), _data),
        "read_longmemeval": (".json", longmemeval.read_longmemeval, whole(_longmem), _data),
        "read_prefeval": (".json", prefeval.read_prefeval, whole(_prefeval), _data),
        "read_memoryctrl": (".jsonl", memoryctrl.read_memoryctrl, [lines_of(*_memoryctrl)], _data),
        "read_personamem questions": (".csv", lambda p: personamem.read_personamem(p, contexts),
                                      [_csv.encode()], _data),
        "read_personamem contexts": (".jsonl", lambda p: personamem.read_personamem(questions, p), [_contexts], _data),
        "load_episodes": (".jsonl", reading.load_episodes, [lines_of(_episode.to_json())], _data),
        "read_trajectories": (".jsonl", mdp.read_trajectories, [lines_of(_trajectory)], _data),
        "load_tasks": (".jsonl", task_files.load_tasks, [lines_of(*_tasks)], _collab),
        "load_gsm8k": (".jsonl", task_files.load_gsm8k,
                       [lines_of({"question": "q", "answer": "x #### 1,000"})], _collab),
        "load_math500": (".jsonl", task_files.load_math500, [lines_of({"problem": "p", "answer": "1", "subject": "a",
                                                                       "unique_id": "u"})], _collab),
        "load_mbpp": (".json", lambda p: task_files.load_mbpp(p, show="signature"), whole(
            {"prompt": "p", "code": "def f(x): return x", "test_list": ["assert f(1) == 1"], "task_id": 11,
             "test_imports": ["import math"]}), _collab),
        "load_humaneval": (".jsonl", task_files.load_humaneval, [lines_of(
            {"task_id": "t", "prompt": "def f(x):\n", "entry_point": "f", "test": "def check(c): assert c(1)"})],
                           _collab),
        "import of a bank": (".json", _bank_import, whole(_bank, _constraint), _collab),
        "import of a bank .jsonl": (".jsonl", _bank_import, [lines_of(_constraint, _constraint)], _collab),
        "import of a memory": (".jsonl", cli_memory._read_rows,
                               [lines_of({"item": _item}, {"read": ["ana", "1 ab", 1, 2]})],
                               (folder.CommandError,)),
        "journal of attempts": (".jsonl", lambda p: files.read_lines(p.read_bytes(), p, attempts.Attempt.from_json,
                                                                     '{"task_id"', "attempt"),
                                [lines_of(_attempt)], _collab),
        "results": (".json", results._read_results, [json.dumps({"outcomes": [dict(
            arm="a", solver="s", seed=0, task="t", hash="h", category="", right=True, turns=1, prompt_tokens=1,
            completion_tokens=1, seconds=1.0, memory=0, reason="")], "notes": [], "about": {}}).encode()], _collab),
        "run of a benchmark": (".jsonl", bench.read_run, [lines_of({"run": {"a": 1}}, {"id": "q"})], _data),
        "failed step": (".safetensors", failed_step.StepRecord.load, [_failed_step()], _data),
        "checkpoint's file .json": (".json", files._torn_file, whole(_item), ()),
        "checkpoint's file .safetensors": (".safetensors", files._torn_file, [_failed_step()], ()),
        "run's json": (".json", lambda p: folder._whole_json(p, lambda line: None), whole(_item), ()),
        "run's metrics": (".jsonl", lambda p: folder._whole_lines(p, lambda line: None), [lines_of({"step": 1})], ())}
    out = {n: T(file(suffix, read), seeds, known, "bytes") for n, (suffix, read, seeds, known) in by_file.items()}
    by_value = {
        "Message": (conversations.Message.from_json, [_turns[0]], _data),
        "Episode": (conversations.Episode.from_json, [_episode.to_json()], _data),
        "Query": (conversations.Query.from_json, [_episode.query.to_json()], _data),
        "Action": (agents.Action.from_json, [_trajectory["transitions"][0]["action"]], _plain),
        "Trajectory": (mdp.Trajectory.from_json, [_trajectory], (*_plain, AttributeError)),
        "Constraint": (constraints.Constraint.from_json, [_constraint], _collab),
        "Task": (tasks.Task.from_json, _tasks, _collab),
        "MemoryItem": (items.MemoryItem.from_json, [_item], (errors.StoreError,)),
        "Attempt": (attempts.Attempt.from_json, [_attempt], (*_plain, AttributeError)),
        "validate_check": (lambda v: tasks.validate_check(v, "here"), [t["check"] for t in _tasks], _collab),
        "merge": (lambda v: constraints.merge([constraints.Constraint.from_json(x) for x in v] if isinstance(v, list)
                                              else []), [[_constraint, _constraint]], _collab),
        "forget": (lambda v: items.MemoryStore().forget(v), ["ana", ["ana"]], (errors.StoreError,)),
        "a stored row's cites": (_store_row, ["[1, 2]", [1]],
                                 (errors.StoreError,)),
        "parse_options": (reading.parse_options, ["['(a) x', '(b) y']", ["x", "y"]], _data),
        "forged arrays of a bank": (_thaw, [_frozen()], ()),
        "sampler's state": (lambda v: sampler.PrioritySampler(4).load_state_dict(v),
                            [sampler.PrioritySampler(4).state_dict()], (errors.CreditError,)),
        "make_history": (conversations.make_history, [[[["user", "x"]]]], _data)}
    out |= {n: T(call, seeds, known, "value") for n, (call, seeds, known) in by_value.items()}
    out |= {n: T(call, _texts, known) for n, (call, known) in TEXT.items()}
    out["reply of a server"] = T(endpoints._read_reply, whole(_reply), (ValueError,), "bytes")
    return out

TEXT = { # functions of a text: what never fails has no documented exception
    "without_thinking": (chat.without_thinking, ()),
    "read_citations": (lambda t: citations.read_citations(t, range(1, 9)), ()),
    "notes and answers": (_notes, ()), "operations": (_memory, ()), "constraints": (_constraint_of, ()),
    "task's words": (_task_words, _collab), "math answer": (_math, ()), "exact answer": (
        lambda t: math_answers.check_exact("tea", t), ()), "code answer": (_code, ()),
    "tests of a task": (lambda t: code_answers.called_names([t]), ()),
    "content words": (words.content_words.__wrapped__, ()),
    "terms": (lexical.terms, ()), "cloze questions": (_cloze, _data), "scores": (_scores, ()), "messages": (_said, ()),
    "kind of task": (_sorted, ()), "clean_text": (fields.clean_text, ()), "readable": (chat_logs._readable, ()),
    "evidence": (lambda t: locomo._locomo_evidence([t], {"D1:1": 1}), ()),
    "settings of a model": (lambda t: recorded._settings(t, t), _collab),
    "moment": (chat_logs._moment, ()), "pieces": (lambda t: unspaced.script_pieces(t, 1, 2), ())}

def _failed_step():
    import torch
    path = PLACE / "seed.safetensors"
    failed_step.StepRecord(1, [_episode], {"credit": "equal"}, {"profile/w": torch.ones(2)}, None,
                           ([[[1.0, 0.0]]], [[1.0, 0.0]])).save(path)
    return path.read_bytes()

# ---- changes

_DEEP, _STEEP, _LONG = "\x00deep\x00", "\x00steep\x00", "\x00long\x00" # stand for what json.dumps cannot write
_ODD = [None, True, False, 0, -1, 2**63, 2**64, 10**40, 1e308, -0.0, float("nan"), float("inf"), "", " ", "\0",
        "\ud800", "\udfff\ud800", "a\u0000b", "\u202e", "\ue200", "9" * 5000, [], {}, [[]], [None], {"a": None}, "user",
        "assistant", "[1]",
        "[" * 200, "<think>", "</think>", "\\boxed{", "```", "2024-13-45", "9999999999999", "-1e400", "é", "咖啡"]

def _nodes(value, path=()):
    yield path
    if len(path) > 12: return # deep enough
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for k, v in inner: yield from _nodes(v, (*path, k))

def _at(value, path):
    for k in path: value = value[k]
    return value

def _put(value, path, new):
    if not path: return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _put(value[path[0]], path[1:], new)
    return copy

def change_value(value, rng, in_file):
    "A JSON value with some of its parts replaced."
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        paths = list(_nodes(value))
        path = rng.choice(paths)
        old, other = _at(value, path), _at(value, rng.choice(paths))
        how = rng.randrange(9)
        new = old
        if how < 3: new = rng.choice(_ODD)
        elif how == 3: new = other
        elif how == 4: new = [old] * rng.choice((0, 1, 3))
        elif how == 5: new = {rng.choice(("a", "", "role", "\ud800")): old}
        elif how == 6 and isinstance(old, dict) and old:
            gone = rng.choice(list(old))
            new = {k: v for k, v in old.items() if k != gone}
        elif how == 7: new = rng.choice((_DEEP, _STEEP, _LONG) if in_file else
                                        (deep(), deep(900), 10**5000, {1: 2, None: 3}))
        elif how == 8 and isinstance(old, str): new = change_text(old, rng)
        value = _put(value, path, new)
    return value

def deep(n=3000):
    value = []
    for _ in range(n): value = [value]
    return value

_PIECES = [" ", "\n", "\t", "\0", "[", "]", "(", "{", "}", "`", "```\n", "~~~\n", "#", "<think>", "</think>",
           "<information>", "<final_answer>", "</final_answer>", "[1]", "[1", "【", "†",
           ":contentReference[oaicite:", "\ue200", "\ue201",
           "When x", "When x, enforce y", "a'", "A's", ". ", "\n\n", "def f", "x = ", "a: b", "answer is ", "\\boxed{",
           "\\boxed", "\\frac{", "^", "1,", "twenty ", "D1", "D ", ":", "<|im_start|>", "<|im_end|>", "[asy]", "[/asy]",
           "enforce ", '{"a":', "@", "-", "_", "*", "0", "9", "咖", "\ud800", "\r", "\x1b[31m", "\u202e", "/", '"', "'",
           "=",
           "ADD [1] ", "import ", "input()", "async ", "lambda:", "½", "．", ",", "|", "Ab", ".,", "th", "=-"]

def change_text(text, rng):
    "A text with pieces put in, taken out, doubled or repeated many times."
    for _ in range(rng.choice((1, 1, 2, 5))):
        i, j = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        piece = rng.choice(_PIECES)
        text = rng.choice((text[:i] + piece + text[i:], text[:i] + piece * rng.choice((2, 30, 900)) + text[i:],
                           text[:i] + text[j:], text[:j] + text[i:], text[:i] + chr(rng.randrange(0x110000)) + text[j:],
                           text[:i] + piece + text[j:]))
    return text[:20000]

def _written(value):
    text = json.dumps(value, ensure_ascii=True)
    if "\\u0000" in text:
        text = text.replace(json.dumps(_DEEP), "[" * 100_000 + "]" * 100_000).replace(json.dumps(_LONG), "9" * 5000)
        text = text.replace(json.dumps(_STEEP), "[" * 900 + "]" * 900) # is read, and then too deep for repr and copies
    return text.encode()

def change_bytes(data, rng):
    "A file's content, changed as JSON, line by line, as a text or as bytes."
    how = rng.randrange(6)
    try:
        if how < 4:
            lines = data.split(b"\n")
            i = rng.randrange(len(lines))
            if lines[i].strip():
                lines[i] = _written(change_value(json.loads(lines[i]), rng, True))
                return b"\n".join(lines)
    except ValueError: pass
    if how == 4: return change_text(data.decode("utf-8", "surrogateescape"), rng).encode("utf-8", "surrogatepass")
    out = bytearray(data)
    for _ in range(rng.choice((1, 3, 20))):
        if not out: break
        i = rng.randrange(len(out))
        which = rng.randrange(4)
        if which == 0: out[i] ^= 1 << rng.randrange(8)
        elif which == 1: del out[i:i + rng.choice((1, 2, 50))]
        elif which == 2: out[i:i] = rng.choice((b"\xff", b"\0", b"\n", b"[", b"\xef\xbb\xbf", b"\xed\xa0\x80"))
        else: out[i:i] = out[:rng.randrange(1, 40)]
    return bytes(out)

def change(target, rng):
    "A damaged input of a target."
    seed = rng.choice(target.seeds)
    if target.kind == "bytes": return change_bytes(seed, rng)
    return change_text(seed, rng) if target.kind == "text" else change_value(seed, rng, False)

# ---- running

class Late(BaseException): pass

@contextlib.contextmanager
def clock(seconds):
    "Inside, `Late` comes after so many seconds."
    def ring(*_): raise Late
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

def fault_of(target, data):
    "(kind and place, traceback) of an undocumented exception; None if all is well."
    try:
        with clock(CLOCK): target.call(data)
    except target.errors: return None
    except Late: return f"more than {CLOCK} s", ""
    except (KeyboardInterrupt, SystemExit): raise
    except BaseException as e:
        own = [f for f in traceback.extract_tb(e.__traceback__) if f"{os.sep}comam_nb{os.sep}" in f.filename]
        where = f"{Path(own[-1].filename).name}:{own[-1].name}" if own else "?"
        return f"{type(e).__name__} in {where}", "".join(traceback.format_exception(e))[-1500:]
    return None

def shorter(target, data, kind):
    "The same fault from a shorter text or file, if cutting pieces out leaves it."
    if not isinstance(data, (bytes, str)): return data
    step, tries = max(1, len(data) // 2), 0
    while step and tries < 150:
        i = 0
        while i < len(data) and tries < 150:
            part, tries = data[:i] + data[i + step:], tries + 1
            found = fault_of(target, part)
            if found and found[0] == kind: data = part
            else: i += step
        step //= 2
    return data

@dataclass
class Outcome:
    "What a target did with its inputs."
    inputs:int=0
    faults:dict=field(default_factory=dict) # kind -> (shortest input, traceback)
    counts:Counter=field(default_factory=Counter)
    slowest:float=0.0 # seconds
    slow:object=b"" # its input

def one(target, data, out):
    "Feed one input, and note what came of it."
    start = time.process_time()
    found = fault_of(target, data)
    seconds = time.process_time() - start
    out.inputs += 1
    if seconds > out.slowest: out.slowest, out.slow = seconds, data
    if not found: return
    kind, trace = found
    out.counts[kind] += 1
    if kind not in out.faults: data = shorter(target, data, kind)
    if kind not in out.faults or len(shown(data)) < len(shown(out.faults[kind][0])): out.faults[kind] = data, trace

def shown(data):
    try: return repr(data)
    except (RecursionError, ValueError): return "<a value too deep or too long to show>"

def run(targets, inputs, seconds=None, seed=0, say=lambda line: None):
    "So many inputs over all targets in turn, or until the time is over; name -> `Outcome`."
    rng, out, end = random.Random(seed), {n: Outcome() for n in targets}, time.monotonic() + (seconds or float("inf"))
    done, told = 0, time.monotonic()
    while done < inputs and time.monotonic() < end:
        for name, target in targets.items():
            for _ in range(min(20, inputs - done)):
                one(target, change(target, rng), out[name])
                done += 1
        if time.monotonic() - told > 60:
            told = time.monotonic()
            said = [f"{name}: {kind}, {n} times" for name, o in out.items() for kind, n in o.counts.items()]
            say("; ".join([f"{done} inputs, {sum(sum(o.counts.values()) for o in out.values())} faults", *said]))
    return out

def report(out):
    "The table, and the faults below it."
    lines = [f"{'target':32} {'inputs':>8} {'undocumented':>12} {'slowest':>9}"]
    lines += [f"{n:32} {o.inputs:8} {sum(o.counts.values()):12} {o.slowest:8.3f}s" for n, o in out.items()]
    lines.append(f"{'all':32} {sum(o.inputs for o in out.values()):8} "
                 f"{sum(sum(o.counts.values()) for o in out.values()):12} "
                 f"{max((o.slowest for o in out.values()), default=0):8.3f}s")
    for n, o in out.items():
        for kind, (data, trace) in o.faults.items():
            lines += ["", f"{n}: {kind}, {o.counts[kind]} times; shortest input {shown(data)[:300]}", trace]
    return "\n".join(lines)

def with_atheris(name, inputs):
    "One target, whose changes atheris chooses; ends the process."
    import atheris
    target = _targets()[name]
    def feed(data):
        if target.kind == "text": data = data.decode("utf-8", "surrogateescape")
        elif target.kind == "value":
            try: data = json.loads(data)
            except (ValueError, RecursionError): return
        found = fault_of(target, data)
        if found: raise RuntimeError(f"{found[0]}: {shown(data)[:500]}\n{found[1]}")
    corpus = PLACE / "corpus"
    corpus.mkdir()
    for i, seed in enumerate(target.seeds):
        (corpus / str(i)).write_bytes(seed if isinstance(seed, bytes) else seed.encode() if target.kind == "text"
                                      else json.dumps(seed).encode())
    atheris.instrument_all()
    atheris.Setup([sys.argv[0], f"-runs={inputs}", "-rss_limit_mb=0", f"-artifact_prefix={PLACE}/", str(corpus)], feed)
    atheris.Fuzz()

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--inputs", type=int, default=20_000, help="over all targets (default 20,000)")
    p.add_argument("--seconds", type=float, help="stop after so long")
    p.add_argument("--target", help="only those with this in their name")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--atheris", action="store_true", help="one --target, guided by coverage")
    args = p.parse_args(argv)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    targets = {n: t for n, t in _targets().items() if not args.target or args.target in n}
    if not targets: p.error(f"no target has {args.target!r} in its name; they are {', '.join(_targets())}")
    if args.atheris: return with_atheris(next(iter(targets)), args.inputs)
    start, began = time.monotonic(), time.process_time()
    out = run(targets, args.inputs, args.seconds, args.seed, lambda line: print(line, file=sys.stderr, flush=True))
    print(f"python scripts/fuzz.py {' '.join(sys.argv[1:] if argv is None else argv)}")
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}; "
          f"{time.monotonic() - start:.0f} s by the clock, {time.process_time() - began:.0f} s of the processor")
    print(report(out))
    return int(any(o.faults for o in out.values()))

if __name__ == "__main__":
    try: sys.exit(main())
    finally:
        import shutil
        shutil.rmtree(PLACE, ignore_errors=True)
