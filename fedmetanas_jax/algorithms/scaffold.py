"""SCAFFOLD: Stochastic Controlled Averaging for Federated Learning.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh; ICML 2020. Option II of its Algorithm 1 for the control
variates.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedmetanas_jax import local, tree
from fedmetanas_jax.algorithms.fedavg import averaging
from fedmetanas_jax.core import Algorithm, Array, ClientUpdate, Model, Setting, Tree
from fedmetanas_jax.optimizers import correct, cosine, sgd


class ServerState(NamedTuple):
    """What the server keeps between rounds."""

    round: Array  # [] int32
    params: Tree  # w_t
    stats: Tree  # averaged as in FedAvg: no control variates for them
    control: Tree  # c, shaped as params


def scaffold(
    model: Model,
    setting: Setting,
    *,
    lr: float = 0.025,
    lr_end: float = 0.001,
    weight_decay: float = 3e-4,
    global_lr: float = 1.0,
    finetune_lr: float = 0.01,
) -> Algorithm:
    """FedAvg whose clients correct every step by how their own gradient differs from everybody's.

    Paper: Karimireddy et al., ICML 2020

    Args:
      lr, lr_end, weight_decay: local SGD, cosine over the rounds; without momentum, as the control variates
        assume that a step is lr times a gradient. The decay is part of the gradient they estimate.
      global_lr: of the server's step along the mean of the clients' moves.
      finetune_lr: of the plain SGD by which a client personalises the global network.
    """
    train, lr_at = local.trainer(model, setting), cosine(setting.rounds, lr, lr_end)
    base = averaging(model, setting, lambda server: sgd(lr_at(server.round)), sgd(finetune_lr))

    def init(key):
        (start, params, stats, _), _ = base.init(key)
        zeros = tree.zeros_like(params)
        return ServerState(start, params, stats, zeros), zeros  # c = c_k = 0

    def client_update(server, control, data, key):
        # 1 w <- w_t.  2 each batch: w <- w - lr (g - c_k + c).
        rate = lr_at(server.round)
        optimizer = optax.chain(correct(tree.sub(server.control, control)), sgd(rate, 0.0, weight_decay))
        params, stats, metrics = train(optimizer, server.params, server.stats, data, key, setting.epochs)
        move = tree.sub(params, server.params)
        # 3 c_k' = c_k - c + (w_t - w) / (n_steps lr).
        steps = local.steps_taken(data.weight, setting.batch, setting.epochs)
        kept = jax.tree.map(lambda c_k, c, dw: c_k - c - dw / (steps * rate), control, server.control, move)
        # 4 return w - w_t and c_k' - c_k; store c_k'.
        update = (move, tree.sub(kept, control), stats)
        return ClientUpdate(update, jnp.sum(data.weight), kept, metrics)

    def server_update(server, mean):
        # 5 w += lr_g mean(w_k - w_t); c += (S / K) mean(c_k' - c_k).
        move, control, stats = mean
        return ServerState(
            server.round + 1,
            tree.add(server.params, tree.scale(move, global_lr)),
            stats,
            tree.add(server.control, tree.scale(control, setting.share)),
        )

    return base._replace(
        init=init,
        client_update=client_update,
        server_update=server_update,
        broadcast=lambda server: (server.params, server.stats, server.control),
    )
