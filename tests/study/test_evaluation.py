"""pass@k, majority@k and intervals against enumeration and exact values, on policies that are known."""

import dataclasses
import io
import itertools
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from grpo_jax import data, rewards, sampling, testing
from grpo_jax.models import hf
from grpo_jax.policies import from_logits_fn
from grpo_jax.study.evaluation import make_evaluate, make_mean_rewards
from grpo_jax.study.items import between, mark_right, pass_rates, sample_table, summarise, write_items
from grpo_jax.study.pass_at_k import majority_at_k

TOKENIZER = testing.tiny_tokenizer()
END = TOKENIZER.eos_token_id
TOKEN = {letter: TOKENIZER(letter)["input_ids"][0] for letter in "0123456789?"}


# ------------------------------------------------------------------- of policies that are known


def spinner(params, tokens, mask):
    """After a prompt that ends in `?`, the digits by their log-probs; after a digit, the end."""
    after = jnp.full((len(TOKENIZER), len(TOKENIZER)), -1e9).at[:, END].set(0.0)
    digits = jnp.array([TOKEN[digit] for digit in "0123456789"])
    asked = jnp.full(len(TOKENIZER), -1e9).at[digits].set(params)
    return after.at[TOKEN["?"]].set(asked)[tokens]


SPINNER = from_logits_fn(spinner)
PROBABILITIES = np.array([0.1, 0.5, 0.25, 0.15, 0, 0, 0, 0, 0, 0])
PARAMS = jnp.log(jnp.array(PROBABILITIES) + 1e-30)
ROWS = [{"prompt": f"{i}?", "answer": str(i % 4)} for i in range(200)]


def correct(completions, answer):
    return [float(completion == a) for completion, a in zip(completions, answer, strict=True)]


def small(completions):
    return [0.9 if completion in "01" else 0.3 for completion in completions]


def drawn(**settings):
    """A sampler of four tokens at most."""
    return dataclasses.replace(sampling.sampler(group_size=1, max_tokens=4, eos_ids=[END]), **settings)


GREEDY = drawn(greedy=True)


def spin(sampler=GREEDY, *, rows=ROWS, functions=(correct, small), k=(), seed=0, rule=None, **changes):
    """The summary and the items."""
    fields = {"batch_size": 64, "bucket": 4}
    evaluate = make_evaluate(SPINNER, sampler, TOKENIZER, rows, functions, **(fields | changes))
    scored = mark_right(evaluate(PARAMS, seed=seed), **(rule or {}))
    return summarise(scored, k=k, seed=seed), scored


@pytest.fixture(scope="module")
def sampled():
    return spin(drawn(group_size=10), k=(1, 2, 10), rule={"extract": lambda text: text or None}, seed=1)


def test_pass_and_majority_at_k_of_a_policy_with_known_probabilities(sampled):
    summary, items = sampled
    p = PROBABILITIES[:4]
    rates = pass_rates(items)
    np.testing.assert_allclose([rates[i::4].mean() for i in range(4)], p, atol=4 * 0.5 / np.sqrt(500))
    for k in (1, 2, 10):
        expected = np.mean(1 - (1 - p) ** k)
        assert summary[f"pass@{k}"] == pytest.approx(expected, abs=0.06), k
        assert summary[f"pass@{k}_low"] < summary[f"pass@{k}"] < summary[f"pass@{k}_high"]
    assert summary["accuracy"] == pytest.approx(summary["pass@1"], abs=1e-12)
    assert summary["majority@1"] == pytest.approx(summary["pass@1"], abs=1e-12)
    for i in range(4):  # the majority of 3 by the probability of each outcome; of three answers any may come first
        wins = 3 * p[i] ** 2 * (1 - p[i]) + p[i] ** 3
        others = [p[j] for j in range(4) if j != i]
        all_differ = 6 * p[i] * sum(x * y for x, y in itertools.combinations(others, 2))
        found = majority_at_k([item["answers"] for item in items[i::4]], [item["right"] for item in items[i::4]], 3)
        assert found.mean() == pytest.approx(wins + all_differ / 3, abs=0.1), i
    assert summary["majority@10"] < summary["pass@10"]
    assert summary["never_solved"] == np.mean(rates == 0)
    assert summary["always_solved"] == np.mean(rates == 1)


def test_an_item_has_what_was_written_and_how_it_was_judged(sampled):
    summary, items = sampled
    assert [item["row"] for item in items] == list(range(200))
    for item, row in zip(items, ROWS, strict=True):
        assert item["prompt"] == row["prompt"]
        assert len(item["completions"]) == 10
        assert item["rewards"]["correct"] == correct(item["completions"], [row["answer"]] * 10)
        assert item["right"] == [text == row["answer"] for text in item["completions"]]
        assert item["pass_rate"] == pytest.approx(np.mean(item["right"]))
        assert item["lengths"] == [2] * 10
        assert item["answers"] == item["completions"]
    assert len({tuple(item["completions"]) for item in items}) > 150  # each prompt has noise of its own
    assert summary["reward/small"] == pytest.approx(np.mean([r for item in items for r in item["rewards"]["small"]]))
    assert summary["reward/correct"] == pytest.approx(summary["accuracy"])
    assert summary["length"] == 2
    assert summary["truncated"] == 0


def test_the_greedy_completion_is_the_likeliest():
    summary, items = spin()
    assert {text for item in items for text in item["completions"]} == {"1"}
    assert summary["accuracy"] == 0.25
    assert summary["accuracy_low"] == pytest.approx(0.25 - 1.96 * np.sqrt(0.25 * 0.75 / 200), abs=0.015)
    assert (summary["always_solved"], summary["never_solved"]) == (0.25, 0.75)
    assert not any("@" in name for name in summary)


def test_batches_change_nothing_and_the_last_one_shows_no_row_twice():
    seen = []

    def counted(completions, answer):
        seen.extend(answer)
        return correct(completions, answer)

    whole = spin(rows=ROWS[:7], functions=[counted], batch_size=64)
    assert len(seen) == 7
    parts = spin(rows=ROWS[:7], functions=[counted], batch_size=3)
    assert len(seen) == 14
    assert parts == whole


def test_one_program_is_compiled_for_each_width():
    calls = []

    def traced(params, tokens, mask):
        calls.append(tokens.shape)
        return spinner(params, tokens, mask)

    rows = [{"prompt": "1" * length + "?", "answer": "1"} for length in (1, 2, 3, 1, 2, 9, 10)]
    make_evaluate(from_logits_fn(traced), drawn(), TOKENIZER, rows, [correct], batch_size=2, bucket=8)(PARAMS)
    assert len(set(calls)) == 2


def test_the_seed_and_the_temperature_matter():
    once, again, other = (spin(drawn(group_size=4), rows=ROWS[:20], seed=seed) for seed in (0, 0, 1))
    assert once == again
    assert once != other
    cold, _ = spin(drawn(temperature=0.05, group_size=2))
    assert cold["accuracy"] == 0.25
    top, _ = spin(drawn(top_k=1, group_size=2))
    assert top["accuracy"] == 0.25


def test_the_threshold_and_the_named_function_say_what_is_right():
    assert spin(rule={"accuracy": "small"})[0]["accuracy"] == 0
    assert spin(rule={"accuracy": "small", "threshold": 0.9})[0]["accuracy"] == 1  # 0.9 is less in float32
    assert spin(rule={"accuracy": "small", "threshold": 0.91})[0]["accuracy"] == 0


def test_completions_that_could_not_be_judged_are_left_out():
    def unsure(completions, answer):
        """None for the answer 3, and for all of the first row's completions."""
        judged = correct(completions, answer)
        return [None if c == "3" or i < 4 else r for i, (c, r) in enumerate(zip(completions, judged, strict=True))]

    summary, items = spin(
        drawn(group_size=4), rows=ROWS[:8], functions=[unsure], k=(1, 4), rule={"extract": str, "accuracy": "unsure"}
    )
    assert items[0]["pass_rate"] is None
    assert items[0]["right"] == [None] * 4
    assert math.isnan(pass_rates(items)[0])
    judged = [[right for right in item["right"] if right is not None] for item in items]
    partly = [rights for rights in judged if 0 < len(rights) < 4]
    assert partly  # or the test shows nothing
    assert summary["accuracy"] == pytest.approx(np.mean([np.mean(rights) for rights in judged if rights]))
    assert summary["pass@4"] == pytest.approx(np.mean([any(rights) for rights in judged if len(rights) == 4]))
    assert summary["unscored"] == 1 - sum(map(len, judged)) / 32
    nothing, _ = spin(rows=ROWS[:2], functions=[lambda completions: [None] * len(completions)], k=(1,))
    assert all(math.isnan(nothing[name]) for name in ("accuracy", "accuracy_low", "pass@1", "always_solved"))
    assert nothing["unscored"] == 1


def test_rows_that_the_model_solves_always_or_never_can_be_left_out(sampled):
    _, items = sampled
    rates = pass_rates(items)
    kept = between(ROWS, rates)
    assert kept == [row for row, item in zip(ROWS, items, strict=True) if 0 < sum(item["right"]) < 10]
    assert 0 < len(kept) < len(ROWS)
    assert between("abcde", [0.0, 0.2, 0.5, 1.0, math.nan]) == ["b", "c"]
    assert between("abcde", [0.0, 0.2, 0.5, 1.0, math.nan], low=-1, high=0.5) == ["a", "b"]
    with pytest.raises(ValueError, match="2 pass rates for 3 rows"):
        between("abc", [0.1, 0.2])
    with pytest.raises(ValueError, match=r"low is less than high, got 0.5 and 0.5"):
        between("a", [0.1], low=0.5, high=0.5)


def test_items_that_were_written_sum_up_to_the_same(sampled, tmp_path):
    summary, items = sampled
    write_items(tmp_path / "items.jsonl", items)
    read = data.read_jsonl(tmp_path / "items.jsonl")
    assert read == json.loads(json.dumps(items))
    assert summarise(read, k=(1, 2, 10), seed=1) == summary


def test_a_checkpoint_is_evaluated_on_chat_messages(tmp_path):
    testing.tiny_checkpoint(tmp_path / "model")
    policy, params = hf.load_pretrained(tmp_path / "model")
    rows = [{"prompt": [{"role": "user", "content": f"What is {i}?"}], "answer": "x"} for i in range(3)]

    def length(completions):
        return [float(len(completion[0]["content"])) for completion in completions]

    sampler = sampling.sampler(group_size=2, max_tokens=6, eos_ids=hf.eos_ids(tmp_path / "model", TOKENIZER))

    def evaluate(rows):
        return make_evaluate(policy, sampler, TOKENIZER, rows, [length], batch_size=2, bucket=32)(params)

    items = mark_right(evaluate(rows), threshold=0.0)
    summary = summarise(items)
    assert summary["accuracy"] == 1
    assert [item["rewards"]["length"] for item in items] == [[len(t) for t in item["completions"]] for item in items]
    assert items[0]["prompt"] == rows[0]["prompt"]
    tokens = [data.encode_prompt(TOKENIZER, row["prompt"]) for row in rows]
    assert mark_right(evaluate(data.PromptSet(rows, tokens)), threshold=0.0) == items
    other = evaluate(data.PromptSet(rows, tokens[::-1]))
    assert [item["completions"] for item in other] != [item["completions"] for item in items]
    shown = render(sample_table(items))
    assert "user: What is 0?" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": []}, "needs rows and reward functions, got 0 and 2"),
        ({"functions": []}, "got 200 and 0"),
        ({"functions": [correct, correct]}, "one name each, got correct, correct"),
        ({"rule": {"accuracy": "format"}}, "one of correct, small, got 'format'"),
        ({"sampler": drawn(greedy=True, group_size=2)}, "the 2 greedy completions of a prompt would be equal"),
        ({"k": (1, 3), "sampler": drawn(group_size=2)}, "k is from 1 to the 2 completions per prompt, got 3"),
    ],
    ids=["rows", "functions", "names", "accuracy", "greedy", "k"],
)
def test_an_evaluation_refuses_what_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        spin(**changes)


def test_an_exception_of_a_reward_passes_through():
    def broken(completions):
        raise LookupError("the verifier is down")

    with pytest.raises(LookupError, match="the verifier is down"):
        spin(rows=ROWS[:2], functions=[broken])


def test_failures_in_evaluation_and_in_training_are_counted_apart():
    def down(completions, **columns):
        raise LookupError("the verifier is down")

    evaluate = make_mean_rewards(SPINNER, GREEDY, TOKENIZER, ROWS[:2], [down], stop_after_failed=2)
    training = rewards.skip_failed_batches(down, batches=2)
    with pytest.warns(RuntimeWarning, match="down failed"):
        training(prompts=["p"], completions=["x"])
    with pytest.warns(RuntimeWarning, match="down failed"):
        evaluate(PARAMS, rewards.TrainerState(0, 1))  # the first failure of its own
    with pytest.raises(LookupError):
        training(prompts=["p"], completions=["x"])
    with pytest.raises(LookupError):
        evaluate(PARAMS, rewards.TrainerState(1, 1))


def agreeing(completions):
    return [1.0] * len(completions)


agreeing.group_size = 4


def test_a_reward_that_compares_a_group_is_refused_at_the_start_unless_groups_have_its_size():
    for sampler in (GREEDY, drawn(group_size=2)):
        with pytest.raises(ValueError, match=r"agreeing compares groups of 4 completions and the evaluation draws \d"):
            make_evaluate(SPINNER, sampler, TOKENIZER, ROWS[:2], [agreeing])
    summary, _ = spin(drawn(group_size=4), rows=ROWS[:2], functions=[agreeing])
    assert summary["reward/agreeing"] == 1


def test_what_rewards_log_is_told_apart_from_training_and_they_see_the_place_in_the_run():
    logged, places = [], []

    def logging(completions, log_metric, trainer_state):
        log_metric("logging/failed", 0.0)
        places.append(trainer_state)
        return [1.0] * len(completions)

    evaluate = make_evaluate(
        SPINNER, GREEDY, TOKENIZER, ROWS[:2], [logging], log_metric=lambda name, value: logged.append(name)
    )
    evaluate(PARAMS, trainer_state=rewards.TrainerState(3, 10))
    assert logged == ["eval/logging/failed"]
    assert places == [rewards.TrainerState(3, 10)]


def test_a_reward_that_scores_no_row_is_left_out_of_the_weighted_sum():
    """Such as that of another task; it would else be no number for ever, and no evaluation the best."""

    def elsewhere(completions):
        return [None] * len(completions)

    def measured(functions, weights=(1.0, 2.0)):
        evaluate = make_mean_rewards(SPINNER, GREEDY, TOKENIZER, ROWS[:4], functions, weights=weights)
        return evaluate(PARAMS, rewards.TrainerState(0, 1))

    assert measured([elsewhere, correct])["eval/reward"] == 2 * 0.25
    assert measured([small, correct])["eval/reward"] == pytest.approx(0.9 + 2 * 0.25)
    assert math.isnan(measured([elsewhere], weights=None)["eval/reward"])


@pytest.mark.parametrize("special", [True, False], ids=["special tokens", "added tokens"])
def test_tags_that_are_tokens_of_their_own_are_read_in_an_evaluation(special):
    """In one of a checkpoint and in that of a run; the end token is no text, special as the tags may be."""
    tokenizer = testing.tiny_tokenizer()
    tags = ["<answer>", "</answer>", "<think>", "</think>"]
    tokenizer.add_tokens(tags, special_tokens=special)
    written = [*tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<answer>"]), TOKEN["4"]]
    written += [tokenizer.convert_tokens_to_ids("</answer>"), END]
    follows = dict(zip([TOKEN["?"], *written[:-1]], written, strict=True))
    nexts = jnp.array([follows.get(token, END) for token in range(len(tokenizer))])
    policy = from_logits_fn(lambda params, tokens, mask: jax.nn.one_hot(nexts[tokens], len(tokenizer)) * 1e3)
    functions = [rewards.exact_answer(), rewards.soft_format()]
    rows = [{"prompt": "2+2?", "answer": "4"}, {"prompt": "2+3?", "answer": "5"}]
    sampler = drawn(greedy=True, max_tokens=8)
    items = make_evaluate(policy, sampler, tokenizer, rows, functions)({})
    items = mark_right(items, extract=rewards.answer_of)
    assert [item["completions"] for item in items] == [["<think></think><answer>4</answer>"]] * 2
    assert [item["rewards"] for item in items] == [
        {"exact_answer": [right], functions[1].__name__: [1.0]} for right in (1.0, 0.0)
    ]
    assert [item["answers"] for item in items] == [["4"]] * 2
    evaluate = make_mean_rewards(policy, sampler, tokenizer, rows, functions, weights=[1.0, 0.5])
    found = evaluate({}, rewards.TrainerState(0, 1))
    assert found == {"eval/reward": 1.0, "eval/exact_answer": 0.5, f"eval/{functions[1].__name__}": 1.0}


def test_answers_for_the_majority_go_on_from_the_tag_that_the_prompt_opens():
    items = [{"completions": ["<answer>5</answer>", "so</think><answer>6</answer>"], "rewards": {"correct": [0, 1]}}]
    for opened, expected in ({}, ["5", "6"]), ({"opened": "<think>\n"}, [None, "6"]):
        (item,) = mark_right([items[0] | opened], extract=rewards.answer_of)
        assert item["answers"] == expected
    assert "answers" not in items[0]


def test_a_reward_that_hangs_is_reported_in_an_evaluation_too():
    def slow(completions):
        time.sleep(0.3)
        return [1.0] * len(completions)

    evaluate = make_evaluate(SPINNER, GREEDY, TOKENIZER, ROWS[:2], [slow], report_after=0.1)
    with pytest.warns(RuntimeWarning, match="the reward slow has been at work"):
        evaluate(PARAMS)


# ---------------------------------------------------------------------------- the table


def render(table):
    console = rich.console.Console(file=io.StringIO(), width=120, force_terminal=False)
    console.print(table)
    return console.file.getvalue()


def item_of(prompt, *completions, **rewards):
    return {"prompt": prompt, "completions": list(completions), "rewards": rewards}


def test_the_table_shows_prompt_completion_and_each_reward():
    items = [
        item_of(f"What is {i}?", "it is 7", "no", "third", correct=[1.0, 0.0, 0.5], format=[None, 0.125, 0])
        for i in range(9)
    ]
    shown = render(sample_table(items, 3))
    assert [shown.count(f"What is {i}?") for i in range(4)] == [1, 1, 1, 0]
    assert shown.count("it is 7") == 3
    assert shown.count("0.125") == 3
    assert "third" not in shown
    assert "third" in render(sample_table(items, 1, completions=3))
    head = shown.splitlines()[1]
    assert [head.index(name) for name in ("prompt", "completion", "correct", "format")] == sorted(
        head.index(name) for name in ("prompt", "completion", "correct", "format")
    )
    assert "-" in next(line for line in shown.splitlines() if "it is 7" in line)  # no reward to give
    assert render(sample_table([])) is not None


HOSTILE = "\x1b[2J\x1b[31mred\x07\r\x00 \u202eright to left \ud800 [bold]markup[/bold] [/nothing] \x9b0m \u2028end"


def test_what_a_model_writes_cannot_steer_the_terminal():
    shown = render(sample_table([item_of(HOSTILE, HOSTILE, r=[1.0])]))
    assert not set(shown) & set("\x1b\x07\r\x00\u202e\ud800\x9b\u2028")
    shown.encode()  # a lone surrogate cannot be written
    for escape in ("\\x1b[2J", "\\u202e", "\\ud800", "[bold]markup[/bold]", "\\x9b"):
        assert escape in shown.replace("\n", ""), escape


def test_a_line_break_stays_one_and_a_long_text_is_cut():
    shown = render(sample_table([item_of("a\nb", "x" * 1000 + "y" * 1000, r=[1.0])], characters=100))
    assert "\\n" not in shown
    assert shown.count("x") == shown.count("y") == 50
    assert " ... " in shown


def test_hostile_text_is_kept_whole_in_the_items_file(tmp_path):
    text = HOSTILE.replace("\ud800", "")  # which `read_jsonl` refuses, as no tokenizer can say it
    write_items(tmp_path / "items.jsonl", [item_of(text, text)])
    written = (tmp_path / "items.jsonl").read_bytes()
    assert written.isascii()
    assert b"\x1b" not in written
    assert written.count(b"\n") == 1
    assert data.read_jsonl(tmp_path / "items.jsonl")[0]["prompt"] == text
