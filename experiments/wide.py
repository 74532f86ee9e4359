"""main.py, serve.py and join.py with one more method, `wide`, for deploy_rounds.py: little to train, 8 MB to send.

    python experiments/wide.py serve --config.method=wide ...
"""

import importlib
import sys

import jax
import jax.numpy as jnp

from fedmetanas_jax import command
from fedmetanas_jax.algorithms import ALGORITHMS
from fedmetanas_jax.algorithms.fedavg import fedavg
from fedmetanas_jax.core import Algorithm, Model, Setting

HIDDEN = 27_000  # units; 64 inputs and 10 classes make 2.0 million weights of them, which are 8 MB


def wide(model: Model, setting: Setting) -> Algorithm:
    """FedAvg of one wide hidden layer on 8 x 8 gray images.

    Paper: McMahan et al., 2017
    """
    del model
    sizes = {"in": (64, HIDDEN), "out": (HIDDEN, 10)}

    def init(key):
        keys = jax.random.split(key)
        return {name: 0.01 * jax.random.normal(k, sizes[name]) for name, k in zip(sizes, keys, strict=True)}, {}

    def apply(params, stats, image, train, key=None):
        x = image.reshape(len(image), -1).astype(jnp.float32) / 255
        return jnp.tanh(x @ params["in"]) @ params["out"], stats

    made = fedavg(Model(init, apply, 0.1, sum(a * b for a, b in sizes.values()), ("out",)), setting)
    return made._replace(global_model=None)  # a network that no config makes again would be no network file


if __name__ == "__main__":
    ALGORITHMS["wide"] = wide
    sys.argv[:2] = [sys.argv[1]]
    command.leave(importlib.import_module(sys.argv[0]).main(sys.argv))
