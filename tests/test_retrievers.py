"""A memory and a bank as retrievers of LangChain and LlamaIndex: the classes that nbs/walkthroughs/11_retrievers.ipynb
shows, run as a reader would copy them."""
import asyncio, json, runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow # the frameworks take seconds to import
HOW = "pip install -c constraints.txt -e '.[retrievers]'"
pytest.importorskip("langchain_core", reason=HOW)
pytest.importorskip("llama_index.core", reason=HOW)

@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    "The names of the notebook, after all its cells and asserts have run."
    path = Path(__file__).parents[1] / "nbs/walkthroughs/11_retrievers.ipynb"
    cells = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    script = tmp_path_factory.mktemp("notebook") / "retrievers.py"
    script.write_text("\n\n".join(c for c in cells if "%pip" not in c))
    return runpy.run_path(str(script))

def test_a_memory_in_a_chain_of_langchain(shown):
    from langchain_core.runnables import RunnableLambda
    memory = shown["MemoryRetriever"](store=shown["store"], user="ana", k=1)
    tell = lambda docs: [(d.page_content, d.metadata["user"], d.metadata["date"]) for d in docs]
    chain = memory | RunnableLambda(tell)
    told = [("Favourite drink is tea.", "ana", "2026-01-12T09:00:00+00:00")]
    assert chain.invoke("drink?") == told == asyncio.run(chain.ainvoke("drink?")) # another thread asks the store
    assert shown["MemoryRetriever"](store=shown["store"], user="eve").invoke("drink?") == []
    with pytest.raises(ValueError, match="user"): shown["MemoryRetriever"](store=shown["store"])

def test_both_frameworks_find_what_the_store_and_the_bank_find(shown):
    store, bank = shown["store"], shown["bank"]
    hits, lessons = store.search("cat", "ana"), bank.retrieve("percent", status=("active", "retired"))
    assert len(hits) == 2 and len(lessons) == 2
    docs = shown["MemoryRetriever"](store=store, user="ana").invoke("cat")
    nodes = shown["MemoryNodes"](store, "ana").retrieve("cat")
    assert [(h.item.text, h.score) for h in hits] == [(d.page_content, d.metadata["score"]) for d in docs]
    assert [(h.item.text, h.score) for h in hits] == [(n.text, n.score) for n in nodes]
    ask = dict(status=("active", "retired"))
    docs = shown["BankRetriever"](bank=bank, settings=ask).invoke("percent")
    nodes = shown["BankNodes"](bank, **ask).retrieve("percent")
    assert [str(h.constraint) for h in lessons] == [d.page_content for d in docs] == [n.text for n in nodes]
    assert [d.metadata["status"] for d in docs] == ["active", "retired"] == [n.metadata["status"] for n in nodes]

def test_our_errors_come_through(shown):
    from comam_nb.base.errors import MemCollabError
    lang, llama = shown["BankRetriever"](bank=shown["bank"], settings=dict(p=0)), shown["BankNodes"](shown["bank"], p=0)
    for ask in (lang.invoke, llama.retrieve):
        with pytest.raises(MemCollabError, match="p is 0"): ask("x")
