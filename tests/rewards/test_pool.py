"""Workers that can be killed: no item takes more down than itself."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.rewards.outcomes import Outcome, to_rewards
from grpo_jax.rewards.pool import WorkerPool, in_worker_processes

VERIFIERS = """
import ctypes, functools, json, os, signal, subprocess, sys, time

def half(number): return number / 2

def misbehave(how):
    if how == "hang": time.sleep(60)
    if how == "hang in C": return 9**9**9
    if how == "ignore signals":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
        time.sleep(60)
    if how == "exit": os._exit(0)
    if how == "segfault": ctypes.string_at(0)
    if how == "be killed": os.kill(os.getpid(), signal.SIGKILL)
    if how == "print": print("x" * 10**6, flush=True); os.write(1, b"{}\\n" * 10**5); os.write(2, b"x" * 10**6)
    if how == "read": return len(sys.stdin.read())
    if how == "flood": write_everywhere(b"x" * 10**6)
    if how == "garbage": write_everywhere(b"no JSON\\n")
    if how == "deep garbage": write_everywhere(b"[" * 60000 + b"\\n")
    if how == "forged": write_everywhere(b'{"id": 0, "value": NaN}\\n{"id": 1, "value": 1e999}\\n')
    if how == "another item's": write_everywhere(b'{"id": 0, "value": 9.0}\\n'); time.sleep(0.5)
    if how == "a child keeps the pipe": subprocess.Popen(["sleep", "60"], pass_fds=pipes()); os._exit(0)
    if how == "memory": return len(bytearray(2**33))
    if how == "recursion": return misbehave_again(how)
    if how == "raise": raise KeyError("what is wrong")
    if how == "leave": sys.exit(0)
    if how == "interrupt": raise KeyboardInterrupt
    if how == "nan": return float("nan")
    if how == "huge": return 10**400
    if how == "text": return "1"
    if how == "none": return None
    if how == "bool": return True
    return 0.25

def misbehave_again(how): return misbehave(how)

def pipes(): return [n for n in range(3, 20) if os.path.exists(f"/proc/self/fd/{n}")]

def write_everywhere(what):
    for number in pipes():
        try: os.write(number, what)
        except OSError: pass

def linger(seconds): time.sleep(seconds); return os.getpid()

def say_later(now):
    import threading
    threading.Timer(0.1, write_everywhere, [b'{"id": 0, "value": 9.0}\\n']).start()
    return now

def environment(name): return float(name in os.environ)

def descriptors(): return float(len(pipes()))

def orphan(file):
    child = subprocess.Popen(["sleep", "60"])
    open(file, "w").write(f"{os.getpid()} {child.pid}")
    time.sleep(60)

def score(completion, answer, bonus=0.0):
    if completion == "hang": time.sleep(60)
    if completion == "exhaust": return len(bytearray(2**33))
    if completion == "crash": os._exit(1)
    if completion == "fault": raise KeyError("the verifier's own")
    if completion == "unsure": return None
    return float(completion == answer) + bonus

def everything(completion, **columns): return float(sorted(columns) == ["answer", "level", "prompt"])

async def later(completion, answer): return score(completion, answer)

def plain(completion, answer, values): return float(answer == 4 and values == [1, 2] and type(answer) is int)

wrapped = functools.partial(half, number=1)
"""


@pytest.fixture(scope="module")
def verifiers(tmp_path_factory):
    file = tmp_path_factory.mktemp("verifiers") / "pool_test_verifiers.py"
    file.write_text(VERIFIERS)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[file.stem]


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(workers=2, timeout=1.0, memory=2**30) as workers:
        yield workers


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


# ---------------------------------------------------------------------------- map


def test_values_come_in_the_order_of_the_items(pool, verifiers):
    assert pool.map(verifiers.half, [{"number": i} for i in range(100)]) == [Outcome(i / 2) for i in range(100)]


def test_what_takes_longer_does_not_change_the_order(pool, verifiers):
    seconds = [0.3, 0.0, 0.1, 0.0]
    outcomes = pool.map(verifiers.linger, [{"seconds": s} for s in seconds])
    assert outcomes[0].value != outcomes[1].value == outcomes[3].value  # process numbers: the first kept one busy


def test_no_items(pool, verifiers):
    assert pool.map(verifiers.half, []) == []


FAULTS = {
    "hang": "timeout",
    "hang in C": "timeout",
    "ignore signals": "timeout",
    "exit": "lost",
    "segfault": "lost",
    "be killed": "lost",
    "flood": "lost",
    "garbage": "lost",
    "deep garbage": "lost",
    "forged": "lost",
    "another item's": "lost",
    "a child keeps the pipe": "lost",
    "memory": "exhausted",
    "recursion": "exhausted",
    "raise": "error",
    "leave": "error",
    "interrupt": "error",
    "nan": "error",
    "huge": "error",
    "text": "error",
}
VALUES = {"print": 0.25, "read": 0.0, "none": None, "bool": 1.0, "well": 0.25}


@pytest.mark.parametrize("how", [*FAULTS, *VALUES])
def test_an_item_harms_neither_the_others_nor_the_pool(pool, verifiers, how):
    began = time.monotonic()
    outcomes = pool.map(verifiers.misbehave, [{"how": "well"}, {"how": how}, {"how": "well"}, {"how": "well"}])
    assert time.monotonic() - began < 6
    assert [outcomes[i] for i in (0, 2, 3)] == [Outcome(0.25)] * 3
    assert outcomes[1].fault == FAULTS.get(how)
    assert outcomes[1].value == VALUES.get(how)
    assert pool.map(verifiers.half, [{"number": 3}]) == [Outcome(1.5)]


def test_an_error_comes_with_its_traceback(pool, verifiers):
    message = pool.map(verifiers.misbehave, [{"how": "raise"}])[0].message
    assert "KeyError: 'what is wrong'" in message
    assert "pool_test_verifiers.py" in message


def test_what_a_worker_says_unasked_is_not_the_next_items_answer(verifiers):
    with WorkerPool(workers=1, timeout=5.0) as pool:
        assert pool.map(verifiers.say_later, [{"now": 1}]) == [Outcome(1.0)]
        time.sleep(0.5)
        assert pool.map(verifiers.half, [{"number": 1}]) == [Outcome(0.5)]


def test_a_worker_that_dies_between_calls_is_replaced(verifiers):
    with WorkerPool(workers=1) as pool:
        pid = int(pool.map(verifiers.linger, [{"seconds": 0}])[0].value)
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: not alive(pid))
        assert pool.map(verifiers.half, [{"number": 1}]) == [Outcome(0.5)]


def test_a_worker_that_is_too_slow_dies_with_its_children(verifiers, tmp_path):
    with WorkerPool(workers=1, timeout=1.0) as pool:
        file = tmp_path / "pids"
        assert pool.map(verifiers.orphan, [{"file": str(file)}])[0].fault == "timeout"
        assert wait_until(lambda: not any(alive(pid) for pid in file.read_text().split()))


@pytest.mark.parametrize("end", ["close", "collect"])
def test_workers_end_with_the_pool(verifiers, end):
    pool = WorkerPool(workers=1)
    pid = int(pool.map(verifiers.linger, [{"seconds": 0}])[0].value)
    assert alive(pid)
    if end == "close":
        pool.close()
    else:
        del pool
    assert wait_until(lambda: not alive(pid))


def test_a_closed_pool_starts_again(verifiers):
    pool = WorkerPool(workers=1)
    for _ in range(2):
        assert pool.map(verifiers.half, [{"number": 1}]) == [Outcome(0.5)]
        pool.close()


@pytest.mark.slow
def test_workers_end_when_the_run_is_killed(tmp_path):
    """One that is idle, and one that hangs in C code, where its own timer alone can end it."""
    idle, busy, program = tmp_path / "idle", tmp_path / "busy", tmp_path / "run.py"
    (tmp_path / "verifier_of_a_killed_run.py").write_text(
        "import os, time\n"
        "def judge(file, other):\n"
        "    with open(file, 'w') as f: f.write(str(os.getpid()))\n"
        "    while not os.path.exists(other): time.sleep(0.01)\n"  # each has its worker
        "    return 9**9**9**9 if file.endswith('busy') else 0\n"
    )
    program.write_text(
        "from grpo_jax.rewards import pool\n"
        "import verifier_of_a_killed_run\n"
        "workers = pool.WorkerPool(workers=2, timeout=0.5)\n"
        "workers._timeout = 60.0\n"  # so that the worker's own timer comes first
        f"idle, busy = {str(idle)!r}, {str(busy)!r}\n"
        "items = [{'file': idle, 'other': busy}, {'file': busy, 'other': idle}]\n"
        "workers.map(verifier_of_a_killed_run.judge, items)\n"
    )
    run = subprocess.Popen([sys.executable, str(program)])
    try:
        assert wait_until(lambda: all(file.exists() and file.read_text() for file in (idle, busy)), 60)
        assert alive(idle.read_text())
        assert alive(busy.read_text())
    finally:
        run.kill()
        run.wait()
    assert wait_until(lambda: not alive(idle.read_text()), 3)
    assert wait_until(lambda: not alive(busy.read_text()), 15)


def test_a_batch_has_a_limit_too(verifiers):
    with WorkerPool(workers=1, timeout=30.0, batch_timeout=1.5) as pool:
        pool.map(verifiers.half, [{"number": 1}])  # started
        began = time.monotonic()
        outcomes = pool.map(verifiers.linger, [{"seconds": 0}, {"seconds": 60}, {"seconds": 0}])
        assert time.monotonic() - began < 4
        assert [outcome.fault for outcome in outcomes] == [None, "lost", "lost"]
        assert "1.5 s" in outcomes[2].message
        assert pool.map(verifiers.half, [{"number": 1}]) == [Outcome(0.5)]


def test_items_are_scored_at_the_same_time(verifiers):
    with WorkerPool(workers=4, timeout=5.0) as pool:
        pool.map(verifiers.linger, [{"seconds": 0.2}] * 4)
        began = time.monotonic()
        pool.map(verifiers.linger, [{"seconds": 1.0}] * 4)
        assert time.monotonic() - began < 3


def test_off_the_main_thread(pool, verifiers):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(pool.map(verifiers.misbehave, [{"how": "hang"}, {"how": "well"}]))
    )
    thread.start()
    thread.join(30)
    assert [outcome.fault for outcome in results[0]] == ["timeout", None]


def test_items_larger_than_a_pipe(verifiers):
    text = "é\n" * 300_000
    with WorkerPool(workers=2, timeout=60.0) as pool:
        assert pool.map(verifiers.score, [{"completion": text, "answer": text}] * 3) == [Outcome(1.0)] * 3


def test_workers_have_no_secrets(verifiers, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with open(os.devnull) as file, WorkerPool(workers=1) as pool:
        os.set_inheritable(file.fileno(), True)
        assert pool.map(verifiers.environment, [{"name": "HF_TOKEN"}, {"name": "PATH"}]) == [Outcome(0.0), Outcome(1.0)]
        assert pool.map(verifiers.descriptors, [{}])[0].value <= 3  # the channel's two, and the null device


def test_workers_do_not_import_jax(pool, tmp_path):
    (tmp_path / "verifier_that_looks.py").write_text("import sys\ndef jax(): return float('jax' in sys.modules)\n")
    sys.path.insert(0, str(tmp_path))
    try:
        assert pool.map("verifier_that_looks:jax", [{}]) == [Outcome(0.0)]
    finally:
        sys.path.remove(str(tmp_path))


def test_the_prefix_runs_the_worker(verifiers):
    with WorkerPool(workers=1, prefix=["env", "MARK=1"]) as pool:
        assert pool.map(verifiers.environment, [{"name": "MARK"}]) == [Outcome(1.0)]


@pytest.mark.parametrize(
    "prefix", [["false"], ["sh", "-c", "echo no sandbox here >&2; exit 1"]], ids=["silent", "a complaint"]
)
def test_workers_that_cannot_start_are_no_items_fault(verifiers, prefix):
    with (
        WorkerPool(workers=1, prefix=prefix) as pool,
        pytest.raises(RuntimeError, match=r"could not load half.*" + ("no sandbox here" if len(prefix) > 1 else "")),
    ):
        pool.map(verifiers.half, [{"number": 1}])


def test_a_module_that_cannot_be_loaded_is_no_items_fault(pool, tmp_path, monkeypatch):
    (tmp_path / "broken_verifier.py").write_text("import what_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="No module named 'what_is_not_installed'"):
        pool.map("broken_verifier:judge", [{}])
    (tmp_path / "script_verifier.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(RuntimeError, match=r"could not load judge of .*script_verifier.py: (.|\n)*sys.exit\(0\)"):
        pool.map("script_verifier:judge", [{}])


DIES_LOADING = """
import os, pathlib, signal
deaths = pathlib.Path({deaths!r})
if len(deaths.read_text()) < {times}:
    deaths.write_text(deaths.read_text() + "x")
    os.kill(os.getpid(), signal.SIGKILL)
def score(): return 1.0
"""


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_worker_killed_while_it_loads_its_function_is_replaced_up_to_two_times(tmp_path, monkeypatch, times):
    """As by the system, which is short of memory: no item is to blame, and no batch."""
    deaths = tmp_path / "deaths"
    deaths.write_text("")
    (tmp_path / f"dies_loading_{times}.py").write_text(DIES_LOADING.format(deaths=str(deaths), times=times))
    monkeypatch.syspath_prepend(tmp_path)
    with WorkerPool(workers=1) as workers:
        if times < 3:
            assert workers.map(f"dies_loading_{times}:score", [{}, {}]) == [Outcome(1.0)] * 2
        else:
            with pytest.raises(RuntimeError, match=r"could not load score.*exit status -9"):
                workers.map(f"dies_loading_{times}:score", [{}, {}])
    assert len(deaths.read_text()) == times


@pytest.mark.parametrize("kind", ["lambda", "partial", "builtin", "absent"])
def test_functions_that_workers_cannot_find_are_refused(pool, verifiers, kind):
    functions = {"lambda": lambda: 1.0, "partial": verifiers.wrapped, "builtin": len, "absent": "no_such_module:f"}
    with pytest.raises(ValueError, match="must be defined with def at the top"):
        pool.map(functions[kind], [{}])


def test_items_that_json_cannot_hold_are_refused(pool, verifiers):
    with pytest.raises(TypeError, match="does not fit into JSON"):
        pool.map(verifiers.half, [{"number": 1 + 2j}])


@pytest.mark.parametrize(
    "settings",
    [{"workers": 0}, {"timeout": 0}, {"timeout": float("inf")}, {"batch_timeout": -1}, {"memory": 1000}],
    ids=str,
)
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=str(next(iter(settings.values())))):
        WorkerPool(**settings)


# ---------------------------------------------------------------------------- in_worker_processes


def test_rewards_of_what_the_completion_and_what_the_verifier_caused(pool, verifiers):
    reward = in_worker_processes(verifiers.score, pool=pool, wrong=-1.0)
    completions = ["4", "5", "hang", "exhaust", "crash", "fault", "unsure", "4"]
    metrics = {}
    with pytest.warns(RuntimeWarning, match=r"(?s)score could not score 2 of 8 .* completion 4: the worker died"):
        rewards = reward(["?"] * 8, completions, answer=["4"] * 8, log_metric=metrics.__setitem__)
    assert rewards == [1.0, 0.0, -1.0, -1.0, None, None, None, 1.0]
    assert metrics == {"score/timeouts": 2, "score/faults": 2}


def test_chat_messages_settings_and_columns_it_does_not_name(pool, verifiers):
    reward = in_worker_processes(verifiers.score, pool=pool, settings={"bonus": 0.5}, name="mine")
    chat = [[{"role": "assistant", "content": "4"}], [{"role": "assistant", "content": "5"}]]
    columns = {"answer": ["4", "4"], "bonus": [9.0, 9.0], "unused": [object(), object()], "trainer_state": object()}
    assert reward(prompts=["?", "?"], completions=chat, **columns) == [1.5, 0.5]
    assert reward.__name__ == "mine"


def test_a_verifier_with_keywords_gets_every_column(pool, verifiers):
    reward = in_worker_processes(verifiers.everything, pool=pool)
    assert reward(["?"], ["4"], answer=["4"], level=[1], log_extra=print) == [1.0]


def test_an_async_verifier_is_waited_for(pool, verifiers):
    reward = in_worker_processes(verifiers.later, pool=pool)
    with pytest.warns(RuntimeWarning, match=r"(?s)later could not score 1 of 3 .*the verifier's own"):
        assert reward(["?"] * 3, ["4", "5", "fault"], answer=["4"] * 3) == [1.0, 0.0, None]


@pytest.mark.parametrize("kind", [tuple, np.array, list])
def test_columns_are_sequences_or_arrays(pool, verifiers, kind):
    reward = in_worker_processes(verifiers.plain, pool=pool)
    assert reward(["?"] * 2, ["a", "b"], answer=kind([4, 4]), values=kind([[1, 2], [1, 2]])) == [1.0, 1.0]
    assert reward(["?"], ["a"], answer=[np.int64(4)], values=[np.array([1, 2])]) == [1.0]
    with pytest.raises(ValueError, match="the column answer has 1 entries for 2 completions"):
        reward(["?"] * 2, ["a", "b"], answer=kind([4]), values=kind([[1, 2], [1, 2]]))


def test_a_pool_of_its_own(verifiers):
    reward = in_worker_processes(verifiers.score, workers=1, timeout=0.5)
    assert reward(["?"] * 2, ["hang", "4"], answer=["4"] * 2) == [0.0, 1.0]


def test_rewards_of_outcomes_without_faults_is_silent():
    outcomes = [Outcome(0.5), Outcome(None), Outcome(None, "exhausted")]
    metrics = {}
    assert to_rewards(outcomes, "r", wrong=-2.0, log_metric=metrics.__setitem__) == [0.5, None, -2.0]
    assert metrics == {"r/timeouts": 1, "r/faults": 0}
