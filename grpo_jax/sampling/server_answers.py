"""What a server answers, and whether it can be the policy's: what is wrong would be learned from in silence."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grpo_jax.sampling.engines import check_turn
from grpo_jax.sampling.stopping import StopStrings, first_stop


class Drawn(NamedTuple):
    """A completion as a server returned it."""

    tokens: list[int]
    log_probs: list[float]
    truncated: bool
    ended_by: str | int | None = None  # the string or the token that ended it, as far as the server says
    prompt: list[int] | None = None  # the tokens that the server says it has read before them
    prompt_tokens: int | None = None  # how many these were
    versions: Sequence[str] = ()  # of the weights that drew it, by the names that the server was given with them


class Asked(NamedTuple):
    """What was asked for, to which an answer is held."""

    prompt: Sequence[int]
    group_size: int
    max_tokens: int
    eos_ids: Sequence[int]
    stop: Sequence[str]
    stop_table: StopStrings | None  # of `stop`
    version: str | None  # of the weights; None where the request named them


def is_cut(reason: str) -> bool:
    """Whether a completion ended at the limit; one that was aborted is none."""
    if reason not in ("stop", "length"):
        raise ValueError(f"a completion ended by {reason!r}, and not by stop or length")
    return reason == "length"


def checked(drawn: Sequence[Drawn], asked: Asked) -> list[Drawn]:
    """The completions, each cut after the token that completes a stop string.

    Servers look for strings in the text of the last few tokens. One whose window is that of the string's own encoding
    (SGLang 0.5.23) misses a string that was drawn in smaller pieces, and one that takes several tokens at a time may
    return those after it.

    Raises:
      ValueError: for what cannot be the policy's.
    """
    if len(drawn) != asked.group_size:
        raise ValueError(f"{len(drawn)} completions in place of {asked.group_size}")
    return [_checked(one, asked) for one in drawn]


def _checked(one: Drawn, asked: Asked) -> Drawn:
    if one.prompt_tokens not in (None, len(asked.prompt)) or one.prompt not in (None, [*asked.prompt]):
        raise ValueError(
            f"it read {one.prompt_tokens} tokens for a prompt of {len(asked.prompt)}, or others: it cuts prompts or "
            "adds to them"
        )
    if wrong := [token for token in one.tokens if type(token) is not int or not 0 <= token < 2**31]:
        raise ValueError(f"{wrong[0]!r} is no token id")
    if not_numbers := [value for value in one.log_probs if type(value) not in (int, float)]:
        raise ValueError(f"{not_numbers[0]!r} is no log-prob")
    if asked.version is not None and (others := {*one.versions} - {asked.version}):
        raise ValueError(
            f"it was drawn by the weights {', '.join(sorted(others))}, and not by {asked.version}: was the server "
            "started again, or given others?"
        )
    count = len(one.tokens)
    if not 1 <= count <= asked.max_tokens or (one.truncated and count < asked.max_tokens):
        raise ValueError(
            f"a completion of {count} tokens{', cut,' if one.truncated else ''} where {asked.max_tokens} were left: is "
            "the context of the server too short for --max-tokens?"
        )
    if len(one.log_probs) != count:
        raise ValueError(f"a completion has {count} tokens and {len(one.log_probs)} log-probs")
    if (place := first_stop(asked.stop_table, one.tokens)) is not None:
        kept = slice(place + 1)
        one = one._replace(tokens=one.tokens[kept], log_probs=one.log_probs[kept], truncated=False)
    if check_turn(one.tokens, eos_ids=asked.eos_ids, where="a completion"):
        one = one._replace(truncated=False)
    if place is not None:
        return one
    by_string = isinstance(one.ended_by, str)
    if not one.truncated and one.ended_by not in asked.stop and (by_string or one.tokens[-1] not in asked.eos_ids):
        raise ValueError(
            f"a completion ended with the token {one.tokens[-1]} (by {one.ended_by!r}), which is none of the end "
            f"tokens {[*asked.eos_ids]}, and with none of the stop strings {[*asked.stop]}: the server has an end of "
            "its own, which belongs to eos_ids, too"
        )
    return one


def are_before_truncation(likeliest: Sequence[Drawn]) -> bool:
    """Whether log-probs are not those of the distribution that was drawn from, by completions under `top_k=1`.

    That distribution has one token, or two that are exactly alike, which with logits of 16 bits come now and then; so
    its log-probs are 0, but for a few.
    """
    values = [value for one in likeliest for value in one.log_probs]
    return sum(value < -1e-3 for value in values) > len(values) / 4


def versions_of(spans: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """The versions in what vLLM returns for `return_weight_versions`."""
    return [str(span["version"]) for span in spans or ()]
