"""The repository's address, which stands in settings.ini (user, repo, branch), in all notebooks.

This writes it into Colab badges, install cells and the clone line.

    python scripts/address.py            # rewrite the notebooks
    python scripts/address.py --check    # exit code 1 and a list of notebooks that are out of step
"""
import argparse, json, re, sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLAB = "https://colab.research.google.com/github/"

def read_address(root: Path = ROOT):
    "(user, repo, branch) from settings.ini."
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    return tuple(config["DEFAULT"][k] for k in ("user", "repo", "branch"))

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
    text = re.sub(r"(pip install -q git\+)https://github\.com/[\w.-]+/[\w.-]+", lambda m: m[1] + home, text)
    text = re.sub(r"(git clone (?:-q )?)https://github\.com/[\w.-]+/[\w.-]+", lambda m: m[1] + home, text)
    return re.sub(r"(git clone \S+ && cd |%cd )[\w-][\w.-]*", lambda m: m[1] + repo, text)

def main(argv=None, root: Path = ROOT):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a notebook is out of step")
    check, address, stale, broken = parser.parse_args(argv).check, read_address(root), [], []
    for p in notebooks(root):
        name, old = p.relative_to(root).as_posix(), p.read_bytes().decode("utf-8")
        try: new = readdress(old, name, *address)
        except ValueError as e: broken.append(f"{name}: {e}"); continue
        if new == old: continue
        stale.append(name)
        if not check: p.write_bytes(new.encode("utf-8"))
    for line in broken: print(line, file=sys.stderr)
    if stale and check:
        print("not at the address that settings.ini names, run `python scripts/address.py`:\n  " + "\n  ".join(stale),
              file=sys.stderr)
    elif stale: print("rewritten: " + " ".join(stale) + "\nnow run: nbdev_export && python scripts/readme.py")
    return int(bool(broken or (stale and check)))

if __name__ == "__main__": sys.exit(main())
