"""FedProx: Federated Optimization in Heterogeneous Networks.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith; MLSys 2020.
"""

import optax

from fedmetanas_jax.algorithms.fedavg import averaging
from fedmetanas_jax.core import Algorithm, Model, Setting
from fedmetanas_jax.optimizers import pull, scheduled_sgd, sgd


def fedprox(
    model: Model,
    setting: Setting,
    *,
    mu: float = 0.01,
    lr: float = 0.025,
    lr_end: float = 0.001,
    momentum: float = 0.9,
    weight_decay: float = 3e-4,
    clip: float | None = None,
    finetune_lr: float = 0.01,
) -> Algorithm:
    """FedAvg whose clients are pulled back to the weights they were sent.

    Paper: Li et al., MLSys 2020

    Args:
      mu: of the proximal term (mu / 2) |w - w_t|^2, whose gradient joins that of the loss. 0 is FedAvg.
      lr, lr_end, momentum, weight_decay, clip, finetune_lr: as in fedavg; the pull is clipped along.
    """
    sgd_at = scheduled_sgd(setting, lr, lr_end, momentum, weight_decay, clip)
    # w <- SGD(w, grad CE + mu (w - w_t))
    return averaging(
        model, setting, lambda server: optax.chain(pull(server.params, mu), sgd_at(server.round)), sgd(finetune_lr)
    )
