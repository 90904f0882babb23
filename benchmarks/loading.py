"""How long a checkpoint takes to load and what the host holds meanwhile, beside transformers on the same folder.

    python -m benchmarks.loading

A random Qwen 2 of about half a GB in bfloat16 is written to a scratch folder and read into float32 parameters, each
time in a process of its own, ours and theirs in turns; the first read of each warms the machine's cache of files and
does not count. Imports are not counted, compilation is.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import worker

SIZES: dict[str, Any] = {
    "vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12,
    "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
ALLOWED = 1.2  # of the seconds of transformers


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


def compare(folder: Path, repeats: int = 3) -> dict[str, dict[str, float]]:
    """The medians of each system."""
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "transformers": []}
    for n in range(1 + repeats):
        for system, found in runs.items():
            command = [sys.executable, "-m", "benchmarks.loading", system, str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=worker.ROOT)
            if n:
                found.append(json.loads(done.stdout.splitlines()[-1]))
    return {
        system: {name: statistics.median(run[name] for run in found) for name in found[0]}
        for system, found in runs.items()
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(read(sys.argv[1], Path(sys.argv[2]))))
        raise SystemExit
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        size = write(model) / 2**30
        medians = compare(model)
    for name, of_system in medians.items():
        print(f"{name:14} {of_system['seconds'] / size:6.2f} s/GB   {of_system['peak_mib'] / size:6.0f} MiB/GB")
    ratio = medians["ours"]["seconds"] / medians["transformers"]["seconds"]
    print(f"{size:.2f} GB: ours takes {ratio:.2f} of the time; at most {ALLOWED} is allowed")
    raise SystemExit(ratio > ALLOWED)
