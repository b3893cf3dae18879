"Nothing lost, nothing left: kills at random moments, a disk without room, forks, turns, and what `forget` leaves."
import importlib.util, json, os, random, signal, sqlite3, subprocess, sys, warnings
from pathlib import Path

import pytest

from comam_nb.base.embedders import HashingEmbedder
from comam_nb.checks.constraints import Constraint
from comam_nb.cli.__main__ import main
from comam_nb.memcollab.bank import ConstraintBank
from comam_nb.store.items import MemoryItem, MemoryStore

ROOT = Path(__file__).parents[1]
SMALL = HashingEmbedder(16)

def script(name):
    "A file of scripts/, which is no package."
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

@pytest.fixture(scope="module")
def kills(): return script("kills")

@pytest.fixture(scope="module")
def power(kills): return script("power")

def left(folder, *texts):
    "Which of these some file of the folder holds."
    data = b"".join(p.read_bytes() for p in Path(folder).iterdir())
    return [t for t in texts if t.encode() in data]


# ---- kills

@pytest.mark.parametrize("what", ["store", "eval", *(pytest.param(w, marks=pytest.mark.slow)
                                                      for w in ("bank", "journal", "trajectories"))])
def test_a_kill_loses_nothing(kills, what, tmp_path, monkeypatch):
    "CONTRIBUTING.md has the command for 500 of them; a kill of training is in tests/test_run.py, and in that command."
    monkeypatch.setattr(kills, "WHERE", str(tmp_path))
    found = (kills.kill_endless if what in kills.ENDLESS else kills.kill_ending)(what, 2, random.Random(1))
    assert found["problems"] == [] and found["kills"] >= 2

@pytest.mark.parametrize("broken", ["an item", "a byte"])
def test_what_is_lost_or_left_is_seen(kills, broken, tmp_path):
    "The check itself can fail."
    with kills.items_of(tmp_path) as store: store.add([MemoryItem("a1", "ana", "tea"), MemoryItem("b2", "ana", "tea")])
    told = ["added a1 c3"] if broken == "an item" else ["added a1 b2", "forgetting b2", "forgotten b2"]
    assert any("c3 is lost" in b or "b2 is on the disk" in b for b in kills.check_store(tmp_path, told))


# ---- torn and garbled files

def damaged(data, rng):
    "Cuts, other bytes, zeros behind the end."
    for at in (0, 1, len(data) // 2, len(data) - 20, len(data) - 1): yield data[:at]
    for _ in range(4):
        at = rng.randrange(len(data) - 16)
        yield data[:at] + rng.randbytes(16) + data[at + 16:]
    yield data + bytes(512)

def one_line(e): return type(e).__module__.startswith("comam_nb") and "\n" not in str(e)

def test_a_damaged_run_file_goes_on_or_is_refused(kills, tmp_path):
    path, ends, told = kills.run_file(tmp_path), {"went on": 0, "refused": 0}, 0
    kills.work_eval(tmp_path, lambda line: None)
    whole, data = kills.state_eval(tmp_path), path.read_bytes()
    lines = data.splitlines(True)
    odd = [b"".join([*lines[:3], lines[3].replace(b'"right"', b'"rXght"'), *lines[4:]]),
           b"".join([*lines[:3], lines[3].replace(b'"f1": 1', b'"f1": "'), *lines[4:]])]
    for content in (*damaged(data, random.Random(0)), *odd):
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try: kills.work_eval(tmp_path, lambda line: None)
            except Exception as e:
                assert one_line(e) and path.read_bytes() == content
                ends["refused"] += 1
                continue
        assert kills.state_eval(tmp_path) == whole
        torn = content[-1:] not in (b"", b"\n")
        assert [str(w.message).count("the last line was cut off") for w in caught] == [1] * torn
        ends["went on"] += 1
        told += len(caught)
    assert ends["went on"] >= 6 and ends["refused"] >= 3 and told >= 4, (ends, told)

@pytest.mark.slow
def test_a_damaged_build_goes_on_or_is_refused(server, tmp_path, capsys):
    "Every file of `memcollab build`'s folder, one after the other."
    from test_memcollab_cli import answer, pears, write
    from comam_nb.cli.memcollab import main
    server.answer = answer
    folder, tasks, rng = tmp_path / "build", write(tmp_path / "tasks.jsonl", pears(6)), random.Random(0)
    folder.mkdir()
    spec, bank = f"{server.url}#m", folder / "bank.db"
    build = ["build", "--bank", str(bank), "--tasks", tasks, "--weak", f"plain:{spec}", "--strong", f"cot:{spec}",
             "--tries", "0", "--quiet", "--classify", "offline", "--report", str(folder / "report.json")]
    def lessons():
        with ConstraintBank(bank, create=False) as b: return b.entries()
    assert main(build) == 0
    kept, ends = {p: p.read_bytes() for p in folder.iterdir() if p.suffix != ".lock"}, []
    for path, data in kept.items():
        for content in damaged(data, rng):
            for p, whole in kept.items(): p.write_bytes(content if p == path else whole)
            capsys.readouterr()
            code = main(build)
            err = capsys.readouterr().err
            assert (code == 0 and err.count("\n") <= 1) or (code == 2 and err.count("\n") == 1), (path, err)
            ends.append((path.name, code))
            if code == 0 and path != bank: assert lessons() and len(json.loads(kept[folder / "report.json"])) > 3
    assert {code for _, code in ends} == {0, 2} and ("report.json", 2) not in ends


# ---- the power is cut

def test_what_a_cut_leaves(power, tmp_path):
    "The model of a disk: what is forced stays, names and bytes apart; the rest may be there in part."
    rng, file, folder = random.Random(0), power.File(), power.Folder()
    file.change(0, b"a" * 1024); file.force(); file.change(512, b"b" * 1024)
    left = {mode: {file.after(mode, rng) for _ in range(40)} for mode in power.MODES}
    a, b = b"a" * 512, b"b" * 512
    assert left["nothing"] == {a + a} and left["everything"] == {a + b + b}
    assert left["some"] == {a + a, a + b + b} and left["sectors"] == {a + a, a + b, a + b + b, a + a + b}
    file.change(3, None)
    assert file.after("everything", rng) == b"aaa" and bytes(file.live) == b"aaa"
    folder.change("x", node=file); folder.force(); folder.change("x", "y"); folder.change("z", node=file)
    names = set()
    for n in range(40):
        folder.leave(tmp_path / f"{n}", "some", rng)
        names.add(" ".join(sorted(os.listdir(tmp_path / f"{n}"))))
    assert names == {"x", "y", "y z"} # in their order

@pytest.mark.slow
@pytest.mark.parametrize("what", ["store", "bank", "journal", "eval", "files"])
def test_a_cut_loses_nothing(power, what, tmp_path, monkeypatch):
    if not power.shutil.which("strace"): pytest.skip("the calls are recorded by `strace`, which is not here")
    monkeypatch.setattr(power.kills, "WHERE", str(tmp_path))
    assert power.cut(what, 40, 40, random.Random(1))["problems"] == []

@pytest.mark.slow
def test_a_cut_is_seen(power, tmp_path, monkeypatch):
    "The check can fail: nothing is forced to the disk."
    if not power.shutil.which("strace"): pytest.skip("the calls are recorded by `strace`, which is not here")
    monkeypatch.setattr(power.kills, "WHERE", str(tmp_path))
    monkeypatch.setattr(power.File, "force", lambda self: None)
    for what in ("store", "journal", "files"): assert power.cut(what, 20, 20, random.Random(1))["problems"]


# ---- a disk without room, forks, turns

@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(kills, tmp_path, monkeypatch):
    monkeypatch.setattr(kills, "WHERE", str(tmp_path))
    found = kills.full((*kills.ENDLESS, "eval", "trajectories"))
    assert found["problems"] == [], found["said"]

def in_a_fork(work):
    "What `work` returns or raises in a forked process, as text."
    out, told = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            try: text = str(work())
            except Exception as e: text = f"{type(e).__name__}: {e}"
            os.write(told, text.encode())
        finally: os._exit(0)
    os.close(told)
    with open(out) as f: text = f.read()
    os.waitpid(pid, 0)
    return text

def test_a_fork_may_not_use_what_its_parent_opened(tmp_path):
    store, bank = MemoryStore(tmp_path / "m.db", SMALL), ConstraintBank(tmp_path / "b.db")
    store.add(MemoryItem("a", "ana", "tea"))
    for call in (lambda: store.items("ana"), lambda: store.add(MemoryItem(user="ana", text="x")),
                 lambda: store.search("tea", "ana"), lambda: store.forget("ana"), lambda: len(store)):
        text = in_a_fork(call)
        assert text.startswith("StoreError: ") and "is a fork of it: open it here" in text and "\n" not in text
    assert in_a_fork(bank.entries).startswith("MemCollabError: ")
    with store.file.lock: # held at that moment: a fork would wait for it for ever
        assert "is a fork of it" in in_a_fork(lambda: store.items("ana"))
    def anew():
        store.close() # lets go of it, and no more
        with MemoryStore(tmp_path / "m.db", SMALL) as own: return own.add(MemoryItem("b", "ana", "cake"))
    assert in_a_fork(anew) == "['b']"
    assert [i.id for i in store.items("ana")] == ["a", "b"] and store.add(MemoryItem("c", "ana", "rum")) == ["c"]
    store.close(); bank.close()

@pytest.mark.slow
def test_everybody_gets_a_turn(kills, tmp_path, monkeypatch):
    "Four writers and six readers. How long they wait depends on the machine; that nobody is left out does not."
    monkeypatch.setattr(kills, "WHERE", str(tmp_path))
    found = kills.fair(20)
    times = {who: x["times"] for who, x in found["served"].items()}
    print(json.dumps(found["served"]))
    writers = [n for who, n in times.items() if who.startswith("writer")]
    assert not found["problems"] and min(times.values()) > 1 and max(writers) < 10 * min(writers)


# ---- forgetting

def test_rows_that_were_moved_leave_no_trace(tmp_path):
    "When a page of the file is full, SQLite moves rows, and what they leave is not overwritten by `secure_delete`."
    rng, live, gone, n = random.Random(0), [], [], 0
    with MemoryStore(tmp_path / "m.db", SMALL) as store:
        for _ in range(6):
            new = [MemoryItem(f"m{n + i}", rng.choice("ab"), f"MARK{n + i:05d}" + " z" * rng.choice([0, 10, 100, 300]))
                   for i in range(1, 31)]
            n += 30
            store.add(new)
            live += new
            out = rng.sample(live, 20)
            live = [i for i in live if i not in out]
            for user in "ab": store.forget(user, [i.id for i in out if i.user == user])
            gone += [i.text[:9] for i in out]
            assert left(tmp_path, *gone) == []
        assert len(store) == 60 and left(tmp_path, "MARK00180")

def test_a_reader_holds_bytes_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("comam_nb.base.database.Database.wipe.__defaults__", (.1, None), raising=False)
    store, reader = MemoryStore(tmp_path / "m.db"), sqlite3.connect(tmp_path / "m.db", isolation_level=None)
    store.add([MemoryItem("a", "ana", "SECRETTEXT"), MemoryItem("b", "ana", "tea")])
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM items").fetchone()
    with pytest.warns(RuntimeWarning, match="1 items are deleted, but the bytes .* stay in the log"):
        assert store.forget("ana", "a") == 1
    assert left(tmp_path, "SECRETTEXT") and "they go when" in store.remains
    assert [i.id for i in store.items("ana")] == ["b"]
    copy = tmp_path / "copies"
    copy.mkdir()
    reader.execute("COMMIT")
    reader.execute("VACUUM INTO ?", (str(copy / "copy.db"),)) # a copy has what is there, not what was
    assert main(["memory", "export", str(tmp_path / "m.db"), "--file", str(copy / "all.jsonl")]) == 0
    with MemoryStore(copy / "copy.db") as other: assert [i.id for i in other.items("ana")] == ["b"]
    assert left(copy, "SECRETTEXT") == []
    store.add(MemoryItem("c", "ana", "rum")) # the next write takes the bytes along
    copy.joinpath("copy.db").unlink(); copy.joinpath("all.jsonl").unlink(); copy.rmdir()
    assert left(tmp_path, "SECRETTEXT") == []
    assert store.forget("ana") == 2 and store.remains == ""
    reader.close(); store.close()

def test_the_command_says_that_bytes_remain(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("comam_nb.base.database.Database.wipe.__defaults__", (.1, None), raising=False)
    with MemoryStore(tmp_path / "m.db") as store: store.add(MemoryItem("a", "ana", "SECRETTEXT"))
    reader = sqlite3.connect(tmp_path / "m.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM items").fetchone()
    assert main(["memory", "forget", str(tmp_path / "m.db"), "--user", "ana", "--all"]) == 0
    out, err = capsys.readouterr()
    assert "1 items are deleted" in out and "the bytes of what was deleted stay" in err and err.count("\n") == 1
    reader.execute("COMMIT"); reader.close()
    assert main(["memory", "stats", str(tmp_path / "m.db")]) == 0
    assert left(tmp_path, "SECRETTEXT") == []

@pytest.mark.parametrize("when", ["before the bytes are removed", "in the middle of it"])
def test_a_kill_between_forgetting_and_wiping(tmp_path, when):
    code = """if 1:
        import os, sys
        from comam_nb.base import sqlite
        from comam_nb.base.embedders import HashingEmbedder
        from comam_nb.store.items import MemoryStore
        def dies(*_): os.kill(os.getpid(), 9)
        setattr(sqlite._Connection, sys.argv[2], dies)
        MemoryStore(sys.argv[1], HashingEmbedder(16)).forget("ana", "a")"""
    path, step = tmp_path / "m.db", "wipe" if when.startswith("before") else "empty_log"
    with MemoryStore(path, SMALL) as store:
        store.add([MemoryItem("a", "ana", "SECRETTEXT"), MemoryItem("b", "ana", "x")])
    done = subprocess.run([sys.executable, "-c", code, str(path), step], capture_output=True)
    assert done.returncode == -signal.SIGKILL and left(tmp_path, "SECRETTEXT")
    holds = sqlite3.connect(path) # so that nobody is the last to close it, which would empty the log
    holds.execute("SELECT count(*) FROM items").fetchone()
    with MemoryStore(path, SMALL) as store: assert [i.id for i in store.items("ana")] == ["b"]
    assert left(tmp_path, "SECRETTEXT") == []
    holds.close()

def test_a_large_file_is_written_anew_only_if_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("comam_nb.base.sqlite._SMALL", 4096)
    with MemoryStore(tmp_path / "m.db", SMALL) as store:
        store.add([MemoryItem(f"m{n}", "ana", f"SECRET{n}") for n in range(9)])
        with pytest.warns(RuntimeWarning, match="forget with rewrite=True"): store.forget("ana", "m1")
        assert left(tmp_path, "SECRET1") == [] # only page moves leave traces that a new file would remove
        with pytest.warns(RuntimeWarning, match="was not written anew"): store.forget("ana", "m2", rewrite=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            store.forget("ana", "m3", rewrite=True)
        assert store.remains == "" and len(store) == 6

def test_an_item_that_is_not_there_costs_no_rewriting(tmp_path):
    with MemoryStore(tmp_path / "m.db", SMALL) as store:
        store.add(MemoryItem("a", "ana", "tea"))
        asked = []
        store.file.connection.set_trace_callback(asked.append)
        assert store.forget("ana", "zzz") == 0 and not any("VACUUM" in sql for sql in asked)

def lessons_of(*models):
    "What a bank holds, one lesson of each model."
    pair = lambda m: {"task": f"of {m}", "right": "r", "wrong": "w", "right_model": m, "wrong_model": m}
    return [Constraint(f"SECRET{m} appears", "check the unit", "", "c", source={"pairs": [pair(m)]}) for m in models]

def test_a_bank_forgets_a_source_and_says_what_remains(tmp_path, monkeypatch, capsys):
    from comam_nb.cli.memcollab import main
    monkeypatch.setattr("comam_nb.base.database.Database.wipe.__defaults__", (.1, None), raising=False)
    path = tmp_path / "b.db"
    with ConstraintBank(path) as bank:
        bank.add(lessons_of("ada", "bo", "cy", "di"), check=False)
        assert bank.retrieve("SECRETada", "c") and left(tmp_path, "SECRETada", "SECRETcy") == ["SECRETada", "SECRETcy"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(bank.forget("model", "ada")) == 1
        assert left(tmp_path, "SECRETada") == []
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM entries").fetchone()
        with pytest.warns(RuntimeWarning, match="1 entries are erased, but the bytes .* stay in the log") as told:
            bank.forget("model", "bo")
        assert told[0].filename == __file__
        assert main(["forget", "--bank", str(path), "--task", "of cy"]) == 0
        out, err = capsys.readouterr()
        assert "1 lessons came from" in out and "1 entries are erased, but" in err and err.count("\n") == 1
        assert left(tmp_path, "SECRETbo", "SECRETcy") == ["SECRETbo", "SECRETcy"] and len(bank) == 1
        reader.execute("COMMIT")
        with ConstraintBank(path) as other: assert len(other) == 1
        assert left(tmp_path, "SECRETbo", "SECRETcy") == []
        reader.close()

def test_a_large_bank_is_written_anew_only_if_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("comam_nb.base.sqlite._SMALL", 4096)
    with ConstraintBank(tmp_path / "b.db") as bank:
        bank.add(lessons_of("ada", "bo"), check=False)
        with pytest.warns(RuntimeWarning, match="forget with rewrite=True"): bank.forget("model", "ada")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            bank.forget("model", "bo", rewrite=True)
        assert left(tmp_path, "SECRETada", "SECRETbo") == []

@pytest.mark.slow
def test_removing_from_a_bank_while_another_reads(tmp_path):
    with ConstraintBank(tmp_path / "b.db") as bank, ConstraintBank(tmp_path / "b.db") as other:
        bank.add([Constraint("case one", "check the unit", "", "c"), Constraint("case two", "check the sum", "", "c")],
                 check=False)
        with other.file.transaction():
            assert len(other) == 2
            bank.remove(bank.entries()[0].id)
            assert len(other) == 2 and len(bank) == 1
        assert len(other) == 1
