"The chat model of both papers: servers that want to be asked in their own way, replies that hold more than an answer."
import json, threading, warnings

import pytest
from hypothesis import given, settings, strategies as st

pytest.importorskip("openai", reason="endpoints need the package `openai`")
from comam_nb.agents import ExtractionAgent, act
from comam_nb.base.errors import BackboneError, ChatDown, MemCollabError
from comam_nb.checks.tasks import Task
from comam_nb.data import example_episode
from comam_nb.lm.chat import LocalChat, Reply, _chat_ids, without_thinking
from comam_nb.lm.decoding import sample_group
from comam_nb.lm.endpoints import EndpointChat, EndpointPool
from comam_nb.lm.recorded import RecordingChat, ReplayChat, open_chat
from comam_nb.mdp import State
from comam_nb.memcollab.attempts import Solver
from comam_nb.memcollab.solving import solve
from fake_server import Script, ask, completion
from test_memcollab_trajectories import numbers, plain

def replies(**message):
    "A mood: a good answer with these fields in its message; `finish` and `usage` are the choice's and the body's."
    finish, usage = message.pop("finish", "stop"), message.pop("usage", {"prompt_tokens": 9, "completion_tokens": 512})
    body = {"choices": [{"message": {"role": "assistant", **message}, "finish_reason": finish}], "usage": usage}
    return lambda h: h.send(200, json.dumps(body).encode())

def refuses(h, text, **more): h.send(400, json.dumps({"error": {"message": text, **more}}).encode())
def last(h): return h.server.log[-1][3] # the body of the request

def reasoning_model(h):
    "OpenAI's reasoning models."
    if "max_tokens" in last(h):
        return refuses(h,
                       "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                       "'max_completion_tokens' "
                          "instead.", param="max_tokens", code="unsupported_parameter")
    if last(h).get("temperature", 1) != 1:
        return refuses(h,
                       "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) "
                       "value "
                          "is supported.", code="unsupported_value")
    if "top_p" in last(h): return refuses(h, "Unsupported parameter: 'top_p' is not supported with this model.")
    h.send(200, completion(r"\boxed{0}"))

def no_system(h):
    "Gemma's template, in vLLM's words."
    if last(h)["messages"][0]["role"] == "system": return refuses(h, "System role not supported")
    h.send(200, completion(r"\boxed{0}"))


# ---- thinking -------------------------------------------------------------------------------------------------------
THOUGHT = "<think>\nThe user talks about a cat.\nI must write facts with [numbers].\n</think>\n\n"
FACTS = "The user has a cat named Miso. [1]\nThe favourite drink is coffee. [3]"

@pytest.mark.parametrize("text,said", [
    (THOUGHT + FACTS, FACTS), (THOUGHT.removeprefix("<think>\n") + FACTS, FACTS), (THOUGHT[:40], ""),
                                       ("  " + THOUGHT + FACTS, FACTS),
    ("<thinking>a</thinking>b", "b"), ("[THINK]a[/THINK]b", "b"), ("<think></think>\n\nb", "b"),
                                       ("b\n<think>more", "b"),
    ("Use `<think>` and `</think>`.", "Use `<think>` and `</think>`."), ("a < b > c", "a < b > c"), (" \n", " \n")])
def test_thinking_is_taken_out(text, said): assert without_thinking(text) == said

@given(st.text(), st.text())
@settings(max_examples=60, deadline=None)
def test_what_is_said_does_not_depend_on_what_was_thought(thought, said):
    said = said.strip()
    if "think" in (thought + said).lower() or "thought" in (thought + said).lower(): return
    for text in (f"<think>{thought}</think>\n{said}", f"{thought}</think>\n{said}"):
        assert without_thinking(text) == said
    assert without_thinking(said) == said and without_thinking(f"<think>{thought}{said}") == ""

@pytest.mark.parametrize("thought", [THOUGHT, THOUGHT.removeprefix("<think>\n"), ""])
def test_an_agents_memory_never_holds_thinking_wherever_its_policy_is(server, thought):
    "Cases t01 and t02: each line of thinking became a memory item."
    server.answer = lambda prompt: thought + FACTS
    class Script2:
        def complete(self, prompts, **k): return [thought + FACTS] * len(prompts)
    for policy in (server.chat(), Script2()):
        [[d]] = act(ExtractionAgent(policy), [State(0, history=example_episode().history)], 1, 0.0)
        assert [n.text for n in d.action.notes] == ["The user has a cat named Miso.", "The favourite drink is coffee."]

def test_a_reply_is_clean_wherever_it_comes_from(server, tmp_path):
    server.answer = lambda prompt: "<think>Is it 3?</think>It is 5."
    chat = RecordingChat(server.chat(), tmp_path / "tape.jsonl")
    r = chat.chat(ask())
    assert (r.text, r.raw) == ("It is 5.", "<think>Is it 3?</think>It is 5.")
    assert ReplayChat(tmp_path / "tape.jsonl").chat(ask()) == r
    old = {"key": json.loads((tmp_path / "tape.jsonl").read_text())["key"], "model": "m",
           "reply": {"text": "3?</think>It is 5."}}
    (tmp_path / "old.jsonl").write_text(json.dumps(old) + "\n") # recorded before thinking was taken out
    assert ReplayChat(tmp_path / "old.jsonl").chat(ask()).text == "It is 5."

def test_recordings_without_thinking_are_as_they_were():
    assert Reply("It is 5.", 1, 2, 0.5, "stop").to_json() == {"text": "It is 5.", "prompt_tokens": 1,
        "completion_tokens": 2,
                                                             "seconds": 0.5, "finish": "stop"}


# ---- where the answer is --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_an_attempt_that_thought_until_it_was_cut_off_says_so(server, field):
    "Case e01: it was a wrong answer, and nothing said why."
    server.always = replies(content=None, finish="length", **{field: "6 times 7 is"})
    [t] = solve([Task("t", "6 times 7?", check={"kind": "math", "answer": "42"})], plain(server.chat()))
    assert not t.right and t.finish == "length"
    assert t.error == "cut off after 512 tokens, before any answer: raise max_tokens"
    assert t.verdict.reason.startswith("no answer: cut off") and "cut off" in t._repr_html_()

def test_a_guess_in_thinking_that_was_cut_off_is_no_answer(server):
    "Case t05, at an endpoint that leaves the tags in the text."
    server.always = replies(content=r"<think>First guess: \boxed{42}. Hmm,", finish="length")
    [t] = solve([Task("t", "6 times 7?", check={"kind": "math", "answer": "42"})], plain(server.chat()))
    assert not t.right and "cut off" in t.error and t.answer == ""

def test_a_cut_off_answer_is_judged_and_marked(server, tmp_path):
    server.always = replies(content=r"It is \boxed{42} because", finish="length")
    path = tmp_path / "t.jsonl"
    [t] = solve([Task("t", "6 times 7?", check={"kind": "math", "answer": "42"})], plain(server.chat()), path)
    assert t.right and (t.finish, t.error) == ("length", "") and json.loads(path.read_text())["finish"] == "length"
    server.always = None
    solve(numbers(1), plain(server.chat()), tmp_path / "u.jsonl")
    assert "finish" not in json.loads((tmp_path / "u.jsonl").read_text()) # the file is as it was

def test_a_good_program_before_the_cut_still_counts():
    lines = iter([Reply("```python\ndef f(): return 1\n```", 1, 1, 0.1, "stop"), Reply("<think>Is that", 1, 9, 0.1,
        "length")])
    task = Task("t", "Write f.", domain="code", check={"kind": "code", "tests": ["assert f() == 1"]})
    [t] = solve([task], Solver("a", Script(lambda m: next(lines)), "agent", max_turns=2))
    assert t.right and t.error == "" and t.finish == "length"

@pytest.mark.parametrize("content", ["", None, "\n"])
@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_an_answer_that_the_servers_parser_took_for_thinking_is_found(server, field, content):
    "Case e02."
    server.always = replies(content=content, **{field: r"So \boxed{42}."})
    [t] = solve([Task("t", "6 times 7?", check={"kind": "math", "answer": "42"})], plain(server.chat()))
    assert t.right and t.error == ""

def test_thinking_beside_an_answer_is_kept_apart(server):
    server.always = replies(content="5", reasoning_content="2 + 3")
    r = server.chat().chat(ask())
    assert r.text == "5" and "2 + 3" in r.raw and (r.prompt_tokens, r.completion_tokens) == (9, 512)
    server.always = replies(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "2 + 3"}]},
                                     {"type": "text", "text": "5"}, {"type": "text", "text": {"value": "!"}}])
    r = server.chat().chat(ask())
    assert r.text == "5!" and "2 + 3" in r.raw
    server.always = replies(content="", reasoning_content="I call a tool", tool_calls=[{"id": "1"}],
                            finish="tool_calls")
    assert server.chat().chat(ask()).text == ""


# ---- what a server will not take ------------------------------------------------------------------------------------
def test_a_reasoning_model_is_asked_in_its_own_way_and_only_once_in_the_wrong_one(server):
    "Case e04: it could not be used."
    server.always, chat = reasoning_model, server.chat()
    with pytest.warns(UserWarning, match="does not take this temperature: it is left out from now on") as said:
        assert chat.chat(ask(), 33).text == r"\boxed{0}"
    assert len(server.log) == 3 and len(said) == 1
    assert last_body(server) == {"model": "m", "messages": ask(), "max_completion_tokens": 33}
    with warnings.catch_warnings(): warnings.simplefilter("error"); assert chat.chat(ask(), 34).text == r"\boxed{0}"
    assert len(server.log) == 4

def last_body(server): return server.log[-1][3]

def test_quirks_are_learnt_by_every_thread_and_every_endpoint_of_a_pool(servers):
    for s in servers: s.always = reasoning_model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = solve(numbers(30), plain(EndpointPool([s.chat(workers=3) for s in servers])))
    assert len(out) == 30 and out[0].right and all(not t.error for t in out)
    # at most each first request of each thread in two wrong ways
    assert sum(len(s.log) for s in servers) <= 30 + 3 * 3 * 2

@pytest.mark.parametrize("status", [400, 422, 500]) # 500: llama.cpp
def test_a_server_without_a_system_role_gets_the_text_in_the_first_message(server, status):
    "Case e05."
    server.always = no_system if status == 400 else lambda h: (
        h.send(status, b'{"error": {"message": "System role not supported"}}') if last(h)["messages"][0]["role"]
        == "system"
        else h.send(200, completion("well")))
    chat, talk = server.chat(retries=0), [{"role": "system", "content": "Be brief."}, *ask("hello")]
    for _ in range(2): assert chat.chat(talk).text
    assert len(server.log) == 3 and last_body(server)["messages"] == ask("Be brief.\n\nhello")
    assert talk[0]["role"] == "system" # the caller's own list is not changed

def test_a_wordless_500_is_worth_one_request_without_a_system_message(server):
    "transformers serve, when a template fails; it says no more when it breaks otherwise."
    def serve(h):
        if last(h)["messages"][0]["role"] == "system": return h.send(500, b"Internal Server Error", "text/plain")
        h.send(200, completion("well"))
    server.always, chat = serve, server.chat(retries=0)
    talk = [{"role": "system", "content": "Be brief."}, *ask("hello")]
    with pytest.warns(UserWarning, match="takes no system message") as said:
        for _ in range(2): assert chat.chat(talk).text == "well"
    assert len(server.log) == 3 and len(said) == 1
    server.always, broken = lambda h: h.send(500, b"Internal Server Error", "text/plain"), server.chat(retries=0)
    with pytest.raises(ChatDown, match="InternalServerError"): broken.chat(talk)
    server.always = None
    assert broken.chat(talk).text and last_body(server)["messages"][0]["role"] == "system" # nothing was learnt
    server.moods, n = [lambda h: h.send(500, b"", "text/plain")], len(server.log)
    with pytest.raises(ChatDown): broken.chat(talk) # it can: this was another failure
    assert len(server.log) == n + 1

def test_a_seed_that_is_not_taken_is_left_out(server):
    server.always = lambda h: h.send(422,
                                     b'{"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra '
                                     b'inputs '
                                          b'are not permitted"}]}') if "seed" in last(h) else h.send(200,
        completion("well"))
    with pytest.warns(UserWarning, match="this seed"): assert server.chat().chat(ask(), seed=3).text == "well"

def test_what_was_asked_for_by_name_is_never_left_out(server):
    server.always = lambda h: refuses(h, "Unsupported parameter: 'top_p' is not supported with this model.")
    with pytest.raises(ChatDown, match="top_p") as e: server.chat(extra={"top_p": 0.8}).chat(ask())
    assert e.value.fatal and len(server.log) == 1
    server.always = lambda h: refuses(h, "Unknown field 'colour'. Known: max_tokens, temperature")
    with pytest.raises(ChatDown, match="colour"): server.chat(extra={"colour": "red"}).chat(ask())
    assert len(server.log) == 2

def test_a_server_that_is_never_content_is_not_asked_for_ever(server):
    server.always = lambda h: refuses(h,
                                      "Unsupported: max_tokens, max_completion_tokens, temperature, top_p, seed; "
                                      "System role not supported")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ChatDown): server.chat().chat([{"role": "system", "content": "s"}, *ask()], seed=1)
    assert len(server.log) <= 8


# ---- whose fault ----------------------------------------------------------------------------------------------------
def context(n, prompt, words):
    "A server with a context of n tokens and a prompt of so many."
    def mood(h):
        asked = last(h)["max_tokens"]
        if prompt + asked <= n: return h.send(200, completion(r"\boxed{0}"))
        refuses(h, words.format(n=n, prompt=prompt, asked=asked, total=prompt + asked, room=n - prompt))
    return mood

WORDS = {
    "openai": "This model's maximum context length is {n} tokens. However, you requested {total} tokens ({prompt} in "
              "the messages, {asked} in the completion).",
    "vllm": "'max_tokens' or 'max_completion_tokens' is too large: {asked}. This model's maximum context length is "
            "{n} tokens and your request has {prompt} input tokens ({asked} > {n} - {prompt}). None",
    "tgi": "`inputs` tokens + `max_new_tokens` must be <= {n}. Given: {prompt} `inputs` tokens and {asked} "
           "`max_new_tokens`"}

@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_an_answer_gets_what_the_prompt_leaves_of_the_context(server, words):
    "As with a local model. It was the model's failure before."
    server.always = context(4096, 25, words)
    assert server.chat().chat(ask(), max_tokens=5000).text == r"\boxed{0}"
    assert last_body(server)["max_tokens"] == 4071 and len(server.log) == 2
    server.always = context(4096, 4096, words)
    assert server.chat().chat(ask(), max_tokens=5).finish.startswith("refused: ")

def test_max_tokens_above_what_the_server_takes_is_nobodys_wrong_answer(server, tmp_path):
    "Case e03: every task was recorded as the model's failure."
    for words in (WORDS["vllm"].format(asked=5000, n=4096, prompt=25),
                  "max_tokens is too large: 50000. This model supports at most 16384 completion tokens"):
        server.always = lambda h: refuses(h, words)
        with pytest.raises(ChatDown, match=r"lower max_tokens|check the model") as e:
            solve(numbers(3), plain(server.chat(workers=1), max_tokens=5000), tmp_path / "t.jsonl")
        assert (tmp_path / "t.jsonl").read_bytes() == b"" and "3 are missing" in str(e.value)


# ---- one client for both papers -------------------------------------------------------------------------------------
def test_a_policy_has_the_clients_retries_and_quirks(server):
    server.always, server.moods = reasoning_model, [500, "cut", 429]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        [[s]] = sample_group(server.chat(workers=1), ["say 0"], temperature=0.0, top_p=0.9)
    assert s.text == r"\boxed{0}" and (s.prompt_ids, s.ids) == ((), ())
    assert len(server.log) == 3 + 4 and "top_p" in server.log[0][3] and "top_p" not in last_body(server)

@pytest.mark.parametrize("mood, scheme, words", [
    ("no http", "http", "no answer after 1 tries, at last RemoteProtocolError: "), # a mail server
    ("well", "https", "no answer after 1 tries, at last ConnectError: [SSL"), # no TLS there
    (401, "http", "401.*check the model's name, the key and the quota"),
    (404, "http", "404.*check the address and the model's name")])
def test_what_is_no_server_for_this_is_named_with_its_port(server, mood, scheme, words):
    server.always, url = mood, server.url.replace("http://", f"{scheme}://ana:geheim77@")
    with pytest.raises(ChatDown, match=words.replace("[", r"\[")) as e:
        EndpointChat(url, "m", api_key="sk-secret-1234", retries=0).chat(ask())
    assert f"m at 127.0.0.1:{server.server_port}: " in str(e.value) and "\n" not in str(e.value)
    assert "geheim77" not in str(e.value) and "sk-secret" not in str(e.value)

@pytest.mark.parametrize("spec", ["http://ana:geheim77@a:1/v1", "ftp://ana:geheim77@a/v1#m",
    "http://ana:geheim77@a:x/v1#m",
    "http://ana:geheim77@a/v1,http://ana:geheim77@a/v1#m", "http://ana:geheim77@a/v1#m?loud"])
def test_an_address_that_is_refused_is_shown_without_its_login(spec):
    with pytest.raises(MemCollabError) as e: open_chat(spec)
    assert "geheim77" not in str(e.value) and "://a" in str(e.value)

def test_a_policys_texts_are_in_order_and_side_by_side(server):
    server.delay = 0.05
    chat = server.chat(workers=4)
    assert chat.complete([f"say {i}" for i in range(8)]) == [rf"It is \boxed{{{i}}}"
        for i in range(8)] and server.most_busy == 4
    body = last_body(server)
    assert "top_p" not in body and "seed" not in body and body["temperature"] == 1.0

def test_a_policy_without_a_server_is_one_clear_error(server):
    server.always = 401
    with pytest.raises(BackboneError, match="check the model's name, the key and the quota") as e:
        server.chat().complete(["hello"])
    assert "\n" not in str(e.value) and "secret-key" not in str(e.value)
    server.always = lambda h: refuses(h,
                                      "This model's maximum context length is 4096 tokens. However, your messages "
                                      "resulted in 5000 tokens.")
    with pytest.raises(BackboneError, match="m: refused: .*5000 tokens"): server.chat().complete(["hello"])

def test_a_recorded_policy_gives_each_of_a_group_its_own_text(server, tmp_path):
    count, lock = iter(range(99)), threading.Lock()
    def answer(prompt):
        with lock: return f"text {next(count)}"
    server.answer = answer
    texts = lambda policy: [[s.text for s in g] for g in sample_group(policy, ["tea?", "cat?", "tea?"], 2,
        temperature=0.7)]
    tape = tmp_path / "tape.jsonl"
    first = texts(RecordingChat(server.chat(), tape))
    assert len({t for g in first for t in g}) == 6 and {b.get("seed") for *_, b in server.log} == {None, 1, 2, 3}
    assert texts(ReplayChat(tape)) == first == texts(RecordingChat(server.chat(), tape)) and len(server.log) == 6
    cold = [s.text for s in sample_group(RecordingChat(server.chat(), tape), ["tea?"], 3, temperature=0.0)[0]]
    assert len(set(cold)) == 1 # the likeliest text is the same text


# ---- settings from the command line ---------------------------------------------------------------------------------
def test_settings_behind_a_question_mark_are_sent(server):
    chat = open_chat(f'{server.url}#org/m-7b?reasoning_effort=low&seed=null&chat_template_kwargs={{"enable_thinking": '
                     f'false}}')
    chat.chat(ask(), seed=3)
    assert last_body(server) == {"model": "org/m-7b", "messages": ask(), "max_tokens": 512, "temperature": 0.0,
                                 "reasoning_effort": "low",
                                 "chat_template_kwargs": {"enable_thinking": False}}
    other = open_chat(f"{server.url}#org/m-7b")
    assert Solver("a", chat).setup != Solver("a", other).setup and Solver("a", other).setup == Solver("a",
        EndpointChat(server.url, "org/m-7b")).setup
    with pytest.raises(MemCollabError, match="NAME=VALUE"): open_chat(f"{server.url}#m?loud")

@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    "A tiny model whose template thinks unless it is told not to, saved as any other."
    import torch
    from comam_nb.worlds.warm_start import tiny_llama, _world_tokenizer
    torch.manual_seed(0)
    tokenizer = _world_tokenizer()
    tokenizer.chat_template = ("{% for m in messages %}{{ m.content }} {% endfor %}"
                               "{% if enable_thinking is defined and not enable_thinking %}tea{% else %}coffee{% "
                               "endif %}")
    folder = tmp_path_factory.mktemp("thinker")
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

def test_settings_of_a_local_model_go_to_its_template(thinker):
    hot, cold = open_chat(str(thinker)), open_chat(f"{thinker}?enable_thinking=false")
    said = [c.backbone.decode(_chat_ids(c.backbone, ask("pizza"))).split()[-1] for c in (hot, cold)]
    assert said == ["coffee", "tea"] and (hot.extra, cold.extra) == (None, {"enable_thinking": False})
    assert Solver("a", hot).setup != Solver("a", cold).setup
    from comam_nb.lm.backbone import prompt_ids
    assert [prompt_ids(c.backbone, "pizza") == _chat_ids(c.backbone, ask("pizza")) for c in (hot, cold)] == [True, True]

def test_a_local_chat_writes_as_sample_group_does(thinker):
    chat = open_chat(str(thinker), batch_size=3)
    prompts = ["tea", "pizza and coffee", "the cat", "tea"]
    [a, b, c, d] = sample_group(chat.backbone, prompts, temperature=0.0, max_new_tokens=6)
    assert chat.complete(prompts, max_new_tokens=6, temperature=0.0) == [without_thinking(g[0].text) for g in (a, b, c,
        d)]
    assert isinstance(chat, LocalChat)
    with pytest.raises(BackboneError, match="refused: the prompt has"): chat.complete(["tea " * 600])
