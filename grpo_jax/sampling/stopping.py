"""Stop strings: where the text of a completion first contains one of them, told from its tokens alone.

A string may lie across several tokens, and begin and end within one. The bytes of the tokens drive an automaton whose
states are the beginnings of the strings (Aho and Corasick 1975, doi:10.1145/360825.360855). All the bytes of a token
at once are one transition, looked up in a table, so that the decoding loop stays on the device.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np

from grpo_jax.types import Array

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopStrings(NamedTuple):
    """The automaton of some strings over the tokens of a vocabulary.

    The last of its `S` states says that a string has come. Most tokens move it alike, so that a table of `C` classes
    takes the place of one of all tokens.
    """

    token_class: Array  # [V] int32
    transitions: Array  # [S, C] int32, the state that follows


def stop_strings(tokenizer: "PreTrainedTokenizerBase", strings: Sequence[str]) -> StopStrings:
    r"""Makes the `stop` of a sampler: a completion ends with the token in which one of the strings is completed.

    That token is kept whole, also where its text goes on after the string, as in the `token_ids` of vLLM; the text is
    the completion's alone, so that a string in the prompt, or one that begins there, ends nothing. Special tokens
    count as the text that they are written as. Strings and tokens are compared as UTF-8 bytes.

    Args:
      tokenizer: of the policy, a fast one of transformers.
      strings: one or more, such as `("</answer>",)`.

    Raises:
      ValueError: for strings that are not a sequence of texts, or an empty one; for a tokenizer whose text is not that
        of its tokens one after the other, as with WordPiece.
    """
    if isinstance(strings, str) or not strings or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"stop strings are a sequence of texts that are not empty, as ('</answer>',), got {strings!r}")
    targets = [string.encode() for string in strings]
    prefixes = sorted({target[:n] for target in targets for n in range(len(target))}, key=lambda p: (len(p), p))
    done = len(prefixes)

    def following(text: bytes) -> int:
        """The state after `text`, one state's prefix and a byte."""
        if any(text.endswith(target) for target in targets):
            return done
        return next(prefixes.index(text[n:]) for n in range(len(text) + 1) if text[n:] in prefixes)

    by_byte = np.array([[following(prefix + bytes([byte])) for byte in range(256)] for prefix in prefixes])
    by_byte = np.concatenate([by_byte, np.full((1, 256), done)])
    texts = token_bytes(tokenizer)
    lengths = np.array([len(text) for text in texts])
    after = np.repeat(np.arange(done + 1)[:, None], len(texts), axis=1)  # [S, V]
    for n in range(lengths.max()):
        longer = np.flatnonzero(lengths > n)
        after[:, longer] = by_byte[after[:, longer], [texts[i][n] for i in longer]]
    # The first class is that of a token without text, as are those of a network that its tokenizer does not know.
    table, token_class = np.unique(np.c_[np.arange(done + 1), after], axis=1, return_inverse=True)
    token_class = token_class.reshape(-1)
    first = token_class[0]
    order = np.r_[first, np.delete(np.arange(table.shape[1]), first)]
    return StopStrings(
        jnp.asarray(np.argsort(order)[token_class[1:]], jnp.int32), jnp.asarray(table[:, order], jnp.int32)
    )


def start(stop: StopStrings | None, shape: tuple[int, ...]) -> Array | None:
    """The automaton's state before the first token of each completion; None without stop strings."""
    return None if stop is None else jnp.zeros(shape, jnp.int32)


def follow(stop: StopStrings | None, state: Array | None, tokens: Array) -> tuple[Array | None, Array]:
    """The states after `tokens [...]`, and `[...]` bool, True where a string has come."""
    if stop is None or state is None:
        return None, jnp.zeros(tokens.shape, bool)
    classes = stop.token_class.at[tokens].get(mode="fill", fill_value=0)
    state = stop.transitions[state, classes]
    return state, state == stop.transitions.shape[0] - 1


def first_stop(stop: StopStrings | None, tokens: Sequence[int] | np.ndarray) -> int | None:
    """The place in `tokens`, on the host, of the one that completes the first string; None where none does."""
    if stop is None:
        return None
    token_class, transitions = np.asarray(stop.token_class), np.asarray(stop.transitions)
    state = 0
    for place, token in enumerate(tokens):
        state = transitions[state, token_class[token] if token < len(token_class) else 0]
        if state == len(transitions) - 1:
            return place
    return None


def token_bytes(tokenizer: "PreTrainedTokenizerBase") -> list[bytes]:
    """The UTF-8 bytes that each token is in a text, `[V]`; a token may be a part of a character.

    Raises:
      ValueError: for a tokenizer whose text is not that of its tokens one after the other.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"stop strings need a fast tokenizer of transformers, got {type(tokenizer).__name__}")
    decoder = json.dumps(json.loads(backend.to_str()).get("decoder"))
    alphabet = _byte_level_alphabet()

    def by_byte_level(token: str) -> bytes:
        known = all(character in alphabet for character in token)
        return bytes(alphabet[character] for character in token) if known else token.encode()

    def by_pieces(token: str) -> bytes:
        if '"ByteFallback"' in decoder and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()

    to_bytes = by_byte_level if '"ByteLevel"' in decoder else by_pieces
    tokens = tokenizer.convert_ids_to_tokens([*range(len(tokenizer))])
    texts = [b"" if token is None else to_bytes(token) for token in tokens]
    _check(tokenizer, texts)
    return texts


def _check(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[bytes]) -> None:
    """Compares with the tokenizer's own decoding, on tokens from all over the vocabulary after one that is a word."""
    before = next((i for i, text in enumerate(texts) if text.isalpha()), 0)
    pairs = [[before, i] for i in np.unique(np.linspace(0, len(texts) - 1, 1000, dtype=int)).tolist() if texts[i]]
    for pair, decoded in zip(pairs, tokenizer.batch_decode(pairs, clean_up_tokenization_spaces=False), strict=True):
        try:
            expected = (texts[pair[0]] + texts[pair[1]]).decode()
        except UnicodeDecodeError:  # a part of a character
            continue
        if decoded != expected:
            raise ValueError(
                "stop strings need a tokenizer whose text is that of its tokens one after the other; with this "
                f"{type(tokenizer).__name__} the tokens {pair} are {decoded!r}, and not {expected!r}"
            )


def _byte_level_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable characters of Latin-1 stand for themselves, the 68 other bytes, in order, for those from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
