"""FedAvg: Communication-Efficient Learning of Deep Networks from Decentralized Data.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas; AISTATS 2017.
"""

from typing import NamedTuple

import jax.numpy as jnp

from fedmetanas_jax import local
from fedmetanas_jax.core import Algorithm, Array, ClientUpdate, Model, Net, Setting, Tree


class ServerState(NamedTuple):
    """What the server keeps between rounds."""

    round: Array  # [] int32
    params: Tree  # w_t
    stats: Tree  # running statistics, averaged like the weights (D-10)


def fedavg(
    model: Model,
    setting: Setting,
    *,
    lr: float = 0.025,
    lr_end: float = 0.001,
    momentum: float = 0.9,
    weight_decay: float = 3e-4,
    clip: float | None = None,
    finetune_epochs: int = 1,
) -> Algorithm:
    """Federated averaging of one network of fixed architecture.

    Paper: McMahan et al., AISTATS 2017

    Args:
      lr, lr_end, momentum, weight_decay, clip: local SGD, cosine over the rounds (D-23, D-31), reset each round.
      finetune_epochs: of the same SGD on a client's own images before its local accuracy "after adaptation" (D-27).
    """
    lr_of = local.cosine(setting.rounds, lr, lr_end)

    def loss(params, stats, batch, key):
        logits, moments = model.apply(params, stats, batch.image, True, key)
        value = local.cross_entropy(logits, batch.label, batch.weight)
        return value, (moments, local.accuracy(logits, batch.label, batch.weight))

    def train(server, data, key, epochs):
        optimizer = local.sgd(lr_of(server.round), momentum, weight_decay, clip)
        return local.fit(
            loss,
            optimizer,
            server.params,
            server.stats,
            data,
            key,
            batch=setting.batch,
            epochs=epochs,
            augment=setting.augment,
            momentum=model.momentum,
        )

    def init(key):
        return ServerState(jnp.int32(0), *model.init(key)), ()

    def client_update(server, client_state, data, key):
        # 1 w <- w_t.  2 for E epochs, each batch: w <- SGD(w, grad CE).
        params, stats, metrics = train(server, data, key, setting.epochs)
        # 3 return w, n_k.
        return ClientUpdate((params, stats), jnp.sum(data.weight), client_state, metrics)

    def server_update(server, mean):
        # 4 w_{t+1} = sum n_k w_k / sum n_k; the engine took the mean.
        return ServerState(server.round + 1, *mean)

    def personalize(server, client_state, data, key):
        if finetune_epochs == 0:
            return global_model(server)
        params, stats, _ = train(server, data, key, finetune_epochs)  # D-27
        return Net(params, stats)

    def global_model(server):
        return Net(server.params, server.stats)

    return Algorithm(
        init=init,
        client_update=client_update,
        server_update=server_update,
        personalize=personalize,
        forward=lambda net, image, train: model.apply(net.params, net.stats, image, train),
        broadcast=lambda server: (server.params, server.stats),
        macs=model.macs,
        global_model=global_model,
    )
