"""Around a run: the loop, checkpoints, metrics, warnings, signals, compiled programs, memory plans, curricula."""
