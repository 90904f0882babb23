"""Several rewards, and samplers that differ from the policy."""

from grpo_jax import losses
from grpo_jax.advantages import centered_advantages, from_normalised_rewards
from grpo_jax.protocols import Penalty
from grpo_jax.recipes.citations import arxiv, entry
from grpo_jax.recipes.left_open import CLIP, RATE, SIZES, TASK
from grpo_jax.recipes.recipe import Recipe
from grpo_jax.types import Number


def gdpo() -> Recipe:
    """GDPO (Liu et al. 2026): GRPO whose rewards are normalised one by one before they are added.

    It differs from GRPO with two rewards or more.
    """
    return Recipe(
        name="GDPO",
        source="arXiv:2601.05242",
        bibtex=arxiv(
            "liu2026gdpo",
            "2601.05242",
            2026,
            "GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization",
            "Liu, Shih-Yang and Dong, Xin and Lu, Ximing and Diao, Shizhe and Belcak, Peter and Liu, Mingjie and "
            "Chen, Min-Hung and Yin, Hongxu and Wang, Yu-Chiang Frank and Cheng, Kwang-Ting and Choi, Yejin and "
            "Kautz, Jan and Molchanov, Pavlo",
        ),
        leaves=(
            TASK + " There are several.",
            "Their weights: `recipe.settings | {'advantage': from_normalised_rewards(weights=...)}`.",
            CLIP,
            RATE,
            SIZES,
        ),
        objective=losses.grpo,
        to_advantages=from_normalised_rewards,
        estimator=None,
    )


def tis() -> Recipe:
    """Truncated importance sampling (Yao et al. 2025): tokens weigh what the trainer thinks of them, at most twice.

    A correction for a sampler that is another program, here on GRPO; the report has it on
    PPO and DAPO, and with a cap of 8 in a run of a quantised 32B.
    """
    return Recipe(
        name="TIS",
        source="fengyao.notion.site/off-policy-rl",
        bibtex=entry(
            "misc",
            "yao2025offpolicy",
            title="{Your Efficient RL Framework Secretly Brings You Off-Policy RL Training}",
            author="Yao, Feng and Liu, Liyuan and Zhang, Dinghuai and Dong, Chengyu and Shang, Jingbo and "
            "Gao, Jianfeng",
            year=2025,
            url="https://fengyao.notion.site/off-policy-rl",
        ),
        leaves=(
            TASK,
            "The recipe that it corrects: `replace(recipes.dapo(), weight=losses.truncated_importance, limit=2.0)`.",
            CLIP,
            RATE,
            SIZES,
        ),
        objective=losses.grpo,
        weight=losses.truncated_importance,
        limit=2.0,
    )


def icepop() -> Recipe:
    """IcePop (Ling Team 2025, Ring-1T): tokens on which trainer and sampler disagree most are left out.

    The band is that of the report on Ring-1T; TRL's example, 0.5 to 2, is not.
    """
    return Recipe(
        name="IcePop",
        source="arXiv:2510.18855, and ringtech.notion.site/icepop",
        bibtex=arxiv(
            "lingteam2025everystep",
            "2510.18855",
            2025,
            "Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking Model",
            "{Ling Team} and others",
        ),
        leaves=(TASK, CLIP, RATE, SIZES),
        objective=losses.grpo,
        weight=losses.masked_importance,
        low=0.5,
        high=5.0,
    )


def deepseek_v3_2() -> Recipe:
    """DeepSeek-V3.2 (DeepSeek-AI 2025, section 3.1): an unbiased KL, and a mask of off-policy completions.

    The report states no number: `beta` and `threshold` are from TRL's paper index. Its
    advantages are centered, without a deviation.
    """
    return Recipe(
        name="DeepSeek-V3.2",
        source="arXiv:2512.02556, section 3.1; the numbers are those of TRL's paper index",
        bibtex=arxiv(
            "deepseekai2025v32",
            "2512.02556",
            2025,
            "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models",
            "{DeepSeek-AI}",
        ),
        leaves=(
            TASK,
            CLIP,
            RATE,
            SIZES,
            "A KL of another strength in every domain, or none for mathematics.",
            "Keeping the routing of experts, and the cut of top-p, from the sampler to the trainer.",
        ),
        objective=losses.grpo,
        weight=losses.off_policy_mask,
        threshold=0.5,
        estimator=centered_advantages,
        beta=0.001,
        penalty=_unbiased_k3,
    )


def _unbiased_k3(beta: Number) -> Penalty:
    return losses.k3(beta, correction=losses.token_ratio)
