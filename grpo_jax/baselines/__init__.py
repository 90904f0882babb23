"""What GRPO is compared with, each of the same parts: rollouts, experiences, states and steps are those of GRPO.

    ppo.py                 PPO with a critic: does GRPO's group do as well as a learned value function?
    dpo.py                 DPO: preferences without a reward model and without sampling, offline or online
    rejection_sampling.py  best of n and RAFT: is imitating what succeeded enough?
    reward_model.py        a reward model trained from preferences, to be used as a traced reward

What they are made of:

    heads.py               a network with a scalar head on its hidden states: critic and reward model alike
    preferences.py         scored groups -> pairs; the Bradley-Terry loss of DPO and reward model
    selection.py           which completions of a group are taken

DPO and RAFT are a loss and a transform of `train_step.make_learn`; PPO and the reward model, whose
networks are others, have a `make_learn` of their own.
"""

from grpo_jax.baselines import dpo, heads, ppo, preferences, rejection_sampling, reward_model, selection

__all__ = [
    "dpo",
    "heads",
    "ppo",
    "preferences",
    "rejection_sampling",
    "reward_model",
    "selection",
]
