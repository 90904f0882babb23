"""Conversations: their tokens are those that were sampled and those that were answered, with the scorer's log-probs."""

import concurrent.futures
import dataclasses
import functools
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import data, losses, make_train_step, processes, sampling
from grpo_jax.environments import Turn
from grpo_jax.policies import from_logits_fn
from grpo_jax.sampling import conversations, turn_rewards, turns
from grpo_jax.scoring import score
from grpo_jax.statistics import summary
from grpo_jax.testing import tiny_policy, tiny_tokenizer
from grpo_jax.updates import init_state

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id
V = len(TOKENIZER)
# A random network says every token now and then: many end a turn, so that turns are short.
EOS = (END, *range(1, 60))
ROWS = data.encode_rows(TOKENIZER, [{"prompt": f"{'What is ' * n}{n}?", "answer": n} for n in range(4)], chat=True)
TEXTS = [{"prompt": f"{'What is ' * n}{n}?", "answer": n} for n in range(4)]
PROMPTS = ROWS.batch(0, 0, size=3, multiple=16)
DECODER = tiny_policy("qwen3", vocab_size=V, max_position_embeddings=512)


def logits_of_all_so_far(params, tokens, mask):
    """A network whose next token depends on all tokens before and on their order."""
    x = params["embed"][tokens] * mask[..., None]
    decay = 0.9 ** (jnp.arange(tokens.shape[1])[:, None] - jnp.arange(tokens.shape[1]))
    return jnp.tanh(jnp.einsum("qk,nkd->nqd", jnp.tril(decay), x)) @ params["head"]


def logits_params(key):
    a, b = jax.random.split(key)
    return {"embed": jax.random.normal(a, (V, 12)), "head": jax.random.normal(b, (12, V))}


NETWORKS = {"decoder": DECODER, "logits": from_logits_fn(logits_of_all_so_far, init=logits_params)}


@functools.cache
def params_of(network):
    return jax.jit(NETWORKS[network].init)(jax.random.key(0))


def answer(row, messages):
    """Goes on for as many turns as the last word of the policy tells, so that conversations differ."""
    row["seen"] = [*row.get("seen", []), messages]
    said = messages[-1]["content"]
    if len(said) % 3 == 0:
        return Turn(None, reward=1.0)
    return Turn(f"no, {'x' * (len(said) % 7)} {row['answer']}", reward=-0.25)


def sampler_of(**changes):
    return sampling.sampler(**({"group_size": 4, "max_tokens": 150, "eos_ids": EOS} | changes))


def converse(respond=answer, network="decoder", *, sampler=None, rows=ROWS.rows, prompts=PROMPTS, chat=True, **changes):
    settings = {"max_turns": 4, "between": data.between_turns(TOKENIZER) if chat else None} | changes
    made = conversations(sampler or sampler_of(), respond, TOKENIZER, rows, **settings)
    return jax.device_get(made(NETWORKS[network], params_of(network), prompts, jax.random.key(1)))


@functools.cache
def conversed(network="decoder", slots=None):
    return converse(network=network, sampler=dataclasses.replace(sampler_of(), slots=slots))


def test_the_shapes_of_its_rollouts_are_known_before_it_converses():
    made = conversations(sampler_of(), answer, TOKENIZER, ROWS.rows, max_turns=4, between=data.between_turns(TOKENIZER))
    rollout = conversed()
    form = jax.eval_shape(lambda: made.blank(DECODER, None, PROMPTS, None))
    assert form == jax.eval_shape(lambda: jax.tree.map(jnp.asarray, rollout))
    step = make_train_step(DECODER, optax.sgd(0.1), made, loss=losses.grpo(), score_old=True)
    state = init_state(params_of("decoder"), optax.sgd(0.1), jax.random.key(0))
    form = jax.eval_shape(step.shaped, state, PROMPTS)  # which goes through no host
    assert form.old_log_probs.shape == form.rollout.tokens.shape == (3, 4, 150)


def each(rollout):
    return list(np.ndindex(rollout.lengths.shape))


@pytest.mark.parametrize("slots", [None, 5])
@pytest.mark.parametrize("network", NETWORKS)
def test_sampled_log_probs_are_the_scored_ones_over_several_turns(network, slots):
    rollout = conversed(network, slots)
    assert (rollout.turns.ends > 0).sum(-1).max() >= 3
    scored = score(NETWORKS[network], params_of(network), rollout).log_probs
    np.testing.assert_allclose(np.where(rollout.mask, scored, 0), rollout.log_probs, atol=1e-5)
    assert np.all(rollout.log_probs[rollout.mask] < 0)


@pytest.mark.parametrize("network", NETWORKS)
def test_slots_draw_the_conversations_that_are_drawn_together(network):
    together, slots = conversed(network), conversed(network, 5)
    np.testing.assert_allclose(together.log_probs, slots.log_probs, atol=1e-5)
    for name in ("tokens", "lengths", "mask", "truncated", "turns"):
        jax.tree.map(np.testing.assert_array_equal, getattr(together, name), getattr(slots, name))


def test_the_first_turn_is_what_the_sampler_draws_without_an_environment():
    rollout, plain = conversed(), sampler_of()(DECODER, params_of("decoder"), PROMPTS, jax.random.key(1))
    for place in each(rollout):
        end = rollout.turns.ends[place][0]
        np.testing.assert_array_equal(rollout.tokens[place][:end], plain.tokens[place][:end])
        assert end == plain.lengths[place]


def parts(rollout, place):
    """The tokens of each turn of the policy, and those between them."""
    ends, mask = rollout.turns.ends[place], rollout.mask[place]
    ends = ends[ends > 0]
    starts = [0, *(end + np.argmax(mask[end:]) for end in ends[:-1])]
    written = [rollout.tokens[place][a:b].tolist() for a, b in zip(starts, ends, strict=True)]
    return written, [rollout.tokens[place][a:b].tolist() for a, b in zip(ends, starts[1:], strict=False)]


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
def test_tokens_are_those_that_were_sampled_and_what_the_template_writes_around_the_answers(chat):
    seen = []

    def remember(row, messages):
        given = answer(row, messages)
        seen.append((messages, given))
        return given

    rows = ROWS if chat else data.encode_rows(TOKENIZER, TEXTS)
    rollout = converse(remember, rows=rows.rows, prompts=rows.batch(0, 0, size=3, multiple=16), chat=chat)
    between = data.between_turns(TOKENIZER) if chat else data.between_texts(TOKENIZER)
    conversations_seen, lengths = 0, set()
    for place in each(rollout):
        written, answered = parts(rollout, place)
        texts = [TOKENIZER.decode([token for token in turn if token not in EOS]) for turn in written]
        calls = [(messages, given) for messages, given in seen if messages[1]["content"] == texts[0]]
        mine = [call for call in calls if [m["content"] for m in call[0][1::2]] == texts[: len(call[0]) // 2]]
        for number, tokens in enumerate(answered):
            given = next(given for messages, given in mine if len(messages) == 2 * number + 2)
            assert tokens == between([{"role": "user", "content": given.content}], written[number][-1])
        lengths.add(len(written))
        conversations_seen += len(answered)
        assert rollout.lengths[place] == sum(map(len, written + answered))
        assert all(token not in EOS for turn in written for token in turn[:-1])
    assert conversations_seen > 5
    assert len(lengths) >= 3


@pytest.mark.slow
def test_a_conversation_in_a_chat_is_the_text_that_the_template_makes_of_its_messages():
    """Turns that end with the template's own token, against transformers' rendering of the whole."""
    rollout = converse(sampler=sampler_of(eos_ids=(END,), max_tokens=600))
    compared = 0
    for place in each(rollout):
        written, _ = parts(rollout, place)
        if rollout.truncated[place] or len(written) < 2:
            continue
        tokens = rollout.tokens[place][: rollout.lengths[place]]
        row = ROWS.rows[PROMPTS.info["row"][place[0]]]
        messages = [{"role": "user", "content": row["prompt"]}]
        for number, turn in enumerate(written):
            said = TOKENIZER.decode(turn[:-1])
            messages.append({"role": "assistant", "content": said})
            if number + 1 < len(written):
                messages.append({"role": "user", "content": f"no, {'x' * (len(said) % 7)} {row['answer']}"})
        prompt = np.asarray(PROMPTS.tokens[place[0]])[: PROMPTS.lengths[place[0]]]
        whole = TOKENIZER.apply_chat_template(messages, tokenize=False)
        assert TOKENIZER.decode([*prompt, *tokens]) == whole.rstrip("\n")
        compared += 1
    assert compared >= 1


def test_rewards_belong_to_the_turns_that_they_answer():
    rollout = conversed()
    rewards, mask = turn_rewards(rollout)
    for place in each(rollout):
        ended = int((rollout.turns.ends[place] > 0).sum())
        assert not rollout.turns.mask[place][ended:].any()
        given = rollout.turns.rewards[place][:ended]
        over = not rollout.truncated[place]
        np.testing.assert_array_equal(
            given[: ended - over], np.where(rollout.turns.mask[place], -0.25, 0)[: ended - over]
        )
        assert not over or given[-1] == 1.0
        assert rewards[place] == pytest.approx(given.sum())
        assert mask[place] == rollout.turns.mask[place].any()


def test_an_environment_may_reward_earlier_turns_when_it_knows_more():
    def respond(row, messages):
        turns = (len(messages) - 1) // 2
        if turns == 2:
            return Turn(None, 1.0, [(0, 0.5), (1, -2.0)])
        return Turn("go on", 0.25 if turns else None, [(turns, 1.0)] if row["answer"] == 2 else ())

    with pytest.warns(RuntimeWarning, match="it rewards turn 0 as an earlier one in its answer to 0"):
        rollout = converse(respond)
    answers = np.asarray(ROWS.rows, object)[np.asarray(PROMPTS.info["row"])]
    for b, row in enumerate(answers):
        assert rollout.turns.failed[b].all() == (row["answer"] == 2)
        for g in range(4):
            if (rollout.turns.ends[b, g] > 0).sum() == 3 and not rollout.truncated[b, g]:
                assert rollout.turns.rewards[b, g].tolist() == [0.5, -1.75, 1.0, 0.0]
    assert (rollout.turns.rewards == -1.75).any()


def test_a_prompt_is_read_once_for_all_conversations_of_its_group(monkeypatch):
    read, prefill = [], turns._prefill

    def prefill_seen(policy, params, prompts):
        params, cache = prefill(policy, params, prompts)
        read.append((prompts.tokens.shape[0], *(leaf.size for leaf in jax.tree.leaves(cache))))
        return params, cache

    monkeypatch.setattr(turns, "_prefill", prefill_seen)
    rollout = converse()
    assert rollout.tokens.shape[:2] == (3, 4)
    one = jax.eval_shape(DECODER.prefill, params_of("decoder"), PROMPTS.tokens, PROMPTS.lengths)
    assert read == [(3, *(leaf.size for leaf in jax.tree.leaves(one)))]


def test_few_programs_are_compiled():
    conversed()
    for program, most in ((turns._prefill, 1), (turns._decode, 1), (turns._read, 1), (turns._renew, 1)):
        before = program._cache_size()
        converse(lambda row, messages: Turn("yes " * (len(messages) ** 2)))
        assert program._cache_size() - before <= (most if program is turns._read else 0)


def test_stop_strings_end_a_turn_and_begin_anew_in_the_next():
    stop = sampling.stop_strings(TOKENIZER, ["a", "e", "o "])
    rollout = converse(
        lambda row, messages: Turn("o"), sampler=sampler_of(stop=stop, eos_ids=(END,)), max_turns=3, chat=True
    )
    found = 0
    for place in each(rollout):
        written, answered = parts(rollout, place)
        for number, turn in enumerate(written):
            text, before = TOKENIZER.decode(turn), TOKENIZER.decode(turn[:-1])
            assert not any(string in before for string in ("a", "e", "o "))
            if turn[-1] != END and number < len(answered):
                assert any(string in text for string in ("a", "e", "o "))
                assert answered[number][0] == END  # the template's own, which the policy did not write
                found += 1
    assert found > 5
    np.testing.assert_allclose(
        np.where(rollout.mask, score(DECODER, params_of("decoder"), rollout).log_probs, 0), rollout.log_probs, atol=1e-5
    )


@functools.cache
def going_on(limit):
    return converse(lambda row, messages: Turn("more", reward=0.5), sampler=sampler_of(max_tokens=limit), max_turns=9)


@pytest.mark.parametrize("limit", [8, 23, 40])
def test_a_budget_that_is_used_up_ends_a_conversation_and_nothing_is_lost(limit):
    rollout, free = going_on(limit), going_on(150)
    assert rollout.truncated.all()
    cut_in_an_answer = 0
    for place in each(rollout):
        length = rollout.lengths[place]
        assert 0 < length <= limit
        np.testing.assert_array_equal(rollout.tokens[place][:length], free.tokens[place][:length])
        assert rollout.mask[place][length - 1], "no answer that nothing follows"
        assert rollout.turns.ends[place].max() == length
        if length < limit:
            assert not free.mask[place][length]
            assert rollout.turns.mask[place].sum() == (rollout.turns.ends[place] > 0).sum()
            cut_in_an_answer += 1
    assert cut_in_an_answer > 0


def test_an_environment_that_would_go_on_after_the_last_turn_is_cut():
    rollout = converse(lambda row, messages: Turn("more", reward=0.5), max_turns=2)
    ended = (rollout.turns.ends > 0).sum(-1)
    assert ended.max() == 2
    assert rollout.truncated.all()
    assert np.all(rollout.turns.mask[ended == 2].sum(-1) == 2)


def raises(row, messages):
    raise KeyError("no such city")


def hangs(row, messages):
    time.sleep(20)


FAULTS = {
    "raises": (raises, "KeyError: 'no such city'"),
    "hangs": (hangs, "has not answered within 0.2 s"),
    "returns no text": (lambda row, messages: Turn(""), "returned no text: ''"),
    "returns a number": (lambda row, messages: Turn(3), "returned no text: 3"),
    "returns text without a turn": (lambda row, messages: "yes", "returned str, and not a Turn"),
    "returns too much": (lambda row, messages: Turn("yes " * 200), r"has \d+ tokens, more than max_answer_tokens = 90"),
    "plays the policy": (lambda row, messages: Turn([{"role": "assistant", "content": "x"}]), "another role than"),
    "rewards with text": (lambda row, messages: Turn("x", "1"), "its reward is '1'"),
}


def test_results_of_tools_are_cut_to_fit_and_where_they_cannot_the_conversation_is():
    between = data.between_turns(TOKENIZER)

    def follow(contents):
        made = conversations(sampler_of(), answer, TOKENIZER, TEXTS, max_turns=3, between=between, max_answer_tokens=90)
        talk = turns._Conversation(True, {}, [], [5, END], [True] * 2, [-1.0] * 2, ends=[2], rewards=[])
        tokens = turns._follow(made, talk, Turn([{"role": "tool", "content": text} for text in contents]))
        return talk, tokens

    talk, tokens = follow(["short", "yes " * 2000])
    assert 60 < len(tokens) <= 90
    assert talk.messages[0]["content"] == "short"
    assert talk.messages[1]["content"].startswith("yes yes")
    left = 8000 - len(talk.messages[1]["content"].split(" ... (")[0])
    assert talk.messages[1]["content"].endswith(f" ... ({left} characters left out)")
    assert tokens == between(talk.messages, END)
    talk, tokens = follow(["error: there is no tool"] * 100)
    assert (tokens, talk.truncated, talk.messages) == (None, True, [])


def test_an_answer_after_the_last_turn_is_not_looked_at_and_one_without_tokens_is_none():
    def follow(text, max_turns, between):
        settings = {"max_turns": max_turns, "between": between, "max_answer_tokens": 90}
        made = conversations(sampler_of(), answer, TOKENIZER, TEXTS, **settings)
        talk = turns._Conversation(True, {}, [], [5, END], [True] * 2, [-1.0] * 2, ends=[2], rewards=[])
        return talk, turns._follow(made, talk, Turn([{"role": "user", "content": text}], 0.5))

    talk, tokens = follow("yes " * 2000, 1, data.between_turns(TOKENIZER))
    assert (tokens, talk.truncated, talk.rewards) == (None, True, [0.5])
    _, failure = follow("x", 2, lambda messages, last: [])
    assert "has no tokens" in failure.message


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_environment_masks_its_conversation_and_is_counted(fault):
    respond, message = FAULTS[fault]

    def sometimes(row, messages):
        return respond(row, messages) if row["answer"] == 2 else answer(row, messages)

    with pytest.warns(RuntimeWarning, match=message):
        rollout = converse(sometimes, timeout=0.2, max_answer_tokens=90)
    fails = np.asarray(PROMPTS.info["row"]) == 2
    others = jax.tree.map(lambda x: x[~fails], rollout)
    whole = jax.tree.map(lambda x: x[~fails], conversed())
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), others, whole)
    failed = rollout.turns.failed[fails]
    assert failed.any()
    assert not rollout.mask[fails][failed].any()
    assert not turn_rewards(rollout)[1][fails][failed].any()


def test_async_environments_wait_together():
    import asyncio

    at_work, most = 0, 0

    async def respond(row, messages):
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await asyncio.sleep(0.05)
        at_work -= 1
        return answer(row, messages)

    rollout = converse(respond)
    assert most == 12
    jax.tree.map(np.testing.assert_array_equal, rollout, conversed())


def test_a_step_learns_from_conversations():
    optimizer = optax.sgd(0.1)
    made = conversations(sampler_of(), answer, TOKENIZER, ROWS.rows, max_turns=4, between=data.between_turns(TOKENIZER))
    step = make_train_step(DECODER, optimizer, made, loss=losses.grpo(), reward=turn_rewards)
    state = init_state(params_of("decoder"), optimizer, jax.random.key(0))
    experience = step.collect(state, PROMPTS)
    _, metrics = jax.jit(step.learn)(state, experience)
    metrics = summary(metrics)
    assert metrics["grad_norm"] > 0
    assert metrics["environment_failed"] == 0
    assert metrics["turns"] == pytest.approx(np.mean((experience.rollout.turns.ends > 0).sum(-1)))
    # What the environment wrote has no weight: other log-probs there change nothing.
    rollout = experience.rollout
    other = rollout._replace(
        log_probs=jnp.where(rollout.mask, rollout.log_probs, 7.0),
        turns=rollout.turns._replace(failed=rollout.turns.failed.at[0, 1].set(True)),
    )
    _, same = jax.jit(step.learn)(state, experience._replace(rollout=other))
    assert summary(same)["grad_norm"] == metrics["grad_norm"]
    assert summary(same)["environment_failed"] == pytest.approx(1 / 12)


def test_a_program_cannot_hold_a_conversation_of_the_host():
    made = conversations(sampler_of(), answer, TOKENIZER, ROWS.rows, max_turns=2)
    with pytest.raises(ValueError, match=r"call `step.collect` without jit"):
        jax.jit(lambda params: made(DECODER, params, PROMPTS, jax.random.key(0)))(params_of("decoder"))


@pytest.fixture
def by_two(monkeypatch):
    """Runs `of(index)` in two threads that are two processes: the first's prompts are 0 and 2, the second's is 1.

    Returns what each came to, be it an exception. One that waits for the other in vain raises.
    """
    playing, said, both = threading.local(), {}, threading.Barrier(2, timeout=20)

    def exchange(name, value):
        said[playing.index] = name, json.dumps(value)
        both.wait()
        names, values = zip(said[0], said[1], strict=True)
        both.wait()
        assert names[0] == names[1]
        return [*map(json.loads, values)]

    def own_rows(tree, of):
        return np.arange(of.shape[0])[playing.index :: 2], tree

    def play(of):
        def one(index):
            playing.index = index
            try:
                return of(index)
            except Exception as error:
                return error

        with monkeypatch.context() as patch, concurrent.futures.ThreadPoolExecutor(2) as threads:
            patch.setattr(processes, "exchange", exchange)
            patch.setattr(processes, "own_rows", own_rows)
            return [*threads.map(one, range(2))]

    return play


def asked_of(seen, respond=answer):
    """An environment that notes the answers of the rows that it was asked about."""

    def noted(row, messages):
        seen.append(row["answer"])
        return respond(row, messages)

    return noted


@pytest.mark.parametrize("slots", [None, 5])
def test_processes_ask_about_their_own_prompts_and_hold_the_conversations_of_one(by_two, slots):
    seen = [], []
    sampler = dataclasses.replace(sampler_of(), slots=slots)
    for rollout in by_two(lambda index: converse(asked_of(seen[index]), sampler=sampler)):
        jax.tree.map(np.testing.assert_array_equal, rollout, conversed(slots=slots))
    of_prompts = [ROWS.rows[row]["answer"] for row in np.asarray(PROMPTS.info["row"])]
    assert [{*asked} for asked in seen] == [{of_prompts[0], of_prompts[2]}, {of_prompts[1]}]
    whole = []
    converse(asked_of(whole), sampler=sampler)
    assert sorted(seen[0] + seen[1]) == sorted(whole)


def test_an_environment_that_fails_in_one_process_masks_the_conversations_that_it_would_in_one(by_two):
    def sometimes(row, messages):
        return raises(row, messages) if row["answer"] == 2 and len(messages) > 2 else answer(row, messages)

    with pytest.warns(RuntimeWarning, match="KeyError: 'no such city'") as told:
        both = by_two(lambda index: converse(sometimes))
    with pytest.warns(RuntimeWarning) as told_by_one:
        one = converse(sometimes)
    assert one.turns.failed.any()
    assert not one.turns.failed.all()
    assert len(told) == len(told_by_one)
    for rollout in both:
        jax.tree.map(np.testing.assert_array_equal, rollout, one)


def test_what_is_no_failure_of_an_environment_is_raised_in_all_processes(by_two):
    def respond(index):
        def together(asked, timeout):
            if index == 1:
                raise OSError("no room for another process")
            return [answer(*one) for one in asked]

        made = asked_of([])
        made.together = together
        return made

    first, second = by_two(lambda index: converse(respond(index)))
    assert isinstance(second, OSError)
    assert isinstance(first, processes.ProcessError)
    assert str(first) == "in process 1: OSError: no room for another process"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_turns": 0}, "max_turns and max_answer_tokens are at least 1, got 0"),
        ({"max_answer_tokens": 0}, "at least 1, got 2 and 0"),
        ({"timeout": 0}, "seconds above 0, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        conversations(sampler_of(), answer, TOKENIZER, ROWS.rows, **({"max_turns": 2} | changes))


def test_messages_without_a_template_between_are_refused():
    rows = [{"prompt": [{"role": "user", "content": "x"}], "answer": 1}] * 4
    with pytest.raises(ValueError, match=r"need between=data.between_turns"):
        converse(rows=rows, chat=False)
