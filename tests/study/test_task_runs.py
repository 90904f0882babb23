"""A task as a run uses it."""

from grpo_jax import testing
from grpo_jax.study.task_runs import TaskRun
from grpo_jax.tasks import Splits, Task


def right(completions, answer, **columns):
    return [float(completion == gold) for completion, gold in zip(completions, answer, strict=True)]


def test_other_rows_to_evaluate_on_are_another_run(tmp_path):
    model = str(testing.tiny_checkpoint(tmp_path / "model"))
    rows = [{"prompt": f"{i}?", "answer": str(i)} for i in range(4)]

    def digests_of(splits):
        return TaskRun(Task("mine", splits, right), [right], model, tmp_path, max_tokens=4).digests({})

    one = digests_of(Splits(rows[:1], rows[1:2], rows[2:3], []))
    assert one == digests_of(Splits(rows[:1], rows[1:2], rows[2:3], []))
    other = digests_of(Splits(rows[:1], rows[1:2], rows[3:], []))
    assert {name for name in one if one[name] != other[name]} == {
        "the answers and other columns of the data to evaluate on"
    }
