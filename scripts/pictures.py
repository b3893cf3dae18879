"""The two pictures of README: nbs/way.svg, the whole way of the data, and nbs/roadmap.svg, who reads what.

    python scripts/pictures.py            # draw them
    python scripts/pictures.py --check    # exit code 1 if they are not what this would draw
"""
import argparse, sys

from address import ROOT

sys.path.insert(0, str(ROOT))
from comam_nb.base.drawings import Drawing

def way():
    "Both papers, from what comes in to what goes out, with Ana's texts and a task about pages."
    d = Drawing(760, 606, "CoMAM: a conversation becomes facts, the facts a profile, and both an answer; each of the "
                          "three agents has a reward of its own and a share of the answer's reward. MemCollab: a right "
                          "and a wrong attempt of two models are contrasted, and the lesson goes into a bank that any "
                          "model reads before its next task.")
    d.text(20, 24, "CoMAM: three agents, trained together", 16, bold=True, anchor="start")
    d.text(740, 24, "chapters 1 to 10", 13, "grey", anchor="end")
    made = {"conversation": "“My favourite\ndrink is coffee.”\n“I stopped coffee;\nit is tea now.”",
            "facts": "[3] favourite\ndrink: coffee\n[7] drinks tea\nnow", "profile": "Moved from\ncoffee to tea.",
            "answer": "“What is my\nfavourite\ndrink?”\n“Tea.”"}
    for i, (name, text) in enumerate(made.items()):
        x = 20 + 195 * i
        d.text(x + 67, 54, name, 13, "grey").box(f"{name} text", x, 66, 135, 84, text, "plain", 14)
    agents = {"extraction": "is the evidence\nkept?", "profile": "does it fit\nthe history?",
              "retrieval": "is the evidence\nfound?"}
    for i, (name, reward) in enumerate(agents.items()):
        x = 100 + 195 * i
        d.box(name, x, 190, 150, 36, name, "blue", 15, bold=True)
        d.box(reward, x, 250, 150, 50, reward, "green", 14).line([(x + 75, 250), (x + 75, 229)], "green", head=True)
        d.line([(x + 10, 153), (x + 40, 187)], head=True).line([(x + 110, 187), (x + 140, 153)], head=True)
    d.box("right", 675, 250, 65, 50, "right?", "orange", 14).line([(707, 153), (707, 247)], head=True)
    d.line([(707, 303), (707, 334), (175, 334)], "orange", 2)
    for i in range(3): d.line([(175 + 195 * i, 334), (175 + 195 * i, 303)], "orange", 2, head=True)
    d.text(440, 352, "the answer's reward, shared by how far each agent ranks the rollouts as the answers do", 14,
           "orange")
    d.line([(20, 378), (740, 378)], "grey", 1)
    d.text(20, 404, "MemCollab: models that learn from each other's mistakes", 16, bold=True, anchor="start")
    d.text(740, 404, "chapters 11 to 14", 13, "grey", anchor="end")
    d.box("task", 20, 482, 120, 62, "How many pages\nare there from\n12 to 17?", "plain", 14)
    d.box("A", 172, 448, 130, 50, "17 − 12 = 5\nwrong", "red", 14).text(237, 436, "model A", 13, "grey")
    d.box("B", 172, 528, 130, 50, "17 − 12 + 1 = 6\nright", "green", 14).text(237, 590, "model B", 13, "grey")
    d.box("lesson", 340, 476, 200, 74, "When pages are counted,\nenforce counting both ends;\n"
          "avoid skipping one.", "orange", 14).text(440, 464, "the contrast, as a lesson", 13, "grey")
    d.box("bank", 580, 448, 160, 50, "bank of lessons,\nby category", "purple", 14)
    d.box("next", 580, 528, 160, 50, "any model, before\nits next task", "blue", 14)
    d.arrow("task", "A").arrow("task", "B").arrow("A", "lesson").arrow("B", "lesson").arrow("lesson", "bank")
    return d.arrow("bank", "next")

ROADS = { # who -> (colour, what they want, the stations)
    "student": ("blue", "wants to understand, with a pencil",
                ["five\nminutes", "1 to 3\nstory, policy,\nGRPO", "4, 5\nagents, one\nprocess",
                 "6, 7\nrewards,\ncredit", "8, 9\ntraining, a\nsmall world", "11 to 14\nMemCollab"]),
    "researcher": ("orange", "wants to change a rule and measure",
                   ["five\nminutes", "6, 7\nrewards,\ncredit", "credit\nlaboratory", "reproduction,\ndeviations",
                    "14\ntransfer,\nintervals", "your own\nscheme"]),
    "engineer": ("green", "wants it at work",
                 ["first day:\ncomam chat", "10\na memory\nthat lasts", "real chats\non a card", "13\nthe bank",
                  "retrievers,\nservers", "speed"]),
}

def roadmap():
    "Three readers, and what each reads in which order."
    d = Drawing(760, 440, "A student goes through the chapters in their order; a researcher through rewards, credit, "
                          "the laboratory and the reproduction; an engineer through the commands, the memory, a run "
                          "on a card, the bank and the retrievers.")
    for row, (who, (colour, wants, stations)) in enumerate(ROADS.items()):
        y = 24 + 142 * row
        d.text(20, y, who, 16, colour, bold=True, anchor="start").text(130, y + 1, wants, 14, "grey", anchor="start")
        for i, text in enumerate(stations):
            d.box(f"{who} {i}", 20 + 123 * i, y + 20, 105, 78, text, colour, 14)
            if i: d.arrow(f"{who} {i - 1}", f"{who} {i}", colour=colour)
    return d.text(20, 424, "A number is a chapter of the book.", 13, "grey", anchor="start")

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if one is out of step")
    check, stale = parser.parse_args(argv).check, []
    for name, drawing in {"way": way(), "roadmap": roadmap()}.items():
        path, text = ROOT / "nbs" / f"{name}.svg", drawing._repr_svg_() + "\n"
        if path.exists() and path.read_text(encoding="utf-8") == text: continue
        stale.append(path.name)
        if not check: path.write_text(text, encoding="utf-8")
    if check and stale: print(f"out of step: {', '.join(stale)}; run `python scripts/pictures.py`", file=sys.stderr)
    return int(bool(check and stale))

if __name__ == "__main__": sys.exit(main())
