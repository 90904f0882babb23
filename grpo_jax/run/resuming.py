"""Where a run goes on: its newest checkpoint, of the same run, with the metrics of the steps before it."""

import contextlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from grpo_jax import processes
from grpo_jax.run import checkpoint, digests, metrics, preemption
from grpo_jax.types import TrainState

SAVED = "saved"  # in the folder of a run that has had a checkpoint


def newest(
    checkpoints: ocp.CheckpointManager,
    state: TrainState,
    folder: pathlib.Path,
    meta: Mapping[str, Any],
    allow: Sequence[str],
    steps: int,
) -> tuple[TrainState, dict[str, Any]]:
    """The state of the newest checkpoint and its meta, or what is given; the metrics are cut to the steps before it.

    Raises:
      ValueError: if the checkpoint is another run's, or if there are metrics of steps whose checkpoint is gone.
    """
    changes: dict[str, tuple[Any, Any]] = {}
    code: list[str] = []

    def check(saved: Mapping[str, Any]) -> None:
        changes.update(checkpoint.check_config(saved["config"], meta["config"], allow=allow))
        digests.check(saved.get("digests", {}), meta["digests"])
        code[:] = digests.changed_code(saved.get("digests", {}), meta["digests"])

    restored = checkpoint.restore(checkpoints, state, check=check)
    if restored is None:
        lines = metrics.read(folder)
        if lines and (folder / SAVED).exists():  # and was not killed before its first
            raise ValueError(
                f"{folder} has the metrics of {len(lines)} steps, but no checkpoint: put {checkpoints.directory} back, "
                f"or delete {folder / metrics.METRICS_FILE} to begin anew"
            )
        if lines:
            print(f"begins anew: the run was killed in step {lines[-1]['step'] + 1}, before its first checkpoint")
        (folder / SAVED).unlink(missing_ok=True)
        _truncate(folder, 0)
        return state, dict(meta)
    state, found = restored
    first = int(state.step)
    note_saved(folder)
    print(f"resumed at step {first} of {steps}" + (": nothing to do" if first >= steps else ""))
    for name, (before, after) in changes.items():
        if name != "run_dir":
            print(f"  {name}: {before} -> {after}")
    for name in code:
        print(f"  {name} is not what it was at step {first}: from there on this is another run than it began as")
    _truncate(folder, first)
    if gaps := metrics.missing(folder, first):
        told = f"{gaps[0]} to {gaps[-1]}" if len(gaps) > 1 else f"{gaps[0]}"
        print(
            f"{folder / metrics.METRICS_FILE} lacks {len(gaps)} of the steps before (within {told}): curves have a hole"
        )
    return state, found


def check(config: Any, *, allow: Sequence[str] = ()) -> None:
    """Refuses the folder of a run that is in use, cannot be written to, or was made under other settings.

    `run.loop` does so, too; a script that asks before it loads a model need not wait for that. Of several processes
    nothing is refused here: they open checkpoints together, in the loop.

    Args:
      config: with a `run_dir`.
      allow: settings that may change, as in `run.loop`.

    Raises:
      OSError: as `preemption.lock`.
      ValueError: as `checkpoint.check_config`.
    """
    if jax.process_count() > 1:  # checkpoints are opened together
        return
    folder = pathlib.Path(config.run_dir)
    with preemption.lock(folder), contextlib.suppress(checkpoint.CheckpointCorruptError):  # an older one may do
        if any((folder / "checkpoints").glob("[0-9]*/meta")):
            _, meta = checkpoint.read_meta(folder / "checkpoints")
            checkpoint.check_config(meta["config"], metrics.settings(config), allow=("run_dir", *allow))


def note_saved(folder: pathlib.Path) -> None:
    """Notes that there is a checkpoint, so that a run is told from one that was killed before its first."""
    if processes.is_first():
        (folder / SAVED).touch()


def _truncate(folder: pathlib.Path, step: int) -> None:
    """By the first process, before another reads."""
    with processes.alike("truncate"):
        if processes.is_first():
            metrics.truncate(folder, step)
