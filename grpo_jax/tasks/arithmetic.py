"""Addition of two 2-digit numbers with worked steps, for models that are trained from nothing.

    37+58=   ->   <think>7+8+0=15,3+5+1=09</think><answer>095</answer>

Column by column from the right, each with the carry that comes in and the two
digits that come out. There are 10,000 problems in all, cut into splits that share
none.
"""

from typing import NamedTuple

import numpy as np
import tokenizers
import transformers

from grpo_jax import data, rewards
from grpo_jax.types import Prompts

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
EOS = "<eos>"
MAX_TOKENS = 28  # a right completion has 25 tokens


class Splits(NamedTuple):
    """Disjoint sets of problems, each `[N, 2]` int: the two summands."""

    demonstrations: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def splits(seed: int, *, demonstrations: int = 2500, validation: int = 256, test: int = 1000) -> Splits:
    """Cuts the shuffled 10,000 problems; what is left after the named sizes is for training."""
    order = np.random.default_rng(seed).permutation(10_000)
    cuts = np.cumsum([demonstrations, validation, test])
    if cuts[-1] >= 10_000:
        raise ValueError(f"the splits take {cuts[-1]} problems and leave none of the 10,000 to train on")
    shown, validated, tested, trained = (np.stack(np.divmod(part, 100), axis=1) for part in np.split(order, cuts))
    return Splits(shown, trained, validated, tested)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A word-level tokenizer in which every character and every tag is a token."""
    words = [EOS, "<unk>", *TAGS, "+", "=", ",", *"0123456789"]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"</?\w+>|."), behavior="isolated")
    fast.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=EOS)


def prompt(problem: np.ndarray) -> str:
    """`37+58=`."""
    first, second = problem
    return f"{first:02d}+{second:02d}="


def worked(problem: np.ndarray, *, keep_carry: tuple[bool, bool] = (True, True)) -> str:
    """The worked completion; a carry that is not kept is forgotten, and the answer is wrong if there was one."""
    carry, steps, digits = 0, [], ""
    for first, second, keep in zip(*(f"{n:02d}"[::-1] for n in problem), keep_carry, strict=True):
        total = int(first) + int(second) + carry
        steps.append(f"{first}+{second}+{carry}={total:02d}")
        digits = f"{total % 10}{digits}"
        carry = total // 10 if keep else 0
    return f"<think>{','.join(steps)}</think><answer>{carry}{digits}</answer>{EOS}"


def flawed_demonstrations(problems: np.ndarray, seed: int, *, drop_carry: float = 0.7) -> tuple[list[str], list[str]]:
    """Prompts and completions of a teacher who forgets each carry with probability `drop_carry`.

    The student learns the format, and both ways of adding. What remains to be
    learned, and what a reward for right answers can teach, is which of them to use.
    """
    kept = np.random.default_rng([seed, 1]).random((len(problems), 2)) >= drop_carry
    completions = [worked(problem, keep_carry=tuple(keep)) for problem, keep in zip(problems, kept, strict=True)]
    return [prompt(problem) for problem in problems], completions


def encode(fast: transformers.PreTrainedTokenizerFast, problems: np.ndarray) -> Prompts:
    """Prompts with their answers as tokens, for traced rewards."""
    prompts = data.make_prompts(fast([prompt(problem) for problem in problems])["input_ids"])
    answers = np.array(fast([f"{a + b:03d}" for a, b in problems])["input_ids"], np.int32)
    lengths = np.full(len(problems), answers.shape[1], np.int32)
    return prompts._replace(info={"answer": answers, "answer_length": lengths})


def accuracy(fast: transformers.PreTrainedTokenizerFast) -> rewards.TokenReward:
    """1 where the tagged answer is the sum."""
    _, _, start, end = _tags(fast)
    return rewards.tokens.exact_answer(start, end)


def strict_format(fast: transformers.PreTrainedTokenizerFast) -> rewards.TokenReward:
    """1 where the four tags stand as they should."""
    return rewards.tokens.strict_format(_tags(fast), [fast.eos_token_id])


def _tags(fast: transformers.PreTrainedTokenizerFast) -> list[int]:
    return [fast.get_vocab()[tag] for tag in TAGS]
