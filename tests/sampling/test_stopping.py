"""Where a completion ends at a stop string, against decoding its text and searching there."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers

from grpo_jax import sampling
from grpo_jax.policies import from_logits_fn
from grpo_jax.sampling import stopping
from grpo_jax.sampling.stopping import first_stop, token_bytes
from grpo_jax.testing import tiny_tokenizer
from grpo_jax.types import Prompts

TOKENIZER = tiny_tokenizer()
STRINGS = ("</answer>", "answer> is", "\nansw\n", "é€", "abab", "ba")


def pieces_tokenizer():
    """As Llama 2's: pieces with a mark for the space, and bytes for what they cannot spell."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    pieces += ["▁a", "ab", "ba", "</", "answer", "▁answer", "er>", "s▁is", "▁is", "▁▁", "é", "€a"]
    scores = [(piece, -float(len(pieces) - i)) for i, piece in enumerate(pieces)]
    backend = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def random_tokens(rng, tokenizer, texts, count):
    """Tokens of texts that are cut at random places, so that the same text comes in other tokens, among any tokens."""
    tokens = []
    while len(tokens) < count:
        text = texts[rng.integers(len(texts))]
        cuts = np.sort(rng.integers(0, len(text) + 1, rng.integers(0, 4)))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        tokens += [i for part in parts for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
        if rng.random() < 0.5:
            tokens.append(int(rng.integers(258, len(tokenizer))))
    return tokens[:count]


@pytest.mark.parametrize("strings", [STRINGS[:1], STRINGS[1:3], STRINGS[3:], STRINGS], ids=str)
@pytest.mark.parametrize("make", [tiny_tokenizer, pieces_tokenizer])
def test_the_first_stop_is_where_the_decoded_text_first_contains_a_string(make, strings):
    tokenizer, rng = make(), np.random.default_rng(0)
    stop = sampling.stop_strings(tokenizer, strings)
    texts = [*strings, "the answer> is abab", "x</answer> é€", "\nansw", "b", "</answ"]
    rows = np.array([random_tokens(rng, tokenizer, texts, 24) for _ in range(150)])

    def step(state, tokens):
        return stopping.follow(stop, state, tokens)

    _, traced = jax.lax.scan(step, stopping.start(stop, (150,)), jnp.asarray(rows.T))
    first = tokenizer.convert_tokens_to_ids("|")  # since decoding strips a space at the beginning of a text
    found = 0
    for tokens, marked in zip(rows.tolist(), np.asarray(traced).T, strict=True):
        texts = tokenizer.batch_decode([[first, *tokens[:n]] for n in range(1, 25)], clean_up_tokenization_spaces=False)
        places = [n for n, text in enumerate(texts) if any(string in text for string in strings)]
        assert first_stop(stop, tokens) == next(iter(places), None)
        np.testing.assert_array_equal(np.flatnonzero(marked), places)
        found += bool(places)
    assert found > 30


def independent_tokens(logits, tokens, mask):
    return jnp.broadcast_to(logits, (*tokens.shape, logits.shape[-1]))


POLICY = from_logits_fn(independent_tokens)


def logits_of(*words):
    """Tokens of the words at even odds, others never."""
    ids = [i for word in words for i in TOKENIZER(word)["input_ids"]]
    return jnp.full(len(TOKENIZER) + 5, -100.0).at[jnp.array(ids)].set(0.0)


@pytest.mark.parametrize("slots", [None, 3])
def test_completions_end_with_the_token_that_completes_a_string(slots):
    logits, prompts = logits_of("a b", "b", "ab", "c"), Prompts(jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32))
    settings = {"group_size": 8, "max_tokens": 12, "eos_ids": ()}
    free = sampling.sampler(**settings)(POLICY, logits, prompts, jax.random.key(0))
    sampler = sampling.sampler(stop=sampling.stop_strings(TOKENIZER, ["ab", "cc"]), **settings)
    rollout = dataclasses.replace(sampler, slots=slots)(POLICY, logits, prompts, jax.random.key(0))
    for b, g in np.ndindex(2, 8):
        drawn = np.asarray(free.tokens[b, g])
        texts = [TOKENIZER.decode(drawn[: n + 1]) for n in range(12)]
        length = next((n + 1 for n, text in enumerate(texts) if re.search("ab|cc", text)), None)
        assert rollout.truncated[b, g] == (length is None)
        length = length or 12
        assert rollout.lengths[b, g] == length
        np.testing.assert_array_equal(rollout.tokens[b, g], np.where(np.arange(12) < length, drawn, 0))
        np.testing.assert_array_equal(rollout.mask[b, g], np.arange(12) < length)
    assert 0 < np.sum(rollout.truncated) < 16


def test_greedy_completions_end_at_a_string_too_and_at_the_last_place():
    token = TOKENIZER.convert_tokens_to_ids("a")
    logits = jnp.zeros(len(TOKENIZER)).at[token].set(9.0)
    prompts = Prompts(jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32))
    for limit, length, truncated in ((5, 3, False), (3, 3, False), (2, 2, True)):
        sampler = sampling.greedy(max_tokens=limit, eos_ids=(), stop=sampling.stop_strings(TOKENIZER, ["aaa"]))
        rollout = sampler(POLICY, logits, prompts, jax.random.key(0))
        assert (rollout.lengths.item(), rollout.truncated.item()) == (length, truncated)


def test_tokens_that_the_tokenizer_does_not_know_have_no_text():
    stop = sampling.stop_strings(TOKENIZER, ["ab"])
    a, b = TOKENIZER.convert_tokens_to_ids(["a", "b"])
    tokens, state = [a, len(TOKENIZER) + 3, b], stopping.start(stop, ())
    assert first_stop(stop, tokens) == 2
    for token in tokens:
        state, done = stopping.follow(stop, state, jnp.array(token))
    assert done


def test_an_engines_completion_that_a_string_ends_is_not_truncated():
    stop, ids = sampling.stop_strings(TOKENIZER, ["ab"]), TOKENIZER.convert_tokens_to_ids
    prompts = Prompts(jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32))
    completions = [[ids(["a", "b"]), ids(["b", "a"])]]
    settings = {"eos_ids": (), "max_tokens": 4, "stop": stop}
    rollout = sampling.from_engine(prompts, completions, [[[-1.0] * 2] * 2], **settings)
    assert rollout.truncated.tolist() == [[False, True]]
    with pytest.raises(ValueError, match=r"completion 0 of prompt 0 goes on after the stop string .* place 1"):
        sampling.from_engine(prompts, [[ids(["a", "b", "a"])]], [[[-1.0] * 3]], **settings)


def test_tokens_have_the_bytes_of_their_text():
    texts = token_bytes(TOKENIZER)
    ids = TOKENIZER("Ä 12\n<|im_end|> €", add_special_tokens=False)["input_ids"]
    assert b"".join(texts[i] for i in ids) == "Ä 12\n<|im_end|> €".encode()


@pytest.mark.parametrize("strings", ["</answer>", (), ("a", ""), (3,)], ids=str)
def test_what_is_no_list_of_texts_is_refused(strings):
    with pytest.raises(ValueError, match="a sequence of texts that are not empty"):
        sampling.stop_strings(TOKENIZER, strings)


def test_strings_in_place_of_their_table_are_refused():
    with pytest.raises(ValueError, match=r"what stop_strings\(tokenizer, \('a',\)\) makes"):
        sampling.sampler(group_size=2, max_tokens=4, eos_ids=(), stop=("a",))


def test_a_tokenizer_that_puts_spaces_between_tokens_is_refused():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "answer": 2, "##s": 3}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ValueError, match="text is that of its tokens one after the other"):
        sampling.stop_strings(tokenizer, ["answer"])
