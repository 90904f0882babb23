"""The path for TPUs, compiled by the TPU's own compiler, which needs no TPU (the extra `tpu`)."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / "for_a_tpu.py"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler, the extra tpu")
@pytest.mark.parametrize("axes", ["fsdp=1", "fsdp=2,tensor=2"])
def test_splash_attention_compiles_for_a_tpu_and_for_several(axes):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, SCRIPT, axes], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
