"""A sequence-classification checkpoint of transformers in torch, beside the same in JAX."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import transformers  # noqa: E402

from grpo_jax.models import hf  # noqa: E402
from grpo_jax.rewards.model import reward_model  # noqa: E402
from grpo_jax.testing import tiny_hf_config, tiny_tokenizer  # noqa: E402

PROMPTS = ["What is 2 + 3?", "Hi", "Tell me a long story about a cat and a dog.", "x"]
COMPLETIONS = [" It is 5.", " there", " Once.", ""]


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def checkpoint(request, tmp_path_factory):
    """A random model, and the folder that transformers saved it to."""
    folder, tokenizer = tmp_path_factory.mktemp(request.param), tiny_tokenizer()
    tokenizer.pad_token = "<|endoftext|>"
    config = tiny_hf_config(request.param, vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer, folder


def in_torch(model, ids):
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row])).logits[0, 0].item() for row in ids]


def test_scores_are_those_of_transformers_whatever_the_batch(checkpoint):
    model, tokenizer, folder = checkpoint
    texts = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    expected = in_torch(model, tokenizer(texts)["input_ids"])
    assert np.ptp(expected) > 0.01
    for batch_size in (1, 3, 8):
        actual = reward_model(folder, batch_size=batch_size, multiple=16)(PROMPTS, COMPLETIONS, answer=[1] * 4)
        np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_messages_go_through_the_models_own_template_and_long_texts_lose_their_start(checkpoint):
    model, tokenizer, folder = checkpoint
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    completions = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    text = [tokenizer.apply_chat_template(p + c, tokenize=False) for p, c in zip(prompts, completions, strict=True)]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    reward = reward_model(folder, batch_size=4, multiple=16)
    np.testing.assert_allclose(reward(prompts, completions), in_torch(model, ids), atol=2e-5)
    short = reward_model(folder, batch_size=4, max_tokens=9, multiple=9)(prompts, completions)
    np.testing.assert_allclose(short, in_torch(model, [row[-9:] for row in ids]), atol=2e-5)


def test_the_layers_compute_in_the_dtype_that_is_asked_for(checkpoint):
    _, _, folder = checkpoint
    exact, rounded = (
        np.array(reward_model(folder, batch_size=4, multiple=16, compute_dtype=dtype)(PROMPTS, COMPLETIONS))
        for dtype in ("float32", "bfloat16")
    )
    difference = np.abs(rounded - exact).max()
    assert 1e-4 < difference < 0.1 * np.ptp(exact) + 0.05


def test_a_model_without_the_head_is_refused(tmp_path):
    from grpo_jax.testing import tiny_checkpoint

    with pytest.raises(ValueError, match=r"score\.weight: missing, shape \[1, "):
        hf.load_reward_model(tiny_checkpoint(tmp_path / "causal"))
