"""What is measured: models, cells, and what all systems share of them (weights, prompts, rewards, lengths).

Systems that cannot import grpo_jax import this file, so it needs NumPy alone until
a checkpoint or a tokenizer is made.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

END = 0  # the token that ends a completion, where one may end
BETA = 0.04  # weight of the KL term
LEARNING_RATE = 1e-6


class Model(NamedTuple):
    """Sizes of a model of a family, with its own output head unless embeddings are tied."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int  # of an expert, where there are some
    vocabulary: int
    tied: bool = False
    family: str = "qwen2"
    window: int | None = None  # of all layers but every sixth; None: all see everything
    experts: int | None = None  # in place of the MLP of each layer
    per_token: int = 1  # experts that a token goes to

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer, without a router's."""
        return self._weights(self.experts or 1)

    @property
    def read_weights(self) -> int:
        """Those that one token meets."""
        return self._weights(self.per_token)

    def _weights(self, mlps: int) -> int:
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return attention + 3 * mlps * self.hidden * self.intermediate

    @property
    def windows(self) -> list[int | None]:
        """Of each layer."""
        return [None if n % 6 == 5 else self.window for n in range(self.layers)]


class Cell(NamedTuple):
    """A step to be timed: `prompts x group` completions of `completion_tokens` after `prompt_tokens`."""

    name: str
    model: Model
    prompts: int
    group: int
    prompt_tokens: int
    completion_tokens: int
    mean_length: float | None = None  # of completions with geometric lengths; None: all run to completion_tokens

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    @property
    def slots(self) -> int:
        """Completions decoded at a time where lengths differ, and others take the place of those that have ended."""
        return max(1, self.rows // 4)


TINY = Model(hidden=256, layers=4, heads=8, kv_heads=2, intermediate=1024, vocabulary=1024)
GEMMA = Model(
    hidden=256, layers=6, heads=4, kv_heads=1, intermediate=1024, vocabulary=1024,
    tied=True, family="gemma3_text", window=64,
)  # fmt: skip
MIXTURE = Model(
    hidden=256, layers=4, heads=8, kv_heads=2, intermediate=512, vocabulary=1024,
    family="mixtral", experts=8, per_token=2,
)  # fmt: skip
SMALL = Model(hidden=512, layers=8, heads=8, kv_heads=2, intermediate=1408, vocabulary=32768)

CELLS = {
    cell.name: cell
    for cell in (
        Cell("W1", TINY, prompts=8, group=8, prompt_tokens=64, completion_tokens=128),
        Cell("W2", TINY, prompts=4, group=16, prompt_tokens=512, completion_tokens=64),
        Cell("W3", TINY, prompts=8, group=8, prompt_tokens=64, completion_tokens=128, mean_length=32),
        Cell("gemma3", GEMMA, prompts=8, group=8, prompt_tokens=64, completion_tokens=128),
        Cell("mixture", MIXTURE, prompts=8, group=8, prompt_tokens=64, completion_tokens=128),
        Cell("small", SMALL, prompts=4, group=4, prompt_tokens=64, completion_tokens=128),
        Cell("long", TINY, prompts=8, group=8, prompt_tokens=64, completion_tokens=1984),  # positions up to 2,048
    )
}


class Target(NamedTuple):
    """What is to be reached against TRL's best setting and against the matrix products alone, in the same run."""

    whole: float  # at least so many times faster
    memory: float  # at most this share of TRL's peak
    generate: float | None = None  # generation alone, at least so many times faster
    floor: float | None = None  # generation alone, at most so many times as long as its products


TARGETS = {
    "W1": Target(whole=2.0, memory=1.0, floor=1.5),
    "W2": Target(whole=8.0, memory=0.5, generate=4.0),
    "W3": Target(whole=4.0, memory=1.0, floor=2.5),
    "small": Target(whole=3.0, memory=0.5, generate=2.0),
}
AGREEMENT = {"float32": 5e-5, "bfloat16": 3e-2}  # sampler and scorer, largest difference of log-probs


def to_json(cell: Cell) -> dict[str, Any]:
    return cell._asdict() | {"model": cell.model._asdict()}


def from_json(fields: dict[str, Any]) -> Cell:
    return Cell(**fields | {"model": Model(**fields["model"])})


def prompt_tokens(cell: Cell, step: int) -> np.ndarray:
    """`[B, P]` random tokens, never the end token; the same for all systems."""
    rng = np.random.default_rng([7, step])
    return rng.integers(1, cell.model.vocabulary, (cell.prompts, cell.prompt_tokens))


def draw_lengths(cell: Cell, step: int) -> list[int]:
    """`[B * G]` geometric lengths; one more than `completion_tokens` says that no end token came."""
    drawn = np.random.default_rng([8, step]).geometric(1 / (cell.mean_length or 1), cell.rows)
    return [int(n) for n in np.minimum(drawn, cell.completion_tokens + 1)]


def reward(tokens: np.ndarray) -> float:
    """The share of even tokens: differs between completions and costs nothing."""
    return float(np.mean(np.asarray(tokens) % 2 == 0))


def hf_config(model: Model) -> Any:
    """The sizes as a config of transformers; no token ends a completion."""
    import transformers

    return transformers.AutoConfig.for_model(
        model.family,
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=model.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **of_family(model),
    )


def of_family(model: Model) -> dict[str, Any]:
    """The fields that only the model's family has."""
    kinds = ["full_attention" if window is None else "sliding_attention" for window in model.windows]
    fields: dict[str, dict[str, Any]] = {
        "qwen2": {},
        "gemma3_text": {
            "head_dim": model.head_dim,
            "query_pre_attn_scalar": model.head_dim,
            "sliding_window": model.window,
            "layer_types": kinds,
        },
        "mixtral": {"num_local_experts": model.experts, "num_experts_per_tok": model.per_token},
    }
    return fields[model.family]


def write_checkpoint(model: Model, path: Path) -> Path:
    """A Hugging Face folder of random float32 weights, the same for all systems."""
    import jax

    from grpo_jax import models
    from grpo_jax.models import hf

    policy = models.decoder(models.from_hf_config(hf_config(model)))
    hf.save_pretrained(policy, jax.jit(policy.init)(jax.random.key(0)), path)
    return path


def tokenizer(model: Model) -> Any:
    """A tokenizer in which `t17` is token 17, for systems that take text."""
    import tokenizers
    import transformers

    words = tokenizers.models.WordLevel({f"t{i}": i for i in range(model.vocabulary)}, unk_token=f"t{END}")
    fast = tokenizers.Tokenizer(words)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=f"t{END}", padding_side="left")


def text(tokens: np.ndarray) -> str:
    """`[P]` tokens as the text that `tokenizer` reads back."""
    return " ".join(f"t{i}" for i in tokens)
