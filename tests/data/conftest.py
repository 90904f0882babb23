"""Small tokenizers of the kinds that models have, with chat templates of the shapes that models have."""

import functools

import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "What is the sum of these numbers? The answer is a number, and the assistant thinks before it answers.",
    "user assistant system model hello world please answer the question with one number 0 1 2 3 4 5 6 7 8 9",
    "Okay, so first I add the tens and then the ones. Wait, let me check that again.\n\nYes.",
]

LLAMA = """\
{{- bos_token }}
{%- set date_string = date_string if date_string is defined else strftime_now("%d %b %Y") %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if messages[0].role == "system" %}{{- messages[0].content | trim }}{% set messages = messages[1:] %}{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
{{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" + (message.content | trim) + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{%- endif %}"""

QWEN = """\
{%- if messages[0].role != "system" %}{{- "<|im_start|>system\\nYou are helpful.<|im_end|>\\n" }}{%- endif %}
{%- for message in messages %}
{{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}
{%- if enable_thinking is defined and not enable_thinking %}{{- "<think>\\n\\n</think>\\n\\n" }}{%- endif %}
{%- endif %}"""

THINKING = """\
{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == "assistant" and "</think>" in content and not loop.last %}
{%- set content = content.split("</think>")[-1].lstrip("\\n") %}
{%- endif %}
{{- "<|im_start|>" + message.role + "\\n" + content + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n<think>\\n" }}{%- endif %}"""

R1 = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == "user" %}{{- "<|User|>" + message.content }}{%- endif %}
{%- if message.role == "assistant" %}
{{- "<|Assistant|>" + message.content.split("</think>")[-1] + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|Assistant|><think>\\n" }}{%- endif %}"""

MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == "user" %}{{- "[INST] " + message.content + " [/INST]" }}
{%- elif message.role == "assistant" %}{{- " " + message.content.strip() + eos_token }}
{%- else %}{{- raise_exception("Only user and assistant roles are supported!") }}{%- endif %}
{%- endfor %}"""

GEMMA = """\
{{- bos_token }}
{%- for message in messages %}
{%- set role = "model" if message.role == "assistant" else message.role %}
{{- "<start_of_turn>" + role + "\\n" + (message.content | trim) + "<end_of_turn>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<start_of_turn>model\\n" }}{%- endif %}"""

PHI4 = """\
{%- for message in messages %}{{- "<|" + message.role + "|>" + message.content + "<|end|>" }}{%- endfor %}
{%- if add_generation_prompt %}{{- "<|assistant|>" }}{%- else %}{{- eos_token }}{%- endif %}"""

PHI3 = """\
{%- for message in messages %}{{- "<|" + message.role + "|>\n" + message.content + "<|end|>\n" }}{%- endfor %}
{%- if add_generation_prompt %}{{- "<|assistant|>\n" }}{%- else %}{{- eos_token }}{%- endif %}"""

GRANITE = """\
{%- if messages[0].role != "system" %}
{{- "<|start_of_role|>system<|end_of_role|>You are helpful.<|end_of_text|>\n" }}
{%- endif %}
{%- for message in messages %}
{{- "<|start_of_role|>" + message.role + "<|end_of_role|>" + message.content + "<|end_of_text|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start_of_role|>assistant<|end_of_role|>" }}{%- endif %}"""

# OLMo 2 and 3: turns begin with text that is no special token, and one token is both ends of a sequence.
OLMO = """\
{{- bos_token }}
{%- for message in messages %}
{{- "<|" + message.role + "|>\n" + message.content }}
{%- if message.role == "assistant" %}{{- eos_token }}{%- endif %}
{%- if not (loop.last and message.role == "assistant") %}{{- "\n" }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|assistant|>\n" }}{%- endif %}"""

# SmolLM 3: the mode of thinking is in the system's turn, and without it answers begin with empty thoughts.
SMOLLM3 = """\
{%- set thinks = enable_thinking if enable_thinking is defined else true %}
{{- "<|im_start|>system\n## Metadata\n\nReasoning Mode: " + ("/think" if thinks else "/no_think") + "\n" }}
{%- if messages[0].role == "system" %}{{- messages[0].content }}{% set messages = messages[1:] %}{%- endif %}
{{- "<|im_end|>\n" }}
{%- for message in messages %}
{{- "<|im_start|>" + message.role + "\n" }}
{%- if message.role == "assistant" and not thinks %}{{- "<think>\n\n</think>\n" }}{%- endif %}
{{- message.content + "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|im_start|>assistant\n" + ("" if thinks else "<think>\n\n</think>\n") }}
{%- endif %}"""

# EXAONE 4: unless it is to think, an answer begins after empty thoughts.
EXAONE = """\
{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == "assistant" and not loop.last %}
{%- set content = content.split("</think>")[-1].lstrip("\n") %}
{%- endif %}
{{- "[|" + message.role + "|]\n" + content + "[|endofturn|]\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "[|assistant|]\n<think>\n" }}
{%- if enable_thinking is not defined or not enable_thinking %}{{- "\n</think>\n\n" }}{%- endif %}
{%- endif %}"""

# gpt-oss: the last turn of an assistant ends in another token than earlier ones, and what it says has a channel.
HARMONY = """\
{{- "<|start|>system<|message|>You are helpful. Reasoning: " + (reasoning_effort or "medium") + "<|end|>" }}
{%- for message in messages %}
{%- if message.role == "assistant" %}
{{- "<|start|>assistant<|channel|>final<|message|>" + message.content }}
{{- "<|return|>" if loop.last and not add_generation_prompt else "<|end|>" }}
{%- else %}{{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start|>assistant" }}{%- endif %}"""

TOKENIZERS = {
    # kind, special tokens, beginning of sequence, end of sequence, template
    "llama": ("bytes", "<|begin_of_text|> <|eot_id|> <|start_header_id|> <|end_header_id|>", 0, 1, LLAMA),
    "qwen": ("bytes", "<|endoftext|> <|im_start|> <|im_end|>", None, 0, QWEN),
    "thinking": ("bytes", "<|endoftext|> <|im_start|> <|im_end|>", None, 2, THINKING),
    "r1": ("bytes", "<|begin|> <|end|> <|User|> <|Assistant|>", 0, 1, R1),
    "mistral": ("sentencepiece", "<s> </s>", 0, 1, MISTRAL),
    "gemma": ("gemma", "<bos> <eos> <start_of_turn> <end_of_turn>", 0, 1, GEMMA),
    "phi4": ("bytes", "<|endoftext|> <|end|> <|user|> <|assistant|> <|system|>", None, 0, PHI4),
    "phi3": ("pairs", "<s> <|endoftext|> <|end|> <|user|> <|assistant|> <|system|>", 0, 1, PHI3),
    "granite": ("bytes", "<|end_of_text|> <|start_of_role|> <|end_of_role|>", None, 0, GRANITE),
    "olmo": ("bytes", "<|endoftext|>", 0, 0, OLMO),
    "smollm3": ("bytes", "<|begin_of_text|> <|im_start|> <|im_end|>", None, 2, SMOLLM3),
    "exaone": ("bytes", "[BOS] [|endofturn|] [|user|] [|assistant|] [|system|]", None, 1, EXAONE),
    "harmony": ("bytes", "<|endoftext|> <|return|> <|end|> <|start|> <|channel|> <|message|>", None, 1, HARMONY),
}


def template_processor(bos, eos):
    """What a tokenizer adds to a text: `bos` and `eos` are tokens and ids, or None."""
    single = " ".join([*([bos[0]] if bos else []), "$A", *([eos[0]] if eos else [])])
    return processors.TemplateProcessing(single=single, special_tokens=[token for token in (bos, eos) if token])


@functools.cache
def make_tokenizer(name, **settings):
    """A tokenizer of `TOKENIZERS`; `settings` as of `build`."""
    kind, special, bos, eos, template = TOKENIZERS[name]
    strips = {"<|end|>", "<|user|>", "<|assistant|>", "<|system|>"} if name == "phi3" else set()
    return build(kind, special, bos, eos, template, strips=strips, **settings)


def build(kind, special, bos, eos, template, *, strips=(), prepend_scheme="first", ends=False, special_tags=False):
    """A tokenizer that is trained on a few sentences.

    Args:
      kind: bytes, pairs, sentencepiece or gemma.
      special: special tokens, with spaces between them.
      bos: the place of the beginning of sequence among them, or None.
      eos: that of the end of sequence, or None.
      template: of chats.
      strips: special tokens that swallow the white space that follows them.
      prepend_scheme: of SentencePiece's spaces, `first` or `always` (Llama 2's way).
      ends: also puts the end-of-sequence token after every text.
      special_tags: whether `<think>` and `</think>` are special tokens.
    """
    special = special.split()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(CORPUS, trainer)
    else:
        pieces = sorted(
            {character for text in CORPUS for character in text if character != " "} | set("+=<>/|[]_-\\ue")
        )
        words = [f"▁{word}" for word in ("hello", "world", "the", "answer", "is", "user", "number")]
        scores = [(token, 0.0) for token in [*special, "<unk>", *byte_tokens]]
        scores += [("▁", -3.0), *((word, -2.0) for word in words), *((word[1:], -2.5) for word in words)]
        scores += [(piece, -4.0) for piece in pieces]
        if kind == "pairs":  # byte-pair encoding in SentencePiece's way
            merges = [(word[:n], word[n]) for word in words for n in range(1, len(word))]
            vocabulary = dict.fromkeys([*(token for token, _ in scores), *(a + b for a, b in merges)])
            ids = {token: i for i, token in enumerate(vocabulary)}
            backend = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
        else:
            backend = Tokenizer(models.Unigram(scores, unk_id=len(special), byte_fallback=True))
        if kind == "gemma":  # no space before a text
            backend.normalizer = normalizers.Replace(" ", "▁")
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(steps if kind == "gemma" else [*steps, decoders.Strip(" ", 1, 0)])
    tags = [AddedToken(tag, special=special_tags, normalized=False) for tag in ("<think>", "</think>")]
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=token in strips) for token in special]
    )
    (backend.add_special_tokens if special_tags else backend.add_tokens)(tags)
    named = {
        "bos_token": None if bos is None else special[bos],
        "eos_token": None if eos is None else special[eos],
    }
    if bos is not None or ends:
        backend.post_processor = template_processor(
            None if bos is None else (special[bos], bos), (special[eos], eos) if ends else None
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **{name: token for name, token in named.items() if token}
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session", name="make_tokenizer")
def make_tokenizer_fixture():
    return make_tokenizer


@pytest.fixture(scope="session", name="build_tokenizer")
def build_tokenizer_fixture():
    return build


# A decoded text of Phi 3 lacks the white space that its special tokens strip.
@pytest.fixture(scope="session", params=[name for name in TOKENIZERS if name != "phi3"])
def tokenizer(request):
    return make_tokenizer(request.param)
