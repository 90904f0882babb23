"""Configurations of published checkpoints: each is read, or refused with a message that says what to do.

tests/data/configs holds the values of their config.json that say something of the network, without token ids and notes.
The numbers of parameters are those that the checkpoints are published with. tests/parity/test_configs.py computes with
these configurations.
"""

import contextlib
import json
import math
import re
from pathlib import Path

import jax
import pytest

from grpo_jax import models
from grpo_jax.models.hf.folders import read_config
from grpo_jax.models.hf.layout import shapes_of
from grpo_jax.models.hf.reading import load_pretrained

FOLDER = Path(__file__).parents[1] / "data" / "configs"
REFUSED = {
    "google/gemma-2b-it": "model_type = 'gemma' is not supported",
    "microsoft/phi-2": "model_type = 'phi' is not supported",
    "deepseek-ai/DeepSeek-V3": "model_type = 'deepseek_v3' is not supported",
    "Qwen/Qwen2.5-7B-Instruct-1M": "dual_chunk_attention_config = {",
}
CHECKPOINTS = sorted(str(file.relative_to(FOLDER).with_suffix("")) for file in FOLDER.rglob("*.json"))
SEE_IMAGES = {"google/gemma-3-4b-it"}  # of which the language model is read
READ = [name for name in CHECKPOINTS if name not in REFUSED]
PARAMETERS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-2-9b-it": 9_241_705_984,
    "google/gemma-2-27b-it": 27_227_128_320,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-270m": 268_098_176,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "openai/gpt-oss-20b": 20_914_757_184,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 46_702_792_704,
}


def folder_of(name, tmp_path, **changes):
    """A folder with the checkpoint's config.json."""
    fields = json.loads((FOLDER / f"{name}.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


@pytest.mark.parametrize("name", READ)
def test_a_published_configuration_is_read_and_has_the_published_number_of_parameters(name, tmp_path):
    warns = pytest.warns(UserWarning, match="also sees images") if name in SEE_IMAGES else contextlib.nullcontext()
    with warns:
        config = read_config(folder_of(name, tmp_path))
    policy = models.decoder(models.from_hf_config(config))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes_of(policy)))
    print(f"{name}: {count:,}")
    assert count == PARAMETERS.get(name, count)


@pytest.mark.parametrize(("name", "message"), REFUSED.items())
def test_a_published_checkpoint_that_is_refused_says_why(name, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_pretrained(folder_of(name, tmp_path))
