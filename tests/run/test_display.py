import io
import re

import jax.numpy as jnp
import rich.console

from grpo_jax.run import display


def shown(*, terminal: bool, steps, total: int = 30, **settings) -> str:
    out = io.StringIO()
    console = rich.console.Console(file=out, force_terminal=terminal, width=100)
    with display.progress(total, console=console, **settings) as show:
        for step in steps:
            show(step, {"reward": jnp.float32(step / 100), "kl": 1e-6, "unasked": 5.0, "length": 12}, 12345.6)
    return out.getvalue()


def test_without_a_terminal_a_line_is_printed_every_few_steps_and_for_the_first_and_last():
    lines = shown(terminal=False, steps=range(3, 28), start=3, total=28).splitlines()
    assert [line.split()[1] for line in lines] == ["4/28", "10/28", "20/28", "28/28"]
    assert re.fullmatch(r"step 10/28  reward 0.09  kl 1e-06  length 12  tokens/s 12,346  left \d+:\d\d:\d\d", lines[1])
    assert not any("\x1b" in line for line in lines)


def test_on_a_terminal_each_step_is_drawn_over_the_last():
    drawn = shown(terminal=True, steps=range(30))
    assert "\x1b[1A" in drawn
    for name in ("step", "reward", "kl", "length", "tokens/s", "left", "30/30", "12,346"):
        assert name in drawn
    for name in ("unasked", "accuracy", "entropy"):  # not asked for, or not measured
        assert name not in drawn


def test_the_remaining_time_is_that_of_the_steps_after_the_first(monkeypatch):
    seconds = iter([100.0, 102.0, 104.0])  # however long the first took to compile
    monkeypatch.setattr(display.time, "monotonic", lambda: next(seconds))
    lines = shown(terminal=False, steps=[0, 1, 2], total=103, every=1).splitlines()
    assert [line.partition("  left ")[2] for line in lines] == ["", "0:03:22", "0:03:20"]
