"Where people meet the package: notebooks opened alone, the wheel, Colab's install cell, containers, the site."
import ast
import importlib.util
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MOST_LOGS = 3_000_000 # bytes of nbs/logs, which every wheel carries

config = ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = config["DEFAULT"]

def text(file): return (ROOT / file).read_text(encoding="utf-8")
def named(requirement): return re.match(r"[\w.-]+", requirement)[0].lower()

PINS = {named(l): l for l in text("constraints.txt").splitlines() if l[:1].isalnum()}

def script(folder, file):
    "A module that is in no package."
    spec = importlib.util.spec_from_file_location(file, ROOT / folder / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def code(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


# ---- notebooks opened alone

def test_the_wheel_carries_the_logs_and_finds_them(tmp_path):
    subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path / "b", "--build-lib",
                    tmp_path / "site"], cwd=ROOT, check=True, capture_output=True)
    own = {p.relative_to(ROOT / "nbs").as_posix(): p.read_bytes() for p in (ROOT / "nbs" / "logs").rglob("*.*")
           if p.is_file() and "__pycache__" not in p.parts and p.suffix != ".lock" and p.name[0] != "."}
    there = tmp_path / "site" / "comam_nb"
    copied = {p.relative_to(there).as_posix(): p.read_bytes() for p in (there / "logs").rglob("*") if p.is_file()}
    assert copied == own and sum(map(len, own.values())) <= MOST_LOGS
    ask = (f"import sys; sys.path[:0] = [{str(there.parent)!r}]\n"
           "from comam_nb.base.files import log_path; print(log_path('speed'))")
    found = subprocess.run([sys.executable, "-P", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True,
                           env={"PATH": ""})
    assert found.stdout.strip() == str(there / "logs" / "speed")

def test_no_notebook_looks_for_files_of_the_repository():
    reached = {p.name: l for p in NOTEBOOKS for c in code(p) for l in c.splitlines() if re.search(r"""["']\.\./""", l)}
    assert reached == {}

HOMES = {"sklearn": "scikit-learn", "faiss": "faiss-cpu", "math_verify": "math-verify", "IPython": "ipykernel"}
BELOW = {"tokenizers", "huggingface_hub", "jinja2", "sympy", "httpx", "pydantic"} # come with those, or with openai
OWN = {"comam_nb", "card_record"}
OTHERS = {"mem0", "vllm", "psycopg", "pgvector", "pg_server", "langchain_core", "llama_index",
          "ipywidgets"} # cells that say so, and run without; Colab has the last

def roots(c):
    "The packages that a cell imports."
    tree = ast.parse("\n".join(l for l in c.splitlines() if not re.match(r"\s*[%!]", l)))
    for node in ast.walk(tree):
        names = ([a.name for a in node.names] if isinstance(node, ast.Import) else
                 [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
        yield from (n.split(".")[0] for n in names)

def test_what_notebooks_import_comes_with_the_package_or_its_extra():
    asked = set(map(named, (SETTINGS["requirements"] + " " + SETTINGS["notebooks_requirements"]).split()))
    known = asked | {r for r, home in HOMES.items() if home in asked} | sys.stdlib_module_names | BELOW | OWN | OTHERS
    assert {"torch", "fastcore", "sklearn", "IPython"} <= known and "nbdev" not in known
    like = re.compile(r"^\s*(?:from|import) +(\w+)|^\s*import .*?, *(\w+)", re.M) # strings look like it as well
    missing = {(p.name, r) for p in NOTEBOOKS for c in code(p) if "google.colab" not in c
               and {x for found in like.findall(c) for x in found if x} - known for r in set(roots(c)) - known}
    assert missing == set()

def test_alone_reports_what_fails_and_does_not_run_again_what_is_ok(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    alone, ran = script("scripts", "alone"), []
    def pretend(notebook, python, limit):
        ran.append(notebook.stem)
        bad = notebook.stem == "02_policy" and ran.count("02_policy") == 1
        return {"status": "failed" if bad else "ok", "seconds": 3, "left_out": 0, "why": "NameError" if bad else ""}
    monkeypatch.setattr(alone, "run_alone", pretend)
    ask = ["book/01", "book/02", "--python", sys.executable, "--out", str(tmp_path / "x" / "found.jsonl")]
    assert alone.main(ask) == 1 and "02_policy.ipynb: NameError" in capsys.readouterr().out
    assert alone.main(ask) == 0 and "2 of 2 notebooks ran alone, 6 s" in capsys.readouterr().out
    assert ran == ["01_story", "02_policy", "02_policy"]
    with pytest.raises(SystemExit) as stopped: alone.main(["no/such"])
    assert stopped.value.code == 2 and "no notebook's path holds no/such" in capsys.readouterr().err


# ---- Colab

def test_every_notebook_has_the_same_install_cell():
    cells = {p.name: [c for c in code(p) if "google.colab" in c] for p in NOTEBOOKS}
    assert {len(c) for c in cells.values()} == {1} and len({c[0] for c in cells.values()}) == 1

def test_colab_gets_tested_versions_and_keeps_its_torch():
    lines = [l for l in text("nbs/colab.txt").splitlines() if l[0] != "#"]
    assert lines[0].startswith("comam_nb[notebooks] @ git+https://")
    assert all(PINS[named(l)] == l for l in lines[1:])
    asked = set(map(named, (SETTINGS["requirements"] + " " + SETTINGS["notebooks_requirements"]).split()))
    brought = script("scripts", "address").BROUGHT
    assert {"torch", "numpy"} <= brought and {named(l) for l in lines[1:]} == asked - brought

def test_no_tested_version_asks_for_a_newer_torch_than_the_package_does():
    floor = next(Requirement(r).specifier for r in SETTINGS["requirements"].split() if named(r) == "torch")
    least, = (s.version for s in floor)
    asked = {(named(l), str(r)) for l in text("nbs/colab.txt").splitlines() if "==" in l
             for r in map(Requirement, distribution(named(l)).requires or ())
             if r.name == "torch" and (r.marker is None or r.marker.evaluate({"extra": ""}))}
    assert {n for n, _ in asked} >= {"accelerate", "peft"}
    assert {(n, r) for n, r in asked if least not in Requirement(r).specifier} == set()


# ---- containers, workflows and the site agree with the tested set

def test_containers_take_the_tested_set_and_the_tested_python():
    python = SETTINGS["min_python"]
    docker, binder = text(".devcontainer/Dockerfile"), text(".binder/postBuild")
    assert re.findall(r"^FROM python:([\d.]+)", docker, re.M) == [python]
    assert text(".binder/runtime.txt").strip() == f"python-{python}"
    assert "-c constraints.txt" in docker and "-c constraints.txt" in binder
    settings = json.loads(text(".devcontainer/devcontainer.json"))
    place = ROOT / ".devcontainer"
    assert (place / settings["build"]["dockerfile"]).exists()
    assert (place / settings["build"]["context"]).resolve() == ROOT
    assert f"useradd --create-home --uid 1000 {settings['remoteUser']}" in docker
    extras = {e for t in (docker, binder, text(".github/workflows/docs.yaml"), text(".ci/run"))
              for found in re.findall(r'-e "\.\[([\w,]+)\]"', t) for e in found.split(",")}
    assert extras and all(f"{e}_requirements" in SETTINGS for e in extras)

def test_every_requirement_has_a_tested_version():
    asked = {named(r) for k, v in SETTINGS.items() if k.endswith("requirements") for r in v.split()}
    assert asked - set(PINS) == set()

def test_the_week_looks_at_every_python_without_constraints():
    weekly = text(".github/workflows/weekly.yaml")
    assert 'python: ["3.11", "3.12", "3.13"]' in weekly and "constraints.txt\n" not in weekly.split("jobs:")[1]

def test_a_page_of_the_site_links_to_pages_and_to_github():
    build = script("docs", "build")
    page = ROOT / "nbs" / "book" / "01_story.ipynb"
    link = lambda to: build.linked(f"see [it]({to}).", page, {page, page.with_name("02_policy.ipynb")})
    assert link("02_policy.ipynb#Three-surprises") == "see [it](02_policy.ipynb#three-surprises)."
    assert link("../source/lm/").endswith("/tree/main/nbs/source/lm).")
    assert link("https://a.b/c") == "see [it](https://a.b/c)."
    with pytest.raises(SystemExit, match="a link leads nowhere: gone.ipynb"): link("gone.ipynb")
    with pytest.raises(SystemExit, match="no such heading: 02_policy.ipynb#Four"): link("02_policy.ipynb#Four")
    cell = lambda source: {"cell_type": "code", "source": source, "metadata": {}, "outputs": []}
    assert build.shown(cell("#| hide\nx = 1")) is None and build.shown(cell("#| export\nx = 1"))["source"] == "x = 1"

def test_a_module_page_has_signature_parameters_and_docstring():
    from comam_nb.base import files
    page = script("docs", "build").documented(files)
    assert "## write_whole" in page and "# where; its directory must exist" in page and "### Journal.append" in page
    assert "Write a file whole or not at all." in page and "_open_file" not in page
