"""What a user's function has changed of the process is put back."""

import io
import os
import pathlib
import subprocess
import sys

import pytest

from grpo_jax import user_code
from grpo_jax.environments import Turn, answers
from grpo_jax.rewards.calling import call
from grpo_jax.run.names import resolve


@pytest.mark.parametrize("gone", [False, True])
def test_the_working_directory_is_put_back_also_from_a_folder_that_is_gone(tmp_path, monkeypatch, gone):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch").mkdir()

    def wanders(prompts, completions):
        os.chdir("scratch")
        if gone:
            pathlib.Path("../scratch").rmdir()
        raise LookupError("no way back")

    to = "a folder that is gone" if gone else "scratch"
    with (
        pytest.warns(RuntimeWarning, match=f"the reward wanders has changed the working directory to .*{to}; it is"),
        pytest.raises(LookupError, match="no way back"),
    ):
        call([wanders], {"prompts": ["a"], "completions": ["b"]}, 1)
    assert pathlib.Path.cwd() == tmp_path


def test_so_it_is_after_an_environment_and_after_the_import_of_a_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def wanders(row, messages):
        os.chdir("/")
        return Turn(None)

    with pytest.warns(RuntimeWarning, match="the environment wanders has changed the working directory to /"):
        assert answers(wanders, [({}, [])], timeout=60.0) == [Turn(None)]
    assert pathlib.Path.cwd() == tmp_path
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wandering.py").write_text("import os\nos.chdir('/')\ndef reward(completions): ...")
    with pytest.warns(RuntimeWarning, match="the module wandering has changed the working directory to /"):
        resolve("wandering:reward")
    assert pathlib.Path.cwd() == tmp_path


def test_what_is_printed_is_seen_again_after_a_function_that_caught_it(capsys):
    def mutes(prompts, completions):
        sys.stdout = sys.stderr = io.StringIO()
        return [1.0]

    async def waits(prompts, completions):
        return mutes(prompts, completions)

    for function in (mutes, waits):
        assert call([function], {"prompts": ["a"], "completions": ["b"]}, 1) == [[1.0]]
        print("seen")
    assert capsys.readouterr().out == "seen\nseen\n"


def in_a_process(program):
    """Of `put_back` without JAX, which warns of forks."""
    loaded = f"""
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("user_code", {user_code.__file__!r})
user_code = importlib.util.module_from_spec(spec)
spec.loader.exec_module(user_code)
"""
    return subprocess.run([sys.executable, "-c", loaded + program], capture_output=True, text=True, check=True)


def test_a_stream_that_a_function_has_closed_is_open_again():
    done = in_a_process("""
with user_code.put_back("closes"):
    sys.stdout.close(), sys.stderr.close()
print("the run goes on")
print("with its errors", file=sys.stderr)
""")
    assert (done.stdout, done.stderr) == ("the run goes on\n", "with its errors\n")


@pytest.mark.parametrize("ends", ["pass", "raise KeyError"])
def test_a_fork_that_comes_back_from_a_function_does_not_go_on_with_the_run(ends):
    done = in_a_process(f"""
with user_code.put_back("forks"):
    if (child := os.fork()) == 0:
        {ends}
print("the run goes on after", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
""")
    assert done.stdout == "the run goes on after 1\n"
    assert "a process that forks forked came back from it, and ends" in done.stderr
