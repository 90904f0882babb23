"""A script as a command: errors of the input end in one line."""

import dataclasses
import io
import re
import sys

import pytest
import rich

from grpo_jax import run
from grpo_jax.run import command_line
from grpo_jax.run.precision import compute_dtype


@dataclasses.dataclass(frozen=True)
class Config:
    number: int = 1
    names: tuple[str, ...] = ()
    smoke: bool = False


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch):
    monkeypatch.setattr(command_line.compilation, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(command_line.compilation, "trim_malloc", lambda: None)


def fails(config):
    error = ValueError(f"number is even, got {config.number}")
    error.add_note("choose another")
    error.add_note("-----\nFor simplicity, JAX has removed frames. Set JAX_TRACEBACK_FILTERING=off to include these.")
    raise error


def test_settings_come_from_the_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr("sys.argv", ["script", "--number", "3"])
    run.command(seen.append, Config)
    assert seen == [Config(3)]


def test_an_error_of_the_input_is_one_line_unless_its_traceback_is_asked_for(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script", "--number", "3"])
    with pytest.raises(SystemExit) as raised:
        run.command(fails, Config)
    assert raised.value.code == "error: number is even, got 3\n  choose another\n  (--traceback shows where)"
    monkeypatch.setattr("sys.argv", ["script", "--number", "3", "--traceback"])
    with pytest.raises(ValueError, match="number is even"):
        run.command(fails, Config)


@pytest.mark.parametrize("code", [0, None, 3])
def test_a_script_that_imported_code_ends_is_not_done(monkeypatch, code):
    """As a module of rewards does that runs its own main on import."""

    def leaves(config):
        sys.exit(code)

    monkeypatch.setattr("sys.argv", ["script"])
    with pytest.raises(SystemExit) as raised:
        run.command(leaves, Config)
    if code:
        assert raised.value.code == code
    else:
        assert re.fullmatch(
            rf"error: {re.escape(__file__)}, line \d+, ended the script with sys.exit\(\) before it was done",
            raised.value.code,
        )


def test_what_a_terminal_cannot_write_is_written_in_escapes(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr("sys.argv", ["script"])
    run.command(lambda config: rich.print("a completion: 五"), Config)
    sys.stdout.flush()
    assert written.getvalue() == b"a completion: \\u4e94\n"


def test_values_behind_an_option_that_is_given_twice_are_not_lost(monkeypatch):
    seen = []
    monkeypatch.setattr("sys.argv", ["script", "--names", "a", "b", "--number", "3", "--number", "4"])
    run.command(seen.append, Config)
    assert seen == [Config(4, ("a", "b"))]
    for again in (["--names", "a", "--names", "b"], ["--names=a", "--number", "3", "--names", "b"]):
        monkeypatch.setattr("sys.argv", ["script", *again])
        with pytest.raises(SystemExit) as raised:
            run.command(seen.append, Config)
        assert raised.value.code.startswith("error: --names is given twice: write all of its values behind one")
    assert len(seen) == 1


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script"])
    with pytest.raises(ZeroDivisionError):
        run.command(lambda config: 1 / 0, Config)


def test_a_module_with_an_error_of_syntax_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script"])
    with pytest.raises(SystemExit, match=r"error: .*\(mine.py, line 1\)"):
        run.command(lambda config: compile("def f(:", "mine.py", "exec"), Config)


def test_on_a_cpu_the_default_is_float32():
    assert compute_dtype() == "float32"
    assert compute_dtype("bfloat16") == "bfloat16"


def test_settings_change_the_default_that_is_given(monkeypatch):
    seen = []
    monkeypatch.setattr("sys.argv", ["script"])
    run.command(seen.append, Config, default=Config(7))
    assert seen == [Config(7)]


@pytest.mark.parametrize(("flags", "number"), [([], 7), (["--smoke"], 1)])
def test_a_smoke_run_has_the_settings_that_its_function_makes(monkeypatch, flags, number):
    seen = []
    monkeypatch.setattr("sys.argv", ["script", "--number", "7", *flags])
    run.command(seen.append, Config, smoke=lambda config: dataclasses.replace(config, number=1))
    assert seen == [Config(number, smoke=bool(flags))]
