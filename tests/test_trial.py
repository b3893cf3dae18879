"Lessons earn their place: what a trial counts, what it decides, what it survives; and what a bank shows."
import random, re, sqlite3
from dataclasses import replace

import pytest

from comam_nb.base.errors import ChatDown, MemCollabError
from comam_nb.checks.constraints import Constraint, merge
from comam_nb.checks.tasks import Task
from comam_nb.lm.chat import Reply
from comam_nb.memcollab.attempts import Solver
from comam_nb.memcollab.solving import load_attempts
from comam_nb.memcollab.bank import ConstraintBank
from comam_nb.memcollab.trial import _decide, trial

TASKS = [Task(f"t{i}", f"What is {i} plus 5?", "sums", "", {"kind": "exact", "answer": str(i + 5)}) for i in range(40)]
HELPS, HARMS, IDLE = (Constraint("numbers meet", text, "haste", "sums", status="new")
                      for text in ("carrying", "dropping", "calm"))


class Adder:
    "Adds, but forgets a share of the tasks; 'carrying' mends that, and words of `spoiled_by` spoil everything."
    def __init__(self, name, spoiled_by=("dropping",), forgets=.4, fails=()):
        self.name, self.spoiled_by, self.forgets, self.fails, self.asked = name, spoiled_by, forgets, set(fails), 0
    def chat(self, messages, max_tokens=512, temperature=0.0, seed=None):
        self.asked += 1
        if self.asked in self.fails: raise ChatDown("gone", fatal=True)
        *memory, question = messages[-1]["content"].split("What is")
        n = int(re.match(r" (\d+)", question)[1])
        told = " ".join(memory)
        wrong = any(w in told for w in self.spoiled_by) or (
            "carrying" not in told and random.Random(f"{self.name} {n}").random() < self.forgets)
        return Reply(str(n if wrong else n + 5), 1, 1)

def agents(**settings): return [Solver(n, Adder(n, **settings), "plain") for n in ("ada", "bo")]
def bank_of(*lessons):
    bank = ConstraintBank()
    bank.add(lessons)
    return bank
def states(found): return {c.enforce: c.status for c in found}


def test_help_harm_and_nothing_are_told_apart():
    bank = bank_of(HELPS, HARMS, IDLE)
    found = trial(bank, TASKS, agents(), progress=False)
    assert states(found) == {"carrying": "active", "dropping": "retired", "calm": "active"}
    by = {c.enforce: c.source["trials"] for c in found}
    assert not any(t["without"] and not t["with"] for t in by["carrying"])
    assert len(by["calm"]) == 32 and len(by["dropping"]) < 32 # no budget is spent on what is decided
    assert sorted(bank.retrieve("1 plus 5", "sums").texts) == sorted([str(HELPS), str(IDLE)])
    assert bank.retrieve("1 plus 5", "sums", status="retired").texts == [str(HARMS)]


def test_a_lesson_that_spoils_one_of_two_models_is_retired():
    helped, spoiled = agents()[0], Solver("cy", Adder("cy", ("calm",), forgets=0), "plain")
    [c] = trial(bank_of(IDLE), TASKS, [helped, spoiled], progress=False)
    lost = [t["model"] for t in c.source["trials"] if t["without"] and not t["with"]]
    assert c.status == "retired" and set(lost) == {"cy"}


def test_two_models_and_enough_tasks_are_needed():
    with pytest.raises(MemCollabError, match="needs 2 different models, and there is 1: add a solver"):
        trial(bank_of(HELPS), TASKS, [agents()[0], replace(agents()[0], name="ada again")])
    assert states(trial(bank_of(HELPS), TASKS, agents()[:1], models=1, progress=False)) == {"carrying": "active"}
    few = trial(bank_of(HELPS), TASKS[:3], agents(), progress=False)
    assert few[0].status == "new" and "3 tasks of its kind, 4 are needed" in repr(few)
    elsewhere = trial(bank_of(replace(HELPS, category="areas")), TASKS, agents(), progress=False)
    assert elsewhere[0].status == "new" and "trials" not in elsewhere[0].source


def test_what_nobody_could_judge_is_no_try():
    silent = Solver("bo", Adder("bo"), "plain")
    silent.chat.chat = lambda *a, **k: Reply("", finish="refused: no such thing")
    found = trial(bank_of(HELPS), TASKS, [agents()[0], silent], budget=4, progress=False)
    assert {t["model"] for t in found[0].source["trials"]} == {"ada"}
    assert found[0].status == "on trial" and "too few of its tries could be judged" in repr(found)


def test_a_lesson_that_makes_a_model_talk_without_end_has_spoiled_the_answer():
    class Talker(Adder):
        def chat(self, messages, **settings):
            reply = super().chat(messages, **settings)
            return replace(reply, text="", finish="length") if "calm" in messages[-1]["content"] else reply
    talkers = [Solver(n, Talker(n, forgets=0), "plain") for n in ("ada", "bo")]
    [c] = trial(bank_of(IDLE), TASKS, talkers, progress=False)
    assert c.status == "retired" and all(t["without"] and not t["with"] for t in c.source["trials"])


def test_two_solvers_of_one_model_have_tries_of_their_own():
    x, y = Solver("x", Adder("m", ("calm",), forgets=0), "plain"), Solver("y", Adder("m", forgets=0), "plain")
    [c] = trial(bank_of(IDLE), TASKS, [x, y], models=1, progress=False)
    assert c.status == "retired" and {t["solver"] for t in c.source["trials"]} == {"x", "y"}


def test_two_solvers_that_fail_alike_are_one_witness():
    "The level holds: of lessons without effect, judged by a model under three names, one in twenty is retired early."
    rng, names, retired = random.Random(0), ("x", "y", "z"), 0
    for _ in range(300):
        tries = []
        for task in range(16):
            right, was_right = rng.choice([(True, False), (False, True)])
            found = {"task": str(task), "model": "m", "without": was_right, "with": right}
            tries += [{**found, "solver": s} for s in names]
            if task % 4 == 3 and _decide(tries, False, .05, 4, 1) == "retired":
                retired += 1
                break
    assert retired / 300 <= .05 # it was .27 where each name was a witness


def test_what_others_decided_meanwhile_stays():
    bank, team = bank_of(HELPS, IDLE), agents()
    plain = team[0].chat.chat
    def meddle(*args, **settings):
        if team[0].chat.asked == 6: bank.set_status(HELPS.id, "quarantined"); bank.remove(IDLE.id)
        return plain(*args, **settings)
    team[0].chat.chat = meddle
    assert states(trial(bank, TASKS, team, progress=False)) == {"carrying": "quarantined"}


@pytest.mark.parametrize("junk", ["abc", [1], [{"task": "x"}], 5, [{"task": "x", "solver": "s", "model": ["l"]}]])
def test_forged_tries_are_passed_over(junk):
    bank = bank_of(replace(HELPS, source={"trials": junk, "also": junk}))
    bank.add(replace(HELPS, source={"pairs": [{"task": "t", "right": "r", "wrong": "w"}]}))
    [c] = trial(bank, TASKS, agents(), progress=False)
    assert c.status == "active" and len(c.source["trials"]) > 4


def test_a_new_wording_is_no_way_out():
    bank = bank_of(replace(HELPS, status="quarantined"), replace(HARMS, status="retired", source={"trials": [1]}))
    for c, want in zip(bank.entries(), ("quarantined", "new")):
        new = bank.revise(c.id, Constraint(c.when, f"{c.enforce} slowly", c.avoid, c.category))
        [found] = [e for e in bank.entries() if e.id == new]
        assert found.status == want and "trials" not in found.source


def test_a_trial_goes_on_where_it_was_stopped(tmp_path):
    bank, path = ConstraintBank(tmp_path/"bank.db"), tmp_path/"attempts.jsonl"
    bank.add([HELPS, HARMS, IDLE])
    with pytest.raises(ChatDown): trial(bank, TASKS, agents(fails=[30]), path, progress=False)
    before = len(load_attempts(path))
    assert before > 20
    team = agents()
    found = trial(bank, TASKS, team, path, progress=False)
    assert sum(s.chat.asked for s in team) == len(load_attempts(path)) - before # nothing is asked twice
    want = trial(bank_of(HELPS, HARMS, IDLE), TASKS, agents(), progress=False)
    assert [(c.status, c.source["trials"]) for c in found] == [(c.status, c.source["trials"]) for c in want]
    assert trial(bank, TASKS, agents(fails=[1]), path, progress=False) == [] # all are decided: nobody is asked


def test_text_from_outside_is_tried_only_when_asked(tmp_path):
    path = bank_of(replace(HELPS, status="active"), replace(HARMS, status="active")).export_json(tmp_path/"in.json")
    bank = ConstraintBank()
    assert bank.import_(path).added == 2
    assert {c.status for c in bank.entries()} == {"quarantined"} and not bank.retrieve("1 plus 5", "sums")
    assert trial(bank, TASKS, agents(), progress=False) == []
    found = trial(bank, TASKS, agents(), status="quarantined", progress=False)
    assert states(found) == {"carrying": "active", "dropping": "retired"}
    trusted = ConstraintBank()
    trusted.import_(path, trust=True)
    assert {c.status for c in trusted.entries()} == {"active"}


def test_a_known_lesson_keeps_its_status_and_quarantine_lends_nothing(tmp_path):
    def seen(c, task): return replace(c, source={"pairs": [{"task": task, "right": "r", "wrong": "w"}]})
    bank = bank_of(seen(replace(HARMS, status="retired"), "a"))
    bank.add(seen(HARMS, "b")) # distilled again
    [c] = bank.entries()
    assert (c.status, c.support, len(c.task_hashes)) == ("retired", 2, 2)
    outside = replace(seen(HELPS, "c"), status="quarantined")
    bank.add(outside)
    bank.add(seen(HELPS, "d")) # found here as well: out of quarantine, with its own evidence only
    own = next(c for c in bank.entries() if c.enforce == "carrying")
    assert (own.status, own.task_hashes) == ("new", ("d",))
    assert len(merge([HELPS, outside])) == 2
    near = replace(HELPS, when="numbers do meet", status="active")
    bank.add(near)
    assert bank.dedup(.5) == 0 # a lesson that has earned its place does not vanish in one that has not


def test_a_file_from_before_there_was_a_status_is_read(tmp_path):
    with ConstraintBank(tmp_path/"old.db") as bank: bank.add(replace(HELPS, status="active"))
    with sqlite3.connect(tmp_path/"old.db") as db:
        db.execute("ALTER TABLE entries DROP COLUMN status")
        db.execute("DELETE FROM buckets")
    with ConstraintBank(tmp_path/"old.db", create=False) as bank:
        assert [c.status for c in bank.entries()] == ["active"] and len(bank.retrieve("1 plus 5", "sums")) == 1
        bank.set_status(bank.entries()[0].id, "retired", "by hand")
        assert [c.status for c in bank.entries()] == ["retired"] and not bank.retrieve("1 plus 5", "sums")
        assert [c.status for c in bank.entries(version=1)] == ["active"]


@pytest.mark.parametrize("settings, words", [(dict(budget=0), "budget is 0"), (dict(batch=True), "batch is True"),
    (dict(fewest=9, budget=8), "above the budget"), (dict(level=1), "level is 1"), (dict(models=3), "there are 2"),
    (dict(status="nwe"), "status is 'nwe'")])
def test_bad_settings(settings, words):
    with pytest.raises(MemCollabError, match=words): trial(bank_of(HELPS), TASKS, agents(), **settings)
def test_unknown_states():
    bank = bank_of(HELPS)
    with pytest.raises(MemCollabError, match="status is 'good': use one of"): bank.set_status(HELPS.id, "good")
    with pytest.raises(MemCollabError, match="has no entry 'abc'"): bank.set_status("abc", "active")
    with pytest.raises(MemCollabError, match="use some of new"): bank.retrieve("q", status=("active", "good"))
    assert bank.entries() == [HELPS] and bank.version == 1
