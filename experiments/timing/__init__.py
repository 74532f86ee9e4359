"""Times the JAX round and the PyTorch round side by side; `experiments/bench.py` is its command line."""
