"""How long a checkpoint takes to load and what the host holds meanwhile, beside transformers on the same folder.

    python -m benchmarks.loading

A random Qwen 2 of about half a GB in bfloat16 is written to a scratch folder and read into float32 parameters, each
time in a process of its own, ours and theirs in turns; the first read of each warms the machine's cache of files and
does not count. Imports are not counted, compilation is.

Then it is read with nf4 kernels, in bfloat16 otherwise. Host and device are one on a CPU: what both hold at most is the
parameters, twice the largest of those that stay floats, and what compiling takes (`COMPILING`).

Then two processes of one device each read the same folder, over which the params are divided: each host holds at most
its share of them and twice the largest part, what JAX itself takes to begin with aside.
"""

import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import worker

SIZES: dict[str, Any] = {
    "vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12,
    "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
ALLOWED = 1.2  # of the seconds of transformers
COMPILING = 128  # MiB, of some ten programs


def write(folder: Path) -> int:
    """Writes the checkpoint; its bytes."""
    import jax
    import jax.numpy as jnp
    import transformers

    from grpo_jax import models
    from grpo_jax.models import hf

    policy = models.decoder(models.from_hf_config(transformers.Qwen2Config(**SIZES), param_dtype=jnp.bfloat16))
    hf.save_pretrained(policy, jax.jit(policy.init)(jax.random.key(0)), folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def ours() -> Callable[[Path], object]:
    """The reader, with all that it needs imported."""
    import jax

    from grpo_jax.models import hf

    return lambda folder: jax.block_until_ready(hf.load_pretrained(folder)[1])


def theirs() -> Callable[[Path], object]:
    """That of transformers."""
    import torch
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained  # found when it is looked up, and not before
    return lambda folder: load(folder, dtype=torch.float32)


def read(system: str, folder: Path) -> dict[str, float]:
    """Seconds, and MiB of the host at most above those before, in this process."""
    load = {"ours": ours, "transformers": theirs}[system]()
    worker.forget_peak()
    before, started = worker.peak_memory(), time.perf_counter()
    held = load(folder)
    found = {"seconds": time.perf_counter() - started, "peak_mib": worker.peak_memory() - before}
    del held
    return found


def alone(*arguments: object) -> dict[str, float]:
    """What a process of its own says."""
    command = [sys.executable, "-m", "benchmarks.loading", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=worker.ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder: Path, repeats: int = 3) -> dict[str, dict[str, float]]:
    """The medians of each system."""
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "transformers": []}
    for n in range(1 + repeats):
        for system, found in runs.items():
            of_run = alone(system, folder)
            if n:
                found.append(of_run)
    return {
        system: {name: statistics.median(run[name] for run in found) for name in found[0]}
        for system, found in runs.items()
    }


def read_divided(folder: Path, coordinator: str, index: int) -> dict[str, float]:
    """MiB of the host at most above those before, in one of two processes, beside those of its parts."""
    import jax

    from grpo_jax import processes
    from grpo_jax.models import hf, sharding

    with processes.joined(coordinator, 2, index):
        mesh = sharding.mesh(fsdp=2)
        jax.block_until_ready(sharding.batch(mesh, np.zeros(2)))
        worker.forget_peak()
        before = worker.peak_memory()
        _, params = hf.load_pretrained(folder, mesh=mesh)
        jax.block_until_ready(params)
        peak = worker.peak_memory() - before
        parts = [shard.data.nbytes / 2**20 for x in jax.tree.leaves(params) for shard in x.addressable_shards]
    return {"peak_mib": peak, "share_mib": sum(parts), "largest_mib": max(parts)}


def read_quantized(folder: Path) -> dict[str, float]:
    """MiB of the host at most above those before, beside those of the params and of the largest that are floats."""
    import jax
    import jax.numpy as jnp

    from grpo_jax.models import hf

    worker.forget_peak()
    before = worker.peak_memory()
    _, params = hf.load_pretrained(folder, dtype=jnp.bfloat16, quantize="nf4")
    jax.block_until_ready(params)
    peak, leaves = worker.peak_memory() - before, jax.tree.leaves(params)
    held = [leaf.size * (0.5 if leaf.dtype == jnp.uint4 else leaf.dtype.itemsize) / 2**20 for leaf in leaves]
    floats = [size for size, leaf in zip(held, leaves, strict=True) if leaf.dtype == jnp.bfloat16]
    return {"peak_mib": peak, "held_mib": sum(held), "largest_mib": max(floats)}


def divide(folder: Path) -> list[dict[str, float]]:
    """What each of two processes says."""
    with socket.create_server(("", 0)) as server:
        coordinator = f"127.0.0.1:{server.getsockname()[1]}"
    command = [sys.executable, "-m", "benchmarks.loading", "divided", str(folder), coordinator]
    started = [
        subprocess.Popen([*command, str(index)], stdout=subprocess.PIPE, text=True, cwd=worker.ROOT)
        for index in range(2)
    ]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]


if __name__ == "__main__":
    if sys.argv[1:2] == ["divided"]:
        print(json.dumps(read_divided(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))
        raise SystemExit
    if sys.argv[1:2] == ["quantized"]:
        print(json.dumps(read_quantized(Path(sys.argv[2]))))
        raise SystemExit
    if len(sys.argv) > 1:
        print(json.dumps(read(sys.argv[1], Path(sys.argv[2]))))
        raise SystemExit
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        size = write(model) / 2**30
        medians = compare(model)
        few_bits = alone("quantized", model)
        divided = divide(model)
    for name, of_system in medians.items():
        print(f"{name:14} {of_system['seconds'] / size:6.2f} s/GB   {of_system['peak_mib'] / size:6.0f} MiB/GB")
    ratio = medians["ours"]["seconds"] / medians["transformers"]["seconds"]
    print(f"{size:.2f} GB: ours takes {ratio:.2f} of the time; at most {ALLOWED} is allowed")
    allowed = few_bits["held_mib"] + 2 * few_bits["largest_mib"] + COMPILING
    most = few_bits["peak_mib"] / allowed
    print(f"nf4: {few_bits['peak_mib']:.0f} MiB for {few_bits['held_mib']:.0f}, of {allowed:.0f} that are allowed")
    for found in divided:
        allowed = found["share_mib"] + 2 * found["largest_mib"]
        most = max(most, found["peak_mib"] / allowed)
        print(f"one of two processes: {found['peak_mib']:.0f} MiB, of {allowed:.0f} that are allowed")
    raise SystemExit(ratio > ALLOWED or most > 1)
