import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax import advantages, data, init_state, losses, make_train_step, rewards, sampling, statistics, testing

tokenizer = testing.tiny_tokenizer()  # transformers.AutoTokenizer.from_pretrained(folder)
policy = testing.tiny_policy(vocab_size=len(tokenizer))  # policy, params = hf.load_pretrained(folder)
params = jax.jit(policy.init)(jax.random.key(0))
optimizer = optax.adam(3e-3)
sampler = sampling.sampler(group_size=4, max_tokens=8, eos_ids=(tokenizer.eos_token_id,))

rows = [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(4) for b in range(4)]
train = data.encode_rows(tokenizer, rows, chat=True)
prompts = train.batch(seed=0, step=0, size=4, multiple=64)  # [B, P]; step n has other rows
state = init_state(jax.tree.map(jnp.copy, params), optimizer, jax.random.key(0))  # `learn` writes over its state
