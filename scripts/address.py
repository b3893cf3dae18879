"""The repository's address, which stands in settings.ini (user, repo, branch), in all notebooks.

This writes it into badges of Colab and Binder, install cells, the clone line and the link to the site; and it writes
nbs/colab.txt, which install cells fetch.

    python scripts/address.py            # rewrite the notebooks
    python scripts/address.py --check    # exit code 1 and a list of notebooks that are out of step
"""
import argparse, json, re, sys
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[1]
COLAB = "https://colab.research.google.com/github/"
# Colab brings these, built for its cards or loaded already
BROUGHT = {"torch", "numpy", "scipy", "matplotlib", "scikit-learn", "ipykernel", "tqdm", "filelock"}
LIST = """\
# What the install cell of every notebook fetches on Colab: the package, and the tested versions of what Colab need not
# bring. Not torch, numpy and the like: those stay as they are. `python scripts/address.py` writes it from settings.ini
# and constraints.txt.
"""
INSTALL = """\
#| eval: false
# only on Colab: the package, with tested versions beside the torch that is there
import sys
if "google.colab" in sys.modules:
    !pip list --format=freeze | grep -E "^(torch|numpy)" > kept
    %pip install -q -c kept -r {home}/raw/{branch}/nbs/colab.txt
    !pip list | grep -E "^(comam|torch|transformers|peft|trl|numpy)"
"""

def read_address(root: Path = ROOT):
    "(user, repo, branch) from settings.ini."
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    return tuple(config["DEFAULT"][k] for k in ("user", "repo", "branch"))

def colab_list(root: Path = ROOT):
    "nbs/colab.txt: what the package and its notebooks ask for by name, in the tested versions."
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    cfg, name = config["DEFAULT"], lambda line: re.match(r"[\w.-]+", line)[0].lower()
    asked = set(map(name, (cfg["requirements"] + " " + cfg["notebooks_requirements"]).split())) - BROUGHT
    pins = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = sorted((l for l in pins if l[:1].isalnum() and name(l) in asked), key=str.lower)
    user, repo, branch = read_address(root)
    source = f"comam_nb[notebooks] @ git+https://github.com/{user}/{repo}@{branch}"
    return LIST + "\n".join([source, *tested]) + "\n"

def notebooks(root: Path = ROOT):
    "Every notebook, checkpoints and hidden folders aside."
    hidden = lambda p: any(part[0] in "._" for part in p.relative_to(root).parts)
    return sorted(p for p in (root / "nbs").rglob("*.ipynb") if not hidden(p))

def badge(path: str, user: str, repo: str, branch: str):
    "The first line of the notebook at `path`, which counts from the root."
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({image})]({COLAB}{user}/{repo}/blob/{branch}/{path})"

def readdress(text: str, path: str, user: str, repo: str, branch: str):
    "A notebook's text with the address in it; only addresses change, nothing is re-encoded. Raises `ValueError`."
    home = f"https://github.com/{user}/{repo}"
    cells = json.loads(text)["cells"]
    first = "".join(cells[0]["source"]) if cells else ""
    if not first.startswith("[![Open in Colab]"):
        raise ValueError("its first cell must begin with the Colab badge:\n    " + badge(path, user, repo, branch))
    # the whole line: a notebook may have been moved
    text = text.replace(first.splitlines()[0], badge(path, user, repo, branch), 1)
    text = re.sub(re.escape(COLAB) + r"[^\s()\"]+?/blob/[^\s()\"]+?/nbs/",
                  lambda m: f"{COLAB}{user}/{repo}/blob/{branch}/nbs/", text)
    cell = [json.dumps(l, ensure_ascii=False) for l in INSTALL.format(home=home, branch=branch).splitlines(True)]
    cell[-1] = cell[-1].replace('\\n"', '"')
    text = re.sub(r'(\n +)"#\| eval: false\\n",\s+"# only on Colab:.*?(?=\n +\])',
                  lambda m: m[1] + ("," + m[1]).join(cell), text, flags=re.S)
    text = re.sub(r"https://mybinder\.org/v2/gh/[^\s()\"?]+",
                  f"https://mybinder.org/v2/gh/{user}/{repo}/{quote(branch, safe='')}", text)
    text = re.sub(r"https://[\w-]+\.github\.io/[\w.-]+", f"https://{user}.github.io/{repo}", text)
    text = re.sub(r"(git clone (?:-q )?)https://github\.com/[\w.-]+/[\w.-]+", lambda m: m[1] + home, text)
    return re.sub(r"(git clone \S+ && cd |%cd )[\w-][\w.-]*", lambda m: m[1] + repo, text)

def main(argv=None, root: Path = ROOT):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if one is out of step")
    check, address, stale, broken = parser.parse_args(argv).check, read_address(root), [], []
    for p in notebooks(root):
        name, old = p.relative_to(root).as_posix(), p.read_bytes().decode("utf-8")
        try: new = readdress(old, name, *address)
        except ValueError as e: broken.append(f"{name}: {e}"); continue
        if new == old: continue
        stale.append(name)
        if not check: p.write_bytes(new.encode("utf-8"))
    colab, wanted = root / "nbs" / "colab.txt", colab_list(root)
    if not colab.exists() or colab.read_text(encoding="utf-8") != wanted:
        stale.append("nbs/colab.txt")
        if not check: colab.write_text(wanted, encoding="utf-8")
    for line in broken: print(line, file=sys.stderr)
    if stale and check:
        print("not at the address that settings.ini names, run `python scripts/address.py`:\n  " + "\n  ".join(stale),
              file=sys.stderr)
    elif stale: print("rewritten: " + " ".join(stale) + "\nnow run: nbdev_export && python scripts/readme.py")
    return int(bool(broken or (stale and check)))

if __name__ == "__main__": sys.exit(main())
