"""Does every link lead somewhere: to a file that exists, and there to a heading that exists? And is every "chapter 7",
"walkthrough 3" or "notebook 12" of a text a link to the notebook with that number?

    python scripts/links.py    # what does not, a line each; exit code 1 if there is any

Looks at the Markdown of all notebooks and at every .md file. Links to other sites are not followed.
"""
import json, re, sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote

from address import ROOT, notebooks

LINK = r"\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)" # [text](target)
NAMED = r"(?<!Part III, )\b(chapter|walkthrough|notebook)s? (\d+)"

def pages(root: Path = ROOT):
    "What is looked at: every notebook, and every Markdown file that is not hidden."
    hidden = lambda p: any(part[0] in "._" for part in p.relative_to(root).parts)
    folders = [root, *(root / d for d in ("nbs", "configs", "docs") if (root / d).is_dir())]
    md = {p for d in folders for p in (d.glob("*.md") if d == root else d.rglob("*.md")) if not hidden(p)}
    return [*notebooks(root), *sorted(md)]

def without_code(text):
    "A text without its code blocks and `code`."
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)

@cache
def texts(page: Path):
    "(a Markdown text, is it prose?) of a page: a notebook's Markdown cells are, its code cells are not."
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb": return [(text, True)]
    return [("".join(c["source"]), c["cell_type"] == "markdown") for c in json.loads(text)["cells"]]

def slug(heading):
    "The anchor of a heading on GitHub and on the site."
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")

@cache
def anchors(page: Path):
    "The anchors of a page -> what the site calls them. Jupyter keeps a heading's capitals and signs, GitHub does not."
    prose = "\n\n".join(re.sub(r"```.*?```", "", t, flags=re.S) for t, is_prose in texts(page) if is_prose)
    found = [re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", h).strip() for h in re.findall(r"^#+ +(.+)$", prose, re.M)]
    return {h.replace(" ", "-") if page.suffix == ".ipynb" else slug(h): slug(h) for h in found}

def leads_nowhere(page: Path, target: str):
    "Why a relative link leads nowhere, or None."
    file, _, part = unquote(target).partition("#")
    place = (page.parent / file).resolve() if file else page
    if not place.exists(): return "there is no such file"
    if not part: return None
    if place.suffix in (".ipynb", ".md"): return None if part in anchors(place) else "there is no such heading"
    line = re.fullmatch(r"L(\d+)", part)
    if line and place.is_file() and int(line[1]) <= len(place.read_text(encoding="utf-8").splitlines()): return None
    return "there is no such line"

def is_numbered(kind: str, number: str, place: Path):
    "Is this the chapter, walkthrough or notebook of that number?"
    folder = {"chapter": "book", "walkthrough": "walkthroughs"}.get(kind)
    return place.name.startswith(f"{int(number):02}_") and (not folder or place.parent.name in (folder, "solutions"))

def problems(page: Path, root: Path = ROOT):
    "What is wrong with a page's links, a line each."
    chapters = {int(p.name[:2]) for p in (root / "nbs" / "book").glob("*.ipynb")}
    for raw, is_prose in texts(page):
        if not is_prose: # code has no links, but its comments may name a chapter
            yield from (f"{m[0]}: there is no such chapter" for m in re.finditer(NAMED, raw, re.I)
                        if m[1].lower() == "chapter" and int(m[2]) not in chapters)
            continue
        text = without_code(raw)
        for shown, target in re.findall(LINK, raw if "`" not in raw else re.sub(r"```.*?```", "", raw, flags=re.S)):
            if re.match(r"[a-z]+:|/", target) or target.startswith("attachment:"): continue
            if why := leads_nowhere(page, target): yield f"[{shown}]({target}): {why}"
            place = (page.parent / target.partition("#")[0]).resolve()
            if place.suffix != ".ipynb": continue
            for kind, number in re.findall(NAMED, shown, re.I):
                if not is_numbered(kind.lower(), number, place): yield f"[{shown}]({target}): another number"
            bare = re.fullmatch(r"`?(\d+)(_\w+)?`?", shown)
            if bare and not place.stem.startswith(bare[0].strip("`")): yield f"[{shown}]({target}): another notebook"
        plain = re.sub(LINK, "", text)
        for m in re.finditer(NAMED + ".{0,30}", plain, re.I):
            line = plain[:m.start()].rpartition("\n")[2]
            if line.startswith("#"): # a heading names a chapter without a link, so that its anchor stays short
                if int(m[2]) not in chapters: yield f"{m[0]!r}: there is no such chapter"
            else: yield f"{m[0]!r}: make it a link"

def main():
    found = [f"{p.relative_to(ROOT).as_posix()}: {why}" for p in pages() for why in problems(p)]
    print("\n".join(found) or "every link leads somewhere")
    return int(bool(found))

if __name__ == "__main__": sys.exit(main())
