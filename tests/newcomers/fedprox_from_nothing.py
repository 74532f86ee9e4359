"""FedProx (Li et al., MLSys 2020) as written by somebody who has read core.py alone: a whole method in one file."""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from fedmetanas_jax import local, tree
from fedmetanas_jax.core import Algorithm, Array, Model, Net, Reply, Setting, Tree
from fedmetanas_jax.optimizers import local_sgd, pull, sgd


class Server(NamedTuple):
    round: Array
    params: Tree
    stats: Tree


def mine(model: Model, setting: Setting, *, mu: float = 0.01) -> Algorithm:
    """FedAvg whose clients are pulled back to the weights they were sent."""
    train, finetune = local.trainer(model, setting), sgd(setting.finetune_lr)

    def client_update(sent, own, data, key):
        optimizer = optax.chain(pull(sent.params, mu), local_sgd(setting, sent.round))
        params, stats, metrics = train(optimizer, sent.params, sent.stats, data, key)
        change = {"params": tree.sub(params, sent.params), "stats": tree.sub(stats, sent.stats)}
        return Reply(change, weight=jnp.sum(data.weight), own=own, report=(), metrics=metrics)

    def server_update(server, merged):
        params, stats = (tree.add(getattr(server, part), merged.change[part]) for part in ("params", "stats"))
        return Server(server.round + 1, params, stats)

    return Algorithm(
        init=lambda key: (Server(jnp.int32(0), *model.init(key)), ()), send=lambda server, client, key: server,
        client_update=client_update, server_update=server_update,
        personalize=lambda sent, own, data, key, steps: Net(*train(finetune, *sent[1:], data, key, steps=steps)[:2]),
        forward=lambda net, image, train: model.apply(net.params, net.stats, image, train),
        macs=model.macs, global_model=lambda server: Net(server.params, server.stats),
    )  # fmt: skip
