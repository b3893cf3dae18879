"To find one's way: links, chapters by number, equations, minutes, pictures, and figures beside their logs."
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import equations  # noqa: E402
import figures  # noqa: E402
import links  # noqa: E402
import minutes  # noqa: E402
import pictures  # noqa: E402

INDEX = "\n".join("".join(c["source"]) for c in json.loads((ROOT / "nbs/index.ipynb").read_text("utf-8"))["cells"])


# ---- links

def test_every_link_leads_somewhere_and_every_chapter_is_a_link():
    assert [f"{p.relative_to(ROOT).as_posix()}: {why}" for p in links.pages() for why in links.problems(p)] == []

@pytest.mark.parametrize("text, why", [
    ("[x](nowhere.md)", "there is no such file"),
    ("[x](#no-such)", "there is no such heading"),
    ("[x](book/07_credit.ipynb#eq.-13)", "there is no such heading"),
    ("[x](code.py#L3)", "there is no such line"),
    ("as chapter 7 says", "make it a link"),
    ("in Walkthroughs 6 and 7", "make it a link"),
    ("## What chapter 15 says", "there is no such chapter"),
    ("[chapter 8](book/07_credit.ipynb)", "another number"),
    ("[walkthrough 7](book/07_credit.ipynb)", "another number"),
    ("[`08_credit`](book/07_credit.ipynb)", "another notebook"),
    ("[chapters 7](book/07_credit.ipynb) to [8](book/07_credit.ipynb)", "another notebook"),
    ("# x\n\n## Chapter 7: credit\n\n[chapter 7](book/07_credit.ipynb#Eq.-13:-who?), "
     "[07_credit](book/07_credit.ipynb), [its line](code.py#L2), [below](#chapter-7-credit), `chapter 9`, "
     "[out](https://a.b/c#d), ![p](code.py)", None),
])
def test_what_is_wrong_with_a_link_is_said(tmp_path, text, why):
    (tmp_path / "nbs" / "book").mkdir(parents=True)
    cell = {"cell_type": "markdown", "source": ["# Credit\n", "\n", "### `Eq. 13`: [who](x)?"]}
    (tmp_path / "nbs/book/07_credit.ipynb").write_text(json.dumps({"cells": [cell]}).replace("`Eq. 13`", "Eq. 13"))
    (tmp_path / "nbs/code.py").write_text("a\nb\n")
    page = tmp_path / "nbs/page.md"
    page.write_text(text)
    found = list(links.problems(page, tmp_path))
    assert [f.rpartition(": ")[2] for f in found] == ([why] if why else [])

def test_code_may_not_name_a_chapter_that_is_none(tmp_path):
    page = tmp_path / "x.ipynb"
    page.write_text(json.dumps({"cells": [{"cell_type": "code", "source": ["# see chapter 77 and chapter 7"]}]}))
    assert list(links.problems(page)) == ["chapter 77: there is no such chapter"]


# ---- equations

def test_the_table_of_equations_is_in_step():
    assert equations.main(["--check"]) == 0

def test_a_citation_is_read_part_by_part():
    assert list(equations.cited("(CoMAM Eq. 13-15) and MemCollab Alg. 2, Eq. 7; Eq. 9; CoMAM §4.3, Algorithm 1")) == [
        "CoMAM Eq. 13", "CoMAM Eq. 14", "CoMAM Eq. 15", "MemCollab Alg. 2", "MemCollab Eq. 7", "CoMAM Alg. 1"]

def test_an_equation_without_a_test_is_an_error(monkeypatch):
    monkeypatch.setitem(equations.EQUATIONS, "CoMAM Eq. 99", ("x", "y"))
    with pytest.raises(ValueError, match="Eq. 99"): equations.page()


# ---- minutes

ROWS = minutes.read_minutes()

def test_every_notebook_was_measured_and_is_on_the_page():
    assert list(minutes.out_of_step()) == []

def in_seconds(text):
    "'half a minute', 'ten seconds', '2 min' as a number; None where there is none."
    numbers = {w: i for i, w in enumerate("no one two three four five six seven eight nine ten eleven twelve".split())}
    numbers |= {"a": 1, "an": 1, "half a": .5, "half an": .5, "a quarter of a": .25, "three quarters of a": .75,
                "fifteen": 15, "twenty": 20, "thirty": 30, "forty": 40}
    words = "|".join(sorted(numbers, key=len, reverse=True))
    m = re.search(rf"\b({words}|\d+) (s|min|seconds?|minutes?|hours?)\b", text)
    unit = m and {"s": 1, "m": 60, "h": 3600}[m[2][0]]
    return m and (numbers[m[1]] if m[1] in numbers else int(m[1])) * unit

def near(said, row):
    "Is a time that a text names of the measured one's order of magnitude?"
    measured = float(row["cpu_seconds"]), float(row["seconds"])
    return min(measured) / 8 <= said <= max(5, 8 * max(measured))

def test_times_that_chapters_name_are_those_that_were_measured():
    wrong = []
    for name, row in ROWS.items():
        cells = json.loads((ROOT / "nbs" / name).read_text("utf-8"))["cells"]
        head = re.search(r"\*\*Time\*\*: ([^.;]+?) to run", "".join("".join(c["source"]) for c in cells[:4]))
        if not head or row["needs"] == "GPU" or row["left_out"] != "0": continue
        if not (said := in_seconds(head[1])) or not near(said, row): wrong.append((name, head[1], row["cpu_seconds"]))
    assert wrong == []

def test_times_in_readme_are_those_that_were_measured():
    named = re.findall(r"^\| \[\w+\]\((\S+\.ipynb)\) \|.*\| ([^|]+) \|$", INDEX, re.M)
    assert len(named) >= 14 + 10
    assert [(n, t) for n, t in named if (ROWS[n]["needs"] == "GPU") != (t == "GPU")] == []
    assert [(n, t, ROWS[n]["cpu_seconds"]) for n, t in named if t != "GPU" and not near(in_seconds(t), ROWS[n])] == []

def test_seconds_are_read_from_words():
    assert list(map(in_seconds, ["half a minute", "a quarter of a minute", "two seconds", "42 s", "long"])) == [
        30, 15, 2, 42, None]


# ---- README

def test_pictures_are_what_their_script_draws(): assert pictures.main(["--check"]) == 0


# ---- figures

def test_every_bound_figure_is_its_logs(): assert list(figures.out_of_step()) == []

PAGE = """Accuracy is .75 ± .15, nine points more. Prompt: 4,096 tokens. It took 12 s.

| a | +.250 | half | of .50 |"""

def bound(text, log="logs/t.csv", **more):
    return {"page": "p.ipynb", "text": text, "log": log, **more}

def rows(**more): return {"where": {"arm": "b"}, "column": "x"} | more

@pytest.mark.parametrize("figure, why", [
    (bound("is {.75} ±", **rows(of=["mean"])), None),
    (bound("is .75 ± {.15}", **rows(of=["half"])), "says .15, logs/t.csv says 0.635"),
    (bound("{nine} points", **rows(of=["mean difference"], minus={"arm": "a"}, scale=100)), "says nine, logs/t.csv"),
    (bound("| {+.250} |", **rows(of=["mean difference"], minus={"arm": "a"})), None),
    (bound("{nine} points", "logs/t.txt", find=r"^other (\S+)$", scale=100), None),
    (bound("{4,096} tokens. It took {12} s", "logs/t.txt", find=[r"^tokens (\S+)", r"in (\S+) s"]), None),
    (bound("took {12} s", "logs/t.json", column="after.seconds", of=["mean"]), "says 12, logs/t.json says 13"),
    (bound("took {12} s", "p.ipynb#abc", find=r"(\d+) s"), None),
    (bound("took {12} s", "p.ipynb#none", find=r"(\d+) s"), "StopIteration"),
    (bound("took {13} s", "logs/t.txt", find=r"in (\S+) s"), "the text stands in the page 0 times"),
    (bound("took {12} s", "logs/t.txt", find=r"(\d+)"), "times, not once"),
    (bound("{4,096} tokens. It took {12} s", "logs/t.txt", find=r"in (\S+) s"), "2 numbers in braces, 1 values"),
    (bound("took {12} s", "logs/none.txt", find=r"in (\S+) s"), "FileNotFoundError"),
    (bound("took {12} s", "other/t.txt", find=r"in (\S+) s"), "does not say how other/t.txt is made"),
])
def test_a_figure_is_read_from_its_log(small, figure, why):
    assert (figures.wrong(figure) or "").count(why or "") == 1 if why else figures.wrong(figure) is None

def test_what_looks_measured_and_is_not_bound_is_an_error(small):
    small["figure"] += [bound("is {.75} ±", **rows(of=["mean"])), bound("took {12} s", "p.ipynb#abc", find=r"(\d+) s")]
    small["given"] = [{"page": "p.ipynb", "text": "| half … .50 |", "why": "a setting"}]
    left = list(figures.out_of_step())
    assert [re.search(r"\.15|\.250", l)[0] for l in left] == [".15", ".250"], left

@pytest.fixture
def small(tmp_path, monkeypatch):
    "A page, its logs and an empty table."
    cached = figures.cells, figures.prose, figures.read, figures.beside, figures.places
    cells = [{"cell_type": "markdown", "source": [PAGE]},
             {"cell_type": "code", "id": "abc", "source": [], "outputs": [{"text": ["in 12 s"]}]}]
    (tmp_path / "logs").mkdir()
    (tmp_path / "p.ipynb").write_text(json.dumps({"cells": cells}))
    (tmp_path / "logs/t.csv").write_text("arm,x\na,.45\na,.55\nb,.7\nb,.8\n")
    (tmp_path / "logs/t.txt").write_text("tokens 4096\nother 0.094\nin 11.6 s\n")
    (tmp_path / "logs/t.json").write_text('{"after": {"seconds": 13}}')
    table = {"whole": ["p.ipynb"], "commands": {"logs/": "make"}, "figure": []}
    monkeypatch.setattr(figures, "NBS", tmp_path)
    monkeypatch.setattr(figures, "table", lambda: table)
    for f in cached: f.cache_clear()
    yield table
    for f in cached: f.cache_clear()

@pytest.mark.parametrize("page", ["nbs/reference/trust.md", "nbs/source/checks/03_sandbox.ipynb", "SECURITY.md"])
def test_what_is_promised_names_tests_that_exist(page):
    tests = {p.stem: p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("test_*.py")}
    named = set(re.findall(r"`(?:tests/)?(test_\w+)(?:\.py)?`", (ROOT / page).read_text(encoding="utf-8")))
    assert len(named) > 3
    assert not [n for n in named if n not in tests and not any(f"def {n}(" in text for text in tests.values())]
