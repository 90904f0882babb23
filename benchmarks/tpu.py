"""What a step asks of TPUs that are not there: `python -m benchmarks.tpu`.

The two programs of a step, `collect` and `learn`, are compiled for real topologies by the TPU's own compiler, which
runs on any machine (`pip install -e ".[tpu]"`), and read as `python -m grpo_jax.run.memory --topology` reads them: the
memory of a chip at the worst moment, matrix products, what is read and written at least, collectives by kind with the
bytes that a chip receives, and the least time of each by what bounds it. Nothing is run, and no weights are read.

Each row is compiled in a process of its own and appended to `results/tpu.jsonl`; rows that are there are not compiled
again, so that the command can be stopped. `results/tpu.md` is made from the lines. A model whose state alone, 12 bytes
a weight, is more than a topology has is no row.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import tyro

from benchmarks import report, worker
from benchmarks.worker import Line
from grpo_jax.models import sharding
from grpo_jax.run import chips, memory

CONFIGS = worker.ROOT / "tests/data/configs"
MODELS = {
    "Qwen2.5-0.5B": "Qwen/Qwen2.5-0.5B-Instruct.json",
    "Qwen2.5-1.5B": "Qwen/Qwen2.5-1.5B-Instruct.json",
    "Qwen2.5-7B": "Qwen/Qwen2.5-7B-Instruct.json",
    "Qwen2.5-32B": "Qwen/Qwen2.5-32B-Instruct.json",
    "Llama-3.1-70B": "meta-llama/Llama-3.1-70B-Instruct.json",
}


class Row(NamedTuple):
    """A step on a topology: one prompt a chip unless its mesh has `tensor`, of which each part has one."""

    model: str
    topology: str
    mesh: str
    prompts: int
    micro_batches: int = 1


GROUP, PROMPT_TOKENS, MAX_TOKENS = 8, 256, 512

ROWS = (
    Row("Qwen2.5-7B", "v5p:4x4x4", "data=4,fsdp=16", 64),
    Row("Qwen2.5-7B", "v5p:4x4x4", "fsdp=64", 64),
    Row("Llama-3.1-70B", "v5p:4x4x4", "fsdp=16,tensor=4", 16),
    Row("Qwen2.5-0.5B", "v5e:4x4", "data=4,fsdp=4", 16),
    Row("Qwen2.5-7B", "v5p:2x2x1", "fsdp=4", 8),
    Row("Qwen2.5-7B", "v6e:8x8", "data=8,fsdp=8", 64),
    Row("Qwen2.5-7B", "v5e:4x4", "fsdp=4,tensor=4", 4),
    Row("Qwen2.5-1.5B", "v5e:4x4", "data=4,fsdp=4", 16),
    Row("Qwen2.5-0.5B", "v5p:4x4x4", "data=4,fsdp=16", 64),
    Row("Qwen2.5-1.5B", "v5p:4x4x4", "data=4,fsdp=16", 64),
    Row("Qwen2.5-32B", "v5p:4x4x4", "fsdp=32,tensor=2", 32),
    Row("Qwen2.5-0.5B", "v6e:8x8", "data=8,fsdp=8", 64),
    Row("Qwen2.5-1.5B", "v6e:8x8", "data=8,fsdp=8", 64),
    Row("Qwen2.5-32B", "v6e:8x8", "fsdp=8,tensor=8", 8),
    Row("Llama-3.1-70B", "v6e:8x8", "fsdp=8,tensor=8", 8),
)


def compiled(row: Row) -> Line:
    """What the programs of a row ask of each chip."""
    started = time.process_time()
    fields = json.loads((CONFIGS / MODELS[row.model]).read_text())
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(fields))
        config = memory.Config(
            model=folder,
            prompts_per_step=row.prompts,
            group_size=GROUP,
            max_prompt_tokens=PROMPT_TOKENS,
            max_tokens=MAX_TOKENS,
            micro_batches=row.micro_batches,
            attention="splash",
            mesh=row.mesh,
            topology=row.topology,
        )
        try:
            plan, programs = memory.of_config(config)
        except ValueError as error:  # with what the compiler says of what does not fit
            return {"kind": "refused", **row._asdict(), "why": str(error).splitlines()[-1].strip()}
    needs = zip(("collect", "learn"), memory.needs(plan, programs, config), strict=True)
    return {
        "kind": "tpu",
        **row._asdict(),
        "layers": fields["num_hidden_layers"],
        "cpu_seconds": round(time.process_time() - started, 1),
        "memory": {**plan._asdict(), "peak": plan.peak},
        **{name: need._asdict() for name, need in needs},
        "decode": memory.of_a_token(programs, config),
    }


def parts(row: Line) -> tuple[int, int, int]:
    """`data`, `fsdp` and `tensor` of a row's mesh."""
    axes = sharding.sizes(row["mesh"])
    return axes.get("data", 1), axes.get("fsdp", 1), axes.get("tensor", 1)


def weights(model: str) -> tuple[int, int, int]:
    """How many weights the matrices of all layers have, the head, and an embedding that is not the head as well."""
    fields = json.loads((CONFIGS / MODELS[model]).read_text())
    D, F, V = (fields[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    N, K = fields["num_attention_heads"], fields["num_key_value_heads"]
    layer = 2 * D * fields.get("head_dim", D // N) * (N + K) + 3 * D * F
    return fields["num_hidden_layers"] * layer, D * V, 0 if fields["tie_word_embeddings"] else D * V


def least(row: Line) -> tuple[float, float]:
    """What `learn` of a row does at least where layers are recomputed: FLOPs and received bytes of a chip.

        FLOPs  8 (weights of layers x all tokens + weights of the head x completion tokens), of each prompt once
        bytes  2 (3 x weights of layers + 2 x weights of head and embedding) (1 - 1 / fsdp)
               + 4 x all weights / fsdp (1 - 1 / data)

    That is products with weights alone: forward, in the recomputation and two backward. A layer's weights are gathered
    forward and in the recomputation, the others once; gradients are scattered once, and the parts summed over `data`;
    all in bfloat16.
    """
    layers, head, embedding = weights(row["model"])
    data, fsdp, tensor = parts(row)
    completions = row["prompts"] * GROUP * MAX_TOKENS
    flops = 8 * (layers * (completions + row["prompts"] * PROMPT_TOKENS) + head * completions)
    received = 2 * (3 * layers + 2 * (head + embedding)) * (1 - 1 / fsdp) * row["micro_batches"]
    received += 4 * (layers + head + embedding) / fsdp * (1 - 1 / data)
    return flops / (data * fsdp * tensor), received / tensor


def read_at_least(row: Line) -> float:
    """Bytes that a chip of a row reads for a token: weights of layers and head in bfloat16, and all that caches hold.

    2 (weights of layers + weights of the head) / tensor + caches of prompts and completions
    """
    layers, head, _ = weights(row["model"])
    return 2 * (layers + head) / parts(row)[2] + row["memory"]["prompt_cache"] + row["memory"]["completion_cache"]


# ------------------------------------------------------------------------------ the report


def markdown(lines: list[Line]) -> str:
    """The tables."""
    rows = report.of_kind(lines, "tpu")
    machine = next(iter(report.of_kind(lines, "machine")), {})
    names = ("model", "chips", "mesh")
    text = [
        "# Compiled for TPUs",
        "Written by `benchmarks/tpu.py` from the lines beside it. Nothing was run: what the programs ask of each chip "
        "is read from them, as `python -m grpo_jax.run.memory` does. "
        f"Groups of {GROUP}, {PROMPT_TOKENS} + {MAX_TOKENS} tokens, all of which are drawn; bfloat16, AdamW on float32 "
        "weights, no reference, splash attention, layers recomputed.",
        "\n".join(f"- {name}: {value}" for name, value in machine.items() if name != "kind"),
        "## Memory of a chip at the worst moment, in GB",
        report.table((*names, "prompts", "state", "collect besides", "learn besides", "peak", "of"), map(_held, rows)),
    ]
    for program in ("collect", "learn"):
        head = (*names, "products, TFLOP", "read, GB", "received, GB", "bound by", "collectives: GB received")
        text += [f"## {program}, of a chip", report.table(head, (_needs(row, program) for row in rows))]
    text.append(
        "In brackets the seconds that each takes by itself, at the chip's peak: matrix products; memory, read at least "
        "(in `collect` weights and caches for each token); what a chip receives, over all its links at once. The "
        "longest bounds the program from below."
    )
    text += [
        "## `learn` beside the least",
        report.table((*names, "products", "received"), map(_beside_least, rows)),
        "Products of the program beside those with weights, forward, in the recomputation and twice backward, without "
        "attention; those whose result the backward pass does not read are not computed again. Received beside the "
        "weights of layers twice, head and embedding once and all gradients once, in "
        "bfloat16, and the sum of their parts over `data`; over `tensor` activations are summed as well, which has no "
        "such count.",
    ]
    if decoding := [row for row in rows if "decode" in row]:
        text += [
            "## A token of decoding beside the least",
            report.table((*names, "GB", "weights and caches, GB", "ratio"), map(_of_a_token, decoding)),
            "What the loop over tokens reads from a chip's memory and writes to it in a turn, with caches at their "
            "full width, beside weights of layers and head in bfloat16 and the caches.",
        ]
    if refused := report.of_kind(lines, "refused"):
        told = (f"- {line['model']} on {line['topology']}, {line['mesh']}: {line['why']}" for line in refused)
        text += ["## What the compiler refused", "\n".join(told)]
    return "\n\n".join(text) + "\n"


def _names(row: Line) -> list[str]:
    parts = f", {row['micro_batches']} micro-batches" if row["micro_batches"] > 1 else ""
    return [row["model"], row["topology"], row["mesh"] + parts]


def _held(row: Line) -> list[str]:
    memory, limit = row["memory"], chips.CHIPS[row["topology"].partition(":")[0]].memory
    state = sum(memory[name] for name in ("parameters", "frozen", "optimizer", "reference"))
    sizes = (state, memory["sampling"], memory["learning"], memory["peak"], limit)
    return [*_names(row), str(row["prompts"]), *(f"{size / 1e9:.1f}" for size in sizes)]


def _of_a_token(row: Line) -> list[str]:
    least = read_at_least(row)
    return [*_names(row), f"{row['decode'] / 1e9:.2f}", f"{least / 1e9:.2f}", f"{row['decode'] / least:.3f}"]


def _beside_least(row: Line) -> list[str]:
    need = chips.Need(**row["learn"])
    flops, received = least(row)
    found = sum(size for _, size in need.sent.values()) / received
    return [*_names(row), f"{need.flops / flops:.3f}", "" if parts(row)[2] > 1 else f"{found:.3f}"]


def _needs(row: Line, program: str) -> list[str]:
    need = chips.Need(**row[program])
    seconds = need.seconds(chips.CHIPS[row["topology"].partition(":")[0]])
    received = sum(size for _, size in need.sent.values())
    amounts = zip((need.flops / 1e12, need.memory / 1e9, received / 1e9), seconds.values(), strict=True)
    return [
        *_names(row),
        *(f"{amount:.3g} ({spent:.2g} s)" for amount, spent in amounts),
        max(seconds, key=lambda kind: seconds[kind]),
        ", ".join(f"{count} {kind}: {size / 1e9:.2g}" for kind, (count, size) in need.sent.items()),
    ]


# ------------------------------------------------------------------------------ the command


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compiled."""

    models: tuple[str, ...] = tuple(MODELS)
    topologies: tuple[str, ...] = tuple(dict.fromkeys(row.topology for row in ROWS))
    output: Path = Path("benchmarks/results/tpu.jsonl")  # appended to; .md is written beside it


def main(config: Config) -> Path:
    """Compiles the rows that are not there yet; returns the path of the report."""
    config.output.parent.mkdir(parents=True, exist_ok=True)
    done = report.read(config.output) if config.output.exists() else []
    if not report.of_kind(done, "machine"):
        done.append(_append(config.output, versions()))
    for row in ROWS:
        known = any(all(line.get(name) == value for name, value in row._asdict().items()) for line in done)
        if known or row.model not in config.models or row.topology not in config.topologies:
            continue
        environment = os.environ | worker.ENVIRONMENT | {"TPU_SKIP_MDS_QUERY": "1"}
        command = [sys.executable, "-m", "benchmarks.tpu", json.dumps(row)]
        found = subprocess.run(command, env=environment, cwd=worker.ROOT, stdout=subprocess.PIPE, text=True)
        if found.returncode:
            print(f"{row}: left out, the compiler ended with {found.returncode}")
            continue
        done.append(_append(config.output, json.loads(found.stdout.splitlines()[-1])))
        print(done[-1], flush=True)
    path = config.output.with_suffix(".md")
    path.write_text(markdown(done))
    return path


def versions() -> Line:
    """Of the compiler."""
    return {"kind": "machine", **{name: version(name) for name in ("jax", "libtpu")}}


def _append(path: Path, line: Line) -> Line:
    with path.open("a") as file:
        print(json.dumps(line), file=file)
    return line


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("["):
        print(json.dumps(compiled(Row(*json.loads(sys.argv[1])))))
    else:
        print(main(tyro.cli(Config, description=__doc__)))
