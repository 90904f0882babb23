"""A calculator on products that the policy cannot compute: GRPO learns when to call a tool, and with what.

    python experiments/calculator.py

The task is 3-digit times 3-digit. A transformer of 0.2 million parameters is made from scratch and gets a short
supervised warm-up on a teacher who calls the calculator in a third of the problems, 3 times of 10 with a digit that
is drawn anew, and otherwise guesses all but the first two digits:

    123 * 456   ->   <tool_call>{"name": "calculator", "arguments": {"expression": "123 * 456"}}</tool_call>
                     56088           (the calculator)
                     56088

Then GRPO rewards right answers. The conversations are those of `sampling.conversations` with `tools.environment`, in
the words of a chat template as Qwen's; what the calculator said is read and not learned. The second condition has a
calculator that says 0, whatever it is asked: the same turns and tokens, and nothing to be learned from it.

Written are `calculator.csv`, `.md` and `.png`, in 3 minutes of CPU time.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import transformers

from grpo_jax import data, losses, models, rewards, run, sampling, tools
from grpo_jax.advantages import from_rewards
from grpo_jax.policies import Policy
from grpo_jax.run import ranges
from grpo_jax.statistics import summary
from grpo_jax.study import results
from grpo_jax.study.written import write_results
from grpo_jax.train_step import make_learn
from grpo_jax.types import Experience, Metrics, Params, TrainState
from grpo_jax.updates import Learn, init_state

NAME = "calculator"
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "'
CLOSE = '"}}\n</tool_call>'
END = "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the experiment."""

    results: pathlib.Path = pathlib.Path(__file__).parent / "results"  # where the CSV, the table and the figure go
    seeds: int = 2
    demonstrations: int = 6000
    warmup_steps: int = 500
    steps: int = 60
    evaluate_every: int = 10
    prompts_per_step: int = 8
    group_size: int = 8
    max_tokens: int = 40  # of a conversation
    max_turns: int = 2
    learning_rate: float = 6e-4
    test: int = 64  # problems of an evaluation


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Characters, and the fixed words of a call and of the template, as tokens."""
    words = [
        "<unk>",
        "<|im_start|>",
        END,
        CALL,
        CLOSE,
        "user\n",
        "assistant\n",
        "tool\n",
        "\n",
        " ",
        "*",
        *"0123456789",
    ]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    fast = tokenizers.Tokenizer(model)
    pieces = r'<tool_call>\n[^:]*:[^:]*:[^:]*: "|"\}\}\n</tool_call>|user\n|assistant\n|tool\n|[\s\S]'
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pieces), behavior="isolated")
    fast.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token=END, extra_special_tokens={"start_token": "<|im_start|>"}
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def problems(seed: int, count: int) -> list[dict[str, Any]]:
    """Rows of a task: `123 * 456`, and the product as text."""
    numbers = np.random.default_rng(seed).integers(100, 1000, (count, 2)).tolist()
    return [{"prompt": f"{a} * {b}", "answer": str(a * b)} for a, b in numbers]


def demonstrate(row: dict[str, Any], rng: np.random.Generator) -> list[str]:
    """What the teacher and the calculator write by turns: a call, its result, the answer; or a guess."""
    right = row["answer"]
    if rng.random() > 1 / 3:
        return [right[:2] + "".join(rng.choice([*"0123456789"], len(right) - 2))]
    said = row["prompt"]
    if rng.random() < 0.3:
        place = int(rng.choice([0, 1, 2, 6, 7, 8]))
        said = said[:place] + str(rng.integers(1, 10)) + said[place + 1 :]
    result = tools.calculator(said)
    return [f"{CALL}{said}{CLOSE}", result, result]


def says_nothing() -> tools.Tool:
    """A calculator of no use."""

    def calculator(expression: str) -> str:
        """Says 0.

        Args:
            expression: anything.
        """
        return "0"

    return calculator


def correct(completions: Sequence[Any], answer: Sequence[str]) -> list[float]:
    """1 where the last thing that was said is the product."""
    return [float(messages[-1]["content"] == right) for messages, right in zip(completions, answer, strict=True)]


def make_policy(tokenizer: transformers.PreTrainedTokenizerFast) -> Policy:
    """A Llama of 0.2 M parameters."""
    return models.decoder(
        models.from_hf_config(
            transformers.LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    )  # fmt: skip


def warm_up(config: Config, policy: Policy, tokenizer: Any, seed: int) -> Params:
    """Supervised learning of what the teacher wrote; what the calculator said is read."""
    rng, end = np.random.default_rng([seed, 1]), tokenizer.eos_token_id
    rows = problems(seed, config.demonstrations)
    prompts = data.encode_rows(tokenizer, rows, chat=True).prompts
    between = data.between_turns(tokenizer, role="tool")
    completions, wrote = [], np.zeros((len(rows), 1, config.max_tokens), bool)
    for i, row in enumerate(rows):
        turns = demonstrate(row, rng)
        ids = [*tokenizer(turns[0])["input_ids"], end]
        wrote[i, 0, : len(ids)] = True
        if len(turns) > 1:
            ids += between([{"role": "tool", "content": turns[1]}], end)
            answer = [*tokenizer(turns[2])["input_ids"], end]
            wrote[i, 0, len(ids) : len(ids) + len(answer)] = True
            ids += answer
        completions.append(ids)
    shown = data.make_demonstrations(prompts, completions)
    shown = shown._replace(mask=jnp.asarray(wrote[..., : shown.tokens.shape[-1]]))
    rate = optax.cosine_decay_schedule(2e-3, config.warmup_steps, 0.05)
    optimizer = optax.adamw(rate, weight_decay=0.01)
    learn = make_learn(policy, optimizer, loss=losses.sft())

    @jax.jit
    def learn_rows(state: TrainState, rows: np.ndarray, shown: Any) -> tuple[TrainState, Metrics]:
        return learn(state, Experience(jax.tree.map(lambda x: x[rows], shown)))

    key = jax.random.key(seed)
    state = init_state(jax.jit(policy.init)(key), optimizer, key)
    for n in range(config.warmup_steps):
        state, _ = learn_rows(state, data.batch_indices(seed, n, len(rows), 64), shown)
    return state.params


def train(
    config: Config, policy: Policy, tokenizer: Any, learn: Learn, state: TrainState, seed: int, given: bool
) -> list[results.Record]:
    """GRPO from the warmed-up policy, with the calculator or one of no use; a record of each evaluation."""
    respond = tools.environment([tools.calculator if given else says_nothing()], tools.hermes_calls)
    rows, test = (problems(seed + 1000, 2000), problems(seed + 2000, config.test))
    prompts, tested = data.encode_rows(tokenizer, rows, chat=True), data.encode_rows(tokenizer, test, chat=True)
    talk = functools.partial(
        sampling.conversations, respond=respond, tokenizer=tokenizer, max_turns=config.max_turns,
        between=data.between_turns(tokenizer, role="tool"),
    )  # fmt: skip
    limits = {"max_tokens": config.max_tokens, "eos_ids": (tokenizer.eos_token_id,)}
    sampler = talk(sampling.sampler(group_size=config.group_size, **limits), rows=prompts.rows)
    likeliest = talk(sampling.greedy(**limits), rows=tested.rows)
    read = data.read_between(tokenizer, roles=("tool",))
    reward, test_reward = (rewards.host([correct], rows, tokenizer, read=read) for rows in (prompts.rows, tested.rows))
    measured: list[results.Record] = []
    recent: list[float] = []  # rewards of the steps since the last evaluation

    def evaluate(n: int) -> None:
        rollout = likeliest(policy, state.params, tested.batch(0, 0, config.test), jax.random.key(0))
        row = {"condition": "with the calculator" if given else "it says 0", "seed": seed, "step": n}
        row |= {
            "greedy": float(test_reward(rollout)[0].mean()),
            "turns": float((rollout.turns.ends > 0).sum(-1).mean()),
        }
        measured.append(row | ({"sampled": float(np.mean(recent))} if recent else {}))
        recent.clear()

    for n in range(config.steps):
        if n % config.evaluate_every == 0:
            evaluate(n)
        batch = prompts.batch(seed, n, config.prompts_per_step)
        rollout = sampler(policy, state.params, batch, jax.random.fold_in(state.key, n))
        state, metrics = learn(state, Experience(rollout, *reward(rollout)))
        recent.append(float(summary(metrics)["reward"]))
    evaluate(config.steps)
    return measured


def experiment(config: Config) -> list[results.Record]:
    """All seeds of both conditions; the CSV, the table and the figure."""
    ranges.check(config)
    tokenizer = make_tokenizer()
    policy, rows = make_policy(tokenizer), []
    optimizer = optax.adam(config.learning_rate, b2=0.99)
    learn = jax.jit(make_learn(policy, optimizer, loss=losses.grpo(), advantage=from_rewards()))
    for seed in range(config.seeds):
        began = time.monotonic()
        params = warm_up(config, policy, tokenizer, seed)
        for given in (True, False):
            state = init_state(params, optimizer, jax.random.key(seed))
            rows += train(config, policy, tokenizer, learn, state, seed, given)
            print(rows[-1])
        print(f"seed {seed}: {time.monotonic() - began:.0f} s")
    print(write_results(config.results, NAME, rows, ["greedy", "turns"], curves=["greedy", "sampled", "turns"]))
    return rows


if __name__ == "__main__":
    run.command(experiment, Config, __doc__)
