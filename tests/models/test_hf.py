"""Checkpoints are read and written strictly: all or nothing, and every offender is named."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import transformers
from huggingface_hub.utils import filter_repo_objects
from jax.sharding import AbstractMesh

from grpo_jax import models
from grpo_jax.models import hf, sharding
from grpo_jax.models.hf import writing
from grpo_jax.models.hf.layout import leaves_of
from grpo_jax.models.hf.shards import read_shard
from grpo_jax.policies import from_logits_fn
from grpo_jax.testing import tiny_checkpoint, tiny_hf_config, tiny_tokenizer

FOLDER = Path(__file__).parents[1] / "golden" / "models"
CASES = sorted(folder.name for folder in FOLDER.iterdir() if folder.is_dir())
EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.0.mlp.up_proj.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"


def tensors_of(folder):
    """All tensors of a checkpoint, read by safetensors alone."""
    files = [file for file in sorted(folder.glob("*.safetensors")) if file.name != "reference.safetensors"]
    return {name: tensor for file in files for name, tensor in safetensors.numpy.load_file(file).items()}


def assert_bits_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
        assert actual[name].tobytes() == tensor.tobytes(), name


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a copy of a frozen checkpoint whose tensors `edit` has changed in place, in one file."""

    def write(edit=lambda tensors: None, case="qwen2", **config):
        folder = tmp_path / "checkpoint"
        shutil.copytree(FOLDER / case, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        fields = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(fields))
        tensors = tensors_of(FOLDER / case)
        edit(tensors)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint in two shards with an index; `edit(index)` changes the index."""

    def write(edit=lambda index: None, twice=()):
        folder = tmp_path / "sharded"
        folder.mkdir()
        shutil.copy(FOLDER / "qwen2" / "config.json", folder)
        tensors = tensors_of(FOLDER / "qwen2")
        names = sorted(tensors)
        parts = {"a.safetensors": names[:10] + list(twice), "b.safetensors": names[10:]}
        for file, part in parts.items():
            safetensors.numpy.save_file({name: tensors[name] for name in part}, folder / file)
        index = {"weight_map": {name: file for file, part in reversed(parts.items()) for name in part}}
        edit(index)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write


# Reading.


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_loaded_and_saved_holds_the_same_bits(case, tmp_path):
    fields = json.loads((FOLDER / case / "config.json").read_text())
    policy, params = hf.load_pretrained(FOLDER / case, dtype=fields.get("dtype") or fields["torch_dtype"])
    hf.save_pretrained(policy, params, tmp_path / "saved")
    assert_bits_equal(tensors_of(tmp_path / "saved"), tensors_of(FOLDER / case))


def test_every_offending_tensor_is_in_one_error(checkpoint):
    def edit(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.0.self_attn.k_proj.bias"]
        tensors[QUERY] = tensors[QUERY][:-1]
        tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(4, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float64)

    with pytest.raises(ValueError, match="does not hold the tensors of its config") as error:
        hf.load_pretrained(checkpoint(edit))
    assert str(error.value).split("\n  ")[1:] == [
        "model.layers.0.self_attn.k_proj.bias: missing, shape [8]",
        "model.norm.weight: missing, shape [16]",
        "lm_head.weight: dtype F64 instead of F32, BF16 or F16",
        "model.layers.0.self_attn.q_norm.weight: unexpected, shape [4]",
        "model.layers.1.self_attn.q_proj.weight: shape [15, 16] instead of [16, 16]",
        "model.layers.2.mlp.up_proj.weight: unexpected, shape [24, 16]",
    ]


def test_a_transposed_tensor_is_refused_though_it_has_as_many_numbers(checkpoint):
    def edit(tensors):
        tensors[UP] = np.ascontiguousarray(tensors[UP].T)

    with pytest.raises(ValueError, match=re.escape("shape [16, 24] instead of [24, 16]")):
        hf.load_pretrained(checkpoint(edit))


def test_stored_rotation_frequencies_are_passed_over(checkpoint):
    def edit(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    hf.load_pretrained(checkpoint(edit))


def test_an_untied_model_without_a_head_is_refused(checkpoint):
    with pytest.raises(ValueError, match=re.escape("lm_head.weight: missing, shape [31, 16]")):
        hf.load_pretrained(checkpoint(lambda tensors: tensors.pop("lm_head.weight")))


def test_a_stored_head_that_equals_the_embedding_it_is_tied_to_is_passed_over(checkpoint):
    def edit(tensors):
        tensors["lm_head.weight"] = tensors[EMBEDDING].copy()

    _, params = hf.load_pretrained(checkpoint(edit, case="qwen3"))
    assert "lm_head" not in params


@pytest.mark.parametrize("change", [lambda x: x + 1e-3, lambda x: x[:-1], lambda x: x.astype(np.float16)])
def test_a_stored_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(checkpoint, change):
    def edit(tensors):
        tensors["lm_head.weight"] = change(tensors[EMBEDDING])

    with pytest.raises(ValueError, match=re.escape(f"lm_head.weight: differs from {EMBEDDING}")):
        hf.load_pretrained(checkpoint(edit, case="qwen3"))


def test_shards_are_read_by_their_index(sharded):
    _, params = hf.load_pretrained(sharded())
    expected = hf.load_pretrained(FOLDER / "qwen2")[1]
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("file", ["../b.safetensors", "/tmp/b.safetensors", "x/b.safetensors", "b.bin", "..", 3])
def test_an_index_that_points_out_of_its_folder_or_to_other_files_is_refused(sharded, file):
    def edit(index):
        index["weight_map"][QUERY] = file

    with pytest.raises(ValueError, match=re.escape(f"names what is no safetensors file of its folder: ['{file}']")):
        hf.load_pretrained(sharded(edit))


def test_a_shard_that_is_not_there_is_named(sharded):
    folder = sharded()
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape("names files that are not there: ['b.safetensors']")):
        hf.load_pretrained(folder)


def test_a_tensor_in_two_shards_is_refused(sharded):
    with pytest.raises(ValueError, match=f"{QUERY}: in b.safetensors, where the index does not put it"):
        hf.load_pretrained(sharded(twice=[QUERY]))


def test_an_index_that_does_not_say_what_the_shards_hold_is_refused(sharded):
    def edit(index):
        index["weight_map"] |= {QUERY: "a.safetensors", EMBEDDING: "b.safetensors"}
        del index["weight_map"]["model.norm.weight"]

    with pytest.raises(ValueError, match="does not hold") as error:
        hf.load_pretrained(sharded(edit))
    lines = str(error.value).split("\n  ")
    for name, wrong, right in ((QUERY, "a", "b"), (EMBEDDING, "b", "a")):
        assert f"{name}: the index puts it in {wrong}.safetensors, where it is not" in lines
        assert f"{name}: in {right}.safetensors, where the index does not put it" in lines
    assert "model.norm.weight: missing, shape [16]" in lines


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_that_is_none_is_refused(sharded, content):
    folder = sharded()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="index"):
        hf.load_pretrained(folder)


def test_weights_that_are_there_both_whole_and_in_shards_are_refused(sharded):
    folder = sharded()
    (folder / "a.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(ValueError, match="holds both"):
        hf.load_pretrained(folder)


def damaged_files():
    whole = (FOLDER / "qwen2" / "model.safetensors").read_bytes()
    header_size = struct.unpack("<Q", whole[:8])[0]
    outside = {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}}
    header = json.dumps(outside).encode()
    return {
        "nothing": b"",
        "half a header": whole[: header_size // 2],
        "one byte short": whole[:-1],
        "bytes too many": whole + b"0",
        "a header longer than the file": struct.pack("<Q", 1 << 40) + whole[8:],
        "a header that is no JSON": whole[:8] + b"x" + whole[9:],
        "a tensor outside the file": struct.pack("<Q", len(header)) + header + bytes(16),
        "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }


@pytest.mark.parametrize("damage", damaged_files())
def test_a_damaged_file_is_named(checkpoint, damage):
    file = checkpoint() / "model.safetensors"
    file.write_bytes(damaged_files()[damage])
    with pytest.raises(ValueError, match=re.escape(f"{file} is no whole safetensors file")):
        hf.load_pretrained(file.parent)


class Bomb:
    """Runs a command if it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch unpickled",)


def test_a_pickle_is_never_opened_and_the_way_out_is_told(checkpoint, monkeypatch, tmp_path):
    import pickle

    monkeypatch.chdir(tmp_path)
    folder = checkpoint()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin.*pickle.*save_pretrained"):
        hf.load_pretrained(folder)
    assert not (tmp_path / "unpickled").exists()


def test_an_unsupported_config_is_refused_before_any_weight_is_read(checkpoint):
    folder = checkpoint(rope_scaling={"type": "dynamic", "factor": 2.0})
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="rope_type = 'dynamic'"):
        hf.load_pretrained(folder)


def test_code_of_a_checkpoint_is_never_run(checkpoint, tmp_path):
    """A family of ours loads without its code; another is refused rather than asked about."""
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    folder = checkpoint(auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": "code.T"})
    (folder / "code.py").write_text(code)
    hf.load_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text()) | {"model_type": "unheard_of"}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="trust_remote_code"):
        hf.load_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": [None, "code.T"]}}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        hf.load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


def test_what_is_neither_a_folder_nor_a_repository_is_said_to_be_so(tmp_path):
    for path in (tmp_path / "absent", "./absent", "a/b/c", "~/absent"):
        for load in (hf.load_pretrained, hf.load_tokenizer, hf.eos_ids):
            with pytest.raises(FileNotFoundError, match="neither a folder nor the id of a repository"):
                load(path)
    with pytest.raises(ValueError, match="is a folder and has no revision 'main'"):
        hf.load_pretrained(FOLDER / "qwen2", revision="main")


def test_of_a_repository_only_configs_safetensors_and_tokenizer_files_are_fetched(monkeypatch):
    asked = {}

    def snapshot_download(repo_id, **settings):
        asked.update(settings, repo_id=repo_id)
        return FOLDER / "qwen2"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    policy, _ = hf.load_pretrained("Qwen/Qwen2.5-0.5B", revision="abc")
    assert (policy.config.vocab_size, asked["repo_id"], asked["revision"]) == (31, "Qwen/Qwen2.5-0.5B", "abc")
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    wanted += ["merges.txt", "chat_template.jinja", "tokenizer.model", "generation_config.json"]
    others = ["pytorch_model.bin", "modeling.py", "consolidated.safetensors", "original/x.safetensors", "x.gguf"]
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(wanted + others, **patterns)) == wanted


def test_dtypes_are_those_asked_for():
    policy, params = hf.load_pretrained(
        FOLDER / "qwen2", dtype=jnp.float16, compute_dtype=jnp.bfloat16, logits_dtype=jnp.bfloat16, remat=False
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float16)}
    config = policy.config
    assert (config.param_dtype, config.dtype, config.logits_dtype) == (jnp.float16, jnp.bfloat16, jnp.bfloat16)
    assert not config.remat
    assert hf.load_pretrained(FOLDER / "qwen2", cache_dtype=jnp.bfloat16)[0].config.cache_dtype == jnp.bfloat16
    assert hf.load_pretrained(FOLDER / "qwen2", dtype=jnp.bfloat16)[0].config.dtype == jnp.bfloat16


@pytest.mark.parametrize("case", ["llama", "phi3", "mixtral", "gpt_oss"])
def test_parameters_larger_than_a_block_are_put_together_of_rows(case, monkeypatch):
    """Smaller ones, as all are here by themselves, are made on the host."""
    expected = hf.load_pretrained(FOLDER / case)[1]
    monkeypatch.setattr(hf.reading, "_BLOCK", 7 * 16)  # 7 rows of the embedding's 31, of a weight's 16
    jax.tree.map(np.testing.assert_array_equal, hf.load_pretrained(FOLDER / case)[1], expected)


@pytest.mark.parametrize("case", ["qwen3", "phi3", "mixtral", "gpt_oss"])
def test_each_device_of_a_mesh_is_given_its_part_of_every_parameter(case, monkeypatch):
    """Those of experts are divided by expert, of which a checkpoint has a tensor each or one of all."""
    policy, params = hf.load_pretrained(FOLDER / case)
    monkeypatch.setattr(hf.reading, "_BLOCK", 7 * 16)
    mesh = AbstractMesh((1, 2, 2), sharding.AXES)
    divided = 0
    with open(FOLDER / case / "model.safetensors", "rb") as file:
        shards = {"only": read_shard(file)}
        places = dict.fromkeys(shards["only"], "only")
        for leaf, array in zip(leaves_of(policy), jax.tree.leaves(params), strict=True):
            spec = sharding.spec(mesh, leaf.path, leaf.shape)
            divided += any(spec)
            for half in np.ndindex(*(2 if axis else 1 for axis in spec)):
                sizes = [n // 2 if axis else n for n, axis in zip(leaf.shape, spec, strict=False)]
                part = tuple(slice(i * size, (i + 1) * size) for i, size in zip(half, sizes, strict=True))
                part += (slice(None),) * (len(leaf.shape) - len(part))
                np.testing.assert_array_equal(hf.reading._part(leaf, shards, places, part, {}), array[part])
    assert divided > 5


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_are_put_where_they_belong_transposed_on_the_device_too(transposed):
    """Which is done on GPUs and TPUs."""
    rows = np.arange(6, dtype=np.float16).reshape(2, 3)
    expected = np.zeros((2, 4, 5), np.float32)
    placed, start = (rows.T, (1, 0, 3)) if transposed else (rows, (1, 2, 0))
    expected[1, start[1] : start[1] + placed.shape[0], start[2] : start[2] + placed.shape[1]] = placed
    np.testing.assert_array_equal(hf.reading._put(jnp.zeros((2, 4, 5)), rows, start, transposed), expected)


MEASURE = textwrap.dedent(
    """
    import sys, threading
    import jax
    from grpo_jax.models import hf

    def held():  # file pages that are mapped, such as the checkpoint's, do not count
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    def watch():
        global peak
        while not done.wait(0.0005):
            peak = max(peak, held())

    hf.load_pretrained(sys.argv[1])
    for _ in range(2):
        params = None
        before = peak = held()
        done = threading.Event()
        watcher = threading.Thread(target=watch)
        watcher.start()
        _, params = hf.load_pretrained(sys.argv[2])
        done.set()
        watcher.join()
        print(peak - before)
    """
)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_holds_at_most_the_params_and_twice_the_largest_tensor(tmp_path):
    """Measured 189 MB of 162 + 2 * 25: the params and blocks of 8 MB; the first time 21 MB more, for compiling."""
    sizes = {"vocab_size": 12000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12}
    policy = models.decoder(models.from_hf_config(tiny_hf_config("llama", head_dim=128, **sizes)))
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    hf.save_pretrained(policy, params, tmp_path / "large")
    command = [sys.executable, "-c", MEASURE, str(FOLDER / "llama"), str(tmp_path / "large")]
    # A fixed threshold: else glibc keeps freed blocks of up to 32 MB, and they would count as held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "JAX_PLATFORMS": "cpu"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    first, second = map(int, output.split())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(f"params {size / 1e6:.0f} MB, peak {first / 1e6:.0f} MB, the second time {second / 1e6:.0f} MB")  # pytest -rP
    bound = size + 2 * params["lm_head"].nbytes
    assert size < second <= bound
    assert first <= bound + 40_000_000


# Writing.


@pytest.fixture(scope="module")
def tiny():
    policy = models.decoder(models.from_hf_config(tiny_hf_config("qwen2", tie_word_embeddings=True)))
    return policy, jax.jit(policy.init)(jax.random.key(0))


def test_a_model_made_here_is_written_as_transformers_names_it(tiny, tmp_path):
    policy, params = tiny
    hf.save_pretrained(policy, params, tmp_path / "saved", eos_ids=[5])
    tensors = tensors_of(tmp_path / "saved")
    assert len(tensors) == 2 + 2 * 12  # embedding, norm; each layer 7 weights, 3 biases, 2 norms
    for layer in range(2):
        attention = params["layers"]["self_attn"]
        name = f"model.layers.{layer}.self_attn.q_proj"
        np.testing.assert_array_equal(tensors[f"{name}.weight"], attention["q_proj"]["kernel"][layer].T)
        np.testing.assert_array_equal(tensors[f"{name}.bias"], attention["q_proj"]["bias"][layer])
    np.testing.assert_array_equal(tensors[EMBEDDING], params["embed_tokens"]["embedding"])
    with safetensors.safe_open(tmp_path / "saved" / "model.safetensors", "numpy") as file:
        assert file.metadata()["format"] == "pt"  # transformers asks for it
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["Qwen2ForCausalLM"], "float32")
    generation = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 5]


def test_the_rotation_is_also_written_as_transformers_4_reads_it(tmp_path):
    policy, params = hf.load_pretrained(FOLDER / "llama_llama3")
    hf.save_pretrained(policy, params, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["rope_theta"] == 100.0
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["rope_scaling"]["factor"] == 8.0
    assert hf.load_pretrained(tmp_path / "saved")[0].config.rope == policy.config.rope


def test_a_saved_model_loads_to_the_same_policy_and_bits(tiny, tmp_path):
    policy, params = tiny
    hf.save_pretrained(policy, params, tmp_path / "once")
    again, loaded = hf.load_pretrained(tmp_path / "once")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    hf.save_pretrained(again, loaded, tmp_path / "twice")
    assert hf.load_pretrained(tmp_path / "twice")[0].config == again.config
    jax.tree.map(np.testing.assert_array_equal, hf.load_pretrained(tmp_path / "twice")[1], params)
    for file in ("config.json", "generation_config.json"):  # safetensors orders its metadata by chance
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()


def test_shards_are_no_larger_than_asked_and_load_to_the_same_bits(tiny, tmp_path):
    policy, params = tiny
    limit = 12_000
    hf.save_pretrained(policy, params, tmp_path / "whole")
    hf.save_pretrained(policy, params, tmp_path / "shards", max_shard_bytes=limit)
    files = sorted(file.name for file in (tmp_path / "shards").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    tensors = tensors_of(tmp_path / "shards")
    assert_bits_equal(tensors, tensors_of(tmp_path / "whole"))
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in files:
        held = safetensors.numpy.load_file(tmp_path / "shards" / file)
        assert sum(tensor.nbytes for tensor in held.values()) <= limit
        assert {name for name, place in index["weight_map"].items() if place == file} == held.keys()
    jax.tree.map(np.testing.assert_array_equal, hf.load_pretrained(tmp_path / "shards")[1], params)


def test_the_export_is_cast_to_the_dtype_asked_for(tiny, tmp_path):
    policy, params = tiny
    hf.save_pretrained(policy, params, tmp_path / "saved", dtype=jnp.bfloat16)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "saved").values()} == {jnp.dtype(jnp.bfloat16)}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    _, loaded = hf.load_pretrained(tmp_path / "saved")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), loaded, params)


def test_params_that_are_not_finite_are_not_written_and_refused_by_name_when_they_are_read(tiny, checkpoint, tmp_path):
    policy, params = tiny
    params = params | {"norm": {"scale": params["norm"]["scale"].at[3].set(jnp.nan)}}
    with pytest.raises(ValueError, match=r"NaN or infinite, in 1 parameters: norm/scale: nothing is written"):
        hf.save_pretrained(policy, params, tmp_path / "saved")
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e30), params)
    with pytest.raises(ValueError, match="NaN or infinite"):
        hf.save_pretrained(policy, params, tmp_path / "saved", dtype=jnp.float16)
    assert not (tmp_path / "saved").exists()

    def edit(tensors):
        for tensor in tensors.values():
            tensor[...] = np.nan

    with pytest.raises(ValueError, match=r"weights that are NaN or infinite, in \d+ tensors: .*earlier export"):
        hf.load_pretrained(checkpoint(edit))


@pytest.mark.parametrize("block", [7 * 16, 2**22], ids=["put together of rows", "made on the host"])
def test_a_weight_that_is_infinite_in_the_dtype_asked_for_is_refused_by_name(block, checkpoint, monkeypatch):
    monkeypatch.setattr(hf.reading, "_BLOCK", block)

    def edit(tensors):
        tensors[QUERY][3, 2] = 1e30

    folder = checkpoint(edit)
    hf.load_pretrained(folder)
    with pytest.raises(ValueError, match=f"NaN or infinite, in 1 tensors: {QUERY}"):
        hf.load_pretrained(folder, dtype=jnp.float16)


def test_the_same_params_give_the_same_bytes_with_the_modes_of_the_umask(tiny, tmp_path):
    before = os.umask(0o027)
    try:
        for name in ("a", "b", "c"):
            hf.save_pretrained(*tiny, tmp_path / name)
    finally:
        os.umask(before)
    files = sorted(os.listdir(tmp_path / "a"))
    for file in files:
        assert len({(tmp_path / name / file).read_bytes() for name in ("a", "b", "c")}) == 1
        assert (tmp_path / "a" / file).stat().st_mode & 0o777 == 0o640
    program = (
        "import sys; from grpo_jax.models import hf; hf.save_pretrained(*hf.load_pretrained(sys.argv[1]), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "a", tmp_path / "d"], check=True)
    assert (tmp_path / "d" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()


def test_an_export_keeps_the_sampling_settings_and_special_tokens_of_the_base(checkpoint, tmp_path):
    """R1-Distill's configs name another beginning of sequence in each of the two files."""
    folder = checkpoint(bos_token_id=3, eos_token_id=4, pad_token_id=None)
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "bos_token_id": 6, "pad_token_id": 8}
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [9, 4]}))
    policy, params = hf.load_pretrained(folder)
    hf.save_pretrained(policy, params, tmp_path / "saved", eos_ids=[5])
    written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert written == settings | {"eos_token_id": [4, 9, 5]}
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (3, 4, None)


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "renamed twice"])
def test_an_export_is_there_while_it_is_replaced(exchange, tiny, tmp_path, monkeypatch):
    policy, params = tiny
    path = tmp_path / "best"
    hf.save_pretrained(policy, params, path)
    if not exchange:
        monkeypatch.setattr(hf.replacing, "_exchange", lambda a, b: False)
    absent = []
    rename, rmtree = Path.rename, shutil.rmtree

    def watched(function):
        def call(*arguments, **settings):
            result = function(*arguments, **settings)
            absent.append(not (path / "model.safetensors").exists())
            return result

        return call

    monkeypatch.setattr(Path, "rename", watched(rename))
    monkeypatch.setattr(shutil, "rmtree", watched(rmtree))
    hf.save_pretrained(policy, jax.tree.map(jnp.zeros_like, params), path)
    assert any(absent) is not exchange
    assert os.listdir(tmp_path) == ["best"]
    assert not any(tensor.any() for tensor in tensors_of(path).values())


def test_what_killed_exports_have_left_is_deleted_and_what_they_put_aside_goes_back(tiny, tmp_path):
    policy, params = tiny
    hf.save_pretrained(policy, params, tmp_path / "best")
    kept = (tmp_path / "best" / "model.safetensors").read_bytes()
    for name in (f".best.{'a' * 32}", f".best.{'b' * 32}", f".other.{'a' * 32}", ".best.notes"):
        shutil.copytree(tmp_path / "best", tmp_path / name)
    (tmp_path / "best").rename(tmp_path / f".best.{'a' * 32}.replaced")
    with hf.replacing.replacing(tmp_path / "best"):
        assert (tmp_path / "best" / "model.safetensors").read_bytes() == kept
        names = os.listdir(tmp_path)
        assert len(names) == 4  # with the folder that is being written
        with hf.replacing._locked(next(tmp_path.glob(f".best.{'[0-9a-f]' * 32}"))) as dead:
            assert not dead  # which another process leaves alone
    assert sorted(os.listdir(tmp_path)) == [".best.notes", f".other.{'a' * 32}", "best"]


def test_messages_about_many_tensors_and_long_names_are_bounded(checkpoint):
    def edit(tensors):
        tensors |= {f"x{i}": np.ones(1, np.float32) for i in range(1000)} | {"y" * 100_000: np.ones(1, np.float32)}

    with pytest.raises(ValueError, match="and 981 more") as error:
        hf.load_pretrained(checkpoint(edit))
    assert len(str(error.value)) < 10_000


SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]


@pytest.mark.parametrize("size", [0, -1, 10**7, 2**31, 10**30, 1.5])
@pytest.mark.parametrize("field", [*SIZES, "num_key_value_heads"])
def test_a_size_that_is_none_is_refused_with_its_name(checkpoint, field, size):
    """Sizes that are too large for any memory, too: before anything is made of them."""
    with pytest.raises(ValueError, match=r"config|head") as error:
        hf.load_pretrained(checkpoint(case="llama", **{field: size}))
    assert len(str(error.value)) < 10_000


def test_a_field_that_is_a_note_refuses_no_model_and_another_says_what_to_do(checkpoint):
    notes = {"internal_version": "1.2", "_commit": "abc", "base_model_name": "x"}
    hf.load_pretrained(checkpoint(**notes))


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"logit_cap": 30.0}, r"If logit_cap of config.json changes nothing in .* delete it there"),
        ({"quantization_config": {"bits": 4}}, r"is quantised already, by an unnamed method"),
        ({"x" * 100_000: "y" * 100_000}, r"delete it there"),
    ],
)
def test_a_model_that_is_refused_says_what_to_do(checkpoint, fields, advice):
    with pytest.raises(ValueError, match=advice) as error:
        hf.load_pretrained(checkpoint(**fields))
    assert len(str(error.value)) < 2_000


def test_a_folder_without_a_config_is_told(checkpoint):
    folder = checkpoint()
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape("has no config.json, only ['model.safetensors'")):
        hf.load_pretrained(folder)


def test_the_end_of_a_chats_turn_is_among_the_end_tokens(checkpoint):
    """Qwen2.5's base models: the chat template ends turns with a token that no config names."""
    folder = checkpoint(eos_token_id=7)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    assert hf.eos_ids(folder, tokenizer) == (0, 7)
    assert hf.eos_ids(folder, tokenizer, chat=True) == (0, 2, 7)


def test_an_export_may_be_replaced_and_nothing_else_is_touched(tiny, tmp_path):
    policy, params = tiny
    path = tmp_path / "runs" / "model"
    path.mkdir(parents=True)  # empty, as a launcher makes it
    hf.save_pretrained(policy, params, path, max_shard_bytes=12_000)
    hf.save_pretrained(policy, jax.tree.map(jnp.zeros_like, params), path)
    assert all(not tensor.any() for tensor in tensors_of(path).values())
    assert sorted(os.listdir(path)) == ["config.json", "generation_config.json", "model.safetensors"]
    assert os.listdir(path.parent) == ["model"]  # nothing is left over
    before = (path / "model.safetensors").read_bytes()

    (path / "notes.md").write_text("mine")
    with pytest.raises(FileExistsError, match=re.escape("no export wrote: ['notes.md']")):
        hf.save_pretrained(policy, params, path)
    assert (path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("kind", ["a file", "a folder of notes", "a checkpoint of transformers"])
def test_what_no_export_wrote_is_not_replaced(kind, tiny, tmp_path):
    path = tmp_path / "model"
    if kind == "a file":
        path.write_text("mine")
    elif kind == "a folder of notes":
        path.mkdir()
        (path / "notes.json").write_text("{}")
    else:
        shutil.copytree(FOLDER / "qwen2", path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="was not written by an export"):
        hf.save_pretrained(*tiny, path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_save_that_fails_leaves_what_was_there(tiny, tmp_path, monkeypatch):
    policy, params = tiny
    hf.save_pretrained(policy, params, tmp_path / "model")
    before = tensors_of(tmp_path / "model")

    def full(*arguments, **settings):
        raise OSError("no space left on device")

    monkeypatch.setattr(writing, "write_shard", full)
    for name in ("model", "new"):
        with pytest.raises(OSError, match="no space left"):
            hf.save_pretrained(policy, jax.tree.map(jnp.zeros_like, params), tmp_path / name)
    assert os.listdir(tmp_path) == ["model"]
    assert_bits_equal(tensors_of(tmp_path / "model"), before)


def test_params_of_another_policy_are_refused(tiny, tmp_path):
    policy, params = tiny
    with pytest.raises(AssertionError):
        hf.save_pretrained(policy, params | {"lm_head": jnp.zeros((32, 61))}, tmp_path / "saved")
    with pytest.raises(AssertionError):
        hf.save_pretrained(policy, params | {"norm": {"scale": jnp.zeros(31)}}, tmp_path / "saved")
    other = from_logits_fn(lambda params, tokens, mask: tokens[..., None] * 1.0)
    with pytest.raises(ValueError, match="no Hugging Face config"):
        hf.save_pretrained(other, {}, tmp_path / "saved")
    assert not os.listdir(tmp_path)


# Tokenizers.


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_tiny_checkpoint_is_a_whole_folder_of_each_family(family, tmp_path):
    folder = tiny_checkpoint(tmp_path / family, family)
    policy, params = hf.load_pretrained(folder)
    tokenizer, original = hf.load_tokenizer(folder), tiny_tokenizer()
    text = original.apply_chat_template(
        [{"role": "user", "content": "What is 3 * 14?\n<answer>漢字</answer>"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == "<|im_start|>user\nWhat is 3 * 14?\n<answer>漢字</answer><|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokens == original.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.chat_template == original.chat_template
    assert policy.config.vocab_size == len(tokenizer) == params["embed_tokens"]["embedding"].shape[0]
    assert hf.eos_ids(folder) == tuple(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))


def test_end_tokens_are_those_of_generation_config_config_and_tokenizer_together(checkpoint):
    folder = checkpoint(eos_token_id=7)
    assert hf.eos_ids(folder) == (7,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 3]}')
    assert hf.eos_ids(folder) == (3, 7, 9)
    tokenizer = tiny_tokenizer()
    assert hf.eos_ids(folder, tokenizer) == tuple(sorted([3, 7, 9, tokenizer.eos_token_id]))
    tokenizer.save_pretrained(folder)
    assert hf.eos_ids(folder, also=[30]) == tuple(sorted([3, 7, 9, tokenizer.eos_token_id, 30]))


def test_a_completion_ends_with_the_token_asked_for_or_the_templates_or_the_tokenizers(checkpoint):
    folder = checkpoint(eos_token_id=7)
    tokenizer = tiny_tokenizer()
    text, start, turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.eos_token = tokenizer.unk_token = "<|endoftext|>"  # as of base models, and of GPT-2 and SmolLM2
    assert hf.completion_end(folder, tokenizer) == (text, (text, 7))
    assert hf.completion_end(folder, tokenizer, chat=True) == (turn, tuple(sorted((text, turn, 7))))
    assert hf.completion_end(folder, tokenizer, eos="<|endoftext|>", chat=True)[0] == text
    assert hf.completion_end(folder, tokenizer, eos="<|im_start|>") == (start, tuple(sorted((text, start, 7))))
    with pytest.raises(ValueError, match="'<end>' is no token of"):
        hf.completion_end(folder, tokenizer, eos="<end>")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "{{ end }}")
    assert hf.eos_ids(folder, tokenizer, chat=True, template={"end": "<|im_end|>"}) == tuple(sorted((text, turn, 7)))
    tokenizer.eos_token = None
    assert hf.completion_end(folder, tokenizer) == (7, (7,))
    fields = json.loads((folder / "config.json").read_text()) | {"eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(fields))
    assert hf.completion_end(folder, tokenizer, eos="<|im_end|>") == (turn, (turn,))


def test_a_model_without_an_end_token_asks_for_one(checkpoint, tiny, tmp_path):
    folder = checkpoint(eos_token_id=None)
    with pytest.raises(ValueError, match="name an end-of-sequence token: put an eos_token_id into"):
        hf.eos_ids(folder)
    assert hf.eos_ids(folder, also=[4]) == (4,)
    hf.save_pretrained(*hf.load_pretrained(folder), tmp_path / "saved")
    assert not (tmp_path / "saved" / "generation_config.json").exists()


def test_a_tokenizer_without_a_pad_token_is_loaded_as_it_is(tmp_path):
    tokenizer = tiny_tokenizer()
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    bare.save_pretrained(tmp_path)
    loaded = hf.load_tokenizer(tmp_path)
    assert (loaded.pad_token, loaded.eos_token, len(loaded)) == (None, None, len(tokenizer))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens, the model only 61"):
        hf.save_pretrained(*tiny, tmp_path / "saved", tokenizer=tiny_tokenizer())
    assert not os.listdir(tmp_path)
