"""One step of Tunix's `GRPOLearner` with its own sampler, in micro-batches of a given number of completions.

Tunix runs its own loop and asks its data set for the next prompts when a step is
over: that is where a request is waited for and the last one answered. Seconds of a
step: `generate` is `RLCluster.generate`, `score` is `get_ref_per_token_logps`,
`train` is the rest of `whole`. Lengths cannot be forced on its sampler.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("FLAX_ALWAYS_SHARD_VARIABLE", "false")  # Tunix 0.1.5 on flax 0.12

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2 import params as qwen2_params
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from benchmarks import cells, worker
from benchmarks.cells import Cell

NO_TOKEN = 1 << 20  # an id that no model draws: nothing is padding, nothing ends a completion


class Tokenizer:
    """`t17` is token 17."""

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids: Any, **kwargs: Any) -> str:
        return cells.text(np.asarray(ids))

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return NO_TOKEN

    def pad_id(self) -> int:
        return NO_TOKEN + 1


def load(cell: Cell, checkpoint: Path, mesh: Any) -> Any:
    m = cell.model
    config = qwen2.ModelConfig(
        num_layers=m.layers,
        vocab_size=m.vocabulary,
        embed_dim=m.hidden,
        hidden_dim=m.intermediate,
        num_heads=m.heads,
        head_dim=m.head_dim,
        num_kv_heads=m.kv_heads,
        rope_theta=10_000,
        norm_eps=1e-6,
    )
    return qwen2_params.create_model_from_safe_tensors(str(checkpoint), config, mesh, dtype=jnp.float32)


def make_cluster(cell: Cell, checkpoint: Path, micro_prompts: int) -> Any:
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1), ("fsdp", "tp"))
    config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys((rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT), mesh),
        rollout_engine="vanilla",
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.adamw(cells.LEARNING_RATE, weight_decay=0.0),
            eval_every_n_steps=1_000_000,
            max_steps=1_000_000,
            mini_batch_size=cell.prompts,
            train_micro_batch_size=micro_prompts,
            rollout_micro_batch_size=cell.prompts,
            compute_logps_micro_batch_size=micro_prompts,
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=cell.completion_tokens,
            max_prompt_length=cell.prompt_tokens,
            kv_cache_size=cell.prompt_tokens + cell.completion_tokens,
            temperature=1.0,
            top_p=1.0,  # None would be greedy
            eos_tokens=[NO_TOKEN],
        ),
    )
    actor, reference = load(cell, checkpoint, mesh), load(cell, checkpoint, mesh)
    return rl_cluster.RLCluster(actor=actor, reference=reference, tokenizer=Tokenizer(), cluster_config=config)


def timed(cluster: Any, method: str, seconds: dict[str, float], phase: str) -> None:
    """Adds the time that a method takes, until its arrays are there, to a phase."""
    original = getattr(cluster, method)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = original(*args, **kwargs)
        jax.block_until_ready(getattr(result, "tokens", result))
        seconds[phase] += time.perf_counter() - started
        return result

    setattr(cluster, method, wrapped)


def main(cell: Cell, checkpoint: Path, micro_batch: int) -> None:
    requests, send = worker.open_channel()
    cluster = make_cluster(cell, checkpoint, micro_batch // cell.group)
    seconds = {"generate": 0.0, "score": 0.0}
    timed(cluster, "generate", seconds, "generate")
    timed(cluster, "get_ref_per_token_logps", seconds, "score")

    def even(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        return [cells.reward(np.array(Tokenizer().encode(completion))) for completion in completions]

    def batches() -> Iterator[dict[str, Any]]:
        for step, _ in enumerate(requests()):
            seconds.update(generate=0.0, score=0.0)
            started = time.perf_counter()
            yield {"prompts": np.array([cells.text(row) for row in cells.prompt_tokens(cell, step)])}
            jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
            whole = time.perf_counter() - started
            send({"whole": whole, **seconds, "train": whole - sum(seconds.values()), "peak_mib": worker.peak_memory()})

    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        algo_config=grpo_learner.GRPOConfig(num_generations=cell.group, num_iterations=1, beta=cells.BETA),
        reward_fns=even,
    )
    send({"ready": True})
    learner.train(batches())


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    main(cells.from_json(arguments["cell"]), Path(arguments["checkpoint"]), arguments["micro_batch"])
