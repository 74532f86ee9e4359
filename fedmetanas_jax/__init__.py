"""Federated neural architecture search with model-agnostic meta-learning, in JAX.

    import fedmetanas_jax as fm
    found = fm.search(images, labels, clients=10, workdir="runs/mine")
    labels = fm.load("runs/mine/network.npz").predict(images)
"""

from importlib import import_module

WHERE = {"search": "fedmetanas_jax.library", "Found": "fedmetanas_jax.library", "load": "fedmetanas_jax.network"}


def __getattr__(name: str):
    """What users call, imported when it is asked for: much of the package is of use without jax."""
    if name not in WHERE:
        raise AttributeError(f"module 'fedmetanas_jax' has no attribute '{name}'")
    return getattr(import_module(WHERE[name]), name)
