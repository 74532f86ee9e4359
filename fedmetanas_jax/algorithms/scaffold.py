"""SCAFFOLD: Stochastic Controlled Averaging for Federated Learning.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh; ICML 2020. Option II of its Algorithm 1 for the control
variates.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedmetanas_jax import local, tree
from fedmetanas_jax.algorithms.averaging import averaging
from fedmetanas_jax.core import Algorithm, Array, Model, Reply, Setting, Tree
from fedmetanas_jax.optimizers import correct, cosine, local_sgd


class Server(NamedTuple):
    """What the server keeps between rounds, and what a client is sent."""

    round: Array  # [] int32
    params: Tree  # w_t
    stats: Tree  # averaged as in FedAvg: no control variates for them
    control: Tree  # c, shaped as params


def scaffold(model: Model, setting: Setting, *, global_lr: float = 1.0) -> Algorithm:
    """FedAvg whose clients correct every step by how their own gradient differs from everybody's.

    Local SGD has no momentum, whatever the setting says: the control variates assume that a step is lr times a
    gradient. Weight decay is part of the gradient they estimate, and nothing is clipped.

    Paper: Karimireddy et al., ICML 2020

    Args:
      global_lr: of the server's step along the mean of the clients' moves.
    """
    setting = setting._replace(momentum=0.0, clip=None)
    train, lr_at = local.trainer(model, setting), cosine(setting.rounds, setting.lr, setting.lr_end)
    base = averaging(model, setting, lambda sent: local_sgd(setting, sent.round))

    def init(key):
        (start, params, stats, _), _ = base.init(key)
        zeros = tree.zeros_like(params)
        return Server(start, params, stats, zeros), zeros  # c = c_k = 0

    def client_update(sent, control, data, key):
        # 1 w <- w_t.  2 each batch: w <- w - lr (g - c_k + c).
        optimizer = optax.chain(correct(tree.sub(sent.control, control)), local_sgd(setting, sent.round))
        params, stats, metrics = train(optimizer, sent.params, sent.stats, data, key)
        move = tree.sub(params, sent.params)
        # 3 c_k' = c_k - c + (w_t - w) / (n_steps lr).
        far = local.steps_a_round(data.weight, 1, setting) * lr_at(sent.round)
        kept = jax.tree.map(lambda c_k, c, dw: c_k - c - dw / far, control, sent.control, move)
        # 4 return w - w_t and c_k' - c_k; store c_k'.
        change = {"params": move, "stats": tree.sub(stats, sent.stats), "control": tree.sub(kept, control)}
        return Reply(change, jnp.sum(data.weight), kept, (), metrics)

    def server_update(server, merged):
        # 5 w += lr_g mean(w_k - w_t); c += (S / K) mean(c_k' - c_k).
        change = merged.change
        return Server(
            server.round + 1,
            tree.add(server.params, tree.scale(change["params"], global_lr)),
            tree.add(server.stats, change["stats"]),
            tree.add(server.control, tree.scale(change["control"], setting.share)),
        )

    return base._replace(
        init=init, send=lambda server, client, key: server, client_update=client_update, server_update=server_update
    )
