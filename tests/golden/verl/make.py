"""Makes algorithms.npz in this folder: policy losses and advantages as verl 0.9.1's own functions compute them.

    pip install --no-deps verl==0.9.1 && pip install torch tensordict omegaconf hydra-core codetiming ray numpy pandas
    python tests/golden/verl/make.py        # in an environment of its own; CPU, no downloads, seconds

Every value is float64, drawn here and exact in float32. Rows are completions, `row = b * 4 + g`. The functions of
`verl.trainer.ppo.core_algos` are called as they are; gradients are by the log-probs.

README.md beside this file has the layout.
"""

import importlib.metadata
import json
import platform
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo import core_algos

FOLDER = Path(__file__).parent
B, G, T = 3, 4, 6
N = B * G
GROUPS = np.repeat(np.arange(B), G)


class Config(dict):
    """What the functions read of an actor's or an algorithm's configuration: attributes, and `get`."""

    def __getattr__(self, name):
        return self.get(name)


def draw():
    """Arrays of rows, the mask as bool."""
    rng = np.random.default_rng(7)
    mask = np.arange(T) < rng.integers(2, T + 1, N)[:, None]
    mask[0] = True
    mask[5, 1] = False
    old = -0.05 - rng.exponential(1.0, (N, T))
    log_probs = np.minimum(old + 0.5 * rng.normal(size=(N, T)), -0.01)
    probs = rng.dirichlet(np.ones(5), (N, T))
    numbers = {
        "log_probs": log_probs,
        "old_log_probs": old,
        "ref_log_probs": np.minimum(old + 0.4 * rng.normal(size=(N, T)), -0.01),
        "advantages": np.where(rng.random(N) < 0.5, -1, 1) * (0.2 + rng.exponential(1.0, N)),
        "otb_log_probs": np.log(probs[..., 0]),
        "collision": np.sum(probs**2, -1),
        "rewards": rng.integers(0, 5, N) / 4,
    }
    rounded = {name: x.astype(np.float32).astype(np.float64) for name, x in numbers.items()}
    return rounded | {"mask": mask}


# name -> function, its configuration, whether the old policy is the new one
LOSSES = {
    "dppo_tv": ("dppo_tv", {"clip_ratio": 0.1, "clip_ratio_c": 20.0}, False),
    "dppo_tv_uneven": ("dppo_tv", {"clip_ratio_low": 0.05, "clip_ratio_high": 0.2, "clip_ratio_c": 1.2}, False),
    "dppo_kl": ("dppo_kl", {"clip_ratio": 0.02, "clip_ratio_c": 20.0}, False),
    "dppo_kl_uneven": ("dppo_kl", {"clip_ratio_low": 0.01, "clip_ratio_high": 0.05, "clip_ratio_c": 3.0}, False),
    "dro": ("dro", {"policy_loss": {"dro_beta": 0.3}}, False),
    "kl_cov": ("kl_cov", {"policy_loss": {"kl_cov_ratio": 0.1, "ppo_kl_coef": 1.0}}, True),
    "kl_cov_most": ("kl_cov", {"policy_loss": {"kl_cov_ratio": 0.5, "ppo_kl_coef": 0.3}}, True),
    "clip_cov_all": (
        "clip_cov",
        {
            "clip_ratio": 0.2,
            "policy_loss": {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.2, "clip_cov_ub": 2.0},
        },
        True,
    ),
}
MODES = {"token": "token-mean", "completion": "seq-mean-token-mean", "completion_sum": "seq-mean-token-sum"}


def losses(x):
    """Value and gradient of every case in every mode."""
    arrays = {}
    for name, (function, settings, on_policy) in LOSSES.items():
        settings = {k: Config(v) if isinstance(v, dict) else v for k, v in settings.items()}
        config = Config(global_batch_info={}, **settings)
        for mode, theirs in MODES.items():
            log_probs = torch.tensor(x["log_probs"], requires_grad=True)
            old = x["log_probs"] if on_policy else x["old_log_probs"]
            advantages = torch.tensor(np.repeat(x["advantages"][:, None], T, 1))
            loss, _ = core_algos.get_policy_loss_fn(function)(
                old_log_prob=torch.tensor(old),
                log_prob=log_probs,
                advantages=advantages,
                response_mask=torch.tensor(x["mask"], dtype=torch.float64),
                loss_agg_mode=theirs,
                config=config,
            )
            (gradient,) = torch.autograd.grad(loss, log_probs)
            arrays[f"loss/{name}/{mode}/value"] = loss.detach().numpy()
            arrays[f"loss/{name}/{mode}/gradient"] = gradient.numpy()
    return arrays


def advantages(x):
    """Of rewards at the end of each completion."""
    mask = torch.tensor(x["mask"], dtype=torch.float64)
    last = T - 1 - np.argmax(x["mask"][:, ::-1], axis=1)
    scores = np.zeros((N, T))
    scores[np.arange(N), last] = x["rewards"]
    kl = np.where(x["mask"], x["old_log_probs"] - x["ref_log_probs"], 0.0)
    token = {"token_level_rewards": torch.tensor(scores), "response_mask": mask}
    algorithm = OmegaConf.create({"norm_adv_by_std_in_grpo": False, "gamma": 1.0})
    scaled = OmegaConf.create({"norm_adv_by_std_in_grpo": True, "gamma": 0.9})
    otb = {
        "old_log_probs": torch.tensor(x["otb_log_probs"]),
        "sum_pi_squared": torch.tensor(x["collision"]),
        "index": GROUPS,
    }
    results = {
        "opo": core_algos.compute_opo_outcome_advantage(**token, index=GROUPS),
        "best_minus_second": core_algos.compute_grpo_passk_outcome_advantage(**token, index=GROUPS, config=algorithm),
        "best_minus_second_scaled": core_algos.compute_grpo_passk_outcome_advantage(
            **token, index=GROUPS, config=scaled
        ),
        "optimal_token": core_algos.compute_optimal_token_baseline_advantage(**token, **otb),
        "optimal_token_with_tail": core_algos.compute_optimal_token_baseline_advantage(
            **token, **otb, handle_zero_tail=False
        ),
        "reinforce_plus_plus": core_algos.compute_reinforce_plus_plus_outcome_advantage(**token, config=algorithm),
        "reinforce_plus_plus_kl": core_algos.compute_reinforce_plus_plus_outcome_advantage(
            token_level_rewards=torch.tensor(scores - 0.1 * kl), response_mask=mask, config=scaled
        ),
    }
    return {f"advantage/{name}": result[0].numpy() for name, result in results.items()}


if __name__ == "__main__":
    inputs = draw()
    packages = ("verl", "torch", "numpy", "tensordict", "omegaconf")
    versions = {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages}
    np.savez_compressed(
        FOLDER / "algorithms.npz",
        **{f"inputs/{name}": x for name, x in inputs.items()},
        **losses(inputs),
        **advantages(inputs),
        versions=json.dumps(versions),
    )
    print(versions)
