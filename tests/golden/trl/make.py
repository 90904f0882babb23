"""Makes losses.npz in this folder: objectives and advantages as TRL 1.16.0 computes them, with gradients, in float64.

    pip install torch==2.13.0 trl==1.16.0 numpy     # in an environment of its own
    python tests/golden/trl/make.py                   # CPU, no downloads; under a minute

Each case is a `GRPOTrainer` (or `GMPOTrainer`) built by its own constructor around a tiny random model, with one method
replaced: the forward pass, which returns the log-probs and entropies drawn here. A batch of 12 completions goes through
TRL's `_generate_and_score_completions` (masks, token count, rollout ratios, advantages) and `_compute_loss`, whose
result is differentiated by the per-token log-probs and entropies. One process, one micro-batch, one step a generation.

README.md beside this file has the layout of losses.npz.
"""

import itertools
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # `rollout_func` and GMPO

import accelerate
import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

FOLDER = Path(__file__).parent
B, G, T = 4, 3, 7
N = B * G
EOS, PAD, WORD = 0, 1, 2

# Inputs -----------------------------------------------------------------------------------------------------------

LENGTHS = np.array([7, 3, 5, 1, 7, 2, 4, 6, 3, 5, 3, 2])
TRUNCATED = [1, 5, 10]  # rows that `mask_truncated_completions` masks
ADVANTAGES = [1.25, -0.75, -0.5, 0.625, -1.5, 0.875, -0.25, -1.125, 1.375, 2.0, -0.375, -1.625]
NEAR = [6, 8]  # rows almost on-policy, so that GSPO's narrow bounds have an inside
# (row, position, old log-prob, log-ratio): past each bound, for both signs of the advantage
PLANTED = [
    (0, 0, -2.5, 1.6),
    (0, 4, -1.5, -0.7),
    (4, 1, -2.5, 1.6),  # negative and beyond delta=4
    (4, 3, -1.5, 0.6),  # negative and beyond delta=1.5
    (4, 5, -1.5, -0.7),
    (7, 2, -1.5, 0.24),  # between 1.2 and 1.28
    (9, 1, -1.5, 0.22),
]
# (row, position, old log-prob - sampler log-prob)
SAMPLER_GAPS = [(0, 0, -2.0), (2, 1, 2.0), (4, 1, -2.0), (7, 4, 2.0), (9, 3, 2.0)]


def draw_inputs():
    rng = np.random.default_rng(1)
    old = -rng.exponential(2.0, (N, T))
    log_ratio = 0.6 * rng.standard_normal((N, T))
    log_ratio[NEAR] *= 5e-4
    sampler_gap = 0.3 * rng.standard_normal((N, T))
    for row, position, old_log_prob, planted_log_ratio in PLANTED:
        old[row, position] = old_log_prob
        log_ratio[row, position] = planted_log_ratio
    for row, position, gap in SAMPLER_GAPS:
        old[row, position] = min(old[row, position], -2.5)
        sampler_gap[row, position] = gap
    advantages = np.array(ADVANTAGES)
    mask = np.arange(T) < LENGTHS[:, None]
    not_truncated = ~np.isin(np.arange(N), TRUNCATED)
    inputs = {
        "old_log_probs": np.minimum(old, -1e-2),
        "log_probs": np.minimum(old + log_ratio, -1e-3),
        "ref_log_probs": np.minimum(old + 0.6 * rng.standard_normal((N, T)), -1e-3),
        "sampler_log_probs": np.minimum(old - sampler_gap, -1e-3),
        "entropies": rng.exponential(1.0, (N, T)),
        "advantages": advantages,
        "advantages_per_token": advantages[:, None] + rng.standard_normal((N, T)),
        "mask": mask,
        "mask_truncated": mask & not_truncated[:, None],
    }
    return {name: value.astype(np.float32).astype(np.float64) for name, value in inputs.items()}


def check_inputs(inputs):
    """Every bound must bite somewhere and spare something, and nothing may lie where float32 could tip it."""
    mask = inputs["mask"] == 1
    log_ratio = inputs["log_probs"] - inputs["old_log_probs"]
    ratio = np.exp(log_ratio)
    sequence_ratio = np.exp((log_ratio * mask).sum(1) / LENGTHS)[:, None]
    sampler_gap = (inputs["old_log_probs"] - inputs["sampler_log_probs"]) * mask
    drift = -(log_ratio * mask).sum(1) / LENGTHS
    sampler_drift = ((inputs["sampler_log_probs"] - inputs["log_probs"]) * mask).sum(1) / LENGTHS
    positive = (inputs["advantages"] > 0)[:, None]
    negative = ~positive

    def spans(values, where, *bounds):
        values = np.broadcast_to(values, where.shape)[where]
        edges = [-np.inf, *bounds, np.inf]
        for low, high in itertools.pairwise(edges):
            assert ((values > low) & (values < high)).any(), (low, high, np.sort(values))
        for bound in bounds:
            assert (np.abs(values - bound) > 2e-5).all(), (bound, np.sort(values))

    for sign in positive, negative:
        spans(ratio, mask & sign, 0.8, 1.2, 1.28)
        spans(sequence_ratio, sign, 0.9, 1.2)
        spans(sequence_ratio, sign, 1 - 3e-4, 1 + 4e-4)
        spans(sequence_ratio, sign, 1 - 2e-3, 1 + 2.5e-3)
        spans(np.clip(log_ratio, -5, 5), mask & sign, -0.4, 0.4)
    spans(ratio, mask & negative, 1.5, 4.0)
    spans(np.exp(sampler_gap), mask, 0.5, 2.0)
    spans(np.exp(sampler_gap.sum(1)), mask.any(1), 0.5, 2.0)
    spans(drift, negative[:, 0], 0.1)
    spans(sampler_drift, negative[:, 0], 0.1)
    assert (sampler_drift <= 0.1)[negative[:, 0]].tolist() != (drift <= 0.1)[negative[:, 0]].tolist()


# Rewards of two functions in quarters, exact in float32. `missing` has a function that gives None in places, a
# completion neither can score (row 4) and a group of which only one completion is scored (rows 6 to 8).
NAN = float("nan")
REWARDS = {
    "full": [
        [1.0, 0.25, 0.0, 2.0, 0.5, 0.0, 0.75, 0.75, 0.75, 3.0, 1.5, -1.0],
        [0.0, 1.0, 0.5, 0.25, 0.25, 0.25, 1.0, 1.0, 1.0, -0.5, 0.0, 2.0],
    ],
    "missing": [
        [1.0, 0.25, 0.0, 2.0, NAN, 0.0, 0.75, NAN, NAN, 3.0, 1.5, -1.0],
        [0.0, NAN, 0.5, 0.25, NAN, 0.25, 1.0, NAN, NAN, NAN, NAN, 2.0],
    ],
}
REWARD_WEIGHTS = [1.0, 0.5]

# Cases ------------------------------------------------------------------------------------------------------------

# Old log-probs are computed whenever a batch is updated on twice.
OFF_POLICY = {"num_iterations": 2, "max_completion_length": 11, "beta": 0.0}
CLIP = {"epsilon": 0.2, "epsilon_high": 0.28}
SEQUENCE = {"importance_sampling_level": "sequence"}
NARROW = SEQUENCE | {"epsilon": 3e-4, "epsilon_high": 4e-4}
WIDE = SEQUENCE | {"epsilon": 0.1, "epsilon_high": 0.2}
KL = {"beta": 0.1, "use_bias_correction_kl": False}
KL_CORRECTED = {"beta": 0.1, "use_bias_correction_kl": True}
ON_POLICY = {"num_iterations": 1, "inputs": "on_policy"}
MASKED = {"mask_truncated_completions": True, "inputs": "truncated"}

OBJECTIVES = {
    "grpo": {"loss_type": "grpo"} | CLIP,
    "bnpo": {"loss_type": "bnpo"} | CLIP,
    "dr_grpo": {"loss_type": "dr_grpo"} | CLIP,
    "dapo": {"loss_type": "dapo"} | CLIP,
    "grpo_sequence": {"loss_type": "grpo"} | NARROW,
    "grpo_sequence_wide": {"loss_type": "grpo"} | WIDE,
    "dapo_sequence": {"loss_type": "dapo"} | NARROW,
    "dapo_sequence_wide": {"loss_type": "dapo"} | WIDE,
    "cispo_high_5": {"loss_type": "cispo", "epsilon_high": 5.0},
    "cispo_high_1_28": {"loss_type": "cispo", "epsilon_high": 1.28},
    "cispo_sequence_wide": {"loss_type": "cispo", "epsilon_high": 1.2} | SEQUENCE,
    "sapo": {"loss_type": "sapo"},
    "sapo_sequence": {"loss_type": "sapo"} | SEQUENCE,
    "vespo": {"loss_type": "vespo"},
    "luspo": {"loss_type": "luspo"} | SEQUENCE | {"epsilon": 2e-3, "epsilon_high": 2.5e-3},
    "luspo_narrow": {"loss_type": "luspo"} | NARROW,
    "luspo_wide": {"loss_type": "luspo"} | WIDE,
    "luspo_token": {"loss_type": "luspo"} | CLIP,
    "gmpo": {"loss_type": "gmpo", "epsilon": 0.4},
}


def list_cases():
    """Pairs of name and configuration; "inputs" names the variant of the inputs."""
    for name, objective in OBJECTIVES.items():
        yield name, objective
        yield f"{name}_kl", objective | KL
        yield f"{name}_kl_truncated", objective | KL | MASKED
        yield f"{name}_kl_on_policy", objective | KL | ON_POLICY
        if name != "gmpo":  # GMPOTrainer has no correction and takes one advantage per completion
            yield f"{name}_kl_corrected", objective | KL_CORRECTED
            yield f"{name}_kl_corrected_on_policy", objective | KL_CORRECTED | ON_POLICY
            yield f"{name}_per_token_advantages", objective | {"inputs": "per_token_advantages"}

    yield "grpo_delta_1_5", OBJECTIVES["grpo"] | {"delta": 1.5}
    yield "dapo_delta_4", OBJECTIVES["dapo"] | {"delta": 4.0}
    for name in "grpo", "dapo":
        objective = OBJECTIVES[name]
        yield f"{name}_entropy_bonus", objective | {"entropy_coef": 0.01}
        yield f"{name}_entropy_bonus_top_0_5", objective | {"entropy_coef": 0.01, "top_entropy_quantile": 0.5}
        yield f"{name}_entropy_bonus_truncated", objective | {"entropy_coef": 0.01} | MASKED
        yield f"{name}_kl_top_entropy_0_2", objective | KL | {"top_entropy_quantile": 0.2}
        yield f"{name}_kl_top_entropy_0_5", objective | KL | {"top_entropy_quantile": 0.5}
    yield "gmpo_kl_top_entropy_0_5", OBJECTIVES["gmpo"] | KL | {"top_entropy_quantile": 0.5}

    # The drift is measured from the old policy, or from the sampler where its log-probs are known.
    off_policy_mask = OBJECTIVES["grpo"] | KL | {"off_policy_mask_threshold": 0.1}
    yield "grpo_kl_off_policy_mask", off_policy_mask
    sampler = {"use_vllm": True, "vllm_importance_sampling_correction": False}
    yield "grpo_kl_off_policy_mask_sampler", off_policy_mask | sampler

    rollout = {"use_vllm": True, "vllm_importance_sampling_clip_max": 2.0}
    for mode in "token_truncate", "token_mask", "sequence_truncate", "sequence_mask":
        correction = rollout | {"vllm_importance_sampling_mode": mode}
        for name in "grpo", "dapo":
            objective = OBJECTIVES[name] | correction
            yield f"{name}_rollout_{mode}", objective
            yield f"{name}_rollout_{mode}_min", objective | {"vllm_importance_sampling_clip_min": 0.5}
            yield f"{name}_kl_rollout_{mode}", objective | KL
    for mode in "token_truncate", "token_mask":
        yield f"vespo_rollout_{mode}", OBJECTIVES["vespo"] | rollout | {"vllm_importance_sampling_mode": mode}


ADVANTAGE_CASES = {
    "group": {"scale_rewards": "group"},
    "batch": {"scale_rewards": "batch"},
    "none": {"scale_rewards": "none"},
    "normalize_then_sum": {"multi_objective_aggregation": "normalize_then_sum"},
}

# What a case's entry in `settings` states, defaults of TRL included.
SETTINGS = [
    *["loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta", "beta", "use_bias_correction_kl"],
    *["max_completion_length", "num_iterations", "mask_truncated_completions", "off_policy_mask_threshold"],
    *["top_entropy_quantile", "entropy_coef", "sapo_temperature_pos", "sapo_temperature_neg"],
    *["vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"],
    *["use_vllm", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode"],
    *["vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"],
]

# Running TRL ------------------------------------------------------------------------------------------------------


def save_model(folder):
    """A tiny model and tokenizer for the constructor; no number of theirs reaches a loss."""
    vocabulary = tokenizers.models.WordLevel({"<eos>": EOS, "<pad>": PAD, "word": WORD}, unk_token="word")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(vocabulary), eos_token="<eos>", pad_token="<pad>", unk_token="word"
    ).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=3,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def build_trainer(folder, config, inputs, tensors=None, rewards=None):
    """A trainer whose rollouts, rewards and forward pass return what was drawn."""
    config = dict(config)
    use_vllm = config.pop("use_vllm", False)
    trainer_class, config_class = trl.GRPOTrainer, trl.GRPOConfig
    if config.get("loss_type") == "gmpo":
        trainer_class, config_class = GMPOTrainer, GMPOConfig
        del config["loss_type"]
    reports = {"report_to": "none", "disable_tqdm": True, "output_dir": folder}
    batch = {"per_device_train_batch_size": N, "num_generations": G, "steps_per_generation": 1}
    args = config_class(use_cpu=True, bf16=False, reward_weights=REWARD_WEIGHTS, **reports, **batch, **config)

    def rollout(prompts, trainer):
        last = np.where(np.isin(np.arange(N), TRUNCATED), WORD, EOS)
        return {
            "prompt_ids": [[WORD] for _ in prompts],
            "completion_ids": [[WORD] * (length - 1) + [end] for length, end in zip(LENGTHS, last, strict=True)],
            "logprobs": inputs["sampler_log_probs"].tolist() if use_vllm else None,
        }

    def reward_function(column):
        values = [None if np.isnan(value) else value for value in column]
        return lambda prompts, **_: values

    trainer = trainer_class(
        model=folder,
        reward_funcs=[reward_function(column) for column in rewards or REWARDS["full"]],
        args=args,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["word"] * N}),
        rollout_func=rollout,
    )

    def forward(model, input_ids, attention_mask, logits_to_keep, compute_entropy=False, **_):
        if compute_entropy:
            return tensors["log_probs"], tensors["entropies"], None
        return tensors["ref_log_probs" if model is trainer.ref_model else "old_log_probs"], None, None

    trainer._get_per_token_logps_and_entropies = forward
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # Trainer.train sets it
    # Set late: the constructor would start vLLM. `_last_loaded_step` says that it has the current weights.
    trainer.use_vllm, trainer._last_loaded_step = use_vllm, 0
    return trainer


def score(trainer):
    return trainer._generate_and_score_completions([{"prompt": "word"} for _ in range(N)])


def run_case(folder, config, inputs):
    """Returns arrays of the case and its settings."""
    config = OFF_POLICY | config
    variant = config.pop("inputs", "main")
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    leaves = [tensors[name].requires_grad_() for name in ("log_probs", "entropies")]
    trainer = build_trainer(folder, config, inputs, tensors)
    batch = score(trainer)
    batch["advantages"] = tensors["advantages_per_token" if variant == "per_token_advantages" else "advantages"]
    assert ("old_per_token_logps" in batch) == (variant != "on_policy")
    mask = batch["completion_mask"].double()
    assert torch.equal(mask, tensors["mask_truncated" if variant == "truncated" else "mask"])
    assert batch["num_items_in_batch"] == mask.sum()

    loss = trainer._compute_loss(trainer.model, batch)
    assert loss.dtype == torch.float64
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    arrays = {"loss": loss.detach(), "grad_log_probs": gradients[0], "grad_entropy": gradients[1]}
    if "importance_sampling_ratio" in batch:
        arrays["importance_sampling_ratio"] = batch["importance_sampling_ratio"]
    assert all(value.isfinite().all() for value in arrays.values())

    settings = {name: getattr(trainer.args, name) for name in SETTINGS} | config
    settings |= {"trainer": type(trainer).__name__, "inputs": variant, "epsilon_high": trainer.epsilon_high}
    return {name: value.numpy() for name, value in arrays.items()}, settings


def main():
    torch.set_default_dtype(torch.float64)
    warnings.filterwarnings("ignore")
    logging.getLogger("trl").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    inputs = draw_inputs()
    check_inputs(inputs)
    arrays = {f"inputs/{name}": value for name, value in inputs.items()}
    settings, advantage_settings = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        for name, config in list_cases():
            assert name not in settings, name
            case, settings[name] = run_case(folder, config, inputs)
            arrays |= {f"case/{name}/{key}": value for key, value in case.items()}
        for kind, rewards in REWARDS.items():
            arrays[f"rewards/{kind}"] = np.array(rewards).T
            for name, config in ADVANTAGE_CASES.items():
                trainer = build_trainer(folder, config, inputs, rewards=rewards)
                arrays[f"advantages/{name}_{kind}"] = score(trainer)["advantages"].numpy()
                advantage_settings[f"{name}_{kind}"] = {
                    "rewards": kind,
                    "reward_weights": REWARD_WEIGHTS,
                    "num_generations": G,
                    "scale_rewards": trainer.scale_rewards,
                    "multi_objective_aggregation": trainer.multi_objective_aggregation,
                }

    versions = {"python": sys.version.split()[0]}
    versions |= {module.__name__: module.__version__ for module in (trl, torch, transformers, accelerate, np)}
    documents = {"settings": settings, "advantage_settings": advantage_settings, "versions": versions}
    arrays |= {name: np.array(json.dumps(value)) for name, value in documents.items()}
    np.savez_compressed(FOLDER / "losses.npz", **arrays)
    print(f"{len(settings)} losses, {len(advantage_settings)} advantages")


if __name__ == "__main__":
    main()
