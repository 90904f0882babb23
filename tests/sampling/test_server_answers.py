"""What a server answers, held to what was asked for; `test_servers.py` has the answers of a server."""

import jax
import pytest

from grpo_jax import sampling
from grpo_jax.sampling.server_answers import Asked, Drawn, are_before_truncation, checked
from grpo_jax.testing import tiny_tokenizer


def held(tokens, *, stop=(), stop_table=None, **answer):
    """A completion of at most 4 tokens, of which 1 ends it, as it is taken from an answer."""
    asked = Asked([20, 30], 1, 4, (1,), stop, stop_table, "version_2")
    log_probs = [-0.5 * (n + 1) for n in range(len(tokens))]
    return checked([Drawn(tokens, log_probs, **({"truncated": False} | answer))], asked)[0]


def test_an_end_token_in_the_last_place_of_the_limit_is_an_end():
    assert not held([3, 4, 5, 1], truncated=True).truncated
    assert held([3, 4, 5, 6], truncated=True).truncated


@pytest.mark.parametrize(("end", "by"), [("length", None), ("stop", "ab"), ("stop", 1)])
def test_a_completion_is_cut_after_the_token_that_completes_a_string_however_the_server_ended_it(end, by):
    tokenizer = tiny_tokenizer(259)  # bytes
    a, b, c = (tokenizer.convert_tokens_to_ids(letter) for letter in "abc")
    table = jax.device_get(sampling.stop_strings(tokenizer, ("ab",)))
    tokens = [a, b, c, 1 if by == 1 else a]
    kept = held(tokens, stop=("ab",), stop_table=table, truncated=end == "length", ended_by=by)
    assert (kept.tokens, kept.log_probs, kept.truncated) == ([a, b], [-0.5, -1.0], False)


def test_a_string_that_the_server_saw_is_an_end_where_the_tokens_do_not_tell():
    assert not held([3, 4], stop=("ab",), ended_by="ab").truncated
    with pytest.raises(ValueError, match=r"ended with the token 4 \(by 'cd'\), which is none of the end tokens \[1\]"):
        held([3, 4], stop=("ab",), ended_by="cd")


def test_weights_of_another_name_are_told_and_servers_that_tell_none_are_believed():
    assert held([3, 1], versions=["version_2"]).tokens == held([3, 1]).tokens
    with pytest.raises(ValueError, match="by the weights default, version_1, and not by version_2"):
        held([3, 1], versions=["version_2", "version_1", "default"])


@pytest.mark.parametrize(
    ("log_probs", "before"), [([0.0] * 8, False), ([-0.69] + [0.0] * 7, False), ([-0.7, 0.0, -0.1, 0.0], True)]
)
def test_of_one_token_the_log_prob_is_0_but_where_two_are_alike(log_probs, before):
    assert are_before_truncation([Drawn([3] * len(log_probs), log_probs, truncated=True)]) == before
