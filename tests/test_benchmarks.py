"""The benchmark scripts start, the law that growth.py fits is found again in made-up seconds, and launches.py counts
right."""
import importlib.util, subprocess, sys
from pathlib import Path
import numpy as np, pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(p.name for p in FOLDER.glob("*.py"))

def test_there_is_one_for_each_target():
    assert {"joint_step.py", "growth.py", "adapters_memory.py", "extraction.py", "retrieval.py",
            "start_up.py", "launches.py"} <= set(SCRIPTS)

def test_every_benchmark_says_on_what_it_was_run():
    missing = [n for n in SCRIPTS if n != "machine.py" and "print(about()" not in (FOLDER / n).read_text()]
    assert missing == []
    done = subprocess.run([sys.executable, FOLDER / "machine.py"], capture_output=True, text=True, timeout=120)
    assert "GFLOP/s in float32" in done.stdout and "GFLOP/s in bfloat16" in done.stdout

@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name):
    done = subprocess.run([sys.executable, FOLDER / name, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f"python benchmarks/{name}" in done.stdout, done.stderr[-500:]

def test_growth_finds_its_law():
    pytest.importorskip("scipy")
    spec = importlib.util.spec_from_file_location("growth", FOLDER / "growth.py")
    growth = importlib.util.module_from_spec(spec); spec.loader.exec_module(growth)
    a, b, c, d, e = law = np.array([0.5, 1.0, 0.25, 0.125, 0.0625])
    rows = []
    for p, g in growth.SIZES:
        P = p / 1024
        rows.append({"prompt": p, "G": g, "write": 0.0, "score": a + b * P + c * P**2 + g * (d + e * P)})
    np.testing.assert_allclose(growth.fit(rows), law, rtol=1e-6)

def test_growth_counts_what_a_group_costs():
    spec = importlib.util.spec_from_file_location("growth", FOLDER / "growth.py")
    growth = importlib.util.module_from_spec(spec); spec.loader.exec_module(growth)
    class config:
        hidden_size, num_hidden_layers, num_attention_heads = 4, 3, 2
        num_key_value_heads, intermediate_size, vocab_size = 1, 5, 7
    N = 3 * (4*4 + 4*2 + 4*2 + 4*4 + 3 * 4*5) # q, k, v, o and three of the feed-forward
    assert growth.counted(config, P=0, G=1, new=1) == (2 * (2 * N + 4 * 3 * 4 * .5 + 2 * 4*7),
                                                       2 * (N + 4*7 + 2 * 3 * 2 * .5))
    more = growth.counted(config, P=10, G=2, new=5)
    assert more[0] == 2 * (2 * N * 20 + 4 * 3 * 4 * (50 + 10 * 12.5) + 2 * 4*7 * 10)
    assert more[1] == 5 * 2 * (N + 28 + 2 * 3 * 2 * (10 + 5))

def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    return module

def test_launches_counts_kernels_syncs_and_uploads():
    torch = pytest.importorskip("torch")
    launches = load("launches")
    x, where = torch.randn(4, 3, requires_grad=True), torch.tensor([1, 0, 1, 0])
    def counts(work): return tuple(launches.count(work).counts[k] for k in ("kernels", "syncs", "uploads"))
    assert counts(lambda: x.view(3, 4)[1:].detach().t()) == (0, 0, 0)                  # views
    assert counts(lambda: torch.empty(5)) == (0, 0, 0)                                 # memory
    assert counts(lambda: (x @ x.t()).exp()) == (2, 0, 0)
    assert counts(lambda: x.exp().sum().backward()) == (4, 0, 0) # two and the 1 to begin with; their product
    assert counts(lambda: torch.tensor([1, 2])) == (0, 0, 1)
    assert counts(lambda: where.sum().item()) == (1, 1, 0)
    assert counts(lambda: where.tolist()) == (0, 1, 0) and counts(lambda: where.cpu()) == (0, 1, 0)
    assert counts(lambda: bool((where > 0).all())) == (2, 1, 0)
    assert counts(lambda: x.detach()[where > 0]) == (2, 1, 0) and counts(lambda: x.detach()[where]) == (1, 0, 0)
    assert counts(lambda: x.detach().repeat_interleave(where, 0))[1] == 1

@pytest.mark.slow
def test_launches_grow_by_the_same_number_with_every_layer():
    pytest.importorskip("trl")
    launches, size = load("launches"), dict(vocab=64, hidden=32, heads=4, kv_heads=2, middle=48)
    found = [launches.counted(n, 1, 2, 8, 4, few=2, many=4, **size) for n in (1, 2, 3)]
    for f in found: assert f.pop("operators of scoring")["mm"] > 0
    for part in found[0]:
        a, b, c = (f[part]["kernels"] for f in found)
        assert 0 < a < b < c and c - b == pytest.approx(b - a, abs=0.5), part
    one = found[0]
    assert one["token, group, stop text"]["syncs"] <= one["token, group"]["syncs"]
    assert one["one agent's scoring, with gradients"]["syncs"] == 0
    assert one["judge question"]["kernels"] < one["token, plain generate, no adapter"]["kernels"]
