"""What several sources leave open, in the words of `Recipe.leaves`."""

TASK = "The model, the prompts and the rewards."
CLIP = "The clip range, which the source does not state: without an epsilon it is the 0.2 of `losses.grpo`."
RATE = "The learning rate and the rest of the optimizer, which the source here does not state."
SIZES = "The sizes of rollout and updates, which the source here does not state."
SOFT_OVERLONG = "The soft overlong penalty, a reward: `rewards.tokens.soft_overlong(max_tokens=20480, cache=4096)`."
DYNAMIC = "Dynamic sampling: `dynamic_sampling.dynamic_sampling(step.collect, rounds=...)` in place of `step.collect`."
FP32_HEAD = "A head in float32, in the sampler and in the trainer: the default `logits_dtype` of the models here."
