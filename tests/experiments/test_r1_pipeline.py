"""R1's four stages, a few steps of each: what they leave behind, and that a kill changes none of it."""

import dataclasses
import importlib.util
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import testing
from grpo_jax.models import hf
from grpo_jax.run import checkpoint, metrics
from grpo_jax.tasks import modular_sums
from grpo_jax.types import Prompts, Rollout

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "r1_pipeline.py"
STEPS = {
    "0_base": 30, "1_cold_start": 30, "2_reasoning_rl": 4, "3_rejection_sampling": 30, "4_final_rl": 4,
    "5_student": 30, "6_distilled": 30,
}  # fmt: skip


def load_script():
    spec = importlib.util.spec_from_file_location("r1_pipeline", SCRIPT)
    sys.modules["r1_pipeline"] = module = importlib.util.module_from_spec(spec)  # where dataclasses looks
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(SCRIPT.parent))  # as for a script there
pipeline = load_script()
sys.path.remove(str(SCRIPT.parent))
problems = sys.modules["r1_problems"]


def make_config(run_dir, **settings):
    return pipeline.Config(run_dir=run_dir, smoke=True, **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A smoke run that nothing disturbed, and what it returned."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    return run_dir, pipeline.main(make_config(run_dir))


def outcome(run_dir):
    """All that is a result of a run, and not of the hour or the machine."""
    names = [f"{stage}/{name}" for stage in STEPS for name in ("metrics.jsonl", "test.json")]
    names += ["3_rejection_sampling/samples/00000.json", "3_rejection_sampling/samples/00001.json", "results.json"]
    return {name: (run_dir / name).read_bytes() for name in names}


def last_saved(run_dir, stage):
    return run_dir / stage / "checkpoints" / str(STEPS[stage])


# ---------------------------------------------------------------------------- the runs


@pytest.mark.smoke
def test_every_stage_leaves_its_metrics_checkpoints_test_and_model(finished):
    run_dir, results = finished
    assert json.loads((run_dir / "results.json").read_text()) == results
    assert list(results["stages"]) == [stage[2:] for stage in STEPS]
    for stage, steps in STEPS.items():
        assert [line["step"] for line in metrics.read(run_dir / stage)] == list(range(steps))
        assert last_saved(run_dir, stage).is_dir()
        tested = json.loads((run_dir / stage / "test.json").read_text())
        assert tested == results["stages"][stage[2:]]
        assert all(0 <= tested[f"{how}/accuracy"] <= 1 for how in ("greedy", "sampled"))
        _, params = hf.load_pretrained(run_dir / stage / "model")
        saved = checkpoint.restore_params(run_dir / stage / "checkpoints", params)
        jax.tree.map(np.testing.assert_array_equal, params, saved)


@pytest.mark.smoke
def test_the_student_is_smaller_and_learns_what_was_kept_by_imitation(finished):
    run_dir, _ = finished
    sizes = [
        sum(x.size for x in jax.tree.leaves(hf.load_pretrained(run_dir / stage / "model")[1]))
        for stage in ("4_final_rl", "5_student", "6_distilled")
    ]
    assert sizes[1] == sizes[2] < sizes[0] / 2
    losses = [line["loss"] for line in metrics.read(run_dir / "6_distilled")]
    assert losses[-1] < losses[0]
    assert "reward" not in metrics.read(run_dir / "6_distilled")[0]


@pytest.mark.smoke
def test_preference_is_a_reward_of_the_last_stage_alone_and_each_has_its_weight(finished):
    run_dir, _ = finished
    for line in metrics.read(run_dir / "2_reasoning_rl"):
        parts = (line["reward/accuracy"], line["reward/format"], line["reward/language"])
        assert line["reward"] == pytest.approx(np.dot(parts, (1.0, 0.1, 0.2)), abs=1e-6)
        assert "reward/preference" not in line
    for line in metrics.read(run_dir / "4_final_rl"):
        parts = [line[f"reward/{name}"] for name in pipeline.REWARDS]
        assert line["reward"] == pytest.approx(np.dot(parts, (1.0, 0.1, 0.2, 0.2)), abs=1e-6)
    assert any(line["grad_norm"] > 0 for line in metrics.read(run_dir / "4_final_rl"))


@pytest.mark.smoke
def test_what_the_third_stage_learns_is_right_of_one_script_and_different(finished):
    run_dir, results = finished
    batches = [json.loads(path.read_text()) for path in sorted((run_dir / "3_rejection_sampling/samples").iterdir())]
    kept = [item for batch in batches for item in batch["kept"]]
    counts = results["rejection_sampling"]
    assert counts["drawn"] == 96 * 4
    assert counts["drawn"] > counts["right"] >= counts["kept"] == len(kept) > 0
    assert len({item["text"] for item in kept}) == len(kept)
    for item in kept:
        prompt, _, completion = item["text"].partition("=")
        assert completion.partition("<answer>")[2] == f"{sum(map(int, prompt)) % 10}</answer><eos>"
        assert not set(completion) & set(modular_sums.SECOND_SCRIPT)


@pytest.mark.smoke
def test_a_finished_run_that_is_started_again_does_nothing_and_gives_the_same_results(finished, capsys):
    run_dir, results = finished
    before = outcome(run_dir)
    written = {stage: last_saved(run_dir, stage).stat().st_mtime_ns for stage in STEPS}
    assert pipeline.main(make_config(run_dir)) == results
    assert outcome(run_dir) == before
    assert written == {stage: last_saved(run_dir, stage).stat().st_mtime_ns for stage in STEPS}
    printed = capsys.readouterr().out
    assert all(f"resumed at step {steps} of {steps}" in printed for steps in STEPS.values())


@pytest.mark.smoke
def test_a_run_killed_in_the_third_stage_goes_on_there_and_ends_as_one_that_was_not(finished, tmp_path, monkeypatch):
    run_dir, save = tmp_path / "run", checkpoint.save

    def killed(checkpoints, state, meta, **settings):
        if "3_rejection_sampling" in str(checkpoints.directory) and int(state.step) == 30:
            raise KeyboardInterrupt
        save(checkpoints, state, meta, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.main(make_config(run_dir))
    assert not (run_dir / "results.json").exists()
    kept = [last_saved(run_dir, stage) for stage in list(STEPS)[:3]]
    kept += [run_dir / "3_rejection_sampling" / "samples" / "00000.json", run_dir / "2_reasoning_rl" / "model"]
    before = [path.stat().st_mtime_ns for path in kept]

    steps = []
    append = metrics.append
    monkeypatch.setattr(
        metrics, "append", lambda folder, n, *given: (steps.append((folder.name, n)), append(folder, n, *given))
    )
    assert pipeline.main(make_config(run_dir)) == finished[1]
    assert steps == [("3_rejection_sampling", n) for n in range(15, 30)] + [("4_final_rl", n) for n in range(4)] + [
        (stage, n) for stage in ("5_student", "6_distilled") for n in range(30)
    ]
    assert outcome(run_dir) == outcome(finished[0])
    assert before == [path.stat().st_mtime_ns for path in kept]


@pytest.mark.smoke
def test_a_run_is_not_resumed_with_other_settings(finished):
    run_dir, _ = finished
    before = outcome(run_dir)
    with pytest.raises(ValueError, match=r"seed: 0 -> 1"):
        pipeline.main(make_config(run_dir, seed=1))
    assert outcome(run_dir) == before


@pytest.mark.smoke
def test_a_run_is_not_resumed_on_other_texts_under_the_same_settings(finished, monkeypatch):
    run_dir, _ = finished
    before = outcome(run_dir)
    monkeypatch.setattr(problems, "TEACHER", modular_sums.TeacherRates(slip=0.9))
    with pytest.raises(ValueError, match="not what the run began with: the completions to learn"):
        pipeline.main(make_config(run_dir))
    assert outcome(run_dir) == before


# ------------------------------------------------------------------- the small task


def test_no_problem_is_in_two_parts_and_all_answers_are_right():
    problem = problems.small(pipeline.Config())
    prompts = jax.device_get(problem.prompts(np.concatenate([problem.test, problem.train])))
    texts = {tuple(ids) for ids in prompts.tokens.tolist()}
    shown = {tuple(prompt) for prompt, _ in problem.demonstrations}
    pretrained = {tuple(prompt) for prompt, _ in problem.pretraining}
    assert len(texts) == len(problem.test) + len(problem.train)
    assert (len(shown), len(pretrained), len(problem.test)) == (256, 4096, 512)
    assert not texts & shown
    assert not texts & pretrained
    assert not shown & pretrained
    np.testing.assert_array_equal(prompts.tokens[:, :5].sum(axis=1) % 10, prompts.info["answer"][:, 0])


def rollout_of(texts, answer):
    """One prompt with these completions, of words of the small task; `answer` is the sum."""
    words = sorted(problems.WORDS, key=len, reverse=True)

    def encode(text):
        ids = []
        while text:
            word = next(word for word in words if text.startswith(word))
            ids.append(problems.WORDS.index(word))
            text = text[len(word) :]
        return ids

    completions = [encode(text) for text in texts]
    T = 16
    lengths = np.array([[len(ids) for ids in completions]])
    tokens = np.array([[ids + [0] * (T - len(ids)) for ids in completions]])
    info = {"answer": jnp.array([[answer]]), "answer_length": jnp.array([1])}
    prompts = Prompts(jnp.array([[0, 0, 0, 0, answer, modular_sums.EQUALS]]), jnp.array([6]), info)
    ended = tokens[0, np.arange(len(texts)), lengths[0] - 1] == modular_sums.EOS
    return Rollout(
        prompts,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        jnp.arange(T) < lengths[..., None],
        jnp.zeros(tokens.shape),
        jnp.asarray(~ended[None]),
    )


WRITTEN = (
    "<think>00007</think><answer>7</answer><eos>",  # right
    "<think>00000</think><answer>0</answer><eos>",  # wrong
    "<think>0零007</think><answer>7</answer><eos>",  # right, a sixth in the other script
    "<think>00007</think><answer>7</answer><eos>",  # the first one again
    "<think>00007</think><answer>7</answer>",  # right, without an end
    "<think>0007<answer>7</answer><eos>",  # right, of bad format
    "<think></think><answer>7</answer><eos>",  # right
)


@pytest.fixture(scope="module")
def problem():
    return problems.small(pipeline.Config())


def kept_of(problem, **settings):
    config = pipeline.Config(samples=len(WRITTEN), **settings)
    found = pipeline.select(config, problem, rollout_of(WRITTEN, answer=7))
    assert (found["drawn"], found["right"]) == (7, 6)
    assert all(item["text"] == problem.text([*item["prompt"], *item["completion"]]) for item in found["kept"])
    return [WRITTEN.index(item["text"].partition("=")[2]) for item in found["kept"]]


def test_right_completions_are_kept_once_best_first_as_many_as_asked(problem):
    assert kept_of(problem, keep=7) == [0, 6, 5]
    assert kept_of(problem, keep=2) == [0, 6]
    assert kept_of(problem, keep=7, min_language=0.5) == [0, 6, 2, 5]


def test_a_judge_has_the_last_word_and_what_it_does_not_judge_is_not_kept(problem):
    grades = {0: None, 2: 1.0, 3: None, 6: 0.9, 5: 0.5}

    def judge(rollout):
        shape = (*rollout.lengths.shape, 1)
        given = jnp.array([1.0 if grades.get(g, 0.0) is None else grades.get(g, 0.0) for g in range(7)]).reshape(shape)
        return given, jnp.array([grades.get(g, 1.0) is not None for g in range(7)]).reshape(shape)

    judged = problem._replace(judge=judge)
    assert kept_of(judged, keep=7) == [6]
    assert kept_of(judged, keep=7, judge_threshold=0.4) == [6, 5]


def test_language_is_the_share_of_digits_in_the_first_script(problem):
    rewards, mask = problem.reasoning(rollout_of(WRITTEN, answer=7))
    np.testing.assert_allclose(rewards[0, :, 2], [1, 1, 5 / 6, 1, 1, 1, 1], rtol=1e-6)
    assert mask.all()


def test_a_policy_of_which_nothing_can_be_kept_is_an_error_with_its_numbers(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "make_sampler", lambda *_, **__: lambda *_: rollout_of(WRITTEN[1:2], answer=7))
    config = pipeline.Config(samples=1, sampled_prompts=1)
    with pytest.raises(ValueError, match="none of 1 completions passed, of which 0 were right"):
        pipeline.rejection_sample(config, problem, tmp_path, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"judge": "a:b", "data": pathlib.Path("x")}, "data, judge are for a model"),
        ({"max_tokens": 64, "system": "Think."}, "system, max_tokens are for a model"),
        (
            {"model": "m", "demonstrations": pathlib.Path("d"), "task": "a:b", "prompt_column": "q"},
            "of a task is `prompt`",
        ),
        ({"model": "m", "data": pathlib.Path("x")}, "needs --demonstrations"),
        ({"model": "m", "demonstrations": pathlib.Path("d")}, "its problems by --data or by --task"),
        ({"group_size": 1}, "at least 2 completions"),
        ({"minibatches": 3}, "prompts_per_step = 16 does not divide into 3"),
        ({"micro_batches": 3, "prompts_per_step": 3}, "sft_batch = 64 does not divide into 3"),
    ],
    ids=["small", "prompts", "column", "demonstrations", "problems", "group", "minibatches", "sft"],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        pipeline.check(pipeline.Config(**settings))


# ------------------------------------------------------------------- a model of a folder

REWARDS = '''
from grpo_jax.rewards.completions import text_of

def ends_well(prompts, completions, answer, **columns):
    """Random models get nothing right: this is right where the answer's tag was closed."""
    return [float("</answer>" in text_of(completion)) for completion in completions]

def judge(prompts, completions, **columns):
    return [None if "4" in text_of(completion) else 1.0 for completion in completions]
'''


@pytest.fixture
def model_config(tmp_path, monkeypatch):
    model = testing.tiny_checkpoint(tmp_path / "model")
    (tmp_path / "pipeline_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"prompt": f"What is {n} + 3?", "answer": str(n + 3)} for n in range(40)]
    shown = [{"prompt": f"What is {n} + 3?", "completion": f"<answer>{n % 5}</answer>"} for n in range(60)]
    for name, lines in (("rows", rows), ("shown", shown)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return pipeline.Config(
        run_dir=tmp_path / "run", model=str(model), data=tmp_path / "rows.jsonl",
        demonstrations=tmp_path / "shown.jsonl", verifier="pipeline_rewards:ends_well",
        judge="pipeline_rewards:judge", max_tokens=16, compute_dtype="float32", min_language=0.0,
        cold_start_steps=60, sft_learning_rate=1e-2, sft_batch=16, sft_steps=4, rl_steps=2, final_steps=2,
        prompts_per_step=4, group_size=4, sampled_prompts=24, samples=4, test_rows=8, test_batch=16, minibatches=2,
    )  # fmt: skip


def test_a_change_of_the_verifiers_code_is_told_when_a_run_goes_on(model_config):
    assert "the code of pipeline_rewards.py" in problems.pretrained(model_config).digests


@pytest.mark.smoke
@pytest.mark.parametrize("settings", [{"chat": True}, {"start": "cold_start", "mix": True}], ids=["chat", "mix"])
def test_a_model_goes_through_the_four_stages_and_goes_on(model_config, settings, capsys):
    config = dataclasses.replace(model_config, **settings)
    results = pipeline.main(config)
    assert list(results["stages"]) == ["base", "cold_start", "reasoning_rl", "rejection_sampling", "final_rl"]
    counts = results["rejection_sampling"]
    assert counts["drawn"] == 24 * 4
    assert 0 < counts["kept"] <= counts["right"]
    policy, _ = hf.load_pretrained(config.run_dir / "4_final_rl" / "model")
    assert hf.load_tokenizer(config.run_dir / "4_final_rl" / "model").chat_template
    assert policy.config is not None
    printed = capsys.readouterr().out
    assert "left out 8 demonstrations whose prompts are in the test" in printed
    kept = json.loads((config.run_dir / "3_rejection_sampling" / "samples" / "00000.json").read_text())["kept"]
    assert not any("4" in item["text"].partition("</think>")[2] for item in kept)
    assert pipeline.main(config) == results

    rows = config.data.read_text()
    config.data.write_text(rows.replace('"answer": "3"', '"answer": "4"'))
    with pytest.raises(ValueError, match="not what the run began with: the answers and other columns"):
        pipeline.main(config)
