"""The outcome of one item in a worker process, and the reward that follows from it."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

Fault = Literal["timeout", "exhausted", "error", "lost"]


class Outcome(NamedTuple):
    """The value of one item, or the fault that it ended with."""

    value: float | None  # None where the function returned None, and where there is a fault
    fault: Fault | None = None
    message: str = ""
    returned: Any = None  # of `WorkerPool.map(returned=)`: what the function returned, and the arguments after it


def to_rewards(
    outcomes: Sequence[Outcome],
    name: str,
    *,
    wrong: float = 0.0,
    log_metric: Callable[[str, float], None] | None = None,
) -> list[float | None]:
    """Rewards of outcomes: `wrong` for `timeout` and `exhausted`, None for `error` and `lost`.

    Args:
      outcomes: one per completion.
      name: the reward's, in metrics and messages.
      wrong: the reward of a wrong answer.
      log_metric: called with `<name>/timeouts` and `<name>/faults`, the two counts.

    Warns:
      RuntimeWarning: about `error` and `lost`, with the first message.
    """
    slow = sum(outcome.fault in ("timeout", "exhausted") for outcome in outcomes)
    faults = [i for i, outcome in enumerate(outcomes) if outcome.fault in ("error", "lost")]
    if log_metric is not None:
        log_metric(f"{name}/timeouts", slow)
        log_metric(f"{name}/faults", len(faults))
    if faults:
        warnings.warn(
            f"{name} could not score {len(faults)} of {len(outcomes)} completions, which are masked; "
            f"the first is completion {faults[0]}: {outcomes[faults[0]].message}",
            RuntimeWarning,
            stacklevel=3,
        )
    return [wrong if outcome.fault in ("timeout", "exhausted") else outcome.value for outcome in outcomes]
