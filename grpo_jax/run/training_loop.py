"""The run around a step, once for all experiments.

    with run.loop(config, state, steps=500, save_every=50) as loop:
        for n in loop:                                             # from the newest checkpoint
            experience = step.collect(loop.state, batch(n))
            rewards, reward_mask = reward(experience.rollout)
            loop.state, metrics = step.learn(loop.state, experience._replace(rewards=rewards, reward_mask=reward_mask))
            loop.log(metrics)

An experiment does in its loop what only it does: it evaluates and exports at the head of a step, where `loop.state` is
the state after `n` steps and may be saved. Everything here works without it, too.

A run ends in the same bits, however often it is killed and started again. Each step writes its line of metrics before
the checkpoint that counts on it, and the state is saved before an export, after an exception and on a graceful stop.

Of several processes (`grpo_jax.processes`) each goes through the loop, and the first writes; all see the run's folder.
A stop that one is asked for stops all after the same step.
"""

import contextlib
import hashlib
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax import processes
from grpo_jax.run import (
    checkpoint,
    compilation,
    completions,
    display,
    leftovers,
    metrics,
    monitoring,
    plots,
    preemption,
    resuming,
    writers,
)
from grpo_jax.run.fingerprints import fingerprint
from grpo_jax.statistics import Mean, summary
from grpo_jax.types import Metrics, TrainState


@contextlib.contextmanager
def loop(
    config: Any,
    state: TrainState,
    *,
    steps: int,
    save_every: int = 50,
    run_dir: metrics.RunDir | None = None,
    allow: Sequence[str] = (),
    digests: Mapping[str, str] | None = None,
    initial: Sequence[str] = ("ref_params", "frozen"),
    keys: Sequence[str] = ("reward", "loss", "kl", "entropy", "length"),
    curves: Sequence[str] | None = None,
    stop_after_skipped: int = 5,
    tensorboard: bool = False,
    wandb: str | None = None,
    profile: bool = False,
    compilation_cache: bool = True,
    whole: Callable[[TrainState], TrainState] = lambda state: state,
) -> Iterator["Loop"]:
    """Opens the run in a folder, at its newest checkpoint if it has one.

    Args:
      config: a dataclass or mapping of the settings, kept with every checkpoint. A run is not resumed under others.
      state: at step 0; the arrays that no checkpoint holds (see `initial`) are taken from it.
      steps: of the whole run.
      save_every: steps between checkpoints; the last step has one, too.
      run_dir: `config.run_dir` unless given.
      allow: settings that may change when a run is resumed; `run_dir` always may.
      digests: of everything else that the run depends on, such as its prompts; see `grpo_jax.run.digests`.
      initial: fields of the state that no step changes; see `checkpoint.save`.
      keys: metrics to show while the run goes.
      curves: metrics in the plot `metrics.png`; all of them unless given.
      stop_after_skipped: ends the run after this many steps in a row whose updates were not finite. Where the loss has
        a scale, which each of them halves (`schedules.loss_scale`), those count that it was 1 or less in.
      tensorboard: write to TensorBoard, in the run's folder.
      wandb: the project of Weights & Biases to write to.
      profile: write a trace of the second step and the next two into the folder, for xprof.
      compilation_cache: keep what is compiled from now on in `~/.cache/grpo_jax/programs`, or where JAX is told to, for
        the next start; see `compilation.enable_compilation_cache`. It stays on after the loop. What compiling has
        freed goes back to the system in any case, as by `compilation.trim_malloc`.
      whole: makes of the state one that can be saved, such as `whole` of `overlap.ahead`.

    Raises:
      OSError: if another process runs in the folder.
      RuntimeError: if the run ends by `SystemExit(0)` before its last step.
      ValueError: for numbers out of range; if the settings or digests are not the checkpoint's, with all that differ;
        if there are metrics of steps whose checkpoint is gone.
      SystemExit: with status `preemption.STOPPED`, after a step in which the process was asked to stop.
      FloatingPointError: see `stop_after_skipped`; after the last step, if no update of the run was finite.
    """
    if steps < 0 or save_every < 1 or stop_after_skipped < 1:
        raise ValueError(
            "steps are at least 0, save_every and stop_after_skipped at least 1; got "
            f"{steps}, {save_every} and {stop_after_skipped}"
        )
    # Absolute: what is called in a step may change the working directory.
    folder = pathlib.Path(config.run_dir if run_dir is None else run_dir).absolute()
    meta = {"config": metrics.settings(config), "digests": dict(digests or {})}
    with contextlib.ExitStack() as stack:
        first = processes.is_first()
        with processes.alike("lock"):
            if first:
                stack.enter_context(preemption.lock(folder))
        stop_requested = stack.enter_context(preemption.graceful_stop())
        checkpoints = stack.enter_context(checkpoint.manager(folder / "checkpoints"))
        if first:
            leftovers.remove(folder)
        state, found = resuming.newest(checkpoints, state, folder, meta, ("run_dir", *allow), steps)
        if compilation_cache:
            compilation.enable_compilation_cache()
        stack.callback(compilation.trim_malloc())
        followers = [writers.tensorboard(folder, purge_step=int(state.step))] if tensorboard and first else []
        if wandb is not None and first:
            run_id = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
            followers.append(writers.wandb(project=wandb, id=run_id, resume="allow", config=meta["config"]))
        show = stack.enter_context(display.progress(steps, start=int(state.step), keys=keys))
        run = Loop(
            state,
            steps=steps,
            run_dir=folder,
            save_every=save_every,
            save=lambda state, best: checkpoint.save(checkpoints, state, meta | {"best": best}, initial=initial),
            best=found.get("best", {}),
            show=show,
            writers=followers,
            stop_requested=stop_requested,
            stop_after_skipped=stop_after_skipped,
            profile=profile,
            whole=whole,
        )
        del state  # which the loop's body replaces
        try:
            yield run
        except KeyboardInterrupt:  # ends it at once
            raise
        except BaseException as error:  # also sys.exit, and timeouts of libraries that are no Exception
            run._rescue(error)
            if isinstance(error, SystemExit) and not error.code and run.step < steps:
                raise RuntimeError(f"something raised SystemExit in step {run.step} of {steps}") from error
            raise
        finally:
            run._trace.close()
        run._end(curves)


class Loop:
    """A run between two checkpoints, made by `loop`. Iterating over it gives the steps that are still to be made.

    Attributes:
      state: to be assigned once in each step.
      step: how many steps are done.
      steps: of the whole run.
      run_dir: where everything is written.
      history: the metrics of each step so far, as in `metrics.jsonl`.
    """

    def __init__(
        self,
        state: TrainState,
        *,
        steps: int,
        run_dir: pathlib.Path,
        save_every: int,
        save: Callable[[TrainState, dict[str, float]], None],
        best: Mapping[str, float],
        show: Callable[..., None],
        writers: Sequence[writers.Writer],
        stop_requested: Callable[[], bool],
        stop_after_skipped: int,
        profile: bool,
        whole: Callable[[TrainState], TrainState],
    ) -> None:
        self.state, self.steps, self.run_dir = state, steps, run_dir
        self.step = self._first = int(state.step)
        self._save_every, self._save, self._show, self._writers = save_every, save, show, writers
        self._whole = whole
        self._stop_requested, self._stop_after_skipped, self._profile = stop_requested, stop_after_skipped, profile
        self.history = metrics.read(run_dir)
        self._best, self._asked = dict(best), set(best)  # by the checkpoint, of what `improved` was asked about
        self._saved = self.step or None
        self._line: dict[str, metrics.Number] = {}
        self._timing: dict[str, float] = {}
        self._tokens: float | None = None
        self._began = self._mark = time.monotonic()
        self._fingerprint = fingerprint(state.params)
        self._programs = compilation.count_compilations()
        self._trace = contextlib.ExitStack()

    def __iter__(self) -> Iterator[int]:
        """The steps; each begins with its number and ends when the next one is asked for."""
        while self.step < self.steps:
            if self._profile and processes.is_first() and self.step == self._first + 1:
                self._trace.enter_context(jax.profiler.trace(self.run_dir / "trace"))
            if self.step == self._first + 4:
                self._trace.close()
            self._timing["host"] = time.monotonic() - self._mark  # between the steps: saving, logging
            self._began = self._mark = time.monotonic()
            yield self.step
            self._finish()
            if any(processes.exchange("stop", self._stop_requested())) and self.step < self.steps:
                self.save()
                print(f"stopped after step {self.step} of {self.steps}; the same command goes on from there")
                raise SystemExit(preemption.STOPPED)

    def log(self, measured: Metrics) -> None:
        """Adds statistics, numbers or text to the line of this step; after the last step, to a line of its own."""
        if isinstance(length := measured.get("length"), Mean):
            self._tokens = float(length.sum)
        self._line |= metrics.plain(summary(dict(measured)))

    def lap(self, name: str) -> None:
        """Writes the seconds since the last call, or the beginning of the step, to `timing.jsonl`."""
        now = time.monotonic()
        self._timing[name], self._mark = now - self._mark, now

    def show(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Shows completions of this step in a table, and writes them to `completions.jsonl`; see `run.completions`."""
        if not processes.is_first():
            return
        metrics.append_completions(self.run_dir, self.step, lines)
        completions.print_table(self.step, lines)
        for writer in self._writers:
            writer.completions(self.step, lines)

    def improved(self, name: str) -> bool:
        """Whether a metric of this step is above all its earlier values, of which the first is the bar."""
        self._asked.add(name)
        before, value = self._before(name), self._line.get(name)
        return value is not None and bool(before) and value > max(before)

    def _before(self, name: str) -> list[Any]:
        """A metric's values of the steps before, and the best of those whose lines may be lost."""
        values = [line[name] for line in self.history if line.get(name) is not None]
        return [*values, self._best[name]] if name in self._best else values

    def save(self) -> None:
        """Writes a checkpoint, unless there is one of this step: at the head of a step, before its state changes."""
        if self._saved == self.step:
            return
        if int(self.state.step) != self.step:
            raise RuntimeError(f"step {self.step} has changed the state already; save before that, or in the next step")
        if processes.is_first():
            metrics.sync(self.run_dir)
        self.state = self._whole(self.state)
        self._save(self.state, {name: max(before) for name in self._asked if (before := self._before(name))})
        self._saved = self.step
        resuming.note_saved(self.run_dir)

    @contextlib.contextmanager
    def exporting(self, name: str) -> Iterator[pathlib.Path]:
        """Saves the state and gives the folder to export to. An export that fails is told; the run goes on.

        Of several processes none goes on: what one raised, another may not have come to.

        with loop.exporting("best") as folder:
            hf.save_pretrained(policy, loop.state.params, folder)

        Raises:
          Exception: that of the export, if no step is left to go on with, or there are several processes.
        """
        self.save()
        try:
            with processes.alike("export"):
                yield self.run_dir / name
        except Exception as error:
            told = f"could not export to {self.run_dir / name}; the state of step {self.step} is saved"
            if self.step >= self.steps or jax.process_count() > 1:
                error.add_note(told)
                raise
            print(f"step {self.step}: {told}, and the run goes on: {type(error).__name__}: {error}")

    def _finish(self) -> None:
        """Ends a step: its line, then its checkpoint."""
        if int(self.state.step) != self.step + 1:
            raise RuntimeError(
                f"step {self.step} ended with a state of step {int(self.state.step)}: assign to loop.state, once in "
                "each step, the state that `learn` returns"
            )
        before, self._fingerprint = self._fingerprint, fingerprint(self.state.params)
        if self._line.get("grad_norm") and np.array_equal(before, self._fingerprint):
            self._line["unchanged"] = 1.0
        seconds = time.monotonic() - self._began
        rate = None if self._tokens is None else self._tokens / seconds
        timing = self._timing | {"seconds": seconds, "tokens_per_second": rate, "programs": self._programs()}
        self._append(timing)
        # The step is whole: what raises from here on, such as a service that the run is followed by, loses nothing.
        self.step, self._timing, self._tokens = self.step + 1, {}, None
        self._tell()
        self._show(self.step - 1, self.history[-1], rate)
        for warning in monitoring.warnings(self.history):
            print(f"step {self.step}: {warning}")
        last = self.history[-self._stop_after_skipped :]
        if len(last) == self._stop_after_skipped and all(map(_refused, last)):
            raise FloatingPointError(
                f"the last {len(last)} updates were not finite and were not applied; lower the learning rate, or look "
                "at the metrics of the steps before"
            )
        if self.step == self.steps or self.step % self._save_every == 0:
            self.save()

    def _append(self, timing: Mapping[str, Any] | None = None) -> None:
        if processes.is_first():
            metrics.append(self.run_dir, self.step, self._line, timing)
        self.history.append({"step": self.step} | self._line)
        self._line = {}

    def _tell(self) -> None:
        """Gives the last line to those who follow the run."""
        line = dict(self.history[-1])
        step = line.pop("step")
        for writer in self._writers:
            writer.metrics(step, line)

    def _rescue(self, error: BaseException) -> None:
        """Saves the state after the last whole step, if it is still there."""
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state) if isinstance(leaf, jax.Array)):
            return  # given to a program that failed
        if self._saved == self.step or int(self.state.step) != self.step:
            return
        if not processes.agree("rescue", seconds=10):
            error.add_note(f"the state of step {self.step} is not saved, since this happened in one process of several")
            return
        try:
            self.save()
        except Exception as second:
            error.add_note(f"the state of step {self.step} could not be saved: {second}")
            return
        with contextlib.suppress(OSError, ValueError):  # of a standard output that is closed, or full
            print(f"{type(error).__name__}; the state of step {self.step} is saved in {self.run_dir}")

    def _end(self, curves: Sequence[str] | None) -> None:
        """After the last step: a line for what was logged since, and the plot."""
        if self.step < self.steps:
            return
        if self._line:
            self._append()
            self._tell()
        if processes.is_first():
            metrics.sync(self.run_dir)
        if (made := [line for line in self.history if line["step"] < self.steps]) and all(map(_refused, made)):
            raise FloatingPointError("none of the run's updates was finite, so that nothing was trained")
        if self.history and processes.is_first():
            try:
                told = f"curves: {plots.plot(self.run_dir, keys=curves)}"
            except Exception as error:  # such as too many metrics for one picture; what follows the loop is to be had
                told = f"could not draw the curves: {type(error).__name__}: {error}"
            print(told)


def _refused(line: Mapping[str, Any]) -> bool:
    """Whether a step had no update that was finite, and not since its loss was scaled up."""
    return line.get("skipped") == 1.0 and (line.get("loss_scale") or 0.0) <= 1.0
