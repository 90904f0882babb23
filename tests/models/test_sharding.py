"""Where arrays lie on several devices, and that what is computed there is what one device computes."""

import dataclasses
import itertools
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from compiling import QUICKLY
from jax.sharding import AbstractMesh, PartitionSpec

from grpo_jax import data, models, testing
from grpo_jax.freezing import named_leaves
from grpo_jax.models import attention, lora, quantized, sharding
from grpo_jax.models.families import FAMILIES
from grpo_jax.scoring import score
from grpo_jax.types import Rollout

SCRIPT = pathlib.Path(__file__).parent / "on_eight_devices.py"


def abstract(data=1, fsdp=1, tensor=1):
    return AbstractMesh((data, fsdp, tensor), sharding.AXES)


# ------------------------------------------------------------------- the table


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_table_names_every_matrix_of_every_family(family):
    policy = testing.tiny_policy(family)
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    targets = sorted({path[-1] for path, _ in lora.linear_layers(policy, shapes)})  # experts, too
    settings = {"rank": 4, "targets": targets, "key": jax.random.key(0)}
    adapters, _ = jax.eval_shape(lambda params: lora.adapt(policy, params, **settings), shapes)
    for path, leaf in named_leaves(shapes) + named_leaves(adapters):
        stacked = path.startswith("layers/")
        found = sharding.spec(abstract(), path, leaf.shape)
        assert (found == PartitionSpec()) == (leaf.ndim - stacked < 2 and not path.endswith("bias")), path


def test_codes_and_scales_lie_as_their_kernel_does():
    shapes = jax.eval_shape(lambda k: quantized.quantize(testing.tiny_policy().init(k), "nf4"), jax.random.key(0))
    found = {path: sharding.spec(abstract(fsdp=2), path, leaf.shape) for path, leaf in named_leaves(shapes)}
    assert found["layers/mlp/up_proj/kernel/qvalue"] == PartitionSpec(None, "fsdp", "tensor")
    assert found["layers/mlp/up_proj/kernel/scale"] == PartitionSpec(None, None, "tensor")  # one tile of 32 weights
    assert sharding.spec(abstract(fsdp=2), "layers/mlp/experts_up/kernel/scale", (2, 8, 1, 16))[1] == "tensor"


def test_a_moment_lies_as_its_parameter_does_and_a_size_that_does_not_divide_stays_whole():
    path = "0/mu/layers/self_attn/q_proj/kernel"
    assert sharding.spec(abstract(fsdp=4, tensor=2), path, (2, 32, 48)) == PartitionSpec(None, "fsdp", "tensor")
    assert sharding.spec(abstract(fsdp=5, tensor=2), path, (2, 32, 48)) == PartitionSpec(None, None, "tensor")
    assert sharding.spec(abstract(fsdp=4, tensor=2), "layers/input_layernorm/scale", (2, 32)) == PartitionSpec()


@pytest.mark.parametrize(
    ("B", "G", "expected"),
    [
        (8, 4, (("data", "fsdp"), ())),
        (16, 1, (("data", "fsdp"), ())),
        (2, 4, (("data",), ("fsdp",))),
        (4, 3, (("data",), ())),
        (3, 4, ((), ("data",))),
        (1, 8, ((), ("data", "fsdp"))),
        (1, 1, ((), ())),
    ],
)
def test_rows_are_divided_by_prompts_and_else_by_completions(B, G, expected):
    assert sharding.rows(abstract(data=2, fsdp=4), B, G) == expected


class Chip:
    """As much of a TPU v5p's chip as says where in its slice it lies."""

    platform, device_kind, process_index, core_on_chip, slice_index = "tpu", "TPU v5", 0, 0, 0

    def __init__(self, number, coords):
        self.id, self.coords = number, coords


@pytest.mark.parametrize("sizes", [(1, 16, 4), (1, 32, 2), (2, 8, 4), (64, 1, 1)])
def test_a_mesh_is_laid_onto_the_axes_of_a_slice_and_splits_them_where_it_must(sizes):
    """JAX refuses a size that is no product of the slice's axes, as 32 and 2 on 4 x 4 x 4."""
    chips = [Chip(n, coords) for n, coords in enumerate(itertools.product(range(4), repeat=3))]
    found = sharding.mesh(**dict(zip(sharding.AXES, sizes, strict=True)), devices=chips).devices
    assert found.shape == sizes
    assert {chip.coords for chip in found.flat} == {chip.coords for chip in chips}


# ------------------------------------------------------------------- what is refused


def test_a_mesh_is_of_the_devices_there_are():
    with pytest.raises(ValueError, match="data=2, fsdp=4, tensor=1 makes 8 devices and there are 1"):
        sharding.mesh(data=2, fsdp=4, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="each at least 1"):
        sharding.mesh(data=0, devices=jax.devices()[:1])
    assert dict(sharding.parse("fsdp=1, data=1", devices=jax.devices()[:1]).shape) == dict.fromkeys(sharding.AXES, 1)


@pytest.mark.parametrize("text", ["", "fsdp", "fsdp=two", "model=2", "fsdp=1,fsdp=1", "fsdp=-1"])
def test_what_is_no_mesh_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"is no mesh: .* as in data=2,fsdp=4"):
        sharding.parse(text)


@pytest.mark.parametrize(
    ("tensor", "N", "K", "copies"),
    [(1, 14, 2, 1), (2, 14, 2, 1), (4, 16, 2, 2), (8, 32, 8, 1), (16, 64, 8, 2), (4, 12, 6, 2)],
)
def test_key_value_heads_are_copied_until_they_divide(tensor, N, K, copies):
    assert attention.head_copies(tensor, N, K) == copies
    assert K * copies % tensor == 0


@pytest.mark.parametrize(("tensor", "N", "K"), [(4, 14, 2), (3, 32, 8)])
def test_heads_that_do_not_divide_are_refused_with_the_numbers(tensor, N, K):
    with pytest.raises(ValueError, match=rf"{N} query heads and {K} key-value heads .* tensor={tensor}"):
        attention.head_copies(tensor, N, K)


def test_rows_that_leave_devices_idle_are_refused_with_the_numbers():
    sharding.check_rows(abstract(data=2, fsdp=4), 2, 4)
    with pytest.raises(ValueError, match=r"4 prompts at a time x 3 completions .* data=2, fsdp=4"):
        sharding.check_rows(abstract(data=2, fsdp=4), 4, 3)


# ------------------------------------------------------------------- over devices


def scans(jaxpr):
    """The loops of a program, those within others included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from scans(inner)


@pytest.mark.parametrize(("family", "over_devices"), [("qwen3", True), ("mixtral", True), ("qwen3", False)])
def test_gradients_of_kernels_leave_the_loop_over_layers_in_the_dtype_that_they_are_computed_in(
    family, over_devices, monkeypatch
):
    """In float32 there, of all layers, they took more room than all else of learning in bfloat16. On one TPU, too."""
    config = testing.tiny_policy(family, dtype=jnp.bfloat16, vocab_size=72).config  # no other test has traced it
    mesh = sharding.mesh(devices=jax.devices()[:1]) if over_devices else None
    if not over_devices:
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    policy = models.decoder(dataclasses.replace(config, mesh=mesh))
    params = jax.eval_shape(policy.init, jax.random.key(0))
    prompts = data.make_prompts([[5, 6, 7]] * 2)
    tokens = jnp.full((2, 2, 4), 8)
    whole, nothing = jnp.full((2, 2), 4), jnp.zeros((2, 2, 4))
    rollout = Rollout(prompts, tokens, whole, jnp.ones_like(tokens, bool), nothing, jnp.zeros((2, 2), bool))
    program = jax.make_jaxpr(jax.grad(lambda params: score(policy, params, rollout).log_probs.sum()))(params)
    kernels = {leaf.shape for path, leaf in named_leaves(params) if path.endswith("kernel")}
    found = [x.aval.dtype for eqn in scans(program.jaxpr) for x in eqn.outvars if x.aval.shape in kernels]
    assert len(found) >= len(kernels)
    assert set(found) == {jnp.dtype(jnp.bfloat16)}


# ------------------------------------------------------------------- eight devices


ONE = (("step", "data=2,fsdp=2,tensor=2"),)
MORE = (
    ("attentions", "data=2,tensor=4"),
    ("experts and sinks", "data=2,fsdp=2,tensor=2"),
    ("experts, prompts that do not divide", "data=2,fsdp=2,tensor=2"),
    ("step", "data=2,fsdp=4"),
    ("sent", "data=2,fsdp=4"),
    ("step", "fsdp=2,tensor=4"),
    ("one prompt", "data=2,fsdp=2,tensor=2"),
    ("adapters over codes", "data=2,fsdp=2,tensor=2"),
    ("slots", "data=2,fsdp=2,tensor=2"),
    ("packed", "data=2,fsdp=4"),
)


@pytest.mark.parametrize("cases", [ONE, pytest.param(MORE, marks=pytest.mark.slow)], ids=["one", "more"])
def test_eight_devices_compute_what_one_does(cases):
    """In one process, whose output names the case that failed: they share its start and what one device computes."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {QUICKLY}",
    }
    command = [sys.executable, SCRIPT, *itertools.chain(*cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    assert "Involuntary full rematerialization" not in done.stderr


STEP = """
import sys
from grpo_jax import processes

with processes.joined(sys.argv[1], 4, int(sys.argv[2]), wait=60):
    import on_eight_devices

    on_eight_devices.step("data=2,fsdp=2", parts=1, beta=None, packed=True)
"""


@pytest.mark.slow
def test_a_packed_step_of_four_processes_is_that_of_one_device():
    with socket.create_server(("", 0)) as server:
        coordinator = f"127.0.0.1:{server.getsockname()[1]}"
    path = os.pathsep.join([str(SCRIPT.parents[2]), str(SCRIPT.parent)])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICKLY, "PYTHONPATH": path}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", STEP, coordinator, str(n)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for n in range(4)
    ]
    said = [process.communicate()[1] for process in started]  # one that fails ends the others
    assert [process.returncode for process in started] == [0] * 4, said
