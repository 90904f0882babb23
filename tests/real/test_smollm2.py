"""SmolLM2-135M-Instruct, a language model that people use: `pytest -m real tests/real`.

What the tiny models of the other tests cannot show: the conversion, the tokenizer and the decoder on real weights.
tests/real/reference.safetensors holds the numbers of transformers in torch, made by make.py.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from grpo_jax import data, sampling
from grpo_jax.models import hf
from grpo_jax.scoring import score
from grpo_jax.types import Prompts

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("error")]  # CI runs notebooks beside them, which may warn


class Reference(NamedTuple):
    """See make.py."""

    tokens: np.ndarray  # [N, P]
    lengths: np.ndarray  # [N]
    logits: np.ndarray  # [N, K, V / 64], of float64
    log_normalizers: np.ndarray  # [N, K], of float64
    of_float32: np.ndarray  # [N, K, V / 64]
    greedy: np.ndarray  # [N, T]


REFERENCE = Reference(**safetensors.numpy.load_file(Path(__file__).parent / "reference.safetensors"))
END = 2  # <|im_end|>


@pytest.fixture(scope="module")
def model(smollm2):
    return hf.load_pretrained(smollm2, remat=False)


# Written down from a tokenizer that gives llama.cpp's check text the ids whose digest llama.cpp lists for SmolLM.
TEXTS = {
    "3.14 1969's 20 cats": [35, 30, 33, 36, 216, 33, 41, 38, 41, 506, 216, 34, 32, 7680],
    "I'll  add 42+7\n\n\t= ✅ 漢字": [
        57, 3060, 216, 803, 216, 36, 34, 27, 39, 1116, 197, 45, 4636, 246, 223, 17097, 137, 112, 36518,
    ],
    "<|im_start|>user\n9<|im_end|>": [1, 4093, 198, 41, 2],
}  # fmt: skip


def test_the_tokenizer_takes_each_digit_by_itself(smollm2):
    tokenizer = hf.load_tokenizer(smollm2)
    for text, ids in TEXTS.items():
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == text


def test_the_tokenizer_and_template_are_smollm2s(smollm2):
    tokenizer = hf.load_tokenizer(smollm2)
    assert len(tokenizer) == 49152
    assert hf.eos_ids(smollm2, tokenizer) == (END,)
    ids = data.encode_prompt(tokenizer, [{"role": "user", "content": "Is <|im_end|> 1 token?\n"}])
    text = tokenizer.decode(ids)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nIs <|im_end|> 1 token?\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(END) == 2  # what a user writes is no end of a turn


def test_the_folder_is_as_transformers_describes_the_file(smollm2):
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100_000.0}
    assert config["tie_word_embeddings"]
    assert sorted(path.name for path in smollm2.iterdir()) == [
        "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 4))
def last_logits(policy, params, tokens, lengths, count):
    """Logits `[N, count, V]` at the last tokens of each row."""
    N, P = tokens.shape
    first = jnp.ones((N,), jnp.int32)
    prompt_cache = policy.prefill(params, tokens[:, :1], first)
    positions = jnp.broadcast_to(jnp.arange(P), (N, 1, P))
    hidden, _ = policy.extend(params, tokens[:, None], positions, prompt_cache)
    places = lengths[:, None] - count + jnp.arange(count)
    return policy.unembed(params, jnp.take_along_axis(hidden[:, 0], places[..., None], axis=1))


def test_logits_are_those_of_float64_to_rounding(model):
    policy, params = model
    actual = last_logits(policy, params, REFERENCE.tokens, REFERENCE.lengths, REFERENCE.logits.shape[1])
    logits = actual[..., ::64]
    ours, theirs = (np.max(np.abs(x - REFERENCE.logits)) for x in (logits, REFERENCE.of_float32))
    between, largest = np.max(np.abs(logits - REFERENCE.of_float32)), np.max(np.abs(REFERENCE.logits))
    print(f"from float64 {ours:.1e}, of transformers {theirs:.1e}, between {between:.1e}, logits up to {largest:.1f}")
    assert ours < 3e-4
    np.testing.assert_allclose(jax.nn.logsumexp(actual, axis=-1), REFERENCE.log_normalizers, rtol=0, atol=3e-4)


def test_greedy_completions_are_those_of_transformers(model):
    policy, params = model
    T = REFERENCE.greedy.shape[1]
    sampler = sampling.greedy(max_tokens=T, eos_ids=(END,))
    prompts = Prompts(jnp.asarray(REFERENCE.tokens), jnp.asarray(REFERENCE.lengths))
    rollout = jax.jit(sampler, static_argnums=0)(policy, params, prompts, jax.random.key(0))
    for n, length in enumerate(rollout.lengths[:, 0]):
        np.testing.assert_array_equal(rollout.tokens[n, 0, :length], REFERENCE.greedy[n, :length])
        assert not REFERENCE.greedy[n, length:].any()


# Met were 3e-5 and 5e-6 in float32, 0.43 and 0.026 in bfloat16.
@pytest.mark.parametrize(("dtype", "largest", "mean"), [("float32", 2e-4, 2e-5), ("bfloat16", 1.0, 0.06)])
def test_the_sampler_gives_the_log_probs_of_the_scorer(smollm2, dtype, largest, mean):
    policy, params = hf.load_pretrained(smollm2, compute_dtype=dtype, remat=False)
    sampler = sampling.sampler(group_size=4, max_tokens=24, eos_ids=(END,))
    prompts = Prompts(jnp.asarray(REFERENCE.tokens), jnp.asarray(REFERENCE.lengths))
    rollout = jax.jit(sampler, static_argnums=0)(policy, params, prompts, jax.random.key(1))
    scored = score(policy, params, rollout, entropy=False).log_probs
    differences = np.abs(np.asarray(scored - rollout.log_probs))[np.asarray(rollout.mask)]
    print(f"{dtype}: {differences.size} tokens, largest {differences.max():.1e}, mean {differences.mean():.1e}")
    assert differences.size > 200
    assert differences.max() < largest
    assert differences.mean() < mean
