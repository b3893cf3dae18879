"What CONTRIBUTING.md promises of the repository's shape: who imports whom, what is forbidden, how notebooks look."
import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "comam_nb"

# The floors of the house, lowest first: modules, or folders of modules. No floor imports a higher one.
FLOORS = [
    "base", "exercises", "data", "lm", "checks", "readers", "store",
    "policy", "grpo", "agents", "mdp", "rewards", "credit", "rl", "training", "microworld", "memory",
    "memcollab", "worlds", "systems", "runs", "studies", "cli",
]
MOST_PUBLIC_NAMES = 400
MOST_CHARACTERS = 120

MODULES = sorted(p for p in PACKAGE.rglob("*.py") if not p.name.startswith("_") or p.name == "__main__.py")
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
SOURCES = [p for p in NOTEBOOKS if p.parent.name not in ("walkthroughs", "solutions")
           and p.name != "index.ipynb"]

def name(path):
    return path.relative_to(ROOT).as_posix()

def of_each(paths):
    "One test over many files that names all that fail; one test a file takes pytest longer than the files do."
    def over_all(check):
        def test():
            failed = []
            for path in paths:
                try: check(path)
                except AssertionError as e: failed.append(f"{name(path)}: {e}")
            assert not failed, "\n" + "\n".join(failed)
        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test
    return over_all

each_module, each_source, each_notebook = map(of_each, (MODULES, SOURCES, NOTEBOOKS))

@cache
def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]

def source(cell):
    return "".join(cell["source"])

@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))

def module_of(path):
    "A file of the package -> its dotted name below comam_nb."
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


# ---- floors

def exported_module(notebook):
    found = [m[1] for c in cells(notebook) if (m := re.search(r"^#\| *default_exp +([\w.]+)", source(c), re.M))]
    assert len(found) == 1, f"{name(notebook)}: a source notebook exports one module, this one {found}"
    return found[0]

def place(module, notebook):
    "Where a module stands: floor, its notebook's number and name; a source stands behind the chapter of its number."
    floor = module if module in FLOORS else module.split(".")[0]
    assert floor in FLOORS, f"{module} stands on no floor: add it to FLOORS"
    return FLOORS.index(floor), int(notebook.name[:2]), "source" in notebook.parts, notebook.name

PLACES = {exported_module(p): place(exported_module(p), p) for p in SOURCES}

def imports(tree, path):
    "(module, name) of everything that a file imports, at the top or inside a function; name is None for `import x`."
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((a.name, None) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            yield from ((base, a.name) for a in node.names)

def own_imports(tree, path):
    "The same for modules of this package, without `comam_nb.`: (module, name or None where it is imported whole)."
    for base, imported in imports(tree, path):
        if base.split(".")[0] != "comam_nb":
            continue
        whole = f"{base}.{imported}".removeprefix("comam_nb.")
        if whole in PLACES:
            yield whole, None
        elif base != "comam_nb":
            yield base.removeprefix("comam_nb."), imported

def test_every_module_has_a_notebook_and_a_place_of_its_own():
    assert {module_of(p) for p in MODULES} == set(PLACES)
    assert len(set(PLACES.values())) == len(PLACES)

@each_module
def test_no_floor_imports_a_higher_one(path):
    own = module_of(path)
    for other, _ in own_imports(tree_of(path), path):
        if other in PLACES:
            assert PLACES[other] < PLACES[own], f"{own} imports {other}, which stands higher"

@each_source
def test_no_notebook_demonstrates_with_a_higher_module(path):
    own = PLACES[exported_module(path)]
    for c in cells(path):
        if c["cell_type"] != "code":
            continue
        for other, name in re.findall(r"^\s*(?:from|import) comam_nb\.([\w.]+)(?: import (\w+))?", source(c), re.M):
            other = f"{other}.{name}" if f"{other}.{name}" in PLACES else other
            assert other in PLACES, f"{path.name} imports {other}, which no notebook exports"
            assert PLACES[other] <= own, f"{path.name} imports {other}, which stands higher"

@each_module
def test_no_module_imports_a_command_line(path):
    entries = {"cli.__main__", "cli.memcollab"}
    assert [m for m, _ in own_imports(tree_of(path), path) if m in entries] == []

@each_module
def test_no_private_name_crosses_modules(path):
    tree = tree_of(path)
    crossed = [f"{m}.{n}" for m, n in own_imports(tree, path) if n and n.startswith("_") and n != "__version__"]
    aliases = {a.asname or a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
               for a in node.names if (node.level or (node.module or "").startswith("comam_nb"))}
    modules = {a for a in aliases if any(m.split(".")[-1] == a for m in PLACES)}
    crossed += [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr.startswith("_")
                and not n.attr.startswith("__") and isinstance(n.value, ast.Name) and n.value.id in modules]
    assert crossed == []

def test_the_checks_of_imports_see_what_they_should():
    tree = ast.parse("def f():\n    from ..cli.__main__ import main\n    from ..data import _x\n"
                     "    from .. import data\n")
    found = list(own_imports(tree, PACKAGE / "base" / "x.py"))
    assert found == [("cli.__main__", "main"), ("data", "_x"), ("data", None)]
    assert PLACES["cli.__main__"] > PLACES["data"] > PLACES["base.errors"]


# ---- names

def public_names(path):
    for node in tree_of(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []

def test_there_are_not_too_many_public_names():
    counts = {module_of(p): len(public_names(p)) for p in MODULES}
    assert sum(counts.values()) <= MOST_PUBLIC_NAMES, counts

def test_one_name_means_one_thing():
    homes = defaultdict(list)
    for p in MODULES:
        for n in public_names(p):
            homes[n].append(module_of(p))
    entry_points = {"main", "parser"}  # of the two command lines
    commands = {n for n, where in homes.items() if all(m.startswith("cli.") for m in where)}
    twice = {n: where for n, where in homes.items() if len(where) > 1}
    assert {n: w for n, w in twice.items() if n not in entry_points | commands} == {}

def public_functions(path):
    "Public functions, and public methods of public classes, of a module."
    for node in tree_of(path).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            yield node.name, node, False
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for m in node.body:
                if isinstance(m, ast.FunctionDef) and (not m.name.startswith("_") or m.name == "__init__"):
                    static = any(ast.unparse(d) == "staticmethod" for d in m.decorator_list)
                    yield f"{node.name}.{m.name}", m, not static

@each_module
def test_public_functions_are_annotated(path):
    missing = []
    for called, f, bound in public_functions(path):
        arguments = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs][1 if bound else 0:]
        missing += [f"{called}({a.arg})" for a in arguments if a.annotation is None]
        if f.returns is None and f.name != "__init__":
            missing.append(f"{called} ->")
    assert missing == []

@each_module
def test_public_names_have_docstrings(path):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [n for n in tree_of(path).body if isinstance(n, kinds) and not n.name.startswith("_")]
    assert [n.name for n in public if not ast.get_docstring(n)] == []

def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists() and '"py.typed"' in (ROOT / "setup.py").read_text(encoding="utf-8")


@each_module
def test_no_line_of_the_package_is_too_long(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    names = range(*next(((n.lineno - 1, n.end_lineno) for n in tree_of(path).body if isinstance(n, ast.Assign)
                         and ast.unparse(n.targets[0]) == "__all__"), (0, 0)))  # nbdev wraps __all__ its own way
    long = [l for i, l in enumerate(lines) if len(l) > MOST_CHARACTERS and i not in names and not l.startswith("# %%")]
    assert long == []

BESIDE = [*(p for d in ("tests", "benchmarks", "scripts", "docs") for p in (ROOT / d).glob("*.py")), ROOT / "setup.py",
          ROOT / ".ci" / "run"]
@of_each(BESIDE)
def test_no_line_beside_the_package_is_too_long(path):
    assert [l for l in path.read_text(encoding="utf-8").splitlines() if len(l) > MOST_CHARACTERS] == []


# ---- what runtime code may use

@each_module
def test_runtime_code_needs_no_development_tools(path):
    used = {m.split(".")[0] for m, _ in imports(tree_of(path), path)}
    assert not used & {"nbdev", "fastcore", "execnb", "pandas", "sklearn", "pytest", "hypothesis", "IPython"}

def forbidden(tree, path):
    "Ways to run data as code."
    unsafe = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    calls = {"eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
    for m, n in imports(tree, path):
        if m.split(".")[0] in unsafe or f"{m}.{n}" in {"os.system", "os.popen"}:
            yield m
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in calls:
            yield called
        if keywords.get("shell", "False") != "False":
            yield f"{called}(shell=…)"
        if keywords.get("allow_pickle", "False") != "False":
            yield f"{called}(allow_pickle=…)"
        if called == "torch.load" and keywords.get("weights_only") != "True":
            yield "torch.load without weights_only=True"

@each_module
def test_no_pickle_no_eval_no_shell(path):
    assert list(forbidden(tree_of(path), path)) == []

def test_forbidden_finds_what_it_looks_for():
    bad = ("import pickle\nfrom os import system\neval('1')\nsubprocess.run(x, shell=True)\n"
           "torch.load(f)\nnp.load(f, allow_pickle=True)")
    assert len(list(forbidden(ast.parse(bad), PACKAGE / "x.py"))) == 6
    good = ("model.eval()\nast.literal_eval(x)\nsubprocess.run([x])\n"
            "torch.load(f, weights_only=True)\nsafetensors.torch.load(b)")
    assert list(forbidden(ast.parse(good), PACKAGE / "x.py")) == []

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy", "scipy", "matplotlib", "faiss",
         "openai", "sklearn", "tqdm")

def last_line(code):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()[-1]

@pytest.mark.parametrize("module", ["comam_nb", "comam_nb.memcollab"])
def test_import_is_light(module):
    assert last_line(f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])") == "[]"

@pytest.mark.parametrize("module", ["comam_nb.cli.__main__", "comam_nb.cli.memcollab"])
def test_help_loads_nothing_heavy(module):
    code = (f"import sys\nfrom {module} import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
            f"print([m for m in {HEAVY} if m in sys.modules])")
    assert last_line(code) == "[]"


# ---- notebooks

@each_notebook
def test_notebook_begins_with_its_colab_badge(path):
    first = cells(path)[0]
    assert first["cell_type"] == "markdown" and source(first).startswith("[![Open in Colab](")
    assert source(first).rstrip().endswith(f"/{name(path)})")

@each_notebook
def test_notebook_has_a_title_and_a_subtitle(path):
    assert re.match(r"# [^\n]+\n\n> [^\n]+", source(cells(path)[1]))

@each_notebook
def test_notebook_is_small_and_ran_without_errors(path):
    assert path.stat().st_size < 1_500_000
    assert [source(c) for c in cells(path) for o in c.get("outputs", []) if o["output_type"] == "error"] == []

@each_notebook
def test_no_line_of_a_notebook_is_too_long(path):
    code = [l for c in cells(path) if c["cell_type"] == "code" for l in source(c).splitlines()]
    assert [l for l in code if len(l) > MOST_CHARACTERS] == []

@each_notebook
def test_every_cell_is_python_to_jupyter(path):  # also those that nbdev_test leaves out, which a reader runs
    from IPython.core.inputtransformer2 import TransformerManager
    jupyter = TransformerManager()
    for c in cells(path):
        if c["cell_type"] == "code" and not source(c).lstrip().startswith("%%"):
            text = jupyter.transform_cell(source(c))
            compile(text, f"{path}, cell {c['id']}", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


# ---- scripts

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
    (tmp_path / "constraints.txt").write_text("")
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nuser = a\nrepo = b\nbranch = main\n"
                                           "requirements = torch\nnotebooks_requirements = fastcore\n")
    title = {"cell_type": "markdown", "metadata": {}, "source": ["# Title"]}
    (tmp_path / "nbs" / "x.ipynb").write_text(json.dumps({"cells": [title]}))
    assert script("address").main(["--check"], root=tmp_path) == 1
    assert "nbs/x.ipynb: its first cell must begin with the Colab badge" in capsys.readouterr().err

def test_the_map_is_in_step_with_the_imports():
    assert script("map").main(["--check"]) == 0
