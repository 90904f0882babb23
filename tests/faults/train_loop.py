"""Runs that are killed, for `test_kill_and_resume.py`: `python train_loop.py FOLDER RUN=PLAN...`.

Each plan is a process of the run in `FOLDER/RUN`. Its exit status and the newest checkpoint it left are one line of
output.

    finish      undisturbed
    file:N      killed at its Nth file event below the folder, which hits any place in a save on any machine
    files:N:M   killed at event N, its successor at N + M, at N + 2M ..., until one finishes
    writing     killed when the arrays of a checkpoint are seen to be written
    stop:N      asked to stop, by SIGTERM, in step N

The processes are forked, before any of them starts JAX, so that the imports are paid for once.
"""

import itertools
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from grpo_jax.run.training_loop import loop as run_loop
from grpo_jax.types import TrainState

STEPS = 8
OPTIMIZER = optax.adamw(0.1)


def initial_state() -> TrainState:
    params = {"w": jnp.linspace(-1.0, 1.0, 6), "b": jnp.zeros((), jnp.bfloat16)}
    key = jax.random.key(7)
    extra = {"schedule": (), "coefficient": jnp.asarray(0.5)}
    reference = jax.tree.map(jnp.copy, params)
    frozen = {"codes": jnp.arange(6).astype(jnp.uint4), "scale": jnp.float32(0.3)}
    return TrainState(params, OPTIMIZER.init(params), key, jnp.int32(0), jnp.int32(0), reference, frozen, extra)


@jax.jit
def train_step(state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
    x = jax.random.normal(jax.random.fold_in(state.key, state.step), (16, 6))

    def loss(params):
        drift = optax.tree.norm(optax.tree.sub(params, state.ref_params), squared=True)
        w = params["w"] + state.frozen["scale"] * state.frozen["codes"].astype(jnp.float32)
        return jnp.mean((x @ w + params["b"] - x[:, 0]) ** 2) + state.extra["coefficient"] * drift

    value, gradient = jax.value_and_grad(loss)(state.params)
    updates, opt_state = OPTIMIZER.update(gradient, state.opt_state, state.params)
    extra = state.extra | {"coefficient": state.extra["coefficient"] * 0.9}
    params = optax.apply_updates(state.params, updates)
    return state._replace(params=params, opt_state=opt_state, step=state.step + 1, extra=extra), {"loss": value}


def train(run_dir: pathlib.Path, stop_in: int | None = None) -> None:
    with run_loop({"steps": STEPS}, initial_state(), steps=STEPS, save_every=2, run_dir=run_dir) as loop:
        for step in loop:
            if step % 3 == 0:
                loop.log({"eval/w": loop.state.params["w"][0]})
                loop.show([{"completion": step}])
            loop.state, measured = train_step(loop.state)
            if step == stop_in:
                os.kill(os.getpid(), signal.SIGTERM)
            loop.log(measured)


def die_at_file_event(run_dir: pathlib.Path, kill_at: int) -> None:
    events = itertools.count()
    watched = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")

    def on_event(event: str, arguments: tuple) -> None:
        if event in watched and str(run_dir) in str(arguments[0]) and next(events) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)


def start(train: Callable[..., object], run_dir: pathlib.Path, plan: str) -> int:
    if (process := os.fork()) != 0:
        return process
    os.dup2(2, 1)  # the output of this program is the report
    try:
        kind, _, number = plan.partition(":")
        if kind == "file":
            die_at_file_event(run_dir, int(number))
        train(run_dir, stop_in=int(number) if kind == "stop" else None)
    except SystemExit as stopped:
        os._exit(stopped.code)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def follow(train: Callable[..., object], run_dir: pathlib.Path, plan: str) -> int:
    process = start(train, run_dir, plan)
    while plan == "writing":
        if any(run_dir.glob(f"checkpoints/*{ocp.utils.TMP_DIR_SUFFIX}/state*/ocdbt*")):
            os.kill(process, signal.SIGKILL)
            break
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    steps = [int(path.name) for path in run_dir.glob("checkpoints/*") if path.name.isdigit()]
    print(run_dir.name, plan, status, max(steps, default=0), flush=True)
    return status


def carry_out(train: Callable[..., object], folder: str, plans: Sequence[str]) -> None:
    """Runs `train(run_dir, stop_in)` by each plan."""
    for argument in plans:
        name, plan = argument.split("=")
        run_dir = pathlib.Path(folder) / name
        kind, *numbers = plan.split(":")
        if kind == "files":
            first, stride = map(int, numbers)
            next(at for at in itertools.count(first, stride) if follow(train, run_dir, f"file:{at}") == 0)
        else:
            follow(train, run_dir, plan)


if __name__ == "__main__":
    carry_out(train, sys.argv[1], sys.argv[2:])
