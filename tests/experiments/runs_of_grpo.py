"""What test_two_processes.py runs in processes of its own: runs of grpo.py, one after the other.

    python tests/experiments/runs_of_grpo.py '[{"run-dir": "a", ...}, {"run-dir": "b", ...}]'

Runs that sample in the same way make the same step, which is compiled once. The rollouts of conversations are written
to `rollout_<n>_of_<processes>.npz`, whole. `"killed": [1, 0.2]`, which is no setting, kills the process 0.2 s after it
is asked for the rewards of step 1.
"""

import json
import os
import pathlib
import signal
import sys
import threading
import time

import grpo
import jax
import numpy as np
import tyro

from grpo_jax import packing, processes, tools
from grpo_jax.train_step import Step

processes._GRACE, processes._HEARTBEAT = 2, 10  # the tests do not wait as long as a run does


class Jitted(Step):
    """A step whose programs are kept."""

    def jit(self, **options):
        return self


def once(make):
    """`make_train_step` of runs that are alike: the step of the first that samples in this way."""
    made = {}

    def step(policy, optimizer, sampler, **settings):
        way = type(sampler), getattr(sampler, "sampler", sampler).slots
        if way not in made:
            jitted = make(policy, optimizer, sampler, **settings).jit()
            collect = written(jitted.collect) if jitted.on_host else jitted.collect
            made[way] = Jitted(collect, jitted.learn, jitted.on_host)
        return made[way]

    return step


def written(collect):
    """`collect`, whose rollouts the first process writes to a file."""

    def collected(state, prompts):
        experience = collect(state, prompts)
        arrays = jax.tree.leaves(processes.whole(experience.rollout))
        if processes.is_first():
            number = len([*pathlib.Path().glob(f"rollout_*_of_{jax.process_count()}.npz")])
            np.savez(f"rollout_{number}_of_{jax.process_count()}.npz", *arrays)
        return experience

    return collected


def told(pack):
    """`packing.pack`, which says on stderr what came of it."""

    def packed(*arguments, **settings):
        found = pack(*arguments, **settings)
        print("packed as", None if found is None else found.segments.shape, file=sys.stderr)
        return found

    return packed


def calls(text):
    """What an untrained model writes, as a call of a tool."""
    return [tools.Call("size", {"text": text})] if len(text) % 3 else []


def main(runs):
    grpo.make_train_step = once(grpo.make_train_step)
    tools.call_format = lambda tokenizer: calls
    packing.pack = told(packing.pack)
    killed = [run.pop("killed", None) for run in runs]
    configs = [
        tyro.cli(
            grpo.Config, args=[f"--{name}" if value is True else f"--{name}={value}" for name, value in run.items()]
        )
        for run in runs
    ]
    with configs[0].joined():
        for config, (step, seconds) in zip(configs, (at or (None, 0.0) for at in killed), strict=True):
            if step is not None:
                kill_in(config.reward_functions[0], step, seconds)
            grpo.train(config)
            if step is not None:
                time.sleep(60)


def kill_in(reward, step, seconds):
    def kill():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    reward.__globals__["asked_for"] = lambda n: n == step and threading.Thread(target=kill, daemon=True).start()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
