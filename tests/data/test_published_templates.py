"""The chat templates that models are published with, read from packages that carry them: TRL and axolotl."""

import importlib.metadata
import json

import pytest

from grpo_jax.data import encode_demonstration, encode_prompt, turn_end
from grpo_jax.models import hf

LLAMA = "<|begin_of_text|> <|eot_id|> <|start_header_id|> <|end_header_id|> <|python_tag|> <|eom_id|>"
CHATML = "<|endoftext|> <|im_start|> <|im_end|>"
DEEPSEEK = "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜>"
GEMMA = "<bos> <eos> <start_of_turn> <end_of_turn>"
PHI = "<|endoftext|> <|end|> <|user|> <|assistant|> <|system|>"
EXAONE = "[BOS] [|endofturn|] [|user|] [|assistant|] [|system|]"
HARMONY = "<|startoftext|> <|return|> <|end|> <|start|> <|channel|> <|message|> <|call|>"
TEKKEN = "<s> </s> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CALLS] [AVAILABLE_TOOLS]"

PUBLISHED = {
    # package, file, kind of tokenizer, special tokens, beginning of sequence, end of sequence, what ends a turn
    "Qwen 2.5": ("trl", "qwen2_5", "bytes", CHATML, None, 2, "<|im_end|>"),
    "Qwen 2.5 base": ("axolotl", "qwen_25", "bytes", CHATML, None, 0, "<|im_end|>"),
    "Qwen 3": ("trl", "qwen3", "bytes", CHATML, None, 2, "<|im_end|>"),
    "Qwen 3 2507": ("trl", "qwen3_instruct_2507", "bytes", CHATML, None, 2, "<|im_end|>"),
    "Llama 3": ("trl", "llama3", "bytes", LLAMA, 0, 1, "<|eot_id|>"),
    "Llama 3.1": ("trl", "llama3_1", "bytes", LLAMA, 0, 1, "<|eot_id|>"),
    "Llama 3.2": ("trl", "llama3_2", "bytes", LLAMA, 0, 1, "<|eot_id|>"),
    "R1-Distill": ("trl", "deepseek_r1_distill", "bytes", DEEPSEEK, 0, 1, "<｜end▁of▁sentence｜>"),
    "DeepSeek V2": ("axolotl", "deepseek_v2", "bytes", DEEPSEEK, 0, 1, "<｜end▁of▁sentence｜>"),
    "Mistral v0.1": ("axolotl", "mistral_v1", "sentencepiece", "<s> </s>", 0, 1, "</s>"),
    "Mistral v0.3, Mixtral": ("axolotl", "mistral_v2v3", "sentencepiece", TEKKEN, 0, 1, "</s>"),
    "Mistral Nemo": ("axolotl", "mistral_v3_tekken", "bytes", TEKKEN, 0, 1, "</s>"),
    "Mistral Small 3": ("axolotl", "mistral_v7_tekken", "bytes", TEKKEN, 0, 1, "</s>"),
    "Gemma 2": ("trl", "gemma", "gemma", GEMMA, 0, 1, "<end_of_turn>"),
    "Gemma 3": ("trl", "gemma3", "gemma", GEMMA, 0, 1, "<end_of_turn>"),
    "Phi 3": ("trl", "phi3", "pairs", PHI, None, 0, "<|end|>"),
    "Phi 3.5": ("trl", "phi3_5", "pairs", PHI, None, 0, "<|end|>"),
    "Phi 4": ("axolotl", "phi_4", "bytes", f"{CHATML} <|im_sep|>", None, 2, "<|im_end|>"),
    "EXAONE 4": ("axolotl", "exaone4", "bytes", EXAONE, None, 1, "[|endofturn|]"),
    "gpt-oss": ("trl", "gptoss", "bytes", HARMONY, 0, 1, "<|return|>"),
}
WITHOUT_SYSTEM = {"Gemma 2"}
CHAT = [
    {"role": "user", "content": "hello\n"},
    {"role": "assistant", "content": "the answer is 4."},
    {"role": "user", "content": "  and 2+2?"},
]


def published(package, file):
    """The text of a template in an installed package, which is not imported."""
    try:
        files = importlib.metadata.files(package) or ()
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {package}, which carries the template, is not installed")
    (path,) = (path for path in files if path.name == f"{file}.jinja" and "templates" in str(path.parent))
    return path.locate().read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=PUBLISHED)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(model, build_tokenizer):
    package, file, kind, special, bos, eos, _ = PUBLISHED[model]
    return build_tokenizer(kind, special, bos, eos, published(package, file))


@pytest.fixture(scope="module")
def end(model, tokenizer):
    return tokenizer.convert_tokens_to_ids(PUBLISHED[model][-1])


def special(tokenizer, ids):
    return [i for i in ids if i in tokenizer.all_special_ids or i in tokenizer.added_tokens_decoder]


@pytest.mark.parametrize("turns", [1, 3])
def test_a_chat_has_the_tokens_that_transformers_makes_of_it(tokenizer, turns):
    messages = CHAT[:turns]
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=True)
    assert encode_prompt(tokenizer, messages) == expected


def test_a_system_message_is_written_or_refused_as_the_template_does(model, tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, *CHAT]
    if model in WITHOUT_SYSTEM:
        with pytest.raises(ValueError, match="the chat template refuses"):
            encode_prompt(tokenizer, messages)
    else:
        expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=True)
        assert encode_prompt(tokenizer, messages) == expected


def test_special_tokens_in_a_message_are_text(model, tokenizer):
    marks = "".join(PUBLISHED[model][3].split())
    ids = encode_prompt(tokenizer, [{"role": "user", "content": f"hello {marks} world"}])
    plain = encode_prompt(tokenizer, [{"role": "user", "content": "hello x world"}])
    assert special(tokenizer, ids) == special(tokenizer, plain)


def test_a_turn_ends_as_the_template_ends_it(model, tokenizer, end, tmp_path):
    assert turn_end(tokenizer) == end
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert hf.eos_ids(tmp_path, tokenizer, chat=True) == tuple(sorted({9, end, tokenizer.eos_token_id}))


def test_a_demonstration_is_the_chat_with_the_answer_up_to_the_end_of_its_turn(model, tokenizer, end):
    prompt, completion = encode_demonstration(tokenizer, CHAT[:1], "the answer is 4.", end=end)
    assert prompt == encode_prompt(tokenizer, CHAT[:1])
    assert completion[-1] == end
    assert completion.count(end) == 1
    text = tokenizer.decode(prompt + completion, clean_up_tokenization_spaces=False)
    assert text.endswith("the answer is 4." + PUBLISHED[model][-1])
    if model not in ("R1-Distill", "Phi 3"):  # one opens a thought that it doesn't write, the other strips white space
        whole = tokenizer.apply_chat_template(CHAT[:2], tokenize=False)
        assert whole.startswith(text)
