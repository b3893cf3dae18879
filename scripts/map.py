"""The map of the house: nbs/map.svg, drawn from the imports of the package. The floors stand in tests/test_layout.py.

    python scripts/map.py            # write nbs/map.svg
    python scripts/map.py --check    # exit code 1 if it is not what this would write
"""
import argparse
import ast
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH, GAP, LINE, TOP = 1080, 26, 15, 62  # pixels: of the picture, between rows, of a line of text, above the first row
CHAPTERS = {"data": 1, "policy": 2, "grpo": 3, "agents": 4, "mdp": 5, "rewards": 6, "credit": 7, "training": 8,
            "microworld": 9, "memory": 10, "memcollab": "11 to 14"}
ROWS = [["base", "exercises"], ["data"], ["lm"], ["checks", "readers", "store"],
        ["policy", "grpo", "agents", "mdp", "rewards", "credit"], ["rl", "training", "microworld", "memory"],
        ["memcollab"], ["worlds", "systems"], ["runs", "studies"], ["cli"]]  # lowest first

def read_floors(root: Path = ROOT) -> list[str]:
    "FLOORS of tests/test_layout.py, lowest first."
    for node in ast.parse((root / "tests" / "test_layout.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS":
            return ast.literal_eval(node.value)
    raise ValueError("tests/test_layout.py has no list FLOORS")

def read_imports(root: Path = ROOT) -> tuple[dict[str, list[str]], set[tuple[str, str]]]:
    "room -> its modules, and (importing room, imported room) of all imports between rooms."
    rooms, arrows = {}, set()
    for path in sorted((root / "comam_nb").rglob("*.py")):
        parts = path.relative_to(root / "comam_nb").with_suffix("").parts
        if path.name.startswith("_"):
            continue
        rooms.setdefault(parts[0], []).append(parts[-1])
        package = ("comam_nb", *parts[:-1])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            above = package[:len(package) - node.level + 1] if node.level else ()
            target = [*above, *(node.module.split(".") if node.module else [])]
            if target[:1] == ["comam_nb"] and len(target) > 1 and target[1] != parts[0]:
                arrows.add((parts[0], target[1]))
    return rooms, arrows

def needed(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    "The arrows that do not follow from others (the transitive reduction)."
    below = {}
    def reach(room):
        if room not in below:
            below[room] = set()
            for a, b in arrows:
                if a == room:
                    below[room] |= {b} | reach(b)
        return below[room]
    return {(a, b) for a, b in arrows if not any(b in reach(c) for x, c in arrows if x == a and c != b)}

def in_lines(words: list[str], most: int) -> list[str]:
    "Words in lines of at most so many characters."
    lines = [""]
    for w in words:
        if lines[-1] and len(lines[-1]) + 2 + len(w) > most:
            lines.append("")
        lines[-1] += (", " if lines[-1] else "") + w
    return lines

def boxes(rooms: dict[str, list[str]]) -> tuple[dict[str, tuple], int]:
    "room -> (x, y, width, height, lines of text), the highest row on top; and the picture's height."
    place, y = {}, TOP
    for row in reversed(ROWS):
        width = (WIDTH - GAP * (len(row) + 1)) / len(row)
        texts = {r: in_lines(rooms[r], int((width - 20) / 6.6)) if rooms[r] != [r] else [] for r in row}
        height = 30 + LINE * max(map(len, texts.values()))
        for i, r in enumerate(row):
            place[r] = (GAP + i * (width + GAP), y, width, height, texts[r])
        y += height + GAP
    return place, y

def arrow(a: tuple, b: tuple) -> str:
    "A line from the importing room to the imported one, which stands lower, or beside it."
    (ax, ay, aw, ah, _), (bx, by, bw, _, _) = a, b
    if ay == by:  # the same row: from side to side
        x1, x2 = (ax, bx + bw) if bx < ax else (ax + aw, bx)
        if abs(x2 - x1) <= GAP + 1:
            return f'<path d="M{x1:.0f} {ay + 15:.0f} L{x2:.0f} {ay + 15:.0f}"/>'
        middle = (x1 + x2) / 2
        return f'<path d="M{x1:.0f} {ay + 4:.0f} Q{middle:.0f} {ay - 18:.0f} {x2:.0f} {ay + 4:.0f}"/>'
    x1 = min(max(bx + bw / 2, ax + 12), ax + aw - 12)
    x2 = min(max(ax + aw / 2, bx + 12), bx + bw - 12)
    y1 = ay + ah
    return f'<path d="M{x1:.0f} {y1:.0f} C{x1:.0f} {y1 + 22:.0f} {x2:.0f} {by - 22:.0f} {x2:.0f} {by:.0f}"/>'

def draw(root: Path = ROOT) -> str:
    "The picture as SVG."
    floors, (rooms, arrows) = read_floors(root), read_imports(root)
    if sorted(floors) != sorted(rooms):
        raise ValueError(f"FLOORS and the package differ: {sorted(set(floors) ^ set(rooms))}")
    if sorted(floors) != sorted(r for row in ROWS for r in row):
        raise ValueError("ROWS in scripts/map.py does not hold the rooms of FLOORS")
    place, height = boxes(rooms)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
           'font-family="Helvetica, Arial, sans-serif" font-size="12">',
           '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
           '<path d="M0 0 L8 4 L0 8 z" fill="#8a8a8a"/></marker></defs>',
           f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
           f'<text x="{GAP}" y="26" font-size="16" font-weight="bold" fill="#222222">comam_nb, floor by floor</text>',
           f'<text x="{GAP}" y="46" fill="#555555">blue: chapters of the book; grey: source notebooks. An arrow says '
           '"imports", and leads down; arrows that follow from others are left out.</text>',
           '<g fill="none" stroke="#8a8a8a" stroke-width="1" marker-end="url(#tip)">']
    out += [arrow(place[a], place[b]) for a, b in sorted(needed(arrows))]
    out.append("</g>")
    for room in sorted(place):
        x, y, w, h, lines = place[room]
        fill, edge = ("#e4effb", "#3b78b5") if room in CHAPTERS else ("#f3f3f3", "#8a8a8a")
        title = f"{CHAPTERS[room]} · {room}" if room in CHAPTERS else room
        out.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="{w:.0f}" height="{h:.0f}" rx="5" fill="{fill}" '
                   f'stroke="{edge}"/>')
        out.append(f'<text x="{x + 10:.0f}" y="{y + 19:.0f}" font-weight="bold" fill="#222222">{escape(title)}</text>')
        out += [f'<text x="{x + 10:.0f}" y="{y + 19 + LINE * i:.0f}" fill="#444444">{escape(t)}</text>'
                for i, t in enumerate(lines, 1)]
    return "\n".join([*out, "</svg>"]) + "\n"

def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the map is out of step")
    check, path, new = parser.parse_args(argv).check, root / "nbs" / "map.svg", draw(root)
    if path.exists() and path.read_text(encoding="utf-8") == new:
        return 0
    if check:
        print("nbs/map.svg is not what the imports say, run `python scripts/map.py`", file=sys.stderr)
        return 1
    path.write_text(new, encoding="utf-8")
    return 0

if __name__ == "__main__":
    sys.exit(main())
