"""Exercises: right answers are right, the known wrong ones are told why, and chapters, checks and solutions agree."""
import json, re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from comam_nb import exercises
from comam_nb.base.errors import DataError
from comam_nb.exercises import exercise

NBS = Path(__file__).parents[1] / "nbs"
ALL = exercises._EXERCISES
QUIZZES = {"I": "10_memory", "II": "14_transfer", "III": None} # of each part; the third is in a walkthrough

def asked_in(folder, call):
    found = {}
    for path in sorted((NBS / folder).glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        found[path.stem] = re.findall(call + r'\("([^"]+)"', code)
    return found

@pytest.mark.parametrize("name", ALL)
def test_right_answers_are_right_and_typical_wrong_ones_are_explained(name):
    asked = ALL[name]
    assert exercise(name, asked.right) and exercise(name, asked.right).why == asked.why
    for wrong, why in asked.typical:
        mark = exercise(name, wrong)
        assert mark.right is False and mark.why == why
    assert exercise(name).right is None and exercise(name, ...).right is None
    for nonsense in ("zebra", 1e9, [], None, {}):
        assert not exercise(name, nonsense)

@pytest.mark.parametrize("name", [n for n, e in ALL.items() if e.cases])
def test_functions_that_fail_are_told_on_what(name):
    def broken(*args): raise KeyError("oh")
    assert "KeyError: 'oh'" in exercise(name, broken).why
    assert exercise(name, lambda *args: ...).right is None
    assert exercise(name, lambda *args: "zebra").right is False
    assert "without calling" in exercise(name, 3).why

def by_tensors(local, glob): # 7.3, as a scheme of the chapter is written
    if glob.all() or not glob.any(): return torch.full(local.shape[:1], 1 / len(local))
    d = (local[:, glob == 1].mean(-1) - local[:, glob == 0].mean(-1)).clamp(min=0)
    return d / d.sum() if d.sum() > 0 else torch.full_like(d, 1 / len(d))

def without_own(rewards): # 3.2
    r = np.array(rewards)
    return (r.sum() - r) / (1 - len(r)) + r

IN_OTHER_WORDS = [ # right answers that nobody would refuse
    ("1.3", {5}), ("1.4", .97), ("2.1", .14), ("2.2", range(4, 7)), ("2.2", iter([4, 5, 6])), ("2.3", 9),
    ("3.1", [Fraction(3, 4), *[Fraction(-1, 4)] * 3]), ("3.1", torch.tensor([3., -1, -1, -1]) / 4),
    ("3.2", without_own),
    ("3.4", "(B)"), ("4.2", lambda numbers, handles: set().union(*(handles[n] for n in numbers if n in handles))),
    ("4.3", lambda text: (re.findall(r"(?is)<verdict>\s*(yes|no)\s*</verdict>", text) or [""])[0].lower()),
    ("6.1", 14 / 15), ("6.2", lambda a, b: 1 if a == b else 2 * len(a & b) / (len(a) + len(b))),
    ("7.1", .92), ("7.2", "b."), ("7.3", by_tensors), ("8.1", .016), ("8.2", -.001), ("8.3", lambda a, t: a / t.sum()),
    ("11.2", 5 / 8), ("12.1", lambda w, s: {True: "ws", False: "sw"}[w]), ("13.1", 57.6), ("14.1", .38)]

@pytest.mark.parametrize("name, answer", IN_OTHER_WORDS)
def test_right_answers_in_other_words_are_right(name, answer): assert exercise(name, answer)

@pytest.mark.parametrize("name, answer, why", [
    ("2.2", range(5, 8), "There the tokens stand"), ("3.4", "(d)", "goes on"), ("2.3", 16.0, "16 times less often"),
    ("8.2", .001, "wrong sign"), ("6.4", lambda items, turns: {max(i.cites) for i in items if i.cites} & {*range(1, 9)},
                                  "first keep what exists"),
    ("7.3", lambda local, glob: local[:, glob == 1].mean(-1) - local[:, glob == 0].mean(-1), "On "),
    ("10.1", lambda facts: facts.tolist(), "AttributeError: 'list' object has no attribute 'tolist'"),
    ("3.2", lambda rewards: rewards.nothing, "'list' object has no attribute 'nothing'")])
def test_wrong_answers_in_other_words_are_still_told_why(name, answer, why):
    mark = exercise(name, answer)
    assert mark.right is False and why in mark.why

def quiz_of(name): return name.split(".")[0] in QUIZZES

def test_chapters_checks_and_solutions_hold_the_same_exercises():
    chapters, solutions = asked_in("book", "exercise"), asked_in("solutions", "solved")
    for chapter, names in chapters.items():
        assert sorted(names) == sorted(set(names))
        own = [n for n in names if not quiz_of(n)]
        assert all(n.split(".")[0] == str(int(chapter[:2])) for n in own), (chapter, names)
        assert sorted(solutions.get(chapter, [])) == sorted(names), chapter
    walks = [n for names in asked_in("walkthroughs", "exercise").values() for n in names]
    assert walks == solutions["part_three"]
    assert sorted([n for names in chapters.values() for n in names] + walks) == sorted(ALL)

def test_each_part_ends_with_a_quiz_of_five_questions():
    asked = asked_in("book", "exercise") | asked_in("walkthroughs", "exercise")
    for part, where in QUIZZES.items():
        quiz = [f"{part}.{i}" for i in range(1, 6)]
        assert [n for n in ALL if n.split(".")[0] == part] == quiz
        [found] = [names for names in asked.values() if quiz[0] in names]
        assert found[-5:] == quiz and (where is None or found is asked[where])
        for n in quiz: # one word, letter or number, and at least two answers that miss
            assert isinstance(ALL[n].right, (str, int, float)) and len(ALL[n].typical) >= 2

def test_what_does_not_exist_is_named():
    with pytest.raises(DataError, match="no exercise '3.x'"): exercise("3.x", 1)
