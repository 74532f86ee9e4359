"""FedAvg: Communication-Efficient Learning of Deep Networks from Decentralized Data.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas; AISTATS 2017. Its server may step with an optimizer of its
own instead of taking the mean: Reddi et al., Adaptive Federated Optimization, ICLR 2021.
"""

from typing import Literal

import optax

from fedmetanas_jax import tree
from fedmetanas_jax.algorithms.averaging import Server, averaging
from fedmetanas_jax.algorithms.checks import check
from fedmetanas_jax.core import Algorithm, Model, Setting
from fedmetanas_jax.optimizers import adaptive, local_sgd


def fedavg(
    model: Model,
    setting: Setting,
    *,
    server: Literal["mean", "momentum", "adam", "yogi"] = "mean",
    server_lr: float | None = None,
    server_momentum: float = 0.9,
    server_epsilon: float = 1e-3,
) -> Algorithm:
    """Federated averaging of one network of fixed architecture.

    Paper: McMahan et al., AISTATS 2017; server optimizers: Reddi et al., ICLR 2021

    Args:
      server: "mean" adds the mean change to w_t; the others are FedAvgM, FedAdam and FedYogi: a step of that
        optimizer along it. Batch-norm statistics always take the mean: along a pseudo-gradient variances would
        turn negative.
      server_lr: of that step; none is 1 for FedAvgM and 0.01 for FedAdam and FedYogi, whose steps do not shrink
        with the pseudo-gradient.
      server_momentum, server_epsilon: first moment's decay (beta_1), and the adaptivity tau of FedAdam and FedYogi,
        which is added to the root of the second moment; that starts at tau^2 and decays by beta_2 = 0.99.
    """
    check(server_epsilon=(server_epsilon, server_epsilon > 0, "positive"))
    base = averaging(model, setting, lambda sent: local_sgd(setting, sent.round))
    if server == "mean":
        if server_lr is not None:
            raise ValueError(f"server_lr is {server_lr}, but server=mean has none; choose momentum, adam or yogi")
        return base
    server_lr = {"momentum": 1.0}.get(server, 0.01) if server_lr is None else server_lr
    if server == "momentum":
        step = optax.sgd(server_lr, server_momentum)
    else:
        step = adaptive(server, server_lr, server_momentum, 0.99, server_epsilon)

    def init(key):
        state, own = base.init(key)
        return state._replace(optimizer=step.init(state.params)), own

    def server_update(state, merged):
        downhill = tree.scale(merged.change["params"], -1.0)
        updates, optimizer = step.update(downhill, state.optimizer, state.params)
        params, stats = optax.apply_updates(state.params, updates), tree.add(state.stats, merged.change["stats"])
        return Server(state.round + 1, params, stats, optimizer)

    return base._replace(init=init, server_update=server_update)
