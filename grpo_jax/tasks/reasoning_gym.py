"""Any data set of reasoning-gym (Stojanovski et al. 2025, arXiv:2505.24760), generated offline; the extra `tasks`.

    task = reasoning_gym.task(name="chain_sum", shifted_difficulty=2)
    task = reasoning_gym.task(
        name="countdown", difficulty={"max_numbers": 4}, shifted_difficulty={"min_numbers": 5, "max_numbers": 6}
    )

Some of its scorers run `eval` on the answer, or have SymPy do so. Here they read answers as data
(`reasoning_gym_worker.disarm`), and they run in worker processes, in a sandbox, and nowhere else.
Making the problems is the library's own code and runs here; that of `codeio` leaves files in
the working directory.
"""

import ast
import os
import pathlib
import random
import site
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from grpo_jax.data import Row
from grpo_jax.rewards.answers import answers_of
from grpo_jax.rewards.calling import RewardFunction, reading
from grpo_jax.rewards.pool import WorkerPool, in_worker_processes
from grpo_jax.rewards.sandbox import bubblewrap
from grpo_jax.tasks import Splits, Task, draw_splits

if TYPE_CHECKING:
    from grpo_jax.tasks.reasoning_gym_worker import Difficulty

# Version 0.1.25 iterates over sets of text here, so that Python's hash seed decides what is drawn.
HASHED = ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")
CHUNK = 500  # problems a data set is made for at a time


def task(
    seed: int = 0,
    *,
    name: str = "chain_sum",
    difficulty: "Difficulty" = 0,
    shifted_difficulty: "Difficulty" = 1,
    partial: bool = False,
    pool: WorkerPool | None = None,
    **sizes: int,
) -> Task:
    """The data set called `name`; the arguments are those of `splits` and of `verifier`."""
    parts = splits(seed, name=name, difficulty=difficulty, shifted_difficulty=shifted_difficulty, **sizes)
    return Task(f"reasoning_gym_{name}", parts, verifier(partial=partial, pool=pool))


def splits(
    seed: int,
    *,
    name: str,
    difficulty: "Difficulty" = 0,
    shifted_difficulty: "Difficulty" = 1,
    train: int = 1000,
    validation: int = 100,
    test: int = 200,
    ood: int = 200,
) -> Splits:
    """Rows of `prompt`, `answer` (None where the problem has many) and what the verifier needs; no question twice.

    Some data sets take a second or more to make a problem of a higher level.

    Args:
      seed: of the splits.
      name: of the data set, as `reasoning_gym.create_dataset` takes it.
      difficulty: a level of the data set's curriculum, from 0 on, without the levels below
        it; or its settings, as a dict, which is how `composite` is told its parts:
        `{"datasets": [{"name": "chain_sum", "weight": 1, "config": {}}, ...]}`. For `train`,
        `validation` and `test`.
      shifted_difficulty: the same, for `ood`.
      train: number of rows.
      validation: number of rows.
      test: number of rows.
      ood: number of rows.

    Raises:
      ValueError: for an unknown data set or a level that it does not have (a few have
        none, and then need settings); where there are too few problems; where they would
        not follow from the seed. What reasoning-gym raises over settings passes through.
      ImportError: without the extra `tasks`.
    """
    if name in HASHED and os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise ValueError(
            f"the problems of {name} follow from Python's hash seed, so a resumed run would have others; "
            "set the environment variable PYTHONHASHSEED, to 0 for instance"
        )
    return draw_splits(
        lambda rng: problems(rng, name, difficulty),
        lambda rng: problems(rng, name, shifted_difficulty),
        lambda row: row["prompt"],
        seed=seed,
        train=train,
        validation=validation,
        test=test,
        ood=ood,
    )


def problems(rng: random.Random, name: str, difficulty: "Difficulty") -> Iterator[Row]:
    """Problems without end. What the library fails to make is passed over; after 100 in a row its error is raised."""
    gym = _worker()
    failed = 0
    while True:
        # Problem i is drawn by seed + i, so neighbouring seeds would share nearly all.
        chunk_seed = rng.getrandbits(31)
        made = gym.dataset(name, difficulty, chunk_seed, CHUNK)
        for i in range(CHUNK):
            try:
                entry = _item(made, i, chunk_seed + i)
            except Exception:
                if (failed := failed + 1) == 100:
                    raise
                continue
            failed = 0
            yield {
                "prompt": prompt(entry["question"]),
                "answer": entry["answer"],
                "name": name,
                "difficulty": difficulty,
                "entry": literal(entry, made.score_answer),
            }


def _item(made: Any, i: int, seed: int) -> Any:
    """Problem `i`. Some (of codeio and of list_functions) draw from Python's global generator as well."""
    state = random.getstate()
    random.seed(seed)
    try:
        return made[i]
    finally:
        random.setstate(state)


def literal(entry: Any, score: Callable[[Any, Any], float]) -> str:
    """An entry as a Python literal, for `ast.literal_eval`: JSON has no tuples, and scorers tell them from lists.

    What no literal is, such as a fraction among the facts that a question was made of, becomes text.

    Args:
      entry: of the data set.
      score: `(answer, entry) -> score`, the data set's.

    Raises:
      ValueError: if the right answer has another score then.
    """
    text = repr(_plain(entry))
    received = ast.literal_eval(text)
    if received != entry and score(entry["answer"], received) != score(entry["answer"], entry):
        raise ValueError(f"the problem cannot be sent to a worker process to be scored there: {text[:200]}")
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return type(value)(map(_plain, value))
    return value if value is None or type(value) in (bool, int, float, complex, bytes) else str(value)


def prompt(question: str) -> str:
    """The words of a problem."""
    return (
        f"{question.strip()}\n\nThink it through between <think> and </think>, then give the answer alone, in the form "
        "asked for, between <answer> and </answer>."
    )


def verifier(*, partial: bool = False, pool: WorkerPool | None = None) -> RewardFunction:
    """1 where reasoning-gym's scorer gives the answer its full score, else 0.

    The answer is that of `rewards.answer_of`, after what the prompt opens (`formats.opened_by`). Many scorers give a
    wrong one 0.01 or more, and a group of wrong answers then has a spread; so only the full score counts.
    A scorer that fails over an answer, or takes too long, has scored it wrong; one that
    fails over the right answer too masks the item. See `rewards.pool.in_worker_processes`.

    Args:
      partial: give the scorer's own score, from 0 to 1.
      pool: of worker processes, by default `sandboxed_pool()`. Without a sandbox, in a plain `WorkerPool()`,
        scorers read model output with your rights.

    Raises:
      ValueError: without bubblewrap, if no pool is given.
      ImportError: without the extra `tasks`.
    """
    gym = _worker()
    judge = in_worker_processes(gym.score, pool=sandboxed_pool() if pool is None else pool, name="reasoning_gym")

    def correct(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        prompt_tail: Sequence[str | None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        answers = answers_of(completions, prompt_tail)
        scores = judge(prompts, [answer or "" for answer in answers], **columns)
        pairs = zip(answers, scores, strict=True)
        scores = [0.0 if not answer else value for answer, value in pairs]
        return scores if partial else [None if value is None else float(value >= 1) for value in scores]

    reading(correct, calls=[judge])
    return correct


def sandboxed_pool(*, workers: int = 2, timeout: float = 5.0, memory: int = 2 * 2**30) -> WorkerPool:
    """Worker processes under bubblewrap, which see Python and its packages, read-only, and no network.

    They can start no others (`sandbox.bubblewrap`).

    Args:
      workers: how many processes.
      timeout: seconds for an answer.
      memory: bytes for a process.

    Raises:
      ValueError: where there is no bubblewrap, or it cannot make a sandbox.
    """
    folders = {sys.prefix, sys.base_prefix, *site.getsitepackages(), str(pathlib.Path(__file__).parents[1])}
    try:
        shown = sorted(folder for folder in folders if pathlib.Path(folder).exists())
        sandbox = bubblewrap(shown, processes=False)
    except ValueError as error:
        raise ValueError(
            f"{error}. Or pass pool=WorkerPool(), which accepts that scorers may run what the model wrote as you"
        ) from error
    return WorkerPool(workers=workers, timeout=timeout, memory=memory, prefix=sandbox)


def _worker() -> Any:
    try:
        from grpo_jax.tasks import reasoning_gym_worker
    except ImportError as error:
        raise ImportError("the data sets of reasoning-gym need: pip install 'grpo-jax[tasks]'") from error
    return reasoning_gym_worker
