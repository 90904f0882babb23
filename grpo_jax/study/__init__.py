"""Whole experiments: a run as one function, grids of runs, evaluations with intervals."""
