"""Exercises: right answers are right, the known wrong ones are told why, and chapters, checks and solutions agree."""
import json, re
from pathlib import Path

import pytest

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
