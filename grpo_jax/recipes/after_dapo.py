"""DAPO, and what begins with it."""

import dataclasses

from grpo_jax import losses
from grpo_jax.advantages import batch_scaled_advantages
from grpo_jax.recipes.citations import arxiv
from grpo_jax.recipes.left_open import CLIP, DYNAMIC, RATE, SIZES, SOFT_OVERLONG, TASK
from grpo_jax.recipes.recipe import Recipe
from grpo_jax.transforms import mask_truncated


def dapo() -> Recipe:
    """DAPO (Yu et al. 2025, sections 3 and 4.1, table 1).

    The mini-batch of 512 counts completions, the rollout of 512 prompts: 16 updates. Table
    1 adds the soft punishment to the filter of truncated completions, and so does TRL; the
    authors' scripts have the punishment alone (`transforms=()`).
    """
    return Recipe(
        name="DAPO",
        source="arXiv:2503.14476, section 4.1",
        bibtex=arxiv(
            "yu2025dapo",
            "2503.14476",
            2025,
            "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
            "Yu, Qiying and others",
        ),
        leaves=(TASK, SOFT_OVERLONG, DYNAMIC),
        objective=losses.dapo,
        epsilon=0.2,
        epsilon_high=0.28,
        transforms=(mask_truncated,),
        prompts=512,
        group_size=16,
        max_tokens=20480,
        minibatches=16,
        learning_rate=1e-6,
        warmup_rollouts=20,
    )


def high_entropy_tokens() -> Recipe:
    """80/20 (Wang et al. 2025): DAPO, trained only on the fifth of tokens of highest entropy.

    The numbers are those of the authors' script for Qwen3-14B,
    `run_only_top20_high_entropy_tokens_dapo_qwen3_14b.sh`. Its dual clip at 10, verl's
    default, is left out (`delta=10.0`), and it takes the quantile over a micro-batch.
    """
    return dataclasses.replace(
        dapo(),
        name="80/20",
        source="arXiv:2506.01939, and its scripts",
        bibtex=arxiv(
            "wang2025beyond",
            "2506.01939",
            2025,
            "Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning "
            "for LLM Reasoning",
            "Wang, Shenzhi and Yu, Le and Gao, Chang and Zheng, Chujie and Liu, Shixuan and Lu, Rui and Dang, Kai and "
            "Chen, Xiong-Hui and Yang, Jianxin and Zhang, Zhenru and Liu, Yuqiong and Yang, An and Zhao, Andrew and "
            "Yue, Yang and Song, Shiji and Yu, Bowen and Huang, Gao and Lin, Junyang",
        ),
        transforms=(),
        entropy_share=0.2,
        temperature=1.0,
        warmup_rollouts=10,
        weight_decay=0.1,
        max_grad_norm=1.0,
    )


def skywork_or1() -> Recipe:
    """Skywork-OR1 (He et al. 2025): the mean over tokens, no KL term, and an entropy that is held up.

    Target and step of the bonus are of section 3.2.5, groups and temperature of section
    3.2, the learning rate of table 5 (the baseline of the ablations). TRL's example has a
    target of 5.0.
    """
    return Recipe(
        name="Skywork-OR1",
        source="arXiv:2505.22312, sections 3.2 and 4.1",
        bibtex=arxiv(
            "he2025skywork",
            "2505.22312",
            2025,
            "Skywork Open Reasoner 1 Technical Report",
            "He, Jujie and Liu, Jiacai and Liu, Chris Yuhao and Yan, Rui and Wang, Chaojie and Cheng, Peng and "
            "Zhang, Xiaoyu and Zhang, Fuxiang and Xu, Jiacheng and Shen, Wei and Li, Siyuan and Zeng, Liang and "
            "Wei, Tianwen and Cheng, Cheng and An, Bo and Liu, Yang and Zhou, Yahui",
        ),
        leaves=(
            TASK,
            CLIP,
            "Stages of a growing context, each with sizes of its own.",
            "The rejection of zero-variance groups: `dynamic_sampling`, which fills their places as well.",
            "The call of `recipe.after(state, metrics)`, which moves the bonus, in a state made with `recipe.initial`.",
        ),
        objective=losses.grpo,
        aggregate=losses.token_mean,
        entropy_target=0.2,
        entropy_delta=0.005,
        group_size=16,
        temperature=1.0,
        learning_rate=1e-6,
    )


def lite_ppo() -> Recipe:
    """Lite PPO (Liu et al. 2025): deviations of the batch, the mean over tokens, PPO's clip."""
    return Recipe(
        name="Lite PPO",
        source="arXiv:2508.08221, as in TRL's paper index",
        bibtex=arxiv(
            "liu2025tricks",
            "2508.08221",
            2025,
            "Part I: Tricks or Traps? A Deep Dive into RL for LLM Reasoning",
            "Liu, Zihe and Liu, Jiashun and He, Yancheng and Wang, Weixun and Liu, Jiaheng and Pan, Ling and "
            "Hu, Xinyu and Xiong, Shaopan and Huang, Ju and Hu, Jian and Huang, Shengyi and Obando-Ceron, Johan and "
            "Yang, Siran and Wang, Jiamang and Su, Wenbo and Zheng, Bo",
        ),
        leaves=(
            TASK,
            CLIP,
            RATE,
            SIZES,
            "What top-k and top-p do to the ratio: the sampler's log-probs are those of the cut distribution.",
        ),
        objective=losses.grpo,
        aggregate=losses.token_mean,
        estimator=batch_scaled_advantages,
        group_size=8,
        temperature=0.99,
        top_p=0.99,
        top_k=100,
        iterations=1,
    )
