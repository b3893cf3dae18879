"The transfer matrix, the divergence of errors and the bias probe: they find what is there and nothing else."
import json, math, random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import entropy

from comam_nb.base.errors import MemCollabError
from comam_nb.checks.constraints import Constraint
from comam_nb.checks.sandbox import Verdict
from comam_nb.checks.tasks import Task
from comam_nb.lm.chat import Reply
from comam_nb.memcollab.attempts import Attempt, Solver
from comam_nb.memcollab.effects import OfflineDistiller
from comam_nb.memcollab.results import compare
from comam_nb.memcollab.transfer import run_arms
from comam_nb.studies.bias_probe import (Written, _bayes_weights, _concordance, _shuffled, bias_probe,
                                         _constraint_texts,
                                         _raw_texts)
from comam_nb.studies.transfer_matrix import _divergences, _error_divergence, transfer_arms, transfer_matrix

OPS = {"up": ("add one", "take one"), "down": ("take one", "add one")} # category: (right, tempting)


def make(n, first=0):
    check = lambda c, i: {"kind": "exact", "answer": str(i + (1 if c == "up" else -1))}
    task = lambda c, i: Task(f"{c} {i}", f"Go {c} from {i}.", c, "", check(c, i), "toy")
    return [task(c, i) for i in range(first, first + n) for c in OPS]


class Agent:
    "Right in one category, mostly; obeys the first lesson that it reads."
    workers = 1
    def __init__(self, name, good): self.name, self.good = name, good
    def chat(self, messages, max_tokens=512, temperature=0.0, seed=None):
        text = messages[-1]["content"]
        memory, _, question = text.rpartition("Task:\n")
        category, i = question.split()[1], int(question.split()[3].rstrip("."))
        right, wrong = OPS[category]
        op = right if random.Random(f"{seed} {text}").random() < (.8 if category == self.good else .35) else wrong
        told = [o for line in memory.splitlines() for o in OPS[category] if f"enforce {o}" in line]
        x = i + (1 if (told or [op])[0] == "add one" else -1)
        return Reply(f"{op}\n{self.name} says so\nThe answer is {x}", len(text.split()), 7)


def agents():
    return [Solver(n, Agent(f"model-{n}", good), "plain", temperature=1.0) for n, good in (("a", "up"), ("b", "down"))]


# whose memory helps whom

def test_the_matrix_holds_the_arms_numbers_and_draws_small(tmp_path):
    s = agents()
    arms = [*transfer_arms(s), "self", "other", *transfer_arms(s, "contrast")[1:-1]]
    r = run_arms(make(16), make(6, 100), s, arms, distiller=OfflineDistiller())
    m = transfer_matrix(r)
    assert m.givers == ["raw from a", "raw from b", "memcollab"] and m.users == ["a", "b"]
    assert m.accuracy[0, 0] == compare(r, "a", "self").mean and m.accuracy[1, 0] == compare(r, "a", "other").mean
    assert m.difference[1][0] == compare(r, "a", "other").difference
    assert json.loads(json.dumps(m.to_json()))["difference"][1][0]["mean"] == m.difference[1][0].mean
    assert "contrast from a" in repr(transfer_matrix(r, "contrast")) and f"{m.difference[1][0]:+.3f}" in repr(m)
    m.plot().figure.savefig(tmp_path / "m.png")
    assert (tmp_path / "m.png").stat().st_size < 100_000


def test_a_matrix_of_what_was_not_run_is_refused():
    r = run_arms(make(4), make(2, 100), agents(), ["vanilla"], distiller=OfflineDistiller())
    with pytest.raises(MemCollabError, match="transfer_arms"): transfer_matrix(r)
    with pytest.raises(MemCollabError, match="what is 'x'"): transfer_arms(agents(), "x")
    stranger = transfer_arms([Solver("z", Agent("model-z", "up"), "plain")])[1]
    with pytest.raises(MemCollabError, match="no solver 'z'"):
        run_arms(make(4), make(2, 100), agents(), [stranger], distiller=OfflineDistiller())


# in which ways categories fail

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6))
def test_the_divergence_is_that_of_the_formula(counts):
    p, q = (np.array(x, float) + (i == 0) for x in zip(*counts) for i in (0,))
    p, q = p / p.sum(), q / q.sum()
    expected = entropy((p + q) / 2, base=2) - (entropy(p, base=2) + entropy(q, base=2)) / 2
    matrix, mean = _divergences(np.array([p, q]))
    assert mean == matrix[0, 1] == matrix[1, 0] == pytest.approx(expected, abs=1e-9) and 0 <= mean <= 1 + 1e-12


def test_error_divergence_counts_what_is_there():
    def attempt(task, reason, sample=0):
        return Attempt(task.id, task.hash, "s", "m", sample, verdict=Verdict(reason == "passed", reason))
    tasks = make(40)
    same = [attempt(t, "timeout" if random.Random(t.id).random() < .5 else "error: NameError: x") for t in tasks]
    apart = [attempt(t, "timeout" if t.category == "up" else "wrong answer: 3") for t in tasks]
    flat, sharp = _error_divergence(same, tasks), _error_divergence(apart + [attempt(tasks[0], "passed", 1)], tasks)
    assert flat.types == ["error: NameError", "timeout"]
    assert flat.p > .05 and flat.null.low <= flat.mean <= flat.null.high
    assert sharp.mean == 1 and sharp.p < .01 and sharp.counts.sum() == len(tasks)
    assert json.loads(json.dumps(sharp.to_json()))["counts"] == sharp.counts.tolist()
    with pytest.raises(MemCollabError, match="two or more"): _error_divergence([attempt(tasks[0], "timeout")], tasks)
    assert _divergences(np.array([[1., 2.], [0., 0.], [2., 4.]]))[1] == 0 # a category without errors says nothing


# who wrote it?

def probe(written, **more): return bias_probe({"": written}, **more)[0]


def test_texts_of_one_task_are_never_on_both_sides():
    "Every task has its own word, author and four texts: with one of them in training, the author would be known."
    rng = random.Random(0)
    word = lambda i: f"word{chr(97 + i // 26)}{chr(97 + i % 26)} common"
    written = [Written(word(i), a, f"t{i}", "c") for i in range(60) for a in [rng.choice("ab")] for _ in range(4)]
    assert probe(written, shuffles=30).within.mean < .65


def test_a_category_that_gives_the_author_away_is_no_style():
    rng, written = random.Random(1), []
    for i in range(120):
        c = rng.choice(["pages", "steps"])
        a = ("x" if c == "pages" else "y") if rng.random() < .8 else rng.choice("xy")
        written.append(Written(f"When {c}, enforce care.", a, f"t{i}", c))
    p = probe(written, shuffles=30)
    assert p.auc.low > .6 and (p.within.low, p.within.high) == (.5, .5) and p.p > .9


def test_shuffled_authors_give_one_half_and_keep_the_design():
    rng = random.Random(2)
    words = lambda: " ".join(rng.choice("red blue green warm cold loud".split()) for _ in range(6))
    written = [Written(words() + (" indeed" if a == "y" else ""), a, f"t{i}", "c") for i in range(50) for a in "xy"]
    p = probe(written, shuffles=60)
    assert p.within.mean > .95 and p.p < .02 and abs(p.null.mean - .5) < .05
    y = np.array([0, 1] * 20 + [1] * 6 + [0] * 4)
    g = np.array([i // 2 for i in range(40)] + [20, 20, 20, 21, 21, 21, 22, 22, 23, 24])
    z = _shuffled(y, g, np.random.default_rng(0))
    for k in range(20): assert sorted(z[g == k]) == [0, 1]
    for k in range(20, 25): assert len(set(z[g == k])) == 1


def test_the_auc_counts_pairs_of_a_fold():
    rng = np.random.default_rng(3)
    X, y, g = rng.poisson(1.5, (40, 8)).astype(float), rng.integers(0, 2, 40), rng.integers(0, 13, 40)
    fold = (np.random.default_rng(9).permutation(g.max() + 1) % 4)[g]
    good = n = 0
    for k in range(4):
        w = _bayes_weights(X[fold != k], y[fold != k])
        for i in np.flatnonzero((fold == k) & (y == 1)):
            for j in np.flatnonzero((fold == k) & (y == 0)):
                d = round(float(X[i] @ w - X[j] @ w), 9); n += 1; good += 1 if d > 0 else .5 if d == 0 else 0
    assert _concordance(X, y, g, folds=4, deals=1, seed=9).auc() == pytest.approx(good / n, abs=1e-6)


def test_texts_without_one_author_are_left_out_and_bad_probes_refused():
    p = lambda who, task: {"right_model": who, "task": task}
    sources = ([p("m", "1")], [p("m", "1"), p("n", "2")], [p("m", "1"), p("m", "2")], [])
    assert [w.author for w in _constraint_texts([Constraint("a", "b", source={"pairs": ps})
                                                 for ps in sources])] == ["m"]
    [task, _] = make(1)
    fine = Attempt(task.id, task.hash, "s", "m", messages=({"role": "assistant", "content": "add one"},))
    broken = Attempt(task.id, task.hash, "s", "m", error="too long")
    [w] = _raw_texts([fine, broken, Attempt("?", "?", "s", "m")], [task])
    assert (w.text, w.author, w.category) == (f"{task.prompt}\nSolution: add one", "m", "up")
    with pytest.raises(MemCollabError, match="texts of 1 authors"): probe([Written("x", "a", "t")])
    with pytest.raises(MemCollabError, match="mine has texts about 1 tasks"):
        bias_probe({"mine": [Written("x", "a", "t"), Written("x", "b", "t")]})
    [apart] = both = bias_probe({"apart": [Written("x y", a, f"t{i}", a) for i in range(6) for a in "ab"]}, shuffles=10)
    assert math.isnan(apart.within.mean) and apart.row[3] == "no pairs" and "no pairs" in repr(both)
    assert json.loads(json.dumps(apart.to_json()))["texts"] == [6, 6]
