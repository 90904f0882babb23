"""GGUF files made here by the package gguf, of a tiny model; the real one is in tests/real."""

import json

import numpy as np
import pytest
import safetensors.numpy

from grpo_jax.models import hf

gguf = pytest.importorskip("gguf")

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}
HEADS = {"q_proj": 4, "k_proj": 2}
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tag>", *"0123456789abĠ", "ab", "12", "Ġa"]
KINDS = [3, 3, 3, 4] + [1] * (len(TOKENS) - 4)
METADATA = {
    "llama.vocab_size": len(TOKENS),
    "llama.context_length": 128,
    "llama.embedding_length": 32,
    "llama.block_count": 2,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.dimension_count": 8,
    "llama.rope.freq_base": 5e4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": KINDS,
    "tokenizer.ggml.merges": ["a b", "1 2", "Ġ a"],
    "tokenizer.ggml.add_space_prefix": False,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
}


def gguf_name(name):
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def in_llama_cpps_order(name, tensor):
    """As its conversion orders the rows of queries and keys: the two halves of a head, a row of each in turn."""
    module = name.split(".")[-2]
    if module not in HEADS:
        return tensor
    halves = tensor.reshape(HEADS[module], 2, -1, tensor.shape[-1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(tensor.shape)


def random_tensors(tied):
    """By the names of transformers."""
    rng = np.random.default_rng(0)
    shapes = {
        "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32), "mlp.gate_proj": (64, 32), "mlp.up_proj": (64, 32), "mlp.down_proj": (32, 64),
        "input_layernorm": (32,), "post_attention_layernorm": (32,),
    }  # fmt: skip
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in shapes.items()}
    shapes |= {"model.embed_tokens.weight": (len(TOKENS), 32), "model.norm.weight": (32,)}
    shapes |= {} if tied else {"lm_head.weight": (len(TOKENS), 32)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def write(tmp_path):
    """Writes a GGUF file and gives it with its tensors; `replaced` of the metadata, None to leave out."""

    def write(replaced=None, *, architecture="llama", extra=None, kind=None, tied=True):
        tensors, file = random_tensors(tied), tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(file, architecture)
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        for name, value in (METADATA | (replaced or {})).items():
            if value is not None:
                add.get(type(value), writer.add_array)(name, value)
        for name, tensor in (tensors | (extra or {})).items():
            stored = in_llama_cpps_order(name, tensor)
            if kind is not None and stored.ndim == 2:
                writer.add_tensor(gguf_name(name), gguf.quantize(stored, kind), raw_dtype=kind)
            else:
                writer.add_tensor(gguf_name(name), stored)
        for finish in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            finish()
        writer.close()
        return file, tensors

    return write


@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_holds_the_weights_by_their_names_and_in_transformers_order(write, tmp_path, tied):
    file, tensors = write(tied=tied)
    folder = hf.convert_gguf(file, tmp_path / "converted")
    held = safetensors.numpy.load_file(folder / "model.safetensors")
    assert held.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(held[name], tensor, err_msg=name)
    policy, _ = hf.load_pretrained(folder)
    assert policy.config.rms_norm_eps == 1e-5  # and not 0.00000999999974, as float32 has it
    assert policy.config.tie_embeddings == tied
    assert (policy.config.num_heads, policy.config.num_kv_heads, policy.config.head_dim) == (4, 2, 8)
    assert json.loads((folder / "config.json").read_text())["rope_parameters"]["rope_theta"] == 5e4
    hf.convert_gguf(file, folder)  # an export may be replaced


def test_quantised_weights_are_what_they_stand_for(write, tmp_path):
    file, tensors = write(kind=gguf.GGMLQuantizationType.Q8_0)
    folder = hf.convert_gguf(file, tmp_path / "converted", dtype=np.float16)
    held = safetensors.numpy.load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        assert held[name].dtype == np.float16
        # 8 bits from the least to the largest of a block of 32, then float16.
        np.testing.assert_allclose(held[name], tensor, rtol=0, atol=np.abs(tensor).max() / 127 * 0.55, err_msg=name)
    assert any((held[name] != tensor.astype(np.float16)).any() for name, tensor in tensors.items())


def test_the_tokenizer_takes_digits_one_by_one_and_has_the_files_tokens_and_template(write, tmp_path):
    folder = hf.convert_gguf(write()[0], tmp_path / "converted")
    tokenizer = hf.load_tokenizer(folder)
    text = "ab12 a<|im_end|><tag>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert [TOKENS[i] for i in ids] == ["ab", "1", "2", "Ġa", "<|im_end|>", "<tag>"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab12 a<tag>"
    assert hf.eos_ids(folder, tokenizer) == (2,)
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a b"}], tokenize=False) == "a b"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "gemma3"}, "architecture 'gemma3' is not known, only 'llama'"),
        ({"replaced": {"llama.rope.scaling.factor": 8.0}}, r"nothing is known here of llama\.rope\.scaling"),
        ({"replaced": {"llama.rope.dimension_count": 4}}, "4 of the 8 numbers of a head are rotated"),
        ({"replaced": {"llama.rope.freq_base": None}}, r"does not say llama\.rope\.freq_base"),
        ({"replaced": {"tokenizer.ggml.pre": "llama-bpe"}}, "pre = llama-bpe"),
        ({"replaced": {"tokenizer.ggml.model": "llama"}}, "model = llama"),
        ({"replaced": {"tokenizer.ggml.add_bos_token": True}}, "add_bos_token = True"),
        ({"replaced": {"tokenizer.ggml.scores": [0.0]}}, "scores"),
        ({"replaced": {"tokenizer.ggml.token_type": [6, *KINDS[1:]]}}, r"of the kinds \[6\]"),
        ({"extra": {"rope_freqs.weight": np.ones(4, np.float32)}}, r"the tensor rope_freqs\.weight"),
        ({"extra": {"blk.0.attn_q.bias": np.ones(32, np.float32)}}, r"the tensor blk\.0\.attn_q\.bias"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(write, tmp_path, settings, message):
    file, _ = write(**settings)
    with pytest.raises(ValueError, match=message):
        hf.convert_gguf(file, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_a_file_that_is_cut_short_is_told(write, tmp_path, kept):
    file, _ = write()
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match="no whole GGUF file"):
        hf.convert_gguf(file, tmp_path / "converted")
