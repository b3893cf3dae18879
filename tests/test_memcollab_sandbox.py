"""comam_nb.checks.sandbox: real reference solutions pass, hostile programs do not, and nothing of them is left.

Every hostile program below computes the right answers *if and only if* its attack worked, so a pass is a breach and a
leak alike. Programs that could do harm where a wall is missing say which wall they need, and are skipped where
`confinement()` says that it does not stand."""
import gzip, json, math, os, socket, subprocess, sys, tempfile, time, warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from comam_nb.checks import sandbox
from comam_nb.checks.codec import _decode, _encode
from comam_nb.checks.sandbox import (Execution, Verdict, _globals_used, _names_under_test, _walls_here, _confinement,
                                     execute, run_python)
from comam_nb.base.errors import MemCollabError

TESTS = ["assert f(3) == 9", "assert f(-2) == 4", "assert f(10) == 100"]
TOKEN = f"comam-sandbox-{os.getpid()}\0".encode()
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def survivors():
    "Processes that carry this process's mark on their command line; a fork inherits it."
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            if TOKEN in (p/"cmdline").read_bytes() + b"\0" and "\nState:\tZ" not in (p/"status").read_text():
                found.append(p.name)
        except OSError: pass
    return found


@pytest.fixture
def world(tmp_path, monkeypatch):
    "A place with secrets and a listening network; checks afterwards that nothing was touched and nobody is left."
    (tmp_path/"tmp").mkdir()
    (home := tmp_path/"home").mkdir()
    secret = home/"secret.txt"
    secret.write_text("the parent's secret")
    secret.chmod(0o640)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path/"tmp"))
    monkeypatch.setenv("COMAM_TEST_SECRET", "sesame")
    server = socket.create_server(("127.0.0.1", 0))
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind(("127.0.0.1", 0))
    for s in (server, datagrams): s.setblocking(False)
    yield dict(HOME=str(home), SECRET=str(secret), CALLER=os.getpid(), PORT=server.getsockname()[1],
               UDP=datagrams.getsockname()[1])
    for s, hear in ((server, server.accept), (datagrams, lambda: datagrams.recv(100))):
        with pytest.raises(BlockingIOError): hear()
        s.close()
    assert {p.name for p in home.iterdir()} == {"secret.txt"} and secret.read_text() == "the parent's secret"
    assert secret.stat().st_mode & 0o777 == 0o640 and secret.stat().st_nlink == 1
    assert list((tmp_path/"tmp").iterdir()) == []
    if sys.platform == "linux": assert survivors() == []


# name, the behaviour of confinement() that it needs to be harmless ("" for none), program;
# `won` is whether an attack worked
HOSTILE, ATTACKS = [], []
def program(name, code, needs=""): HOSTILE.append(pytest.param(code, needs, id=name))
def attack(name, body, needs=""):
    lines = "\n".join("        " + l for l in body.strip("\n").split("\n"))
    ATTACKS.append(pytest.param(lines, needs, id=name))
    program(name,
            f"import os, sys\ndef attack():\n    try:\n{lines}\n    except (OSError, MemoryError, ImportError, "
            f"AttributeError, ValueError): return False\n"
                  "won = attack()\ndef f(x): return x*x if won else None", needs)

# ---- forged values
program("eq",
        "class Y:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n    __hash__ = "
        "None\ndef f(x): return Y()")
program("eq_reflected_int",
        "class Y(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\ndef f(x): return Y(5)")
program("eq_str",
        "class Y(str):\n    def __eq__(self, o): return True\n    __hash__ = str.__hash__\ndef f(x): return Y('9')")
program("eq_list", "class Y(list):\n    def __eq__(self, o): return True\ndef f(x): return Y()")
program("eq_dict",
        "class Y(dict):\n    def __eq__(self, o): return True\n    def items(self): return Z()\nclass Z:\n    def "
        "__eq__(self, o): return True\ndef f(x): return Y(a=1)")
program("eq_float_subclass",
        "class Y(float):\n    def __eq__(self, o): return True\n    __hash__ = float.__hash__\ndef f(x): return "
        "Y('nan')")
program("claims_to_be_int",
        "class Y:\n    __class__ = int\n    def __eq__(self, o): return True\n    def __int__(self): return 9\ndef "
        "f(x): return Y()")
program("metaclass_eq",
        "class M(type):\n    def __eq__(cls, o): return True\n    __hash__ = type.__hash__\nclass Y(metaclass=M): "
        "pass\ndef f(x): return Y")
program("reduce",
        "class Y:\n    def __reduce__(self): return (eval, ('9',))\n    def __eq__(self, o): return True\ndef f(x): "
        "return Y()")
program("text_that_wants_to_be_evaluated", "def f(x): return '__import__(\"os\")._exit(0)'")
program("nan", "def f(x): return float('nan')")
# ---- forged verdicts
program("sys_exit", "import sys\nsys.exit(0)")
program("sys_exit_in_call", "import sys\ndef f(x): sys.exit(0)")
program("os_exit", "import os\nos._exit(0)")
program("os_exit_in_call", "import os\ndef f(x): os._exit(0)")
program("atexit", "import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x): raise SystemExit(0)")
program("assertion_error_replaced",
        "import builtins\nclass Quiet(BaseException):\n    def __new__(cls, *a): raise "
        "SystemExit(0)\nbuiltins.AssertionError = Quiet\ndef f(x): return 0")
program("builtins_replaced",
        "import builtins\nbuiltins.all = builtins.any = builtins.bool = builtins.isinstance = lambda *a: True\ndef "
        "f(x): return 0")
program("excepthook",
        "import sys\nsys.excepthook = lambda *a: None\nsys.unraisablehook = lambda *a: None\n"
        "def f(x): raise ValueError")
program("trace",
        "import sys\nsys.settrace(lambda fr, ev, arg: fr.f_locals.update(passed=True, reason='passed') or None)\ndef "
        "f(x): return 0")
program("stop_iteration", "def f(x): raise StopIteration")
program("generator_exit", "def f(x): raise GeneratorExit")
program("own_assertion_error", "class E(AssertionError):\n    def __str__(self): return 'passed'\ndef f(x): raise E")
program("exception_that_cannot_be_printed", "class E(Exception):\n    def __str__(self): raise E\ndef f(x): raise E")
program("frames_patched", """
import sys
frame = sys._getframe()
while frame:
    for space in (frame.f_globals, frame.f_locals):
        for k, v in list(space.items()):
            if k in ('passed', 'reason', 'verdict', 'result'): space[k] = 'passed'
    frame = frame.f_back
def f(x): return 0""")
program("protocol_patched",
        "import __main__, json\n__main__._encode = lambda x, keep: True\njson.dumps = lambda *a, **k: '[true, "
        "\"passed\"]'\ndef f(x): return 0")
program("verdict_on_every_file",
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'[true, \"passed\"]\\n')\n    except OSError: "
        "pass\ndef f(x): return 0")
program("answers_before_asked",
        "import os\nfor fd in range(3, 64):\n    for v in (b'null', b'[\"h\", 0, \"f\"]', b'9', b'4', b'100'):\n      "
        "  try: os.write(fd, b'[\"0000000000000000\", \"value\", ' + v + b']\\n')\n        except OSError: pass\ndef "
        "f(x): return 0")
program("garbage_on_the_wire",
        "import os\ndef f(x):\n    for fd in range(3, 64):\n        try: os.write(fd, bytes(range(256)) * 20 + "
        "b'\\n')\n        except OSError: pass\n    return x*x")
program("answers_twice",
        "import os\nreal = os.write\nos.write = lambda fd, b: real(fd, bytes(b) * 2) and len(b)\ndef f(x): return x*x")
program("closes_every_file", "import os\nos.closerange(0, 64)\ndef f(x): return x*x")
program("handle_of_nothing",
        "import json\nreal = json.dumps\njson.dumps = lambda r, **k: real([r[0], r[1], ['h', 10**9, 'int']])\ndef "
        "f(x): return 0")
# ---- looking for the expected values
attack("tests_in_memory",
       "import gc\nneedle = 'assert ' + 'f(3)'\nreturn any(isinstance(v, str) and needle in v and 'needle' not in v "
       "for o in gc.get_objects() if isinstance(o, dict) for v in list(o.values()))")
attack("tests_in_inherited_files",
       "for fd in range(64):\n    try:\n        if b'assert f(' in os.pread(fd, 1 << 16, 0): return True\n    except "
       "OSError: pass")
attack("tests_in_frames",
       "fr = sys._getframe()\nwhile fr:\n    if any('assert f(' + '3' in repr(v)[:5000] for v in "
       "list(fr.f_locals.values())): return True\n    fr = fr.f_back")
attack("judges_memory",
       "import ctypes\nlibc = ctypes.CDLL(None)\nreturn any(libc.ptrace(16, p, None, None) == 0 for p in range(1, "
       "400) if p != os.getpid())", "signals to others")
# ---- time
program("endless_loop_that_catches_everything",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass")
program("blocks_every_signal",
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nfor s in (signal.SIGTERM, "
        "signal.SIGINT, signal.SIGHUP, signal.SIGALRM): signal.signal(s, signal.SIG_IGN)\nwhile True: pass")
program("sleeps", "import time\ndef f(x): time.sleep(1000)")
program("threads_that_never_end",
        "import threading\ndef spin():\n    while True: pass\nfor _ in range(8): "
        "threading.Thread(target=spin).start()\ndef f(x):\n    while True: pass")
program("a_thousand_threads",
        "import ctypes, threading, time\nctypes.CDLL(None).mallopt(-8, 1)\nthreading.stack_size(32768)\n"
        "try:\n    for _ in range(1000): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
        "    time.sleep(.3)\n    won = True\nexcept RuntimeError: won = False\ndef f(x): return x*x if won else 0")
program("stops_itself", "import os, signal\ndef f(x):\n    os.kill(os.getpid(), signal.SIGSTOP)\n    while True: pass")
program("regex_that_never_ends", "import re\ndef f(x): return re.match('(a+)+$', 'a'*60 + 'b')")
program("endless_generator", "def f(x):\n    while True: yield x")
program("answers_slowly_for_ever",
        "import os\nreal = os.write\ndef drip(fd, b):\n    while True: real(fd, b'1')\nos.write = drip\ndef f(x): "
        "return 9")
# ---- memory, stack, disk, output
program("memory_bomb", "x = bytearray(2**33)")
program("memory_bomb_slow", "x = []\nwhile True: x.append(bytearray(2**20))", "memory")
attack("memory_mapped", "import mmap\nm = [mmap.mmap(-1, 2**26) for _ in range(64)]\nreturn True", "memory")
program("memory_bomb_that_catches",
        "x = []\ndef f(n):\n    while True:\n        try:\n            while True: x.append(' ' * 2**20)\n        "
        "except MemoryError: pass", "memory")
program("deep_recursion", "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x) + 1")
program("deep_answer", "def f(x):\n    v = []\n    for _ in range(10**6): v = [v]\n    return v")
program("deep_answer_by_hand",
        "import json\nreal = json.dumps\ndef dumps(r, **k): return '[\"%s\", \"value\", ' % r[0] + '[\"l\", [' * "
        "10**6 + ']]' * 10**6 + ']'\njson.dumps = dumps\ndef f(x): return 0")
program("contains_itself", "def f(x):\n    v = []\n    v.append(v)\n    return v")
program("huge_answer", "def f(x): return 'x' * 2**27")
program("huge_int", "def f(x): return 1 << (2**28)")
program("huge_int_in_decimal",
        "import json\nreal = json.dumps\njson.dumps = lambda r, **k: '[\"%s\", \"value\", %s]' % (r[0], '9' * "
        "10**6)\ndef f(x): return 0")
program("output_flood", "import sys\nwhile True: print('x' * 2**16); print('y' * 2**16, file=sys.stderr)")
attack("huge_file",
       "with open('big', 'wb') as f:\n    for _ in range(256): f.write(bytes(2**20))\nreturn os.path.getsize('big') > "
       "2**27")
attack("many_files", "for i in range(20):\n    with open(str(i), 'wb') as f: f.write(bytes(15 * 2**20))\nreturn True",
       "disk")
program("folders_too_deep_to_remove",
        "import os\ntry:\n    while True:\n        os.mkdir('d')\n        os.chdir('d')\nexcept OSError: pass\ndef "
        "f(x): return 0", "disk")
program("folders_that_cannot_be_read",
        "import os\nos.makedirs('a/b')\ntry: os.chmod('a', 0)\nexcept OSError: pass\ndef f(x): return 0")
# ---- processes
attack("fork_bomb", "while True: os.fork()", "processes")
attack("fork_once", "return os.fork() >= 0", "processes")
attack("fork_by_number",
       "import ctypes\nlibc = ctypes.CDLL(None)\nreturn any(libc.syscall(*c) >= 0 for c in ((57,), (58,), (56, 17, 0, "
       "0, 0, 0), (435, bytes(88), 88)))", "processes")
attack("daemon",
       "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        import time\n        time.sleep(300)\n   "
       " os._exit(0)\nreturn True", "processes")
attack("subprocess", "import subprocess\nreturn subprocess.run(['/bin/sh', '-c', 'exit 0']).returncode == 0",
       "processes")
attack("posix_spawn", "return os.posix_spawn('/bin/sleep', ['sleep', '300'], {}) > 0", "processes")
attack("os_system", "return os.system('true') == 0", "processes")
attack("exec", "os.execv('/bin/sleep', ['sleep', '300'])", "processes")
attack("exec_of_a_memory_file",
       "fd = os.memfd_create('x')\nos.write(fd, open('/bin/true', 'rb').read())\nos.execve(fd, ['x'], {})", "processes")
attack("zombies", "for _ in range(5):\n    if os.fork() == 0: os._exit(0)\nreturn True", "processes")
attack("multiprocessing",
       "import multiprocessing\np = multiprocessing.get_context('fork').Process(target=print)\np.start()\nreturn True",
       "processes")
# ---- other people's processes
attack("kill_parent", "os.kill(os.getppid(), 9)\nreturn os.getppid() > 0", "signals to others")
attack("kill_caller", "os.kill(CALLER, 9)\nreturn True", "signals to others")
attack("kill_everybody", "os.kill(-1, 9)\nreturn True", "signals to others")
attack("kill_own_group", "os.killpg(0, 15)\nreturn True", "signals to others")
attack("signal_by_fcntl",
       "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, 8, CALLER)\nfcntl.fcntl(r, 10, 9)\nreturn True",
       "signals to others")
attack("ptrace_caller", "import ctypes\nreturn ctypes.CDLL(None).ptrace(16, CALLER, None, None) == 0",
       "signals to others")
attack("callers_memory", "return len(open(f'/proc/{CALLER}/maps').read()) > 0", "reading outside")
attack("process_vm_readv",
       "import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\nr = libc.process_vm_readv(CALLER, None, 0, "
       "None, 0, 0)\nreturn r == 0", "signals to others")
attack("renice_caller", "os.setpriority(os.PRIO_PROCESS, CALLER, 19)\nreturn True", "signals to others")
attack("limit_callers_files", "import resource\nresource.prlimit(CALLER, resource.RLIMIT_NOFILE, (3, 3))\nreturn True",
       "signals to others")
attack("signal_by_ioctl",
       "import fcntl, socket, struct\na, b = socket.socketpair()\nfcntl.ioctl(a, 0x8901, struct.pack('i', CALLER))\n"
       "return True", "signals to others")
attack("queues_of_others", """
import ctypes
libc = ctypes.CDLL(None)
def stat(f): return any(getattr(libc, f)(i, *([0] if f == 'semctl' else []), 2, bytes(999)) >= 0 for i in range(99))
return stat('msgctl') or stat('shmctl') or stat('semctl') or libc.msgget(0, 0o600) >= 0""", "processes")
attack("watch_a_folder", """
import ctypes
libc = ctypes.CDLL(None)
return libc.inotify_add_watch(libc.inotify_init1(0), b'/etc', 0xfff) >= 0""", "watching files outside")
attack("told_of_changes", "import fcntl\nfcntl.fcntl(os.open(os.path.dirname(os.__file__), 0), 1026, 4)\nreturn True",
       "watching files outside")
attack("attributes_of_a_file", "return os.listxattr(SECRET) is not None", "reading outside")
attack("truncate_what_may_be_read", "os.close(os.open(SECRET, os.O_RDONLY | os.O_TRUNC))\nreturn True",
       "writing outside")
attack("lease_on_a_file", "import fcntl\nfcntl.fcntl(os.open(os.__file__, 0), 1024, 0)\nreturn True",
       "watching files outside")
# ---- files and the environment
attack("secret_file", "return 'secret' in open(SECRET).read()", "reading outside")
attack("etc_passwd", "return len(open('/etc/passwd').read()) > 0", "reading outside")
attack("list_home", "return len(os.listdir(HOME)) > 0", "reading outside")
attack("symlink_escape", "os.symlink(SECRET, 'link')\nreturn 'secret' in open('link').read()", "reading outside")
attack("hardlink_escape", "os.link(SECRET, 'link')\nreturn 'secret' in open('link').read()", "reading outside")
attack("dotdot_escape", "return 'secret' in open('../' * 40 + SECRET).read()", "reading outside")
attack("environment", "return 'COMAM_TEST_SECRET' in os.environ", "environment")
attack("environment_by_proc",
       "return any(b'COMAM_TEST' + b'_SECRET' in open(f'/proc/{p}/environ', 'rb').read() for p in ('self', "
       "os.getppid(), CALLER))", "environment")
attack("write_outside", "open(HOME + '/new', 'w').write('x')\nreturn True", "writing outside")
attack("append_outside", "open(SECRET, 'a').write('x')\nreturn True", "writing outside")
attack("truncate_outside", "os.truncate(SECRET, 0)\nreturn True", "writing outside")
attack("remove_outside", "os.unlink(SECRET)\nreturn True", "writing outside")
attack("rename_outside", "os.rename(SECRET, HOME + '/moved')\nreturn True", "writing outside")
attack("chmod_outside", "os.chmod(SECRET, 0o777)\nreturn True", "writing outside")
attack("touch_outside", "os.utime(SECRET, (0, 0))\nreturn True", "writing outside")
attack("symlink_then_write", "os.symlink(HOME, 'home')\nopen('home/new', 'w').write('x')\nreturn True",
       "writing outside")
attack("dev_shm", "open('/dev/shm/comam-test', 'w').write('x')\nreturn True", "writing outside")
attack("shared_memory_that_stays",
       "import ctypes\nlibc = ctypes.CDLL(None)\nreturn libc.shmget(0x636f6d61, 4096, 0o1666) >= 0 and libc.shmat(0, "
       "None, 0) == 0", "processes")
# ---- the network
attack("tcp", "import socket\nsocket.create_connection(('127.0.0.1', PORT), timeout=1)\nreturn True", "network")
attack("udp",
       "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', UDP))\nreturn True",
       "network")
attack("listen", "import socket\nsocket.create_server(('0.0.0.0', 0))\nreturn True", "network")
attack("abstract_socket", "import socket\nsocket.socket(socket.AF_UNIX).bind('\\0comam')\nreturn True", "network")
attack("dns", "import socket\nreturn bool(socket.getaddrinfo('localhost', 80))", "network")
attack("http", "import urllib.request\nreturn urllib.request.urlopen(f'http://127.0.0.1:{PORT}', timeout=1)", "network")
# ---- taking the walls down
attack("raise_limits",
       "import resource\nsoft, hard = resource.getrlimit(resource.RLIMIT_AS)\nresource.setrlimit(resource.RLIMIT_AS, "
       "(-1, -1))\nreturn True", "memory")
attack("become_root", "os.setuid(0)\nreturn open('/etc/shadow').read()", "reading outside")
attack("new_user_namespace", "import ctypes\nreturn ctypes.CDLL(None).unshare(0x10000000) == 0", "processes")
attack("mount", "import ctypes\nreturn ctypes.CDLL(None).mount(b'proc', b'.', b'proc', 0, None) == 0", "processes")
attack("chroot", "os.mkdir('r')\nos.chroot('r')\nreturn True", "processes")
attack("outlive_the_keeper", "import ctypes\nreturn ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0", "processes")
attack("new_session", "os.setsid()\nreturn True", "processes")


def need(behaviour):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if behaviour and not _confinement()[behaviour]: pytest.skip(f"this machine cannot stop: {behaviour}")


def test_the_set_is_large_enough(): assert len(HOSTILE) >= 40 and len({p.id for p in HOSTILE}) == len(HOSTILE)


@pytest.mark.parametrize("code, needs", HOSTILE)
def test_hostile_program_fails_and_leaves_nothing(code, needs, world):
    need(needs)
    verdict = run_python("\n".join(f"{k} = {v!r}" for k, v in world.items()) + "\n" + code, TESTS, timeout=1,
                         memory_mb=256)
    assert not verdict.passed and verdict.reason not in ("", "passed")
    assert "the sandbox itself broke" not in verdict.reason


@pytest.mark.parametrize("lines, needs", ATTACKS)
def test_hostile_script_gets_nowhere(lines, needs, world):
    need(needs)
    names, body = "\n".join(f"{k} = {v!r}" for k, v in world.items()), lines.replace("        ", "    ")
    code = f"{names}\nimport os, sys\ndef attack():\n{body}\nprint('WON' if attack() else 'lost')"
    ran = execute(code, timeout=1, memory_mb=256)
    assert "WON" not in ran.stdout and "sesame" not in ran.stdout + ran.stderr


def test_a_test_that_swallows_exceptions_cannot_be_used(world):
    swallow = ("ok = 0\nfor x, y in ((3, 9), (2, 4)):\n    try:\n        assert f(x) == y\n"
               "    except BaseException: pass")
    assert run_python("def f(x): return x*x", swallow).passed
    # a refusal is remembered
    assert not run_python("class Y:\n    def __eq__(self, o): return True\ndef f(x): return Y()", swallow).passed
    assert not run_python("import os\ndef f(x): os._exit(0)", swallow).passed
    assert not run_python("def f(x): raise StopIteration", "assert all(map(lambda x: f(x) == 9, [3]))").passed
    assert not run_python("def f(x): raise StopIteration", "assert list(map(f, [3])) == []").passed


# ---- with fewer walls, as on other machines: what is left still holds what it says
@linux
@pytest.mark.parametrize("walls", [(), ("limits",), ("limits", "namespaces"), ("limits", "landlock")],
                         ids=lambda w: "+".join(w) or "none")
def test_daemons_die_even_where_forking_cannot_be_forbidden(walls, world):
    code = ("import os, time\nfor _ in range(6):\n    try:\n        if os.fork() == 0:\n            os.setsid()\n     "
            "       if os.fork() == 0: time.sleep(300)\n            os._exit(0)\n"
            "    except BlockingIOError: pass   # RLIMIT_NPROC does bind others than root\ndef f(x): return x*x")
    # a race that an early version lost once in a while
    for _ in range(5):
        # forking is allowed here, and the answers are right
        assert run_python(code, TESTS, timeout=5, walls=walls).passed
        assert survivors() == []


@linux
@pytest.mark.parametrize("wall, body", [("landlock", "open(SECRET)"), ("seccomp", "os.fork()"),
                                        ("seccomp", "__import__('socket').socket()"),
    ("seccomp", "os.truncate(SECRET, 0)"), ("seccomp", "os.open(SECRET, os.O_RDONLY | os.O_TRUNC)"),
    ("seccomp", "import fcntl, socket\nfcntl.ioctl(socket.socketpair()[0], 0x8901, CALLER.to_bytes(4, 'little'))"),
    ("seccomp", "import ctypes\nif ctypes.CDLL(None).msgget(0, 0o600) < 0: raise OSError"),
    ("namespaces", "__import__('socket').create_connection(('127.0.0.1', PORT), timeout=1)"),
                                        ("namespaces", "os.kill(CALLER, 0)")])
def test_each_wall_holds_alone(wall, body, world):
    if wall not in _walls_here(): pytest.skip(f"no {wall} here")
    code = "\n".join(f"{k} = {v!r}" for k, v in world.items()) + f"\nimport os\nprint('before')\n{body}\nprint('WON')"
    ran = execute(code, timeout=3, walls=(wall,))
    assert ran.stdout == "before\n" and ran.reason.startswith("error: ")


def test_missing_walls_are_named_loudly():
    sandbox._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="NOT TIGHT.*reading outside.*System V queues.*none"):
        weak = _confinement(walls=())
    assert not weak["reading outside"] and not weak["processes"] and not weak["wall: seccomp"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _confinement(walls=()) == weak  # once is enough


@pytest.mark.parametrize("standing", [(), ("limits", "seccomp"), ("limits", "seccomp", "namespaces"),
                                      ("limits", "landlock", "seccomp")], ids=lambda w: "+".join(w) or "none")
def test_without_the_walls_that_protect_others_nothing_is_run(standing, monkeypatch, tmp_path):
    "A machine with fewer walls, played by leaving them out."
    if not set(standing) <= set(_walls_here()): pytest.skip("not even these here")
    real, gone = sandbox._try_walls, tmp_path / "gone"
    real(standing) # tried for real, before nothing is started
    monkeypatch.setattr(sandbox, "_try_walls", lambda walls: real(tuple(w for w in walls if w in standing)))
    monkeypatch.setattr(sandbox, "_run_child", lambda *a: gone.touch() or {})
    monkeypatch.delenv("COMAM_UNSAFE_OK", raising=False)
    run = lambda **k: (run_python("def f(x): return x*x", TESTS, **k), execute("print(1)", **k))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "landlock" in standing: run() # what is missing is a limit on the disk: a warning
        else:
            for f in (lambda: run_python("def f(x): return x*x", TESTS), lambda: execute("print(1)")):
                with pytest.raises(MemCollabError, match="^no code of a model is run here: it would not be kept "
                                   "from .*writing outside.*landlock.*--unsafe-ok") as e: f()
                assert "\n" not in str(e.value) and not gone.exists()
            if not standing: assert "System V queues and shared memory" in str(e.value)
            run(unsafe_ok=True)
            gone.unlink()
            monkeypatch.setenv("COMAM_UNSAFE_OK", "1")
            run()
    assert gone.exists()


@linux
@pytest.mark.parametrize("forks", [False, True], ids=["alone", "after a fork"])
def test_a_caller_that_is_killed_leaves_nothing(forks, tmp_path):
    "Also where a fork of the caller lives on, which has inherited all that the caller held."
    fork = "import os, time\n    if os.fork() == 0: print(os.getpid(), flush=True); time.sleep(99)"
    code = f"""import sys, tempfile, threading
tempfile.tempdir = sys.argv[1]
from comam_nb.checks.sandbox import execute, run_python
run_python('def f(x): return x', 'assert f(1) == 1')
print('ready', flush=True)
threading.Thread(target=execute, args=('while True: pass', 60)).start()
threading.Thread(target=run_python, args=('while True: pass', 'assert f(1) == 1', 60)).start()
if sys.stdin.readline():
    {fork if forks else 'pass'}
threading.Event().wait()"""
    caller = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    mark = f"comam-sandbox-{caller.pid}".encode()
    alive = lambda: [p for p in Path("/proc").glob("[0-9]*") if mark in read(p/"cmdline")]
    assert caller.stdout.readline() == "ready\n"
    wait_for(lambda: len(alive()) >= 5)   # two keepers, one judge, two candidates
    print("fork", file=caller.stdin, flush=True)
    other = int(caller.stdout.readline()) if forks else 0
    try:
        caller.kill(); caller.wait()
        wait_for(lambda: not alive() and not list(tmp_path.iterdir()))
    finally:
        if other: os.kill(other, 9)
        caller.stdout.close(); caller.stdin.close()


def read(path):
    try: return path.read_bytes()
    except OSError: return b""


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(.05)


# ---- what an honest test may be made of: tests above, the program below
V = """
class V:
    def __init__(self, x): self.x = x
    def __add__(self, o): return V(self.x + o.x)
    def __eq__(self, o): return self.x == o.x
    def __str__(self): return f'<{self.x}>'
"""
BAG = """
class Bag:
    def __init__(self, xs): self.xs = xs
    def __contains__(self, x): return x in self.xs
    def has(self, x): return x in self.xs
    def __len__(self): return len(self.xs)
"""
HONEST = """
## date given
from datetime import date
assert f(date(2020, 2, 28)) == 28
--
def f(d): return d.day
## times returned
from datetime import *
assert f(1) == datetime(2020, 1, 1, tzinfo=timezone.utc) + timedelta(hours=1)
assert g() == time(3)
--
from datetime import *
def f(h): return datetime(2020, 1, 1, h, tzinfo=timezone.utc)
def g(): return time(3)
## functions given
from operator import add
assert f(lambda v: v + 1, 3) == 4 and f(len, 'ab') == 2
assert f(str.upper, 'a') == 'A' and f([1].count, 1) == 1
from functools import partial
assert f(partial(add, 1), 2) == 3
--
def f(g, x): return g(x)
## a function that fails
def no(x): raise KeyError(x)
assert f(no) == ('a',)
--
def f(g):
    try: g('a')
    except KeyError as e: return e.args
## functions that call each other
def even(n, odd): return n == 0 or odd(n - 1, even)
assert f(4, even) is False
--
def f(n, even): return n != 0 and even(n - 1, f)
## a decorator
@f
def q(x):
    'says q'
    return x
assert q(3) == 4 and q.__name__ == 'q'
--
import functools
def f(g):
    @functools.wraps(g)
    def h(*a): return g(*a) + 1
    return h
## the tests' own class
class A:
    def __init__(self, v): self.v = v
    def __lt__(self, o): return self.v < o.v
assert f([A(2), A(1)]) == 2
assert g([A(2), A(1)]).v == 1
--
def f(xs): return max(x.v for x in xs)
def g(xs): return sorted(xs)[0]
## collections
from collections import *
assert f('aab').most_common(1) == [('a', 2)] and f('a')['z'] == 0
assert g()[5] == [] and h(1, 2).x == 1 and h(1, 2) == (1, 2)
assert o() == OrderedDict(a=1, b=2) and o() != OrderedDict(b=2, a=1)
assert q().maxlen == 2 and list(k({'a': 1})) == ['a'] and k({'a': 1}) == {'a'}
--
from collections import *
P = namedtuple('P', 'x y')
def f(s): return Counter(s)
def g(): return defaultdict(list)
def h(x, y): return P(x, y)
def o(): return OrderedDict(a=1, b=2)
def q(): return deque([1, 2, 3], 2)
def k(d): return d.keys()
## an enumeration
assert f(1) == C.RED and f('b') is C.BLUE and f(1).name == 'RED' and len(C) == 2
--
from enum import Enum
class C(Enum):
    RED = 1
    BLUE = 'b'
def f(x): return C(x)
## own errors
try: f(3)
except Base as e: assert e.code == 3 and str(e) == 'code 3'
else: assert False
try: f(4)
except ValueError as e: assert type(e).__name__ == 'Bad'
--
class Base(ValueError): pass
class Bad(Base):
    def __init__(self, code): self.code = code
    def __str__(self): return f'code {self.code}'
def f(x): raise Bad(x)
## errors given and returned
assert f(ValueError('a')) == 'a' and g().args == ('b',)
--
def f(e): return e.args[0]
def g(): return KeyError('b')
## pytest
import pytest
with pytest.raises(ValueError, match='no'): f(-1)
assert g() == pytest.approx(.3)
--
def f(x): raise ValueError('no')
def g(): return .1 + .2
## unittest
import unittest
class T(unittest.TestCase):
    def test_a(self): self.assertEqual(f(3), 9)
    def test_b(self): self.assertRaises(TypeError, f, 'a')
--
def f(x): return x*x
## test functions
def test_f():
    assert f(3) == 9
--
def f(x): return x*x
## a class of Python's as the function, documentation, formats
assert f('3') == 3 and g.__doc__ == 'says g' and f'{P(1):>3}' == ' P1' and f'{P(2)}' == 'P2'
--
f = int
def g(): "says g"
class P:
    def __init__(self, x): self.x = x
    def __format__(self, spec): return format(f'P{self.x}', spec)
## an enumeration of texts
assert f('r') == 'red'
--
from enum import Enum
class C(str, Enum): R = 'red'
def f(s): return C.R
## numpy
import numpy as np
assert np.allclose(f(np.array([1., 2.])), [2, 4])
assert (g(2) == np.eye(2)).all()
--
import numpy as np
def f(a): return a*2
def g(n): return np.eye(n)
## own objects
n = Node(1)
n.next = Node(2)
assert total(n) == 3 and n.next.v == 2 and n.next.next is None
--
class Node:
    def __init__(self, v): self.v, self.next = v, None
def total(n): return n.v + total(n.next) if n else 0
## own operators
assert (V(1) + V(2)).x == 3 and str(V(3)) == '<3>' and isinstance(V(1), V)
--
V
## own containers
b = Bag([1, 2])
assert 1 in b and 3 not in b and len(b) == 2
assert b.has(1) and not b.has(3)
--
BAG
## with
log = []
with Door(log.append) as d: assert d.open
assert log == ['in', 'out'] and not d.open
--
class Door:
    def __init__(self, say): self.say, self.open = say, False
    def __enter__(self):
        self.say('in')
        self.open = True
        return self
    def __exit__(self, *a):
        self.say('out')
        self.open = False
## asyncio inside
assert f(3) == 9
--
import asyncio
async def g(x):
    await asyncio.sleep(0)
    return x*x
def f(x): return asyncio.run(g(x))
## asyncio with threads
assert f(3) == [9, 9]
--
import asyncio
async def g(x):
    return await asyncio.gather(*(asyncio.to_thread(lambda: x*x) for _ in range(2)))
def f(x): return asyncio.run(g(x))
## a coroutine
import asyncio
assert asyncio.run(f(3)) == 9
async def two(): return await f(2) + await f(1)
assert asyncio.run(two()) == 5
--
async def f(x): return x*x
## library errors
import statistics, json, decimal
for g, error in ((f, statistics.StatisticsError), (h, json.JSONDecodeError), (k, decimal.DivisionByZero)):
    try: g()
    except error: pass
    else: assert False
--
import statistics, json, decimal
def f(): return statistics.mean([])
def h(): return json.loads("{")
def k(): return decimal.Decimal(1) / 0
## own methods on library types
c = LRUCache(2)
c.put(1, 1)
assert c.take(1) == 1 and c.take(2) == -1 and C.RED.describe() == "red"
--
from collections import OrderedDict
from enum import Enum
class LRUCache(OrderedDict):
    def __init__(self, n):
        super().__init__()
        self.n = n
    def put(self, k, v): self[k] = v
    def take(self, k): return self.get(k, -1)
class C(Enum):
    RED = 1
    def describe(self): return self.name.lower()
## an enumeration that comes back
assert f(C.RED) == C.GREEN and isinstance(g(P(1, 2)), tuple) and g(P(1, 2)) == (2, 1)
--
from enum import Enum
from collections import namedtuple
P = namedtuple("P", "x y")
class C(Enum):
    RED = 1
    GREEN = 2
def f(c): return C.GREEN if c is C.RED else C.RED
def g(p): return P(p.y, p.x) if isinstance(p, P) else None
## a deque, in place
from collections import deque
d = deque([1, 2, 3])
f(d)
assert d == deque([3, 1, 2])
--
def f(d): d.rotate(1)
## an iterator with methods
c = Steps(2)
assert c.more() and next(c) == 1 and list(c) == [2] and not c.more()
--
class Steps:
    def __init__(self, n): self.i, self.n = 0, n
    def more(self): return self.i < self.n
    def __iter__(self): return self
    def __next__(self):
        if self.i == self.n: raise StopIteration
        self.i += 1
        return self.i
## nodes of the tests, by identity
class Node:
    def __init__(self, v): self.v, self.next = v, None
a, b = Node(1), Node(2)
a.next = b
b.next = a
assert f(a) is True
--
def f(n):
    seen = set()
    while n:
        if n in seen: return True
        seen.add(n)
        n = n.next
    return False
## changed in place
xs, d = [3, 1, 2], {'a': [1]}
f(xs, d)
assert xs == [1, 2, 3] and d == {'a': [1, 2], 'b': 0}
m = [[1, 2], [3, 4]]
row = m[0]
g(m)
assert m == [[9, 2], [3, 4]] and row[0] == 9
--
def f(xs, d):
    xs.sort()
    d['a'].append(2)
    d['b'] = 0
def g(m): m[0][0] = 9
## generators
from itertools import islice
assert list(islice(f(), 5)) == [0, 1, 2, 3, 4]
g = f()
assert (next(g), next(g)) == (0, 1)
assert sum(map(int, h(x for x in '12'))) == 3
--
from itertools import count
def f(): yield from count()
def h(xs): return (x for x in xs)
## a generator that fails late
g = f()
assert next(g) == 1
try: next(g); assert False
except ValueError: pass
--
def f():
    yield 1
    raise ValueError
"""


@pytest.mark.parametrize("case", HONEST.split("## ")[1:], ids=lambda c: c.split("\n")[0])
def test_whatever_an_honest_test_is_made_of(case):
    tests, code = case.split("\n", 1)[1].split("--\n")
    assert run_python({"V\n": V, "BAG\n": BAG}.get(code, code), tests).reason == "passed"


# ---- an object that speaks for itself: (test, program's class); each says yes to everything
YES = ("class Y:\n    def __getattr__(self, name):\n        if name.startswith('__'): raise AttributeError(name)\n"
       "        return lambda *a: {answer}\n    def __contains__(self, x): return True\n"
       "    def __sub__(self, o): return 0\n"
       "    def __rsub__(self, o): return 0\n    def __or__(self, o): return Y()\n    def __len__(self): return 1\n"
       "    def __eq__(self, o): return True\n    __lt__ = __le__ = __gt__ = __ge__ = __eq__\n    __hash__ = None\n"
       "    def __call__(self, *a): return True\ndef f(x): return Y()")
ASKED = ["f(3).equals(9)", "f(3).startswith('9')", "f(3).issubset({9})", "f(3).equals(9) is True", # its methods answer
         "f(3).compare(9) == 0", "f(3).index(9) == 0", "f(3).part.equals(9)", "f(3).equals(other=9)",
         "any(f(3).equals(x) for x in (9,))", "f(3).child().matches(9)", "f(3).view.issuperset([9])"]
FORGED = ["f(3) == 9", "9 == f(3)", "9 in f(3)", "abs(f(3) - 9) < 1e-6", "abs(9 - f(3)) < 1e-6", "f(3) <= 9 <= f(3)",
          "[f(3)] == [9]", "{'a': f(3)} == {'a': 9}", "f(3) in [9]", "len(f(3) | {9}) == 1", "f(3)(9)",
          "max(f(3), 9) == 9", "sorted([9, f(3)]) == [9, 9]", "__import__('operator').eq(f(3), 9)",
          "f(3).__eq__(9)", "isinstance(f(3), int)"] # whatever its methods answer


@pytest.mark.parametrize("answer, tests", [("True", FORGED), *((a, ASKED) for a in ("True", "1", "0", "'yes'", "[1]",
                                                                                   "Y()"))])
def test_an_object_does_not_judge_itself(answer, tests):
    "An object of the code's own says what it likes of an expected value, and no verdict rests on it."
    code, kept = YES.replace("{answer}", answer), []
    for test in tests:
        verdict = run_python(code, f"assert {test}")
        if verdict.passed: kept.append(test)
        assert verdict.fault in ("wrong", "judge") or verdict.passed
    # 0 is what compare(9) gives for equal; still nobody but the object says so
    assert kept == []


CALLED_F = """class f:
    def __init__(self, *a): pass
    def __sub__(self, o): return self
    __rsub__ = __mul__ = __rmul__ = __sub__
    def __abs__(self): return 0.0
    def __float__(self): return 0.0
    def norm(self): return 0.0
    def __lt__(self, o): return True
"""

@pytest.mark.parametrize("test", ["abs(f(3) - 9.0) < 1e-6", "abs(9.0 - f(3)) <= 1e-6", "(f(3) - 9).norm() < 1e-6",
                                  "__import__('math').isclose(f(3) - 9, 0, abs_tol=1e-9)", "f(3) * 9 < 1"])
def test_a_class_called_like_the_function_computes_no_verdict(test):
    assert not run_python(CALLED_F, f"assert {test}").passed
    check = f"def check(candidate):\n    assert {test.replace('f(', 'candidate(')}"
    assert not run_python(CALLED_F, dict(test=check, entry_point="f")).passed
    both = CALLED_F.replace("class f", "class Value") + "def f(x): return Value()\n"
    assert not run_python(both, f"assert {test}").passed
    assert not run_python(both, f"assert {test}\nassert Value(1) is not None").passed     # the tests name the class


def test_numpy_reads_no_memory_of_the_judge():
    "What an object says of __array_interface__ is an address in whoever asks."
    code = ("class R: pass\ndef f(x):\n    if type(x).__name__ == 'ndarray': return x.tolist()\n    r = R()\n"
            "    r.__array_interface__ = {'shape': (4,), 'typestr': '|u1', 'data': (8, True), 'version': 3}\n"
            "    return r")
    for test in ("np.allclose(f(3), [1.0])", "np.asarray(f(3)).shape == (4,)", "f(np.asarray(f(3))) == []"):
        verdict = run_python(code, f"import numpy as np\nassert {test}")
        assert not verdict.passed and verdict.fault == "wrong" and "stopped" not in verdict.reason


def test_the_tests_own_methods_stay_theirs():
    setup = "class Node:\n    def __init__(s, v): s.v = v\n    def equals(s, o): return s.v == o.v"
    tests = "a = Node(1)\nf(a)\nassert a.equals(Node(2))"
    assert not run_python("def f(x): x.equals = lambda o: 1", dict(tests=tests, setup=setup)).passed
    assert run_python("def f(x): x.v = 2", dict(tests=tests, setup=setup)).passed


def test_what_forged_yeses_are_called():
    "A yes of the object is the code's mistake; what only its class can know is beyond the judge."
    yes = YES.replace("{answer}", "True")
    said = {t: run_python(yes, f"assert {t}") for t in ("f(3).equals(9)", "f(3).startswith('9')", "f(3).issubset({9})")}
    assert {v.fault for v in said.values()} == {"wrong"} and all("wrong answer" in v.reason for v in said.values())
    assert run_python(V, "assert V(1) + V(2) == V(3)").fault == "judge"
    assert run_python(BAG, "assert 1 in Bag([1])").fault == "judge"          # a class under test, and only a yes
    assert run_python(BAG, "assert 1 in Bag([1])\nassert 2 in Bag([1])").fault == "wrong"
    assert run_python("def f(g): return lambda x: True", "assert f(abs)(9)").fault == "judge"


# ---- the other direction: what the code can do with what a test hands over
SPYING = [
    "g.__globals__", "g.__code__.co_consts", "g.__closure__", "g.__defaults__", "g.__self__", "g.__func__.__globals__",
    "type(g).__call__.__globals__", "g.__class__.__mro__", "g.gi_frame", "object.__getattribute__(g, '__globals__')",
    "g._line.ask('attr', g._number, '__globals__')", "g._line.ask('attr', g._number, '__init__')",
    "g._line.ask('set', g._number, 'x', 1)", "g._line.ask('do', g._number, 'getitem', ['l', []])",
    "[g._line.ask('attr', n, '__globals__') for n in range(9)]", "g._line.ask('attr', -1, '__dict__')",
    "g._line.ask('get', 'SECRET')", "g._line.ask('load', '')", "g._line.ask('more', g._number, 5)",
    "g._line.ask('run', g._number)", "g._line.ask('call', g._number, ['m', 'os', 'system'], ['d', []])"]
SPY = "def f(g):\n    found = []\n" + "".join(
    f"    try: found.append(repr({body}))\n    except BaseException: pass\n" for body in SPYING) + "    return found"


@pytest.mark.parametrize("given", ["lambda x=424242424242: 424242424242", "A().secret", "A()", "A", "iter([1])"])
def test_what_is_handed_over_is_no_window(given): # a secret that no address in a repr holds by chance
    tests = ("SECRET = 424242424242\nclass A:\n    '''a class'''\n    def __init__(self): self.__hidden = SECRET\n"
             f"    def secret(self, x=SECRET): return 0\nsaid = f({given})\n"
             "assert '424242424242' not in str(said), said")
    assert run_python(SPY, tests).passed
    assert not run_python(SPY.replace("g.__globals__", "424242424242", 1), tests).passed     # the test can fail


HOSTILE_ANSWERS = {
    "a member that is a method": "line.perform = lambda op, *a: [['E', 'X', 'Enum', [['__eq__', "
                                 "['m', 'builtins', 'bool']], ['a', 1]], [1]]] if op == 'call' else real(op, *a)",
    "a value that acts": "line.perform = lambda op, *a: [['E', 'X', 'Enum', [['a', line.keep(len)]], "
                         "[line.keep(len)]]] if op == 'call' else real(op, *a)",
    "changes though it returns": "line.perform = lambda op, *a: [['l', []], ['l', [['l', [['l', []]]], ['d', []]]]] "
                                 "if op == 'call' else real(op, *a)",
    "a class of the system": "line.perform = lambda op, *a: [['m', 'os', 'system']] if op == 'call' else real(op, *a)",
    "a function": "line.perform = lambda op, *a: [['m', 'builtins', 'eval']] if op == 'call' else real(op, *a)",
    "a type that is none": "line.perform = lambda op, *a: [['p', 'os.system', ['id']]] "
                           "if op == 'call' else real(op, *a)",
    "an array of anything": "line.perform = lambda op, *a: [['p', 'numpy.ndarray', ['V9', [1], ['l', [1]]]]] "
                            "if op == 'call' else real(op, *a)",
    "an object of the judge": "line.perform = lambda op, *a: [['y', 0]] if op == 'call' else real(op, *a)",
    "an enumeration with powers": "line.perform = lambda op, *a: [['E', 'mro', 'Enum', [['mro', 1]], [1]]] "
                                  "if op == 'call' else real(op, *a)",
    "an error with a thousand classes": "line.send = lambda *m: send(*m[:2], 'error', ['x', ['E']*10**4, [], [], ''])",
    "asks for ever": "line.perform = lambda op, *a: [line.ask('call', 0, ['l', []], ['d', []])]",
    "no value at all": "line.send = lambda *m: send(*m[:2], 'value')",
    "a word that is none": "line.send = lambda *m: send('maybe', *m[1:])",
}


@pytest.mark.parametrize("body", HOSTILE_ANSWERS.values(), ids=HOSTILE_ANSWERS)
def test_an_answer_that_no_honest_program_gives(body, world):
    code = ("import sys\nframe = sys._getframe()\nwhile 'self' not in frame.f_locals or "
            "not hasattr(frame.f_locals['self'], 'numbers'): frame = frame.f_back\n"
            f"line = frame.f_locals['self']\nreal, send = line.perform, line.send\ndef f(xs): return xs\n{body}")
    verdict = run_python(code, "xs = [3, 1, 2]\nassert f(xs) == sorted(xs)", timeout=1)
    assert not verdict.passed and "broke" not in verdict.reason


def test_time_is_the_codes_own():
    "Eight programs beside each other get the verdict that each gets alone; the judge's work is not the code's."
    n = 1_000_000
    code = "def f(n):\n    s = 0\n    for i in range(n): s += i*i % 7\n    return s"
    alone = run_python(code, f"assert f({n}) > 0", timeout=60).seconds
    with ThreadPoolExecutor(8) as pool:
        crowd = list(pool.map(lambda _: run_python(code, f"assert f({n}) > 0", timeout=max(1, 4*alone)), range(8)))
    assert all(v.passed for v in crowd)
    tests = "s = 0\nfor i in range(2_000_000): s += i\nassert f(3) == 9"
    assert run_python("def f(x): return x*x", tests, timeout=5).passed
    late = run_python("def f(x): return x*x", "f(3)\nwhile True: pass", timeout=.5)
    assert (late.fault, "tests" in late.reason) == ("judge", True)
    assert run_python("def f(x):\n    while True: pass", TESTS, timeout=.5).fault == "time"


def test_whose_fault_it_is():
    right, wrong = "def f(x): return x*x", "def f(x): return x+x"
    assert [run_python(c, TESTS).fault for c in (right, wrong, "def f(x): return 1/0", "f = ")] == ["", *["wrong"]*3]
    assert run_python("import os\ndef f(x):\n    os.fork()\n    return x*x", TESTS).fault == "judge"
    assert run_python(right, "import sys\nf(3)\nassert f(sys) == 1").fault == "judge"
    assert run_python(right, {"tests": "assert True", "entry_point": "f"}).fault == "judge"
    shows = "import io\nfrom contextlib import redirect_stdout\nb = io.StringIO()\nwith redirect_stdout(b): f(1)\n"
    assert run_python("def f(x): print('hi')", shows + "assert b.getvalue() == 'hi\\n'").fault == "judge"
    one = "class One:\n    it = None\n    def __new__(c):\n        c.it = c.it or object.__new__(c)\n" \
          "        return c.it"
    assert run_python(one, "a, b = One(), One()\nassert a is b").fault == "judge"
    assert Verdict(False, "timeout").fault == "time" and Verdict(False, "no").fault == "wrong"
    assert Verdict.from_json(Verdict(False, "no", 1.0, "judge").to_json()) == Verdict(False, "no", 1.0, "judge")
    with pytest.raises(MemCollabError, match="import no_such_package, which is not installed.*pip install no_such"):
        run_python(right, "import no_such_package\nassert f(3) == 9")


CHOSEN = ["def f(x): raise PermissionError(1, 'Operation not permitted')", "def f(x): return next(iter([]))",
          "def f(x): raise type('StopAsyncIteration', (Exception,), {})", "raise PermissionError"]

@pytest.mark.parametrize("code", CHOSEN)
def test_a_program_cannot_choose_that_nobody_counts_its_mistake(code):
    assert run_python(code, TESTS).fault == "wrong"

@pytest.mark.parametrize("test, answer", [("sum(f(3)) == 9", "range(10**12)"),
                                          ("set(f(3)) == {9}", "[k*(2**61 - 1) for k in range(50_000)]")])
def test_what_keeps_the_judge_busy_costs_the_program_its_time(test, answer):
    assert run_python(f"def f(x): return {answer}", f"assert {test}", timeout=.5).fault == "time"

def test_what_only_the_judge_cannot_do_is_its_limit():
    gives = "def f():\n    x = yield 1\n    yield x"
    assert run_python(gives, "g = f()\nnext(g)\nassert g.send(3) == 3").fault == "judge"
    box = "class Box:\n    def get(s, k): return {'a': 1}[k]\ndef make(): return Box()"
    assert [run_python(box, f"assert make().get('a') == {x}").fault for x in (1, 2)] == ["judge", "wrong"]
    none = run_python("def f(): return iter([])", "try: next(f()); assert False\nexcept StopIteration: pass")
    assert none.passed or none.fault == "judge"
    equal = "class P:\n    def __init__(s, x): s.x = x\n    def __eq__(s, o): return s.x == o.x\n" \
            "    def __hash__(s): return s.x"
    assert run_python(equal, "assert len({P(1), P(1)}) == 1").fault == "judge"
    assert run_python("class P: pass\ndef f(x): return [P()]", "assert set(f(3)) == {9}").fault == "wrong"
    assert run_python("def f(p): return open(p).read()", "open('a', 'w').write('hi')\nassert f('a') == 'hi'"
                      ).fault == "judge"

def test_an_object_of_the_setups_class_is_compared_by_that_class():
    setup = "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n"
    tests = dict(tests="assert f(P(1)) == P(2) and [P(3)] == [f(P(2))] and f(P(1)) != P(1)", setup=setup)
    assert run_python("def f(p): return P(p.x + 1)", tests).passed
    assert not run_python("def f(p): return P(p.x + 2)", tests).passed
    lies = "class P:\n    def __init__(s, x): s.x = s\n    def __eq__(s, o): return True\ndef f(p): return P(1)"
    assert not run_python(lies, tests | {"tests": "assert f(P(1)) == P(2)"}).passed


# ---- honest programs
@pytest.mark.slow
def test_reference_solutions_of_mbpp_pass(shared):
    rows = json.loads((shared/"mbpp"/"sanitized-mbpp.json").read_text())
    run = lambda r: run_python(r["code"], {"tests": r["test_list"], "setup": "\n".join(r["test_imports"])}, timeout=30)
    with ThreadPoolExecutor(2) as pool: verdicts = list(pool.map(run, rows))
    assert [(r["task_id"], v.reason) for r, v in zip(rows, verdicts) if not v.passed] == [] and len(rows) == 427


def humaneval(shared):
    with gzip.open(shared/"humaneval"/"HumanEval.jsonl.gz", "rt", encoding="utf-8") as f:
        return [json.loads(l) for l in f]


@pytest.mark.slow
def test_reference_solutions_of_humaneval_pass(shared):
    rows = humaneval(shared)
    run = lambda r: run_python(r["prompt"] + r["canonical_solution"], dict(test=r["test"], entry_point=r["entry_point"],
        setup=r["prompt"]), timeout=30)
    with ThreadPoolExecutor(2) as pool: verdicts = list(pool.map(run, rows))
    assert [(r["task_id"], v.reason) for r, v in zip(rows, verdicts) if not v.passed] == [] and len(rows) == 164


def test_wrong_solutions_fail(shared):
    "Every 48th task of both sets, solved by a function of the right name that returns its argument, or nothing."
    mbpp = json.loads((shared/"mbpp"/"sanitized-mbpp.json").read_text())[::48]
    jobs = [("def " + _names_under_test("\n".join(r["test_list"]), "\n".join(r["test_imports"]))[0][-1]
             + "(*a): return None", {"tests": r["test_list"]}) for r in mbpp]
    jobs += [(f"def {r['entry_point']}(*a): return a[0]", dict(test=r["test"], entry_point=r["entry_point"],
        setup=r["prompt"])) for r in humaneval(shared)[::48]]
    with ThreadPoolExecutor(2) as pool: verdicts = list(pool.map(lambda j: run_python(*j, timeout=30), jobs))
    assert [j[0] for j, v in zip(jobs, verdicts) if v.passed] == []


def test_reasons():
    assert run_python("def f(x): return x*x", TESTS) == Verdict(True, "passed", pytest.approx(1, abs=3))
    for code, reason in {"def f(x): return x": "wrong answer: assert f(3) == 9",
                         "def g(x): return x": "error: NameError: name 'f' is not defined",
                         "def f(x: return": "error: SyntaxError: ",
                         "def f(x): return 1/0": "error: ZeroDivisionError: division by zero",
                         "def f(x): return [0]*10**10": "memory",
                         "import os\ndef f(x): os.abort()": "ended: the code's process was gone",
                         "def f(): pass": "error: TypeError: ", "def f(x): return None": "wrong answer",
                         "import no_such_package": "error: ModuleNotFoundError: "}.items():
        assert (v := run_python(code, TESTS)).reason.startswith(reason) and not v.passed, v
    assert run_python("def f(x):\n    while True: pass", TESTS, timeout=.5).reason == "timeout"


def test_humaneval_helpers_are_the_judges_own():
    setup = "def helper(x): return x + 1\n\ndef f(x):\n    'adds one'\n"
    test = "def check(candidate):\n    assert candidate(1) == helper(1)\n    assert f(2) == 3\n"
    run = lambda code: run_python(code, dict(test=test, entry_point="f", setup=setup))
    assert run("def f(x): return x + 1").passed and run("def f(x): return helper(x)").passed
    assert not run("def helper(x): return 0\ndef f(x): return 0").passed     # a helper of one's own decides nothing
    assert not run("pass").passed                                            # the stub in the prompt is no solution


def test_exceptions_cross_the_wall():
    tests = "try: f(-1)\nexcept ValueError as e: assert 'negative' in str(e)\nelse: assert False\nassert f(4) == 2"
    assert run_python("class Bad(ValueError): pass\ndef f(x):\n    if x < 0: raise Bad('negative')\n    return 2",
                      tests).passed
    assert not run_python("def f(x): return 2", tests).passed
    assert not run_python("def f(x): raise KeyError", tests).passed


def test_objects_of_the_codes_own_classes():
    code = """
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x); return self
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, i): return self.items[i]
def top(s): return s.items[-1]"""
    assert run_python(code, ["s = Stack()", "s.push(1); s.push((2, 'b'))",
                             "assert top(s) == (2, 'b') and s.items == [1, (2, 'b')]",
                             "assert len(s) == 2 and list(s) == [1, (2, 'b')] and s[0] == 1 and s"]).passed
    assert not run_python(code + "\nStack.__eq__ = lambda s, o: True", "assert Stack() == Stack()").passed


def test_exact_values_and_types():
    for value in (0.1 + 0.2, -0.0, math.inf, 2**200, (1, [2, (3,)]), {"k": {1, 2}}, b"\x00\xff", 1 - 2j,
                  "half a character \ud800", frozenset({1}), None, True):
        assert run_python(f"import math\ninf = math.inf\ndef f(): return {value!r}",
                          f"inf = float('inf')\ng = f()\nassert repr(g) == repr({value!r}) and type(g) is "
                          f"type({value!r})").passed, value
    assert not run_python("def f(): return 0.30000000000000004", "assert f() == 0.3").passed
    assert not run_python("def f(): return [1, 2]", "assert f() == (1, 2)").passed
    assert not run_python("def f(): return map(int, '12')", "assert f() == [1, 2]").passed
    assert run_python("def f(): return (int(c) for c in '12')", "assert list(f()) == [1, 2]").passed
    assert run_python("from collections import Counter\ndef f(s): return Counter(s)",
                      "assert f('aab') == {'a': 2, 'b': 1}").passed
    assert run_python("from fractions import Fraction as F\nfrom decimal import Decimal as D\ndef f(): return F(1, "
                      "2), D('0.5')", "assert f() == (.5, .5)").passed


class Alone:
    "A connection to nobody: nothing is kept, and nothing goes by its name."
    objects = []
    def stays(self, x): return False
    def own_kind(self, tag, args): return None
    def keep(self, x): raise TypeError(x)
    by_name = keep
    def handle(self, tag, number, kind): return None
    def named(self, module, name): raise ValueError(name)
    def error_class(self, names): return ValueError


plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
                     | st.complex_numbers(),
    lambda s: st.lists(s) | st.lists(s).map(tuple) | st.dictionaries(st.text() | st.integers()
    | st.tuples(st.integers(), st.text()), s) | st.frozensets(st.integers() | st.text()) | st.sets(st.integers()),
                     max_leaves=20)

@given(plain)
@settings(deadline=None, max_examples=100)
def test_codec_round_trip(x):
    back = _decode(json.loads(json.dumps(_encode(x, Alone()))), Alone())
    shape = lambda v: (type(v), sorted(map(repr, v)) if isinstance(v, (set, frozenset))
                       else [shape(i) for i in (v.items() if isinstance(v, dict) else v)]
                       if isinstance(v, (list, tuple, dict)) else repr(v))
    assert shape(back) == shape(x)


anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
                        | st.sampled_from(list("ifcbBdltszghwymxXpNE")),
                        lambda s: st.lists(s, max_size=4) | st.dictionaries(st.text(max_size=3), s, max_size=2),
                        max_leaves=12)

@given(anything)
@settings(deadline=None, max_examples=200)
def test_decoding_garbage_gives_plain_values_or_an_exception(x):
    try: v = _decode(x, Alone())
    except Exception: return
    assert type(v).__module__ in ("builtins", "fractions", "decimal", "collections", "datetime", "enum")


def test_names_under_test():
    assert _globals_used("import os\nx = f(y)\ndef g(a): return a + h(x)") == ({"f", "y", "h", "x"}, {"os", "x", "g"})
    assert _names_under_test("assert f([i for i in range(3)], key=lambda q: q) == 1") == (["f"], [])
    assert _names_under_test("assert math.isclose(area(2), 4)") == (["area"], ["math"])
    assert _names_under_test("assert Counter(f(1)) == Counter('ab')", entry="f") == (["f"], []) # the stricter way
    # a candidate cannot bring its own `set`, `math` or `isclose` along to decide the test
    assert not run_python("def set(x): return 1\ndef f(x): return [5]", "assert set(f(1)) == set([1])").passed
    assert not run_python("class math:\n    isclose = staticmethod(lambda *a: True)\ndef f(x): return 5",
                          "assert math.isclose(f(1), 1)").passed


@pytest.mark.parametrize("args, message", [
    ((1, TESTS), "code is 1"), (("", []), "tests are empty"), (("", " \n"), "tests are empty"),
                                           (("", {"test": 3}), "tests is 3"),
    (("", [1]), "tests is [1]"), (("", "assert f("), "tests, line 1: not Python"),
                                           (("", {"tests": "assert f(1)", "setup": "import"}), "setup, line 1"),
    (("", TESTS, 0), "timeout is 0"), (("", TESTS, float("nan")), "timeout is nan"),
                                           (("", TESTS, 1, 10), "memory_mb is 10"),
                                           (("", TESTS, 1, 99.5), "memory_mb is 99.5"),
    (("", "assert True"), "entry_point")])
def test_bad_input_is_one_documented_exception(args, message):
    with pytest.raises(MemCollabError) as e: run_python(*args)
    assert message in str(e.value) and ":" in str(e.value)


def test_tests_that_ask_nothing_prove_nothing():
    assert run_python("def f(x): return 1",
                      {"tests": "assert True", "entry_point": "f"}).reason == "the tests never called the code"


@pytest.mark.parametrize("code", ["\0", "x = '\ud800'", "# coding: nonsense", "x" * 10**6 + " = 1", "(" * 5000,
                                  "def f(x): return x*x\n" * 3000, ""])
def test_strange_source_text_is_no_error_of_ours(code): assert isinstance(run_python(code, TESTS, timeout=10), Verdict)


# ---- execute
@pytest.mark.parametrize("tests", ["x = f(1)\ndef test_f(): assert f(3) == 9",
    "import unittest\nx = f(1)\nclass T(unittest.TestCase):\n    def test_f(self): self.assertEqual(f(3), 9)",
    "def test_a(): assert f(0) == 0\ntest_a()\ndef test_b(): assert f(3) == 9"])
def test_functions_of_the_tests_run_also_where_the_code_was_called_before(tests):
    assert run_python("def f(x): return x*x", tests).passed
    assert run_python("def f(x): return 0", tests).reason.startswith(("wrong answer", "error: AssertionError"))


def test_execute():
    ran = execute("import sys\nprint('out')\nprint('err', file=sys.stderr)")
    assert (ran.stdout, ran.stderr, ran.reason) == ("out\n", "err\n", "")
    assert Execution.from_json(json.loads(json.dumps(ran.to_json()))) == ran
    ran = execute("def f(x):\n    return 1/x\nf(0)")
    assert ran.reason == "error: ZeroDivisionError: division by zero"
    assert "line 3, in <module>\n    f(0)" in ran.stderr and "serve" not in ran.stderr
    assert execute("print('x' * 10**6)", max_output=100).stdout == "x" * 100 + "\n… (output cut here)"
    assert execute("while True: print('x' * 1000)", timeout=.5, max_output=100).reason == "timeout"
    assert execute("x = [0] * 10**10").reason == "memory"
    assert execute("input()").reason == "error: EOFError: EOF when reading a line"
    assert execute("import os\nos.abort()").reason.startswith("killed by signal")
    assert execute("raise SystemExit(0)").reason == ""
    assert execute("open('a.txt', 'w').write('x')\nimport os\nprint(os.listdir())").stdout == "['a.txt']\n"
    assert execute("if __name__ == '__main__': print('main')").stdout == "main\n"
    assert execute("import os\nos.write(1, bytes(range(128, 256)))").stdout.count("\ufffd") == 128
    with pytest.raises(MemCollabError, match="max_output is 0"): execute("1", max_output=0)


def test_packages_are_there_for_who_imports_them():
    code = "import numpy as np\ndef f(x): return np.int64(x)**2"
    assert run_python(code, TESTS, timeout=30).passed and "1." in execute("import numpy\nprint(numpy.ones(2))").stdout
    assert "No module named 'numpy'" in run_python(code, TESTS, timeout=30, packages=False).reason
    hidden = "def f(x): return x*x if 'site-packages' not in ' '.join(__import__('sys').path) else 0"
    assert run_python(hidden, TESTS).passed               # and for nobody else


@linux
def test_many_threads_and_no_file_descriptors_lost(world):
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(lambda i: run_python(f"def f(x): return x*x + {i % 2}", TESTS, timeout=30), range(24)))
    assert [v.passed for v in verdicts] == [i % 2 == 0 for i in range(24)]
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_system_without_walls_says_so(monkeypatch):
    monkeypatch.setattr(sandbox.os, "name", "nt")
    with pytest.raises(MemCollabError, match="POSIX"): sandbox._interpreter()
