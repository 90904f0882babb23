"""A task as a run uses it: prompts to train on, rewards, evaluations of its splits, results.

```python
@dataclasses.dataclass(frozen=True)
class Config(TaskSettings):
    model: str

used = config.begin(task, config.model, run_dir, max_tokens=1024)
experience = step.collect(loop.state, used.batch(seed, n, 32))
rewards, reward_mask = used.reward(experience.rollout)
...
loop.log(metrics | used.logged.take())
```
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

from grpo_jax import data, rewards, sampling
from grpo_jax.models import hf
from grpo_jax.policies import Policy
from grpo_jax.run import digests, inputs, metrics
from grpo_jax.run.precision import ComputeDtype
from grpo_jax.study import items
from grpo_jax.study.evaluation import make_evaluate
from grpo_jax.tasks import Task
from grpo_jax.types import Params, Prompts


class TaskRun:
    """The prompts, rewards and evaluations of a task under one model's tokenizer.

    Attributes:
      names: of the reward functions, in their order.
      reward: `rollout -> (rewards, reward_mask)`, on the host, of the training split.
      logged: the metrics of the reward functions.
      eos_ids: tokens that end a completion.
    """

    def __init__(
        self,
        task: Task,
        functions: Sequence[rewards.RewardFunction],
        model: str,
        run_dir: pathlib.Path,
        *,
        max_tokens: int,
        bucket: int = 64,
    ) -> None:
        self._task, self._functions, self._model, self._run_dir = task, functions, model, run_dir
        self._max_tokens, self._bucket = max_tokens, bucket
        self._tokenizer = hf.load_tokenizer(model)
        chats = data.has_chats([row for split in task.splits for row in split])
        self.eos_ids = hf.eos_ids(model, self._tokenizer, chat=chats)
        self.names = tuple(map(rewards.name_of, functions))
        self.logged = metrics.Logged()
        self._prompts = data.encode_rows(self._tokenizer, task.splits.train)
        inputs.check_tokens(
            model, self._tokenizer, self._prompts.prompts, max_tokens=max_tokens, rows=self._prompts.rows
        )
        self.reward = rewards.host(
            functions, task.splits.train, self._tokenizer, eos_ids=self.eos_ids, log_metric=self.logged
        )

    def digests(self, params: Params) -> dict[str, str]:
        """Of the rows of all splits, the tokenizer and the weights that the run begins with, for `run.loop`."""
        held_out = [row for split in self._task.splits[1:] for row in split]
        return digests.of_run(
            self._tokenizer, params, prompts=self._prompts.prompts, rows=self._prompts.rows, held_out_rows=held_out,
            eos_ids=self.eos_ids, code=self._functions,
        )  # fmt: skip

    def batch(self, seed: int, step: int, size: int) -> Prompts:
        """The prompts of a step."""
        return self._prompts.batch(seed, step, size, multiple=self._bucket)

    def evaluate(
        self, policy: Policy, params: Params, split: str, *, group_size: int | None = None, k: Sequence[int] = ()
    ) -> dict[str, float]:
        """Evaluates on a split, as `split/name`; its completions go to `split.jsonl` in the run's folder.

        Args:
          policy: the network.
          params: its parameters.
          split: of the task.
          group_size: completions sampled per prompt; None takes the likeliest one.
          k: of pass@k, each at most `group_size`.
        """
        sampler = sampling.greedy(max_tokens=self._max_tokens, eos_ids=self.eos_ids)
        if group_size is not None:
            sampler = sampling.sampler(group_size=group_size, max_tokens=self._max_tokens, eos_ids=self.eos_ids)
        rows = getattr(self._task.splits, split)
        scored = make_evaluate(policy, sampler, self._tokenizer, rows, self._functions)(params)
        summary = items.summarise(scored, k=k)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        items.write_items(self._run_dir / f"{split}.jsonl", scored)
        return {f"{split}/{name}": value for name, value in summary.items()}

    def finish(
        self, policy: Policy, params: Params, samples: int, *, save: Callable[..., None] | None = None
    ) -> dict[str, float]:
        """The results: greedy on the test split, and pass@k on it and on the out-of-distribution split.

        They are printed and written to `results.json`, and the model is exported to `model`.

        Args:
          policy: the network.
          params: its parameters, adapters and base together.
          samples: completions of a prompt, beside the greedy one.
          save: writes the model, `save(folder, tokenizer=, eos_ids=)`; `hf.save_pretrained` of the params if not given.
        """
        results = {f"greedy/{k}": v for k, v in self.evaluate(policy, params, "test").items()}
        for split in ("test", "ood") if self._task.splits.ood else ("test",):
            results |= self.evaluate(policy, params, split, group_size=samples, k=(1, samples))
        write_results(self._run_dir / "results.json", results)
        folder = self._run_dir / "model"
        save = functools.partial(hf.save_pretrained, policy, params) if save is None else save
        save(folder, tokenizer=self._tokenizer, eos_ids=self.eos_ids)
        print(f"model: {folder}")
        return results


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """The settings that runs on tasks share: a right answer is rewarded by 1, and its format beside it."""

    seed: int = 0
    format_weight: float = 0.1
    compute_dtype: ComputeDtype = "auto"  # float32 on CPUs, else bfloat16
    smoke: bool = False  # a tiny model and a few steps of everything

    @property
    def weights(self) -> tuple[float, float]:
        """Of the two rewards, the verifier's and that of the format."""
        return 1.0, self.format_weight

    def begin(self, task: Task, model: str, run_dir: pathlib.Path, *, max_tokens: int) -> TaskRun:
        """The task under a model's tokenizer, rewarded by its verifier and for the format."""
        return TaskRun(task, [task.verifier, rewards.strict_format()], model, run_dir, max_tokens=max_tokens)


def write_results(path: pathlib.Path, results: Mapping[str, float]) -> None:
    """Writes results as JSON and prints a line each."""
    path.write_text(json.dumps(dict(results), indent=2))
    for name, value in results.items():
        print(f"  {name:32s}{value:8.3f}")
