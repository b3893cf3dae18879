"""Where is an equation of the two papers? nbs/reference/equations.md says it: what it means, the chapter, the code and
the test.

    python scripts/equations.py            # write the page
    python scripts/equations.py --check    # exit code 1 if it is not what this would write

A docstring or a comment of the package that says `CoMAM Eq. 9`, `CoMAM Eq. 13-15` or `MemCollab Alg. 2, Eq. 7` computes
that equation; a docstring or a comment of a test that says so checks it. Whoever only mentions an equation leaves the
paper's name out. An equation without code or without a test is an error, and so is one that is not in the list below.
"""
import argparse, ast, json, re, sys
from functools import cache
from pathlib import Path

from address import ROOT

PAGE = ROOT / "nbs" / "reference" / "equations.md"
PART = r"(?:Eq\. \d+(?:[-–]\d+)?|Alg\. \d+|Algorithm \d+|§\d\.\d)"
MARK = re.compile(rf"\b(CoMAM|MemCollab) ({PART}(?:, {PART})*)")
ARXIV = {"CoMAM": "2603.12631", "MemCollab": "2603.23234"}
EQUATIONS = { # what is cited -> (formula, meaning)
    "CoMAM §4.2": (r"s_{n+1} = T(s_n, a_n)", "the agents as one decision process: one's act is what the next sees"),
    "CoMAM Eq. 7": ("", "background: the objective of GRPO, with clipped ratios and a KL term"),
    "CoMAM Eq. 8": (r"D_{KL} = \tfrac{\pi_{ref}}{\pi} - \log\tfrac{\pi_{ref}}{\pi} - 1",
                    "background: that KL term, estimated for each token; off by default, as in Eq. 16"),
    "CoMAM Eq. 9": (r"r_{cons_f} = \alpha\tfrac{\lvert M_f \cap E_q\rvert}{\lvert E_q\rvert} + "
                    r"(1-\alpha)\tfrac{\lvert M_f \cap E_q\rvert}{\lvert M_f \cup E_q\rvert}",
                    "extraction's own reward: is the evidence in memory, and little else? α = .8"),
    "CoMAM Eq. 10": (r"r_{cons_c} = V(M_c, H) \in [0, 1]", "profile's own reward: a frozen judge reads it"),
    "CoMAM Eq. 11": (r"r_{ret} = \beta\tfrac{\lvert E'_q \cap E_q\rvert}{\lvert E_q\rvert} + "
                     r"(1-\beta)\tfrac{\lvert E'_q \cap E_q\rvert}{\lvert E'_q \cup E_q\rvert}",
                     "retrieval's own reward: did it bring the evidence, and little else? β = .2"),
    "CoMAM Eq. 12": (r"r_{ans} = 1[p = p^*]", "the reward of all: is the answer right?"),
    "CoMAM Eq. 13": (r"v_n = \mathrm{NDCG}(\sigma(R_n), \sigma(R_{ans}))",
                     "does agent n's reward rank the group as the answers do? (here σ is a ranking)"),
    "CoMAM Eq. 14": (r"w_n = \tfrac{e^{v_n}}{\sum_m e^{v_m}}", "agent n's share of the answer's reward"),
    "CoMAM Eq. 15": (r"r_{final,n}(i) = r_n(i) + w_n r_{ans}(i)", "what agent n is trained with, for rollout i"),
    "CoMAM Eq. 16": (r"\min(\rho A, \mathrm{clip}(\rho, 1-\epsilon, 1+\epsilon) A)",
                     "the objective: advantages within the group, clipped ratios, no KL term"),
    "CoMAM Alg. 1": ("", "a training step: roll out, reward, share, update. Its line 15 differs from Eq. 15"),
    "MemCollab Eq. 2": (r"(\tau^+, \tau^-) = (\tau_w, \tau_s)\text{ if }I(\tau_w) = 1\text{, else }(\tau_s, \tau_w)",
                        "which of two attempts is the better one"),
    "MemCollab Eq. 3": (r"\Delta(\tau^-, \tau^+) = \lbrace (v_k, i_k) \rbrace_{k \le K}",
                        "the contrast: what was violated, and what was kept"),
    "MemCollab Eq. 4": (r"m_k = (\text{enforce } i_k; \text{ avoid } v_k)", "a constraint, as one sentence"),
    "MemCollab Eq. 6": (r"m_k \mapsto (c, u)", "a constraint inherits the task's category and subcategory"),
    "MemCollab Eq. 7": (r"\lbrace m : (c, u) = (c_q, u_q) \rbrace", "only constraints of the question's kind compete"),
    "MemCollab Eq. 8": (r"\tau = A(q \mid m_1, \dots, m_p)", "the agent answers with the constraints before its eyes"),
    "MemCollab Alg. 1": ("", "building the bank: solve, judge, pair, contrast"),
    "MemCollab Alg. 2": ("", "using the bank: sort the question, retrieve, answer"),
}

def cited(text):
    "The equations that a text marks, one by one."
    for paper, parts in MARK.findall(text):
        for part in parts.split(", "):
            sign, first, last = re.fullmatch(r"(\D+?)([\d.]+)(?:[-–](\d+))?", part).groups()
            sign = {"Algorithm ": "Alg. "}.get(sign, sign)
            if sign == "§" and f"{paper} §{first}" not in EQUATIONS: continue # a section is cited in passing
            for n in range(int(first), int(last) + 1) if last else [first]: yield f"{paper} {sign}{n}"

@cache
def heading_above(notebook: Path, cell: str):
    "The heading under which a cell stands: (the notebook's title, the heading)."
    title = heading = None
    for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if c["id"] == cell: return title, heading
        if c["cell_type"] != "markdown": continue
        for h in re.findall(r"^#+ +(.+)$", "".join(c["source"]), re.M): title, heading = title or h, h
    raise ValueError(f"{notebook} has no cell {cell}: run nbdev_export")

def marks(path: Path):
    "(equation, name, line) of a Python file: the function or class, and its line, or the comment's own line."
    text = path.read_text(encoding="utf-8")
    if not MARK.search(text): return
    defs = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    for i, line in enumerate(text.splitlines(), 1):
        for equation in cited(line):
            around = [d for d in defs if d.lineno <= i <= d.end_lineno]
            inner = max(around, key=lambda d: d.lineno, default=None)
            doc = inner is not None and i <= inner.body[0].end_lineno and isinstance(inner.body[0], ast.Expr)
            outer = next((d for d in around if isinstance(d, ast.ClassDef) and d is not inner), None)
            name = f"{outer.name}.{inner.name}" if outer else inner.name if inner else ""
            yield equation, name, inner.lineno if doc else i

@cache
def places(root: Path = ROOT):
    "equation -> its places in the package, chapters first: (notebook, title, heading, module, name, line)."
    found = {}
    for path in sorted((root / "comam_nb").rglob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        for equation, name, line in marks(path):
            cell = next(m for l in reversed(lines[:line]) if (m := re.match(r"# %% (\S+\.ipynb) #(\S+)", l)))
            notebook = (path.parent / cell[1]).resolve()
            place = (notebook, *heading_above(notebook, cell[2]), path, name, line)
            found.setdefault(equation, []).append(place)
    return {e: sorted(set(ps), key=lambda p: ("book" not in p[0].parts, p[0], p[5])) for e, ps in found.items()}

@cache
def tests(root: Path = ROOT):
    "equation -> the tests that check it: (file, name)."
    found = {}
    for path in sorted((root / "tests").glob("test_*.py")):
        if path.name == "test_links.py": continue # it tests this script, with equations of its own
        for equation, name, _ in marks(path): found.setdefault(equation, []).append((path, name))
    return {e: sorted(set(ts)) for e, ts in found.items()}

def page(root: Path = ROOT):
    "The page. Raises `ValueError` for an equation that has no code, no test, or no line in `EQUATIONS`."
    where, checked = places(root), tests(root)
    if unknown := (where.keys() | checked.keys()) - EQUATIONS.keys():
        raise ValueError(f"scripts/equations.py does not know {', '.join(sorted(unknown))}: add it to EQUATIONS")
    if lost := [e for e in EQUATIONS if e not in where]: raise ValueError(f"no code of the package names {lost}")
    if lost := [e for e in EQUATIONS if e not in checked]: raise ValueError(f"no test names {lost}")
    up = lambda p: "../../" + p.relative_to(root).as_posix()
    out = ["# Equations", "",
           "Every equation of the two papers that is computed here: what it says, the chapter that explains it, the "
           "lines that compute it, and the tests that check it against other numbers. Symbols are explained in the "
           "chapters, words in the [glossary](glossary.md), and where the papers are silent or contradict themselves "
           "in the [deviations](deviations.md).", "",
           "Not in the table: CoMAM's Eq. 1 to 6 and MemCollab's Eq. 1 and 5. The notes on the papers from which this "
           "was built have no formula under these numbers, so none is shown under them, and no line of code claims to "
           "be one. What the notes have in words is built: CoMAM's agents, with their states and actions, in "
           "[04_agents](../book/04_agents.ipynb) and [05_mdp](../book/05_mdp.ipynb) (the row §4.2); MemCollab's "
           "attempts and their checker in [11_attempts](../book/11_attempts.ipynb) (the row Alg. 1).", ""]
    for paper, number in ARXIV.items():
        out += [f"## {paper}", "", f"[arXiv {number}](https://arxiv.org/abs/{number}), version 1.", "",
                "| | what it says | where |", "|---|---|---|"]
        for e, (formula, meaning) in EQUATIONS.items():
            if not e.startswith(paper): continue
            heads, code = {}, {}
            for notebook, title, heading, module, name, line in where[e]:
                link = f"../{notebook.relative_to(root / 'nbs').as_posix()}"
                anchor = "" if heading == title else "#" + heading.replace("`", "").replace(" ", "-")
                heads[f"[{notebook.stem}: {heading}]({link}{anchor})"] = None
                at = f"{module.relative_to(root / 'comam_nb').as_posix()}:{line}"
                code[(f"`{name}` " if name else "") + f"[{at}]({up(module)}#L{line})"] = None
            ts = [f"[{t.removeprefix('test_').replace('_', ' ')}]({up(f)})" for f, t in checked[e]]
            lines = [f"{kind} {x}" for kind, xs in (("read", heads), ("code", code), ("test", ts)) for x in xs]
            out.append(f"| **{e.removeprefix(paper)[1:].replace(' ', '&nbsp;')}** | "
                       f"{meaning}{f'<br>${formula}$' if formula else ''} | {'<br>'.join(lines)} |")
        out.append("")
    return "\n".join([*out, "<!-- Made by `python scripts/equations.py`. -->"]) + "\n"

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the page is out of step")
    check = parser.parse_args(argv).check
    try: text = page()
    except ValueError as e: sys.exit(str(e))
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text: return 0
    if check:
        print("nbs/reference/equations.md is out of step, run `python scripts/equations.py`", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0

if __name__ == "__main__": sys.exit(main())
