"""Runs of `experiments/grpo.py` that are killed, for `test_grpo_is_killed.py`; the plans are those of `train_loop.py`.

Model, data and reward functions lie in the working directory.
"""

import importlib.util
import pathlib
import sys

import train_loop

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "grpo.py"
spec = importlib.util.spec_from_file_location("grpo", SCRIPT)
sys.modules["grpo"] = grpo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(grpo)

STEPS = 4


def train(run_dir: pathlib.Path, stop_in: int | None = None) -> None:
    grpo.train(
        grpo.Config(
            model="model", data=pathlib.Path("rows.jsonl"), reward=("my_rewards:brevity",), run_dir=run_dir,
            steps=STEPS, prompts_per_step=2, group_size=2, max_tokens=8, bucket=32, learning_rate=1e-2, warmup_steps=0,
            beta=0.01, iterations=2, eval_rows=2, evaluate_every=1, save_every=1, export_every=2, show_every=1,
            overlap=1, compute_dtype="float32",
        )
    )  # fmt: skip


if __name__ == "__main__":
    train_loop.carry_out(train, sys.argv[1], sys.argv[2:])
