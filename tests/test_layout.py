"What CONTRIBUTING.md promises about the shape of the repository: who imports whom, what is forbidden, how notebooks look."
import ast, importlib.util, json, re, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "comam_nb"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if not p.name.startswith("_"))
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
NUMBERED = [p for p in NOTEBOOKS if re.match(r"\d\d_", p.name) and "walkthroughs" not in p.parts]

name = lambda p: p.relative_to(ROOT).as_posix()
each_module = pytest.mark.parametrize("path", MODULES, ids=name)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
cells = lambda p: json.loads(p.read_text(encoding="utf-8"))["cells"]
source = lambda cell: "".join(cell["source"])


def module_order():
    "module -> (folder, number) of the notebook that exports it; the root's notebooks come before those of a folder."
    order = {}
    for p in NUMBERED:
        [module] = [m[1] for c in cells(p) if (m := re.search(r"^#\| *default_exp +([\w.]+)", source(c), re.M))]
        assert module not in order, f"two notebooks export {module}"
        order[module] = (len(p.relative_to(ROOT / "nbs").parts), p.name[:2])
    return order

ORDER = module_order()


def imported(tree, path):
    "Every module that a file imports, at the top or inside a function, with its full dotted name."
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[:len(package) - node.level + 1], *filter(None, [node.module])]) if node.level else node.module
            yield base
            yield from (f"{base}.{a.name}" for a in node.names)


def test_numbers_are_unique_and_every_module_has_a_notebook():
    assert len(set(ORDER.values())) == len(ORDER)
    assert {".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in MODULES} == set(ORDER)


@each_module
def test_no_module_imports_a_higher_numbered_one(path):
    own = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for m in imported(ast.parse(path.read_text(encoding="utf-8")), path):
        other = m.removeprefix("comam_nb.")
        if m != other and other in ORDER: assert ORDER[other] < ORDER[own], f"{own} imports {other}, which has a higher number"


@pytest.mark.parametrize("path", NUMBERED, ids=name)
def test_no_notebook_demonstrates_with_a_higher_numbered_module(path):
    number = (len(path.relative_to(ROOT / "nbs").parts), path.name[:2])
    for c in cells(path):
        if c["cell_type"] != "code": continue
        for other in re.findall(r"^\s*(?:from|import) comam_nb\.([\w.]+)", source(c), re.M):
            assert other in ORDER, f"{path.name} imports {other}, which no notebook exports"
            assert ORDER[other] <= number, f"{path.name} imports {other}, which has a higher number"


@each_module
def test_runtime_code_needs_no_development_tools(path):
    used = {m.split(".")[0] for m in imported(ast.parse(path.read_text(encoding="utf-8")), path)}
    assert not used & {"nbdev", "fastcore", "execnb", "pandas", "sklearn", "pytest", "hypothesis", "IPython"}


def forbidden(tree, path):
    "Ways to run data as code."
    for m in imported(tree, path):
        if m.split(".")[0] in {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} or m in {"os.system", "os.popen"}: yield m
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call): continue
        called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in {"eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}: yield called
        if keywords.get("shell", "False") != "False": yield f"{called}(shell=…)"
        if keywords.get("allow_pickle", "False") != "False": yield f"{called}(allow_pickle=…)"
        if called == "torch.load" and keywords.get("weights_only") != "True": yield "torch.load without weights_only=True"


@each_module
def test_no_pickle_no_eval_no_shell(path):
    assert list(forbidden(ast.parse(path.read_text(encoding="utf-8")), path)) == []


def test_forbidden_finds_what_it_looks_for():
    bad = "import pickle\nfrom os import system\neval('1')\nsubprocess.run(x, shell=True)\ntorch.load(f)\nnp.load(f, allow_pickle=True)"
    assert len(list(forbidden(ast.parse(bad), PACKAGE / "x.py"))) == 6
    good = "model.eval()\nast.literal_eval(x)\nsubprocess.run([x])\ntorch.load(f, weights_only=True)\nsafetensors.torch.load(b)"
    assert list(forbidden(ast.parse(good), PACKAGE / "x.py")) == []


HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy", "matplotlib", "faiss", "openai", "sklearn", "tqdm")

@pytest.mark.parametrize("module", ["comam_nb", "comam_nb.cli.comam", "comam_nb.memcollab", "comam_nb.cli.memcollab"])
def test_import_is_light(module):
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["comam_nb.cli.comam", "comam_nb.cli.memcollab"])
def test_help_loads_nothing_heavy(module):
    code = f"import sys\nfrom {module} import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint([m for m in {HEAVY} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "[]"


@each_module
def test_public_names_have_docstrings(path):
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    public = [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
    assert [n.name for n in public if not ast.get_docstring(n)] == []


@each_notebook
def test_notebook_begins_with_its_colab_badge(path):
    first = cells(path)[0]
    assert first["cell_type"] == "markdown" and source(first).startswith("[![Open in Colab](")
    assert source(first).rstrip().endswith(f"/{name(path)})")


@each_notebook
def test_notebook_is_small_and_ran_without_errors(path):
    assert path.stat().st_size < 1_500_000
    assert [source(c) for c in cells(path) for o in c.get("outputs", []) if o["output_type"] == "error"] == []


def links(text):
    "Relative links of a Markdown text, code blocks aside."
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
    return [l.split("#")[0] for l in re.findall(r"\]\(([^()\s]+)\)", text) if not re.match(r"[a-z]+:|#|attachment:", l)]


@each_notebook
def test_every_cell_is_python_to_jupyter(path): # also those that nbdev_test leaves out, which a reader runs
    from IPython.core.inputtransformer2 import TransformerManager
    for c in cells(path):
        if c["cell_type"] == "code" and not source(c).lstrip().startswith("%%"):
            compile(TransformerManager().transform_cell(source(c)), f"{path}, cell {c['id']}", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("path", [*NOTEBOOKS, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=name)
def test_links_lead_somewhere(path):
    texts = [source(c) for c in cells(path) if c["cell_type"] == "markdown"] if path.suffix == ".ipynb" else [path.read_text(encoding="utf-8")]
    assert [l for t in texts for l in links(t) if not (path.parent / l).exists()] == []


def script(file):
    "A module of scripts/, which is no package."
    spec = importlib.util.spec_from_file_location(file, ROOT / "scripts" / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_new_address_reaches_every_notebook_and_changes_nothing_else():
    address = script("address")
    old, new = address.read_address(), ("someone-else", "their.fork", "dev/next")
    for p in NOTEBOOKS:
        text = p.read_text(encoding="utf-8")
        moved = address.readdress(text, name(p), *new)
        assert "/".join(old[:2]) not in moved and address.badge(name(p), *new) in moved
        assert address.readdress(moved, name(p), *old) == text


def test_a_notebook_without_a_badge_is_reported(tmp_path, capsys):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nuser = a\nrepo = b\nbranch = main\n")
    (tmp_path / "nbs" / "x.ipynb").write_text(json.dumps({"cells": [{"cell_type": "markdown", "metadata": {}, "source": ["# Title"]}]}))
    assert script("address").main(["--check"], root=tmp_path) == 1
    assert "nbs/x.ipynb: its first cell must begin with the Colab badge" in capsys.readouterr().err
