"scripts/look.py finds what a reader would stumble over. What needs a browser skips without one."
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "look.py"
BROWSER = all(map(find_spec, ("playwright", "ipywidgets"))) and any(map(shutil.which, ("chromium", "google-chrome")))
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
needs_browser = pytest.mark.skipif(not BROWSER, reason="needs the extra look and a Chromium on the PATH")

def look(*args, **kwargs):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True, **kwargs)

def notebook(path, *cells):
    "A notebook of code cells; a text that begins with # and a blank is prose."
    def cell(i, text):
        prose = {"cell_type": "markdown", "id": f"c{i}", "metadata": {}, "source": text}
        return prose if text.startswith("# ") else prose | {"cell_type": "code", "outputs": [], "execution_count": None}
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": KERNEL,
                                "cells": [cell(i, text) for i, text in enumerate(cells)]}))
    return path

def test_what_is_missing_is_said_in_one_line(tmp_path):
    for args, why in ((["nowhere.ipynb"], "no notebook"), ([SCRIPT], "no notebook"),
                      ([notebook(tmp_path / "a.ipynb", "1")], "look.py: error: no ")):
        done = look(*args, env={"PATH": str(tmp_path)})
        assert done.returncode == 2 and why in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr

@needs_browser
@pytest.mark.slow
def test_every_fault_is_found_and_a_good_notebook_has_none(tmp_path):
    slider = "from ipywidgets import interact\ninteract(lambda x={}: print(f'{{{}:.2f}}'), x=(0., 1.))"
    bad = notebook(
        tmp_path / "bad.ipynb", f"x = '{'long ' * 40}'", "# $\\frac{1$ and $\\nosuch$", f"print('wide ' * 40)",
        "import sys; print('oops', file=sys.stderr)", "__import__('time').sleep(2)",
        "from IPython.display import HTML, Javascript\n"
        "HTML('<div style=\"overflow:auto\"><div style=\"width:3000px\">x</div></div>')",
        "Javascript('console.error(\"broken\")')", slider.format(.5, .25), "1/0")
    good = notebook(tmp_path / "good.ipynb", "# $\\frac{1}{2}$", "1 + 1", slider.format(.5, "x"))
    done = look(bad, good, "--out", tmp_path, "--seconds", 1, timeout=280)
    print(done.stdout, done.stderr)
    assert done.returncode == 1 and "good.ipynb: nothing found" in done.stdout and "a click: 0.50 -> 0.1" in done.stdout
    for fault in ("cell 0: code is cut off: x = ", "cell 1: a formula is not drawn", "cell 2: an output line of 200",
                  "cell 3: stderr: oops", "cell 4: 2.", "cell 5: an output is cut off", "page: broken",
                  "a click on the slider changes no number", "cell 8: error: ZeroDivisionError: division by zero"):
        assert fault in done.stdout, fault
    assert (tmp_path / "good" / "00.png").stat().st_size > 10_000
