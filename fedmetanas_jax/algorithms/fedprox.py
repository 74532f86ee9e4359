"""FedProx: Federated Optimization in Heterogeneous Networks.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith; MLSys 2020.
"""

import optax

from fedmetanas_jax.algorithms.averaging import averaging
from fedmetanas_jax.core import Algorithm, Model, Setting
from fedmetanas_jax.optimizers import local_sgd, pull


def fedprox(model: Model, setting: Setting, *, mu: float = 0.01) -> Algorithm:
    """FedAvg whose clients are pulled back to the weights they were sent.

    Paper: Li et al., MLSys 2020

    Args:
      mu: of the proximal term (mu / 2) |w - w_t|^2, whose gradient joins that of the loss and is clipped along.
        0 is FedAvg.
    """
    # w <- SGD(w, grad CE + mu (w - w_t))
    return averaging(model, setting, lambda sent: optax.chain(pull(sent.params, mu), local_sgd(setting, sent.round)))
