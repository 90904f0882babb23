"""Makes divergences.npz in this folder: TRL 1.16.0's distillation loss with its gradients, in float64 on CPU.

    pip install torch==2.13.0 trl==1.16.0 numpy          # in an environment of its own
    python tests/golden/trl_distillation/make.py         # CPU, no downloads; seconds

`trl.trainer.distillation_trainer._chunked_divergence_loss`, the loss of `DistillationTrainer`, on random hidden states
and heads: the mean over the tokens that count. README.md beside this file has the layout.
"""

import importlib.metadata
import json
import platform
from pathlib import Path

import numpy as np
import torch
from trl.trainer.distillation_trainer import _chunked_divergence_loss

B, T, V, STUDENT, TEACHER = 3, 5, 11, 6, 4
BETAS, TEMPERATURES = (0.0, 0.1, 0.5, 0.9, 1.0), (1.0, 0.7)

if __name__ == "__main__":
    rng = np.random.default_rng(11)
    inputs = {
        "student_hidden": rng.normal(size=(B, T, STUDENT)),
        "student_head": rng.normal(size=(V, STUDENT)),
        "teacher_hidden": rng.normal(size=(B, T, TEACHER)),
        "teacher_head": rng.normal(size=(V, TEACHER)),
    }
    inputs = {name: x.astype(np.float32).astype(np.float64) for name, x in inputs.items()}
    mask = np.arange(T) < rng.integers(2, T + 1, B)[:, None]
    mask[0, 1] = False
    arrays = {}
    for beta in BETAS:
        for temperature in TEMPERATURES:
            x = {name: torch.tensor(value) for name, value in inputs.items()}
            trained = [x["student_hidden"].requires_grad_(), x["student_head"].requires_grad_()]
            loss, entropy, _ = _chunked_divergence_loss(
                x["student_hidden"],
                x["teacher_hidden"],
                x["student_head"],
                x["teacher_head"],
                torch.tensor(mask),
                beta,
                temperature=temperature,
            )
            gradients = torch.autograd.grad(loss, trained)
            case = f"case/{beta}/{temperature}"
            arrays |= {f"{case}/loss": loss.detach().numpy(), f"{case}/entropy": entropy.detach().numpy()}
            arrays |= {f"{case}/by_{name}": g.numpy() for name, g in zip(("hidden", "head"), gradients, strict=True)}
    versions = {"python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in ("trl", "torch", "numpy")}
    np.savez_compressed(
        Path(__file__).parent / "divergences.npz",
        **{f"inputs/{name}": x for name, x in inputs.items()},
        **arrays,
        mask=mask,
        versions=json.dumps(versions),
    )
    print(versions, arrays["case/0.5/1.0/loss"].dtype)
