"""Prompts to rollouts.

samplers.py  sampler, continuous, greedy: made values, called `(policy, params, prompts, key) -> rollout`
batch.py     all completions of a batch decoded together
slots.py     continuous batching: slots that are refilled
drawing.py   logits to tokens
stopping.py  strings that end a completion
turns.py     conversations with an environment on the host
traced_turns.py   those with a traced one, in one program; turn_decoding.py is what both run
engines.py   rollouts of an inference engine
servers.py   vLLM or SGLang behind HTTP as a sampler, with weights pushed as folders; server_answers.py checks theirs
"""

from grpo_jax.sampling.engines import from_engine
from grpo_jax.sampling.samplers import PolicySampler, continuous, greedy, sampler
from grpo_jax.sampling.stopping import StopStrings, stop_strings
from grpo_jax.sampling.traced_turns import TracedConversationSampler, traced_conversations
from grpo_jax.sampling.turns import ConversationSampler, conversations, turn_rewards

__all__ = [
    "ConversationSampler",
    "PolicySampler",
    "StopStrings",
    "TracedConversationSampler",
    "continuous",
    "conversations",
    "from_engine",
    "greedy",
    "sampler",
    "stop_strings",
    "traced_conversations",
    "turn_rewards",
]
