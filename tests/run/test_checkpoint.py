import importlib.metadata
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax import checkpoint as ocp

from grpo_jax.run import checkpoint
from grpo_jax.types import TrainState

OPTIMIZER = optax.adamw(1e-2)
ROOT = pathlib.Path(__file__).parents[2]

# When one array of a broken checkpoint fails, Orbax closes its event loop while the others are still being read, and
# each of those then complains from a thread of its own.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:Exception ignored in. None(.|\n)*Event loop is closed:pytest.PytestUnraisableExceptionWarning"
)


def make_state(step: int = 2, *, reference: bool = True) -> TrainState:
    """One of each kind of leaf that a run may have."""
    params = {
        "layers": [{"w": jax.random.normal(jax.random.key(1), (64, 64))}, {"bias": jnp.ones((4,), jnp.bfloat16) / 3}],
        "absent": None,
        "empty": jnp.zeros((0, 3)),
        "odd/name..with [brackets]": jnp.float32(-0.0),
    }
    extra = {
        "nothing": (),
        "coefficient": jnp.asarray(0.3),  # weakly typed, as an unannotated number is
        "keys": jax.random.split(jax.random.key(3, impl="rbg"), 2),
        "flags": jnp.array([True, False]),
        "small": jnp.arange(-3, 3).astype(jnp.int4),
        "codes": jnp.arange(16).astype(jnp.uint4),  # which Orbax cannot save
        "eighths": jnp.linspace(-1, 1, 9).astype(jnp.float8_e4m3fn),
        "committed": jax.device_put(jnp.arange(3), jax.devices()[0]),
    }
    ref_params = jax.tree.map(jnp.copy, params) if reference else None
    state = TrainState(params, OPTIMIZER.init(params), jax.random.key(0), jnp.int32(0), jnp.int32(0), ref_params)
    return state._replace(extra=extra, step=jnp.int32(step))


def raw(leaf: jax.Array) -> bytes:
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf).tobytes()


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        for fact in (lambda x: x.dtype, lambda x: x.shape, raw, lambda x: x.aval.weak_type, lambda x: x.committed):
            assert fact(a) == fact(b), jax.tree_util.keystr(path)


def save_steps(directory, *steps, meta=None, **settings):
    with checkpoint.manager(directory, **settings) as checkpoints:
        for step in steps:
            checkpoint.save(checkpoints, make_state(step), meta or {})


def restore(directory, like=None, **settings):
    with checkpoint.manager(directory, read_only=True) as checkpoints:
        return checkpoint.restore(checkpoints, make_state() if like is None else like, **settings)


def flip(path: pathlib.Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def data_file(directory: pathlib.Path, step: int) -> pathlib.Path:
    """The file that holds the weights; they are random, thus not compressed, and fill the middle of it."""
    file = max((directory / str(step) / "state").rglob("d/*"), key=lambda file: file.stat().st_size)
    assert file.stat().st_size > 0.9 * make_state().params["layers"][0]["w"].nbytes
    return file


def break_step(directory: pathlib.Path, step: int) -> None:
    file = data_file(directory, step)
    flip(file, file.stat().st_size // 2)


def test_a_restored_state_is_the_saved_one_to_the_bit(tmp_path):
    save_steps(tmp_path, 2, meta={"config": {"name": "tiny", "sizes": [1, 2]}})
    state, meta = restore(tmp_path)
    assert_same(state, make_state())
    assert meta == {"config": {"name": "tiny", "sizes": [1, 2]}}


def test_restores_into_shapes_as_well_as_into_arrays(tmp_path):
    save_steps(tmp_path, 2)
    like = make_state()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
    state, _ = restore(tmp_path, shapes._replace(ref_params=like.ref_params))
    assert [raw(leaf) for leaf in jax.tree.leaves(state)] == [raw(leaf) for leaf in jax.tree.leaves(like)]
    assert not any(leaf.committed for leaf in jax.tree.leaves(state.params))
    with pytest.raises(ValueError, match="ref_params/empty was not written, so `like` must hold its array"):
        restore(tmp_path, shapes)


def test_training_on_from_a_restored_state_is_training_on_from_the_saved_one(tmp_path):
    @jax.jit
    def step(state):
        w = state.params["layers"][0]["w"]
        gradient = jax.tree.map(jnp.ones_like, state.params)
        noise = jax.random.normal(jax.random.fold_in(state.key, state.step), w.shape, jnp.bfloat16)
        gradient["layers"][0]["w"] = w + (state.extra["coefficient"] * noise)  # other bits if not weakly typed
        updates, opt_state = OPTIMIZER.update(gradient, state.opt_state, state.params)
        extra = state.extra | {"coefficient": state.extra["coefficient"] * 0.9}
        params = optax.apply_updates(state.params, updates)
        return state._replace(params=params, opt_state=opt_state, extra=extra, step=state.step + 1)

    state = step(make_state())
    with checkpoint.manager(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state, {})
    restored, _ = restore(tmp_path)
    assert_same(step(step(restored)), step(step(state)))


def test_no_copy_of_the_state_stays_on_the_host_after_a_save(tmp_path):
    state = make_state()
    with checkpoint.manager(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state, {})
    assert all(leaf._npy_value is None for leaf in jax.tree.leaves((state.params, state.opt_state, state.ref_params)))


def test_numbers_that_are_not_yet_arrays_are_saved_as_the_arrays_that_jit_makes_of_them(tmp_path):
    state = make_state()._replace(extra={"python": 0.5, "numpy": np.arange(3.0)})
    with checkpoint.manager(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state, {})
    restored, _ = restore(tmp_path, state)
    assert_same(restored.extra, jax.jit(lambda x: x)(state.extra))


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    with checkpoint.manager(tmp_path) as checkpoints:
        assert checkpoint.restore(checkpoints, make_state()) is None
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 2 .* only \[\]"):
            checkpoint.restore(checkpoints, make_state(), step=2)


def test_the_parameters_alone_are_those_of_the_state_to_the_bit(tmp_path):
    later = make_state(3)
    later = later._replace(params=jax.tree.map(lambda x: x + 1, later.params))
    with checkpoint.manager(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, make_state(2), {"model": "two"})
        checkpoint.save(checkpoints, later, {"model": "three"})
    assert_same(checkpoint.restore_params(tmp_path, make_state().params), later.params)
    shapes = jax.eval_shape(lambda: make_state().params)
    assert_same(checkpoint.restore_params(tmp_path, shapes, step=2), make_state().params)
    assert checkpoint.read_meta(tmp_path) == (3, {"model": "three"})
    assert checkpoint.read_meta(tmp_path, step=2) == (2, {"model": "two"})


def test_parameters_of_another_model_or_from_another_folder_are_refused(tmp_path):
    save_steps(tmp_path, 2)
    params = make_state().params
    with pytest.raises(ValueError, match=r"params/empty: saved float32\[0, 3\], wanted float32\[1\]"):
        checkpoint.restore_params(tmp_path, params | {"empty": jnp.zeros(1)})
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 4 in .*, only \[2\]"):
        checkpoint.restore_params(tmp_path, params, step=4)
    for folder in (tmp_path / "absent", tmp_path / "2"):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint in {folder}"):
            checkpoint.restore_params(folder, params)
        assert not (tmp_path / "absent").exists()


def test_the_newest_checkpoints_are_kept_and_a_step_can_be_asked_for(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, max_to_keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]
    assert int(restore(tmp_path)[0].step) == 4
    assert int(restore(tmp_path, step=3)[0].step) == 3
    with pytest.raises(FileNotFoundError, match=r"step 2 .* only \[3, 4\]"):
        restore(tmp_path, step=2)


def test_a_step_that_is_saved_already_is_refused(tmp_path):
    save_steps(tmp_path, 2, 4)
    with pytest.raises(FileExistsError, match="step 2 is saved already"):
        save_steps(tmp_path, 2)


def test_a_save_that_orbax_skips_is_an_error(tmp_path):
    save_steps(tmp_path, 2)
    with pytest.raises(RuntimeError, match="did not save step 4"):
        save_steps(tmp_path, 4, read_only=True)


def test_meta_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_steps(tmp_path, 2, meta={"loss": make_state})
    assert restore(tmp_path) is None


# The reference


def test_the_reference_is_not_written_while_it_is_the_initial_one(tmp_path):
    save_steps(tmp_path / "initial", 2)
    with checkpoint.manager(tmp_path / "changed") as checkpoints:
        checkpoint.save(checkpoints, make_state(), {}, initial=())
    names = {
        name: set(ocp.StandardCheckpointer().metadata(tmp_path / name / "2" / "state").item_metadata.tree)
        for name in ("initial", "changed")
    }
    assert names["changed"] - names["initial"] == {
        "ref_params/layers/0/w", "ref_params/layers/1/bias", "ref_params/odd/name..with [brackets]"
    }  # fmt: skip


def test_a_reference_that_changed_is_written_when_told_so(tmp_path):
    state = make_state()._replace(ref_params={"w": jnp.full((3,), 7.0)})
    with checkpoint.manager(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state, {}, initial=("frozen",))
    assert_same(restore(tmp_path, state._replace(ref_params={"w": jnp.zeros((3,))}))[0], state)


def test_a_reference_that_changed_unannounced_is_refused_at_the_next_save(tmp_path):
    save_steps(tmp_path, 2)
    moved = make_state(4)._replace(ref_params=jax.tree.map(lambda x: x + 1, make_state().params))
    with (
        checkpoint.manager(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=r"must be written, see `initial`: ref_params/layers/0/w, ref_params/layers/1"),
    ):
        checkpoint.save(checkpoints, moved, {})


def test_another_reference_than_the_initial_one_is_refused(tmp_path):
    save_steps(tmp_path, 2)
    like = make_state()
    like.ref_params["layers"][0]["w"] = like.ref_params["layers"][0]["w"].at[0, 0].add(1e-6)
    with pytest.raises(ValueError, match=r"ref_params/layers/0/w .* is not what the run began with"):
        restore(tmp_path, like)


# The base beside adapters


def over_a_base(step, frozen):
    """A state of which little is trained."""
    params = {"a": jax.random.normal(jax.random.key(step), (256, 16))}
    moments = jax.tree.map(lambda x: x + 1e-3 * params["a"] if x.ndim else x, OPTIMIZER.init(params))  # no zeros
    return TrainState(params, moments, jax.random.key(0), jnp.int32(step), jnp.int32(0), frozen=frozen)


def base():
    return {"w": jax.random.normal(jax.random.key(1), (512, 512)), "codes": jnp.arange(16).astype(jnp.uint4)}


def test_a_checkpoint_over_a_frozen_base_takes_the_bytes_of_what_is_trained_and_its_moments(tmp_path):
    frozen = base()
    with checkpoint.manager(tmp_path) as checkpoints:
        for step in (2, 4):
            checkpoint.save(checkpoints, over_a_base(step, frozen), {})
    for step in ("2", "4"):
        written = sum(file.stat().st_size for file in (tmp_path / step / "state").rglob("d/*"))
        assert written == pytest.approx(3 * 256 * 16 * 4, rel=0.1)
    assert_same(restore(tmp_path, over_a_base(0, frozen))[0], over_a_base(4, frozen))


def test_a_base_is_digested_once_while_it_is_the_same_arrays(tmp_path, monkeypatch):
    digested = []
    digest = checkpoint._digest
    monkeypatch.setattr(checkpoint, "_digest", lambda array: digested.append(array.shape) or digest(array))
    frozen = base()
    with checkpoint.manager(tmp_path) as checkpoints:
        for step in (2, 4, 6):
            checkpoint.save(checkpoints, over_a_base(step, frozen), {})
        assert digested.count((512, 512)) == 1
        with pytest.raises(ValueError, match="must be written, see `initial`: frozen/w"):
            checkpoint.save(checkpoints, over_a_base(8, frozen | {"w": frozen["w"] + 1}), {})


def test_adapters_are_not_restored_over_another_base(tmp_path):
    with checkpoint.manager(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, over_a_base(2, base()), {})
    other = base() | {"codes": jnp.arange(16)[::-1].astype(jnp.uint4)}
    with pytest.raises(ValueError, match="frozen/codes was not written, and that of `like` is not what the run began"):
        restore(tmp_path, over_a_base(0, other))


# Damage


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    directory = tmp_path_factory.mktemp("intact") / "checkpoints"
    save_steps(directory, 2, 4, meta={"config": {"seed": 0}})
    return directory


@pytest.fixture
def saved(intact, tmp_path):
    return pathlib.Path(shutil.copytree(intact, tmp_path / "checkpoints"))


def test_a_flipped_bit_anywhere_never_gives_another_state(saved):
    files = sorted(path for path in (saved / "4").rglob("*") if path.is_file())
    rng, noticed = np.random.default_rng(0), 0
    for file in files:
        original = file.read_bytes()
        for position in rng.choice(len(original), min(3, len(original)), replace=False):
            flip(file, position, int(rng.integers(8)))
            try:
                state, meta = restore(saved, make_state(4), step=4)
            except checkpoint.CheckpointCorruptError:
                noticed += 1
            else:
                assert_same(state, make_state(4))
                assert meta == {"config": {"seed": 0}}
            file.write_bytes(original)
    assert noticed > len(files) / 2  # the others hit what carries no number


def test_a_flipped_bit_in_the_numbers_is_noticed(saved):
    file = data_file(saved, 4)
    original = file.read_bytes()
    for position in range(len(original) // 4, len(original) * 3 // 4, 499):
        flip(file, position)
        with pytest.raises(checkpoint.CheckpointCorruptError, match="step 4"):
            restore(saved, step=4)
        file.write_bytes(original)


@pytest.mark.parametrize("damage", ["truncate", "empty", "remove"])
@pytest.mark.parametrize("file", ["numbers", "meta/metadata", "state/manifest.ocdbt"])
def test_a_broken_file_is_an_error_that_names_the_step(saved, file, damage):
    path = data_file(saved, 4) if file == "numbers" else saved / "4" / file
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "truncate" else 0])
    with pytest.raises(checkpoint.CheckpointCorruptError, match="step 4"):
        restore(saved, step=4)


@pytest.mark.parametrize("folder", ["meta", "state", "."])
def test_a_missing_folder_is_an_error_that_names_the_step(saved, folder):
    shutil.rmtree(saved / "4" / folder)
    (saved / "4").mkdir(exist_ok=True)
    with pytest.raises(checkpoint.CheckpointCorruptError, match="step 4"):
        restore(saved, step=4)


def test_a_flipped_bit_in_the_parameters_is_noticed_where_they_are_read_alone(saved):
    file = data_file(saved, 4)
    original, noticed = file.read_bytes(), 0
    for position in range(0, len(original), 997):
        flip(file, position)
        try:
            assert_same(checkpoint.restore_params(saved, make_state().params), make_state().params)
        except checkpoint.CheckpointCorruptError:
            noticed += 1
        file.write_bytes(original)
    assert noticed > 10  # the others hit the rest of the state


def test_falls_back_to_the_newest_checkpoint_that_verifies_and_says_so(saved):
    break_step(saved, 4)
    with pytest.warns(UserWarning, match=r"restored step 2, having passed over: step 4 \(") as warned:
        state, _ = restore(saved)
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)
    assert_same(state, make_state(2))


def test_a_run_that_fell_back_replaces_the_broken_checkpoint(saved):
    break_step(saved, 4)
    with checkpoint.manager(saved) as checkpoints:
        checkpoint.restore(checkpoints, make_state(), report=lambda line: None)
        checkpoint.save(checkpoints, make_state(3), {})
        checkpoint.save(checkpoints, make_state(4), {})
    assert_same(restore(saved)[0], make_state(4))


@pytest.mark.parametrize("folder", ["meta", "state", "."])
def test_a_checkpoint_with_a_missing_folder_is_replaced_too(saved, folder):
    shutil.rmtree(saved / "4" / folder)
    (saved / "4").mkdir(exist_ok=True)
    save_steps(saved, 4)
    assert_same(restore(saved)[0], make_state(4))


def test_says_when_no_checkpoint_verifies_rather_than_starting_anew(saved):
    for step in (2, 4):
        break_step(saved, step)
    with pytest.raises(checkpoint.CheckpointCorruptError, match=r"nothing to restore .*step 4 .*step 2"):
        restore(saved)


def test_what_a_killed_save_left_is_removed_by_a_run_and_not_by_a_reader(saved):
    leftover = saved / "6.orbax-checkpoint-tmp"
    shutil.copytree(saved / "4", leftover)
    assert int(restore(saved)[0].step) == 4
    assert leftover.exists()
    with checkpoint.manager(saved) as checkpoints:
        assert int(checkpoint.restore(checkpoints, make_state())[0].step) == 4
    assert not leftover.exists()


def test_a_full_disk_is_reported_by_the_save_itself_and_costs_no_earlier_checkpoint(saved):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with checkpoint.manager(saved) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
        try:
            with pytest.raises((OSError, ValueError), match=r"(?i)file too large"):
                checkpoint.save(checkpoints, make_state(6), {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_same(restore(saved)[0], make_state(4))


# Another state, other devices, other settings


def test_nothing_is_cast_and_every_offender_is_listed(saved):
    like = make_state()
    like.params["layers"][0]["w"] = like.params["layers"][0]["w"].astype(jnp.bfloat16)
    like.params["layers"][1]["bias"] = jnp.ones((5,), jnp.bfloat16)
    like.extra["new"] = like.extra.pop("flags")
    like = like._replace(key=jax.random.key(0, impl="rbg"))
    with pytest.raises(ValueError, match=r"step 4 in .* is of another state") as error:
        restore(saved, like)
    assert str(error.value).splitlines()[1:] == [
        "  extra/flags: saved bool[2], wanted (absent)",
        "  extra/new: saved (absent), wanted bool[2]",
        "  key: saved key<fry>[], wanted key<rbg>[]",
        "  params/layers/0/w: saved float32[64, 64], wanted bfloat16[64, 64]",
        "  params/layers/1/bias: saved bfloat16[4], wanted bfloat16[5]",
    ]


def test_leaves_that_share_a_name_are_refused(tmp_path):
    state = make_state()._replace(params={"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)})
    with (
        checkpoint.manager(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=r"share a name: \['params/a/b'\]"),
    ):
        checkpoint.save(checkpoints, state, {})


def test_other_library_versions_are_reported_as_not_bit_exact(saved, monkeypatch):
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "optax" else installed(name))
    lines = []
    restore(saved, report=lines.append)
    assert lines == [f"not bit-exact from step 4 on: optax {installed('optax')} -> 9.9"]


RESHARD = """
import pathlib, sys
import jax, jax.numpy as jnp, numpy as np, optax
from grpo_jax.run import checkpoint
from grpo_jax.types import TrainState

def make(devices):
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    params = {"w": jax.device_put(jax.random.normal(jax.random.key(0), (12, 2)), sharding)}
    return TrainState(params, optax.sgd(1.0).init(params), jax.random.key(0), jnp.int32(2), jnp.int32(0)), sharding

state, _ = make(4)
with checkpoint.manager(sys.argv[1]) as checkpoints:
    checkpoint.save(checkpoints, state, {})
    like, sharding = make(2)
    lines = []
    restored, _ = checkpoint.restore(checkpoints, like, report=lines.append)
assert lines == ["not bit-exact from step 2 on: mesh {'data': 4} -> {'data': 2}"], lines
assert restored.params["w"].sharding == sharding
assert np.array_equal(restored.params["w"], state.params["w"])
jax.jit(lambda s: s.params["w"] * s.step)(restored)  # `step` was not committed to a device, and still is not
"""


@pytest.mark.slow
def test_restores_the_same_bits_onto_other_devices_and_says_that_the_run_will_differ(tmp_path):
    environment = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run([sys.executable, "-c", RESHARD, tmp_path / "run"], env=environment, check=True)
    params = {"w": jax.random.normal(jax.random.key(0), (12, 2))}
    state = TrainState(params, optax.sgd(1.0).init(params), jax.random.key(0), jnp.int32(2), jnp.int32(0))
    here = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    with pytest.warns(UserWarning, match=rf"not bit-exact from step 2 on: devices 4 x cpu -> {here}, mesh"):
        assert_same(restore(tmp_path / "run", state)[0], state)


def test_parts_have_digests_of_their_own_by_which_a_whole_array_is_verified(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    parts = {f"{i}:{i + 2},0:3": checkpoint._digest(array[i : i + 2]) for i in (0, 2)}
    assert checkpoint._is_as_saved(array, {"parts": parts})
    broken = array.copy()
    broken[3, 1] = 0
    assert not checkpoint._is_as_saved(broken, {"parts": parts})
    merged = checkpoint._merged(
        [
            {"w": {"parts": {"0:2,0:3": "a"}}, "b": {"sha256": "c"}},
            {"w": {"parts": {"2:4,0:3": "d"}}, "b": {"sha256": "c"}},
        ]
    )
    assert merged == {"w": {"parts": {"0:2,0:3": "a", "2:4,0:3": "d"}}, "b": {"sha256": "c"}}


CONFIG = {"seed": 0, "optimizer": {"learning_rate": 1e-6, "b1": 0.9}, "sizes": (1, 2), "name": None}


def test_an_unchanged_config_passes_after_its_way_through_json():
    assert checkpoint.check_config({**CONFIG, "sizes": [1, 2]}, CONFIG) == {}


def test_another_spelling_of_a_path_is_no_change(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    for spelled in ("model/", "./model", str(tmp_path / "model"), "other/../model"):
        assert checkpoint.check_config({"model": "model"}, {"model": spelled}) == {}
    with pytest.raises(ValueError, match=r"another folder:\n  model: 'model' -> 'other'"):
        checkpoint.check_config({"model": "model"}, {"model": "other"})


def test_a_changed_config_is_refused_with_each_field_and_both_values():
    changed = {"seed": 1, "optimizer": {"learning_rate": 2e-6, "b1": 0.9}, "sizes": (1, 3), "beta": 0.1}
    with pytest.raises(ValueError, match="the configuration is not the checkpoint's") as error:
        checkpoint.check_config(CONFIG, changed)
    assert str(error.value).splitlines()[1:] == [
        "  beta: '(absent)' -> 0.1",
        "  name: None -> '(absent)'",
        "  optimizer.learning_rate: 1e-06 -> 2e-06",
        "  seed: 0 -> 1",
        "  sizes: [1, 2] -> [1, 3]",
    ]


@pytest.mark.parametrize("allowed", ["optimizer.learning_rate", "optimizer"])
def test_an_allowed_change_passes_and_is_returned_for_the_record(allowed):
    changed = CONFIG | {"optimizer": {"learning_rate": 2e-6, "b1": 0.9}}
    changes = {"optimizer.learning_rate": (1e-6, 2e-6)}
    assert checkpoint.check_config(CONFIG, changed, allow=(allowed,)) == changes
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        checkpoint.check_config(CONFIG, changed | {"seed": 1}, allow=(allowed,))


MEMORY = """
import pathlib, sys
import jax, jax.numpy as jnp
from grpo_jax.run import checkpoint
from grpo_jax.types import TrainState

def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) / 1024

def growth(f):
    before = status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    f()
    return status("VmHWM") - before

params = [jax.random.normal(jax.random.key(i), (2**12, 2**12)) for i in range(8)]
state = TrainState(params, (), jax.random.key(0), jnp.int32(1), jnp.int32(0))
jax.block_until_ready(state)
with checkpoint.manager(sys.argv[1]) as checkpoints:
    print(growth(lambda: checkpoint.save(checkpoints, state, {})))
    print(growth(lambda: checkpoint.restore(checkpoints, state)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems tell a process less of its memory")
def test_a_save_holds_no_copy_of_the_state_and_a_restore_little_more_than_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "run"], env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    save, restore = map(float, done.stdout.split())  # MiB, of a state of 512
    print(f"save {save:.0f} MiB, restore {restore:.0f} MiB")
    assert save < 420
    assert restore < 1.8 * 512
