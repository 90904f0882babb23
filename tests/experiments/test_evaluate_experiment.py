"""The evaluation of checkpoints through its command line's settings, on a tiny one that the test makes."""

import dataclasses
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from inference_server import serving

from grpo_jax import data, sampling, testing
from grpo_jax.freezing import bind
from grpo_jax.models import hf, lora
from grpo_jax.run import checkpoint, inputs
from grpo_jax.study.items import pass_rates, summarise
from grpo_jax.updates import init_state

ROOT = pathlib.Path(__file__).parents[2]

REWARDS = """
from grpo_jax.tasks import Splits, Task

def even(prompts, completions, answer, **kwargs):
    assert all(a.isdigit() for a in answer), answer
    return [float(len(c) % 2 == 0) for c in completions]

def vowels(completions, tests=(), **columns):
    for one in tests:
        one.clear()  # what a reward does to its arguments, no other sees, nor the file of rows that are kept
    return [float(sum(c in "aeiou" for c in completion)) for completion in completions]

def best_of_four(completions):
    return [0.0] * len(completions)

best_of_four.group_size = 4

def wants_target(completions, target):
    return [0.0] * len(completions)

def first_letter(completion):
    return completion[:1] or None

def breaks(completion):
    raise LookupError("no answer")

def answer(row, messages):
    from grpo_jax.environments import Turn
    return Turn(f"not {row['answer']}", reward=0.5)

def my_task(seed):
    rows = [{"prompt": f"{seed} {i}?", "answer": str(i)} for i in range(6)]
    return Task("mine", Splits(rows[:1], rows[1:2], rows[2:], rows[5:]), even)
"""


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # where dataclasses looks annotations up
    spec.loader.exec_module(module)
    return module


evaluate = load("evaluate")


def test_chats_of_a_base_model_end_with_the_templates_turn(files, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def seen(*, eos_ids, **settings):
        raise Seen(eos_ids)

    monkeypatch.chdir(files)
    monkeypatch.setattr(evaluate.hf, "load_pretrained", lambda *arguments, **settings: (None, None))
    monkeypatch.setattr(evaluate.sampling, "greedy", seen)
    tokenizer = hf.load_tokenizer(files / "model")
    tokenizer.eos_token = "<|endoftext|>"
    monkeypatch.setattr(evaluate.hf, "load_tokenizer", lambda *arguments, **settings: tokenizer)
    (files / "model" / "generation_config.json").rename(tmp_path / "generation_config.json")
    text, turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    try:
        for chat, ends in ((False, (text,)), (True, (text, turn))):
            with pytest.raises(Seen) as raised:
                evaluate.run(
                    evaluate.Config(
                        model=str(files / "model"), data="rows.jsonl", prompt_column="question", answer_after="####",
                        reward=("verifiers:even",), chat=chat, output=tmp_path,
                    )
                )  # fmt: skip
            assert raised.value.args[0] == ends
    finally:
        (tmp_path / "generation_config.json").rename(files / "model" / "generation_config.json")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    testing.tiny_checkpoint(folder / "model")
    rows = [{"question": f"What is {i} plus 1?", "answer": f"{i} + 1\n#### {i + 1}", "tests": [i]} for i in range(7)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "verifiers.py").write_text(REWARDS)
    return folder


@pytest.fixture(autouse=True)
def _working_folder(files, monkeypatch):
    monkeypatch.chdir(files)


def settings(files, output, **changes):
    return evaluate.Config(**{
        "model": str(files / "model"),
        "output": output,
        "data": str(files / "rows.jsonl"),
        "reward": ("verifiers:even", "verifiers:vowels"),
        "prompt_column": "question",
        "answer_after": "####",
        "compute_dtype": "float32",
        "group_size": 4,
        "k": (1, 4),
        "max_tokens": 6,
        "bucket": 32,
        "batch_size": 4,
        "extract": "verifiers:first_letter",
    } | changes)  # fmt: skip


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    config = settings(files, tmp_path_factory.mktemp("finished") / "out", chat=True, filtered=files / "kept.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(files)
        return config, evaluate.run(config)


def test_summaries_and_items_are_written_and_go_together(finished):
    config, summaries = finished
    written = json.loads((config.output / "summary.json").read_text())
    assert written["config"]["model"] == config.model
    assert {name: written[name] for name in ("greedy", "samples")} == summaries
    for name, size, k in (("greedy", 1, ()), ("samples", 4, (1, 4))):
        items = data.read_jsonl(config.output / f"{name}.jsonl")
        assert len(items) == 7
        assert all(len(item["completions"]) == size for item in items)
        assert summarise(items, k=k) == summaries[name]
        for item in items:
            assert item["rewards"]["even"] == [float(len(text) % 2 == 0) for text in item["completions"]]
    assert {"accuracy", "accuracy_low", "pass@1", "pass@4", "pass@4_high", "majority@4", "reward/vowels"} <= set(
        summaries["samples"]
    )
    assert 0 < summaries["samples"]["accuracy"] < 1  # or the test shows little
    assert "pass@1" not in summaries["greedy"]


def test_slots_are_those_of_the_samples(files, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def seen(policy, sampler, *arguments, **given):
        if not sampler.greedy:
            raise Seen(sampler.slots)

    monkeypatch.setattr(evaluate.hf, "load_pretrained", lambda *arguments, **given: (None, None))
    monkeypatch.setattr(evaluate.evaluation, "make_evaluate", seen)
    for slots in (None, 3):
        with pytest.raises(Seen) as raised:
            evaluate.run(settings(files, tmp_path, slots=slots))
        assert raised.value.args == (slots,)


def test_completions_end_at_stop_strings(files, finished, monkeypatch):
    config, without = finished
    monkeypatch.chdir(files)
    letters = tuple("abcdefghijklmnopqrstuvwxyz")
    stopped = evaluate.run(dataclasses.replace(config, output=config.output / "stopped", filtered=None, stop=letters))
    for name in ("greedy", "samples"):
        assert stopped[name]["truncated"] < without[name]["truncated"]
        assert stopped[name]["length"] < without[name]["length"]


def test_conversations_are_evaluated_and_show_who_wrote_what(files, tmp_path, capsys):
    evaluate.run(settings(
        files, tmp_path, reward=("grpo_jax.rewards:environment",), threshold=0.75, rows=2, max_tokens=80, chat=True,
        environment="verifiers:answer", max_turns=2, stop=tuple("abcdefghijklmnopqrstuvwxyz"), extract=None,
        greedy=False,
    ))  # fmt: skip
    answered = 0
    for item in map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines()):
        for turns, completion, right in zip(item["turns"], item["completions"], item["right"], strict=True):
            mine = [turn["text"] for turn in turns if turn["by"] == "policy"]
            assert right == (len(mine) == 2)
            assert len(turns) == 2 * len(mine) - 1
            if len(turns) > 1:
                answered += 1
                assert f"user\nnot {item['row'] + 1}<|im_end|>" in turns[1]["text"]
                assert completion == re.sub(r"<\|(im_end|endoftext)\|>", "", "\n".join(mine))
    assert answered > 0
    assert "environment>" in capsys.readouterr().out


def test_a_server_writes_what_the_model_does(files, finished, tmp_path):
    config, summaries = finished
    policy, _ = hf.load_pretrained(files / "model", compute_dtype=jnp.float32)
    with serving(policy, group_size=1, max_tokens=6, width=96) as server:
        found = evaluate.run(dataclasses.replace(
            config, output=tmp_path, filtered=None, group_size=0, server=server.url, server_model="tiny"
        ))  # fmt: skip
        routes = [path for path, _ in server.asked]
        weights = ["/collective_rpc", "/reset_prefix_cache", "/update_weight_version"]
        assert routes == [*weights, *["/v1/completions"] * 7]
    assert found == {"greedy": pytest.approx(summaries["greedy"])}


def test_the_greedy_completions_are_those_of_the_checkpoint_after_its_chat_template(finished):
    config, _ = finished
    policy, params = hf.load_pretrained(config.model)
    tokenizer = hf.load_tokenizer(config.model)
    for item in data.read_jsonl(config.output / "greedy.jsonl"):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": item["prompt"]}], add_generation_prompt=True, return_dict=False
        )
        sampler = sampling.greedy(max_tokens=6, eos_ids=hf.eos_ids(config.model, tokenizer))
        rollout = sampler(policy, params, data.make_prompts([ids]), jax.random.key(0))
        tokens = np.asarray(rollout.tokens)[0, 0, : int(rollout.lengths[0, 0])]
        assert item["completions"] == [tokenizer.decode(tokens, skip_special_tokens=True)]


def test_the_rows_that_are_solved_sometimes_are_kept_as_they_were_read(finished, files):
    config, _ = finished
    rates = pass_rates(data.read_jsonl(config.output / "samples.jsonl"))
    rows = data.read_jsonl(files / "rows.jsonl")
    kept = data.read_jsonl(files / "kept.jsonl")
    assert kept == [row for row, rate in zip(rows, rates, strict=True) if 0 < rate < 1]
    assert len(kept) > 0


def test_an_evaluation_repeats_itself(finished, files, tmp_path):
    config, summaries = finished
    again = dataclasses.replace(config, output=tmp_path, filtered=None)
    assert evaluate.run(again) == summaries
    for name in ("greedy.jsonl", "samples.jsonl"):
        assert (tmp_path / name).read_bytes() == (config.output / name).read_bytes()


def test_a_task_brings_its_rows_and_its_verifier(files, tmp_path, capsys):
    changes = {"data": None, "answer_after": None, "prompt_column": "prompt", "greedy": False, "group_size": 2}
    changes |= {"task": "verifiers:my_task", "k": (2,), "reward": ("verifiers:vowels",)}
    summaries = evaluate.run(settings(files, tmp_path, task_seed=3, **changes))
    assert list(summaries) == ["samples"]
    items = data.read_jsonl(tmp_path / "samples.jsonl")
    assert [item["prompt"] for item in items] == [f"3 {i}?" for i in range(2, 6)]
    assert list(items[0]["rewards"]) == ["even", "vowels"]
    shown = capsys.readouterr().out
    for words in ("3 2?", "even", "vowels", "pass@2", "samples, 4 prompts"):
        assert words in shown, words
    evaluate.run(settings(files, tmp_path, split="ood", rows=1, **changes))
    assert [item["prompt"] for item in data.read_jsonl(tmp_path / "samples.jsonl")] == ["0 5?"]
    with pytest.raises(ValueError, match=r"my_task has the splits train, validation, test, ood, not 'dev'"):
        evaluate.run(settings(files, tmp_path, split="dev", **changes))


@pytest.mark.parametrize("name", ["countdown", "multiplication"])
def test_a_task_of_the_library_is_taken_by_its_name(files, tmp_path, name):
    changes = {"data": None, "reward": (), "answer_after": None, "prompt_column": "prompt", "group_size": 0}
    config = settings(files, tmp_path, task=name, rows=2, model=str(files / "model"), **changes)
    rows, problems, functions = evaluate.read(config)
    assert rows == problems
    assert len(rows) == 2
    assert functions == [evaluate.resolve(f"grpo_jax.tasks.{name}:correct")]


def test_the_command_line_evaluates_and_shows_the_samples(files, tmp_path):
    command = [
        sys.executable, str(ROOT / "experiments" / "evaluate.py"), "--model", "model", "--data", "rows.jsonl",
        "--prompt-column", "question", "--answer-after", "####", "--reward", "verifiers:even", "--rows", "3",
        "--k", "1", "2", "--output", str(tmp_path / "out"), "--no-greedy",
        # The program of the runs above, which is compiled already.
        "--chat", "--group-size", "4", "--max-tokens", "6", "--bucket", "32", "--batch-size", "4",
        "--compute-dtype", "float32",
    ]  # fmt: skip
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "greedy.jsonl").write_text("of an earlier evaluation")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pass@2" in done.stdout
    assert "What is 0 plus 1?" in done.stdout
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["samples.jsonl", "summary.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "either --task or --data"),
        ({"task": "countdown"}, "either --task or --data"),
        ({"reward": ()}, "--data needs a --reward"),
        ({"greedy": False, "group_size": 0}, "nothing to do"),
        ({"k": (1, 8)}, "--k is from 1 to --group-size 4, got 8"),
        ({"group_size": 1, "k": (1,), "filtered": pathlib.Path("x")}, "--group-size is at least 2"),
        ({"filtered": pathlib.Path(".")}, "--filtered . is a folder"),
        ({"output": pathlib.Path("rows.jsonl")}, "--output rows.jsonl is a file"),
        ({"filtered": pathlib.Path("rows.jsonl/kept")}, "--filtered rows.jsonl/kept cannot be written"),
        ({"output": pathlib.Path("/dev/null/out")}, "--output /dev/null/out cannot be written"),
        ({"level": 2.0}, "--level is between 0 and 1, got 2.0"),
        ({"low": 0.5, "high": 0.5}, "--low is below --high, got 0.5 and 0.5"),
        ({"rows": -1}, "--rows is at least 1, got -1"),
        ({"threshold": float("nan")}, "--threshold is a number, got nan"),
        ({"reward": ("verifiers:absent",)}, "verifiers has no function 'absent'"),
        ({"reward": ("even",)}, r"named module:function, or .*got 'even'"),
        ({"reward": ("verifiers:even", "verifiers:even")}, "one name each, got even, even"),
        ({"reward": ("verifiers:best_of_four",)}, "groups of 4 completions and the evaluation draws 1 .* --no-greedy"),
        ({"reward": ("verifiers:wants_target",)}, "wants_target requires target, and the data has the columns"),
        ({"prompt_column": "text"}, r"rows.jsonl:1: no column text"),
        ({"max_prompt_tokens": 3}, r":1: the prompt has \d+ tokens and the limit is 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_go_together_is_refused_before_the_model_is_loaded(
    files, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(hf, "load_pretrained", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=message):
        evaluate.run(settings(files, **{"output": tmp_path / "out"} | changes))
    assert not (tmp_path / "out").exists()


def test_rows_and_tokens_are_looked_at_as_in_training(files, tmp_path, monkeypatch):
    """Columns under other names, and the configuration of the revision that is evaluated."""
    rows, problems, _ = evaluate.read(settings(files, tmp_path, rename={"answer": "target"}, rows=2))
    assert [row["target"] for row in problems] == [row["answer"] for row in rows]
    assert [row["answer"] for row in problems] == ["1", "2"]
    model, tokenizer = str(files / "model"), hf.load_tokenizer(files / "model")
    asked = []
    read = transformers.AutoConfig.from_pretrained
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *a, **k: asked.append(k) or read(*a, **k))
    inputs.check_tokens(model, tokenizer, [[0]], revision="main")
    assert [settings["revision"] for settings in asked] == ["main"]


def test_a_checkpoint_is_evaluated_as_the_export_of_its_step_is(files, tmp_path, capsys):
    _, params = hf.load_pretrained(files / "model")
    state = init_state(params, optax.sgd(1e-3), jax.random.key(0))
    sharper = state._replace(params=jax.tree.map(lambda x: 3 * x, params))
    states = {step: at._replace(step=jnp.int32(step)) for step, at in ((2, state), (4, sharper))}
    with checkpoint.manager(tmp_path / "checkpoints") as checkpoints:
        for state in states.values():
            checkpoint.save(checkpoints, state, {"config": {"model": str(files / "model")}})
    policy, tokenizer = hf.load_pretrained(files / "model")[0], hf.load_tokenizer(files / "model")
    found = {}
    for step, state in states.items():
        hf.save_pretrained(policy, state.params, tmp_path / f"step_{step}", tokenizer=tokenizer)
        for name in (f"step_{step}", f"checkpoints/{step}"):
            found[name] = evaluate.run(settings(files, tmp_path / "out", model=str(tmp_path / name)))
        assert found[f"step_{step}"] == found[f"checkpoints/{step}"]
    assert found["step_2"] != found["step_4"]
    capsys.readouterr()
    assert evaluate.run(settings(files, tmp_path / "out", model=str(tmp_path / "checkpoints"))) == found["step_4"]
    assert f"the parameters of step 4 in {tmp_path / 'checkpoints'}" in capsys.readouterr().out


def test_a_checkpoint_that_does_not_say_its_model_is_refused(files, tmp_path):
    state = init_state({"w": jnp.ones(2)}, optax.sgd(1e-3), jax.random.key(0))
    with checkpoint.manager(tmp_path / "checkpoints") as checkpoints:
        checkpoint.save(checkpoints, state, {"config": {}})
    with pytest.raises(ValueError, match="do not say which model they began from"):
        evaluate.run(settings(files, tmp_path / "out", model=str(tmp_path / "checkpoints" / "0")))


def test_the_folder_of_a_run_is_answered_with_its_exports(files, tmp_path):
    for name in ("best", "step_20"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "config.json").write_text("{}")
    (tmp_path / "run" / "checkpoints" / "20" / "meta").mkdir(parents=True)
    with pytest.raises(ValueError, match="one of the models in it: best, step_20, checkpoints"):
        evaluate.run(settings(files, tmp_path / "out", model=str(tmp_path / "run")))


def test_prompts_that_are_too_long_can_be_dropped_with_their_rows(files, tmp_path, capsys):
    rows = [{"question": "why " * (i % 2 * 30 + 1), "answer": str(i)} for i in range(4)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data": str(tmp_path / "long.jsonl"), "answer_after": None, "group_size": 0, "too_long": "drop"}
    evaluate.run(settings(files, tmp_path / "out", max_prompt_tokens=20, **changes))
    assert "dropped 2 of 4 prompts" in capsys.readouterr().out
    items = data.read_jsonl(tmp_path / "out" / "greedy.jsonl")
    assert [item["prompt"] for item in items] == ["why ", "why "]


def test_adapters_are_evaluated_over_the_base_that_they_were_trained_on(files, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    ends = []

    def seen(policy, sampler, *arguments, **given):
        ends.append(sampler.eos_ids)

        def evaluated(params, **settings):
            raise Seen(params)

        return evaluated

    policy, params = hf.load_pretrained(files / "model")
    adapters, base = lora.adapt(policy, params, rank=2, key=jax.random.key(0))
    adapters = jax.tree.map(lambda x: x + 0.5, adapters)
    about = {"base_model": str(files / "model"), "eos_ids": [7]}
    hf.save_adapters(policy, adapters, base, tmp_path / "run" / "step_3", **about)
    monkeypatch.setattr(evaluate.evaluation, "make_evaluate", seen)
    of_adapters = {"model": str(tmp_path / "run" / "step_3")}
    with pytest.raises(Seen) as raised:
        evaluate.run(settings(files, tmp_path / "out", **of_adapters))
    chex.assert_trees_all_equal(raised.value.args[0], bind(adapters, base))
    assert 7 in ends[0]  # which the adapters were taught to end with, and the base was not
    with pytest.raises(ValueError, match="was trained on another base"):
        evaluate.run(settings(files, tmp_path / "out", quantize="int8", **of_adapters))
    with pytest.raises(ValueError, match="--quantize int8 is of the base of adapters"):
        evaluate.run(settings(files, tmp_path / "out", quantize="int8"))
    with pytest.raises(ValueError, match="the models in it: step_3"):
        evaluate.run(settings(files, tmp_path / "out", model=str(tmp_path / "run")))
    (tmp_path / "run" / "step_3" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"adapter_config.json names no base model"):
        evaluate.run(settings(files, tmp_path / "out", **of_adapters))


def test_what_was_sampled_is_written_before_answers_are_looked_for_in_it(files, tmp_path, monkeypatch):
    item = {"row": 0, "prompt": "p", "completions": ["a"] * 8, "lengths": [1] * 8, "truncated": [False] * 8}
    item |= {"rewards": {"even": [1.0] * 8}, "right": [True] * 8, "pass_rate": 1.0}
    monkeypatch.setattr(evaluate.evaluation, "make_evaluate", lambda *given, **others: lambda params, seed: [item])
    with pytest.raises(LookupError, match="no answer"):
        evaluate.run(settings(files, tmp_path, extract="verifiers:breaks", greedy=False))
    assert data.read_jsonl(tmp_path / "samples.jsonl") == [item]


def test_completions_of_a_checkpoint_end_with_what_it_was_taught_to_end_them_with(files, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def seen(*, eos_ids, **settings):
        raise Seen(eos_ids)

    state = init_state({"w": jnp.zeros(2)}, optax.sgd(1e-3), jax.random.key(0))
    with checkpoint.manager(tmp_path / "checkpoints") as checkpoints:
        checkpoint.save(checkpoints, state, {"config": {"model": str(files / "model"), "eos": "a"}})
    monkeypatch.setattr(evaluate.hf, "load_pretrained", lambda *arguments, **settings: (None, None))
    monkeypatch.setattr(evaluate.checkpoint, "restore_params", lambda *arguments, **settings: None)
    monkeypatch.setattr(evaluate.sampling, "greedy", seen)
    with pytest.raises(Seen) as raised:
        evaluate.run(settings(files, tmp_path / "out", model=str(tmp_path / "checkpoints")))
    assert hf.load_tokenizer(files / "model").convert_tokens_to_ids("a") in raised.value.args[0]


def test_a_model_may_be_divided_over_a_mesh(files, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def load_pretrained(*arguments, mesh, **given):
        raise Seen(mesh)

    monkeypatch.setattr(evaluate.hf, "load_pretrained", load_pretrained)
    with pytest.raises(Seen) as raised:
        evaluate.run(settings(files, tmp_path, mesh="fsdp=1"))
    assert raised.value.args[0].size == 1
    with pytest.raises(Seen) as raised:
        evaluate.run(settings(files, tmp_path))
    assert raised.value.args == (None,)
    with pytest.raises(ValueError, match="fsdp=3, tensor=1 makes 3 devices and there are"):
        evaluate.run(settings(files, tmp_path, mesh="fsdp=3"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(files / "model")}))
    with pytest.raises(ValueError, match="--mesh fsdp=1 is of a whole model"):
        evaluate.run(settings(files, tmp_path / "out", mesh="fsdp=1", model=str(tmp_path)))


def test_checkpoints_of_adapters_are_refused_since_they_have_no_base(files, tmp_path):
    state = init_state({"w": jnp.zeros(2)}, optax.sgd(1e-3), jax.random.key(0))
    with checkpoint.manager(tmp_path / "checkpoints") as checkpoints:
        checkpoint.save(checkpoints, state, {"config": {"model": str(files / "model"), "lora_rank": 8}})
    with pytest.raises(ValueError, match="are of adapters, without their base; evaluate an export"):
        evaluate.run(settings(files, tmp_path / "out", model=str(tmp_path / "checkpoints")))
