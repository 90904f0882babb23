"""The settings of scripts that say with which other processes a run is made.

```python
@dataclasses.dataclass(frozen=True)
class Config(ProcessSettings):
    model: str

def main(config):
    with config.joined():
        mesh = config.make_mesh(prompts=16, group_size=8)
```
"""

import contextlib
import dataclasses

import jax
from jax.sharding import Mesh

from grpo_jax import processes
from grpo_jax.models import sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessSettings:
    """One process, or several that each drive some of the devices of one mesh."""

    mesh: str | None = None  # devices to share the work, such as data=2,fsdp=4; see grpo_jax.models.sharding
    coordinator: str | None = None  # HOST:PORT of the first of several processes; cluster, where JAX finds them out
    processes: int | None = None  # how many there are; with --coordinator HOST:PORT
    process_id: int | None = None  # which of them this is, from 0; with --coordinator HOST:PORT

    def joined(self) -> contextlib.AbstractContextManager[None]:
        """This process as one of them; see `grpo_jax.processes.joined`."""
        return processes.joined(self.coordinator, self.processes, self.process_id)

    def make_mesh(
        self, *, prompts: int, group_size: int, slots: int | None = None, packed: bool = False
    ) -> Mesh | None:
        """The mesh, for so many prompts at a time; None for one device, which is told where there are more.

        Args:
          prompts: that are learned from at a time.
          group_size: completions of each.
          slots: completions that are decoded at a time; None for all.
          packed: whether each group is laid into few rows, so that only prompts are divided.

        Raises:
          ValueError: if several processes have none, or packed prompts do not divide over it; as `sharding.parse`,
            `sharding.check_rows` and `sharding.check_slots`.
        """
        if self.mesh is None:
            if jax.process_count() == 1:
                if (idle := jax.device_count() - 1) > 0:
                    print(f"uses one device and leaves {idle} idle: --mesh fsdp={idle + 1} divides the run over all")
                return None
            count = f"{jax.device_count()} devices of the {jax.process_count()} processes"
            raise ValueError(f"say how the {count} share the work: --mesh fsdp={jax.device_count()}, for instance")
        mesh = sharding.parse(self.mesh)
        sharding.check_rows(mesh, prompts, group_size)
        if packed and not sharding.rows_divide(mesh, prompts):
            raise ValueError(
                f"--pack lays each group into few rows, so that prompts are divided, and {prompts} at a time do not "
                f"divide over --mesh {self.mesh}: take more of them, fewer micro-batches, or leave out --pack"
            )
        if slots is not None:
            sharding.check_slots(mesh, slots)
        return mesh
