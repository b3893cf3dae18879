"""Retrieval at a million entries: `ConstraintBank.retrieve` against scikit-learn's TF-IDF over the whole bank and bm25s
over the same bucket; `MemoryStore.search` against brute force. Synthetic texts: 28 words an entry, Zipf over 20,000
words; random unit vectors.

    pip install -r benchmarks/requirements.txt
    python benchmarks/retrieval.py               # everything, about 4 minutes, 4 GB of temporary files
    python benchmarks/retrieval.py --entries 20000 --subcategories 10 --items 20000 --users 20    # a quick look
    python benchmarks/retrieval.py --entries 60000 --subcategories 30 --libraries    # a minute: the bank's own task,
                                                 # a first question and one after an edit, by libraries

The sizes hold for: entries in the bank, subcategories (one bucket each), items and users of the memory. Each step is
a process of its own, so that its peak memory is its own. Temporary files are deleted at the end."""
import argparse, json, math, os, platform, random, resource, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np

CATEGORIES, VOCABULARY, DIM = 20, 20_000, 384


class Synthetic:
    "Entries and queries of random words: the i-th word of the vocabulary is drawn in proportion to 1/i."
    def __init__(self, subcategories, seed):
        syllables, pick, words = [c + v for c in "bcdfghklmnprstvz" for v in "aeiou"], random.Random(0), {}
        while len(words) < VOCABULARY: words["".join(pick.choices(syllables, k=pick.randint(1, 4)))] = None
        weights = 1 / np.arange(1, VOCABULARY + 1)
        self.words, self.cumulated = np.array(list(words), object), np.cumsum(weights / weights.sum())
        self.subcategories, self.rng = subcategories, np.random.default_rng(seed)
    def texts(self, n, k=28):
        drawn = np.searchsorted(self.cumulated, self.rng.random((n, k)))
        return self.words[np.minimum(drawn, VOCABULARY - 1)]
    def query(self): return " ".join(self.texts(1)[0])
    def entries(self, n, start=0):
        from comam_nb.checks.constraints import Constraint
        texts, topics = self.texts(n), self.rng.integers(self.subcategories, size=n)
        def entry(i, t, s):
            pair = {"task": f"{i//3:016x}", "right": f"r{i}", "wrong": f"w{i}", "right_model": "ada",
                    "wrong_model": "bo"}
            parts = " ".join(t[:10]), " ".join(t[10:19]), " ".join(t[19:])
            return Constraint(*parts, *kind(s), {"pairs": [pair]}, ("ada", "bo"))
        return [entry(start + i, t, s) for i, (t, s) in enumerate(zip(texts, topics))]


def kind(s): return f"category {s % CATEGORIES}", f"topic {s}"
def megabytes(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def timed(f, *args, **kw):
    "A call's result, and its milliseconds: on the clock, and of processor time, without waiting for jobs and the disk."
    wall, cpu = time.perf_counter(), time.thread_time()
    out = f(*args, **kw)
    return out, (1000 * (time.perf_counter() - wall), 1000 * (time.thread_time() - cpu))
def show(what, ms):
    p50, p99 = np.percentile(ms, [50, 99], axis=0)
    print(f"{what:52} p50 {p50[0]:7.3f} ms  p99 {p99[0]:7.3f} ms   "
          f"processor time: p50 {p50[1]:6.3f}  p99 {p99[1]:6.3f}   {len(ms)} calls", flush=True)
    return [*p50, *p99]


def build_bank(a, found):
    "Add everything in bulk."
    from comam_nb.memcollab.bank import ConstraintBank
    from comam_nb.checks.constraints import validate
    made, batch = Synthetic(a.subcategories, 1), -(-a.entries // 4)
    spent = np.zeros(2) # seconds: on the clock, of processor time
    with ConstraintBank(a.folder/"bank.db") as bank:
        for i in range(0, a.entries, batch):
            entries = made.entries(min(batch, a.entries - i), i)
            spent += np.array(timed(bank.add, entries, check=False)[1]) / 1000
        sample = entries[:10_000]
        each = timed(lambda: [validate(c) for c in sample])[1][1] / 1000 / len(sample)
    size = (a.folder/"bank.db").stat().st_size >> 20
    print(f"bulk add of {a.entries:,} entries, 4 calls: {spent[0]:.0f} s, processor time {spent[1]:.0f} s; "
          f"validation, which check=False skips: {1e6*each:.0f} us an entry, {each*a.entries:.0f} s for all "
          f"(from {len(sample):,}); file {size} MB; peak memory {megabytes()} MB", flush=True)
    found |= {"bulk": spent.tolist(), "checking": each*a.entries}


def simple(bank, query, how, s):
    "The definition, from the rows: postings grown entry by entry, every score computed by the loop."
    from comam_nb.store.lexical import Postings
    entries, index = bank.entries(*kind(s)), Postings()
    for c in entries: index.add(c.text)
    scores = np.round(how(index, query), 12).tolist()
    order, out = sorted(range(len(entries)), key=lambda d: (-scores[d], d)), []
    for sample in list(dict.fromkeys(entries[d].sample for d in order))[:3]:
        out += [(entries[d].id, scores[d]) for d in order if entries[d].sample == sample][:3]
    return out


def query_bank(a, found): # noqa: C901 (long: one bank and its caches are kept through all measurements)
    "Retrieval, single additions, and the peers."
    from comam_nb.memcollab.bank import ConstraintBank
    from comam_nb.store.lexical import _bm25_scores, tfidf_scores
    made, rng = Synthetic(a.subcategories, 2), np.random.default_rng(3)
    bank, opened = timed(ConstraintBank, a.folder/"bank.db")
    print(f"open: {opened[0]:.1f} ms", flush=True)
    stream, cold, seen = [], [], set()
    for s in rng.integers(a.subcategories, size=a.queries).tolist():
        stream.append(timed(bank.retrieve, made.query(), *kind(s))[1])
        if s not in seen: cold.append(stream[-1]); seen.add(s)
    found["mixed"] = show("retrieve, first stream after opening, all buckets", stream)
    show("  of these: first touch of a bucket", cold)
    again = rng.integers(a.subcategories, size=a.queries).tolist()
    found["warm"] = show("retrieve, second stream, all buckets touched",
                         [timed(bank.retrieve, made.query(), *kind(s))[1] for s in again])
    print(f"peak memory, open and both streams: {megabytes()} MB", flush=True)

    for s in rng.integers(a.subcategories, size=10).tolist(): # fast and simple path: the same ids and scores
        query = made.query()
        for name, how in (("tfidf", tfidf_scores), ("bm25", _bm25_scores)):
            hits = bank.retrieve(query, *kind(s), how=name)
            assert [(h.constraint.id, h.score) for h in hits] == simple(bank, query, how, s)
    print("equal to the simple path, ids and scores: 10 buckets, tfidf and bm25", flush=True)

    one, then = [], []
    for c in made.entries(500, 10**9):
        one.append(timed(bank.add, c)[1])
        hits, ms = timed(bank.retrieve, c.text, c.category, c.subcategory)
        then.append(ms)
        assert hits[0].constraint.id == c.id
    found["one"] = show("add one entry (validated, on the disk when it returns)", one)
    show("  the next retrieve in its bucket, which finds it", then)

    import bm25s # only now: what a process has imported costs time in every garbage collection
    from sklearn.feature_extraction.text import TfidfVectorizer
    cut = dict(stopwords=None, show_progress=False)
    print(f"bm25s {bm25s.__version__} has the bucket in memory and gives three texts; the bank gives entries from the "
          f"file, "
          "with their provenance: up to nine (p = 3, K = 3, the paper's), or three")
    several = rng.integers(a.subcategories, size=10).tolist()
    peers, texts = {s: bm25s.BM25() for s in several}, {s: [c.text for c in bank.entries(*kind(s))] for s in several}
    with bank.file.transaction() as db: buckets = {s: bank.file.bucket(db, kind(s)) for s in several}
    for s, peer in peers.items(): peer.index(bm25s.tokenize(texts[s], **cut), show_progress=False)
    for how in ("tfidf", "bm25"):
        def by_bm25s(q): return peers[s].retrieve(bm25s.tokenize([q], **cut), corpus=texts[s], k=3, show_progress=False)
        ways = {"bm25s": by_bm25s, "nine": lambda q: bank.retrieve(q, *kind(s), how=how),
                "three": lambda q: bank.retrieve(q, *kind(s), how=how, K=1),
                "rank": lambda q: np.argpartition(buckets[s].scores(q, how), -3)[-3:]}
        turns = {(mine, w): [] for mine in ("nine", "three") for w in ("bm25s", mine)}
        rows = {w: [] for w in ways}
        for s in several:
            for w in ways: ways[w](made.query())
            for mine in ("nine", "three"):
                for _ in range(200): # strictly in turn: each finds the processor's caches full of the other
                    for w in ("bm25s", mine): turns[mine, w].append(timed(ways[w], made.query())[1])
            for w in ways: rows[w] += [timed(ways[w], q)[1] for q in [made.query() for _ in range(200)]]
        for (mine, way), ms in turns.items():
            found[f"turns {mine} {way} {how}"] = show(f"{how}, bm25s and {mine} in turn: {way}", ms)
        for way, ms in rows.items():
            found[f"rows {way} {how}"] = show(f"{how}, 200 queries in a row: {way}", ms)

    vectorizer, sql = TfidfVectorizer(), "SELECT situation, enforce, avoid FROM entries WHERE removed IS NULL"
    with bank.file.session() as db: matrix, ms = timed(vectorizer.fit_transform, (" ".join(r) for r in db.execute(sql)))
    print(f"scikit-learn's TfidfVectorizer over the whole bank: fitted in {ms[0]/1000:.0f} s, {matrix.nnz:,} numbers",
          flush=True)
    ours, theirs, turned = [], [], matrix.T.tocsr()
    def search(query):
        scores = (vectorizer.transform([query]) @ turned).toarray()[0]
        best = np.argpartition(scores, -3)[-3:]
        return best[np.argsort(-scores[best])]
    for s in rng.integers(a.subcategories, size=100).tolist():
        query = made.query()
        ours.append(timed(bank.retrieve, query, *kind(s))[1]); theirs.append(timed(search, query)[1])
    found["ours"] = show("retrieve, tfidf", ours)
    found["sklearn"] = show("scikit-learn over the whole bank, inverted matrix", theirs)
    bank.close()


def libraries(a, found):
    """The bank's own task: a first question in a category, and the next one after an entry came. A library has no index
    that follows edits by word statistics of the category; after an edit it indexes the category anew, as at first."""
    import sqlite3
    import bm25s
    from sklearn.feature_extraction.text import TfidfVectorizer
    from comam_nb.memcollab.bank import ConstraintBank
    from comam_nb.store.lexical import Postings, tfidf_scores
    made, db, cut = Synthetic(a.subcategories, 2), sqlite3.connect(a.folder/"bank.db"), dict(stopwords=None,
        show_progress=False)
    sql = """SELECT situation || ' ' || enforce || ' ' || avoid FROM entries
             WHERE category=? AND subcategory=? AND removed IS NULL ORDER BY seq"""
    def texts(s): return [t for t, in db.execute(sql, kind(s))]
    def with_bm25s(s):
        index = bm25s.BM25()
        index.index(bm25s.tokenize(texts(s), **cut), show_progress=False)
        return lambda q: index.get_scores(bm25s.tokenize([q], return_ids=False, **cut)[0])
    def with_sklearn(s):
        vectorizer = TfidfVectorizer()
        turned = vectorizer.fit_transform(texts(s)).T.tocsr()
        return lambda q: (vectorizer.transform([q]) @ turned).toarray()[0]
    def with_fts5(s): # a table of the category's own: FTS5's statistics are those of its whole table
        table = sqlite3.connect(":memory:")
        table.execute("CREATE VIRTUAL TABLE t USING fts5(text, content='')")
        table.executemany("INSERT INTO t(rowid, text) VALUES(?,?)", enumerate(texts(s)))
        ask = "SELECT rowid, bm25(t) FROM t WHERE t MATCH ? ORDER BY rank LIMIT 9"
        return lambda q: table.execute(ask, (" OR ".join(sorted(set(q.split()))),)).fetchall()
    def with_postings(s):
        index = Postings()
        for t in texts(s): index.add(t)
        return lambda q: tfidf_scores(index, q)
    ways = {"bm25s (BM25)": with_bm25s, "scikit-learn (TF-IDF)": with_sklearn, "SQLite FTS5 (BM25)": with_fts5,
            "Postings, the plain loop (TF-IDF)": with_postings}
    some = list(range(min(21, a.subcategories)))
    first, again = {}, {}
    for name, way in ways.items():
        way(some[0])("warm up")
        rows, held = [], {}
        def open_and_ask(s, q):
            held[s] = way(s)
            return held[s](q)
        for s in some[1:]: rows.append(timed(open_and_ask, s, made.query())[1])
        first[name] = show(f"{name}: index a category, one question", rows)
        rows = [timed(held[s], made.query())[1] for s in some[1:] for _ in range(20)]
        again[name] = show(f"{name}: scores alone, index in memory", rows)
    for how in ("tfidf", "bm25"):
        with ConstraintBank(a.folder/"bank.db") as bank:
            def ask(s, q): return bank.retrieve(q, *kind(s), how=how)
            ask(some[0], "warm up")
            mine = show(f"ConstraintBank, {how}: first question", [timed(ask, s, made.query())[1] for s in some[1:]])
            rows = [timed(ask, s, made.query())[1] for s in some[1:] for _ in range(20)]
            show(f"ConstraintBank, {how}: question in memory, with its entries", rows)
            rows = []
            for c in made.entries(100, 10**9):
                bank.add(c, check=False)
                rows.append(timed(bank.retrieve, c.text, c.category, c.subcategory, how=how)[1])
            edit = show(f"ConstraintBank, {how}: question after an edit", rows)
        for name in ways:
            print(f"  {name}: {first[name][1]/mine[1]:.1f}x our time at the first question, "
                  f"{first[name][1]/edit[1]:.1f}x after an edit, in processor time", flush=True)


class Vectors:
    "An embedder of random unit vectors, for the size alone."
    name, dim = f"random-{DIM}", DIM
    def __init__(self, seed): self.rng = np.random.default_rng(seed)
    def __call__(self, texts):
        x = self.rng.standard_normal((len(texts), DIM), dtype=np.float32)
        self.last = x / np.linalg.norm(x, axis=1, keepdims=True)
        return self.last


def build_memory(a, found):
    "Items of all users, in random order."
    from comam_nb.store.items import MemoryItem, MemoryStore
    rng, spent, batch = np.random.default_rng(4), 0, min(20_000, a.items)
    with MemoryStore(a.folder/"memory.db", Vectors(5)) as store:
        for i in range(0, a.items, batch):
            users = rng.integers(a.users, size=min(batch, a.items - i)).tolist()
            items = [MemoryItem(user=f"user {u}", text=f"The user said {i + j}",
                                granularity=("coarse", "fine")[j % 4 > 0],
                                cites=(j + 1,)) for j, u in enumerate(users)]
            spent += timed(store.add, items)[1][0] / 1000
    print(f"memory: bulk add of {a.items:,} items of {a.users:,} users: {spent:.0f} s; "
          f"file {(a.folder/'memory.db').stat().st_size >> 20} MB; peak memory {megabytes()} MB", flush=True)


def query_memory(a, found):
    "Search within a user."
    from comam_nb.store.items import MemoryStore
    rng = np.random.default_rng(6)
    store, opened = timed(MemoryStore, a.folder/"memory.db", Vectors(7))
    stream, cold, again, seen = [], [], [], set()
    for u in rng.integers(a.users, size=a.queries).tolist():
        ms = timed(store.search, "anything", f"user {u}")[1]
        stream.append(ms)
        if u not in seen: cold.append(ms); seen.add(u)
        again.append(timed(store.search, "anything", f"user {u}")[1])
    print(f"open: {opened[0]:.1f} ms")
    found["search_mixed"] = show("search, random users after opening", stream)
    show("  of these: first search of a user", cold)
    found["search"] = show("search again in the same user's memory", again)
    for u in rng.integers(a.users, size=20).tolist(): # brute force over what the file holds
        hits = store.search("anything", f"user {u}", k=10)
        sql = "SELECT id, vector FROM items WHERE user=? ORDER BY seq"
        with store.file.session() as db: rows = db.execute(sql, (f"user {u}",)).fetchall()
        query = store.embedder.last[0].astype(float) # products of float32 numbers are exact in float64
        scores = [math.fsum((np.frombuffer(v, "<f4") * query).tolist()) for _, v in rows]
        best = sorted(range(len(rows)), key=lambda i: (-scores[i], i))[:10]
        assert [(h.item.id, h.score) for h in hits] == [(rows[i][0], scores[i]) for i in best]
    print(f"equal to brute force, ids and scores: 20 users, k = 10; peak memory {megabytes()} MB", flush=True)
    store.close()


STAGES = {f.__name__: f for f in (build_bank, query_bank, libraries, build_memory, query_memory)}
SIZES = {"entries": 1_000_000, "subcategories": 500, "items": 1_000_000, "users": 1000, "queries": 5000}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, n in SIZES.items(): p.add_argument(f"--{name}", type=int, default=n)
    p.add_argument("--libraries", action="store_true", help="only what libraries take for the bank's own task")
    p.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    p.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.stage:
        found = json.loads((a.folder/"found.json").read_text())
        STAGES[a.stage](a, found)
        (a.folder/"found.json").write_text(json.dumps(found))
        return
    import sklearn, sqlite3
    from machine import about
    print(about(), flush=True)
    print(f"Python {platform.python_version()}, numpy {np.__version__}, SQLite {sqlite3.sqlite_version}, "
          f"scikit-learn {sklearn.__version__}, {os.cpu_count()} cores, "
          f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}")
    print(f"{a.entries:,} entries in {a.subcategories:,} buckets, {a.queries:,} queries a stream; "
          f"{a.items:,} items of {a.users:,} users, {DIM} numbers each", flush=True)
    with tempfile.TemporaryDirectory(prefix="retrieval-") as folder:
        (Path(folder)/"found.json").write_text("{}")
        for stage in ("build_bank", "libraries") if a.libraries else [s for s in STAGES if s != "libraries"]:
            sizes = [x for n in SIZES for x in (f"--{n}", str(getattr(a, n)))]
            subprocess.run([sys.executable, __file__, "--stage", stage, "--folder", folder, *sizes], check=True)
            if stage == "query_bank": (Path(folder)/"bank.db").unlink()
        f = json.loads((Path(folder)/"found.json").read_text())
    if not a.libraries: tell(f)


def tell(f):
    "The figures beside their targets."
    print(f"\nretrieve, warm: p50 {f['warm'][0]:.2f} ms, p99 {f['warm'][2]:.2f} ms, in processor time "
          f"{f['warm'][1]:.2f} and {f['warm'][3]:.2f} (targets 1 and 5)")
    print(f"retrieve, after opening: p50 {f['mixed'][0]:.2f} ms, p99 {f['mixed'][2]:.2f} ms, in processor time "
          f"{f['mixed'][1]:.2f} and {f['mixed'][3]:.2f} (targets 1 and 5)")
    print(f"bulk add: {f['bulk'][0]:.0f} s, in processor time {f['bulk'][1]:.0f} s; validation, if wanted, another "
          f"{f['checking']:.0f} s (target 300); one entry: p50 {f['one'][0]:.2f} ms, in processor time "
          f"{f['one'][1]:.2f} (target 2)")
    print(f"search: p50 {f['search'][0]:.2f} ms within a user, p50 {f['search_mixed'][0]:.2f} ms over random users "
          f"(target 2)")
    print(f"retrieve vs scikit-learn over the whole bank: {f['sklearn'][0]/f['ours'][0]:.0f}x")
    times = lambda row, mine: " and ".join(f"{f[f'{row} bm25s {how}'][0] / f[f'{row} {mine} {how}'][0]:.2f}x"
                                           for how in ("tfidf", "bm25"))
    print(f"retrieve vs bm25s over the same bucket, tfidf and bm25: up to nine entries {times('rows', 'nine')}, three "
          f"{times('rows', 'three')}, ranking alone {times('rows', 'rank')}; "
          f"in turn with it, nine {times('turns nine', 'nine')}, three {times('turns three', 'three')}")


if __name__ == "__main__": main()
