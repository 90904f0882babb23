"""What the stages of `r1_pipeline.py` are run on: the small task, or a Hugging Face model with its data.

The small task is sums of five digits modulo 10 (`grpo_jax.tasks.modular_sums`), for a Llama of 0.1 M parameters that is
made from nothing. Its texts come from two teachers: the majority, on whose texts the base is trained before any stage,
and the one of the cold start.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import data, models, rewards
from grpo_jax.models import hf
from grpo_jax.policies import Policy
from grpo_jax.protocols import Reward
from grpo_jax.run import digests, inputs
from grpo_jax.run.names import named_in, resolve
from grpo_jax.run.precision import ComputeDtype, compute_dtype
from grpo_jax.tasks import modular_sums
from grpo_jax.types import Params, PRNGKey, Prompts

Pair = tuple[list[int], list[int]]  # a prompt and its completion, with the token that ends it


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProblemSettings(data.PromptSettings):
    """The small task, unless there is a model."""

    seed: int = 0
    model: str | None = None  # a folder, or a repository of the Hugging Face Hub
    data: pathlib.Path | None = None  # its problems: rows with a prompt and the columns that the verifier wants
    verifier: str = "grpo_jax.rewards:accuracy()"  # for --data, as module:function, or module:maker()
    task: str | None = None  # or a task in place of both, such as grpo_jax.tasks.countdown:task
    demonstrations: pathlib.Path | None = None  # of the cold start: rows with `prompt` and `completion`
    student: str | None = None  # a smaller model of the same tokenizer, for the stage of distillation
    judge: str | None = None  # a reward function that what is kept in the third stage has to please as well
    preference: str | None = None  # the last stage's reward; unless given, right answers had better be short
    script: str = "Latin"  # of the language that is wanted, for the language reward
    max_tokens: int = 1024  # of a completion of a model; the small task has its own
    test_rows: int = 512
    compute_dtype: ComputeDtype = "auto"  # of a model: float32 on CPUs, else bfloat16; trained weights are float32
    bucket: int = 16  # prompts and completions are padded to a multiple of this, so that few programs compile

    def check(self) -> None:
        """Refuses settings that do not go together, or that the small task does not have."""
        if self.model is None:
            with_the_task = {"bucket", "seed", "test_rows"}
            names = [f.name for f in dataclasses.fields(ProblemSettings) if f.name not in with_the_task]
            plain = ProblemSettings()
            if needs := [name for name in names if getattr(self, name) != getattr(plain, name)]:
                raise ValueError(f"{', '.join(needs)} are for a model: give --model, or leave them out")
        elif self.demonstrations is None or (self.data is None) == (self.task is None):
            raise ValueError(
                "a model needs --demonstrations for the cold start, and its problems by --data or by --task"
            )
        elif self.task is not None and self.prompt_column != "prompt":
            raise ValueError(f"the prompt's column of a task is `prompt`, got --prompt-column {self.prompt_column}")


class Problem(NamedTuple):
    """What the stages need to know, of the small task and of a Hugging Face model alike."""

    policy: Policy
    load: Callable[[], Params]  # the parameters before any stage, made or read anew
    eos_ids: tuple[int, ...]
    max_tokens: int
    pretraining: list[Pair]  # what makes a base of them; nothing where they are one
    demonstrations: list[Pair]  # of the cold start
    train: np.ndarray  # rows
    test: np.ndarray  # rows
    prompts: Callable[[np.ndarray], Prompts]  # of rows
    reasoning: Reward  # accuracy, format, language
    preference: Reward
    judge: Reward | None
    text: Callable[[Sequence[int]], str]
    digests: Mapping[str, str]  # of all of this but the parameters
    student: Callable[[], tuple[Policy, Params]] | None = None  # a smaller model before it learns
    tokenizer: Any = None


def make_problem(config: ProblemSettings) -> Problem:
    """The small task, or a model's."""
    return small(config) if config.model is None else pretrained(config)


# ----------------------------------------------------------------------- the small task

TERMS = 5
MAJORITY = modular_sums.TeacherRates(slip=0.4, guess=0.05, check=0.2)  # who wrote what the base is made from
TEACHER = modular_sums.TeacherRates(slip=0.3, check=0.5)  # who wrote the demonstrations of the cold start
WORDS = modular_sums.WORDS_OF_TWO_SCRIPTS


def small(config: ProblemSettings) -> Problem:
    """Sums of five digits modulo 10, and a Llama of 0.1 M parameters that is made from nothing."""
    policy, half = (models.small_llama(len(WORDS), width=width, eos_id=modular_sums.EOS) for width in (64, 32))
    problems_key, majority_key, teacher_key, params_key = jax.random.split(jax.random.key(config.seed), 4)
    problems = jax.device_get(modular_sums.problems(problems_key, 12_000, terms=TERMS))
    _, first = np.unique(problems.tokens, axis=0, return_index=True)
    problems = jax.tree.map(lambda x: x[np.sort(first)], problems)  # each problem once: no two splits share one
    test, taught, shown, train = np.split(np.arange(len(first)), np.cumsum([config.test_rows, 4096, 256]))

    def prompts(rows: np.ndarray) -> Prompts:
        return jax.tree.map(lambda x: jnp.asarray(x[rows]), problems)

    def demonstrate(rows: np.ndarray, teacher: modular_sums.TeacherRates, mixed: float, key: PRNGKey) -> list[Pair]:
        """What a teacher writes, of whose working a share of the digits is in the other script."""
        words_key, script_key = jax.random.split(key)
        written = modular_sums.demonstrations(words_key, prompts(rows), teacher)
        return [pair for (pair,) in data.token_pairs(modular_sums.in_two_scripts(script_key, written, mixed))]

    max_tokens = modular_sums.max_tokens(TERMS)
    accuracy, formed = modular_sums.accuracy(), modular_sums.strict_format()
    brief = rewards.tokens.cosine_length(accuracy, rewards.cosine_scale(max_tokens))
    return Problem(
        policy,
        load=lambda: jax.jit(policy.init)(params_key),
        eos_ids=(modular_sums.EOS,),
        max_tokens=max_tokens,
        pretraining=demonstrate(taught, MAJORITY, 0.3, majority_key),
        demonstrations=demonstrate(shown, TEACHER, 0.1, teacher_key),
        train=train,
        test=test,
        prompts=prompts,
        reasoning=jax.jit(rewards.traced(accuracy, formed, modular_sums.first_script())),
        preference=jax.jit(rewards.traced(brief)),
        judge=None,
        text=lambda ids: "".join(WORDS[token] for token in ids),
        digests={"the problems": digests.of_arrays(problems)},
        student=lambda: (half, jax.jit(half.init)(jax.random.fold_in(params_key, 1))),
    )


# ----------------------------------------------------------------- a Hugging Face model


def pretrained(config: ProblemSettings) -> Problem:
    """A model, its problems and its demonstrations, from folders, files or the Hub."""
    model = config.model
    assert model is not None
    # Everything that can be wrong with the input is looked at before the weights are read.
    tokenizer = hf.load_tokenizer(model)
    if config.student is not None and tokenizer.get_vocab() != hf.load_tokenizer(config.student).get_vocab():
        raise ValueError(f"--student {config.student} has other tokens than --model {model}: it cannot learn its texts")
    tested_rows, train_rows, verifier = read(config)
    tested, problems = config.encode(tokenizer, tested_rows), config.encode(tokenizer, train_rows)
    shown = data.read_problems(config.demonstrations, columns=["completion"])
    chats = config.has_chats([*tested.rows, *problems.rows]) or data.has_chats(shown)
    end, eos_ids = hf.completion_end(model, tokenizer, chat=chats, template=config.template)
    pairs = zip(
        *data.encode_demonstrations(
            tokenizer, shown, end=end, chat=config.chat, system=config.system, template=config.template,
            max_prompt_tokens=config.max_prompt_tokens,
        ), strict=True,
    )  # fmt: skip
    held_out = set(map(tuple, tested.prompts))

    def not_tested(items: list[Any], prompts: Sequence[Sequence[int]], kind: str) -> list[Any]:
        """Nothing of the test is trained on."""
        kept = [item for item, ids in zip(items, prompts, strict=True) if tuple(ids) not in held_out]
        if len(kept) < len(items):
            print(f"left out {len(items) - len(kept)} {kind} whose prompts are in the test")
        if not kept:
            raise ValueError(f"there are no {kind} beside the test of {len(held_out)}: choose --test-rows")
        return kept

    trained = not_tested(list(zip(problems.rows, problems.prompts, strict=True)), problems.prompts, "problems")
    demonstrations = list(pairs)
    demonstrations = not_tested(demonstrations, [prompt for prompt, _ in demonstrations], "demonstrations")
    rows = [*tested.rows, *(row for row, _ in trained)]
    encoded = [*tested.prompts, *(ids for _, ids in trained)]
    brief = rewards.cosine_length(verifier, rewards.cosine_scale(config.max_tokens))
    preference = brief if config.preference is None else resolve(config.preference)
    judges = [] if config.judge is None else [resolve(config.judge)]
    inputs.check_arguments([verifier, preference, *judges], rows, prompt_column=config.prompt_column)
    for name in filter(None, (model, config.student)):
        inputs.check_tokens(name, tokenizer, encoded, max_tokens=config.max_tokens, rows=rows)
        inputs.check_tokens(name, tokenizer, [prompt + completion for prompt, completion in demonstrations])

    def reward(*functions: rewards.RewardFunction) -> Reward:
        return rewards.host(functions, rows, tokenizer, prompt_column=config.prompt_column, eos_ids=eos_ids)

    dtype = compute_dtype(config.compute_dtype)
    load_pretrained = functools.partial(hf.load_pretrained, compute_dtype=dtype)
    policy, params = load_pretrained(model)
    unused = [params]  # so that the first stage need not read them again
    del params
    return Problem(
        policy,
        load=lambda: unused.pop() if unused else load_pretrained(model)[1],
        eos_ids=eos_ids,
        max_tokens=config.max_tokens,
        pretraining=[],
        demonstrations=demonstrations,
        train=np.arange(len(tested.rows), len(rows)),
        test=np.arange(len(tested.rows)),
        prompts=lambda rows: data.make_prompts([encoded[row] for row in rows], rows, multiple=config.bucket),
        reasoning=reward(verifier, rewards.strict_format(), rewards.language_consistency(script=config.script)),
        preference=reward(preference),
        judge=reward(*judges) if judges else None,
        text=tokenizer.decode,
        digests=digests.of_run(tokenizer, prompts=encoded, rows=rows, eos_ids=eos_ids, code=named_in(config)),
        student=None if config.student is None else functools.partial(load_pretrained, config.student),
        tokenizer=tokenizer,
    )


def read(config: ProblemSettings) -> tuple[list[data.Row], list[data.Row], rewards.RewardFunction]:
    """The rows to test on, those to train on, and the verifier."""
    if config.task is not None:
        task = resolve(config.task)(config.seed)
        return task.splits.test[: config.test_rows], task.splits.train, task.verifier
    rows = config.read(config.data)
    if config.test_rows >= len(rows):
        raise ValueError(f"--test-rows {config.test_rows} leaves none of the {len(rows)} rows to train on")
    trained, tested = data.hold_out(rows, config.test_rows, seed=config.seed)
    return tested, trained, resolve(config.verifier)
