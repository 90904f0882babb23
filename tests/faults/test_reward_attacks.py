"""S1: what code that a model wrote tries, and what comes of it. The other completions of the batch are unharmed."""

import ast
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from grpo_jax.rewards.pool import WorkerPool
from grpo_jax.rewards.python import HARNESS, python_tests
from grpo_jax.rewards.sandbox import bubblewrap

try:
    bubblewrap()
except ValueError as reason:
    pytest.skip(f"attacks are run in a sandbox alone: {reason}", allow_module_level=True)

pytestmark = pytest.mark.slow  # they wait on purpose
RIGHT = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(1, 2) == 3\nassert add(30, 12) == 42"
TIMEOUT = 1.0


@pytest.fixture(scope="module")
def reward():
    return python_tests(timeout=TIMEOUT, memory=2**28, workers=3)


def judged(reward, code, *tests):
    """The rewards of the code under each of the tests, beside a completion that is right."""
    began = time.monotonic()
    codes = [*[textwrap.dedent(code)] * len(tests), RIGHT]
    rewards = reward(["?"] * len(codes), codes, tests=[*tests, TESTS])
    assert rewards[-1] == 1.0
    assert time.monotonic() - began < TIMEOUT + 20
    return rewards[:-1]


# ---------------------------------------------------------------------------- forging the verdict

WRONG = "def add(a, b):\n    return 3\n"  # right in one of the two tests
FORGERIES = {
    "the first test alone": WRONG,
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "os._exit(0)": "import os\nos._exit(0)",
    "SystemExit in the function": "def add(a, b):\n    raise SystemExit(0)",
    "exit in the function": "import os\ndef add(a, b):\n    os._exit(0)",
    "killing itself": "import os\ndef add(a, b):\n    os.kill(os.getpid(), 9)",
    "equal to everything": """
        class Yes:
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __hash__(self): return 0
        def add(a, b): return Yes()
        """,
    "an integer equal to everything": """
        class Yes(int):
            def __eq__(self, other): return True
            __hash__ = int.__hash__
        def add(a, b): return Yes(5)
        """,
    "data equal to everything": """
        class Yes(dict):
            def __eq__(self, other): return True
        def add(a, b): return Yes()
        """,
    "printing the verdict": WRONG + 'print("ready 2\\npassed 0\\npassed 1", flush=True)',
    "writing the verdict to every file": WRONG
    + """
import os
for number in range(64):
    try: os.write(number, b"ready 2\\npassed 0\\npassed 1\\n")
    except OSError: pass
""",
    "answering before it is asked": """
        import os
        for number in range(64):
            try: os.write(number, b'{"value": 3}\\n{"value": true}\\n' * 10)
            except OSError: pass
        def add(a, b): return 3
        """,
    "answers that are none": """
        import os
        def add(a, b):
            for number in range(3, 64):
                try: os.write(number, b'[' * 10**6 + b'\\n')
                except OSError: pass
        """,
    "an answer without end": """
        import os
        def add(a, b):
            while True:
                for number in range(3, 64):
                    try: os.write(number, b'x' * 10**5)
                    except OSError: pass
        """,
    "patching builtins": WRONG
    + """
import ast, builtins, json, operator
for module in (builtins, operator):
    for name in ("all", "any", "abs", "eq", "sum", "compile", "exec", "AssertionError"):
        setattr(module, name, lambda *a, **k: True)
json.dumps = lambda *a, **k: '{"value": true}'
""",
    "patching the checker": WRONG
    + """
import gc, sys
main = sys.modules["__main__"]
main.checker = main.is_test = main.Subject = main.pack = lambda *a, **k: 42
for thing in gc.get_objects():
    if isinstance(thing, dict) and "is_test" in thing: thing["is_test"] = lambda *a: False
""",
    "changing its callers' variables": """
        import ctypes, sys
        frame = sys._getframe()
        while frame:
            for name in list(frame.f_locals):
                frame.f_locals[name] = True
            ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))
            frame = frame.f_back
        def add(a, b): return 3
        """,
    "ending iterations": "def add(a, b):\n    raise StopIteration",
    "an assertion of its own": "def add(a, b):\n    raise AssertionError",
    "looking for the expected value": """
        import gc, os, re, sys
        def add(a, b):
            seen = [repr(thing)[:10**5] for thing in gc.get_objects() if isinstance(thing, (str, bytes, dict, list))]
            frame = sys._getframe()
            while frame:
                seen.append(repr(frame.f_locals))
                frame = frame.f_back
            for number in range(3, 64):
                try:
                    os.set_blocking(number, False)
                    seen.append(repr(os.pread(number, 10**5, 0)))
                except OSError: pass
            for text in seen:
                for found in re.findall(r"assert add.%d, %d. == (\\d+)" % (a, b), text): return int(found)
            return -1
        """,
}


@pytest.mark.parametrize("attack", FORGERIES)
def test_a_verdict_cannot_be_forged(reward, attack):
    assert judged(reward, FORGERIES[attack], TESTS) == [0.0]


def test_ending_an_iteration_of_the_tests_passes_nothing(reward):
    # An all() over a map ends, with success, at a StopIteration.
    tests = "assert all(map(even, [1, 3]))"
    assert judged(reward, "def even(n):\n    raise StopIteration", tests) == [0.0]


def test_ending_passes_no_test_that_catches_everything(reward):
    tests = "def check(f):\n    try: f()\n    except: pass\n\ncheck(f)"
    assert judged(reward, "import os\ndef f(): os._exit(0)", tests) == [0.0]
    assert judged(reward, "def f(): raise ValueError", tests) == [1.0]


@pytest.mark.parametrize("name", ["all", "abs", "len", "isinstance"])
def test_the_builtins_of_the_tests_are_pythons(reward, name):
    tests = "assert all(abs(len(f(n)) - n) < 1 for n in (2, 3)) and isinstance(f(1), list)"
    assert judged(reward, f"def f(n): return []\ndef {name}(*a): return 1", tests) == [0.0]
    assert judged(reward, "def f(n): return [0] * n", tests) == [1.0]


PROGRAM_FORGERIES = {
    "the expected output in memory": """
        import gc
        print(next((s for s in gc.get_objects() if isinstance(s, str) and s.startswith("secret")), "?"))
        """,
    "the expected output in a file": """
        import os
        for number in range(64):
            try: print(os.pread(number, 1000, 0).decode())
            except OSError: pass
        """,
    "the verdict": "print('passed 0')",
    "sys.exit(0)": "import sys; sys.exit(0)",
}


@pytest.mark.parametrize("attack", PROGRAM_FORGERIES)
def test_a_programs_verdict_cannot_be_forged(reward, attack):
    assert judged(reward, PROGRAM_FORGERIES[attack], [["", "secret of this test"]]) == [0.0]


# ---------------------------------------------------------------------------- using up the machine

EXHAUSTION = {
    "an endless loop": "while True: pass",
    "an endless loop in C": "x = 9**9**9**9",
    "sleep": "import time; time.sleep(1000)",
    "a loop that catches everything": """
        while True:
            try:
                while True: pass
            except BaseException: pass
        """,
    "a loop that ignores signals": """
        import signal
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass
        """,
    "endless recursion": "def f(): return f()\nf()",
    "deep recursion in C": "import sys; sys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "1 GB": "x = bytearray(2**30)",
    "4 GB": "x = bytearray(4 * 2**30)",
    "4 GB by and by": "x = []\nwhile True: x.append(bytearray(2**20))",
    "output without end": "while True: print('x' * 10_000)",
    "output without end, slowly": "import time\nwhile True: print('x', flush=True); time.sleep(0.001)",
    "empty output without end": "print('done')\nwhile True: print('\\n' * 10_000)",
    "errors without end": "import sys\nwhile True: print('x' * 10_000, file=sys.stderr)",
    "a fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()",
    "files without end": """
        n = 0
        while True:
            n += 1
            with open(f"/tmp/{n}", "wb") as file: file.write(bytes(2**19))
        """,
    "a regular expression": "import re; re.match(r'(a+)+$', 'a' * 50 + 'b')",
}


@pytest.mark.parametrize("attack", EXHAUSTION)
def test_the_machine_cannot_be_used_up(reward, attack):
    code = textwrap.dedent(EXHAUSTION[attack])
    assert judged(reward, code + "\nprint('done')\n" + RIGHT, [["", "done"]], TESTS) == [0.0, 0.0]


# ---------------------------------------------------------------------------- getting out


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """What there is to reach: a folder, a secret, a port, and processes."""
    (tmp_path / "file").write_text("secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        yield {"FOLDER": str(tmp_path), "PORT": server.getsockname()[1], "PID": os.getpid()}
        with pytest.raises(TimeoutError):
            server.accept()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "secret"}


ESCAPES = {
    "write outside": "open(FOLDER + '/new', 'w').write('x')",
    "overwrite outside": "open(FOLDER + '/file', 'w').write('x')",
    "delete outside": "os.remove(FOLDER + '/file')",
    "read outside": "open(FOLDER + '/file').read()",
    "list outside": "os.listdir(FOLDER)",
    "read through a link": "os.symlink(FOLDER + '/file', '/tmp/link'); open('/tmp/link').read()",
    "read above the folder": "open('../' * 20 + FOLDER[1:] + '/file').read()",
    "read through the root of another process": "open('/proc/1/root' + FOLDER + '/file').read()",
    "read through the working folder of another process": "os.listdir('/proc/1/cwd/')",
    "the environment of another process": "open('/proc/1/environ').read()",
    "memory of another process": "open('/proc/1/mem', 'rb').read(1)",
    "its own memory": "open('/proc/self/mem', 'rb')",
    "the kernel's settings": "open('/sys/kernel/mm/transparent_hugepage/enabled').read()",
    "users": "open('/etc/passwd').read()",
    "homes": "os.listdir(os.path.expanduser('~root')); os.listdir('/root/.ssh')",
    "write to the system": "open('/usr/lib/new', 'w')",
    "write beside the interpreter": "open(os.__file__, 'a')",
    "write to the harness": "open(sys.argv[0] if os.path.isabs(sys.argv[0]) else HARNESS, 'a')",
    "write to the root": "open('/new', 'w')",
    "write to devices": "open('/dev/new', 'w')",
    "shared memory": "open('/dev/shm/new', 'w')",
    "a file in memory": "os.memfd_create('x')",
    "a terminal": "open('/dev/tty', 'w')",
    "a disk": "os.mknod('/tmp/disk', 0o60666, os.makedev(8, 0)); open('/tmp/disk', 'rb')",
    "mount": "check(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))",
    "a change of root": "os.chroot('/tmp')",
    "another user": "os.setuid(0)",
    "a user namespace": "check(libc.unshare(0x10000000))",
    "a namespace by clone": "check(libc.syscall(CLONE, 0x10000000 | 17, 0, 0, 0, 0))",
    "fork": "os.fork()",
    "fork by a system call": "check(libc.syscall(57, 0) if CLONE == 56 else -1)",
    "clone": "check(libc.syscall(CLONE, 17, 0, 0, 0, 0))",
    "clone3": "check(libc.syscall(435, ctypes.byref(ctypes.create_string_buffer(88)), 88))",
    "a process": "subprocess.run(['/usr/bin/env'])",
    "a shell": "assert os.system('true') == 0",
    "a process by posix_spawn": "os.posix_spawn('/usr/bin/env', ['env'], {})",
    "a process by multiprocessing": "multiprocessing.get_context('fork').Process(target=print).start()",
    "trace": "check(libc.ptrace(16, 1, 0, 0))",
    "connect": "socket.create_connection(('127.0.0.1', PORT), 0.5)",
    "send": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53))",
    "names": "socket.getaddrinfo('example.org', 80)",
    "raw sockets": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "kill the trainer": "os.kill(PID, 9)",
    "more memory than given": "mmap.mmap(-1, 2**29)",
    "more memory": "resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
    "more processor time": "resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))",
    "a larger file": "open('/tmp/large', 'wb').write(bytes(2**21))",
    "a larger folder": "[open(f'/tmp/{n}', 'wb').write(bytes(2**19)) for n in range(100)]",
    "many empty files": "[open(f'/tmp/{n}', 'wb').close() for n in range(2000)]",
    "many folders": "[os.mkdir(f'/tmp/{n}') for n in range(2000)]",
    "a lock on a file of the system": "fcntl.flock(open(os.__file__), fcntl.LOCK_EX | fcntl.LOCK_NB)",
    "a lock on a device": "fcntl.flock(open('/dev/null'), fcntl.LOCK_EX | fcntl.LOCK_NB)",
    "the mode of a device": "os.chmod('/dev/null', 0o666)",
    "the mode of an open device": "os.fchmod(os.open('/dev/null', os.O_RDWR), 0o666)",
    "the owner of a device": "os.chown('/dev/null', os.getuid(), os.getgid())",
    "the times of a device": "os.utime('/dev/null', (1, 1))",
    "an attribute of a device": "os.setxattr('/dev/null', 'user.mark', b'x')",
    "another device in its place": "os.rename('/dev/null', '/dev/zero')",
    "the clock": "time.clock_settime(time.CLOCK_REALTIME, 0)",
    "a higher priority": "os.nice(-5)",
    "a secret in the environment": "os.environ['HF_TOKEN']",
    "a file that was open": "[os.fstat(n) for n in range(3, 64)]",
}
TRY = """
import ctypes, fcntl, mmap, multiprocessing, os, platform, resource, socket, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)
CLONE = 56 if platform.machine() == "x86_64" else 220
def check(result):
    if result == -1: raise OSError(ctypes.get_errno(), "refused")
def attempt():
    try: {attempt}
    except (OSError, MemoryError, KeyError, ValueError, AssertionError) as error: return "refused"
    return "done"
if __name__ == "__main__": print(attempt())
"""


@pytest.mark.parametrize("escape", ESCAPES)
def test_there_is_no_way_out(reward, outside, escape):
    outside["HARNESS"] = str(Path(sys.modules["grpo_jax.rewards.python"].HARNESS))
    settings = "".join(f"{name} = {value!r}\n" for name, value in outside.items())
    code = settings + TRY.format(attempt=ESCAPES[escape])
    assert judged(reward, code, [["", "refused"]], "assert attempt() == 'refused'") == [1.0, 1.0]


HARMLESS = ["read outside", "list outside", "read above the folder", "its own memory", "users", "a file in memory"]
HARMLESS += [
    "more memory than given",
    "a process",
    "a shell",
    "a process by posix_spawn",
    "connect",
    "a secret in the environment",
]


def test_the_attempts_succeed_without_a_sandbox(tmp_path, monkeypatch):
    """Those that are harmless: a refusal is the sandbox's, and no mistake of the attempt."""
    (tmp_path / "file").write_text("secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        settings = f"FOLDER = {str(tmp_path)!r}\nPORT = {server.getsockname()[1]}\n"
        for escape in HARMLESS:
            code = settings + TRY.format(attempt=ESCAPES[escape])
            run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
            assert run.stdout.endswith("done\n"), (escape, run)


def test_environment_and_neighbours(reward):
    shown = [sys.base_prefix, os.path.realpath(sys.base_prefix), str(HARNESS)]  # the interpreter and the harness
    folders = sorted({path.split("/")[2] for path in shown if path.startswith("/tmp/")})
    code = """
    import os
    print(sorted(os.environ), os.getuid() != 0, sorted(os.listdir("/tmp")), os.path.exists("/proc"), os.getcwd())
    """
    names = ["HOME", "LANG", "PATH", "PWD", "PYTHONHASHSEED"]
    assert judged(reward, code, [["", f"{names} True {folders} False /tmp"]]) == [1.0]


def test_the_devices_work_and_are_the_hosts_unchanged(reward):
    """Also for root, who owns them: a mode that is set in the sandbox would be that of the host's node."""
    before = os.stat("/dev/null")
    code = """
    import os
    for change in (lambda: os.chmod("/dev/null", 0), lambda: os.utime("/dev/null", (1, 1))):
        try: change()
        except OSError as error: print(type(error).__name__)
    print(open("/dev/null", "w").write("x"), open("/dev/null").read(), len(open("/dev/urandom", "rb").read(4)))
    """
    try:
        assert judged(reward, code, [["", "OSError\nOSError\n1  4"]]) == [1.0]
        after = os.stat("/dev/null")
        assert (after.st_mode, after.st_mtime) == (before.st_mode, before.st_mtime)
    finally:
        if os.getuid() == 0:
            os.chmod("/dev/null", before.st_mode & 0o7777)


@pytest.mark.skipif(os.getuid() != 0, reason="another user can be tried by root alone")
def test_the_sandbox_is_the_same_for_a_user_without_privileges():

    command = [
        *bubblewrap(),
        "/usr/bin/env",
        "sh",
        "-c",
        "chmod 600 /dev/null || echo $(id -u) refused; echo > /dev/null",
    ]
    run = subprocess.run(command, capture_output=True, text=True, user=65534, group=65534, extra_groups=[], cwd="/")
    assert run.stdout == "65534 refused\n", run


KILLERS = ["os.kill(os.getppid(), 9)", "os.kill(1, 9)", "os.kill(-1, 9)", "os.killpg(0, 9)", "os.kill(0, 9)"]


@pytest.mark.parametrize("killer", KILLERS)
def test_killing_hits_no_one_else(reward, killer):
    assert judged(reward, f"import os\n{killer}\n", TESTS, [["", "x"]]) == [0.0, 0.0]


def running(mark):
    """Processes of the whole machine with this argument."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        found += [folder.name] if mark.encode() in arguments and state != "Z" else []
    return found


def gone(mark, seconds=10.0):
    end = time.monotonic() + seconds
    while running(mark) and time.monotonic() < end:
        time.sleep(0.05)
    return not running(mark)


def test_nothing_outlives_its_time(reward):
    mark = f"1000.{os.getpid()}1"
    code = f"""
    import os
    try:
        if os.fork() == 0: os.setsid()
    except OSError: pass
    os.execv("/usr/bin/sleep", ["sleep", "{mark}"])
    """
    assert judged(reward, code, TESTS, [["", "x"]]) == [0.0, 0.0]
    assert gone(mark)


def test_nothing_outlives_a_run_that_is_killed(tmp_path):
    mark = f"1000.{os.getpid()}2"
    code = f'import os\nos.execv("/usr/bin/sleep", ["sleep", "{mark}"])\n'
    program = (
        "from grpo_jax.rewards.python import python_tests\n"
        f"python_tests(timeout=500.0)(['?'] * 2, [{code!r}] * 2, tests=[{TESTS!r}, [['', 'x']]])\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program])
    try:
        end = time.monotonic() + 60
        while len(running(mark)) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        assert len(running(mark)) == 2
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert gone(mark)


# ---------------------------------------------------------------------------- verifiers that evaluate answers


def test_a_pool_in_the_sandbox(tmp_path, monkeypatch):
    """A scorer that calls eval, as some of reasoning-gym's do, does no harm in a pool with the sandbox as prefix."""
    secret, folder = tmp_path / "secret", tmp_path / "code"
    secret.write_text("secret")
    folder.mkdir()
    (folder / "scorer_with_eval.py").write_text("def score(answer): return float(eval(answer))\n")
    monkeypatch.syspath_prepend(folder)
    shown = [sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix)]
    shown += [str(folder), str(Path(sys.modules["grpo_jax.rewards.pool"].__file__).parent)]
    answers = ["1 + 1", f"len(open({str(secret)!r}).read())", f"open({str(folder / 'new')!r}, 'w').write('1')"]
    answers += ["__import__('os').kill(1, 9) or 1", "9**9**9", "6 / 3"]
    with WorkerPool(workers=1, timeout=TIMEOUT, prefix=bubblewrap(read=shown)) as pool:
        outcomes = pool.map("scorer_with_eval:score", [{"answer": answer} for answer in answers])
    assert [outcome.value for outcome in outcomes] == [2.0, None, None, 1.0, None, 2.0]
    assert [outcome.fault for outcome in outcomes] == [None, "error", "error", None, "timeout", None]
    assert "FileNotFoundError" in outcomes[1].message
    assert "Read-only" in outcomes[2].message


def test_workers_of_reasoning_gym_start_no_processes():
    """Nothing but the number of the answers would bound how many there are."""
    pytest.importorskip("reasoning_gym")
    from grpo_jax.tasks import reasoning_gym

    with reasoning_gym.sandboxed_pool(workers=1, timeout=TIMEOUT) as pool:
        outcomes = pool.map("subprocess:getoutput", [{"cmd": "true"}, {"cmd": "exit"}])
    assert all("Operation not permitted" in outcome.message for outcome in outcomes)


FRAMES = [f"__import__('sys')._getframe({depth}).f_locals" for depth in range(1, 5)]
GYM_ATTACKS = {
    "the scorer": [f"setattr(type({frame}['self']), 'score_answer', lambda s, a, e: 1.0)" for frame in FRAMES],
    "the right value": [f"{frame}['entry']['metadata']['target']" for frame in FRAMES],
    "the right answer": [f"{frame}['entry']['answer']" for frame in FRAMES],
    "the right board": [
        f"[row.split() for row in {frame}['entry']['metadata']['valid_answers'][0].splitlines()]" for frame in FRAMES
    ],
    "the reader of right answers": ["setattr(__import__('ast'), 'literal_eval', lambda text: {})"],
    "builtins without quotes": ["eval(chr(95))", "exec(chr(49))", "globals()", "open(chr(47))", "print(1)"],
    "attributes": ["(1).__class__", "x.func", "1.0.real", "1.0. real", "1 .real", "x. func"],
    "processes": ["__import__('os').fork()", "__import__('subprocess').Popen(['sleep', '1000'])", "os.fork()"],
    "code": ["lambda: 24", "[c for c in ()]", "(y := 24)", "sympify('24')", "lambdify(x, x)", "f'{24}'", "preview(x)"],
}


@pytest.mark.parametrize(
    "name", ["n_queens", "countdown", "puzzle24", "polynomial_multiplication", "simple_integration"]
)
def test_an_answer_of_reasoning_gym_is_no_code_and_changes_no_verdict(name, monkeypatch):
    """Its scorers call `eval`, or SymPy's `parse_expr`, on the answer, in the process that reports the score."""
    pytest.importorskip("reasoning_gym")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    from grpo_jax.tasks import reasoning_gym

    sizes = {"train": 2, "validation": 0, "test": 0, "ood": 0}
    rows = reasoning_gym.splits(0, name=name, difficulty={}, shifted_difficulty={}, **sizes).train
    right, wrong = ast.literal_eval(rows[0]["entry"])["answer"], "7"
    answers = [right, wrong]
    for attacks in GYM_ATTACKS.values():
        for attack in attacks:
            answers += [attack, right, wrong]
    columns = {key: [rows[0][key]] * len(answers) for key in ("answer", "name", "difficulty", "entry")}
    with reasoning_gym.sandboxed_pool(workers=1, timeout=20.0) as pool:
        reward = reasoning_gym.verifier(pool=pool)
        scores = reward(["?"] * len(answers), [f"<answer>{answer}</answer>" for answer in answers], **columns)
    assert scores[:2] == [1.0, 0.0]
    verdicts = dict(zip(answers[2::3], zip(scores[2::3], scores[3::3], scores[4::3], strict=True), strict=True))
    assert {attack: three for attack, three in verdicts.items() if three != (0.0, 1.0, 0.0)} == {}
