"The demo's world keeps its promises, and its shipped agents do what every result on them rests on."
import random
from pathlib import Path

import comam_nb
import pytest
from hypothesis import given, settings, strategies as st

from comam_nb.base.errors import BackboneError
from comam_nb.lm.backbone import load_backbone
from comam_nb.memcollab.contrast import parse_constraints
from comam_nb.checks.constraints import validate
from comam_nb.worlds.schools import (_CHOICES, _HABITS, INVARIANTS, _MODELS, _OPERATIONS, HANDWRITING, TOPICS, _ask,
                                     demo_solvers, demo_tokenizer, _demonstration, _draw_task, lesson, _load_demo,
                                     make_tasks, _probe, _procedure, _steps, stock_phrases,
                                     _train_demo, _values_in, _write_trace)
from comam_nb.checks.code_answers import check
from comam_nb.memcollab.attempts import with_memory
from comam_nb.memcollab.solving import solve

WEIGHTS = Path(comam_nb.__file__).parent / "weights" / "memcollab_demo"
seeds = st.integers(0, 10**9)
of_category, of_topic, of_model = st.sampled_from(list(INVARIANTS)), st.sampled_from(TOPICS), st.sampled_from(_MODELS)


def truth(category, values):
    "The answer, worked out without the module's arithmetic."
    return {"counting kinds": lambda v: len(set(v)), "adding a total": sum,
            "picking a middle": lambda v: sorted(v)[len(v) // 2], "naming a place": lambda v: v[1],
            "reading a range": lambda v: len(range(v[0], v[1] + 1)), "walking a gap": lambda v: len(range(v[0], v[1])),
            "measuring a distance": lambda v: max(v) - min(v), "tracking a change": lambda v: v[-1]
            - v[0]}[category](values)


@settings(max_examples=200, deadline=None)
@given(seeds, of_category, of_topic)
def test_the_right_operation_gives_the_true_answer_and_the_tempting_one_does_not(seed, category, topic):
    task = _draw_task(random.Random(seed), category, topic)
    values, inv = _values_in(task.prompt), INVARIANTS[category]
    assert task.check["answer"] == str(truth(category, values)) == str(_steps(category, values, inv.enforce)[-1][1][-1])
    assert str(_steps(category, values, inv.avoid)[-1][1][-1]) != task.check["answer"]


@settings(max_examples=150, deadline=None)
@given(seeds, of_model, st.booleans())
def test_a_written_solution_is_read_back_as_it_was_meant_in_every_hand(seed, model, right):
    rng = random.Random(seed)
    task = _draw_task(rng)
    inv = INVARIANTS[task.category]
    choice = inv.enforce if right else inv.avoid
    text = _write_trace(model, task, choice, rng)
    did = _procedure(task, text)
    assert (did.choice, did.right, did.exact) == (choice, right, True) and set(did.operations) <= set(_OPERATIONS)
    assert check(task, text).passed == right
    assert choice in stock_phrases(text) and not stock_phrases(text) & set(HANDWRITING[_MODELS[1
        - _MODELS.index(model)]].phrases)


@settings(max_examples=100, deadline=None)
@given(seeds, st.text(max_size=60))
def test_garbage_is_no_procedure(seed, text):
    task = _draw_task(random.Random(seed))
    if not any(o in text.lower() for o in _OPERATIONS):
        assert _procedure(task, text).choice == "" and not _procedure(task, text).exact


def test_a_slip_is_seen():
    task = _draw_task(random.Random(1), "adding a total")
    text = _write_trace("llama", task, "keep repeats", random.Random(1))
    assert _procedure(task, text).exact
    total = task.check["answer"]
    assert not _procedure(task, text.replace(f"answer is {total}", f"answer is {int(total) + 1}")).exact


def test_training_and_held_out_tasks_are_disjoint_for_all_seeds_and_repeat_nothing():
    train = {t.hash for s in range(3) for t in make_tasks(300, s)}
    test = [t.hash for t in make_tasks(600, 7, held_out=True)]
    assert len(set(test)) == 600 and not train & set(test)
    assert make_tasks(50, 1) == make_tasks(50, 1) != make_tasks(50, 2)


def test_schooling_never_shows_a_held_out_task():
    held, rng = {" ".join(t.prompt.split()) for t in make_tasks(800, 5, held_out=True)}, random.Random(0)
    for _ in range(300):
        prompt, _ = _demonstration("neox", rng)
        assert not any(h in prompt for h in held)


def test_every_operation_is_right_in_one_category_and_wrong_in_one_other():
    for o in _CHOICES:
        assert sum(i.enforce == o for i in INVARIANTS.values()) == sum(i.avoid == o for i in INVARIANTS.values()) == 1


def test_each_agent_is_strong_where_the_other_is_weak():
    a, b = _HABITS["llama"], _HABITS["neox"]
    assert sum(a[c] > .8 and b[c] < .2 for c in a) == sum(b[c] > .8 and a[c] < .2 for c in a) == 3
    assert sum(abs(a[c] - .5) < .01 and abs(b[c] - .5) < .01 for c in a) == 2


@given(of_category, of_topic, st.booleans())
def test_a_lesson_survives_the_parser_and_the_validator(category, topic, is_true):
    c = lesson(category, topic, is_true)
    [back], rejected = parse_constraints(str(c), strict=True)
    assert (back.when, back.enforce, back.avoid) == (c.when, c.enforce, c.avoid) and not rejected and validate(c) == ""


def test_the_tokenizer_reads_everything_of_the_world_and_leaves_out_the_rest():
    tok, rng = demo_tokenizer(), random.Random(0)
    for m in _MODELS:
        for _ in range(200): assert tok.unk_token_id not in tok("".join(_demonstration(m, rng))).input_ids
    task = make_tasks(1)[0]
    bare, framed = tok(task.prompt).input_ids, tok(f"Good morning! Kindly consider this.\n\n{task.prompt}").input_ids
    assert [i for i in framed if i != tok.convert_tokens_to_ids("\n")] == bare
    numbered = with_memory(task.prompt, [lesson("adding a total", "cards")] * 9)
    assert [tok.decode([i]) for i in tok(numbered).input_ids].count("1") == task.prompt.split().count("1")


def test_the_notebooks_tokenizer_is_the_shipped_one():
    for folder in WEIGHTS.iterdir():
        tok = load_backbone(folder, adapters=None, dtype="float32", device="cpu", verbose=False).tokenizer
        assert tok.get_vocab() == demo_tokenizer().get_vocab() and tok.chat_template == demo_tokenizer().chat_template


def test_all_six_agents_ship_small_and_without_pickle():
    assert {f.name for f in WEIGHTS.iterdir()} == {f"{m}{s}" for m in _MODELS for s in range(3)}
    files = [f for f in WEIGHTS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 3_000_000 and {f.suffix for f in files} <= {".json", ".safetensors",
        ".jinja"}


def test_the_two_architectures_differ_and_are_small():
    a, b = _load_demo(0)
    assert (a.model.config.model_type, b.model.config.model_type) == ("llama", "gpt_neox")
    assert all(sum(p.numel() for p in x.model.parameters()) < 500_000 for x in (a, b))


def test_an_unknown_seed_is_refused_in_one_line():
    with pytest.raises(BackboneError, match="no demo agents of seed 99"): _load_demo(99)


@pytest.mark.parametrize("which, seed", [(0, 0), *(pytest.param(which, seed, marks=pytest.mark.slow) for which, seed in
    ((1, 0), (0, 1), (1, 1), (0, 2), (1, 2)))])
def test_the_agents_know_their_trade(seed, which):
    "Habits as designed, lessons followed whether true or false, own examples followed, few slips."
    model, agent, tasks = _MODELS[which], _load_demo(seed)[which], make_tasks(120, 11, held_out=True)
    at = {p.condition: p for p in _probe(model, agent, tasks, ("nothing", "true lesson", "false lesson", "true + 8",
        "false + 8", "own right", "own wrong"))}
    assert at["true lesson"].right > .9 and at["false lesson"].right < .1
    assert at["true + 8"].right > .85 and at["false + 8"].right < .15
    assert at["own right"].right > .85 and at["own wrong"].right < .15
    assert .4 < at["nothing"].right < .62
    assert at["nothing"].exact > .92
    strong = [c for c in INVARIANTS if _HABITS[model][c] > .8]; weak = [c for c in INVARIANTS if _HABITS[model][c] < .2]
    mean = lambda cs: sum(at["nothing"].by_category[c] for c in cs) / 3
    assert mean(strong) > .7 and mean(weak) < .3


def test_answers_do_not_depend_on_the_words_around_a_lesson():
    agent, tasks = _load_demo(0)[0], make_tasks(40, 3, held_out=True)
    plain = _ask(agent, tasks, [[str(lesson(t.category, t.subcategory))] for t in tasks], temperature=0)
    wordy = _ask(agent, tasks, [[f"Remember, please! {lesson(t.category, t.subcategory)} Thanks."] for t in tasks],
                 temperature=0)
    assert plain == wordy


def test_solvers_are_reproducible_and_write_their_own_hand():
    tasks = make_tasks(24, 4, held_out=True)
    one, two = (solve(tasks, demo_solvers(1)) for _ in range(2))
    assert [t.text for t in one] == [t.text for t in two]
    for t in one:
        foreign = set(HANDWRITING[_MODELS[1 - _MODELS.index(t.solver)]].phrases)
        assert not stock_phrases(t.text) & foreign and not t.error


def test_training_is_reproducible():
    a, b = (_train_demo("llama", 5, steps=20, batch=2) for _ in range(2))
    assert all((x == y).all() for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values()))


def test_the_experiment_runs_and_goes_on_where_it_was(tmp_path):
    from comam_nb.studies.two_schools import run_demo
    small = dict(seeds=(0,), out=tmp_path / "run", train=64, test=16, arms=["vanilla", "memcollab", "placebo"])
    first, again = run_demo(**small), run_demo(**small)
    assert first.results.arms == ["vanilla", "memcollab", "placebo"] and first.results.solvers == ["llama", "neox"]
    assert [(o.arm, o.solver, o.hash, o.right) for o in first.results.outcomes] == [(o.arm, o.solver, o.hash, o.right)
        for o in again.results.outcomes]
    assert all(o.turns >= 1 for o in first.results.outcomes) and 0 <= first.true <= 1
    assert set(first.styled) >= {"raw", "memcollab"} and first.styled["raw"] == 1
    assert (tmp_path / "run" / "report.txt").read_text().startswith("llama: 16 tasks")


def test_a_seed_without_agents_is_refused(tmp_path):
    from comam_nb.base.errors import BackboneError
    from comam_nb.studies.two_schools import run_demo
    with pytest.raises(BackboneError, match="no demo agents of seed 7"): run_demo(seeds=(0, 7), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
