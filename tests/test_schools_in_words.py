"A world in words: what its families answer, what is kept for evaluation, and every stage on a tiny model."
import importlib.util
import json
import random
import re
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from comam_nb.checks.code_answers import check
from comam_nb.checks.constraints import parse_constraints, validate
from comam_nb.memcollab.solving import load_attempts
from comam_nb.studies.schools_in_words import WordSchools
from comam_nb.worlds.schools_in_words import FAMILIES, school_rows, word_tasks
from comam_nb.worlds.warm_start import tiny_llama

logging.disable_progress_bar()

BY_HAND = { # values -> right, wrong
    "naming who is served": (("Ann", "Bob", "Eve"), "Eve", "Ann"),
    "signing a letter": (("Rosa", "Hall"), "Hall Rosa", "Rosa Hall"),
    "writing a date": ((5, "March"), "March 5", "5 March"),
    "making a list": (("milk", "rice", "milk"), "milk, rice", "milk, rice, milk"),
    "reading a price": ((37, 14), "14", "37"),
    "calling out colours": (("red", "blue", "green"), "green, blue, red", "red, blue, green"),
    "printing a label": (("salt",), "salt salt", "salt"),
    "naming a bus": (("Rome", "Oslo"), "Oslo", "Rome"),
    "joining two words": (("sun", "light"), "sun-light", "sunlight")}

def test_answers_by_hand():
    assert set(BY_HAND) == set(FAMILIES)
    for category, (values, right, wrong) in BY_HAND.items():
        assert (FAMILIES[category].right.do(values), FAMILIES[category].wrong.do(values)) == (right, wrong)

def test_the_two_procedures_differ_on_every_task_and_the_judge_tells_them_apart():
    for task in word_tasks(270):
        values = [int(v) if v.isdigit() else v for v in task.id.split(": ")[1].split(" | ")[:-1]]
        family = FAMILIES[task.category]
        for procedure, right in ((family.right, True), (family.wrong, False)):
            assert check(task, f"I work. So there we have {procedure.do(values)}.\n"
                               f"So the answer is {procedure.do(values)}.").passed is right

def test_the_three_parts_share_no_task():
    parts = [word_tasks(180, seed, part) for part in ("evaluation", "memory", "teaching") for seed in (0, 1)]
    hashes = [{t.hash for t in tasks} for tasks in parts]
    assert all(len(h) == 180 for h in hashes)
    assert not any(hashes[i] & hashes[j] for i in range(6) for j in range(6) if i // 2 != j // 2)
    assert {t.category for t in parts[0]} == set(FAMILIES)

def test_no_wording_of_the_evaluation_is_taught():
    spoken = " ".join(f"{p} {c}" for s in ("primary", "a", "b") for p, c in school_rows(s, 600)).lower()
    for f in FAMILIES.values():
        for text in (*f.situations(True), *f.right.kept, *f.wrong.kept, *f.verbs_kept):
            assert not re.search(rf"\b{text}\b", spoken), text

def test_lessons_pass_and_say_what_they_mean():
    rng = random.Random(0)
    for task in word_tasks(90):
        family = FAMILIES[task.category]
        for right, kept in ((True, False), (False, False), (True, True), (False, True)):
            lesson = family.lesson(rng, right, kept)
            assert validate(lesson, task) == ""
            [again], bad = parse_constraints(str(lesson), strict=True)
            assert not bad and family.reads(again.enforce) is right and family.reads(again.avoid) is not right
    assert FAMILIES["printing a label"].reads("using the bare word") is False
    assert FAMILIES["naming a bus"].reads("painting the wheels") is None

def test_a_pupil_can_only_be_right_by_reading():
    advised = [(p, c) for p, c in school_rows("primary", 900) if p.startswith("Advice") and "Solution:" not in p]
    assert len(advised) > 500
    said = 0
    for prompt, completion in advised:
        lessons = [parse_constraints(line.split(". ", 1)[1], strict=True)[0][0]
                   for line in prompt.splitlines() if line.startswith("| ")]
        assert 1 <= len(lessons) <= 3
        assert any(c.enforce in completion for c in lessons)
        said += FAMILIES["naming a bus"].reads(completion) is True
    unasked = [c for p, c in school_rows("a", 900) if p.endswith(("label say?", "on the box?")) and p[:6] != "Advice"]
    twice = sum(len(c.split("is ")[-1].split()) == 2 for c in unasked)
    assert len(unasked) > 10 and twice / len(unasked) < 0.4 # a habit that is mostly wrong
    assert said > 0

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A directory with a model of two layers that has learnt nothing."
    folder = tmp_path_factory.mktemp("tiny")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([p + c for p, c in school_rows("primary", 60)], vocab_size=1200,
                            special_tokens=["<pad>", "<|im_end|>"], show_progress=False)
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<|im_end|>")
    tiny_llama(len(tok), hidden=32).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder

def test_every_stage_on_a_tiny_model(tiny, tmp_path):
    said = []
    small = WordSchools(tiny, tmp_path / "run", said.append, train=9, test=9)
    teach = dict(layers="all-linear", r=2, every=1)
    def stop(line):
        said.append(line)
        if "step 1 of" in line: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        WordSchools(tiny, tmp_path / "run", stop).teach("primary", rows=8, **teach)
    found = small.teach("primary", rows=8, resume=True, **teach)
    assert found["primary"]["steps"] == 2
    log = [json.loads(l) for l in (tmp_path / "run" / "primary" / "warm_start.jsonl").read_text().splitlines()]
    assert [d["step"] for d in log if "done" not in d] == [0, 1, 2] # nothing twice
    for school in "ab": small.teach(school, rows=4, **teach)
    small.arms(0, ["vanilla", "oracle"])
    assert sum(small.distil(0).values()) == 0 # a model that knows nothing is never right: no pair, no lesson
    first = small.arms(0)
    assert first.arms == ["vanilla", "oracle", "self", "other", "self_contrast", "memcollab", "memcollab_trial",
                          "no_category", "wrong_category", "placebo", "reworded"]
    attempts = len(load_attempts(tmp_path / "run" / "seed0" / "test-0.jsonl"))
    again = small.arms(0)
    assert len(load_attempts(tmp_path / "run" / "seed0" / "test-0.jsonl")) == attempts
    assert [o.right for o in again.outcomes] == [o.right for o in first.outcomes]
    text = small.table()
    assert "school a, against vanilla: 9 tasks" in text and "p (Holm)" in text
    assert len((tmp_path / "run" / "outcomes.csv").read_text().splitlines()) == 1 + len(first.outcomes)

def test_the_script_names_its_stages(capsys):
    path = Path(__file__).resolve().parents[1] / "scripts" / "schools_in_words.py"
    spec = importlib.util.spec_from_file_location("schools_in_words_script", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with pytest.raises(SystemExit): script.main(["teach", "--model", "x", "--out", "y"])
    assert "name a --school" in capsys.readouterr().err
