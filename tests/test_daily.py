"Every day: talk, look into the memory, ask it again tomorrow, through the commands as a user types them."
import io, json, sys

import pytest

pytest.importorskip("openai", reason="endpoints need the package `openai`")

from comam_nb.cli.__main__ import main
from comam_nb.store.items import MemoryStore
from fake_server import completion


def speak(prompt):
    "One model for three agents and the talk: extraction copies what the user says of herself."
    if "<final_answer>" in prompt: return "<information> [1] </information> <final_answer> Miso </final_answer>"
    if "My cat is called Miso" in prompt and "user:" in prompt: return "Has a cat called Miso. [1]"
    if "It rained" in prompt and "user:" in prompt: return "Says that it rained. [1]"
    return "Likes animals. [1]" if "\n[1]" in prompt else "I see."

@pytest.fixture
def place(server, tmp_path):
    server.answer = speak
    class Place:
        dir, memory = tmp_path, str(tmp_path / "memory.db")
        model = ["--backbone", f"{server.url}#m"]
        history = tmp_path / "log.jsonl"
    said = [{"role": "user", "content": "My cat is called Miso."}, {"role": "assistant", "content": "How nice!"}]
    Place.history.write_text(json.dumps({"messages": said}) + "\n")
    return Place

def run(capsys, *argv):
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_first_day_and_the_next(place, server, capsys):
    ask = ["answer", *place.model, "--memory", place.memory, "--user", "ana", "--query", "What is my cat called?"]
    code, out, err = run(capsys, *ask, "--history", place.history)
    assert code == 0 and "answer: Miso" in out and "session 1 of 1: 2 turns, 1 facts stored" in out, (out, err)
    n, asked = len(MemoryStore(place.memory).items("ana")), len(server.log)
    code, out, _ = run(capsys, *ask, "--history", place.history) # the same log again
    assert code == 0 and "read before" in out and len(MemoryStore(place.memory).items("ana")) == n
    assert len(server.log) == asked + 1 # only the question
    code, out, _ = run(capsys, *ask) # tomorrow, without a log
    assert code == 0 and "answer: Miso" in out and len(server.log) == asked + 2
    other = place.dir / "other.jsonl"
    other.write_text(json.dumps({"messages": [{"role": "user", "content": "It rained."}]}) + "\n")
    assert run(capsys, *ask, "--history", other)[0] == 0
    assert [i.cites for i in MemoryStore(place.memory).items("ana", "fine")] == [(1,), (3,)] # no two turns are one
    code, out, _ = run(capsys, "memory", "search", place.memory, "--user", "ana", "--query", "cat", "-k", "1")
    assert code == 0 and "Miso" in out
    assert "1 items are deleted" in run(capsys, "memory", "forget", place.memory, "--user", "ana", "--id",
                                        MemoryStore(place.memory).items("ana", "fine")[0].id)[1]
    assert run(capsys, *ask, "--history", place.history)[0] == 0 # what was forgotten does not come back
    assert not any("Miso" in i.text for i in MemoryStore(place.memory).items("ana", "fine"))


def test_chat_writes_the_memory_as_one_talks(place, server, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("My cat is called Miso.\n\n/memory\nIt rained.\n/quit\n"))
    code, out, err = run(capsys, "chat", *place.model, "--memory", place.memory, "--user", "ana")
    assert code == 0, err
    assert "+ [1] Has a cat called Miso." in out and "+ [3] Says that it rained." in out and "0 items about ana" in out
    monkeypatch.setattr(sys, "stdin", io.StringIO("What do you know?\n"))
    code, out, _ = run(capsys, "chat", *place.model, "--memory", place.memory, "--user", "ana")
    told = [b["messages"][0]["content"] for *_, b in server.log if b["messages"][0]["role"] == "system"]
    assert code == 0 and "2 items about ana" in out and "| Has a cat called Miso." in told[-1]


def test_a_dead_endpoint_is_a_line_and_the_talk_goes_on(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello?\n/memory\n"))
    code, out, _ = run(capsys, "chat", "--backbone", "http://127.0.0.1:9/v1#m", "--retries", "0")
    assert code == 0 and "no reply: m at 127.0.0.1" in out


def test_an_evaluation_goes_on_when_the_server_has_moved(servers, tmp_path, capsys):
    first, second, _ = servers
    ask = ["eval", "--data", "microworld", "--system", "base", "--questions", "2", "--out", tmp_path / "out"]
    assert run(capsys, *ask, "--backbone", f"{first.url}#m")[0] == 0 and first.log
    assert run(capsys, *ask, "--backbone", f"{second.url}#m")[0] == 0 and not second.log # all is on the disk
    code, _, err = run(capsys, *ask, "--backbone", f"{second.url}#other")
    assert code == 2 and "another settings" in err and not second.log, err


def test_how_long_a_silent_endpoint_is_waited_for(place, server, capsys, monkeypatch):
    server.always = "silent"
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello?\n"))
    code, out, _ = run(capsys, "chat", *place.model, "--timeout", "0.2", "--retries", "0")
    assert code == 0 and "no reply: " in out and len(server.log) == 1
    code, _, err = run(capsys, "chat", *place.model, "--timeout", "-1")
    assert code == 2 and err.startswith("comam: ") and "timeout" in err and err.count("\n") == 1, err


@pytest.mark.parametrize("argv, words", [
    (["answer", "--query", "x"], "name a chat log with --history, or a memory file with --memory"),
    (["answer", "--query", "x", "--memory", "no.db"], "there is no such memory"),
    (["answer", "--query", "x", "--memory", "MEMORY", "--user", "eve"], "holds nothing of 'eve': it knows ana"),
    (["train", "--data", "microworld"], "a model behind an endpoint cannot be trained"),
    (["chat", "--adapters", "somewhere"], "--adapters goes with a model of your own")])
def test_bad_input(argv, words, place, capsys):
    from comam_nb.store.items import MemoryItem
    with MemoryStore(place.memory) as store: store.add(MemoryItem("", "ana", "Likes tea."))
    argv = [place.memory if a == "MEMORY" else a for a in argv]
    code, _, err = run(capsys, *argv, *place.model)
    assert code == 2 and err.startswith("comam: ") and words in err and err.count("\n") == 1, err


@pytest.mark.parametrize("line", [
    '{"read": ["u", "2 abc", 1%s, 2]}' % ("0" * 30), '{"read": ["u\\ud800", "2 abc", 1, 2]}',
    '{"read": ["u", "2 abc", Infinity, 2]}', '{"read": ["u", "2 abc", true, 1.9]}', '{"read": [true, null, -5, "-7"]}',
    '{"read": ["u", "junk", 1, 2]}', '{"item": {"id": "", "user": "u", "text": "x"}}', "[1]", "\xff"])
def test_no_junk_is_imported(line, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_bytes(line.encode("latin-1"))
    code, _, err = run(capsys, "memory", "import", tmp_path / "memory.db", "--file", tmp_path / "in.jsonl")
    assert code == 2 and err.startswith("comam: ") and err.count("\n") == 1, err
    if (tmp_path / "memory.db").exists(): # then nothing is in it
        assert run(capsys, "memory", "stats", tmp_path / "memory.db")[1].count("\n") == 1


def test_an_import_keeps_the_turns_of_logs_apart(tmp_path, capsys):
    from comam_nb.store.items import MemoryItem
    paths = [str(tmp_path / f"{n}.db") for n in "ab"]
    for n, path in zip("ab", paths):
        item, read = MemoryItem(n, "ana", f"Said {n}.", "fine", [1]), ("ana", f"2 {n}", 1, 2)
        with MemoryStore(path) as store: store.add(item, [read])
    run(capsys, "memory", "export", paths[0], "--file", tmp_path / "out.jsonl")
    for _ in range(2): assert run(capsys, "memory", "import", paths[1], "--file", tmp_path / "out.jsonl")[0] == 0
    with MemoryStore(paths[1]) as store:
        assert [(i.text, i.cites) for i in store.items("ana")] == [("Said b.", (1,)), ("Said a.", (3,))]
        assert store.sessions("ana") == {"2 b": (1, 2), "2 a": (3, 2)}


def test_a_talk_survives_bytes(place, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xff?\nMy cat is called Miso.\n/forget \xff\n"),
                                                       encoding="utf-8"))
    code, out, err = run(capsys, "chat", *place.model, "--memory", place.memory, "--user", "ana")
    assert code == 0 and "Has a cat called Miso." in out and "Traceback" not in err


def test_new_facts_make_a_profile_stale_also_across_commands(place, server, capsys, monkeypatch):
    ask = ["answer", *place.model, "--memory", place.memory, "--user", "ana", "--query", "What is my cat called?"]
    run(capsys, *ask, "--history", place.history)
    monkeypatch.setattr(sys, "stdin", io.StringIO("It rained.\n"))
    run(capsys, "chat", *place.model, "--memory", place.memory, "--user", "ana")
    n = len(server.log)
    run(capsys, *ask)
    assert len(server.log) == n + 2 # the profile anew, and the question
    fact = MemoryStore(place.memory).items("ana", "fine")[0].id
    assert "the profile was made from such facts" in run(capsys, "memory", "forget", place.memory, "--user", "ana",
                                                         "--id", fact)[1]
    assert MemoryStore(place.memory).items("ana", "coarse") == []


def test_a_file_of_another_program_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes.db").write_text("I am no database, and long enough to be one." * 9)
    code, _, err = run(capsys, "memory", "stats", tmp_path / "notes.db")
    assert code == 2 and "cannot be opened" in err and err.count("\n") == 1


# ---- an endpoint that is down ---------------------------------------------------------------------------------------
TASK = '{"id": "a", "prompt": "What is 2 + 3?", "check": {"kind": "math", "answer": "5"}}\n'
QUESTION = {"messages": [{"role": "user", "content": "My cat is called Miso."}],
            "questions": [{"query": "What is my cat called?", "answer": "Miso"}]}

@pytest.fixture
def once(monkeypatch):
    "Endpoints that do not try again."
    from comam_nb.lm.endpoints import EndpointChat
    old = EndpointChat.__init__
    monkeypatch.setattr(EndpointChat, "__init__", lambda self, *a, **k: old(self, *a, **{**k, "retries": 0}))

@pytest.mark.parametrize("command", ["answer --memory {d}/me.db --query cat? --backbone {m}",
    "answer --history {d}/log.jsonl --query cat? --backbone {m}", "chat --backbone {m}",
    "eval --system rag --data chat:{d}/q.jsonl --out {d}/eval --backbone {m}",
    "build --bank {d}/new.db --tasks {d}/tasks.jsonl --weak plain:{m} --strong cot:{m}",
    "solve --bank {d}/bank.db --tasks {d}/tasks.jsonl --agent {m}",
    "solve --bank {d}/bank.db --prompt 2+3? --agent {m}",
    "eval --bank {d}/bank.db --tasks {d}/tasks.jsonl --agent {m}"])
def test_every_command_names_the_endpoint_that_is_down(command, place, once, capsys, monkeypatch):
    from comam_nb.cli.memcollab import main as memcollab
    from comam_nb.memcollab.bank import ConstraintBank
    from comam_nb.store.items import MemoryItem
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello?\n"))
    (place.dir / "tasks.jsonl").write_text(TASK); (place.dir / "q.jsonl").write_text(json.dumps(QUESTION))
    ConstraintBank(place.dir / "bank.db").close()
    with MemoryStore(place.dir / "me.db") as store: store.add(MemoryItem("", "user", "Likes tea."))
    argv = [a.format(d=place.dir, m="http://ana:geheim77@127.0.0.1:9/v1#m") for a in command.split()]
    code = (memcollab if "--bank" in argv else main)(argv)
    out, err = capsys.readouterr()
    told = out if argv[0] == "chat" else err # a talk goes on
    assert code == (0 if argv[0] == "chat" else 2) and "m at 127.0.0.1:9: no answer" in told, (out, err)
    assert "Connection refused" in told and "check that the server is up" in told and err.count("\n") <= 1
    kept = b"".join(p.read_bytes() for p in place.dir.rglob("*") if p.is_file())
    assert "geheim77" not in out + err and b"geheim77" not in kept


def test_what_was_read_before_the_server_died_is_kept(place, server, once, capsys):
    days = ["My cat is called Miso.", *(f"It rained on day {i}." for i in range(9))]
    place.history.write_text("".join(json.dumps({"messages": [{"role": "user", "content": d}]}) + "\n" for d in days))
    ask = ["answer", *place.model, "--memory", place.memory, "--query", "What is my cat called?",
           "--history", place.history]
    server.moods, server.always = ["well"] * 3, 503
    code, out, err = run(capsys, *ask)
    assert code == 2 and out.count(" turns, 1 facts stored") == 3 and err.count("\n") == 1
    assert f"127.0.0.1:{server.server_port}" in err and "3 of 10 sessions are read" in err
    server.moods, server.always, n = [], None, len(server.log)
    code, out, err = run(capsys, *ask)
    assert code == 0 and out.count("read before") == 3 and "answer: Miso" in out, err
    assert len(server.log) - n == 7 + 2 # the other sessions, the profile, the question


def test_what_a_server_does_not_take_is_said(place, server, capsys):
    def no_seed(h):
        if "temperature" in h.server.log[-1][3]:
            return h.send(400, b'{"error": {"message": "Unsupported parameter: temperature"}}')
        h.send(200, completion("I see."))
    server.always = no_seed
    code, _, err = run(capsys, "answer", *place.model, "--history", place.history, "--query", "cat?")
    assert code == 0 and err == "comam: m: the server does not take this temperature: it is left out from now on\n"
