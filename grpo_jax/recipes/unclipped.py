"""Works without a hard clip of the ratio."""

from grpo_jax import losses
from grpo_jax.advantages import batch_normalised_advantages, batch_scaled_advantages, kl_cost, leave_one_out_advantages
from grpo_jax.recipes.citations import arxiv
from grpo_jax.recipes.left_open import CLIP, DYNAMIC, FP32_HEAD, RATE, SIZES, TASK
from grpo_jax.recipes.recipe import Recipe
from grpo_jax.transforms import old_from_sampler


def cispo() -> Recipe:
    """CISPO (MiniMax 2025, MiniMax-M1, section 3): a capped importance weight, and no token without a gradient.

    The betas and the epsilon of Adam are of section 3.2. The cap was tuned and is not
    stated: without `max_ratio` it is ScaleRL's 5.
    """
    return Recipe(
        name="CISPO",
        source="arXiv:2506.13585, section 3",
        bibtex=arxiv(
            "minimax2025m1",
            "2506.13585",
            2025,
            "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
            "{MiniMax} and others",
        ),
        leaves=(
            TASK,
            "The cap of the weight, `max_ratio`, which the paper tuned and does not state.",
            RATE,
            SIZES,
            DYNAMIC,
            FP32_HEAD,
            "The early end of completions that repeat themselves.",
        ),
        objective=losses.cispo,
        b1=0.9,
        b2=0.95,
        adam_eps=1e-15,
    )


def scale_rl() -> Recipe:
    """ScaleRL (Khatri et al. 2025, section 4 and appendix A.3): CISPO, the mean over prompts, deviations of the batch.

    `max_tokens` is 12288 for thinking and 2048 for the answer. The cap of 5 is from TRL's
    paper index. The paper divides by the deviation of the batch's centered advantages,
    `batch_scaled_advantages` by that of its rewards.
    """
    return Recipe(
        name="ScaleRL",
        source="arXiv:2510.13786, section 4 and appendix A.3",
        bibtex=arxiv(
            "khatri2025scalerl",
            "2510.13786",
            2025,
            "The Art of Scaling Reinforcement Learning Compute for LLMs",
            "Khatri, Devvrit and Madaan, Lovish and Tiwari, Rishabh and Bansal, Rachit and Duvvuri, Sai Surya and "
            "Zaheer, Manzil and Dhillon, Inderjit S. and Brandfonbrener, David and Agarwal, Rishabh",
        ),
        leaves=(
            TASK + " The paper's reward is 1 or -1.",
            FP32_HEAD,
            "Sampling that runs up to 8 updates ahead of learning (PipelineRL-8).",
            "Leaving out zero-variance groups, and for good the prompts of a pass rate of 0.9.",
            "Interruptions: a phrase that ends the thinking where its 12288 tokens are spent.",
        ),
        objective=losses.cispo,
        aggregate=losses.prompt_mean,
        estimator=batch_scaled_advantages,
        max_ratio=5.0,
        transforms=(old_from_sampler,),
        prompts=48,
        group_size=16,
        max_tokens=14336,
        minibatches=1,
        learning_rate=5e-7,
        warmup_rollouts=100,
        adam_eps=1e-15,
        weight_decay=0.01,
    )


def sapo() -> Recipe:
    """SAPO (Gao et al. 2025, section 5): a soft gate in place of the clip, steeper for negative advantages."""
    return Recipe(
        name="SAPO",
        source="arXiv:2511.20347, section 5",
        bibtex=arxiv(
            "gao2025sapo",
            "2511.20347",
            2025,
            "Soft Adaptive Policy Optimization",
            "Gao, Chang and Zheng, Chujie and Chen, Xiong-Hui and Dang, Kai and Liu, Shixuan and Yu, Bowen and "
            "Yang, An and Bai, Shuai and Zhou, Jingren and Lin, Junyang",
        ),
        leaves=(TASK, RATE, "The sizes of group and rollout, which the source does not state."),
        objective=losses.sapo,
        tau_pos=1.0,
        tau_neg=1.05,
        minibatches=4,
    )


def rloo() -> Recipe:
    """RLOO (Ahmadian et al. 2024, appendix C): REINFORCE, the mean of the others as baseline, KL in the reward.

    The paper has groups of 2 and of 4. Its batch of 512 makes two updates. TRL's trainer
    has a clipped ratio of whole completions (`losses.grpo(ratio=losses.product_ratio)`).
    """
    return Recipe(
        name="RLOO",
        source="arXiv:2402.14740, appendix C, as in TRL's paper index",
        bibtex=arxiv(
            "ahmadian2024back",
            "2402.14740",
            2024,
            "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
            "Ahmadian, Arash and Cremer, Chris and Gall{\\'e}, Matthias and Fadaee, Marzieh and Kreutzer, Julia and "
            'Pietquin, Olivier and {\\"U}st{\\"u}n, Ahmet and Hooker, Sara',
        ),
        leaves=(
            TASK + " The paper's is a learned reward model.",
            "The prompts of a rollout: 512 is the batch, and the source here does not say of what.",
            "A ratio for the second update of a rollout: `losses.reinforce` has none, and is exact for the first only. "
            "`minibatches=1` makes one, and TRL's clipped ratio is exact for both.",
        ),
        objective=losses.reinforce,
        estimator=leave_one_out_advantages,
        beta=0.03,
        cost=kl_cost,
        group_size=4,
        minibatches=2,
        learning_rate=1e-6,
    )


def reinforce_plus_plus() -> Recipe:
    """REINFORCE++ (Hu et al. 2025): PPO's clip under advantages normalised over the whole batch.

    With a `beta` the KL is a cost of the reward. The paper gives each token the cost of those
    after it; `kl_cost` gives a completion its sum.
    """
    return Recipe(
        name="REINFORCE++",
        source="arXiv:2501.03262",
        bibtex=arxiv(
            "hu2025reinforce",
            "2501.03262",
            2025,
            "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization",
            "Hu, Jian and Liu, Jason Klein and Xu, Haotian and Shen, Wei",
        ),
        leaves=(TASK, CLIP, RATE, SIZES, "The coefficient `beta` of the KL, which the source here does not state."),
        objective=losses.grpo,
        aggregate=losses.token_mean,
        estimator=batch_normalised_advantages,
        cost=kl_cost,
    )
