"The bench: the length artefact, runs that survive being killed, tables, and where a fact was lost."
import json, os, signal, subprocess, sys, textwrap
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from comam_nb.agents import Note
from comam_nb.base.errors import DataError, RewardError
from comam_nb.data import Episode, Query, example_episode, make_history
from comam_nb.lm.usage import Usage
from comam_nb.mdp import State, Trajectory, example_agents, example_group
from comam_nb.readers.locomo import read_locomo
from comam_nb.readers.matchers import by_overlap
from comam_nb.readers.personamem import read_personamem
from comam_nb.readers.scores import answer_reward, exact_match
from comam_nb.runs import reports
from comam_nb.runs.bench import RunFile, _chains, _news, read_run, record_of, run_system
from comam_nb.runs.cases import browse, loss_counts, _lost_by, memory_events
from comam_nb.runs.length_artefact import _length_rank, balanced_accuracy, length_choice, length_rule, length_weights
from comam_nb.readers.personamem import Question, _read_questions
from comam_nb.runs.reports import _options_only, _OptionsOnly, evaluate_systems, _read_runs, report
from comam_nb.systems.comam import CoMAMSystem
from comam_nb.systems.interface import Answer, MemorySystem

RULES = ("chance", "longest", "shortest", "by_type", "by_type_other_users")


def question(user, kind, lengths, answer, id=""):
    return Question(Query("?", kind=kind), tuple("o" * n for n in lengths), answer, user,
                    id or f"{user}-{kind}-{lengths}")

lists = st.lists(st.builds(question, st.sampled_from(["ana", "ben", "cyd"]), st.sampled_from(["x", "y"]),
                           st.tuples(*[st.integers(1, 6)] * 4), st.sampled_from("abcd")), min_size=1, max_size=40)


# ---- official scoring

def test_choices_are_scored_by_letter_or_by_what_the_system_chose():
    quiz = replace(example_episode(), options=("coffee", "tea"), answer="b")
    right = lambda *a: record_of(Answer(*a), quiz)["right"]
    assert [right("(b)"), right("tea", "b"), right("a tea", "b"), right("(a)", "b"), right("tea"),
            right("(a) (b)")] == [1, 1, 1, 0, 0, 0]


def test_a_second_chance_in_the_whole_reply():
    quiz = replace(example_episode(), options=("coffee", "tea"), answer="b")
    whole = "I take (b). <final_answer> unsure </final_answer>"
    assert record_of(Answer("unsure"), quiz)["right"] == 0
    assert record_of(Answer("unsure", reply=whole), quiz)["right"] == 1
    assert record_of(Answer("coffee", "a", reply=whole), quiz)["right"] == 0 # what the system chose goes first

@settings(deadline=None)
@given(st.sampled_from(["tea", "Teas.", "green tea", "", "not mentioned", "(b)", "茶"]),
       st.sampled_from(["auto", "contains", "f1", "exact"]), st.sampled_from([{}, dict(benchmark="longmemeval")] + [
           dict(benchmark="locomo", category=c) for c in (1, 2, 3, 4, 5)]))
def test_evaluation_scores_as_training_does(text, match, meta):
    e = replace(example_episode(), meta=meta)
    record = record_of(Answer(text), e, match)
    assert record["right"] == answer_reward(text, e, match)
    assert (record["exact"], record["f1"]) == tuple(answer_reward(text, e, m) for m in ("exact", "f1"))

def test_a_run_remembers_its_rule(tmp_path):
    class Judge:
        name = "strict"
        def complete(self, prompts, **kwargs): return ["no"] * len(prompts)
    e = [replace(example_episode(), id="1")]
    for rule, name in (("auto", "auto"), (exact_match, "exact_match"), (Judge(), "judge: strict")):
        with RunFile(tmp_path / f"{name.split(':')[0]}.jsonl", e, "x", match=rule): pass
        assert read_run(tmp_path / f"{name.split(':')[0]}.jsonl")[0]["settings"] == {"match": name}
    with pytest.raises(DataError, match="another settings"):
        RunFile(tmp_path / "auto.jsonl", e, "x", match="contains")

def test_shares_are_reported_as_such(tmp_path):
    class Says(MemorySystem):
        def __init__(self, user): self.usage = Usage()
        def observe(self, session): pass
        def memory(self): return ()
        def answer(self, query, options=None): return Answer("green teas")
    e = replace(example_episode(), id="1")
    evaluate_systems({"x": Says}, [replace(e, meta=dict(benchmark="locomo", category=4))], tmp_path / "a")
    text = report(tmp_path / "a")
    assert "## Score (a share" in text and "## Token F1" not in text and "| x | 0.667 |" in text
    evaluate_systems({"x": Says}, [replace(e, answer="green")], tmp_path / "b")
    assert "## Accuracy" in report(tmp_path / "b") and "## Token F1" in report(tmp_path / "b")


# ---- length rules

def test_rules_by_hand():
    four = [question("ana", "x", (1, 2, 3, 9), "d"), question("ana", "x", (9, 2, 3, 1), "a"),
            question("ben", "x", (1, 7, 2, 3), "b"), question("ben", "y", (5, 4, 1, 2), "c")]
    assert [length_rule(four, r).tolist() for r in RULES] == [[.25] * 4, [1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1],
        [1, 1, 1, 0]]

@settings(deadline=None, max_examples=60)
@given(lists)
def test_the_rule_chosen_on_the_data_is_never_worse_than_either(qs):
    for kind in {q.query.kind for q in qs}:
        some = [q for q in qs if q.query.kind == kind]
        assert length_rule(some, "by_type").sum() == max(length_rule(some, "longest").sum(),
                                                         length_rule(some, "shortest").sum())

@settings(deadline=None, max_examples=60)
@given(lists, st.sampled_from(["ana", "ben", "cyd"]), st.sampled_from("abcd"))
def test_a_users_own_answers_never_choose_the_honest_rule(qs, user, letter):
    if len({q.user for q in qs}) < 2: return
    changed = [replace(q, answer=letter) if q.user == user else q for q in qs]
    picks = lambda qs: [p for q, p in zip(qs, length_choice(qs, "by_type_other_users")) if q.user == user]
    assert picks(qs) == picks(changed)

@settings(deadline=None, max_examples=60)
@given(lists)
def test_balancing_puts_every_rank_rule_at_chance(qs):
    w = length_weights(qs, least=1)
    if not w.any(): return
    assert w[w > 0].mean() == pytest.approx(1)
    for rank in range(4): assert balanced_accuracy([_length_rank(q) == rank for q in qs], w).mean == pytest.approx(.25)
    interval = balanced_accuracy(np.full(len(qs), .25), w)
    assert (interval.low, interval.high) == (pytest.approx(.25), pytest.approx(.25))

def test_rules_refuse():
    with pytest.raises(DataError, match="unknown length rule"):
        length_rule([question("ana", "x", (1, 2), "a")], "middle")
    with pytest.raises(DataError, match="one user"):
        length_rule([question("ana", "x", (1, 2), "a")], "by_type_other_users")

def test_the_artefact_of_personamem(shared):
    "The table in data/SOURCES.md, from the official file."
    qs = _read_questions(shared / "personamem_v1" / "questions_32k.csv")
    assert len(qs) == 589 and len({q.user for q in qs}) == 20
    assert [int(length_rule(qs, r).sum()) for r in ("longest", "by_type", "by_type_other_users")] == [304, 396, 396]
    rows = {k: [int(length_rule([q for q in qs if q.meta["label"] == k], r).sum()) for r in ("longest", "shortest")]
            for k in {q.meta["label"] for q in qs}}
    assert rows == {"track_full_preference_evolution": [55, 24], "recall_user_shared_facts": [51, 22],
                    "recalling_the_reasons_behind_previous_updates": [93, 0],
                    "suggest_new_ideas": [0, 92], "generalizing_to_new_scenarios": [57, 0],
                    "provide_preference_aligned_recommendations": [34, 0],
                    "recalling_facts_mentioned_by_the_user": [14, 0]}
    w = length_weights(qs)
    assert (w > 0).sum() == 285 and (length_rule(qs, "by_type_other_users") == 0).sum() == 193
    assert balanced_accuracy(length_rule(qs, "longest"), w).mean == pytest.approx(.25)

def test_broken_questions_name_their_line(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text("persona_id,question_id\n0,x\n")
    with pytest.raises(DataError, match="line 1: column 'question_type' is missing"): _read_questions(path)
    head = "persona_id,question_id,question_type,user_question_or_message,correct_answer,all_options"
    path.write_text(head + "\n0,x,t,hello,(e),\"['(a) x', '(b) y']\"\n")
    with pytest.raises(DataError, match="line 2.*correct_answer"): _read_questions(path)


# ---- language models without memory

def test_rotation_cancels_a_love_for_the_first_place_and_finds_what_is_known(monkeypatch):
    import torch
    options = ("tea", "coffee", "juice")
    def first(backbone, prompts, marks): return torch.tensor([[.8, .1, .1]] * len(prompts))
    def coffee(backbone, prompts, marks):
        return torch.tensor([[.8 if f"({m}) coffee" in p else .1 for m in marks] for p in prompts])
    monkeypatch.setattr(reports, "choice_probs", first)
    assert np.allclose(_options_only(None, options), 1 / 3)
    monkeypatch.setattr(reports, "choice_probs", coffee)
    assert np.allclose(_options_only(None, options), [.1, .8, .1])
    assert _OptionsOnly(None).answer("?", options) == Answer("(b)", "b")

def test_options_only_with_the_small_model_of_the_microworld():
    from comam_nb.worlds.warm_start import load_warm_start
    for options in (("tea", "coffee", "juice"), ("tea", "tea")):
        p = _options_only(load_warm_start(), options, marks="123")
        assert p.sum() == pytest.approx(1, abs=1e-4)
    assert p[0] == pytest.approx(p[1], abs=1e-5) # the same text twice


# ---- chains

def cut(n, id, history=None):
    "The example, asked after message n."
    sessions = [replace(s, messages=[m for m in s.messages if m.turn <= n]) for s in history
                or example_episode().history]
    return Episode([s for s in sessions if s.messages], Query("What is my favourite drink?", id), answer="coffee"
                   if n < 7 else "tea",
                   evidence={3} if n < 7 else {3, 7}, user="ana", id=id)

@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(3, 8), min_size=1, max_size=12), st.lists(st.integers(3, 8), max_size=6))
def test_chains_observe_every_message_once(lengths, other):
    swapped = make_history([s.messages for s in example_episode().history[::-1]])
    asked = [cut(n, f"q{i}") for i, n in enumerate(lengths)] + [replace(cut(8, f"r{i}", swapped),
        history=cut(n, "", swapped).history if n < 8 else swapped, evidence=()) for i, n in enumerate(other)]
    out = _chains(asked)
    assert sorted(e.id for c in out for e in c) == sorted(e.id for e in asked) and len(out) == 1 + bool(other)
    for chain in out:
        seen = []
        for e in chain:
            seen += [m for s in _news(e.history, len(seen)) for m in s.messages]
            assert seen == e.turns

def test_persona_0_has_two_chains_and_reads_each_message_once(shared):
    folder = shared / "personamem_v1"
    episodes = read_personamem(folder / "questions_32k.persona0.csv", folder / "shared_contexts_32k.persona0.jsonl")
    out = _chains(episodes)
    assert sorted(map(len, out)) and len(out) == 2 and sum(map(len, out)) == 17
    assert {record_of(Answer(""), e)["distance"] for e in episodes} <= set(range(1, 8))
    observed = sum(len(c[-1].turns) for c in out)
    assert observed <= 2 * 183 < sum(len(e.turns) for e in episodes)


# ---- runs

class LastDrink(MemorySystem):
    "Remembers every message; answers with the last word of the last one about a drink."
    name = "last drink"
    def __init__(self, user, log=None): self.notes, self.usage, self.log = [], Usage(), log if log is not None else []
    def observe(self, session):
        self.notes += [Note(m.content, (m.turn,)) for m in session.messages]
        self.usage.prompt_tokens += 7; self.log.append(f"read {len(session.messages)}")
    def memory(self): return tuple(self.notes)
    def answer(self, query, options=None):
        self.log.append(query.id); self.usage.completion_tokens += 3
        note = [n for n in self.notes if "drink" in n.text][-1]
        return Answer(note.text.removesuffix(" now.").strip(".").split()[-1], None, (note,))

def asked(): return [cut(8, "late"), cut(4, "early"), cut(6, "middle")]
def plain(records): return [{k: v for k, v in r.items() if k not in ("seconds", "building")} for r in records]

def test_a_run_by_hand(tmp_path):
    log = []
    records = run_system(lambda user: LastDrink(user, log), asked(), tmp_path / "new" / "run.jsonl")
    assert log == ["read 4", "early", "read 2", "middle", "read 2", "late"]
    assert [(r["id"], r["text"], r["right"], r["evidence"], r["held"], r["distance"], r["written"],
             r["building"]["read"]) for r in records] == [
        ("late", "tea", 1, [7], True, 0, 3, 7), ("early", "coffee", 1, [3], True, 0, 3, 7), ("middle", "coffee", 1, [3],
        True, 1, 3, 7)]

@pytest.mark.parametrize("keep", range(0, 2200, 97))
def test_a_run_cut_anywhere_goes_on_and_repeats_nothing(tmp_path, keep):
    out = tmp_path / "run.jsonl"
    whole, data = run_system(LastDrink, asked(), out), out.read_bytes()
    out.write_bytes(data[:keep])
    kept = [json.loads(l)["id"] for l in data[:keep].split(b"\n")[1:-1]]
    log = []
    assert plain(run_system(lambda user: LastDrink(user, log), asked(), out, name=LastDrink.name)) == plain(whole)
    assert [x for x in log if not x.startswith("read")] == [i for i in ("early", "middle", "late") if i not in kept]
    lines = [json.loads(l) for l in out.read_text().splitlines()]
    assert "run" in lines[0] and sorted(l["id"] for l in lines[1:]) == ["early", "late", "middle"]

@pytest.mark.slow
def test_killed_between_questions(tmp_path):
    "A real SIGKILL, then the same command again."
    code = textwrap.dedent("""
        import os, signal, sys
        sys.path.insert(0, sys.argv[1])
        from test_bench import LastDrink, asked, run_system
        class Dies(LastDrink):
            def answer(self, query, options=None):
                with open(sys.argv[3], "a") as f: f.write(query.id + "\\n")
                if query.id == sys.argv[4]: os.kill(os.getpid(), signal.SIGKILL)
                return super().answer(query, options)
        run_system(Dies, asked(), sys.argv[2], name="x")
    """)
    command = lambda dies: subprocess.run([sys.executable, "-c", code, os.path.dirname(__file__),
                                           tmp_path / "run.jsonl", tmp_path / "log", dies], capture_output=True,
                                          text=True)
    assert command("middle").returncode == -signal.SIGKILL
    assert command("nobody").returncode == 0
    # the one that was under way, and no other, is asked twice
    assert (tmp_path / "log").read_text().split() == ["early", "middle", "middle", "late"]
    assert set(read_run(tmp_path / "run.jsonl")[1]) == {"early", "middle", "late"}

def test_an_exception_leaves_what_was_answered(tmp_path):
    class Fails(LastDrink):
        def answer(self, query, options=None):
            if query.id == "late": raise KeyboardInterrupt
            return super().answer(query, options)
    with pytest.raises(KeyboardInterrupt): run_system(Fails, asked(), tmp_path / "r.jsonl", name="x")
    log = []
    run_system(lambda user: LastDrink(user, log), asked(), tmp_path / "r.jsonl", name="x")
    assert log == ["read 4", "read 2", "read 2", "late"]

def test_memories_that_change_by_being_asked_are_brought_back(tmp_path):
    class Counts(LastDrink):
        asking_changes, n = True, 0
        def answer(self, query, options=None):
            self.n += 1
            return replace(super().answer(query, options), text=f"asked {self.n} times")
    out = tmp_path / "r.jsonl"
    whole, data = run_system(Counts, asked(), out), out.read_bytes()
    out.write_bytes(b"".join(data.splitlines(True)[:-1]))
    assert plain(run_system(Counts, asked(), out)) == plain(whole)
    assert {r["id"]: r["text"] for r in whole} == {"early": "asked 1 times", "middle": "asked 2 times",
                                                   "late": "asked 3 times"}

@pytest.mark.parametrize("change,said", [(dict(settings={"k": 3}), "another settings"),
                                         (dict(name="other"), "another system"), (dict(match=exact_match),
    "another settings")])
def test_other_settings_are_refused_and_change_nothing(tmp_path, change, said):
    out = tmp_path / "r.jsonl"
    run_system(LastDrink, asked(), out); before = out.read_bytes()
    with pytest.raises(DataError, match=said): run_system(LastDrink, asked(), out, **change)
    with pytest.raises(DataError, match="another episodes"):
        run_system(LastDrink, [replace(asked()[0], answer="cocoa"), *asked()[1:]], out)
    assert out.read_bytes() == before

def test_a_line_broken_in_the_middle_is_an_error(tmp_path):
    out = tmp_path / "r.jsonl"
    run_system(LastDrink, asked(), out)
    lines = out.read_bytes().splitlines(True)
    out.write_bytes(lines[0] + b"{broken\n" + b"".join(lines[2:]))
    with pytest.raises(DataError, match="r.jsonl, line 2"): run_system(LastDrink, asked(), out)

@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b'{"id": 1}\n', b"\x00\xff"])
def test_other_peoples_files_are_not_overwritten(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(DataError, match="no run file"): run_system(LastDrink, asked(), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == content

def test_two_runs_on_one_file_are_refused(tmp_path):
    with RunFile(tmp_path / "r.jsonl", asked(), "x"):
        with pytest.raises(DataError, match="another run is writing"): RunFile(tmp_path / "r.jsonl", asked(), "x")
    RunFile(tmp_path / "r.jsonl", asked(), "x").close()

def test_episodes_that_cannot_be_run_leave_no_file(tmp_path):
    for bad, said in (([], "no episodes"), ([asked()[0]] * 2, "used twice"), ([replace(asked()[0], id="")],
        "empty or used twice"), ([replace(asked()[0], answer="")], "no right answer")):
        with pytest.raises(DataError, match=said): run_system(LastDrink, bad, tmp_path / "r.jsonl")
        with pytest.raises(DataError, match=said): evaluate_systems({"x": LastDrink}, bad, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="is a directory"): run_system(LastDrink, asked(), tmp_path)

def test_settings_may_hold_tuples(tmp_path):
    for _ in range(2):
        run_system(LastDrink, asked(), tmp_path / "r.jsonl", settings=dict(trained=("profile", "retrieval")))


# ---- CoMAM behind the interface

def test_comam_answers_the_example():
    system, e = CoMAMSystem(example_agents()), example_episode()
    with pytest.raises(DataError, match="history is empty"): system.answer(e.query)
    system.observe(e.history[0])
    answer = system.answer(e.query)
    assert answer.text == "tea" and system.usage.calls == 3 and system.memory()
    assert all(isinstance(n, Note) for n in (*system.memory(), *answer.evidence))

def test_every_system_runs_on_the_microworld(tmp_path):
    from comam_nb.systems.mem1 import SYSTEMS
    from comam_nb.microworld import MicroWorld, make_episodes
    from comam_nb.worlds.warm_start import micro_agents
    agents, episodes = micro_agents(MicroWorld()), make_episodes(MicroWorld(), 2, held_out=True)
    systems = {n: (lambda user, make=c: make(agents)) for n, c in {**SYSTEMS, "comam": CoMAMSystem}.items()}
    done = evaluate_systems(systems, episodes, tmp_path, agents=agents)
    assert set(done) == {*systems, "question_lm"} and all(len(r) == 2 for r in done.values())
    assert done["comam"][0]["building"]["read"] > 0 and done["question_lm"][0]["building"]["read"] == 0
    text = report(tmp_path, against="base")
    for part in ("## Accuracy", "## Token F1", "## By question type", "## By session distance", "## Cost", *systems,
                 "dont_know", "most_frequent*"):
        assert part in text


# ---- rows without memory, tables

def quiz(i, user, kind="x", answer="b"):
    return replace(example_episode(), options=("coffee", "tea leaves"), answer=answer, id=f"q{i}", user=user,
                   query=Query("?", f"q{i}", kind))

def test_report_of_multiple_choice(tmp_path):
    episodes = [quiz(i, f"user{i % 3}", "xy"[i % 2], "ab"[i // 6]) for i in range(12)]
    class B(LastDrink):
        def answer(self, query, options=None): return Answer("(b)", "b")
    evaluate_systems({"always_b": B}, episodes, tmp_path)
    systems, without = _read_runs(tmp_path)
    assert set(systems) == {"always_b"} and set(without) == {"chance", "longest", "shortest",
        "longest_or_shortest_by_type*", "longest_or_shortest_by_type"}
    right = lambda records: [r["right"] for e in episodes for r in records if r["id"] == e.id]
    assert right(systems["always_b"]) == right(without["longest"]) == [0] * 6 + [1] * 6
    assert {r["right"] for r in without["chance"]} == {.5}
    text = report(tmp_path)
    for part in ("## Without the length artefact", "3 users", "too narrow", "| always_b | 0.500 |", "| chance | 0.500"):
        assert part in text
    assert "Token F1" not in text
    assert report(tmp_path) == text and evaluate_systems({"always_b": B}, episodes, tmp_path) # again: nothing changes

def test_the_options_only_row_needs_a_local_model(tmp_path, monkeypatch):
    import torch
    from comam_nb.worlds.warm_start import load_warm_start
    monkeypatch.setattr(reports, "choice_probs", lambda b, prompts,
                        marks: torch.tensor([[.8 if f"({m}) tea" in p else .2 for m in marks] for p in prompts]))
    episodes = [quiz(i, f"user{i}") for i in range(2)]
    evaluate_systems({}, episodes, tmp_path / "a", backbone=load_warm_start())
    assert [r["right"] for r in _read_runs(tmp_path / "a")[1]["options_lm"]] == [1, 1]
    evaluate_systems({}, episodes, tmp_path / "b", backbone=object())
    assert "options_lm" not in _read_runs(tmp_path / "b")[1]

def test_report_of_an_unfinished_folder_says_so(tmp_path):
    episodes = [quiz(i, f"user{i % 3}") for i in range(4)]
    class B(LastDrink):
        def answer(self, query, options=None): return Answer("(b)")
    evaluate_systems({"b": B}, episodes, tmp_path)
    lines = (tmp_path / "b.jsonl").read_text().splitlines(True)
    (tmp_path / "b.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    assert "3 questions that all rows have answered (of 4: some runs are not complete)" in report(tmp_path)

def test_report_refuses(tmp_path):
    with pytest.raises(DataError, match="no run files"): report(tmp_path)
    run_system(LastDrink, asked(), tmp_path / "a.jsonl"); run_system(LastDrink, asked()[:1], tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="different episodes"): report(tmp_path)
    with pytest.raises(DataError, match="cannot name a system"):
        evaluate_systems({"../x": LastDrink}, asked(), tmp_path)
    with pytest.raises(DataError, match="cannot name a system"):
        evaluate_systems({"dont_know": LastDrink}, asked(), tmp_path)

def test_one_user_gets_intervals_over_questions(tmp_path):
    evaluate_systems({"last": LastDrink}, asked(), tmp_path)
    assert "All questions are of one user" in report(tmp_path)

def test_f1_by_hand():
    def f1(reply, gold): return record_of(Answer(reply), replace(example_episode(), answer=gold))["f1"]
    assert f1("the green tea", "green tea leaves") == pytest.approx(.8)
    assert f1("tea tea", "tea") == pytest.approx(2 / 3) and f1("", "tea") == 0 and f1("x", "tea") == 0

def test_locomo_without_memory(shared, tmp_path):
    episodes = read_locomo(shared / "locomo" / "locomo_first7.json")
    evaluate_systems({}, episodes, tmp_path)
    _, without = _read_runs(tmp_path)
    assert set(without) == {"dont_know", "most_frequent*", "most_frequent"}
    mean = {n: np.mean([r["right"] for r in rs]) for n, rs in without.items()}
    assert mean["dont_know"] < .01 and mean["most_frequent"] <= mean["most_frequent*"] < .05
    assert {r["distance"] is None for r in without["dont_know"]} == {True, False} or all(r["distance"] is not None
        for r in without["dont_know"])


# ---- where a fact was lost

def walk(fine=(), coarse=(), evidence=(), answer="coffee", kind="fact", text="about turns"):
    e = replace(example_episode(), query=Query("What is my favourite drink?", kind=kind))
    notes = lambda cites: tuple(Note(f"{text} {c}", tuple(c)) for c in cites)
    return Trajectory(e, final=State(3, fine=notes(fine), coarse=notes(coarse), query=e.query,
                                     evidence=frozenset(evidence), answer=answer))

@pytest.mark.parametrize("trajectory,lost", [
    (walk(), "extraction"), (walk([[3]]), "extraction"), (walk([[1, 5]], evidence={3, 7}), "extraction"),
    (walk([[3], [7]], kind="profile"), "profile"), (walk([[3], [7]], [[3]], kind="profile"), "profile"),
    (walk([[3], [7]]), "retrieval"), (walk([[3], [7]], evidence={3}), "retrieval"),
                                             (walk([[3], [7]], [[3, 7]], {3}, kind="profile"), "retrieval"),
    (walk([[3, 7]], evidence={3, 7}), "reading"), (walk([[3, 7]], [[3, 7]], {1, 3, 7}, kind="profile"), "reading"),
    (walk(answer="tea"), "")])
def test_lost_by(trajectory, lost): assert _lost_by(trajectory) == lost

def test_lost_by_believes_words_if_asked():
    assert _lost_by(walk([[3, 7]], evidence={3, 7}, text="zebra")) == "reading"
    assert _lost_by(walk([[3, 7]], evidence={3, 7}, text="zebra"), by_overlap()) == "extraction"

def test_lost_by_needs_labels():
    with pytest.raises(RewardError, match="no evidence labels"):
        _lost_by(replace(walk(), episode=replace(example_episode(), evidence_kind="none")))

def test_the_four_example_rollouts():
    "Two right; the third cites turns 1 and 3 only, the fourth nothing: both lost turn 7 in extraction."
    group = example_group()
    assert [_lost_by(t) for t in group] == ["", "", "extraction", "extraction"]
    cases = browse(group)
    assert (cases.wrong, cases.total) == (2, 4) and [r[4:] for r in cases.rows] == [("yes", "NO", "NO", "NO", "NO",
        "extraction")] * 2
    matrix, stations, kinds = loss_counts(group)
    assert matrix.tolist() == [[2], [0], [0], [0]] and stations == ["extraction", "profile", "retrieval",
        "reading"] and kinds == [""]

def test_browse_escapes_what_models_write():
    cases = browse([walk([[3]], answer="<script>alert(1)</script>")])
    assert "<script>" not in cases._repr_html_() and "1 wrong of 1" in str(cases)
    assert browse([]).rows == []

def test_lost_in_and_browse_of_records(tmp_path):
    class Forgets(LastDrink):
        def observe(self, session): super().observe(session); self.notes = self.notes[-2:]
        def answer(self, query, options=None): return Answer("juice", None, tuple(self.notes))
    records = run_system(Forgets, asked(), tmp_path / "r.jsonl")
    # "early" is asked right after turn 3
    assert [r[-1] for r in browse(records).rows] == ["memory", "reading", "memory"]
    cases = browse(records, limit=1)
    assert cases.wrong == 3 and len(cases.rows) == 1 and "the first 1" in str(cases)
    assert loss_counts(records)[0].sum() == 3

def test_memory_events_by_hand():
    class Script(LastDrink):
        pages = [("Drinks coffee every day.", "Has a cat.", "Slept badly."), ("Has a cat.", "Drinks tea every day.")]
        def observe(self, session): self.notes = [Note(t, (1,)) for t in self.pages[int(session.id[1:]) - 1]]
        def answer(self, query, options=None): return Answer("tea", None, (self.notes[1],))
    assert memory_events(Script("ana"), example_episode().history, ("?",)) == [
        (1, "stored", "Drinks coffee every day."), (1, "stored", "Has a cat."), (1, "stored", "Slept badly."),
        (2, "superseded", "Drinks coffee every day."),
        (2, "forgotten", "Slept badly."), (2, "stored", "Drinks tea every day."), (3, "used", "Drinks tea every day.")]
