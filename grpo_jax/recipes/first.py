"""GRPO as it was first published, and near to it."""

import dataclasses

from grpo_jax import losses
from grpo_jax.advantages import centered_advantages
from grpo_jax.recipes.citations import R1, arxiv
from grpo_jax.recipes.left_open import CLIP, TASK
from grpo_jax.recipes.recipe import Recipe


def deepseekmath() -> Recipe:
    """DeepSeekMath (Shao et al. 2024), the first GRPO: section 4.2, "Training and Evaluating DeepSeekMath-RL".

    The training batch of 1024 completions is 16 questions of 64. TRL's paper index gives
    R1's numbers for it, and says that the paper has none.
    """
    return Recipe(
        name="DeepSeekMath",
        source="arXiv:2402.03300, section 4.2",
        bibtex=arxiv(
            "shao2024deepseekmath",
            "2402.03300",
            2024,
            "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
            "Shao, Zhihong and Wang, Peiyi and Zhu, Qihao and Xu, Runxin and Song, Junxiao and Bi, Xiao and "
            "Zhang, Haowei and Zhang, Mingchuan and Li, Y. K. and Wu, Y. and Guo, Daya",
        ),
        leaves=(
            TASK + " The paper's reward is a learned model.",
            CLIP,
            "Process supervision and iterations with a renewed reward model (sections 4.1.3 and 4.1.4).",
        ),
        objective=losses.grpo,
        beta=0.04,
        prompts=16,
        group_size=64,
        max_tokens=1024,
        minibatches=1,
        iterations=1,
        learning_rate=1e-6,
    )


def r1_zero() -> Recipe:
    """DeepSeek-R1-Zero (DeepSeek-AI 2025, Nature 645, methods, "Training details of DeepSeek-R1-Zero").

    A rollout of 8192 outputs is 512 questions of 16, split into 16 updates of 32 questions.
    The paper calls an update a step, so that the reference, renewed every 400 of them, is
    renewed after 25 rollouts. It states a clip range for R1 alone.
    """
    return Recipe(
        name="DeepSeek-R1-Zero",
        source="doi:10.1038/s41586-025-09422-z, methods",
        bibtex=R1,
        leaves=(
            TASK + " The paper's rewards are the accuracy and the format.",
            CLIP + " R1's first stage has 10.",
            "The longer completions, 65536 tokens, from update 8200 on: another program with another max_tokens.",
        ),
        objective=losses.grpo,
        beta=0.001,
        reference_updates=400,
        prompts=512,
        group_size=16,
        max_tokens=32768,
        temperature=1.0,
        minibatches=16,
        iterations=1,
        learning_rate=3e-6,
    )


def r1() -> Recipe:
    """The first stage of reinforcement learning of DeepSeek-R1 (DeepSeek-AI 2025, Nature 645, methods).

    R1-Zero's numbers, from a cold start, with a clip range of 10: no bound below, and a
    token with a positive advantage is clipped at 11 times its probability.
    """
    return dataclasses.replace(
        r1_zero(),
        name="DeepSeek-R1",
        epsilon=10.0,
        leaves=(
            TASK + " To R1-Zero's rewards it adds the share of words in the target language.",
            "The cold start before; the second stage after, at a temperature of 0.7 and with rewards for preference.",
        ),
    )


def dr_grpo() -> Recipe:
    """Dr. GRPO (Liu et al. 2025, tables 4 and 6, and the scripts of sail-sg/understand-r1-zero), Oat-Zero-7B.

    `max_tokens` is the divisor of the loss as well as the limit of sampling. The scripts'
    batches are of 128 prompts in a rollout and 128 completions in an update.
    """
    return Recipe(
        name="Dr. GRPO",
        source="arXiv:2503.20783v2, tables 4 and 6, and its scripts",
        bibtex=arxiv(
            "liu2025understanding",
            "2503.20783",
            2025,
            "Understanding R1-Zero-Like Training: A Critical Perspective",
            "Liu, Zichen and Chen, Changyu and Li, Wenjun and Qi, Penghui and Pang, Tianyu and Du, Chao and "
            "Lee, Wee Sun and Lin, Min",
        ),
        leaves=(TASK, "The template of the prompt, on which the paper finds that much depends."),
        objective=losses.dr_grpo,
        estimator=centered_advantages,
        epsilon=0.2,
        prompts=128,
        group_size=8,
        max_tokens=3000,
        temperature=1.0,
        minibatches=8,
        iterations=1,
        learning_rate=1e-6,
        b1=0.9,
        b2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )


def two_grpo() -> Recipe:
    """2-GRPO (Wu et al. 2025, appendix D.1): groups of two.

    The limit of tokens is that for the models of the Qwen series.
    """
    return Recipe(
        name="2-GRPO",
        source="arXiv:2510.00977, appendix D.1",
        bibtex=arxiv(
            "wu2025ittakestwo", "2510.00977", 2025, "It Takes Two: Your GRPO Is Secretly DPO", "Wu, Yihong and others"
        ),
        leaves=(TASK, "The aggregate: that of equation 29, `completion_mean`, is taken; verl's default is another."),
        objective=losses.grpo,
        epsilon=0.2,
        epsilon_high=0.28,
        prompts=256,
        group_size=2,
        max_tokens=4096,
        temperature=1.0,
        minibatches=1,
        learning_rate=8e-6,
        warmup_rollouts=10,
    )


def intellect_2() -> Recipe:
    """INTELLECT-2 (Prime Intellect 2025, section 4.1): two-sided clipping.

    Off-policy by two steps in the paper; here the old policy is the one that sampled.
    """
    return Recipe(
        name="INTELLECT-2",
        source="arXiv:2505.07291, section 4.1",
        bibtex=arxiv(
            "primeintellect2025intellect2",
            "2505.07291",
            2025,
            "INTELLECT-2: A Reasoning Model Trained Through Globally Decentralized Reinforcement Learning",
            "{Prime Intellect Team} and Jaghouar, Sami and Mattern, Justus and others",
        ),
        leaves=(
            TASK + " The paper adds a reward for the length that the prompt asks for.",
            "Sampling that runs two steps ahead of learning.",
            "Filters of prompts before the run, and dynamic sampling in it: `dynamic_sampling`.",
            "The limit of tokens: the paper's 32K are those of the context; and max_grad_norm, 0.05 to 0.1 there.",
        ),
        objective=losses.grpo,
        epsilon=0.2,
        delta=4.0,
        beta=0.001,
        prompts=256,
        group_size=16,
        minibatches=8,
        learning_rate=3e-7,
    )
