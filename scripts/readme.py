"""README.md is nbs/index.ipynb as Markdown, without hidden cells and directives, its links counted from the root.
Of a cell with `#| echo: false` it has only what the cell shows.

    python scripts/readme.py            # write README.md
    python scripts/readme.py --check    # exit code 1 if README.md is not what this would write
"""
import argparse, difflib, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

def shown(cell):
    "The cell as a reader of README sees it, or None for a hidden one."
    directives = [l[2:].strip() for l in cell.source.splitlines() if l.startswith("#|")]
    if any(d in ("hide", "eval: false") for d in directives): return None
    if "echo: false" in directives: # what it shows, without the code
        cell.cell_type, cell.source = "markdown", "\n\n".join(o.data["text/markdown"] for o in cell.outputs)
        return cell
    cell.source = "\n".join(l for l in cell.source.splitlines() if not l.startswith("#|")).strip("\n")
    return cell

def link_from_root(link: str):
    "nbs/index.ipynb's relative links, as README.md needs them."
    if re.match(r"[a-z]+:|#|/", link): return link
    return link[3:] if link.startswith("../") else "nbs/" + link

def render(notebook: Path):
    "README.md's text."
    import nbformat
    from nbconvert import MarkdownExporter
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = [c for c in map(shown, nb.cells) if c is not None]
    nb.metadata["language_info"] = {"name": "python"} # nbdev_clean drops it, and code blocks need it for their colours
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources.get("outputs"): sys.exit(f"{notebook}: README.md can show text only, no images made by a cell")
    text = re.sub(r"\]\(([^()\s]+)\)", lambda m: f"]({link_from_root(m[1])})", text)
    text = "\n".join(l.rstrip() for l in text.splitlines())
    note = "<!-- Made from nbs/index.ipynb by `python scripts/readme.py`. Edit the notebook, not this file. -->"
    return re.sub(r"\n{3,}", "\n\n", text).strip() + f"\n\n{note}\n"

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if README.md is out of step")
    check, path, text = parser.parse_args(argv).check, ROOT / "README.md", render(ROOT / "nbs" / "index.ipynb")
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if not check:
        path.write_text(text, encoding="utf-8")
        return 0
    if old == text: return 0
    print("README.md is not what nbs/index.ipynb says, run `python scripts/readme.py`:", file=sys.stderr)
    print("\n".join(list(difflib.unified_diff(old.splitlines(), text.splitlines(), "README.md", "nbs/index.ipynb", "",
                                              "", 0))[:20]), file=sys.stderr)
    return 1

if __name__ == "__main__": sys.exit(main())
