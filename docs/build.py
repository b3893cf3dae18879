"""The site: every notebook as it was run, a page for each module from its docstrings, and a search.

    pip install -c constraints.txt -e ".[dev,docs]"
    python docs/build.py            # _site/index.html; executes no notebook, needs no network
    python docs/build.py --book     # without walkthroughs and source notebooks: what CI has time for

Warnings are errors, and so are links that lead nowhere.
"""
import argparse, importlib, inspect, json, re, shutil, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from address import notebooks, read_address
from links import anchors

PARTS = {"The book": "book", "Solutions": "solutions", "Walkthroughs": "walkthroughs", "To look things up": "reference",
         "Source notebooks": "source", "The package": "api"}

def shown(cell):
    "A cell as a reader of the site sees it, or None."
    text = "".join(cell["source"])
    if cell["cell_type"] != "code": return cell
    directives = re.findall(r"^#\| *(.*)", text, re.M)
    if "# only on Colab" in text or any(d.startswith(("hide", "default_exp")) for d in directives): return None
    tags = ["remove-input"] if "echo: false" in directives else []
    return {**cell, "source": re.sub(r"^#\|.*\n?", "", text, flags=re.M).strip("\n"), "metadata": {"tags": tags}}

def linked(text, page, pages):
    "A page's Markdown. What is no page of the site, such as a folder or a script, is linked to on GitHub."
    def link(found):
        target, mark, part = found[1].partition("#")
        if re.match(r"[a-z]+:", found[1]) or target.endswith(".svg"): return found[0]
        place = (page.parent / target).resolve() if target else page
        if not place.exists(): sys.exit(f"{page}: a link leads nowhere: {found[1]}")
        if place in pages:
            if part and part not in anchors(place): sys.exit(f"{page}: there is no such heading: {found[1]}")
            return f"]({target}{mark}{anchors(place)[part] if part else ''})"
        user, repo, branch = read_address()
        kind = "tree" if place.is_dir() else "blob"
        return f"](https://github.com/{user}/{repo}/{kind}/{branch}/{place.relative_to(ROOT).as_posix()}{mark}{part})"
    return re.sub(r"\]\(([^()\s]+)\)", link, text)

def tree(pages, title=""):
    "A table of contents, as MyST writes it."
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {title}" if title else "", "", *pages, "```", ""])

def copy_notebooks(src, pages):
    "The notebooks and Markdown pages as the site shows them; the first one gets the table of contents."
    for path in pages:
        (src / path.relative_to(NBS)).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            text = linked(path.read_text(encoding="utf-8"), path, pages)
            (src / path.relative_to(NBS)).write_text(text, encoding="utf-8")
            continue
        nb, name = json.loads(path.read_text(encoding="utf-8")), path.relative_to(NBS)
        nb["cells"] = [c for c in map(shown, nb["cells"]) if c]
        for c in nb["cells"]:
            if c["cell_type"] == "markdown": c["source"] = linked("".join(c["source"]), path, pages)
        nb["metadata"]["language_info"] = {"name": "python", "pygments_lexer": "ipython3"} # for the colours
        if name.name == "index.ipynb":
            contents = "\n".join(tree([f"{folder}/index"], title) for title, folder in PARTS.items()
                                 if folder == "api" or any(folder in p.parts for p in pages))
            nb["cells"].append({"cell_type": "markdown", "id": "contents", "metadata": {}, "source": contents})
        (src / name).write_text(json.dumps(nb), encoding="utf-8")
    for picture in NBS.glob("*.svg"): shutil.copy(picture, src)

def documented(module):
    "A module's page: its public names in order, each with signature, what its parameters mean, and docstring."
    from fastcore.docments import DocmentText
    lines = [f"# {module.__name__.removeprefix('comam_nb.')}", "", inspect.getdoc(module) or ""]
    for name in module.__all__:
        symbol = getattr(module, name)
        if not callable(symbol) or getattr(symbol, "__module__", "") != module.__name__: continue
        own = vars(symbol).items() if inspect.isclass(symbol) else ()
        for s in (symbol, *(f for n, f in own if not n.startswith("_") and inspect.isfunction(f))):
            lines += ["", f"{'##' if s is symbol else '###'} {s.__qualname__}", "", "```python",
                      str(DocmentText(s, maxline=110, docstring=False)), "```", "", inspect.getdoc(s) or ""]
    return "\n".join(lines) + "\n"

def write_api(src, which):
    "A page for each module of the package."
    (src / "api").mkdir()
    for path in sorted((ROOT / "comam_nb").glob(which)):
        if path.name.startswith("_"): continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        page = documented(importlib.import_module(name))
        (src / "api" / f"{name.removeprefix('comam_nb.')}.md").write_text(page, encoding="utf-8")

def write_contents(src):
    "A page with a table of contents for every folder."
    folders = sorted((p for p in src.rglob("*") if p.is_dir()), reverse=True)
    for folder in folders:
        pages = sorted(p.stem for p in folder.iterdir() if p.is_file())
        below = sorted(f"{p.name}/index" for p in folder.iterdir() if p.is_dir())
        title = next((t for t, f in PARTS.items() if src / f == folder), folder.name)
        text = f"# {title}\n\n" + tree([*below, *pages]).replace(":hidden:\n", "")
        (folder / "index.md").write_text(text, encoding="utf-8")

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--book", action="store_true", help="only the chapters, with their modules")
    parser.add_argument("--out", type=Path, default=ROOT / "_site", help="the site's folder")
    a = parser.parse_args(argv)
    from sphinx.cmd.build import build_main
    with tempfile.TemporaryDirectory() as folder:
        src = Path(folder)
        pages = [*notebooks(), *sorted((NBS / "reference").glob("*.md"))]
        if a.book: pages = [p for p in pages if p.name == "index.ipynb" or p.parent.name in ("book", "reference")]
        copy_notebooks(src, pages)
        write_api(src, "*.py" if a.book else "**/*.py")
        write_contents(src)
        settings = ["-c", str(ROOT / "docs"), "-d", str(src / ".cache")]
        return build_main(["-q", "-W", "--keep-going", "-j", "auto", *settings, str(src), str(a.out)])

if __name__ == "__main__": sys.exit(main())
