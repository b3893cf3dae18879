"""Every measured figure in README, the chapters and the walkthroughs, with its log and the command that made the log.

    python scripts/figures.py            # figure -> log -> command, and what is not bound yet, page by page
    python scripts/figures.py index 06   # only pages whose path holds one of these texts
    python scripts/figures.py --check    # exit code 1 if a figure is not what its log says

To bind a figure takes a minute: copy a piece of its sentence into `nbs/logs/figures.toml`, put braces around the
numbers, name the log (its path below `nbs/`) and say where the values stand there, in the order of the braces:

    [[figure]]
    page = "walkthroughs/06_reproduction.ipynb"     # "index.ipynb" is README
    text = "costs nothing that could be seen ({−.005} ± {.035})"
    log = "walkthroughs/06_reproduction.ipynb#f8c88c9e"          # what a cell shows (its id), or logs/FILE
    find = '^freeze_profile - adaptive (\\S+) ± (\\S+)'     # matches once, a group for each number; or a list of these

Instead of `find`, for a log that is a table (.csv, .jsonl) or a .json:

    where = {arm = "shared"}        # these rows; without it all
    column = "answer_accuracy"      # of them this; in a .json its path, with dots: "after.answer_accuracy"
    minus = {arm = "equal"}         # for the differences: less these rows, one by one
    of = ["mean", "half", "mean difference", "half difference"]       # STATISTICS below, one for each number

`scale = 100` is for percents and points. A number must be the log's value, rounded to the digits that it is written
with; words do, too ({seven}, {twenty-six}). `[commands]` says how each log (or folder of logs) is made; what a cell
shows is made by running its notebook. A number that looks measured but is none (of a paper, worked by hand, a setting)
goes under `[[given]]`, with page, text (" … " stands for whatever comes between) and why. In the pages that `whole`
names, what looks measured and is neither is an error.
"""
import argparse, csv, functools, html, json, re, statistics, sys
from pathlib import Path

from address import ROOT

NBS, TABLE = ROOT / "nbs", ROOT / "nbs" / "logs" / "figures.toml"
ONES = "no one two three four five six seven eight nine".split()
WORDS = {w: i for i, w in enumerate(ONES + "ten eleven twelve thirteen fourteen fifteen sixteen".split())} | {
    tens + (f"-{ONES[i]}" if i else ""): 10 * n + i
    for n, tens in enumerate("twenty thirty forty fifty".split(), 2) for i in range(10)}
NUMBER = r"[+−-]?(?:\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?|\.\d+)"
MARKED = re.compile(rf"\{{({NUMBER}|{'|'.join(sorted(WORDS, key=len, reverse=True))})\}}", re.I)
UNITS = r"%|x\b|times\b|points?\b|(?:milli)?seconds?\b|minutes?\b|hours?\b|m?s\b|min\b|[kMG]B\b|tokens/s|of \d+\b"
NAMES = r"(?:§|Exercise |Python |version |[Ss]eries |[Tt]able |section |arXiv |temperature )"
LOOKS_MEASURED = re.compile(rf"(?<![\w.,/:#-])(?:[+−±-]? ?\d*\.\d+(?![\w.]*\d|\w)|{NUMBER} ?(?:{UNITS}))")
NOT_PROSE = re.compile(r"```.*?```|^ {4,}\S.*?$|`[^`\n]+`|\$\$.*?\$\$|\$[^$\n]+\$|\]\([^)\s]*\)|<!--.*?-->|"
                       rf"\*\*[IVX]+\.\d\.\*\*|95 %|{NAMES}[\d.]+(?:,? (?:and|to) [\d.]+)*", re.S | re.M)

def half(x):
    "Half the width of Student's 95 % interval of the mean."
    from scipy.stats import t
    return t.ppf(.975, len(x) - 1) * statistics.stdev(x) / len(x) ** .5

STATISTICS = {"mean": statistics.mean, "half": half, "least": min, "most": max, "sum": sum, "count": len,
              "median": statistics.median, "first": lambda x: x[0], "last": lambda x: x[-1]}

# ---- pages

@functools.cache
def cells(page: str):
    "The cells of a notebook below nbs/; a page of Markdown is one."
    text = (NBS / page).read_text(encoding="utf-8")
    return [{"cell_type": "markdown", "source": text}] if page.endswith(".md") else json.loads(text)["cells"]

@functools.cache
def prose(page: str): return "\n\n".join("".join(c["source"]) for c in cells(page) if c["cell_type"] == "markdown")

def shown(cell):
    "What a code cell shows, as text: tags and runs of blanks are one blank."
    parts = []
    for o in cell.get("outputs", ()):
        data = {k: "".join(v) for k, v in o.get("data", {}).items() if k.startswith("text/")}
        parts.append("".join(o.get("text", ())) or data.get("text/markdown") or data.get("text/html")
                     or data.get("text/plain", ""))
    text = re.sub(r"<svg.*?</svg>|<style.*?</style>|<[^>]+>", " ", "\n".join(parts), flags=re.S)
    return re.sub(r"[ \t]+", " ", html.unescape(text))

def number(text: str):
    "A number as a text writes it, +.018 or −1,234 or nine, and half a unit of its last digit."
    text = text.lower().replace(",", "").replace("−", "-").replace(" ", "").lstrip("±")
    return (WORDS[text], .5) if text in WORDS else (float(text), .5 * 10 ** -len(text.partition(".")[2]))

# ---- logs

@functools.cache
def read(log: str):
    "A log's rows (.csv, .jsonl), its object (.json) or its text; of `notebook#id` what that cell shows."
    page, _, cell = log.partition("#")
    if cell: return next(shown(c) for c in cells(page) if c.get("id") == cell)
    file, suffix = NBS / page, Path(page).suffix
    text = file.read_text(encoding="utf-8")
    if suffix == ".csv": return list(csv.DictReader(text.splitlines()))
    if suffix == ".jsonl": return list(map(json.loads, text.splitlines()))
    return json.loads(text) if suffix == ".json" else text

def column(log: str, name: str, where: dict):
    "The numbers of one column, or below one path of a .json."
    found = read(log)
    if isinstance(found, dict):
        for key in name.split("."): found = found[key]
        return [float(x) for x in (found if isinstance(found, list) else [found])]
    rows = [r for r in found if all(str(r.get(k)) == str(v) for k, v in where.items())]
    return [float(r[name]) for r in rows if r.get(name) not in ("", None)]

def values(figure: dict):
    "What the log says, in the order of the figure's numbers."
    if "find" in figure:
        source = read(figure["log"])
        if not isinstance(source, str): source = (NBS / figure["log"]).read_text(encoding="utf-8")
        patterns = [figure["find"]] if isinstance(figure["find"], str) else figure["find"]
        found = [list(re.finditer(p, source, re.M)) for p in patterns]
        for p, matches in zip(patterns, found):
            if len(matches) != 1: raise ValueError(f"{p!r} matches {len(matches)} times, not once")
        return [number(g)[0] for matches in found for g in matches[0].groups()]
    x, differences = column(figure["log"], figure["column"], figure.get("where", {})), None
    if "minus" in figure:
        y = column(figure["log"], figure["column"], figure["minus"])
        differences = [a - b for a, b in zip(x, y, strict=True)]
    chosen = lambda of: differences if of.endswith(" difference") else x
    return [STATISTICS[of.removesuffix(" difference")](chosen(of)) for of in figure["of"]]

# ---- the table

@functools.cache
def table():
    import tomllib
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))

def command(log: str):
    "How a log is made; of the longest name in [commands] that it begins with."
    if ".ipynb#" in log: return "run all cells of nbs/" + log.partition("#")[0]
    known = [k for k in table()["commands"] if log.startswith(k)]
    if not known: raise ValueError(f"[commands] does not say how {log} is made")
    return table()["commands"][max(known, key=len)]

def place(entry: dict):
    "Where an entry's text stands in its page, and where its marked numbers do: (begin, end) each."
    spans, plain, last = [], "", 0
    for m in MARKED.finditer(entry["text"]):
        plain += entry["text"][last:m.start()]
        spans.append((len(plain), len(plain) + len(m[1])))
        plain, last = plain + m[1], m.end()
    plain += entry["text"][last:]
    pattern = re.escape(plain).replace(re.escape(" … "), r"[\s\S]*?")
    found = [m.span() for m in re.finditer(pattern, prose(entry["page"]))]
    if len(found) != 1: raise ValueError(f"the text stands in the page {len(found)} times, not once: "
                                         "who changes a sentence changes it in nbs/logs/figures.toml, too")
    return found[0], [(found[0][0] + a, found[0][0] + b) for a, b in spans]

def wrong(figure: dict):
    "What is wrong with a bound figure, or None."
    try:
        _, spans = place(figure)
        command(figure["log"])
        want, scale = values(figure), figure.get("scale", 1)
        if len(spans) != len(want): return f"{len(spans)} numbers in braces, {len(want)} values in {figure['log']}"
        for (a, b), value in zip(spans, want):
            said = prose(figure["page"])[a:b]
            got, unit = number(said)
            if abs(got - scale * value) > unit * (1 + 1e-6) + 1e-12:
                return f"says {said}, {figure['log']} says {scale * value:.6g}"
    except (OSError, KeyError, IndexError, StopIteration, ValueError) as e: return f"{type(e).__name__}: {e}"

# ---- what looks measured

@functools.cache
def beside(page: str):
    "(number, decimals) -> the id of a code cell of the page that shows or asserts it."
    found = {}
    for c in cells(page):
        if c["cell_type"] != "code": continue
        source = "".join(c["source"])
        text = shown(c) + (source if "assert" in source or "test_" in source else "")
        for m in re.findall(rf"(?<![\w.]){NUMBER}", text):
            decimals = len(m.partition(".")[2])
            for d in range(decimals + 1): found.setdefault((round(abs(number(m)[0]), d), d), c.get("id"))
    return found

PERHAPS = "not bound; shown or asserted by cell" # or there by chance

def looks(page: str):
    "(begin, end, text) of each number that looks measured; code, formulas and links are no prose."
    plain = NOT_PROSE.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), prose(page))
    return [(m.start(), m.end(), m[0]) for m in LOOKS_MEASURED.finditer(plain)]

@functools.cache
def places(page: str):
    "(begin, end, what it is) of each number of a page that is bound, and of each text under [[given]]."
    return [*((*s, "figure") for f in table()["figure"] if f["page"] == page for s in place(f)[1]),
            *((*place(g)[0], g["why"]) for g in table().get("given", ()) if g["page"] == page)]

def status(page: str, begin: int, end: int, text: str):
    "What a number that looks measured rests on, or None."
    for a, b, what in places(page):
        if a < end and begin < b: return what
    line = prose(page)[:end].rpartition("\n")[2] + prose(page)[end:].partition("\n")[0]
    if re.match(r"\| \[\w+\]\(\S+\.ipynb\).*\| \d+ s \|$", line) or "**Time**:" in line:
        return "logs/minutes.csv, the order of magnitude (tests/test_links.py)"
    digits = re.search(NUMBER, text)[0]
    value, decimals = abs(number(digits)[0]), len(digits.partition(".")[2])
    if len(digits.strip("+−-0.,").replace(".", "")) < 2: return None # found anywhere by chance
    scaled = (round(value / 100, decimals + 2), decimals + 2) if re.search("%|point", text) else None
    return (cell := beside(page).get((value, decimals)) or beside(page).get(scaled)) and f"{PERHAPS} {cell}"

def pages():
    "index.ipynb, which is README, what is promised, the chapters and the walkthroughs."
    return ["index.ipynb", "reference/trust.md", *(p.relative_to(NBS).as_posix() for d in ("book", "walkthroughs")
                             for p in sorted((NBS / d).glob("*.ipynb")))]

def around(page: str, begin: int, end: int): return " ".join(prose(page)[max(0, begin - 50):end + 30].split())

def out_of_step():
    "What `--check` finds, a line each. What is open can be told only where every text was found."
    bad = False
    for f in table()["figure"]:
        if why := wrong(f):
            bad = True
            yield f"nbs/{f['page']}: \"{f['text']}\": {why}"
    for g in table().get("given", ()):
        try: place(g)
        except (OSError, ValueError) as e:
            bad = True
            yield f"nbs/{g['page']}: \"{g['text']}\", under [[given]]: {e}"
    for page in table()["whole"] if not bad else ():
        for begin, end, text in looks(page):
            if (status(page, begin, end, text) or PERHAPS).startswith(PERHAPS):
                yield f"nbs/{page}: \"… {around(page, begin, end)} …\" looks measured: see scripts/figures.py"

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("texts", nargs="*", help="texts of which a page's path holds one")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a figure is not what its log says")
    a = parser.parse_args(argv)
    found = list(out_of_step())
    for line in found: print(line, file=sys.stderr)
    if a.check: return int(bool(found))
    for page in (p for p in pages() if any(t in p for t in a.texts or [""])):
        print(f"\nnbs/{page}")
        for f in (f for f in table()["figure"] if f["page"] == page):
            print(f"  {f['text']}\n      -> nbs/{f['log']} -> {command(f['log'])}")
        for (begin, end, text), s in ((n, status(page, *n)) for n in looks(page)):
            if s != "figure": print(f"  {s or 'open'}: … {around(page, begin, end)} …")
    return int(bool(found))

if __name__ == "__main__": sys.exit(main())
