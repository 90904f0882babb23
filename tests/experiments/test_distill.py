"""experiments/distill.py on two tiny Hugging Face models that the test makes."""

import dataclasses
import importlib.util
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from grpo_jax import testing
from grpo_jax.models import hf
from grpo_jax.run import metrics

ROOT = pathlib.Path(__file__).parents[2]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # where dataclasses looks annotations up
    spec.loader.exec_module(module)
    return module


distill = load("distill")


def test_given_completions_of_chats_end_as_those_of_supervised_learning(tmp_path):
    testing.tiny_checkpoint(tmp_path / "model")
    tokenizer = hf.load_tokenizer(tmp_path / "model")
    tokenizer.eos_token = "<|endoftext|>"
    text, turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    row = {"prompt": [{"role": "user", "content": "a"}], "text": "a", "completion": "b"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    config = distill.Config(
        model=str(tmp_path / "model"), data=tmp_path / "rows.jsonl", completion_column="completion"
    )  # fmt: skip
    _, ((*_, end),), eos_ids = distill.read(config, tokenizer)
    assert end == turn
    assert {text, turn} <= {*eos_ids}
    _, ((*_, end),), eos_ids = distill.read(dataclasses.replace(config, prompt_column="text"), tokenizer)
    assert end == text
    assert distill.read(dataclasses.replace(config, completion_column=None), tokenizer)[1] is None


@pytest.mark.slow
def test_the_smoke_mode_moves_the_model_towards_its_teacher_and_exports_it(tmp_path):
    config = distill.smoke(distill.Config(run_dir=tmp_path))
    params = distill.train(config)
    lines = metrics.read(tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[-1]["divergence"] < lines[0]["divergence"]
    assert "reverse_kl" not in lines[0]  # for which the teacher would be computed once more
    _, exported = hf.load_pretrained(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, exported, params)
    testing.tiny_checkpoint(tmp_path / "tiny" / "teacher", seed=2)
    with pytest.raises(ValueError, match="not what the run began with: the weights of the teacher"):
        distill.train(config)


def test_a_change_of_a_divergences_code_is_told_when_a_run_goes_on(tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def seen(*arguments, code, **settings):
        raise Seen([module.__name__ for module in code])

    (tmp_path / "my_divergence.py").write_text("from grpo_jax.losses import reverse_kl as mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(distill.digests, "of_run", seen)
    config = dataclasses.replace(distill.smoke(distill.Config(run_dir=tmp_path)), divergence="my_divergence:mine")
    with pytest.raises(Seen, match="my_divergence"):
        distill.train(config)


def test_the_prompts_of_a_smoke_run_are_always_those_of_the_script(tmp_path):
    for _ in range(2):
        config = distill.smoke(distill.Config(run_dir=tmp_path))
        assert "3 plus 2 is " in config.data.read_text()
        config.data.write_text("as an earlier script wrote them")


@pytest.mark.slow
def test_the_sampled_form_runs_and_logs_its_own_estimate(tmp_path):
    config = distill.smoke(distill.Config(run_dir=tmp_path))
    distill.train(dataclasses.replace(config, divergence="sampled", early=0.5, minibatches=2, steps=2))
    lines = metrics.read(tmp_path)
    assert all(np.isfinite(line["reverse_kl"]) for line in lines)
    assert "divergence" not in lines[0]


@pytest.mark.slow
def test_by_a_file_of_the_teachers_likeliest_tokens_it_learns_as_by_the_teacher(tmp_path):
    path = tmp_path / "top.safetensors"
    settings = {"top_k": 4, "completion_column": "completion", "run_dir": tmp_path / "run"}
    config = distill.smoke(distill.Config(**settings))
    distill.train(dataclasses.replace(config, write=path))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    by_file = distill.train(dataclasses.replace(config, teacher="", teacher_file=path, run_dir=tmp_path / "file"))
    by_teacher = distill.train(config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), by_file, by_teacher)
    lines = metrics.read(tmp_path / "file")
    assert lines[-1]["divergence"] < lines[0]["divergence"]
    with pytest.raises(ValueError, match="temperature differ"):
        distill.train(dataclasses.replace(config, teacher="", teacher_file=path, temperature=0.5))


@pytest.mark.slow
def test_a_model_that_is_its_own_teacher_learns_what_a_hint_tells_it(tmp_path):
    """Its teacher reads the answer; a share of the steps is on given completions; resumed, the teacher is the same."""
    settings = {"teacher_column": "hint", "completion_column": "completion", "on_policy": 0.5, "max_tokens": 8}
    config = distill.smoke(distill.Config(run_dir=tmp_path / "frozen", **settings))
    assert config.teacher == ""
    distill.train(config)
    frozen = metrics.read(tmp_path / "frozen")
    assert frozen[0]["divergence"] > 1e-3  # between the model with the hint and without
    assert len({line["length_max"] for line in frozen}) > 1  # sampled and given ones
    config = dataclasses.replace(config, renew_every=1, renew_share=0.5, run_dir=tmp_path / "renewed", steps=2)
    distill.train(config)
    resumed = distill.train(dataclasses.replace(config, steps=4))
    whole = distill.train(dataclasses.replace(config, steps=4, run_dir=tmp_path / "whole"))
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    renewed = metrics.read(tmp_path / "whole")
    assert renewed[0]["divergence"] == frozen[0]["divergence"]
    assert renewed[-1]["divergence"] != frozen[-1]["divergence"]


@pytest.mark.slow
def test_the_teacher_may_be_quantised(tmp_path):
    whole, few = (
        distill.smoke(distill.Config(run_dir=tmp_path / str(kind), quantize_teacher=kind)) for kind in (None, "int8")
    )
    distill.train(whole)
    distill.train(few)
    first = [metrics.read(config.run_dir)[0]["divergence"] for config in (whole, few)]
    assert first[0] != first[1]
    np.testing.assert_allclose(*first, rtol=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence": "sampled", "top_k": 4}, "leave out --top-k 4"),
        ({"early": 0.5}, "--early 0.5 is of --divergence sampled, not of reverse_kl"),
        ({"divergence": "no_such"}, "no function 'no_such'"),
        ({"teacher_file": "x"}, "--teacher-file holds the likeliest tokens for given completions: --completion-column"),
        ({"write": "x", "top_k": 4, "completion_column": "completion", "teacher_file": "y"}, "no --teacher-file"),
        ({"divergence": "sampled", "completion_column": "completion"}, "leave out --completion-column"),
        ({"on_policy": 0.5}, "--on-policy 0.5 is a share, from 0 to 1, beside --completion-column"),
        ({"renew_every": 2}, "--renew-every 2 is of a model that is its own teacher"),
        ({"renew_share": 0.5}, "--renew-share 0.5 is of --renew-every"),
        (
            {"write": "x", "top_k": 4, "completion_column": "completion", "teacher_column": "hint"},
            "--write is of a teacher that reads the prompts as they are",
        ),
        ({"write": ".", "top_k": 4, "completion_column": "completion"}, r"--write \. cannot be written: name a file"),
        ({"teacher": "", "teacher_column": "hint", "renew_every": 2, "renew_share": 2.0}, "--renew-share 2.0 is of"),
        ({"teacher": ""}, "give --model, --teacher and --data, or --smoke"),
        ({"prompts_per_step": 3, "micro_batches": 2}, "3 prompts do not divide"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message, tmp_path):
    config = distill.smoke(distill.Config(run_dir=tmp_path))
    with pytest.raises(ValueError, match=message):
        distill.train(dataclasses.replace(config, **changes))


def test_what_would_train_nothing_and_data_that_are_not_there_are_refused_before_a_model_is_read(tmp_path, monkeypatch):
    config = distill.smoke(distill.Config(run_dir=tmp_path))
    monkeypatch.setattr(hf, "load_pretrained", lambda *arguments, **settings: pytest.fail("a model was read"))
    with pytest.raises(ValueError, match=r"the learning rate is above 0, got 0.0"):
        distill.train(dataclasses.replace(config, learning_rate=0.0))
    with pytest.raises(FileNotFoundError, match=r"absent.jsonl"):
        distill.train(dataclasses.replace(config, data=tmp_path / "absent.jsonl"))


def test_a_teacher_with_other_tokens_is_refused(tmp_path):
    config = distill.smoke(distill.Config(run_dir=tmp_path))
    tokenizer = hf.load_tokenizer(config.teacher)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(config.teacher)
    with pytest.raises(ValueError, match="has other tokens than --model"):
        distill.train(config)
