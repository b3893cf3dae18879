"What a model, a file or a server wrote, where people look: terminals, pages, tables; and keys, which nobody sees."
import ast, base64, io, json, re, sys, unicodedata
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from comam_nb.base.printable import markdown_text, printable, visible_streams
from comam_nb.checks.constraints import Constraint, Distillation
from comam_nb.checks.sandbox import Verdict
from comam_nb.checks.tasks import Task
from comam_nb.data import Episode, Message, Query, Session

PACKAGE = Path(__file__).resolve().parents[1] / "comam_nb"
EVIL = "<script>a()</script>\"'><img src=x onerror=a()>|`[b](http://c)\n# h\n\x1b]0;t\x07\x9b31m\u202e_x_ *y* $z$"
LINE = " ".join(EVIL.split())


# ---- pages
class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes = Counter(), Counter()
        self.feed(page); self.close()
    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes.update(k for k, _ in attrs)

def is_harmless(page, svg=False):
    found = Tags(page)
    drawn = {"svg", "title", "defs", "rect", "text", "polyline", "marker", "path"}
    plain = {"p", "b", "i", "hr", "br", "div", "span", "pre", "code", "em", "ul", "ol", "li", "table", "thead", "tbody",
             "tr", "td", "th", "h1", "h2", "html", "head", "meta", "title", "style", "body"}
    bad = set(found.tags) - (drawn if svg else plain)
    handlers = {a for a in found.attributes if a.startswith("on") or not svg and a in ("src", "href")}
    return not bad and not handlers and "<script" not in page.lower()

def attempt(right):
    from comam_nb.memcollab.attempts import Attempt
    return Attempt(EVIL, "h", EVIL, EVIL, 0, ({"role": EVIL, "content": EVIL},), EVIL, Verdict(right, EVIL, 0, "" if
                   right else "wrong"), error="", memory=(EVIL,))

TASK = Task(EVIL, EVIL, EVIL, EVIL, {"kind": "exact", "answer": EVIL}, EVIL)
LESSON = Constraint(EVIL, EVIL, EVIL, EVIL, EVIL, models=(EVIL,))
EPISODE = Episode((Session(EVIL, (Message('user', EVIL, 1),), EVIL),), Query(EVIL, EVIL, EVIL), (EVIL, EVIL), 'a', {1},
                  id=EVIL, user=EVIL)

def pages(folder):
    "Class -> an object with the hostile text in every field that may hold one."
    from comam_nb.base.drawings import Drawing
    from comam_nb.base.statistics import Interval
    from comam_nb.credit import Credit
    from comam_nb.mdp import Action, Note, State, Trajectory, Transition
    from comam_nb.memcollab.bank import ConstraintBank
    from comam_nb.memcollab.contrast import Pair, _Pairs
    from comam_nb.memcollab.hits import Retrieved
    from comam_nb.memcollab.results import Results, _Outcome
    from comam_nb.memcollab.showing import side_by_side
    from comam_nb.memcollab.trial import _Trials
    from comam_nb.memory import _AssistantReply
    from comam_nb.runs.cases import _Cases
    from comam_nb.runs.demonstrations import Demonstration
    from comam_nb.store.exchange import ImportReport
    from comam_nb.store.items import MemoryItem, MemoryStore
    from comam_nb.studies.bias_probe import _BiasProbe, _Probes
    from comam_nb.studies.transfer_matrix import _ErrorDivergence, _TransferMatrix
    from comam_nb.systems.interface import MemorySystem
    half, item = Interval(.5, .4, .6), MemoryItem(EVIL, EVIL, EVIL, "fine", [1], by=EVIL)
    store = MemoryStore(folder / "<b>me.db"); store.add(item)
    bank = ConstraintBank(folder / "<b>bank.db"); bank.add([LESSON], note=EVIL, check=False)
    note, pair = Note(EVIL, (1,)), Pair(TASK, attempt(True), attempt(False), EVIL)
    acts = [Transition(EVIL, State(0), EVIL, EVIL, Action((note,), {1}, EVIL), (), (), 1.0),
            Transition("retrieval", State(2), EVIL, EVIL, Action((), {1}, EVIL), (), (), 1.0)]
    system = SimpleNamespace(name=EVIL, sessions=1, memory=lambda: [SimpleNamespace(text=EVIL, cites=[EVIL])])
    system._repr_html_ = lambda: MemorySystem._repr_html_(system)
    outcome = _Outcome(EVIL, EVIL, 0, EVIL, "h", EVIL, True, 1, 1, 1, 1.0, 1, EVIL, "")
    drawing = Drawing(9, 9, EVIL).text(1, 1, EVIL, anchor=EVIL).box(EVIL, 1, 1, 2, 2, EVIL).bars(1, 1, [3], [EVIL])
    return dict(Drawing=drawing.box("o", 5, 5, 2, 2).arrow(EVIL, "o", EVIL), Session=EPISODE.history[0],
        Episode=EPISODE, Task=TASK, Distillation=Distillation([LESSON], [(EVIL, EVIL)], notes=(EVIL,)),
        Attempt=attempt(True), _Html=side_by_side(attempt(True), attempt(False)), Pair=pair, ConstraintBank=bank,
        _Pairs=_Pairs([pair], Counter({EVIL: 1})), Retrieved=Retrieved.of([(LESSON, 1.0, 0)], (EVIL,)),
        Results=Results([outcome, replace(outcome, arm="vanilla")], [EVIL], about={EVIL: EVIL}),
        _Trials=_Trials([LESSON], [EVIL]), MemoryStore=store, ImportReport=ImportReport(1, 1, [(EVIL, EVIL)]),
        MemorySystem=system, Trajectory=Trajectory(EPISODE, acts), _AssistantReply=_AssistantReply(EVIL, EVIL, (item,),
                                                                                                (item,)),
        Credit=Credit(torch.ones(1, 3), torch.ones(1, 3, 2), torch.ones(1, 3)), _Cases=_Cases((EVIL,), [(EVIL,)], 1, 1),
        Demonstration=Demonstration(EVIL, EVIL, EVIL, EVIL, EVIL),
        _Probes=_Probes([_BiasProbe(EVIL, (EVIL, EVIL), (1, 1), half, half, half, .5)]),
        _TransferMatrix=_TransferMatrix([EVIL], [EVIL], np.ones((1, 1)), [[half]]),
        _ErrorDivergence=_ErrorDivergence([EVIL], [EVIL], np.ones((1, 1)), np.ones((1, 1)), .5, half, .5))

def test_every_page_escapes_every_field(tmp_path):
    shown = {c.name for p in PACKAGE.rglob("*.py") for c in ast.walk(ast.parse(p.read_text())) if
             isinstance(c, ast.ClassDef) and any(isinstance(f, ast.FunctionDef) and f.name.startswith("_repr_") and
                                                 f.name.endswith("_") for f in c.body)}
    objects = pages(tmp_path)
    assert shown == set(objects), "a class that notebooks draw is missing here, or is gone"
    for name, x in objects.items():
        page = x._repr_svg_() if hasattr(x, "_repr_svg_") else x._repr_html_()
        assert is_harmless(page, hasattr(x, "_repr_svg_")), f"{name}: {page}"
    assert not is_harmless(f"<p>{EVIL}</p>") and not is_harmless("<p onclick=''>x</p>")
    for x in (objects["ConstraintBank"], objects["MemoryStore"]): x.close()
    for x in (objects["ConstraintBank"], objects["MemoryStore"]): assert is_harmless(x._repr_html_())

def rendered(text):
    import mistune
    return mistune.create_markdown(escape=False, plugins=["table", "strikethrough", "url"])(text)

def test_every_markdown_file_escapes_every_field(tmp_path):
    from comam_nb.base.statistics import comparison_table
    from comam_nb.memcollab.bank import ConstraintBank
    from comam_nb.runs.card import write_card
    from comam_nb.runs.folder import Run
    from comam_nb.runs.reports import cost_table, group_table, score_table
    with ConstraintBank(tmp_path / "<b>`x`.db") as bank:
        bank.add([LESSON], note=EVIL, check=False)
        assert is_harmless(bank.export_html(tmp_path / "b.html").read_text())
        page = bank.export_markdown(tmp_path / "b.md").read_text()
    records = [dict(id=str(i), user="a", session=None, kind=EVIL, distance=None, right=1, seconds=1.0, read=1,
                    written=1, building=None) for i in range(3)]
    runs = {EVIL: records, "plain": records}
    run = Run(tmp_path / "run")
    run.begin({k: EVIL for k in ("backbone", "data", "policy", "credit", "dtype", "prompts", "matcher")})
    (run.folder / "episodes.json").write_text("{}")
    half = {EVIL: dict(mean=.5, low=.4, high=.6)}
    run.finish({"before": half, "after": half, "seconds": 2.0, "versions": {EVIL: EVIL}})
    card = write_card(run, "ana/memory").read_text().split("---\n", 2)[2]
    texts = dict(bank=page, card=card, score=score_table(runs), kinds=group_table(runs, "kind"), cost=cost_table(runs),
                 comparison=comparison_table({EVIL: [1.0, 0.0], "b": [1.0, 1.0]}, EVIL))
    for name, text in texts.items():
        page = re.sub(r"<pre>.*?</pre>", "", rendered(text), flags=re.S) # code blocks are text
        assert is_harmless(page) and "<h1>h" not in page, f"{name}: {text}"
        if name not in ("bank", "card"): # every line of a table has as many cells as its head
            bars = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()}
            assert len(bars) == 1 and "<table>" in page, f"{name}: {text}"
    assert not is_harmless(rendered(EVIL)) and markdown_text("by_type *") == "by_type *"


# ---- terminals
def is_plain(text, bars=""):
    return all(c in "\n\t\u200c\u200d" + bars or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
               for c in text)

SLY = "tea \x1b[2J\x1b]0;title\x07\x9b31m\u202egnirts\u2066\u200f\ud83d\u2028\r back"

def test_printable_and_the_streams_leave_nothing_for_a_terminal():
    every = "".join(map(chr, [*range(0x3100), *range(0xd7f0, 0xe010), *range(0xfe00, 0x10100),
                              *range(0xe0000, 0xe0100)]))
    assert is_plain(printable(every)) and "\n" not in printable("a\nb", True) and is_plain(printable(SLY))
    out = io.StringIO()
    old, sys.stdout = sys.stdout, out
    try:
        with visible_streams():
            print(SLY, end="|"); sys.stdout.writelines([SLY])
            assert sys.stdout.getvalue() and not sys.stdout.isatty() # the rest is the stream's own
    finally: sys.stdout = old
    assert is_plain(out.getvalue()) and "\\x1b[2J" in out.getvalue() and "\\u202e" in out.getvalue()

@pytest.fixture
def sly(server, tmp_path):
    "A server, a memory, a bank and files of which each says what a terminal would obey."
    from comam_nb.memcollab.bank import ConstraintBank
    from comam_nb.store.items import MemoryItem, MemoryStore
    text = SLY.replace("\ud83d", "") # half a character is refused by both stores
    server.answer = lambda prompt: (f"<final_answer> {SLY} </final_answer>" if "<final_answer>" in prompt else
                                    f"Likes {SLY}. [1]")
    with MemoryStore(tmp_path / "me.db") as store: store.add(MemoryItem(text, text, text, by=text))
    lesson = Constraint(f"tea {text}", f"counting {text}", "", f"kind {text}", models=(text,))
    with ConstraintBank(tmp_path / "bank.db") as bank: bank.add([lesson], note=text, check=False)
    check = {"kind": "exact", "answer": "5"}
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"id": SLY, "prompt": SLY, "check": check}) + "\n")
    said = {"messages": [{"role": "user", "content": SLY}], "questions": [{"query": SLY, "answer": SLY, "kind": SLY}]}
    (tmp_path / "log.jsonl").write_text(json.dumps(said) + "\n")
    (tmp_path / "broken.jsonl").write_text(f'{{"{text}": \n')
    return SimpleNamespace(dir=tmp_path, text=text, spec=f"{server.url}#m", server=server)

SAID = ["memory list {d}/me.db", "memory stats {d}/me.db", "memory search {d}/me.db --user {t} --query tea",
        "memory forget {d}/me.db --user {t} --id {t}x", "memory list {d}/me.db --user eve", "memory {t}",
        "memory import {d}/me.db --file {d}/broken.jsonl", "--{t}", "chat --backbone {m} --memory {d}/me.db --user {t}",
        "answer --history {d}/log.jsonl --query tea --backbone {m}", "answer --query {t} --history {t} --backbone {m}",
        "eval --system recent --data chat:{d}/log.jsonl --out {d}/{t} --backbone {m}",
        "memcollab show --bank {d}/bank.db", "memcollab show --bank {d}/bank.db --query tea",
        "memcollab show --bank {d}/bank.db --query tea --category {t}", "memcollab show --bank {d}/{t}",
        "memcollab build --bank {d}/new.db --tasks {d}/tasks.jsonl --weak plain:{m} --strong cot:{m}",
        "memcollab build --bank {d}/new.db --tasks {d}/broken.jsonl --weak plain:{m} --strong cot:{m}",
        "memcollab solve --bank {d}/bank.db --prompt {t} --agent {m}",
        "memcollab eval --bank {d}/bank.db --tasks {d}/tasks.jsonl --agent {m}", "memcollab {t}"]

def told(command, capsys, **names):
    from comam_nb.cli.__main__ import main
    from comam_nb.cli.memcollab import main as memcollab
    argv = [a.format(**names) for a in command.split(" ")]
    try: (memcollab if argv[0] == "memcollab" else main)(argv[argv[0] == "memcollab":])
    except SystemExit: pass
    return capsys.readouterr()

@pytest.mark.parametrize("mood", ["well", 400])
def test_no_command_sends_what_a_terminal_would_obey(mood, sly, capsys, monkeypatch):
    if mood == 400:
        body = json.dumps({"error": {"message": SLY}}).encode()
        sly.server.always = lambda h: h.send(400, body)
    for command in SAID:
        if mood == 400 and "{m}" not in command: continue
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"Hello\n/memory\n/forget {sly.text}\n"))
        out, err = told(command, capsys, d=sly.dir, t=sly.text, m=sly.spec)
        assert is_plain(out) and is_plain(err, "\r"), (command, out, err)
        assert out + err, command
        for line in err.splitlines(): assert "\r back" not in line, (command, err)


# ---- keys
KEY, LOGIN = "qT7-planted/key+4711", "ana:pl4nted p4ss"
SECRETS = [KEY, KEY[:10], "pl4nted%20p4ss", "pl4nted p4ss", "pl4nted", base64.b64encode(LOGIN.encode()).decode(),
           "pl4nted-as", "sk-other-99887766", "hunter2hunter2"]
OTHERS = "not sk-other-99887766, at https://bob:hunter2hunter2@proxy/v1"

def echoes(status):
    "A server that says again what it was sent, so that a line is cut at every place of the key."
    def act(h):
        n = len(h.server.log)
        sent = h.headers["authorization"]
        login = base64.b64decode(sent[6:]).decode() if sent.startswith("Basic ") else ""
        body = "x" * (300 - 7 * (n % 60)) + f"wrong key {KEY} in {sent} {login}, {OTHERS}"
        h.send(status, body.encode() if n % 2 else json.dumps({"error": {"message": body}}).encode())
    return act

def test_planted_keys_are_nowhere(server, tmp_path, capsys, monkeypatch):
    from comam_nb.lm.endpoints import EndpointChat
    old = EndpointChat.__init__
    monkeypatch.setattr(EndpointChat, "__init__", lambda s, *a, **k: old(s, *a, **{**k, "backoff": .001, "retries": 1}))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (tmp_path / "tasks.jsonl").write_text('{"id": "a", "prompt": "2 + 3?", "check": {"kind": "exact", "answer": "5"}}')
    (tmp_path / "log.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "My cat is Miso."}],
                                                    "questions": [{"query": "Cat?", "answer": "Miso"}]}) + "\n")
    url = server.url.replace("://", "://ana:pl4nted%20p4ss@")
    alone, seen = server.url.replace("://", "://pl4nted-as-a-name@"), ""
    pool = f"{url},{server.url.replace('127.0.0.1', 'ana:pl4nted%20p4ss@localhost')}"
    commands = [c for c in SAID if "{m}" in c and "{t}" not in c] + ["chat --backbone {m}"]
    for status, address in ((200, url), (400, pool), (401, alone), (500, pool), (500, alone)):
        server.always = echoes(status)
        for command in commands:
            monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
            seen += "".join(told(command, capsys, d=tmp_path, m=f"{address}#m"))
        with pytest.raises(Exception) as e: EndpointChat(alone, "m", retries=0).chat([{"role": "user", "content": "?"}])
        seen += str(e.value) + repr(EndpointChat(alone, "m"))
    server.always = None
    for command in commands[:-1]: seen += "".join(told(command, capsys, d=tmp_path, m=f"{pool}#m"))
    seen += "".join(p.read_bytes().decode("utf-8", "replace") + str(p) for p in tmp_path.rglob("*") if p.is_file())
    assert len(server.log) > 40 and "wrong key …" in seen
    found = [re.search(rf".{{0,80}}{re.escape(s)}.{{0,40}}", seen, re.S)[0] for s in SECRETS if s in seen]
    assert not found, found[0]
