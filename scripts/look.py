"""What a reader sees: notebooks in JupyterLab in a headless Chromium, Run All, a picture of every screen.

    python scripts/look.py                                        # all chapters and walkthroughs; 20 minutes and more
    python scripts/look.py nbs/book/07_credit.ipynb --out runs/looked

Says what a reader would stumble over, and then ends with exit code 1: code or output wider than its box, what went to
stderr, failed cells, errors of the page, cells that took over five seconds without a progress bar, formulas that are
not drawn, a slider whose click changes nothing. Works on copies. Cells marked *gpu* are not run where there is no card.

Needs `pip install -c constraints.txt -e ".[dev,look]"` and a Chromium or Chrome (Debian: `apt-get install chromium`).
"""
import argparse, json, os, re, secrets, shutil, signal, socket, subprocess, sys, tempfile, time
import urllib.parse, urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {  # of JupyterLab: every cell is on the page, cells know their seconds, nothing is fetched
    "notebook-extension/tracker": {"windowingMode": "none", "recordTiming": True},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosave": False}}

BOX = ".jp-NotebookPanel .jp-WindowedPanel-outer"  # what scrolls

# In the page: what is wrong with each cell of the notebook that was run
FIND = r"""() => {
  const wide = e => e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 1
  const found = [], say = (i, what) => found.push([i, what.trim().slice(0, 300)])
  window.jupyterapp.shell.currentWidget.content.widgets.forEach((cell, i) => {
    const all = css => [...cell.node.querySelectorAll(css)]
    if (all('.jp-InputArea .cm-scroller').some(wide)) say(i, 'code is cut off: ' + cell.model.sharedModel.source
      .split('\n').reduce((a, b) => b.length > a.length ? b : a))
    if (all('.jp-MarkdownOutput, .jp-MarkdownOutput pre, .jp-MarkdownOutput mjx-container').some(wide))
      say(i, 'text is cut off: ' + cell.model.sharedModel.source)
    for (const box of all('.jp-OutputArea-output')) {
      if ([box, ...box.querySelectorAll('*')].some(e => wide(e) && getComputedStyle(e).overflowX != 'visible'))
        say(i, 'an output is cut off: ' + box.innerText)
      for (const pre of box.querySelectorAll('pre')) {
        const one = document.createElement('span'); one.textContent = 'm'; pre.append(one)
        const room = Math.floor(pre.clientWidth / one.getBoundingClientRect().width); one.remove()
        const long = pre.textContent.split('\n').find(line => line.length > room)
        if (long) say(i, `an output line of ${long.length} characters where ${room} fit: ` + long)
      }
    }
    for (const e of all('mjx-merror')) say(i, 'a formula is not drawn: ' + e.textContent)
    for (const box of all('.jp-MarkdownOutput')) {
      const text = box.cloneNode(true); text.querySelectorAll('code, pre, mjx-container').forEach(e => e.remove())
      const left = text.textContent.match(/\$[^$]+\$|\\[a-zA-Z]{3,}/)
      if (left) say(i, 'a formula is not drawn: ' + left[0])
    }
    if (cell.model.type != 'code') return
    const outputs = cell.model.outputs.toJSON(), text = JSON.stringify(outputs)
    for (const o of outputs) {
      if (o.name == 'stderr') say(i, 'stderr: ' + [o.text].flat().join(''))
      if (o.output_type == 'error') say(i, `error: ${o.ename}: ${o.evalue}`)
    }
    const t = cell.model.getMetadata('execution') || {}
    const s = (Date.parse(t['shell.execute_reply']) - Date.parse(t['iopub.execute_input'])) / 1000
    const source = cell.model.sharedModel.source
    const excused = /^(import|from) /m.test(source) || /%\||it\/s|progress|widget-view/.test(text)
    if (s > SECONDS && !excused) say(i, `${s.toFixed(1)} s without a progress bar`)
  })
  return found
}"""

# In the page: Run All without the cells that need a card, and wait until the kernel is idle
RUN = r"""async (card) => {
  const panel = window.jupyterapp.shell.currentWidget, nb = panel.content
  await panel.context.ready; await panel.sessionContext.ready
  nb.activeCellIndex = 0; nb.deselectAll()
  nb.widgets.forEach(c => { if (card || !/^#\| *gpu/m.test(c.model.sharedModel.source)) nb.select(c) })
  await window.jupyterapp.commands.execute('notebook:run-cell')
  while (panel.sessionContext.session.kernel.status != 'idle') await new Promise(r => setTimeout(r, 100))
}"""

@contextmanager
def jupyter(folder: Path):
    "A Jupyter server of its own over `folder`; ends with its kernels. Gives its address and token."
    for name, values in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port, token = s.getsockname()[1], secrets.token_hex(16)
    env = os.environ | {"JUPYTER_TOKEN": token, "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
                        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"), "PYTHONPATH": os.pathsep.join(
                            [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)}
    env |= {f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser",
               f"--ServerApp.root_dir={folder / 'nbs'}", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
               "--LabApp.extension_manager=readonly"]
    with open(folder / "server.log", "w") as log: server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        url, log = f"http://127.0.0.1:{port}", folder / "server.log"
        for _ in range(1800):
            if server.poll() is not None: raise OSError(f"JupyterLab ended: {log.read_text()[-300:].strip()}")
            try: urllib.request.urlopen(f"{url}/api?token={token}").close() # nosec B310: our own server
            except OSError: time.sleep(0.1)
            else: break
        else: raise OSError("JupyterLab did not answer within three minutes")
        yield url, token
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()

def chromium():
    "The browser's path, or None."
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

def numbers(page):
    "The numbers that stand in a control's output, also in its drawings."
    parts = page.evaluate("""() => [...document.querySelectorAll('.jp-Cell:has(.noUi-target) .widget-output')]
      .map(e => e.innerText + [...e.querySelectorAll('img, svg')].map(i => i.src || i.outerHTML).join(' '))""")
    return re.findall(r"-?\d+\.\d+", re.sub(r"<title>.*?</title>|<[^>]*>", " ", urllib.parse.unquote(" ".join(parts))))

def click(page):
    "Click on the first slider's track near its left end; what is wrong with what follows, or None."
    page.locator(".noUi-target").first.scroll_into_view_if_needed()
    before, box = numbers(page), page.locator(".noUi-target").first.bounding_box()
    page.mouse.click(box["x"] + 0.1 * box["width"], box["y"] + box["height"] / 2)
    for _ in range(100):
        after = numbers(page)
        if after and after != before: return print(f"a click: {' '.join(before)} -> {' '.join(after)}")
        page.wait_for_timeout(100)
    return "a click on the slider changes no number"

def look(page, url, token, name, out, limit, seconds):
    "Open one notebook, run it, picture it: what was found, as (cell, what)."
    page.set_default_timeout(180_000)
    errors = []
    # the Colab badge, and help for editors that not every server has
    offline = lambda m: m.text.startswith("Failed to load") and (
        not m.location["url"].startswith(url) or m.location["url"].startswith(f"{url}/lsp/"))
    complain = lambda text: errors.append((None, f"page: {text[:300]}"))
    heard = lambda m: complain(f"{m.text} {m.location.get('url', '')}")
    page.on("console", lambda m: m.type == "error" and not offline(m) and heard(m))
    page.on("pageerror", lambda e: complain(str(e)))
    page.goto(f"{url}/lab/workspaces/{Path(name).stem}/tree/{name}?token={token}")
    page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel")
    card = shutil.which("nvidia-smi") is not None
    done = page.evaluate(f"card => Promise.race([({RUN})(card).then(() => true), "
                         f"new Promise(r => setTimeout(r, {1000 * limit}))])", card)
    if not done: errors.append((None, f"not idle after {limit} s"))
    page.wait_for_timeout(500)  # formulas and pictures are drawn
    found = errors + [tuple(f) for f in page.evaluate(FIND.replace("SECONDS", str(seconds)))]
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.png"): old.unlink()
    step, whole = page.evaluate("""box => { const b = document.querySelector(box)
      const last = [...document.querySelectorAll('.jp-Notebook-cell')].at(-1).getBoundingClientRect().bottom
      return [b.clientHeight - 40, last - b.getBoundingClientRect().top + b.scrollTop] }""", BOX)
    for n in range(max(1, -(-int(whole) // int(step)))):
        page.evaluate("([box, y]) => document.querySelector(box).scrollTo(0, y)", [BOX, n * step])
        page.wait_for_timeout(100)
        page.screenshot(path=str(out / f"{n:02}.png"))
    if page.locator(".noUi-target").count():
        if wrong := click(page): found.append((None, wrong))
        page.screenshot(path=str(out / "clicked.png"))
    elif page.evaluate("() => window.jupyterapp.shell.currentWidget.content.widgets.some(c => c.model.type == 'code' "
                       "&& c.model.sharedModel.source.includes('interact('))"):
        found.append((None, "a control is asked for, but none is there: pip install ipywidgets"))
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    return found

def look_at_all(names, folder, browser, a):
    "One after the other: name, what was found, seconds."
    from playwright.sync_api import Error, sync_playwright
    with jupyter(folder) as (url, token), sync_playwright() as p:
        try: b = p.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-background-networking"])
        except Error as e: raise OSError(f"{browser} does not start: {e.message.splitlines()[0]}") from e
        for name in names:
            began, out = time.time(), a.out / name.removesuffix(".ipynb")
            page = b.new_page(viewport={"width": 1280, "height": a.height})
            try: found = look(page, url, token, name, out, a.limit, a.seconds)
            except Error as e: found = [(None, e.message.splitlines()[0])]
            finally: page.close()
            yield name, found, time.time() - began
        b.close()

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="none: all chapters and walkthroughs")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "looked", help="folder for the pictures")
    parser.add_argument("--height", type=int, default=900, help="of the window in pixels; it is 1280 wide")
    parser.add_argument("--seconds", type=float, default=5, help="so long a cell may run without a progress bar")
    parser.add_argument("--limit", type=float, default=1200, help="seconds for one notebook")
    a, home = parser.parse_args(argv), ROOT / "nbs"
    chosen = [p.resolve() for p in a.notebooks] or [
        p for room in ("book", "walkthroughs") for p in sorted((home / room).glob("*.ipynb"))]
    for p in chosen:
        if not (p.is_file() and p.suffix == ".ipynb"): parser.error(f"{p}: no notebook")
    if missing := [m for m in ("playwright", "jupyterlab") if not find_spec(m)]:
        parser.error(f"no {missing[0]}: pip install -c constraints.txt -e '.[dev,look]'")
    if not (browser := chromium()): parser.error("no Chromium on the PATH: on Debian, apt-get install chromium")
    names = {(p.relative_to(home) if p.is_relative_to(home) else Path(p.name)).as_posix(): p for p in chosen}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: what was started is ended
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, p in names.items():
            (copy := Path(folder) / "nbs" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(p, copy)
        try:
            for name, found, took in look_at_all(names, Path(folder), browser, a):
                total += len(found)
                print(f"{name}: {len(found) or 'nothing'} found, {took:.0f} s", flush=True)
                for cell, what in found: print(f"    {'' if cell is None else f'cell {cell}: '}{what}", flush=True)
        except OSError as e: parser.error(str(e))
    print(f"pictures: {a.out}")
    return int(total > 0)

if __name__ == "__main__": sys.exit(main())
