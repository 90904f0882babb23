"""What processes tell each other: which rows are whose, what is refused, and, slowly, two that really run."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest

from grpo_jax import processes
from grpo_jax.run import preemption

ROOT = pathlib.Path(__file__).parents[1]


def test_a_process_by_itself_exchanges_with_itself_and_looks_after_every_row():
    rows = np.arange(6).reshape(3, 2)
    with processes.joined(None), processes.alike("nothing"):
        assert processes.exchange("a", {"b": 1}) == [{"b": 1}]
        assert processes.agree("here", seconds=1)
        assert processes.is_first()
    own, (found,) = processes.own_rows((jax.numpy.asarray(rows),), of=rows)
    np.testing.assert_array_equal(own, range(3))
    np.testing.assert_array_equal(found, rows)
    np.testing.assert_array_equal(processes.beside(rows, rows[:, 0]), rows[:, 0])
    with pytest.raises(KeyError), processes.alike("failing"):
        raise KeyError("its own kind")


@pytest.mark.parametrize(
    ("held", "owners"),
    [
        ([[1, 1, 0, 0], [0, 0, 1, 1]], [0, 0, 1, 1]),  # rows on one process each
        ([[1, 1, 1, 1], [1, 1, 1, 1]], [0, 0, 1, 1]),  # on both, as over `tensor`
        ([[0, 0, 0, 0], [0, 0, 0, 0]], [0, 0, 1, 1]),  # groups in parts on both
        ([[0, 1, 0], [1, 1, 0], [0, 0, 1]], [1, 0, 2]),
        ([[1], [1], [1]], [0]),
    ],
)
def test_each_row_is_one_processs_and_those_of_several_are_divided(held, owners):
    assert processes._owners(np.array(held, bool)).tolist() == owners


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("10.0.0.1", 2, 0), "the coordinator is HOST:PORT"),
        (("10.0.0.1:port", 2, 0), "the coordinator is HOST:PORT"),
        (("10.0.0.1:1234", 2, 2), "2 processes have the numbers 0 to 1, got 2"),
        (("10.0.0.1:1234", 2, -1), "got -1"),
        (("10.0.0.1:1234", None, 0), "say how many processes there are and which this is"),
        (("10.0.0.1:1234", 0, 0), "say how many processes there are and which this is"),
        ((None, 2, 0), "without a coordinator there are no"),
        (("cluster", 2, 0), "the cluster says"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_anything_is_joined(settings, message):
    with pytest.raises(ValueError, match=message), processes.joined(*settings):
        pass


def test_a_coordinator_that_does_not_answer_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"nothing answers at 127.0.0.1:{port} after 0 s"):
        processes._find(f"127.0.0.1:{port}", serves=False, wait=0)


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConnectionError, match=f"cannot serve at port {port}"):
            processes._find(f"10.0.0.1:{port}", serves=True, wait=0)


@pytest.mark.parametrize(("status", "done"), [(preemption.STOPPED, ["done"]), (3, ["told"])])
def test_a_stop_of_all_processes_is_no_end_that_the_others_are_ended_for(monkeypatch, status, done):
    said = []
    monkeypatch.setattr(processes, "exchange", lambda name, value: said.append(name))
    monkeypatch.setattr(processes, "_tell", lambda *arguments: said.append("told"))
    monkeypatch.setattr(processes, "_leave", lambda: None)
    watcher = threading.Thread(target=lambda: None)
    watcher.start()
    with pytest.raises(SystemExit), processes._left("process 0", threading.Event(), watcher):
        raise SystemExit(status)
    assert said == done


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (jax.errors.JaxRuntimeError("INTERNAL: connection closed by peer"), True),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"), True),
        (ValueError("a reward is no number"), False),
        (KeyError("UNKNOWN: "), False),
    ],
)
def test_where_a_program_failed_the_death_of_another_is_looked_for_before_it_is_told(monkeypatch, error, waits):
    said, over = [], types.SimpleNamespace(wait=lambda seconds: said.append("waited"))
    service = types.SimpleNamespace(key_value_set=lambda key, value: said.append(value))
    monkeypatch.setattr(processes, "_service", lambda: service)
    processes._tell("process 0", error, over)
    assert said[:-1] == ["waited"] * waits
    assert said[-1].startswith("process 0 ended: ")


PROGRAM = """
import os, sys, time
import jax, jax.numpy as jnp, numpy as np
from grpo_jax import processes
from grpo_jax.models import sharding

port, index, mode = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
processes._GRACE, processes._HEARTBEAT = 2, 10  # the tests do not wait as long as a run does
with processes.joined(f"127.0.0.1:{port}", 2, index, wait=60):
    mesh = sharding.mesh(data=2)
    rows = np.arange(24.0).reshape(4, 3, 2)
    x = sharding.batch(mesh, rows)
    own, found = processes.own_rows(x, of=x)
    assert own.tolist() == [[0, 1], [2, 3]][index] and (found == rows[own]).all(), (own, found)
    y = processes.beside(x, rows[..., 0])
    own, found = processes.own_rows(y, of=y)
    assert own.tolist() == [[0, 1], [2, 3]][index] and (found == rows[own, :, 0]).all(), (own, found)
    assert y.sharding.is_equivalent_to(x.sharding, 2), y.sharding
    divided = jax.NamedSharding(mesh, jax.P(None, "data"))
    groups = jax.make_array_from_callback((1, 2, 2), divided, rows[:1, :2].__getitem__)
    own, found = processes.own_rows(groups, of=groups)
    assert own.tolist() == [[0], []][index] and (found == rows[:1, :2][own]).all(), (own, found)
    assert (processes.whole(x) == rows).all()
    assert (np.concatenate(list(processes.blocks(x))) == rows).all()
    for n in range(3):
        assert processes.exchange("n", [n, index]) == [[n, 0], [n, 1]]
    long = [[n] * 2**22 for n in range(2)]  # some answers of environments to a whole batch: 12 MB
    assert processes.exchange("long", long[index]) == long
    try:
        with processes.alike("one"):
            if index == 1:
                raise KeyError("of one")
    except Exception as error:
        print(type(error).__name__, error, file=sys.stderr)
    if index == 1:
        assert not processes.agree("alone", seconds=1)
    print("only the first prints")
    sys.stderr.write("ready\\n")
    sys.stderr.flush()
    if mode == "raise" and index == 1:
        raise ValueError("a fault of this process")
    if mode != "end":
        time.sleep(100)
"""


def started(mode):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(port), str(index), mode],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_divide_rows_and_raise_alike_and_end_together():
    first, second = started("end")
    (out, err), (other_out, other_err) = first.communicate(timeout=200), second.communicate(timeout=200)
    assert (first.returncode, second.returncode) == (0, 0), err + other_err
    assert "ProcessError in process 1: KeyError: 'of one'" in err
    assert "KeyError 'of one'" in other_err
    assert "only the first prints" in out
    assert "only the first prints" not in other_out


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_is_killed_ends_the_other_within_a_minute_which_names_it(dies):
    ran = started("wait")
    for process in ran:
        while "ready" not in (line := process.stderr.readline()):
            assert line, process.wait()
    ran[dies].send_signal(signal.SIGKILL)
    ran[dies].communicate()
    began = time.monotonic()
    _, err = ran[1 - dies].communicate(timeout=100)
    assert time.monotonic() - began < 60
    assert re.search(rf"process {dies} \(.*has died", err), err
    assert ran[1 - dies].returncode == 1


@pytest.mark.slow
def test_an_exception_of_one_process_ends_the_other_with_its_words():
    first, second = started("raise")
    _, err = first.communicate(timeout=200)
    second.communicate(timeout=200)
    assert re.search(r"process 1 \(.*ended: ValueError: a fault of this process", err), err
    assert (first.returncode, second.returncode) == (1, 1)
