"""Options of XLA with which the programs of a step are compiled, where the caller gives none."""

import jax


def saving_memory() -> dict[str, str]:
    """Options with which `jax.jit(..., compiler_options=...)` makes programs that take less memory.

    On a CPU, XLA orders a program for threads to work side by side, which makes buffers long before they are
    needed. A step's large operations have all threads to themselves, and an order that saves memory is as fast. For
    other devices there are no options. `Step.jit` and `updates.jit_learn` take them unless they are given others.
    """
    on_cpu = jax.default_backend() == "cpu"
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if on_cpu else {}
