"""Reasoning-gym's data sets and scorers, in a file by itself: worker processes load it without JAX and this package."""

import ast
import functools
import json
from collections.abc import Mapping
from typing import Any

import reasoning_gym
from reasoning_gym.coaching.base_curriculum import DefaultCurriculumContext, RangeAttributeMode
from reasoning_gym.composite import DatasetSpec
from reasoning_gym.factory import create_curriculum

Difficulty = int | Mapping[str, Any]  # a level of the data set's curriculum, or the settings of `create_dataset`


def dataset(name: str, difficulty: Difficulty, seed: int, size: int) -> Any:
    """The data set at a level, without the levels below it, or with settings of its own."""
    if not isinstance(difficulty, int):
        settings = dict(difficulty)
        if name == "composite":  # several data sets in one, each as a dict, since settings travel as JSON
            settings["datasets"] = [DatasetSpec(**spec) for spec in settings.get("datasets", ())]
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **settings)
    levels = create_curriculum(name)
    levels.set_global_level(difficulty)
    context = DefaultCurriculumContext(mode=RangeAttributeMode.UPPER_BOUND)
    configuration = levels.generate_configuration({"seed": seed, "size": size}, context)
    return reasoning_gym.create_dataset(name, **vars(configuration))


def score(completion: str, name: str, difficulty: Difficulty, entry: str) -> float:
    """The score of an answer, from 0 to 1; 0 for one over which the scorer fails.

    Unless it fails over the right answer too: then the fault is not the completion's.
    """
    judge, item = _judge(name, json.dumps(difficulty)), ast.literal_eval(entry)
    try:
        return float(judge.score_answer(completion, item))
    except (Exception, SystemExit):
        judge.score_answer(item["answer"], item)
        return 0.0


@functools.lru_cache(maxsize=8)
def _judge(name: str, difficulty: str) -> Any:
    return dataset(name, json.loads(difficulty), seed=0, size=1)
