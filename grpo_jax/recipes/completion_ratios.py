"""Works that take the ratio of a whole completion."""

from grpo_jax import losses
from grpo_jax.advantages import centered_advantages
from grpo_jax.recipes.citations import arxiv
from grpo_jax.recipes.left_open import RATE, TASK
from grpo_jax.recipes.recipe import Recipe
from grpo_jax.transforms import old_from_sampler


def gspo() -> Recipe:
    """GSPO (Zheng et al. 2025, section 5.1): the ratio of the whole completion, clipped near 1."""
    return Recipe(
        name="GSPO",
        source="arXiv:2507.18071v2, section 5.1",
        bibtex=arxiv(
            "zheng2025gspo",
            "2507.18071",
            2025,
            "Group Sequence Policy Optimization",
            "Zheng, Chujie and Liu, Shixuan and Li, Mingze and Chen, Xiong-Hui and Yu, Bowen and Gao, Chang and "
            "Dang, Kai and Liu, Yuqiong and Men, Rui and Yang, An and Zhou, Jingren and Lin, Junyang",
        ),
        leaves=(TASK, RATE, "The sizes of group and rollout, which the source does not state."),
        objective=losses.gspo,
        epsilon=3e-4,
        epsilon_high=4e-4,
        minibatches=4,
    )


def luspo() -> Recipe:
    """LUSPO (Liu et al. 2026, section 5.1): GSPO with each completion's loss times its length.

    The numbers are those of the models of text alone.
    """
    return Recipe(
        name="LUSPO",
        source="arXiv:2602.05261, section 5.1",
        bibtex=arxiv(
            "liu2026luspo",
            "2602.05261",
            2026,
            "Length-Unbiased Sequence Policy Optimization: Revealing and Controlling Response Length Variation in RLVR",
            "Liu, Fanfan and Yin, Youyang and Shi, Peng and Yang, Siqi and Zeng, Zhixiong and Qiu, Haibo",
        ),
        leaves=(
            TASK + " The paper's are the accuracy, the format (0.5) and a punishment over the last 4096 tokens.",
            "The number of minibatches: the paper's are of 16, and it does not say whether prompts or completions.",
        ),
        objective=losses.luspo,
        epsilon=2e-3,
        epsilon_high=2.5e-3,
        prompts=128,
        group_size=8,
        max_tokens=32768,
        temperature=1.0,
        top_p=0.7,
        learning_rate=1e-6,
        warmup_rollouts=20,
    )


def gmpo() -> Recipe:
    """GMPO (Zhao et al. 2025, section 4): the geometric mean of ratios that are clipped at e^-0.4 and e^0.4.

    Trained as Dr. GRPO: 1024 completions in a rollout, 8 updates of 128.
    """
    return Recipe(
        name="GMPO",
        source="arXiv:2507.20673, section 4",
        bibtex=arxiv(
            "zhao2025gmpo",
            "2507.20673",
            2025,
            "Geometric-Mean Policy Optimization",
            "Zhao, Yuzhong and Liu, Yue and Liu, Junpeng and Chen, Jingye and Wu, Xun and Hao, Yaru and "
            "Lv, Tengchao and Huang, Shaohan and Cui, Lei and Ye, Qixiang and Wan, Fang and Wei, Furu",
        ),
        leaves=(TASK, RATE),
        objective=losses.gmpo,
        epsilon=0.4,
        epsilon_high=0.4,
        prompts=128,
        group_size=8,
        max_tokens=3000,
        minibatches=8,
    )


def vespo() -> Recipe:
    """VESPO (Shen et al. 2026, section 4.1 and appendix D): a smooth weight of the product of a completion's ratios.

    Ratios are against the sampler, so that staleness and mismatch are one. A staleness of 8
    is 8 minibatches. The pseudo-code leaves the aggregate open; it is the mean over tokens.
    """
    return Recipe(
        name="VESPO",
        source="arXiv:2602.10693v3, section 4.1 and appendix D",
        bibtex=arxiv(
            "shen2026vespo",
            "2602.10693",
            2026,
            "VESPO: Variational Sequence-Level Soft Policy Optimization for Stable Off-Policy LLM Training",
            "Shen, Guobin and Zhao, Chenxiao and Cheng, Xiang and Huang, Lei and Yu, Xing",
        ),
        leaves=(TASK, RATE, "The prompts of a rollout: the paper's minibatches of 256 do not say of what."),
        objective=losses.vespo,
        estimator=centered_advantages,
        k_pos=2.0,
        lambda_pos=3.0,
        k_neg=3.0,
        lambda_neg=2.0,
        transforms=(old_from_sampler,),
        group_size=8,
        max_tokens=16384,
        minibatches=8,
    )
