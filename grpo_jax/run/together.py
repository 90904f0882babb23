"""The settings of scripts that say with which other processes a run is made.

@dataclasses.dataclass(frozen=True)
class Config(ProcessSettings):
    model: str

def main(config):
    with config.joined():
        train(config)
"""

import contextlib
import dataclasses

from grpo_jax import processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessSettings:
    """One process, or several that each drive some of the devices of one mesh."""

    coordinator: str | None = None  # HOST:PORT of the first of several processes; cluster, where JAX finds them out
    processes: int | None = None  # how many there are; with --coordinator HOST:PORT
    process_id: int | None = None  # which of them this is, from 0; with --coordinator HOST:PORT

    def joined(self) -> contextlib.AbstractContextManager[None]:
        """This process as one of them; see `grpo_jax.processes.joined`."""
        return processes.joined(self.coordinator, self.processes, self.process_id)
