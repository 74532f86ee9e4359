"""FedAvg: Communication-Efficient Learning of Deep Networks from Decentralized Data.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas; AISTATS 2017. Its server may step with an optimizer of its
own instead of taking the mean: Reddi et al., Adaptive Federated Optimization, ICLR 2021.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
import optax

from fedmetanas_jax import local, tree
from fedmetanas_jax.core import Algorithm, Array, ClientUpdate, Model, Net, Setting, Tree
from fedmetanas_jax.optimizers import scheduled_sgd, sgd


class ServerState(NamedTuple):
    """What the server keeps between rounds."""

    round: Array  # [] int32
    params: Tree  # w_t
    stats: Tree  # running statistics, averaged like the weights (D-10)
    optimizer: Tree = ()  # the server optimizer's state, if it has one


def averaging(
    model: Model,
    setting: Setting,
    optimizer: Callable[[ServerState], optax.GradientTransformation],
    finetune: optax.GradientTransformation,
) -> Algorithm:
    """E epochs of `optimizer` on every client, and the mean of what comes back: FedAvg and what is built on it.

    A client that personalises takes steps of `finetune` from the server's network.
    """
    train = local.trainer(model, setting)

    def init(key):
        return ServerState(jnp.int32(0), *model.init(key)), ()

    def client_update(server, client_state, data, key):
        # 1 w <- w_t.  2 for E epochs, each batch: w <- SGD(w, grad CE).
        params, stats, metrics = train(optimizer(server), server.params, server.stats, data, key, setting.epochs)
        # 3 return w, n_k.
        return ClientUpdate((params, stats), jnp.sum(data.weight), client_state, metrics)

    def server_update(server, mean):
        # 4 w_{t+1} = sum n_k w_k / sum n_k; the engine took the mean.
        params, stats = mean
        return server._replace(round=server.round + 1, params=params, stats=stats)

    def personalize(server, client_state, data, key, steps):
        params, stats, _ = train(finetune, server.params, server.stats, data, key, setting.epochs, steps)
        return Net(params, stats)

    return Algorithm(
        init=init,
        client_update=client_update,
        server_update=server_update,
        personalize=personalize,
        forward=lambda net, image, train: model.apply(net.params, net.stats, image, train),
        broadcast=lambda server: (server.params, server.stats),
        macs=model.macs,
        global_model=lambda server: Net(server.params, server.stats),
    )


def fedavg(
    model: Model,
    setting: Setting,
    *,
    lr: float = 0.025,
    lr_end: float = 0.001,
    momentum: float = 0.9,
    weight_decay: float = 3e-4,
    clip: float | None = None,
    finetune_lr: float = 0.01,
    server: Literal["mean", "momentum", "adam", "yogi"] = "mean",
    server_lr: float | None = None,
    server_momentum: float = 0.9,
    server_epsilon: float = 1e-3,
) -> Algorithm:
    """Federated averaging of one network of fixed architecture.

    Paper: McMahan et al., AISTATS 2017; server optimizers: Reddi et al., ICLR 2021

    Args:
      lr, lr_end, momentum, weight_decay, clip: local SGD, cosine over the rounds (D-23, D-31), reset each round.
      finetune_lr: of the plain SGD by which a client personalises the global network (D-27).
      server: "mean" replaces w_t by the clients' mean; the others are FedAvgM, FedAdam and FedYogi: a step of
        that optimizer along w_t - mean. Batch-norm statistics are always the mean: along a pseudo-gradient
        variances would turn negative.
      server_lr: of that step; none is 1 for FedAvgM and 0.01 for FedAdam and FedYogi, whose steps do not shrink
        with the pseudo-gradient.
      server_momentum, server_epsilon: first moment's decay, and the adaptivity tau of FedAdam and FedYogi.
    """
    sgd_at = scheduled_sgd(setting, lr, lr_end, momentum, weight_decay, clip)
    base = averaging(model, setting, lambda server: sgd_at(server.round), sgd(finetune_lr))
    if server == "mean":
        if server_lr is not None:
            raise ValueError(f"server_lr is {server_lr}, but server=mean has none; choose momentum, adam or yogi")
        return base
    server_lr = {"momentum": 1.0}.get(server, 0.01) if server_lr is None else server_lr
    moments = {"b1": server_momentum, "b2": 0.99, "eps": server_epsilon}
    step = {
        "momentum": lambda: optax.sgd(server_lr, server_momentum),
        "adam": lambda: optax.adam(server_lr, **moments),
        "yogi": lambda: optax.yogi(server_lr, **moments),
    }[server]()

    def init(key):
        state, client_state = base.init(key)
        return state._replace(optimizer=step.init(state.params)), client_state

    def server_update(server, mean):
        params, stats = mean
        updates, optimizer = step.update(tree.sub(server.params, params), server.optimizer, server.params)
        return ServerState(server.round + 1, optax.apply_updates(server.params, updates), stats, optimizer)

    return base._replace(init=init, server_update=server_update)
