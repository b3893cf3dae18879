"The local OpenAI-compatible server, and mem0 around it where it is installed."
import json, urllib.error, urllib.request
from importlib.util import find_spec
import numpy as np
import pytest

from comam_nb.agents import ExtractionAgent, ProfileAgent, RetrievalAgent
from comam_nb.base.errors import DataError
from comam_nb.data import example_episode
from comam_nb.mdp import Scripted
from comam_nb.systems.mem0 import _LocalServer, Mem0System
from comam_nb.base.embedders import HashingEmbedder

installed = pytest.mark.skipif(find_spec("mem0") is None, reason="mem0 is not installed: pip install 'comam_nb[mem0]'")
ANSWER = "<information> [2] </information> <final_answer> tea </final_answer>"

def agents(texts=("",)):
    return {"extraction": ExtractionAgent(Scripted(list(texts))), "profile": ProfileAgent(Scripted([""])),
            "retrieval": RetrievalAgent(Scripted([ANSWER]))}

def post(url, body):
    request = urllib.request.Request(url, data=body if isinstance(body, bytes) else json.dumps(body).encode())
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as r:
            return r.status, json.loads(r.read())
    except urllib.error.HTTPError as e: return e.code, json.loads(e.read())

def test_the_server_listens_on_this_machine_only_and_counts():
    noted = []
    with _LocalServer(Scripted(["tea", "milk"]), note=lambda *a: noted.append(a)) as server:
        assert server.http.server_address[0] == "127.0.0.1"
        for text in ("tea", "milk"):
            status, reply = post(server.url + "/chat/completions", {"messages": [{"role": "user", "content": "?"}]})
            assert (status, reply["choices"][0]["message"]["content"]) == (200, text)
    assert [(p, s.text) for p, s, _ in noted] == [("?", "tea"), ("?", "milk")]

def test_embeddings_are_the_embedders_own():
    with _LocalServer(Scripted([""]), HashingEmbedder(32)) as server:
        _, reply = post(server.url + "/embeddings", {"input": ["tea", "a cat"]})
    assert [d["index"] for d in reply["data"]] == [0, 1]
    np.testing.assert_allclose([d["embedding"] for d in reply["data"]], HashingEmbedder(32)(["tea", "a cat"]),
                               atol=1e-7)

@pytest.mark.parametrize("path, body", [("/chat/completions", {}),
                                        ("/chat/completions", {"messages": [{"role": "user", "content": None}]}),
                                        ("/chat/completions", [1]),
                                        ("/chat/completions", b"\xff{"), ("/embeddings", {"input": []}),
                                        ("/elsewhere", {}),
                                        ("/chat/completions", {"messages": [{"role": "user", "content": "?"}],
    "temperature": "hot"})])
def test_bad_requests_get_400_and_the_server_lives_on(path, body):
    with _LocalServer(Scripted(["tea"])) as server:
        status, reply = post(server.url + path, body)
        assert status == 400 and reply["error"]["message"]
        assert post(server.url + "/embeddings", {"input": "tea"})[0] == 200

def test_a_prompt_that_does_not_fit_is_a_request_error():
    from comam_nb.worlds.warm_start import load_warm_start
    with _LocalServer(load_warm_start()) as server:
        status, reply = post(server.url + "/chat/completions",
                             {"messages": [{"role": "user", "content": "tea " * 600}]})
        assert status == 400 and "tokens" in reply["error"]["message"]

def test_thinking_never_reaches_mem0_and_a_reply_that_was_cut_off_says_so():
    from comam_nb.worlds.warm_start import load_warm_start
    question = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 1}
    with _LocalServer(Scripted(["<think>Facts? None.</think>{}", "None.</think>{}"])) as server:
        for _ in range(2):
            choice = post(server.url + "/chat/completions", question)[1]["choices"][0]
            assert (choice["message"]["content"], choice["finish_reason"]) == ("{}", "stop")
    with _LocalServer(load_warm_start()) as server:
        assert post(server.url + "/chat/completions", question)[1]["choices"][0]["finish_reason"] == "length"

def test_missing_package_and_a_key_that_would_send_data_away_are_refused(monkeypatch, tmp_path):
    import comam_nb.systems.mem0 as m
    monkeypatch.setattr(m, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'comam_nb\[mem0\]'"): Mem0System(agents(), folder=tmp_path)
    monkeypatch.setattr(m, "find_spec", lambda name: object())
    monkeypatch.setenv("OPENROUTER_API_KEY", "x")
    with pytest.raises(DataError, match="OpenRouter"): Mem0System(agents(), folder=tmp_path)

def test_a_system_without_mem0_leaves_no_server_behind(monkeypatch):
    import threading, comam_nb.systems.mem0 as m
    monkeypatch.setattr(m, "find_spec", lambda name: None)
    before = threading.active_count()
    with pytest.raises(DataError): Mem0System(agents())
    assert threading.active_count() <= before + 1

@installed
def test_mem0_adds_and_updates_with_our_models():
    said = ['{"facts": ["Has a cat named Miso", "Favourite drink is coffee"]}',
            '{"memory": [{"id": "0", "text": "Has a cat named Miso", "event": "ADD"}, {"id": "1", "text": "Favourite '
            'drink is coffee", "event": "ADD"}]}',
            '{"facts": ["Favourite drink is tea"]}',
            '{"memory": [{"id": "0", "text": "Favourite drink is tea", "event": "UPDATE", "old_memory": "Favourite '
            'drink is coffee"}]}']
    system = Mem0System(agents(said))
    try:
        for s in example_episode().history: system.observe(s)
        assert [(n.text, n.cites) for n in system.memory()] == [("Has a cat named Miso", (1, 2, 3, 4)),
            ("Favourite drink is tea", (5, 6, 7, 8))]
        reply = system.answer("What is my favourite drink?")
        assert reply.text == "tea" and reply.evidence[0].text == "Favourite drink is tea"
        assert system.usage.calls == 5 and not system.failed
    finally: system.close()

@installed
def test_mem0_without_inference_keeps_every_message_and_bad_json_stores_nothing():
    for infer, kept in ((False, 8), (True, 0)):
        system = Mem0System(agents(["I cannot write JSON."]), infer=infer)
        try:
            for s in example_episode().history: system.observe(s)
            assert len(system.memory()) == kept
        finally: system.close()
