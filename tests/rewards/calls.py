"""Calls of reward functions, as several test files make them."""


def scores(reward, completions, **columns):
    """The rewards of completions of the same prompt."""
    return reward(prompts=["p"] * len(completions), completions=completions, **columns)


def score(reward, completion, **columns):
    return scores(reward, [completion], **{name: [value] for name, value in columns.items()})[0]
