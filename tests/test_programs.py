"""Programs are compiled ahead, once for each form of arguments, and what compiling has freed goes back."""

import threading

import jax
import jax.numpy as jnp
import pytest

from grpo_jax import programs
from grpo_jax.programs import Program
from grpo_jax.run.compilation import count_compilations


def finish():
    for thread in threading.enumerate():
        if thread.name == "compiling ahead":
            thread.join()


def doubled():
    return Program(jax.jit(lambda state, x: ({"n": state["n"] + 1, "key": state["key"]}, 2 * x), donate_argnums=0))


def test_what_was_compiled_ahead_is_not_compiled_again_and_is_counted():
    double, state, count = doubled(), {"n": jnp.int32(0), "key": jax.random.key(0)}, count_compilations()
    x, y = jax.block_until_ready((jnp.ones(3), jnp.ones(4)))
    before = count()
    shapes = [(state, x), (state, jax.ShapeDtypeStruct(y.shape, y.dtype)), (state, y)]
    assert double.ahead(shapes) == 2
    finish()
    assert count() == before + 2
    state, of_x = double(state, x)
    state, of_y = double(state, y)
    assert (of_x.tolist(), of_y.tolist(), int(state["n"])) == ([2.0] * 3, [2.0] * 4, 2)
    assert count() == before + 2
    assert double.ahead(shapes) == 0


def test_a_call_waits_for_its_program_and_takes_what_the_thread_has_not_begun(monkeypatch):
    begun, may_end = threading.Event(), threading.Event()
    double, state = doubled(), {"n": jnp.int32(0), "key": jax.random.key(0)}
    x, y = jnp.ones(5), jnp.ones(6)

    def freed():  # after the thread's first program
        begun.set()
        if threading.current_thread() is not threading.main_thread():
            may_end.wait(timeout=60)

    monkeypatch.setattr(programs, "give_back_freed", freed)
    double.ahead([(state, x), (state, y)])
    assert begun.wait(timeout=60)
    state, of_y = double(state, y)
    assert of_y.tolist() == [2.0] * 6
    may_end.set()
    finish()
    assert double(state, x)[1].tolist() == [2.0] * 5


def test_what_fails_ahead_fails_where_it_is_called():
    broken = Program(jax.jit(lambda x: x @ jnp.ones((7, 7))))
    broken.ahead([(jnp.ones(3),)])
    finish()
    with pytest.raises(TypeError, match="dot_general"):
        broken(jnp.ones(3))


def test_freed_memory_goes_back_once_for_each_program(monkeypatch):
    times = []
    monkeypatch.setattr(programs, "give_back_freed", lambda: times.append(1))
    add = Program(jax.jit(lambda x: x + 1))
    for x in (jnp.ones(2), jnp.ones(2), jnp.ones(9), jnp.ones(2)):
        add(x)
    assert len(times) == 2
    jax.eval_shape(add, jnp.ones(11))  # a trace compiles nothing
    assert len(times) == 2
