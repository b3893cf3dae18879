"""Readers on files as people and programs write them: what is odd is left out, counted and named, all else is read."""
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from comam_nb.base.errors import DataError
from comam_nb.data import split_by_user, training_view
from comam_nb.readers.chat_logs import read_chat, read_history
from comam_nb.readers.locomo import read_locomo
from comam_nb.readers.longmemeval import read_longmemeval
from comam_nb.readers.memoryctrl import read_memoryctrl
from comam_nb.readers.prefeval import read_prefeval
from comam_nb.readers.reading import json_values, load_episodes, write_episodes

CTRL = Path(__file__).parents[2]/"shared"/"data"/"memoryctrl"

def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path

def lines(*records): return "\n".join(map(json.dumps, records))

def said(path, **more): return [(m.role, m.content) for s in read_history(path, **more) for m in s.messages]

def raises(match, f, *args, **more):
    with pytest.raises(DataError, match=match): f(*args, **more)

def chat(*messages, **more):
    "A record of messages: texts of the user, or messages."
    return dict(messages=[dict(role="user", content=m) if isinstance(m, str) else m for m in messages], **more)


# ---- ChatGPT's export

def node(parent, text, role="user", **more):
    content = text if isinstance(text, dict) else dict(content_type="text", parts=[text])
    return dict(parent=parent, message=dict(author=dict(role=role), content=content, recipient="all",
                                            metadata={}) | more)

def export(*nodes, **more):
    "A conversation whose nodes follow each other."
    mapping = {"root": dict(parent=None, message=None)}
    for i, n in enumerate(nodes): mapping[str(i)] = dict(n, parent=str(i - 1) if i else "root")
    return dict(mapping=mapping, current_node=str(len(nodes) - 1), create_time=1714557600.0) | more

@pytest.mark.parametrize("unsaid, why", [
    (node(None, "The user is a vet.", "assistant", recipient="bio"), "tool message"),
    (node(None, dict(content_type="code", text="search('Braga')"), "assistant", recipient="browser"), "tool message"),
    (node(None, "print(1)", "assistant", recipient="python"), "tool message"),
    (node(None, "Model set context updated.", "tool"), "tool message"),
    (node(None, "Be a pirate.", metadata=dict(is_visually_hidden_from_conversation=True)), "hidden message"),
    (node(None, "I am Ana, be brief.", "system", metadata=dict(is_user_system_message=True)), "hidden message"),
    (node(None, dict(content_type="thoughts", thoughts=[dict(content="hm")]), "assistant"), "thinking"),
    (node(None, dict(content_type="reasoning_recap", content="Thought for 3 s"), "assistant"), "thinking"),
    (node(None, dict(content_type="user_editable_context", user_profile="Ana")), "thinking"),
    (node(None, "We need to answer.", "assistant", channel="analysis"), "thinking"),
    (node(None, dict(content_type="multimodal_text", parts=[dict(content_type="image_asset_pointer")])),
     "message without text"),
    (node(None, "Be kind.", "system"), "system message"),
    (node(None, None, None), "odd message: "),
    (node(None, "Boo.", "ghost"), "odd message: "),
])
def test_what_nobody_said_is_left_out(tmp_path, unsaid, why):
    path = put(tmp_path/"c.json", [export(node(None, "My aunt Vera is a vet."), unsaid,
                                          node(None, "Noted.", "assistant"))])
    assert said(path) == [("user", "My aunt Vera is a vet."), ("assistant", "Noted.")]
    dropped = read_chat(path, queries="cloze").dropped
    assert dropped.total() == 1 and next(iter(dropped)).startswith(why)

TREE = dict(root=dict(parent=None, message=None), a=node("root", "I grow lemons."),
            old=node("a", "Limes?", "assistant", create_time=18e8),
            new=node("a", "Nice.", "assistant", create_time=19e8))

@pytest.mark.parametrize("record", [
    dict(mapping=TREE), dict(mapping=TREE, current_node=None), dict(mapping=TREE, current_node="gone"),
    dict(mapping=TREE, current_node=7), dict(mapping=dict(reversed(TREE.items())), current_node=""),
    dict(mapping={**TREE, "a": node("lost", "I grow lemons.")}, current_node="new"),
    dict(mapping={**TREE, "a": node("new", "I grow lemons.")}, current_node="new"),
    dict(mapping={**TREE, "broken": 3}, current_node="broken"),
], ids=["none", "null", "gone", "number", "empty", "cut", "circle", "broken"])
def test_a_broken_tree_gives_its_newest_branch(tmp_path, record, caplog):
    path = put(tmp_path/"c.json", [export(node(None, "My bike is red.")), dict(record, id="x")])
    assert said(path) == [("user", "My bike is red."), ("user", "I grow lemons."), ("assistant", "Nice.")]
    assert "repaired" in caplog.text

@pytest.mark.parametrize("odd", [
    dict(mapping={}), dict(mapping=[]), dict(mapping="x", current_node="x"), dict(title="empty"), 7, None, "hello",
    dict(messages=3), dict(messages={"role": "user"}), dict(conversations="x"), dict(user=[1], messages=[]),
    dict(mapping=dict(a=dict(parent="a", message=None))),
])
def test_one_odd_conversation_is_named_and_the_others_are_read(tmp_path, odd):
    path = put(tmp_path/"c.json", [export(node(None, "My dog is called Rex.")), odd,
                                   export(node(None, "I live in Faro."))])
    assert said(path) == [("user", "My dog is called Rex."), ("user", "I live in Faro.")]
    (why, n), = read_chat(path).dropped.items()
    assert why.startswith("odd conversation: ") and "c.json, element 2" in why and n == 1
    raises("element 1", read_history, put(tmp_path/"all.json", [odd, odd]))

def test_many_odd_conversations_are_counted_and_three_named(tmp_path):
    dropped = read_chat(put(tmp_path/"c.json", [chat("My dog is called Rex, of course."), *[7] * 9])).dropped
    assert dropped["odd conversation, not named"] == 6 and len(dropped) == 4

def test_sessions_stand_in_the_order_of_time(tmp_path):
    day = lambda n, text, **more: export(node(None, text), id=text, create_time=1714557600 + 86400 * n, **more)
    newest_first = [day(9, "c"), day(5, "b"), dict(day(0, "b2"), create_time=None), day(0, "a")]
    history = read_history(put(tmp_path/"c.json", newest_first))
    assert [(s.id, s.date) for s in history] == [("a", "2024-05-01"), ("b", "2024-05-06"), ("b2", ""),
                                                 ("c", "2024-05-10")]
    assert [m.turn for s in history for m in s.messages] == [1, 2, 3, 4]
    asked = [dict(chat("I like tea now."), date="2024-06-01",
                  queries=[dict(text="What now?", answer="tea", evidence=[1])]),
             dict(chat("I like coffee."), date="2024-05-01")]
    (e,) = read_chat(put(tmp_path/"d.jsonl", lines(*asked)))
    assert e.turns[1].content == "I like tea now." and e.evidence == {2} # the file's message 1
    assert [s.id for s in e.history] == ["s1", "s2"]


# ---- other logs

@pytest.mark.parametrize("reply, want", [
    (dict(content=None, reasoning_content="hm", tool_calls=[]), None),
    (dict(content=None, refusal="I can't."), "I can't."),
    (dict(content=None, audio=dict(id="a")), None),
    (dict(content=None, audio=dict(id="a", transcript="Hello.")), "Hello."),
    (dict(content=None, tool_calls=[dict(id="t")]), None), (dict(tool_calls=[dict(id="t")]), None),
    (dict(content="", function_call=dict(name="f")), None), (dict(content=None), None), (dict(content=[]), None),
    (dict(content=[dict(type="refusal", refusal="No.")]), "No."),
    (dict(content=[dict(type="output_text", text="Yes.")]), "Yes."),
    (dict(content=[dict(type="text", text=dict(value="Tiger!", annotations=[]))]), "Tiger!"),
    (dict(content=[dict(type="thinking", thinking="hm"), dict(type="reasoning", text="hm"),
                   dict(type="text", text="Hi.")]), "Hi."),
    (dict(content=[dict(type="tool_use", id="t", input={}), "Hi."]), "Hi."), (dict(content=dict(text="Hi.")), "Hi."),
    (dict(content="Let me look.", tool_calls=[dict(id="t")]), "Let me look."), (dict(content=7), None), (dict(), None),
])
def test_saved_replies(tmp_path, reply, want):
    path = put(tmp_path/"a.jsonl", chat("My cat is Tiger.", dict(role="assistant", **reply), "Hello?"))
    assert said(path) == [("user", "My cat is Tiger."), *[("assistant", want)] * (want is not None), ("user", "Hello?")]

@pytest.mark.parametrize("turn, kept", [
    ({"from": "bing", "value": "Hello."}, True), ({"from": "bard", "value": "Hello."}, True),
    ({"from": "GPT", "value": "Hello."}, True), ({"from": "gpt-4o", "value": "Hello."}, True),
    ({"from": "narrator", "value": "Hello."}, False), ({"from": "gpt", "value": None}, False), ({"from": "gpt"}, False),
    ({"from": None, "value": "Hello."}, False), ({"value": "Hello."}, False), (None, False), ("Hello.", False),
    ({"from": 3, "value": "Hello."}, False), ({"from": "observation", "value": "{}"}, False),
    ({"from": "", "value": "x"}, False),
])
def test_odd_turns_of_sharegpt(tmp_path, turn, kept):
    first = dict(conversations=[{"from": "human", "value": "I live in Faro."}, turn])
    path = put(tmp_path/"a.json", [first, dict(conversations=[{"from": "human", "value": "My dog is Rex."}])])
    assert said(path) == [("user", "I live in Faro."), *[("assistant", "Hello.")] * kept, ("user", "My dog is Rex.")]
    assert read_chat(path).dropped.total() == (not kept)

@pytest.mark.parametrize("kind", ["image_asset_pointer", "video", "audio_asset_pointer", "input_image", "image_url",
                                  "audio", "executable_output", "executable_code", "code_execution_result",
                                  "web_search_tool_result", "custom_tool_call", "brand_new_part"])
def test_parts_that_say_nothing(tmp_path, kind):
    data = dict(url="file://f") if kind == "brand_new_part" else dict(text="UklGRg==", value="UklGRg==")
    for part in (dict(type=kind, **data), dict(content_type=kind, **data)):
        parts = [part, dict(type="text", text="Look!")], [part], part
        path = put(tmp_path/"a.json", [chat(*(dict(role="user", content=c) for c in parts), "Bye.")])
        assert said(path) == [("user", "Look!"), ("user", "Bye.")]

@pytest.mark.parametrize("content, want", [
    ("<think>She asks for her cat.</think>\nTiger.", [("assistant", "Tiger.")]), ("<think>She asks", []),
    (dict(type="audio", transcript="Hello."), [("assistant", "Hello.")]), ("`<think>` is a tag.", None),
])
def test_thinking_in_a_reply_and_a_transcript(tmp_path, content, want):
    path = put(tmp_path/"a.json", [chat("What is <think> for?", dict(role="assistant", content=content))])
    first = ("user", "What is <think> for?") # people may say so
    assert said(path) == [first, *([("assistant", content)] if want is None else want)]

def test_forms_mixed_in_one_list(tmp_path):
    bo = dict(conversations=[{"from": "human", "value": "I grow lemons."}])
    records = [export(node(None, "My bike is red.")), bo, chat("And tea."), [dict(role="user", content="I row.")],
               dict(role="user", content="alone"), 5, chat(), dict(conversations=[])]
    want = ["My bike is red.", "I grow lemons.", "And tea.", "I row."]
    for name, text in ("a.json", json.dumps(records)), ("a.jsonl", lines(*records)):
        path = put(tmp_path/name, text)
        assert [t for _, t in said(path)] == want
        dropped = read_chat(path).dropped
        assert dropped["conversation without a message"] == 2 and dropped.total() == 4

def test_ids_that_came_twice(tmp_path):
    twice = [dict(chat("My bike is red."), id="x"), dict(chat("My car is blue."), id="x")]
    history = read_history(put(tmp_path/"a.json", twice))
    assert [(s.id, s.messages[0].turn) for s in history] == [("x", 1), ("x", 2)]
    nodes = export(dict(node(None, "I row."), id="n"), dict(node(None, "I ski."), id="n"))
    assert said(put(tmp_path/"b.json", [nodes])) == [("user", "I row."), ("user", "I ski.")]

def test_a_mark_of_byte_order_and_nul(tmp_path):
    for name, text in ("a.json", json.dumps([ONE])), ("a.txt", "<|im_start|>user\nMy cat is called Tiger.<|im_end|>"):
        assert said(put(tmp_path/name, "\ufeff" + text)) == [("user", "My cat is called Tiger.")]
    assert said(put(tmp_path/"b.json", [chat("My \0cat")])) == [("user", "My \0cat")]
    (tmp_path/"c.jsonl").write_bytes(json.dumps(ONE).encode() + b"\n" + bytes(100)) # a cut download: said, not guessed
    raises("c.jsonl, line 2: broken JSON", read_history, tmp_path/"c.jsonl")
    (tmp_path/"d.json").write_bytes(json.dumps([ONE]).encode("utf-16"))
    raises("d.json, line 1: not UTF-8 text .*Save the file as UTF-8", read_history, tmp_path/"d.json")

@pytest.mark.parametrize("odd", [7, dict(text="Who?"), dict(text="Who?", answer="x", evidence=[7]),
                                 dict(text="Who?", answer="x", evidence=[[[1]]]), dict(text=" ", answer="x")])
def test_one_odd_question_is_named_and_the_others_are_asked(tmp_path, odd):
    good = dict(text="What do I drink?", answer="tea", evidence=[1])
    path = put(tmp_path/"a.json", [dict(chat("I drink tea."), queries=[odd, good])])
    asked = read_chat(path)
    assert [e.query.text for e in asked] == ["What do I drink?"]
    assert [w.startswith("odd question: ") and "query 1" in w for w in asked.dropped] == [True]
    raises("query 1", read_chat, put(tmp_path/"b.json", [dict(chat("I drink tea."), queries=[odd])]))

def test_queries_that_are_no_list(tmp_path):
    path = put(tmp_path/"a.json", [dict(chat("I drink tea."), queries=3), chat("My dog is called Rex.")])
    assert said(path) == [("user", "My dog is called Rex.")] and "queries" in next(iter(read_chat(path).dropped))

ONE, TWO = BOTH = chat("My cat is called Tiger."), chat("I live in a Faro suburb.")

def text_of(record): return record["messages"][0]["content"]

@pytest.mark.parametrize("name, text", [
    ("a.json", lines(ONE, TWO)), ("a.json", lines(ONE, TWO) + "\n\n"), ("a.json", json.dumps([ONE, TWO])),
    ("a.json", json.dumps(ONE, indent=1) + "\n" + json.dumps(TWO, indent=1)), ("a.jsonl", json.dumps([ONE, TWO])),
    ("a.jsonl", json.dumps([ONE, TWO], indent=2)), ("a.ndjson", lines(ONE, TWO)),
    ("a.jsonl", "\ufeff" + lines(ONE, TWO)),
    ("a.json", lines(ONE["messages"], TWO["messages"])), ("a.jsonl", lines([ONE], [TWO])),
    ("a", json.dumps([ONE, TWO])),
    ("a.json", json.dumps(dict(sessions=[ONE, 7, TWO]))), ("a.jsonl", lines(*ONE["messages"], *TWO["messages"])),
    ("a.jsonl", lines(*ONE["messages"], dict(role="elf", content="x"), *TWO["messages"])),
    ("a.json", json.dumps(dict(chat_messages=[dict(sender="human", text=text_of(m)) for m in BOTH]))),
    ("a.json", json.dumps(dict(messages=[dict(sender="Ana", isCreatedByUser=True, text=text_of(m)) for m in BOTH]))),
    ("a.json", json.dumps([dict(author=dict(role="user"), content=text_of(m)) for m in BOTH])),
    ("a.json", json.dumps(dict(contents=[dict(role="user", parts=[dict(text=text_of(m))]) for m in BOTH]))),
])
def test_a_suffix_is_only_a_guess(tmp_path, name, text):
    assert said(put(tmp_path/name, text)) == [("user", "My cat is called Tiger."), ("user", "I live in a Faro suburb.")]

def test_broken_json_says_where(tmp_path):
    raises("a.json, line 2: broken JSON", read_history, put(tmp_path/"a.json", lines(ONE) + '\n{"messages": ['))
    raises("b.jsonl, line 1: broken JSON", read_history, put(tmp_path/"b.jsonl", '{"messages": [\n' + lines(ONE)))
    raises("c.jsonl, line 3: broken JSON", read_history, put(tmp_path/"c.jsonl", lines(ONE) + "\n\n{"))
    raises("d.json, line 1: .*too long", read_history, put(tmp_path/"d.json", "1" * 9000))
    places = [p for p, _ in json_values(put(tmp_path/"e.json", "1\n\n2"))]
    assert places == [f"{tmp_path}/e.json, line {n}" for n in (1, 3)]

@pytest.mark.parametrize("text, want", [
    ("<|im_start|>user name=Ana\nI live in Porto.<|im_end|>", [("user", "I live in Porto.")]),
    ("<|im_start|>system name=rules\nBe kind.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>", [("user", "Hi.")]),
    ("<|im_start|>user<|im_sep|>Hi.<|im_end|><|im_start|>assistant<|im_sep|>Ho.",
     [("user", "Hi."), ("assistant", "Ho.")]),
    ("<|im_start|>imp\nBoo.<|im_end|>\n<|im_start|>User\nHi.", [("user", "Hi.")]),
    ("<|im_start|>\nBoo.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>", [("user", "Hi.")]),
    ("<|im_start|>tool\n42<|im_end|>\n<|im_start|>user\nHi.<|im_end|>", [("user", "Hi.")]),
])
def test_chatml(tmp_path, text, want): assert said(put(tmp_path/"a.txt", text)) == want

def test_users(tmp_path):
    path = put(tmp_path/"a.jsonl", lines(dict(ONE, user="ana"), dict(TWO, user="bo"), chat(" ", user="cy")))
    assert said(path, user="bo") == [("user", "I live in a Faro suburb.")]
    raises("it holds 2 users .ana, bo.*--user", read_history, path)
    raises("no user 'cy'; it holds 2 users", read_history, path, user="cy")
    assert read_chat(path).dropped["user without a message"] == 1
    alone = put(tmp_path/"b.jsonl", lines(ONE, TWO))
    assert said(alone, user="user") == said(alone)

@pytest.mark.parametrize("text, want", [
    ("Lisbon won \ue200cite\ue202turn0search1\ue201.", "Lisbon won."),
    ("Lisbon\ue200cite\ue202turn0search1\ue202turn0news3\ue201 won \ue200navlist\ue202Sport\ue202turn0news1\ue201",
     "Lisbon won"),
    ('In \ue200entity\ue202["city","Porto","in Portugal"]\ue201 it rained.', "In Porto it rained."),
    ("See \ue200url\ue202the club\ue202turn0search2\ue201.", "See the club."), ("Won.\ue200cite\ue202turn0", "Won."),
    ("\ue203Lisbon\ue204 won【8†source】【3:0†L1-L3】.", "Lisbon won."),
    ("A【oaicite:0】:contentReference[oaicite:0]{index=0} B", "A B"),
    ("\ue200entity\ue202broken\ue201Fine 【括弧】 [1].", "Fine 【括弧】 [1]."),
])
def test_marks_of_sources_go(tmp_path, text, want):
    path = put(tmp_path/"a.json", [export(node(None, "Who won?"), node(None, text, "assistant"))])
    assert said(path)[1] == ("assistant", want)

@pytest.mark.parametrize("name", ["timestamp", "created_at", "create_time", "time", "date", "createdAt"])
@pytest.mark.parametrize("value", [1741078800, 1741078800.5, 1741078800000, "1741078800", "2025-03-04T09:00:00Z",
                                   "2025-03-04 09:00", "2025/03/04", "2025-03-04T09:00:00.123+01:00"])
def test_times_of_messages_become_the_sessions_date(tmp_path, name, value):
    early, late = (chat(dict(role="user", content=text)) for text in ("early", "late"))
    early["messages"][0][name], late["messages"][0]["timestamp"] = value, "2025-03-09T09:00:00Z"
    history = read_history(put(tmp_path/"a.jsonl", lines(late, early)))
    assert [(s.date, s.messages[0].content) for s in history] == [("2025-03-04", "early"), ("2025-03-09", "late")]

def test_dates(tmp_path, caplog):
    message = lambda t: dict(role="user", content="x", timestamp=t)
    date = lambda record: read_history(put(tmp_path/"a.jsonl", record))[0].date
    assert date(chat(message("2025-03-04T09:00:00Z"), message(None),
                     message("2025-06-01T09:00:00Z"))) == "2025-03-04 to 2025-06-01"
    assert date(chat(message(1741078800), date="spring 2024")) == "spring 2024"
    assert date(chat("x", date=1741078800)) == "2025-03-04"
    assert date(chat("x", created_at="2025-03-04T01:00:00Z", date="")) == "2025-03-04"
    caplog.clear()
    assert date(chat(message(12.5), message(True), message("soon"))) == "soon" and "not understood': 1" in caplog.text
    assert date(chat(message(float(10**300)), message([]), message(1e400))) == ""


# ---- benchmarks

def locomo(*qa):
    talk = dict(speaker_a="A", speaker_b="B", session_1=[dict(speaker="A", dia_id="D1:1", text="I run.")])
    return [dict(sample_id="c", conversation=talk, qa=list(qa))]

def test_locomo_adversarial_and_odd_questions(tmp_path):
    trick = dict(question="Does B run?", adversarial_answer="Yes", evidence=["D1:1"], category=5)
    good = dict(question="Who runs?", answer="A", evidence=["D1:1"], category=4)
    odd = [dict(good, question=" "), dict(good, answer=None), dict(good, category="four"), 7]
    path = put(tmp_path/"l.json", locomo(dict(trick, answer="No"), trick, dict(trick, answer=3), good, *odd))
    kept = read_locomo(path, adversarial="keep")
    assert [e.answer for e in kept] == ["no information available"] * 3 + ["A"]
    assert [e.meta.get("given_answer") for e in kept] == ["No", None, 3, None]
    assert [(e.meta["benchmark"], e.meta["category"]) for e in kept] == [("locomo", 5)] * 3 + [("locomo", 4)]
    assert kept.dropped.total() == 4 and kept.dropped["odd question, not named"] == 1
    assert any("qa 5: field 'answer' is missing" in why for why in kept.dropped)

def lme(**more):
    sessions = [[dict(role="user", content="I moved to Faro.", has_answer=True),
                 dict(role="assistant", content="Nice.")],
                [dict(role="user", content="A joke?"), dict(role="assistant", content="No.", has_answer=False)],
                [dict(role="user", content="I live in Porto."),
                 dict(role="assistant", content="Porto it is.", has_answer=True)]]
    return dict(question_id="q", question_type="knowledge-update", question="Where do I live?", answer="Faro",
                question_date="2023/06/01 (Thu) 10:00", haystack_session_ids=["answer_b", "x", "answer_a"],
                haystack_dates=["2023/05/20 (Sat) 02:21", "2023/05/20 (Sat) 01:00", "2022/12/31 (Sat) 23:59"],
                haystack_sessions=sessions, answer_session_ids=["answer_a", "answer_b"]) | more

def test_longmemeval(tmp_path):
    (e,) = read_longmemeval(put(tmp_path/"l.json", [lme()]))
    assert [s.date for s in e.history] == ["2022/12/31 (Sat) 23:59", "2023/05/20 (Sat) 01:00", "2023/05/20 (Sat) 02:21"]
    assert [e.turns[t - 1].content for t in sorted(e.evidence)] == ["Porto it is.", "I moved to Faro."]
    assert (e.answer, e.query.kind, e.user, e.evidence_kind) == ("Faro", "knowledge-update", "q", "gold")
    assert e.meta == dict(benchmark="longmemeval", abstention=False, question_date="2023/06/01 (Thu) 10:00",
                          sessions=["answer_a", "x", "answer_b"], answer_sessions=["answer_a", "answer_b"])
    assert not any("answer" in s.id for s in e.history) and len(training_view(e).history) == 2
    assert list(load_episodes(write_episodes(tmp_path/"e.jsonl", [e]))) == [e]

def test_longmemeval_odd(tmp_path):
    sessions = [[], [dict(role="user", content=" ", has_answer=True), dict(role="user", content="Hi."), 7,
                     dict(role="elf", content="x"),
                     dict(role="assistant", content=None)], "x"]
    odd = lme(question_id="q_abs", haystack_sessions=sessions, answer=7)
    never = lme(question_id="p_abs", haystack_sessions=[[dict(role="user", content="Hi.")]],
                haystack_dates="['2023/01/01 (Sun) 10:00']",
                haystack_session_ids='["s"]')
    bad = [lme(question=None), lme(haystack_dates=["2023/01/01 (Sun) 10:00"]), lme(haystack_sessions=[[]] * 3), 7,
           lme(haystack_session_ids="open('x')")]
    found = read_longmemeval(put(tmp_path/"longmemeval_oracle", [odd, never, *bad])) # the hub's file has no suffix
    assert [(e.user, e.answer, e.meta["abstention"], e.evidence_kind, len(e.turns)) for e in found] == [
        ("q", "7", True, "none", 1), ("p", "Faro", True, "none", 1)]
    assert found[1].history[0].date == "2023/01/01 (Sun) 10:00"
    assert found.repaired["question kept without evidence"] == 2
    counts = Counter()
    for why, n in found.dropped.items(): counts[why.split(":")[0]] += n
    assert counts == {"odd message": 3, "message without text": 1, "session without messages": 5, "odd question": 3,
                      "odd question, not named": 2}
    raises("no question can be used; .*question 1: field 'question' is missing", read_longmemeval,
           put(tmp_path/"b.json", bad))
    raises("no such file", read_longmemeval, tmp_path/"no.json")
    assert len(read_longmemeval(put(tmp_path/"c.jsonl", lines(lme(), lme(question_id="r"))))) == 2

def test_longmemeval_from_the_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    calls = []
    file = str(put(tmp_path/"f.json", [lme()]))
    monkeypatch.setattr(hub, "hf_hub_download", lambda *a, **k: calls.append((a, k)) or file)
    assert len(read_longmemeval("xiaowu0162/longmemeval-cleaned", file="longmemeval_s_cleaned.json")) == 1
    assert calls == [(("xiaowu0162/longmemeval-cleaned", "longmemeval_s_cleaned.json"),
                      dict(repo_type="dataset", revision=None))]

FOUR = ["Noodles at a stall.", "A burger chain.", "A pizza chain.", "A coffee chain."]
PAIR = dict(preference='"I avoid restaurant chains."', question="A quick lunch?", explanation="Chains are near.")
CHOSEN = dict(query="Dinner?", assistant_options="1. A stall. 2. A chain.", user_selection="The first.",
              assistant_acknowledgment="Good.")
TOLD = {"turn2": dict(user="I like to avoid chains on trips.", assistant="I see."),
        "turn1": dict(user="I paint.", assistant="Nice."),
        "turn10": None}

@pytest.fixture
def prefeval(tmp_path):
    home = tmp_path/"PrefEval"/"benchmark_dataset"
    put(home/"mcq_options"/"lunch.json", [dict(PAIR, question=f"{PAIR['question']} {i}",
                                               classification_task_options=FOUR) for i in range(40)])
    asked = [dict(PAIR, question=f"{PAIR['question']} {i}") for i in range(40)]
    put(home/"explicit_preference"/"lunch.json", asked)
    put(home/"mcq_options"/"lunch copy.json", [7])
    put(home/"implicit_preference"/"choice-based"/"lunch.json", [dict(p, conversation=CHOSEN) for p in asked])
    put(home/"implicit_preference"/"persona-driven"/"lunch.json", [dict(p, conversation=TOLD) for p in asked])
    talk = [dict(role=r, content=f"{r} {i}") for i in range(3) for r in ("user", "assistant")]
    put(home/"filtered_inter_turns.json", [dict(conversation=talk[:4]), dict(conversation=talk[4:])])
    return home

def test_prefeval_forms(prefeval):
    forms = {f: read_prefeval(prefeval, form=f) for f in ("explicit", "choice", "persona")}
    first = {f: e[0] for f, e in forms.items()}
    assert {f: ([m.content for m in e.turns if m.turn in e.evidence], e.evidence_kind) for f, e in first.items()} == {
        "explicit": (["I avoid restaurant chains."], "gold"), "choice": (["The first."], "gold"),
        "persona": (["I like to avoid chains on trips."], "weak")}
    assert [m.content for m in first["persona"].turns] == ["I paint.", "Nice.", "I like to avoid chains on trips.",
                                                           "I see."]
    assert all(e.options[ord(e.answer) - 97] == FOUR[0] for es in forms.values() for e in es)
    assert [e.answer for e in forms["choice"]] == [e.answer for e in forms["explicit"]] # one order in all forms
    letters = Counter(e.answer for e in forms["explicit"])
    assert set(letters) == set("abcd") and max(letters.values()) < 20
    assert [e.answer for e in read_prefeval(prefeval, seed=1)] != [e.answer for e in forms["explicit"]]
    e = first["choice"]
    assert [FOUR[i] for i in e.meta["options_from"]] == list(e.options) and e.meta["seed"] == 0
    assert (e.meta["benchmark"], e.meta["topic"]) == ("prefeval", "lunch")
    assert (e.query.kind, e.user, e.id) == ("choice", "lunch/0", "lunch/0/choice")
    assert not forms["choice"].dropped and not forms["choice"].repaired
    parts = split_by_user([e for es in forms.values() for e in es])
    assert all(len(p) == 3 * len({e.user for e in p}) for p in parts)

def test_prefeval_paths(prefeval, tmp_path):
    assert len(read_prefeval(prefeval.parent)) == 40
    assert read_prefeval(prefeval/"implicit_preference"/"persona-driven"/"lunch.json")[0].query.kind == "persona"
    assert read_prefeval(prefeval/"mcq_options"/"lunch.json")[0].answer # options in the record itself
    elsewhere = put(tmp_path/"mine"/"lunch.json", [dict(PAIR, question=f"{PAIR['question']} {i}") for i in (7, 3)])
    shuffled = read_prefeval(elsewhere, options=prefeval/"mcq_options") # cut and sorted: found by question
    assert all(e.options[ord(e.answer) - 97] == FOUR[0] for e in shuffled) and not shuffled.repaired
    alone = read_prefeval(elsewhere)
    assert [(e.options, e.answer) for e in alone] == [(None, "")] * 2 and alone.repaired.total() == 2
    raises("no such file or folder of options", read_prefeval, elsewhere, options=tmp_path/"no")
    raises("unknown form 'spoken'", read_prefeval, prefeval, form="spoken")
    (tmp_path/"empty").mkdir()
    raises("no .json files", read_prefeval, tmp_path/"empty")
    raises("no such file", read_prefeval, tmp_path/"no.json")

def test_prefeval_talk_about_other_things(prefeval):
    between = lambda **more: [[m.content for m in s.messages] for s in read_prefeval(prefeval, **more)[0].history[1:]]
    assert between(others=1) == [["user 0", "assistant 0"]] and between() == between(others=0) == []
    assert between(others=3) == [["user 0", "assistant 0", "user 1", "assistant 1"], ["user 2", "assistant 2"]]
    assert between(talk=[[("user", "Hi."), ("assistant", "Ho.")]]) == [["Hi.", "Ho."]]
    assert [m.turn for m in read_prefeval(prefeval, others=2)[0].turns] == [1, 2, 3, 4, 5]
    raises("holds 3 exchanges", read_prefeval, prefeval, others=4)

def test_prefeval_odd(tmp_path):
    odd = [7, dict(PAIR, question=None), dict(PAIR, preference=""), dict(PAIR, conversation="{"),
           dict(PAIR, conversation=dict(query="?")),
           dict(PAIR, classification_task_options=["one"]), dict(PAIR, conversation=[1]),
           dict(PAIR, conversation={"0": 7})]
    told = dict(PAIR, conversation=json.dumps(CHOSEN))
    found = read_prefeval(put(tmp_path/"a.json", [*odd, told, PAIR]))
    assert [e.query.kind for e in found] == ["choice", "explicit"] and found.dropped.total() == len(odd)
    raises("no question can be used; .*item 2: field 'question' is missing", read_prefeval, put(tmp_path/"b.json", odd))

def test_prefeval_from_the_hub(prefeval, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [dict(PAIR, question=f"{PAIR['question']} {i}", topic=t) for t in ("lunch", "pets") for i in range(2)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list(rows))
    found = read_prefeval("siyanzhao/prefeval_explicit", options=prefeval/"mcq_options")
    assert [(e.user, bool(e.answer)) for e in found] == [("lunch/0", True), ("lunch/1", True), ("pets/0", False),
                                                         ("pets/1", False)]

TALK = ["User: Hello.", "Assistant: Hi.", "Side_Note: [Rui went to the sea.] 05/21/2014-I01",
        "User: A hut, 300 euros: please.",
        "Assistant: Two:", "a tree", "Side_Note: Rui fell ill. [06/02/2015]", "A doctor", "for Rui", "I will ask.",
        "Side_Note: [x]", "User:"]
ASK = dict(sample_id="rui", qa_family="slot_recall", timestamp="05/21/2014-I01", user_turn="A hut, 300 euros: please.",
           question="How much?", choice_a="90.", choice_b="I don't recall.", choice_c="300.", correct_choice="C",
           not_remember_choice="B")

def test_memoryctrl(tmp_path):
    put(tmp_path/"talk.jsonl", lines(dict(sample_id="rui", conversation=TALK), dict(sample_id="bo", conversation=[7]),
                                     7))
    odd = [dict(ASK, choice_b=None, choice_c=None), dict(ASK, correct_choice="D"), dict(ASK, question=None),
           dict(ASK, sample_id="bo")]
    put(tmp_path/"slot_mcq.jsonl", lines(ASK, dict(ASK, user_turn="", timestamp="06/02/2015"),
                                         dict(ASK, user_turn=None, timestamp=None), *odd))
    found = read_memoryctrl(tmp_path)
    assert [([m.content for m in e.turns if m.turn in e.evidence], e.evidence_kind) for e in found] == [
        (["A hut, 300 euros: please."], "gold"), (["A doctor\nfor Rui"], "gold"), ([], "none")]
    e = found[0]
    assert [m.content for m in e.turns][2:] == ["A hut, 300 euros: please.", "Two:\na tree", "A doctor\nfor Rui",
                                                "I will ask."]
    assert (e.answer, e.options, e.user, e.query.kind) == ("c", ("90.", "I don't recall.", "300."), "rui",
                                                           "slot_recall")
    assert e.meta == dict(benchmark="memoryctrl", topic=None, timestamp="05/21/2014-I01", not_remembered="b")
    assert "sea" not in str(e.to_json()) and len(training_view(e).history) == 1 and {s.date for s in e.history} == {""}
    assert found.repaired == {"line without a speaker": 4, "question kept without evidence": 1}
    counts = Counter()
    for why, n in found.dropped.items(): counts[why.split(":")[0]] += n
    assert counts == {"side note": 3, "message without text": 1, "odd record": 1, "odd line": 1, "odd conversation": 1,
                      "odd question": 3,
                      "question about a conversation that is not in the files": 1}
    for paths in ((tmp_path/"talk.jsonl",), (tmp_path, tmp_path/"slot_mcq.jsonl")):
        assert list(read_memoryctrl(*paths)) == list(found)
    raises("no question can be used", read_memoryctrl, tmp_path/"slot_mcq.jsonl")
    (tmp_path/"empty").mkdir()
    raises("no .jsonl files", read_memoryctrl, tmp_path/"empty")

@pytest.mark.skipif(not CTRL.exists(), reason="the files of MemoryCtrl are not on this machine (see CONTRIBUTING.md)")
def test_memoryctrl_real():
    found = read_memoryctrl(CTRL)
    assert len(found) == len({e.id for e in found}) == 293 and len({e.user for e in found}) == 7
    assert {len(e.evidence) for e in found} == {1} and found.dropped == {"side note": 420}
    assert not any("Side_Note" in m.content for e in found for m in e.turns)
    raw = [json.loads(l) for l in open(CTRL/"slot_recall_mcq.jsonl", encoding="utf-8")]
    for e, q in zip((e for e in found if e.query.kind == "slot_recall"), raw):
        (turn,) = (m for m in e.turns if m.turn in e.evidence)
        assert turn.role == "user" and q["user_turn"] in turn.content
        assert e.answer == q["correct_choice"].lower() and e.options == (q["choice_a"], q["choice_b"], q["choice_c"])


# ---- whatever the file holds

FIELDS = """role content messages sessions from value mapping current_node author parent message metadata timestamp date
recipient question_id question_type question answer haystack_sessions haystack_dates haystack_session_ids
has_answer preference conversation query user_selection classification_task_options sample_id choice_a
choice_b correct_choice category qa speaker_a speaker_b session_1 evidence""".split()
TEXTS = ["user", "a", "A", "User: x", "2024-05-01", "x", ""]
VALUES = st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(TEXTS)
JSON = st.recursive(VALUES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), x, max_size=6),
                    max_leaves=16)

@settings(max_examples=60, deadline=None)
@given(values=st.lists(JSON, max_size=3))
def test_odd_json_gives_episodes_or_the_documented_error(tmp_path_factory, values):
    folder = tmp_path_factory.getbasetemp()/"odd"
    for path in (put(folder/"odd.json", values), put(folder/"odd.jsonl", lines(*values) or "[]")):
        for read in (read_history, read_chat, read_locomo, read_longmemeval, read_prefeval, read_memoryctrl):
            try: read(path)
            except DataError as e: assert "odd.json" in str(e)


# ---- in whatever wraps them

IN_PORTO = [dict(role="user", content="I live in Porto."), dict(role="assistant", content="Nice.")]
PORTO = [("user", "I live in Porto."), ("assistant", "Nice.")]
OPEN_WEBUI = {"1": dict(id="1", parentId=None, role="user", content="I live in Porto."),
              "2": dict(id="2", parentId="1", role="assistant", content="Old."),
              "3": dict(id="3", parentId="1", role="assistant", content="Nice.")}

@pytest.mark.parametrize("value", [
    dict(conversations=[chat(*IN_PORTO)]), dict(data=[chat(*IN_PORTO)], total=1), dict(thread=chat(*IN_PORTO)),
    dict(turns=IN_PORTO),
    dict(c1=chat(*IN_PORTO)), dict(conversation=chat(*IN_PORTO)), dict(messages=json.dumps(IN_PORTO)),
    dict(custom_id="1", body=chat(*IN_PORTO)), [dict(conversation=[dict(human="I live in Porto.", assistant="Nice.")])],
    [dict(id="c", chat=dict(history=dict(messages=OPEN_WEBUI, currentId="3")))],
    dict(messages=[dict(OPEN_WEBUI["1"], children=[OPEN_WEBUI["2"], OPEN_WEBUI["3"]])]),
    dict(messages=[*OPEN_WEBUI.values()]),
    dict(object="list", data=[dict(m, created_at=1741078800 - i) for i, m in enumerate(IN_PORTO[::-1])]), # newest first
    [dict(type="user", message=IN_PORTO[0]), dict(type="assistant", message=IN_PORTO[1])],
    chat(*(dict(type=t, content=m["content"]) for t, m in zip(("human", "ai"), IN_PORTO))),
    chat(*(dict(type=t, data=dict(content=m["content"])) for t, m in zip(("human", "ai"), IN_PORTO))),
    dict(text="<|im_start|>user\nI live in Porto.<|im_end|>\n<|im_start|>assistant\nNice.<|im_end|>"),
])
def test_conversations_are_found_in_whatever_wraps_them(tmp_path, value):
    for name in "a.json", "a.txt": assert said(put(tmp_path/name, json.dumps(value))) == PORTO

@pytest.mark.parametrize("mark", [dict(hidden=True), dict(isHidden="true"), dict(visible=False), dict(deleted=True),
                                  dict(metadata=dict(is_hidden=True)), dict(metadata=dict(visible=False))])
def test_hidden_in_other_words(tmp_path, mark):
    assert said(put(tmp_path/"a.json", [chat(dict(role="user", content="Be a pirate.", **mark), *IN_PORTO)])) == PORTO

@pytest.mark.parametrize("text", [
    '<details type="reasoning" done="true">\n<summary>Thought</summary>\n> hm\n</details>\nNice.',
    "Nice. citeturn0search0",
    ":::thinking\nhm\n:::\nNice.", '<tool_call>\n{"name": "f"}\n</tool_call>\nNice.',
    "Nice. citeturn0search0turn1news2"])
def test_what_an_app_folds_into_a_reply(tmp_path, text):
    assert said(put(tmp_path/"a.json", [chat(IN_PORTO[0], dict(role="assistant", content=text))])) == PORTO

@pytest.mark.parametrize("name", ["user", "user_id", "userId", "object", "metadata"])
def test_users_under_other_names(tmp_path, name):
    inside = {"object": ("user", "id"), "metadata": ("metadata", "user_id")}.get(name)
    who = lambda u: {inside[0]: {inside[1]: u}} if inside else {name: u}
    for records in [[dict(chat(text_of(r)), **who(u)) for r, u in ((ONE, "ana"), (TWO, "bo"))],
                    [dict(r["messages"][0], **who(u)) for r, u in ((ONE, "ana"), (TWO, "bo"))]]: # messages, one a line
        path = put(tmp_path/"a.jsonl", lines(*records))
        assert [said(path, user=u) for u in ("ana", "bo")] == [[("user", text_of(r))] for r in BOTH]

def test_lines_of_several_sessions_and_people_with_names(tmp_path):
    rows = [dict(m, session_id=s) for m, s in zip((IN_PORTO[0], ONE["messages"][0], IN_PORTO[1]), "xyx")]
    history = read_history(put(tmp_path/"a.jsonl", lines(*rows)))
    assert [(s.id, len(s.messages)) for s in history] == [("x", 2), ("y", 1)]
    two = [dict(role="user", content="I row.", name="Ana"), dict(role="user", content="I ski.", name="Bo")]
    assert said(put(tmp_path/"b.json", [chat(*two)])) == [("user", "Ana: I row."), ("user", "Bo: I ski.")]
    assert said(put(tmp_path/"c.json", [chat(two[0])])) == [("user", "I row.")]

def test_odd_places_of_benchmarks(tmp_path):
    turn = lambda who, i, text: dict(speaker=who, dia_id=i, text=text)
    talk = dict(speaker_a="Ana", speaker_b="Bo", session_2=None, session_3="x", session_1=[
        turn("ana ", "D1:1", "I row."), None, turn("Zed", "D1:3", "I hum."), dict(speaker="Bo", text="Hi.")])
    qa = dict(question="What?", answer=["row", 3], evidence=["d1:1", "D1:4"], category="4")
    good = dict(sample_id=7, conversation=talk, qa=[qa])
    for value in [None, dict(sample_id="x"), good], dict(data=[good]), good:
        (e,) = read_locomo(put(tmp_path/"l.json", value))
        assert (e.user, e.answer, e.evidence, len(e.turns)) == ("7", "row, 3", {1, 2}, 2)
    assert len({e.user for e in read_locomo(put(tmp_path/"m.json", [good, good]))}) == 2
    asked = dict(question_id=1, question="Where?", answer=["Faro"], haystack_dates=[], haystack_sessions=[
        [dict(role="User", content="I live in Faro.", has_answer=1)]])
    (e,) = read_longmemeval(put(tmp_path/"n.json", dict(data=[asked])))
    assert (e.id, e.answer, e.evidence) == ("1", "Faro", {1})
