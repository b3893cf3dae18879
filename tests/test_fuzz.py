"""Damaged input: every reader and parser raises what it documents, or nothing, and needs time in proportion.
`python scripts/fuzz.py --inputs 2000000` is the long run; `pytest -m slow tests/test_fuzz.py` doubles inputs up to
4 MB."""
import importlib.util, json, os, re, sys, time, zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comam_nb.base.errors import DataError, MemCollabError, StoreError
from comam_nb.base.files import write_whole
from comam_nb.base.values import json_fault
from comam_nb.checks.constraints import Constraint, _numbers, merge
from comam_nb.checks.tasks import Task
from comam_nb.data import Episode, Message
from comam_nb.mdp import Trajectory, read_trajectories
from comam_nb.readers.task_files import load_gsm8k, load_tasks
from comam_nb.store import lexical
from comam_nb.store.exchange import import_entries
from comam_nb.store.items import MemoryItem, MemoryStore

ROOT = Path(__file__).resolve().parents[1]

def script():
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "scripts" / "fuzz.py")
    sys.modules["fuzz"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

fuzz = script()
TARGETS = fuzz._targets()

def test_damaged_inputs_raise_what_is_documented():
    out = fuzz.run(TARGETS, 20 * len(TARGETS), seed=1)
    assert all(o.inputs == 20 for o in out.values())
    assert not any(o.faults for o in out.values()), fuzz.report(out)

def test_an_undocumented_exception_is_seen_with_its_shortest_input():
    target = fuzz.Target(lambda t: 1 // ("[" not in t), ["tea"], kind="text")
    out = fuzz.run({"divides": target}, 300)["divides"]
    (kind, (data, _)), = out.faults.items()
    assert kind.startswith("ZeroDivisionError") and data == "["
    target = fuzz.Target(lambda t: time.sleep(9), ["tea"])
    fuzz.CLOCK, before = 0.05, fuzz.CLOCK
    try: assert fuzz.fault_of(target, "tea")[0] == "more than 0.05 s"
    finally: fuzz.CLOCK = before

values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                      lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(
                          "role content from value messages mapping user text id check history query".split()), v,
                          max_size=3), max_leaves=8)

@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(values)
def test_any_json_value_is_read_or_refused(value):
    for name, target in TARGETS.items():
        if target.kind == "value": assert fuzz.fault_of(target, value) is None, name
        elif name.endswith(".json"): assert fuzz.fault_of(target, json.dumps(value).encode()) is None, name


# ---- kinds that were found, each with what is right

DEEP, LONG = "[" * 100_000, "9" * 5000

def nested(levels):
    value = []
    for _ in range(levels): value = [value]
    return value

@pytest.mark.parametrize("text", [DEEP, LONG, '{"a": ' * 2000, "\ufeff["])
def test_deep_brackets_and_long_numbers_are_a_line(tmp_path, text):
    path = tmp_path / "in.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MemCollabError, match="line 1|item 1|in.jsonl: not JSON"): load_tasks(path)
    with pytest.raises(DataError, match="in.jsonl, line 1"): read_trajectories(path)

@pytest.mark.parametrize("source,why", [({1: 2}, "a key that is no text"), ({"pairs": nested(3000)}, "100 levels"),
                                        ({"a": "\ud800"}, "half a character"), ({"a": 10**5000}, "4,000 digits"),
                                        ({"a": {1}}, "type set")])
def test_provenance_that_no_file_can_hold_is_refused(source, why):
    with pytest.raises(MemCollabError, match=why): Constraint("x is asked", "do y", source=source)
    assert why in json_fault(source)

def test_numbers_that_are_too_large_are_named_and_not_shown():
    for bad in (10**5000, 2**63, nested(3000)):
        with pytest.raises(MemCollabError, match="support is"): Constraint("x is asked", "do y", support=bad)
        with pytest.raises(StoreError, match="cites"): MemoryItem(user="ana", text="x", cites=[bad])
        with pytest.raises(MemCollabError, match="field 'id'"): Task(bad, "1+1?")
    assert merge([Constraint("x is asked", "do y", support=2**62)])[0].support == 2**62

def test_turns_and_ids_that_are_too_long_to_show_are_refused():
    huge, talk = 10**5000, dict(role="user", content="I drink tea.")
    for name, bad in ("turn", dict(talk, turn=huge)), ("id", dict(talk, id=huge)):
        with pytest.raises(DataError, match=f"field '{name}' holds a number of more than 4,000 digits"):
            Message.from_json(bad)
    with pytest.raises(DataError, match="message <int too deep or too long to show>: unknown role"):
        Message("elf", "x", turn=huge)
    record = fuzz._episode.to_json()
    with pytest.raises(DataError, match=r"evidence \[3, <int too deep or too long to show>\] is out of range"):
        Episode.from_json(dict(record, evidence=[1, 3, huge]))
    with pytest.raises(DataError, match="field 'query' is missing.* fields found are .*too deep or too long"):
        Episode.from_json({huge: 1, **{k: v for k, v in record.items() if k != "query"}})
    steep = dict(fuzz._trajectory, transitions=[dict(agent=nested(900))])
    with pytest.raises(ValueError, match="its agents are .*the process"): Trajectory.from_json(steep)

def test_a_list_of_numbers_is_no_long_number():
    assert _numbers("1,1,000 and 1,234,567.5 or 12,3") == {1, 1000, 1234567.5, 12, 3}

@pytest.mark.parametrize("kind,n", [("9" * 5000, 2), ("<f8", 1), ("O", 1), ("i8,i8", 1), ("|i1", 2), (["|u1"], 2)])
def test_a_forged_type_of_an_array_is_no_index(kind, n):
    (_, *arrays), data = fuzz._frozen()
    layout = json.dumps([[kind, n], *arrays])
    for text, sound in (json.dumps(fuzz._frozen()[0]), True), (layout, False):
        sum_ = zlib.crc32(bytes(data), zlib.crc32(text.encode(), lexical._CUT))
        assert (lexical.Bucket.thaw(sum_, text, bytes(data), 1) is not None) == sound

def test_forged_places_that_fall_are_no_index():
    "In unsigned numbers a fall looks like a rise: 3, 1 is a step of 254."
    layout, data = fuzz._frozen()
    for i in range(2, len(layout)): # `ends` and `starts` of the lists: in each, two neighbours change places
        if (i - 1) % 5 not in (1, 2): continue
        at = sum(int(kind[-1]) * n for kind, n in layout[:i])
        forged = bytearray(data)
        forged[at + 1] = forged[at + 2] + 1
        forged, text = bytes(forged), json.dumps(layout)
        sum_ = zlib.crc32(forged, zlib.crc32(text.encode(), lexical._CUT))
        if layout[i][1] > 2: assert lexical.Bucket.thaw(sum_, text, forged, 1) is None, i

def test_forget_wants_a_name_and_says_so():
    with MemoryStore() as store:
        store.add(MemoryItem(user="ana", text="Likes tea"))
        for user, ids in ((["ana"], None), ("ana", 3), ("ana", [["m1"]]), (nested(3000), None)):
            with pytest.raises(StoreError): store.forget(user, ids)
        assert len(store) == 1 and store.forget("ana") == 1

def test_a_damaged_row_of_citations_names_its_item():
    with MemoryStore() as store:
        store.add(MemoryItem(user="ana", text="Likes tea", cites=[1]))
        for bad in ("", "[", DEEP, '"x"', "[0]", "3", "[9" + LONG + "]"):
            with store.file.transaction(write=True) as db: db.execute("UPDATE items SET cites=?", (bad,))
            with pytest.raises(StoreError, match="the stored item 'm1' of 'ana' is damaged"): store.items("ana")
        assert store.forget("ana") == 1

@pytest.mark.parametrize("which", ["/dev/zero", "pipe", "folder"])
def test_what_is_no_file_is_not_read(tmp_path, which):
    path = Path(which) if which[0] == "/" else tmp_path / which
    if which == "pipe": os.mkfifo(path)
    if which == "folder": path.mkdir()
    with fuzz.clock(5):
        for read in (load_tasks, load_gsm8k, lambda p: import_entries(None, p)):
            with pytest.raises(MemCollabError, match="and no file"): read(path)
        with pytest.raises(DataError, match="and no file"): read_trajectories(path)

def test_half_a_character_is_never_half_written(tmp_path):
    (tmp_path / "x").write_text("before")
    with pytest.raises(MemCollabError, match="half a character"): write_whole(tmp_path / "x", "tea \ud800")
    assert (tmp_path / "x").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


# ---- time in proportion

PUMPS = [*fuzz._PIECES, "x ", "ab1 ", "Ann's. ", "answer is\n", "enforce x; ", "<|im_start|>user\n", "[turn "]
HEADS = ["", "When x", "[", "answer is", "\\boxed{1}", "File \""]
# what took the square of its length, or more: target, head, piece
SLOW = [("read_chat .txt", "<|im_start|>", " "), ("read_chat .txt", "", "<|im_start|>user\nx\n"), ("readable", "", " "),
        ("readable", "【", "†"), ("readable", "", ":contentReference[oaicite:"), ("cloze questions", "", "word "),
        ("read_citations", "", "[1]"), ("read_citations", "", "\0"), ("code answer", "", "```\nx\n```\n"),
        ("code answer", "def f(): pass\na:b", "b"), ("task's words", "", "\n"), ("task's words", "x ", "Ab "),
        ("kind of task", "", "[asy]"), ("evidence", "D", " "), ("math answer", "\\boxed{1}", " "),
        ("constraints", "When x", " ")]

def cost(target, text):
    "Seconds of the processor."
    data = text if target.kind == "text" else text.encode("utf-8", "replace")
    start = time.process_time()
    try: target.call(data)
    except target.errors: pass
    return time.process_time() - start

def grows(target, head, piece, size):
    "How often longer eight times the length takes: 8 in proportion, 64 for a square. 0: too short to tell."
    text = lambda n: (head + piece * (n // len(piece) + 1))[:n] + ("" if head != "\\boxed{1}" else "x\\boxed{2}")
    less = more = float("inf")
    for _ in range(5): # a busy machine
        more = min(more, cost(target, text(8 * size)))
        if more < 0.02: return 0
        less = min(less, cost(target, text(size)))
        if more < TOO_MUCH * less: break
    return more / less

TOO_MUCH = 24 # between 8 and 64

def test_a_square_is_seen():
    square, line = (fuzz.Target(lambda t, p=p: re.search(p, t + "x"), []) for p in (" +$", " +x"))
    assert grows(square, "", " ", 800) > TOO_MUCH > grows(line, "", " ", 800)

@pytest.mark.parametrize("name,head,piece", SLOW)
def test_what_took_the_square_of_its_length_takes_no_more_than_its_share(name, head, piece):
    assert grows(TARGETS[name], head, piece, 2_500) < TOO_MUCH

@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, t in TARGETS.items() if t.kind == "text" or n.endswith(".txt")])
def test_doubling_to_four_million_characters(name):
    "Pieces that show a square at 4,000 would take hours at 4,000,000: first they are looked for, then size is doubled."
    for head in HEADS:
        for piece in PUMPS: assert grows(TARGETS[name], head, piece, 2_000) < TOO_MUCH, (head, piece)
    for head, piece in [("", "x "), ("", "Ann's. "), ("", "[1]\n"), ("When x", " ")]:
        for size in (62_500, 500_000): assert grows(TARGETS[name], head, piece, size) < TOO_MUCH, (head, piece, size)

def test_a_header_with_too_few_offsets_is_a_torn_file(tmp_path):
    from comam_nb.base.files import last_checkpoint
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    head, told = b'{"a": {"data_offsets": [0]}}', []
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    assert last_checkpoint(tmp_path, told.append) is None and "model.safetensors cannot be read" in told[0]
