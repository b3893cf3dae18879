"What is installed and what is run: the lock, no code from elsewhere, constant SQL, workflows with little power."
import ast
import re
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import keys  # noqa: E402

SOURCES = [p for d in ("comam_nb", "scripts", "benchmarks", "docs", ".ci") for p in sorted((ROOT / d).rglob("*.py"))]


# ---- the lock

def plain(name): return re.sub(r"[-_.]+", "-", name).lower()

def pins(file):
    "Package -> version, of constraints.txt or requirements.lock."
    lines = re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==([^\s;]+)", (ROOT / file).read_text(), re.M)
    return {plain(name): version for name, version in lines}

CUDA = re.compile(r"nvidia-|cuda-|triton$") # what PyPI's torch brings along; a torch for CPUs has none of it

def test_lock_and_constraints_agree():
    tested, locked = pins("constraints.txt"), pins("requirements.lock")
    assert {n: (v, tested.get(n)) for n, v in locked.items() if not CUDA.match(n) and tested.get(n) != v} == {}

def test_the_lock_holds_whatever_settings_ask_for():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    kinds = "requirements", "dev_requirements", "docs_requirements", "look_requirements"
    asked = {plain(re.match(r"[\w.-]+", r)[0]) for k in kinds for r in config["DEFAULT"][k].split()}
    assert asked - pins("requirements.lock").keys() == set()

def test_every_line_of_the_lock_has_hashes_and_names_no_host():
    text = (ROOT / "requirements.lock").read_text()
    entries = re.findall(r"^[\w.-]+(?:\[[\w,-]+\])?==.*(?:\n {4}--hash=sha256:[0-9a-f]{64}(?: \\)?)+$", text, re.M)
    assert len(entries) == len(pins("requirements.lock")) > 150
    rest = [l for l in text.splitlines() if not re.match(r"#|[\w.-]+(\[[\w,-]+\])?==|    --hash=sha256:", l)]
    assert rest == [] and "://" not in text


# ---- no code from elsewhere

def calls(name):
    "(file:line, call) of every call of a method or function of this name in what we run."
    for p in SOURCES:
        if name not in (text := p.read_text(encoding="utf-8")): continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == name:
                yield f"{p.relative_to(ROOT)}:{node.lineno}", node

def test_models_are_loaded_without_their_code():
    found = [(where, c) for where, c in calls("from_pretrained") if ast.unparse(c.func).startswith("Auto")]
    wrong = [where for where, c in found
             if not any(k.arg == "trust_remote_code" and getattr(k.value, "value", 1) is False for k in c.keywords)]
    assert len(found) > 8 and wrong == []

def test_nobody_trusts_remote_code():
    pages = [*SOURCES, *ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("tests/*.py"), *ROOT.glob("configs/*")]
    trusting = re.compile(r"trust_remote_code[\"' ]*[=:] *[\"']?(True|true|1|None)")
    assert [p.name for p in pages if trusting.search(p.read_text(encoding="utf-8"))] == []


# ---- SQL

# what may be put into a statement: lists of columns, conditions and question marks that the code itself writes down,
# table names of its own, numbers that were checked. Values are bound. bandit cannot tell, so B608 is read here.
OURS = {"_ENTRY", "_COLUMNS", "_AT", "_OWN", "where", "when", "rows", "marks", "cast", "cast or '::vector'", "dim",
        "self.hnsw", "table", "t", "db.schema", "kind.version", "kind.application_id", "pragma", "shared",
        "','.join('?' * len(part))", "p", "_PATIENCE * 1000"}
STATEMENT = re.compile(r"f?['\"](SELECT|INSERT|UPDATE|DELETE|CREATE|ALTER|DROP|SET|COPY|VACUUM|PRAGMA|WITH) ")

def test_statements_are_built_of_constants():
    strange = []
    for p in SOURCES:
        if p.parts[-2] not in ("store", "base"): continue
        for node in ast.walk(ast.parse(p.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.JoinedStr) or not STATEMENT.match(ast.unparse(node)): continue
            parts = [ast.unparse(v.value) for v in node.values if isinstance(v, ast.FormattedValue)]
            strange += [f"{p.name}:{node.lineno}: {x}" for x in parts if x not in OURS]
    assert strange == [], "is it a constant? then add it to OURS; a value is bound with a question mark"


# ---- workflows, and the page for those who found a hole

@pytest.mark.parametrize("file", sorted((ROOT / ".github/workflows").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_workflow_may_read_and_no_more_unless_a_job_says_so(file):
    text = file.read_text()
    assert re.search(r"^permissions:\n  contents: read$", text, re.M) and "pull_request_target" not in text
    assert not re.search(r"run:.*\$\{\{ *(github\.event|github\.head_ref|inputs)", text) # text of strangers in a shell

def test_security_page_and_bandits_settings():
    page = (ROOT / "SECURITY.md").read_text()
    for test in re.findall(r"`(tests/\w+\.py)`", page): assert (ROOT / test).exists(), test
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["bandit"]
    assert "B602" not in config["skips"] and "B307" not in config["skips"] # a shell, eval

# ---- keys in the history

@pytest.mark.parametrize("line", [
    "key = AK" + "IAIOSFODNN7EXAMPLE", "gh" + "p_" + "a1" * 20, "hf" + "_" + "Ab3" * 12,
    "-----BEGIN RSA " + "PRIVATE KEY-----",
    "postgresql://" + "ana:hunter2@db/x", "API_KEY = '" + "0123456789abcdef'", "sk" + "-ant-" + "x9" * 20])
def test_a_key_is_found(line): assert len(list(keys.finds([line]))) == 1

@pytest.mark.parametrize("line", ["akiaqwnaoiyzrkurxvds", "http://ana:geheim77@host", "token = 'short'",
                                  "http://a.b/c:d@e", "postgresql://ana:{password}@host", "a = password"])
def test_what_is_none_is_not(line): assert list(keys.finds([line])) == []
