"""The recipes: a function a published work, each number from the source that is named beside it."""

import dataclasses

from grpo_jax import losses
from grpo_jax.advantages import (
    batch_normalised_advantages,
    batch_scaled_advantages,
    centered_advantages,
    from_normalised_rewards,
    kl_cost,
    leave_one_out_advantages,
)
from grpo_jax.protocols import Penalty
from grpo_jax.recipes.recipe import Recipe
from grpo_jax.transforms import mask_truncated, old_from_sampler
from grpo_jax.types import Number


def _arxiv(key: str, eprint: str, year: int, title: str, authors: str) -> str:
    return _entry(
        "misc",
        key,
        title=f"{{{title}}}",
        author=authors,
        year=year,
        eprint=eprint,
        archivePrefix="arXiv",
        url=f"https://arxiv.org/abs/{eprint}",
    )


def _entry(kind: str, key: str, **fields: object) -> str:
    lines = (f"  {name:<13} = {{{value}}},\n" for name, value in fields.items())
    return f"@{kind}{{{key},\n{''.join(lines)}}}\n"


_TASK = "The model, the prompts and the rewards."
_CLIP = "The clip range, which the source does not state: without an epsilon it is the 0.2 of `losses.grpo`."
_RATE = "The learning rate and the rest of the optimizer, which the source here does not state."
_SIZES = "The sizes of rollout and updates, which the source here does not state."
_SOFT_OVERLONG = "The soft overlong penalty, a reward: `rewards.tokens.soft_overlong(max_tokens=20480, cache=4096)`."
_DYNAMIC = "Dynamic sampling: `dynamic_sampling.dynamic_sampling(step.collect, rounds=...)` in place of `step.collect`."
_FP32_HEAD = "A head in float32, in the sampler and in the trainer: the default `logits_dtype` of the models here."


# ------------------------------------------------------------------------------ GRPO


def deepseekmath() -> Recipe:
    """DeepSeekMath (Shao et al. 2024), the first GRPO: section 4.2, "Training and Evaluating DeepSeekMath-RL".

    The training batch of 1024 completions is 16 questions of 64. TRL's paper index gives
    R1's numbers for it, and says that the paper has none.
    """
    return Recipe(
        name="DeepSeekMath",
        source="arXiv:2402.03300, section 4.2",
        bibtex=_arxiv(
            "shao2024deepseekmath",
            "2402.03300",
            2024,
            "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
            "Shao, Zhihong and Wang, Peiyi and Zhu, Qihao and Xu, Runxin and Song, Junxiao and Bi, Xiao and "
            "Zhang, Haowei and Zhang, Mingchuan and Li, Y. K. and Wu, Y. and Guo, Daya",
        ),
        leaves=(
            _TASK + " The paper's reward is a learned model.",
            _CLIP,
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


_R1 = _entry(
    "article",
    "guo2025deepseekr1",
    title="{DeepSeek-R1 incentivizes reasoning in LLMs through reinforcement learning}",
    author="Guo, Daya and others",
    year=2025,
    journal="Nature",
    volume=645,
    pages="633--638",
    doi="10.1038/s41586-025-09422-z",
    eprint="2501.12948",
    archivePrefix="arXiv",
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
        bibtex=_R1,
        leaves=(
            _TASK + " The paper's rewards are the accuracy and the format.",
            _CLIP + " R1's first stage has 10.",
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
    good token is clipped at 11 times its probability.
    """
    return dataclasses.replace(
        r1_zero(),
        name="DeepSeek-R1",
        epsilon=10.0,
        leaves=(
            _TASK + " To R1-Zero's rewards it adds the share of words in the target language.",
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
        bibtex=_arxiv(
            "liu2025understanding",
            "2503.20783",
            2025,
            "Understanding R1-Zero-Like Training: A Critical Perspective",
            "Liu, Zichen and Chen, Changyu and Li, Wenjun and Qi, Penghui and Pang, Tianyu and Du, Chao and "
            "Lee, Wee Sun and Lin, Min",
        ),
        leaves=(_TASK, "The template of the prompt, on which the paper finds that much depends."),
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
        bibtex=_arxiv(
            "wu2025ittakestwo", "2510.00977", 2025, "It Takes Two: Your GRPO Is Secretly DPO", "Wu, Yihong and others"
        ),
        leaves=(_TASK, "The aggregate: that of equation 29, `completion_mean`, is taken; verl's default is another."),
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
        bibtex=_arxiv(
            "primeintellect2025intellect2",
            "2505.07291",
            2025,
            "INTELLECT-2: A Reasoning Model Trained Through Globally Decentralized Reinforcement Learning",
            "{Prime Intellect Team} and Jaghouar, Sami and Mattern, Justus and others",
        ),
        leaves=(
            _TASK + " The paper adds a reward for the length that the prompt asks for.",
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


# ---------------------------------------------------------------- DAPO and after it


def dapo() -> Recipe:
    """DAPO (Yu et al. 2025, sections 3 and 4.1, table 1).

    The mini-batch of 512 counts completions, the rollout of 512 prompts: 16 updates. Table
    1 adds the soft punishment to the filter of truncated completions, and so does TRL; the
    authors' scripts have the punishment alone (`transforms=()`).
    """
    return Recipe(
        name="DAPO",
        source="arXiv:2503.14476, section 4.1",
        bibtex=_arxiv(
            "yu2025dapo",
            "2503.14476",
            2025,
            "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
            "Yu, Qiying and others",
        ),
        leaves=(_TASK, _SOFT_OVERLONG, _DYNAMIC),
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
    """80/20 (Wang et al. 2025): DAPO of which only the fifth of tokens of highest entropy teaches.

    The numbers are those of the authors' script for Qwen3-14B,
    `run_only_top20_high_entropy_tokens_dapo_qwen3_14b.sh`. Its dual clip at 10, verl's
    default, is left out (`delta=10.0`), and it takes the quantile over a micro-batch.
    """
    return dataclasses.replace(
        dapo(),
        name="80/20",
        source="arXiv:2506.01939, and its scripts",
        bibtex=_arxiv(
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
        bibtex=_arxiv(
            "he2025skywork",
            "2505.22312",
            2025,
            "Skywork Open Reasoner 1 Technical Report",
            "He, Jujie and Liu, Jiacai and Liu, Chris Yuhao and Yan, Rui and Wang, Chaojie and Cheng, Peng and "
            "Zhang, Xiaoyu and Zhang, Fuxiang and Xu, Jiacheng and Shen, Wei and Li, Siyuan and Zeng, Liang and "
            "Wei, Tianwen and Cheng, Cheng and An, Bo and Liu, Yang and Zhou, Yahui",
        ),
        leaves=(
            _TASK,
            _CLIP,
            "Stages of a growing context, each with sizes of its own.",
            "The rejection of groups without spread: `dynamic_sampling`, which fills their places as well.",
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
        bibtex=_arxiv(
            "liu2025tricks",
            "2508.08221",
            2025,
            "Part I: Tricks or Traps? A Deep Dive into RL for LLM Reasoning",
            "Liu, Zihe and Liu, Jiashun and He, Yancheng and Wang, Weixun and Liu, Jiaheng and Pan, Ling and "
            "Hu, Xinyu and Xiong, Shaopan and Huang, Ju and Hu, Jian and Huang, Shengyi and Obando-Ceron, Johan and "
            "Yang, Siran and Wang, Jiamang and Su, Wenbo and Zheng, Bo",
        ),
        leaves=(
            _TASK,
            _CLIP,
            _RATE,
            _SIZES,
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


# ------------------------------------------------------------- ratios of completions


def gspo() -> Recipe:
    """GSPO (Zheng et al. 2025, section 5.1): the ratio of the whole completion, clipped near 1."""
    return Recipe(
        name="GSPO",
        source="arXiv:2507.18071v2, section 5.1",
        bibtex=_arxiv(
            "zheng2025gspo",
            "2507.18071",
            2025,
            "Group Sequence Policy Optimization",
            "Zheng, Chujie and Liu, Shixuan and Li, Mingze and Chen, Xiong-Hui and Yu, Bowen and Gao, Chang and "
            "Dang, Kai and Liu, Yuqiong and Men, Rui and Yang, An and Zhou, Jingren and Lin, Junyang",
        ),
        leaves=(_TASK, _RATE, "The sizes of group and rollout, which the source does not state."),
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
        bibtex=_arxiv(
            "liu2026luspo",
            "2602.05261",
            2026,
            "Length-Unbiased Sequence Policy Optimization: Revealing and Controlling Response Length Variation in RLVR",
            "Liu, Fanfan and Yin, Youyang and Shi, Peng and Yang, Siqi and Zeng, Zhixiong and Qiu, Haibo",
        ),
        leaves=(
            _TASK + " The paper's are the accuracy, the format (0.5) and a punishment over the last 4096 tokens.",
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
        bibtex=_arxiv(
            "zhao2025gmpo",
            "2507.20673",
            2025,
            "Geometric-Mean Policy Optimization",
            "Zhao, Yuzhong and Liu, Yue and Liu, Junpeng and Chen, Jingye and Wu, Xun and Hao, Yaru and "
            "Lv, Tengchao and Huang, Shaohan and Cui, Lei and Ye, Qixiang and Wan, Fang and Wei, Furu",
        ),
        leaves=(_TASK, _RATE),
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
        bibtex=_arxiv(
            "shen2026vespo",
            "2602.10693",
            2026,
            "VESPO: Variational Sequence-Level Soft Policy Optimization for Stable Off-Policy LLM Training",
            "Shen, Guobin and Zhao, Chenxiao and Cheng, Xiang and Huang, Lei and Yu, Xing",
        ),
        leaves=(_TASK, _RATE, "The prompts of a rollout: the paper's minibatches of 256 do not say of what."),
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


# ---------------------------------------------------------------------- no hard clip


def cispo() -> Recipe:
    """CISPO (MiniMax 2025, MiniMax-M1, section 3): a capped importance weight, and no token without a gradient.

    The betas and the epsilon of Adam are of section 3.2. The cap was tuned and is not
    stated: without `max_ratio` it is ScaleRL's 5.
    """
    return Recipe(
        name="CISPO",
        source="arXiv:2506.13585, section 3",
        bibtex=_arxiv(
            "minimax2025m1",
            "2506.13585",
            2025,
            "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
            "{MiniMax} and others",
        ),
        leaves=(
            _TASK,
            "The cap of the weight, `max_ratio`, which the paper tuned and does not state.",
            _RATE,
            _SIZES,
            _DYNAMIC,
            _FP32_HEAD,
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
        bibtex=_arxiv(
            "khatri2025scalerl",
            "2510.13786",
            2025,
            "The Art of Scaling Reinforcement Learning Compute for LLMs",
            "Khatri, Devvrit and Madaan, Lovish and Tiwari, Rishabh and Bansal, Rachit and Duvvuri, Sai Surya and "
            "Zaheer, Manzil and Dhillon, Inderjit S. and Brandfonbrener, David and Agarwal, Rishabh",
        ),
        leaves=(
            _TASK + " The paper's reward is 1 or -1.",
            _FP32_HEAD,
            "Sampling that runs up to 8 updates ahead of learning (PipelineRL-8).",
            "Leaving out prompts without spread, and for good those of a pass rate of 0.9.",
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
    """SAPO (Gao et al. 2025, section 5): a soft gate in place of the clip, falling off faster for bad tokens."""
    return Recipe(
        name="SAPO",
        source="arXiv:2511.20347, section 5",
        bibtex=_arxiv(
            "gao2025sapo",
            "2511.20347",
            2025,
            "Soft Adaptive Policy Optimization",
            "Gao, Chang and Zheng, Chujie and Chen, Xiong-Hui and Dang, Kai and Liu, Shixuan and Yu, Bowen and "
            "Yang, An and Bai, Shuai and Zhou, Jingren and Lin, Junyang",
        ),
        leaves=(_TASK, _RATE, "The sizes of group and rollout, which the source does not state."),
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
        bibtex=_arxiv(
            "ahmadian2024back",
            "2402.14740",
            2024,
            "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
            "Ahmadian, Arash and Cremer, Chris and Gall{\\'e}, Matthias and Fadaee, Marzieh and Kreutzer, Julia and "
            'Pietquin, Olivier and {\\"U}st{\\"u}n, Ahmet and Hooker, Sara',
        ),
        leaves=(
            _TASK + " The paper's is a learned reward model.",
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
        bibtex=_arxiv(
            "hu2025reinforce",
            "2501.03262",
            2025,
            "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization",
            "Hu, Jian and Liu, Jason Klein and Xu, Haotian and Shen, Wei",
        ),
        leaves=(_TASK, _CLIP, _RATE, _SIZES, "The coefficient `beta` of the KL, which the source here does not state."),
        objective=losses.grpo,
        aggregate=losses.token_mean,
        estimator=batch_normalised_advantages,
        cost=kl_cost,
    )


# ----------------------------------------------------- several rewards, other samplers


def gdpo() -> Recipe:
    """GDPO (Liu et al. 2026): GRPO whose rewards are normalised one by one before they are added.

    It differs from GRPO with two rewards or more.
    """
    return Recipe(
        name="GDPO",
        source="arXiv:2601.05242",
        bibtex=_arxiv(
            "liu2026gdpo",
            "2601.05242",
            2026,
            "GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization",
            "Liu, Shih-Yang and Dong, Xin and Lu, Ximing and Diao, Shizhe and Belcak, Peter and Liu, Mingjie and "
            "Chen, Min-Hung and Yin, Hongxu and Wang, Yu-Chiang Frank and Cheng, Kwang-Ting and Choi, Yejin and "
            "Kautz, Jan and Molchanov, Pavlo",
        ),
        leaves=(
            _TASK + " There are several.",
            "Their weights: `recipe.settings | {'advantage': from_normalised_rewards(weights=...)}`.",
            _CLIP,
            _RATE,
            _SIZES,
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
        bibtex=_entry(
            "misc",
            "yao2025offpolicy",
            title="{Your Efficient RL Framework Secretly Brings You Off-Policy RL Training}",
            author="Yao, Feng and Liu, Liyuan and Zhang, Dinghuai and Dong, Chengyu and Shang, Jingbo and "
            "Gao, Jianfeng",
            year=2025,
            url="https://fengyao.notion.site/off-policy-rl",
        ),
        leaves=(
            _TASK,
            "The recipe that it corrects: `replace(recipes.dapo(), weight=losses.truncated_importance, limit=2.0)`.",
            _CLIP,
            _RATE,
            _SIZES,
        ),
        objective=losses.grpo,
        weight=losses.truncated_importance,
        limit=2.0,
    )


def icepop() -> Recipe:
    """IcePop (Ling Team 2025, Ring-1T): tokens on which trainer and sampler disagree most do not teach.

    The band is that of the report on Ring-1T; TRL's example, 0.5 to 2, is not.
    """
    return Recipe(
        name="IcePop",
        source="arXiv:2510.18855, and ringtech.notion.site/icepop",
        bibtex=_arxiv(
            "lingteam2025everystep",
            "2510.18855",
            2025,
            "Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking Model",
            "{Ling Team} and others",
        ),
        leaves=(_TASK, _CLIP, _RATE, _SIZES),
        objective=losses.grpo,
        weight=losses.masked_importance,
        low=0.5,
        high=5.0,
    )


def deepseek_v3_2() -> Recipe:
    """DeepSeek-V3.2 (DeepSeek-AI 2025, section 3.1): an unbiased KL, and no bad completions that are far off-policy.

    The report states no number: `beta` and `threshold` are from TRL's paper index. Its
    advantages are centered, without a deviation.
    """
    return Recipe(
        name="DeepSeek-V3.2",
        source="arXiv:2512.02556, section 3.1; the numbers are those of TRL's paper index",
        bibtex=_arxiv(
            "deepseekai2025v32",
            "2512.02556",
            2025,
            "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models",
            "{DeepSeek-AI}",
        ),
        leaves=(
            _TASK,
            _CLIP,
            _RATE,
            _SIZES,
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
