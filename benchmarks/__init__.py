"""What is timed and how, against peers: `python -m benchmarks.run` on a CPU, `python -m benchmarks.gpu` on CUDA."""
