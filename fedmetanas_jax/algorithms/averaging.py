"""What the methods that train one network of fixed architecture share: local epochs, and the mean of the changes."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax

from fedmetanas_jax import local, tree
from fedmetanas_jax.core import Algorithm, Array, Model, Net, Reply, Setting, Tree
from fedmetanas_jax.optimizers import sgd


class Server(NamedTuple):
    """What the server keeps between rounds."""

    round: Array  # [] int32
    params: Tree  # w_t
    stats: Tree  # running statistics, averaged like the weights (D-10)
    optimizer: Tree = ()  # the server optimizer's state, if it has one


class Message(NamedTuple):
    """What a client is sent."""

    round: Array  # [] int32
    params: Tree  # w_t
    stats: Tree


def averaging(
    model: Model,
    setting: Setting,
    optimizer: Callable[[Message], optax.GradientTransformation],
    finetune: optax.GradientTransformation | None = None,
    *,
    gradient: local.Gradient | None = None,
    tasks: local.Tasks = "pairs",
) -> Algorithm:
    """E epochs of `optimizer` on every client, and the mean of the changes: FedAvg and what is built on it.

    A client that personalises takes steps of `finetune` from the server's network; None is plain SGD at
    setting.finetune_lr (D-27).
    gradient, tasks: what training descends along instead of the plain gradient, and how it cuts an epoch (D-7).
    """
    train, tune = local.trainer(model, setting, gradient, tasks), local.trainer(model, setting)
    finetune = sgd(setting.finetune_lr) if finetune is None else finetune

    def init(key):
        return Server(jnp.int32(0), *model.init(key)), ()

    def client_update(sent, own, data, key):
        # 1 w <- w_t.  2 for E epochs, each batch: w <- SGD(w, grad CE).
        params, stats, metrics = train(optimizer(sent), sent.params, sent.stats, data, key)
        # 3 return w - w_t, n_k.
        change = {"params": tree.sub(params, sent.params), "stats": tree.sub(stats, sent.stats)}
        return Reply(change, jnp.sum(data.weight), own, (), metrics)

    def server_update(server, merged):
        # 4 w_{t+1} = w_t + sum n_k (w_k - w_t) / sum n_k; the engine took the mean.
        params = tree.add(server.params, merged.change["params"])
        stats = tree.add(server.stats, merged.change["stats"])
        return server._replace(round=server.round + 1, params=params, stats=stats)

    def personalize(sent, own, data, key, steps):
        return Net(*tune(finetune, sent.params, sent.stats, data, key, steps=steps)[:2])

    return Algorithm(
        init=init,
        send=lambda server, client, key: Message(server.round, server.params, server.stats),
        client_update=client_update,
        server_update=server_update,
        personalize=personalize,
        forward=lambda net, image, train: model.apply(net.params, net.stats, image, train),
        macs=model.macs,
        global_model=lambda server: Net(server.params, server.stats),
    )
