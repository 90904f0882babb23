"""A network with a scalar head on its hidden states: the critic of PPO, and a reward model.

Params are `{"network": ..., "head": {"kernel": [D, 1], "bias": []}}`. The two are the same,
so that a trained reward model may start a critic, as in InstructGPT (Ouyang et al. 2022,
arXiv:2203.02155, appendix C.4), and a checkpoint that `hf.load_reward_model` reads fits:

    network, params, kernel = hf.load_reward_model(folder)
    params = {"network": params, "head": {"kernel": kernel, "bias": jnp.zeros(())}}
"""

import jax
import jax.numpy as jnp

from grpo_jax.policies import Policy, forward
from grpo_jax.scoring import decoder_inputs
from grpo_jax.types import Array, Params, PRNGKey, Prompts


def init(network: Policy, key: PRNGKey) -> Params:
    """A random network with a head of zeros, which says 0 of everything until it has learned."""
    params = network.init(key)
    return {"network": params, "head": _zeros(network, params)}


def init_from(network: Policy, params: Params) -> Params:
    """A network that starts from `params`, such as the policy's, with a head of zeros.

    Args:
      network: the one that the params are of.
      params: copied, since a donated state may not hold an array twice.
    """
    return {"network": jax.tree.map(jnp.copy, params), "head": _zeros(network, params)}


def hidden_states(network: Policy, params: Params, prompts: Prompts, tokens: Array, lengths: Array) -> Array:
    """What the network knows before each token of the completions, and after the last.

    Args:
      network: its `unembed` is not used.
      params: the network's own, without a head.
      prompts: `B` prompts, each read once for its group.
      tokens: `[B, G, S]`, the completions or their beginnings.
      lengths: `[B, G]`, of the completions; what lies behind is padding.

    Returns:
      `[B, G, S + 1, D]`. State `t` has read the prompt and tokens `0..t - 1`: the one
      that predicts token `t`.
    """
    return forward(network, params, prompts, *decoder_inputs(prompts, tokens, lengths))[0]


def scalar(head: Params, hidden: Array) -> Array:
    """`hidden [..., D] @ kernel [D, 1] + bias`, `[...]` in float32."""
    kernel = head["kernel"].astype(jnp.float32)
    # In full: the default of a TPU is bfloat16, too coarse to regress on.
    return jnp.matmul(hidden.astype(jnp.float32), kernel, precision="highest")[..., 0] + head["bias"]


def _zeros(network: Policy, params: Params) -> Params:
    one = jnp.ones((1,), jnp.int32)
    prompts, tokens = Prompts(one[None], one), jnp.ones((1, 1, 0), jnp.int32)
    hidden = jax.eval_shape(lambda params: hidden_states(network, params, prompts, tokens, one[None]), params)
    return {"kernel": jnp.zeros((hidden.shape[-1], 1)), "bias": jnp.zeros(())}
