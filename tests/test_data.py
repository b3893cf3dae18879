"""comam_nb.data: real files where they are present, properties, and every error with its place."""
import csv, json, logging, re, subprocess, sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st


from comam_nb.base.errors import DataError
from comam_nb.base.fields import clean_text
from comam_nb.data import Episode, Message, Query, Session, example_episode, make_history, split_by_user, training_view
from comam_nb.readers.chat_logs import cloze_queries, read_chat, read_history
from comam_nb.readers.personamem import read_personamem
from comam_nb.readers.reading import load_episodes, parse_options, write_episodes
from comam_nb.readers.locomo import read_locomo

REAL = Path(__file__).parents[2]/"shared"/"data"
PM, LOCOMO, CTRL = REAL/"personamem_v1", REAL/"locomo"/"locomo_first7.json", REAL/"memoryctrl"

def needs(path):
    return pytest.mark.skipif(not path.exists(),
                              reason=f"the real file {path.name} is not on this machine (see data/SOURCES.md)")

def raises(match, f, *args, **kw):
    with pytest.raises(DataError, match=match): f(*args, **kw)

def put(path, text):
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return path

# ---------------------------------------------------------------- real files

@needs(PM/"questions_32k.csv")
def test_all_options_of_32k_parse():
    with open(PM/"questions_32k.csv", newline="", encoding="utf-8") as f: rows = list(csv.DictReader(f))
    assert len(rows) == 589
    is_json = 0
    for r in rows:
        options = parse_options(r["all_options"])
        assert len(options) == 4 and not any(o.startswith("(") and o[2:3] == ")" for o in options)
        # each option's text stands in the cell behind its label, whatever the quoting (first words only)
        for letter, option in zip("abcd", options):
            start = re.match(r"[A-Za-z ,]*", option)[0]
            assert f"({letter}) {start}" in r["all_options"]
        try: json.loads(r["all_options"]); is_json += 1
        except ValueError: pass
    assert is_json == 286

@needs(PM/"shared_contexts_32k.persona0.jsonl")
def test_personamem_real():
    episodes = read_personamem(PM/"questions_32k.csv", PM/"shared_contexts_32k.persona0.jsonl")
    assert len(episodes) == 17 and dict(episodes.dropped) == {"context not in the contexts file": 572}
    assert {e.user for e in episodes} == {"0"} and {e.evidence_kind for e in episodes} == {"none"}
    raw = {}
    for line in open(PM/"shared_contexts_32k.persona0.jsonl", encoding="utf-8"): raw |= json.loads(line)
    for e in episodes:
        prefix = raw[e.meta["context"]][:e.meta["end_index"]]
        assert sum(len(m["content"]) for m in prefix) == e.meta["context_length_in_letters"]
        spoken = [m for m in prefix if m["role"] != "system"]
        assert [(m.role, m.content) for m in e.turns] == [(m["role"], m["content"].split(": ", 1)[1]) for m in spoken]
        assert [m.turn for m in e.turns] == list(range(1, len(spoken) + 1))
        assert all(raw[e.meta["context"]][int(m.id)]["content"].endswith(m.content) for m in e.turns)
        opened = sum(a["role"] == "system" and b["role"] != "system" for a, b in zip(prefix, prefix[1:]))
        assert len(e.history) == opened and not any("user persona" in m.content for m in e.turns)
    same = [e for e in episodes if (e.meta["context"], e.meta["end_index"]) == (episodes[0].meta["context"], 182)]
    assert len(same) == 5 and all(e.history[0] is same[0].history[0] for e in same)
    kept = read_personamem(PM/"questions_32k.csv", PM/"shared_contexts_32k.persona0.jsonl", keep_system=True, user=0)
    assert [len(e.turns) for e in kept] == [e.meta["end_index"] for e in kept] and not kept.dropped

@needs(PM/"questions_32k.csv")
def test_personamem_whole_32k_with_stand_in_contexts(tmp_path):
    """Every one of the 589 rows becomes an episode when its context exists."""
    with open(PM/"questions_32k.csv", newline="", encoding="utf-8") as f: rows = list(csv.DictReader(f))
    longest = Counter()
    for r in rows:
        longest[r["shared_context_id"]] = max(longest[r["shared_context_id"]], int(r["end_index_in_shared_context"]))
    talk = [dict(role=("system", "user", "assistant")[min(i, 1 + i % 2)], content=f"User: {i}")
            for i in range(max(longest.values()))]
    put(tmp_path/"c.jsonl", "".join(json.dumps({k: talk[:n]}) + "\n" for k, n in longest.items()))
    episodes = read_personamem(PM/"questions_32k.csv", tmp_path/"c.jsonl")
    assert len(episodes) == 589 and not episodes.dropped and len({e.user for e in episodes}) == 20
    assert [f"({e.answer})" for e in episodes] == [r["correct_answer"] for r in rows]
    kinds = Counter(e.query.kind for e in episodes)
    assert kinds["recall_user_shared_facts"] == 129 + 17 and len(kinds) == 6
    assert kinds["revisit_reasons_behind_preference_updates"] == 99
    assert Counter(e.meta["label"] for e in episodes) == Counter(r["question_type"] for r in rows)
    # trap 1 of SOURCES.md, recomputed from the parsed options
    right = sum(max(range(4), key=lambda i: len(e.options[i])) == ord(e.answer) - 97 for e in episodes)
    assert round(100 * right / 589, 1) == 51.6
    parts = split_by_user(episodes)
    assert [len({e.user for e in p}) for p in parts] == [16, 2, 2] and sum(map(len, parts)) == 589

@needs(LOCOMO)
def test_locomo_real():
    raw = json.load(open(LOCOMO, encoding="utf-8"))
    episodes, kept = read_locomo(LOCOMO), read_locomo(LOCOMO, adversarial="keep")
    turns = {s["sample_id"]: [t for n in range(1, 99) for t in s["conversation"].get(f"session_{n}", [])] for s in raw}
    assert len({e.user for e in episodes}) == len(raw) == 7 and sum(map(len, turns.values())) == 4124
    five = sum(q["category"] == 5 for s in raw for q in s["qa"])
    assert len(episodes) == sum(q["category"] != 5 for s in raw for q in s["qa"]) == 1035
    assert dict(episodes.dropped) == {"adversarial (category 5)": five} == {"adversarial (category 5)": 312}
    assert len(kept) == 1347 and not kept.dropped
    assert dict(episodes.repaired) == {"evidence id rewritten": 2, "evidence id points nowhere, left out": 3,
                                       "question kept without evidence": 2}
    assert [e.meta["evidence_lost"] for e in episodes if "evidence_lost" in e.meta] == [["D10:19"], ["D"], ["D4:36"]]
    questions = [(s["sample_id"], q) for s in raw for q in s["qa"] if q["category"] != 5]
    strange = 0
    for (sample, q), e in zip(questions, episodes):
        assert (e.user, e.query.text, e.answer, e.meta["category"]) == (sample, q["question"], str(q["answer"]),
            q["category"])
        ids = [t["dia_id"] for t in turns[sample]]
        assert [m.id for m in e.turns] == ids
        if all(i in ids for i in q["evidence"]): assert {e.turns[t - 1].id for t in e.evidence} == set(q["evidence"])
        else: strange += 1
    assert strange == 5
    two = next(e for (_, q), e in zip(questions, episodes) if q["evidence"] == ["D8:6; D9:17"])
    assert {two.turns[t - 1].id for t in two.evidence} == {"D8:6", "D9:17"}
    assert sum("[image: " in m.content for e in {e.user: e for e in episodes}.values()
               for m in e.turns) == sum("blip_caption" in t for v in turns.values() for t in v)
    assert all(len(training_view(e).history) <= len(e.history) and training_view(e).evidence == e.evidence
               for e in episodes)

@needs(LOCOMO)
def test_locomo_round_trip(tmp_path):
    episodes = read_locomo(LOCOMO)
    file = write_episodes(tmp_path/"e.jsonl", episodes)
    back = load_episodes(file)
    assert list(back) == list(episodes) and file.stat().st_size < 2.5e6
    assert len({id(s) for e in back for s in e.history}) == len({id(s) for e in episodes for s in e.history})

@needs(CTRL/"conversations_first7.jsonl")
def test_memoryctrl_through_read_chat(tmp_path):
    """MemoryCtrl after a light conversion: side notes dropped, continuation lines joined to the message before."""
    mcqs = [json.loads(l) for l in open(CTRL/"whole_recall_mcq.jsonl", encoding="utf-8")]
    records, spoken = [], Counter()
    for line in open(CTRL/"conversations_first7.jsonl", encoding="utf-8"):
        c, messages = json.loads(line), []
        for text in c["conversation"]:
            who, _, rest = text.partition(":")
            if who in ("User", "Assistant"):
                messages.append({"from": {"User": "human", "Assistant": "gpt"}[who], "value": rest})
            elif who != "Side_Note": messages[-1]["value"] += "\n" + text
        queries = [dict(question=q["question"], options=[q[k] for k in ("choice_a", "choice_b", "choice_c")],
                        answer=q["correct_choice"].lower())
                   for q in mcqs if q["sample_id"] == c["sample_id"]]
        spoken[c["sample_id"]] = sum(bool(m["value"].strip()) for m in messages)
        records.append(dict(user=c["sample_id"], conversations=messages, queries=queries))
    chat = read_chat(put(tmp_path/"ctrl.jsonl", "\n".join(json.dumps(r) for r in records)))
    assert len({e.user for e in chat}) == 7 and len(chat) == sum(len(r["queries"]) for r in records) > 7
    assert all(len(e.turns) == spoken[e.user] and len(e.options) == 3 and e.answer in "abc" for e in chat)
    cloze = read_chat(tmp_path/"ctrl.jsonl", queries="cloze", n=5, seed=3)
    assert len(cloze) == 35
    for e in cloze:
        (turn,) = e.evidence
        assert [m.turn for m in e.turns if re.search(rf"(?i)\b{re.escape(e.answer)}\b", m.content)] == [turn]
        assert e.query.text.count("____") == 1

# ---------------------------------------------------------------- properties

TEXT = st.text(max_size=20)
WORDS = st.text(min_size=1, max_size=20).filter(str.strip)

@st.composite
def episodes(draw):
    sessions = draw(st.lists(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), TEXT), min_size=1,
                                      max_size=3), min_size=1, max_size=3))
    history = tuple(replace(s, date=draw(TEXT)) for s in make_history(sessions))
    options = draw(st.none() | st.lists(TEXT, min_size=2, max_size=4))
    answer = draw(TEXT) if options is None else draw(st.sampled_from("abcd"[:len(options)]))
    turns = [m.turn for s in history for m in s.messages]
    return Episode(history, Query(draw(WORDS), draw(TEXT), draw(TEXT)), options, answer,
                   draw(st.sets(st.sampled_from(turns))), draw(TEXT), draw(TEXT),
                   draw(st.sampled_from(["gold", "weak", "none"])),
                   draw(st.dictionaries(TEXT, st.integers() | TEXT | st.none(), max_size=2)))

@settings(max_examples=60, deadline=None)
@given(e=episodes())
def test_json_round_trip(e):
    assert Episode.from_json(json.loads(json.dumps(e.to_json()))) == e
    e._repr_html_(), repr(e)

@settings(max_examples=30, deadline=None)
@given(es=st.lists(episodes(), min_size=1, max_size=4))
def test_file_round_trip(tmp_path_factory, es):
    path = tmp_path_factory.mktemp("e")/"e.jsonl"
    assert list(load_episodes(write_episodes(path, es + es))) == es + es
    plain = path.with_name("plain.jsonl")
    plain.write_text("".join(json.dumps(e.to_json()) + "\n" for e in es))
    assert list(load_episodes(plain)) == es

@settings(max_examples=60, deadline=None)
@given(e=episodes())
def test_training_view_keeps_numbers(e):
    view = training_view(e)
    assert view.evidence == e.evidence and set(view.turns) <= set(e.turns)
    if e.evidence: assert all(any(m.turn in e.evidence for m in s.messages) for s in view.history)
    else: assert view == e

@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 4), min_size=3, max_size=15), seed=st.integers(0, 99),
       cut=st.sampled_from([(.8, .1, .1), (.5, .5), (.34, .33, .33), (1.,)]))
def test_split_by_user(counts, seed, cut):
    base = example_episode()
    es = [replace(base, user=f"u{i}", id=f"{i}/{j}") for i, n in enumerate(counts) for j in range(n)]
    parts = split_by_user(es, cut, seed)
    assert sorted(e.id for p in parts for e in p) == sorted(e.id for e in es) and all(parts)
    users = [{e.user for e in p} for p in parts]
    assert sum(map(len, users)) == len(set().union(*users)) == len(counts)
    assert [len(u) for u in users] == [len({e.user for e in p}) for p in split_by_user(reversed(es), cut, seed)]
    assert all(len(u) == 1 or abs(len(u) - f * len(counts)) < len(cut) for u, f in zip(users, cut))

@settings(max_examples=100, deadline=None)
@given(options=st.lists(st.text(max_size=30), min_size=2, max_size=6))
def test_parse_options_both_encodings(options):
    labelled = [f"({chr(97 + i)}) {o.strip()}" for i, o in enumerate(options)]
    want = tuple(o.strip() for o in options)
    for ascii_only in (True, False): assert parse_options(json.dumps(labelled, ensure_ascii=ascii_only)) == want
    assert parse_options(repr(labelled)) == want == parse_options(labelled[::-1])

@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(), max_size=20))
def test_clean_is_encodable(text):
    clean = clean_text(text)
    clean.encode("utf-8")
    if not any("\ud800" <= c <= "\udfff" for c in text): assert clean == text

@settings(max_examples=40, deadline=None)
@given(garbage=st.binary(max_size=60), suffix=st.sampled_from([".json", ".jsonl", ".txt", ".csv"]))
def test_garbage_never_escapes_as_another_error(tmp_path_factory, garbage, suffix):
    path = tmp_path_factory.mktemp("g")/f"g{suffix}"
    path.write_bytes(garbage)
    for read in (read_chat, read_history, read_locomo, load_episodes, lambda p: read_personamem(p, p)):
        try: read(path)
        except DataError as e: assert "g" + suffix in str(e)

JSON = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
                    lambda x: st.lists(x, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "messages", "sessions", "queries", "from", "value", "user",
                                       "mapping", "current_node", "history", "session",
                                       "query", "text", "conversation", "qa", "evidence", "options", "answer", "author",
                                       "date", "id"]), x, max_size=4), max_leaves=12)

@settings(max_examples=150, deadline=None)
@given(value=JSON)
def test_odd_json_never_escapes_as_another_error(tmp_path_factory, value):
    folder = tmp_path_factory.getbasetemp()
    files = put(folder/"odd.json", value), put(folder/"odd.jsonl", value)
    for path in files:
        for read in (read_chat, read_history, read_locomo, load_episodes):
            try: read(path)
            except DataError as e: assert "odd.json" in str(e)

# ---------------------------------------------------------------- episodes

def test_example_episode_is_the_fixture():
    e = example_episode()
    assert [(m.turn, m.role, m.content) for m in e.turns] == [
        (1, "user", "I adopted a cat named Miso."), (2, "assistant", "Congratulations!"),
        (3, "user", "My favourite drink is coffee."), (4, "assistant", "Noted."),
        (5, "user", "I moved to Lisbon for a job at a bakery."), (6, "assistant", "Lovely."),
        (7, "user", "I stopped coffee. My favourite drink is tea now."), (8, "assistant", "Tea it is.")]
    assert [s.id for s in e.history] == ["s1", "s2"] and (e.answer, e.evidence, e.user, e.id,
                                                          e.evidence_kind) == ("tea", {3, 7}, "ana", "example", "gold")

def test_html_is_escaped_and_marks_evidence_beyond_the_limit():
    e = Episode(make_history([[("user", f"<b>{i}</b>") for i in range(100)]]), Query("<i>?</i>"), evidence={100})
    out = e._repr_html_()
    assert "<b>9" not in out and "&lt;b&gt;99" in out and "<i>" not in out
    assert out.count("►") == 1 and "59 more turns" in out

@pytest.mark.parametrize("change, match", [
    (dict(history=()), "history is empty"), (dict(evidence={0}), r"evidence \[0\] is out of range"),
                                           (dict(evidence={"3"}), "out of range"),
    (dict(evidence_kind="silver"), "evidence_kind"), (dict(options=("x", "y"), answer="c"), "letter of one of the 2"),
    (dict(history=(Session("s", (Message("user", "not numbered"),)),), evidence=()), "turn numbers"),
])
def test_episode_errors(change, match): raises(match, replace, example_episode(), **change)

@pytest.mark.parametrize("change, match", [
    (dict(history=None), "'history' is missing"), (dict(history=[{}]), "session 1: field 'messages' is missing"),
                                           (dict(evidence=[True]), "'evidence'"),
    (dict(query={"text": " "}), "text is empty"), (dict(options=[1, 2]), "'options'"),
                                           (dict(answer=3), "'answer' is of type int"),
                                           (dict(meta=[]), "'meta' is of type list"),
    (dict(history=[dict(id="s", messages=[dict(role="bard", content="x")])]),
     "session 1, message 1: unknown role 'bard'"),
])
def test_from_json_errors(change, match): raises(match, Episode.from_json, {**example_episode().to_json(), **change})

def test_message_errors():
    raises("content is of type NoneType", Message, "user", None)
    raises("text is empty", Query, "")
    raises("is not a message", make_history, ["hello"])

# ---------------------------------------------------------------- files

@pytest.mark.parametrize("name, content, match", [
    ("a.pdf", b"x", "unknown file kind '.pdf'"), ("a", b"x", "unknown file kind 'without suffix'"),
                                                  ("a.jsonl", b"", "file is empty"), ("a.json", b"", "file is empty"),
    ("a.json", b" \n", r"line 2: broken JSON"), ("a.jsonl", b"\n\n", "history is empty"),
                                                  ("a.json", b"[]", "history is empty"),
                                                  ("a.json", b"{}", "no messages found"),
    ("a.jsonl", b'{"messages": []}', "history of user 'a' is empty"),
                                                  ("a.jsonl", b'{"role": "user", "content": "x"}\n\n{"role"',
                                                   "line 3: broken JSON"),
    ("a.json", b'[\n{"role": "user",\n "content": }]', "line 3: broken JSON"), ("a.jsonl", b'"ok"\n"caf\xe9"',
    "line 2: not UTF-8"),
    ("a.jsonl", b'{"messages": [{"role": "user"}]}', "line 1, message 1: field 'content' is missing"),
    ("a.jsonl", b'{"messages": [{"content": "x"}]}', "line 1, message 1: field 'role' is missing"),
    ("a.jsonl", b'{"messages": [{"role": "elf", "content": "x"}]}', "line 1, message 1: unknown role 'elf'"),
    ("a.jsonl", b'{"messages": "x"}', "line 1: expected a list of messages, found str"),
                                                  ("a.jsonl", b"7",
                                                   "line 1: expected a list of messages or an object, found int"),
    ("a.jsonl", b'{"conversations": [{"from": "human"}]}', "field 'value' is missing"), ("a.json", b"[" * 100000,
    "nested too deeply"),
    ("a.txt", b"hello", "no <|im_start|>".replace("|", r"\|")),
                                                  ("a.txt", b"\n\n<|im_start|>imp\nho<|im_end|>",
                                                   "line 3: unknown role 'imp'"),
    ("a.json", json.dumps(dict(mapping={}, current_node="x")).encode(), "message tree is broken at 'x'"),
])
def test_chat_file_errors(tmp_path, name, content, match):
    (tmp_path/name).write_bytes(content)
    raises(match, read_chat, tmp_path/name)
    raises(match, read_history, tmp_path/name)

def test_missing_files(tmp_path):
    raises("no such file", read_chat, tmp_path/"no.jsonl")
    raises("no such file", read_locomo, tmp_path/"no.json")
    raises("no such file", read_personamem, tmp_path/"no.csv", tmp_path/"no.jsonl")
    (tmp_path/"dir.json").mkdir()
    raises("directory", read_chat, tmp_path/"dir.json")

TALK = [dict(role="user", content="I keep bees near the old mill."), dict(role="assistant", content="Sweet.")]

@pytest.mark.parametrize("query, match", [
    (dict(answer="x"), "line 1, query 1: field 'text' is missing"),
                                          (dict(text="?"), "query 1: field 'answer' is missing"),
    (dict(text="?", answer="x", evidence=[3]), r"field 'evidence' names \[3\]"),
                                          (dict(text="?", answer="x", evidence=["a"]), "field 'evidence'"),
    (dict(text="?", answer="x", options=["y", "z"]), "field 'answer' is 'x'"),
                                          (dict(text="?", answer="a", options=["y"]), "field 'options'"),
    (dict(text="  ", answer="x"), "query 1: query 'a/1': the text is empty"), ("?", "expected an object"),
                                          (dict(text="?", answer=True), "'answer' is of type bool"),
])
def test_chat_query_errors(tmp_path, query, match):
    raises(match, read_chat, put(tmp_path/"a.jsonl", dict(messages=TALK, queries=[query])))

def test_chat_forms_agree(tmp_path):
    share = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in TALK]
    tree = dict(current_node="1", mapping={str(i): dict(parent=str(i - 1) if i else None,
                                                        message=dict(author=dict(role=m["role"]),
        content=dict(parts=[m["content"]]))) for i, m in enumerate(TALK)})
    forms = {"a.json": TALK, "b.json": [TALK], "c.json": dict(messages=TALK), "d.json": [dict(conversations=share)],
             "e.json": share, "f.json": dict(sessions=[dict(messages=TALK)]),
             "g.json": [tree], "h.jsonl": "\n".join(map(json.dumps, TALK)), "i.jsonl": json.dumps(TALK),
             "j.jsonl": json.dumps(dict(conversation=share)),
             "k.txt": "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK),
             "l.jsonl": "\ufeff" + json.dumps(dict(messages=TALK))}
    want = [(1, "user", TALK[0]["content"]), (2, "assistant", "Sweet.")]
    for name, form in forms.items():
        (session,) = read_history(put(tmp_path/name, form))
        assert [(m.turn, m.role, m.content) for m in session.messages] == want, name

def test_chat_users_dropped_and_positions(tmp_path, caplog):
    records = [dict(user="ana", messages=[dict(role="system", content="Be kind."), *TALK,
                                          dict(role="tool", content="42"), dict(role="assistant", content=None,
        tool_calls=[1])]),
               dict(user="bo", messages=TALK), dict(user="ana", messages=[dict(role="user", content=" "),
        dict(role="user", content="My hive moved to Tomar in spring.")],
                                                    queries=[dict(text="Where is the hive?", answer="Tomar",
        evidence=[7])])]
    path = put(tmp_path/"a.jsonl", "\n".join(map(json.dumps, records)))
    chat = read_chat(path)
    ana = [e for e in chat if e.user == "ana"]
    assert len(ana) == 1 and ana[0].evidence == {3} and [m.content for m in ana[0].turns][2].startswith("My hive")
    assert {e.query.kind for e in chat if e.user == "bo"} == {"cloze"}
    assert dict(chat.dropped) == {"system message": 1, "tool message": 2, "message without text": 1}
    assert read_chat(path, queries="file").dropped["user without a query"] == 1
    raises("holds 2 users", read_history, path)
    raises("no user 'cy'", read_history, path, user="cy")
    with caplog.at_level(logging.WARNING, logger="comam_nb.data"): assert len(read_history(path, user="bo")) == 1
    assert "tool message" in caplog.text
    raises("names \\[1\\]", read_chat, put(tmp_path/"b.jsonl", dict(messages=records[0]["messages"],
        queries=[dict(text="?", answer="x", evidence=[1])])))
    raises("unknown queries", read_chat, path, queries="some")
    raises("no queries in the file", read_chat, put(tmp_path/"c.jsonl", dict(messages=TALK)), queries="file")
    raises("no cloze question", read_chat, put(tmp_path/"d.jsonl", dict(messages=[dict(role="user", content="Hi.")])))

def test_broken_emoji_is_marked(tmp_path):
    (session,) = read_history(put(tmp_path/"a.jsonl", r'{"messages": [{"role": "user", "content": "cut \ud83c"}]}'))
    assert session.messages[0].content == "cut \ufffd"

def test_cloze_is_deterministic_and_exact():
    history = make_history([[("user", f"My cousin {name} likes the colour {colour} a lot.") for name, colour in
                             (("Pedro", "green"), ("Ines", "violet"), ("Marta", "orange"))],
                            [("assistant", "Pedro is a nice name for him.")]])
    seen = {(e.query.text, e.answer, tuple(e.evidence)) for seed in range(40) for e in cloze_queries(history, 3, seed)}
    assert {a for _, a, _ in seen} == {"green", "violet", "orange", "Ines", "Marta"}      # Pedro occurs twice
    assert ('Complete what I said: "My cousin Ines likes the colour ____ a lot."', "violet", (2,)) in seen
    compound = make_history([[("user", "We took the night-train to Tomar and didn't sleep4 well."),
                              ("user", "The train was late again, sadly for us.")]])
    assert {a for seed in range(20) for e in cloze_queries(compound, 2, seed) for a in [e.answer]} == {"Tomar", "late",
        "sadly"}
    assert len(cloze_queries(history, 2)) == 2 and len(cloze_queries(history, 9)) == 3

# ---------------------------------------------------------------- PersonaMem

HEAD = dict(persona_id="0", question_id="q", question_type="suggest_new_ideas", topic="bees",
            distance_to_ref_in_blocks="2", user_question_or_message="User: What\nnext?",
            correct_answer="(b)", all_options="['(a) x', \"(b) it's\"]", shared_context_id="ctx",
            end_index_in_shared_context="4")
CONTEXT = [dict(role="system", content="Current user persona: a keeper"), *TALK, dict(role="system", content="again"),
           dict(role="user", content="User: One hive died.")]

def questions(path, *changes, drop=None):
    with open(path, "w", newline="", encoding="utf-8") as f:
        w = csv.DictWriter(f, [k for k in HEAD if k != drop], extrasaction="ignore")
        w.writeheader(); w.writerows([{**HEAD, **c} for c in changes])
    return path

def test_personamem_drops_and_counts(tmp_path):
    contexts = put(tmp_path/"c.jsonl", {"ctx": CONTEXT})
    q = questions(tmp_path/"q.csv", {}, dict(end_index_in_shared_context="5"), dict(end_index_in_shared_context="-1"),
                  dict(end_index_in_shared_context="6"),
                  dict(end_index_in_shared_context="1"), dict(shared_context_id="gone"), dict(persona_id="7"))
    got = read_personamem(q, contexts)
    assert [len(e.turns) for e in got] == [2, 3, 2] and [len(e.history) for e in got] == [1, 2, 1]
    assert dict(got.dropped) == {"negative end index": 1, "end index past the end of the context": 1,
                                 "empty history": 1, "context not in the contexts file": 1}
    assert "dropped 4" in repr(got) and got[0].history is got[2].history
    e = got[1]
    assert (e.query.text, e.answer, e.options, e.turns[2].content, e.turns[2].id) == ("What\nnext?", "b", ("x", "it's"),
        "One hive died.", "4")
    assert e.meta["distance_to_ref_in_blocks"] == 2 and e.meta["topic"] == "bees"
    assert [e.user for e in read_personamem(q, contexts, user=7)] == ["7"]
    assert [m.role for m in read_personamem(q, contexts, keep_system=True)[0].turns] == ["system", "user", "assistant",
        "system"]
    raises("no questions of persona 9", read_personamem, q, contexts, user=9)

@pytest.mark.parametrize("change, match", [
    (dict(correct_answer="(e)"), "q.csv, line 4: field 'correct_answer' is"), (dict(all_options="[1, 2]"),
    "line 4: field 'all_options'"),
    (dict(all_options="__import__('os').getcwd()"), "line 4: field 'all_options'"),
                                           (dict(all_options="['(a) x', '(a) y']"), "line 4: field 'all_options'"),
    (dict(all_options="(" * 5000), "field 'all_options'"), (dict(end_index_in_shared_context="many"),
                                                            "line 4: field 'end_index_in_shared_context'"),
    (dict(user_question_or_message=""), "field 'user_question_or_message'"),
                                           (dict(all_options="no", shared_context_id="gone"),
                                            "line 4: field 'all_options'"),
])
def test_personamem_row_errors(tmp_path, change, match):
    # the row before spans lines 2 and 3
    raises(match, read_personamem, questions(tmp_path/"q.csv", {}, change), put(tmp_path/"c.jsonl", {"ctx": CONTEXT}))

def test_personamem_file_errors(tmp_path):
    contexts, q = put(tmp_path/"c.jsonl", {"ctx": CONTEXT}), questions(tmp_path/"q.csv", {})
    raises("contexts are missing", read_personamem, q)
    raises("unknown file kind", read_personamem, contexts, contexts)
    raises("column 'correct_answer' is missing", read_personamem, questions(tmp_path/"q2.csv", {},
        drop="correct_answer"), contexts)
    raises("no questions", read_personamem, questions(tmp_path/"q3.csv"), contexts)
    raises("none of its 1 rows", read_personamem, q, put(tmp_path/"c2.jsonl", {"other": CONTEXT}))
    raises("line 1: expected {context id: messages}", read_personamem, q, put(tmp_path/"c3.jsonl", [1]))
    raises("line 1, context ctx, message 1: field 'content'", read_personamem, q,
           put(tmp_path/"c4.jsonl", {"ctx": [dict(role="user")]}))
    raises("line 4: the row does not have", read_personamem, put(tmp_path/"q5.csv", q.read_text() + "1,2\n"), contexts)
    raises("broken CSV", read_personamem, put(tmp_path/"q6.csv", q.read_text() + '"1'), contexts)

# ---------------------------------------------------------------- LoCoMo

def locomo(**qa):
    talk = dict(speaker_a="Nora", speaker_b="Ben", session_10=[dict(speaker="Ben", dia_id="D10:1", text="Late.")],
                session_10_date_time="June",
                session_2=[dict(speaker="Nora", dia_id="D2:1", text="", blip_caption="a fig"),
                           dict(speaker="Ben", dia_id="D2:2", text="Nice!")], session_3_date_time="May")
    return [dict(sample_id="c1", conversation=talk,
                 qa=[{k: v for k, v in {**dict(question="What?", answer="fig", evidence=["D2:1"], category=4),
                                        **qa}.items() if v is not None}])]

def test_locomo_small(tmp_path):
    (e,) = read_locomo(put(tmp_path/"l.json", locomo(evidence=["D2:02 D10:1"], answer=3)))
    assert [(s.id, s.date) for s in e.history] == [("s2", ""),
                                                   ("s10", "June")] and e.answer == "3" and e.evidence == {2, 3}
    assert [(m.role, m.content) for m in e.turns] == [("user", "Nora: [image: a fig]"), ("user", "Ben: Nice!"),
                                                      ("user", "Ben: Late.")]
    (e,) = read_locomo(tmp_path/"l.json", roles=("user", "assistant"))
    assert [m.role for m in e.turns] == ["user", "assistant", "assistant"]

@pytest.mark.parametrize("qa, match", [(dict(question=None), "c1, qa 0: field 'question'"),
                                       (dict(answer=None), "qa 0: field 'answer'"),
                                       (dict(category=None), "qa 0: field 'category'"),
                                       (dict(question=" "), "c1, qa 0: query"),
                                       (dict(evidence=3), "field 'evidence'"),
                                       (dict(category=5), "no question can be used")])
def test_locomo_errors(tmp_path, qa, match): raises(match, read_locomo, put(tmp_path/"l.json", locomo(**qa)))

def test_locomo_more_errors(tmp_path):
    sample = locomo()
    sample[0]["conversation"]["session_2"][1]["speaker"] = "Zoe"
    (e,) = read_locomo(put(tmp_path/"l.json", sample))
    assert [m.content for m in e.turns] == ["Nora: [image: a fig]", "Ben: Late."]
    assert any("session_2, turn 2: speaker 'Zoe'" in why for why in read_locomo(tmp_path/"l.json").dropped)
    raises("history is empty", read_locomo,
           put(tmp_path/"m.json", [dict(conversation=dict(speaker_a="a", speaker_b="b"), qa=[])]))
    raises("field 'conversation' is missing", read_locomo, put(tmp_path/"n.json", [{}]))
    raises("unknown adversarial", read_locomo, tmp_path/"l.json", adversarial="maybe")

# ---------------------------------------------------------------- hub, saving, import

def test_hub(tmp_path, monkeypatch):
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    calls = []
    tables = {"bowen-upenn/PersonaMem": [{**HEAD, "persona_id": 0, "end_index_in_shared_context": 4,
                                          "stereotypical": None}],
              "me/chats": [dict(messages=TALK, note=None),
                           dict(messages=[dict(role="user", content="The queen bee is called Victoria.")], note="x")]}
    def load_dataset(*args, **kw):
        calls.append((args, kw))
        if args[0] not in tables: raise FileNotFoundError("not on the hub")
        return datasets.Dataset.from_list(tables[args[0]])
    def hf_hub_download(*args, **kw):
        calls.append((args, kw))
        return str(put(tmp_path/"f.json", locomo()) if args[1].startswith("locomo") else put(tmp_path/"f.jsonl",
            {"ctx": CONTEXT}))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "hf_hub_download", hf_hub_download)
    (e,) = read_personamem("bowen-upenn/PersonaMem", size="128k")
    assert (e.user, len(e.turns), e.meta["stereotypical"]) == ("0", 2, "")
    assert calls[0] == (("bowen-upenn/PersonaMem", "benchmark"), dict(split="128k", revision=None))
    assert calls[1] == (("bowen-upenn/PersonaMem", "shared_contexts_128k.jsonl"), dict(repo_type="dataset",
        revision=None))
    assert read_locomo("me/locomo", revision="v1")[0].evidence == {1} and calls[2] == (("me/locomo", "locomo10.json"),
        dict(repo_type="dataset", revision="v1"))
    assert len(read_history("me/chats", split="train[:2]")) == 2 and calls[3] == (("me/chats",),
        dict(split="train[:2]"))
    assert read_chat("me/chats")[0].user == "chats"
    raises("not a file here, and the hub did not give it .FileNotFoundError: not on the hub", read_chat, "me/nothing")
    tables["bowen-upenn/PersonaMem"] = [dict(a=1)]
    raises("column 'persona_id' is missing", read_personamem, "bowen-upenn/PersonaMem")
    raises("no such file", read_chat, "me/typo.jsonl")

def test_write_is_all_or_nothing(tmp_path):
    path, e = tmp_path/"e.jsonl", example_episode()
    write_episodes(path, [e])
    before = path.read_bytes()
    raises("is not an Episode", write_episodes, path, [e, None])
    raises("cannot be written as JSON", write_episodes, path, [replace(e, meta={"x": {1}})])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["e.jsonl"]
    lines = before.decode().splitlines()
    raises("line 1: field 'history' names session 1", load_episodes,
           put(path, "\n".join(lines[1:2] and [lines[-1].replace("[0, 1]", "[1]")])))
    raises("line 2: broken JSON", load_episodes, put(path, lines[0] + "\n" + lines[1][:9]))

def test_import_is_light():
    heavy = ("torch", "datasets", "transformers", "numpy", "nbdev", "fastcore", "pandas", "sklearn")
    code = f"import sys, comam_nb.data; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(__file__).parents[1]).stdout.strip() == "[]"
