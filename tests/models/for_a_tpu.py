"""What test_tpu.py runs in a process of its own: a step compiled for TPUs that are not there.

JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python tests/models/for_a_tpu.py fsdp=2,tensor=2
"""

import sys

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

from grpo_jax import losses, models, sampling, testing
from grpo_jax.models import attention, sharding
from grpo_jax.run import memory
from grpo_jax.train_step import make_train_step
from grpo_jax.types import Prompts
from grpo_jax.updates import init_state


def compiled(axes):
    """The HLO of `collect` and of `learn` for chips of a v5p."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    mesh = sharding.parse(axes, devices=devices if "=1" not in axes else devices[:1])
    config = testing.tiny_hf_config("llama", hidden_size=256, num_attention_heads=4, head_dim=64, vocab_size=256)
    settings = {"dtype": jnp.bfloat16, "attention": attention.splash, "mesh": mesh}
    policy, optimizer = models.decoder(models.from_hf_config(config, **settings)), optax.sgd(0.1)
    sampler = sampling.sampler(group_size=2, max_tokens=96, eos_ids=(0,))
    step = make_train_step(policy, optimizer, sampler, loss=losses.grpo())
    state = jax.eval_shape(lambda key: init_state(policy.init(key), optimizer, key), jax.random.key(0))
    prompts = Prompts(jax.ShapeDtypeStruct((4, 32), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32))
    collect, learn, _ = memory.traced(step, state, prompts, mesh=mesh)
    return [program.lower().compile().as_text() for program in (collect, learn)]


if __name__ == "__main__":
    for program in compiled(sys.argv[1]):
        assert "tpu_custom_call" in program
