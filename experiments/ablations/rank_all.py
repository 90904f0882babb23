"""The four grids that rank, one after the other: what is known of each condition at its own best learning rate.

python experiments/ablations/rank_all.py --estimate     # how long each takes here
python experiments/ablations/rank_all.py                # killed, the same command goes on where it was

What came of them: `docs/pages/results/ablations.md`. Several iterations over a rollout do best at lower rates, so that
the results of clipping were made with others: see `clipping.py`.
"""

import advantages
import clipping
import kl
import objectives
import setting

GRIDS = (kl, clipping, advantages, objectives)


def experiment(config: setting.Config) -> None:
    """The shortest first."""
    for grid in GRIDS:
        print(grid.__doc__.partition("\n")[0])
        grid.experiment(config)


if __name__ == "__main__":
    setting.main(experiment, __doc__, default=setting.Config(rank=True))
