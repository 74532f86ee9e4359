"""Ditto: Fair and Robust Federated Learning Through Personalization.

Li, Hu, Beirami, Smith; ICML 2021.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedmetanas_jax import local, tree
from fedmetanas_jax.algorithms.fedavg import averaging
from fedmetanas_jax.core import Algorithm, Array, Model, Net, Setting
from fedmetanas_jax.optimizers import pull, scheduled_sgd, sgd


class ClientState(NamedTuple):
    """What a client keeps between its turns."""

    begun: Array  # [] bool; before its first turn a client has no model of its own
    net: Net  # v_k


def ditto(
    model: Model,
    setting: Setting,
    *,
    lam: float = 1.0,
    personal_epochs: int | None = None,
    lr: float = 0.025,
    lr_end: float = 0.001,
    momentum: float = 0.9,
    weight_decay: float = 3e-4,
    clip: float | None = None,
    finetune_lr: float = 0.01,
) -> Algorithm:
    """FedAvg, and beside it a personal model of each client's own that is pulled towards the global one.

    Paper: Li et al., ICML 2021

    Args:
      lam: strength of the pull (lambda in the paper).
      personal_epochs: local epochs of the personal model; none = as many as of the global one.
      lr, lr_end, momentum, weight_decay, clip: local SGD of both, cosine over the rounds.
      finetune_lr: of the plain, pulled SGD by which the personal model goes on before it is evaluated.
    """
    personal_epochs = setting.epochs if personal_epochs is None else personal_epochs
    if personal_epochs < 0:
        raise ValueError(f"personal_epochs is {personal_epochs}; it must be 0 or more")
    sgd_at, train = scheduled_sgd(setting, lr, lr_end, momentum, weight_decay, clip), local.trainer(model, setting)
    base = averaging(model, setting, lambda server: sgd_at(server.round), sgd(finetune_lr))

    def init(key):
        server, _ = base.init(key)
        return server, ClientState(jnp.array(False), tree.zeros_like(Net(server.params, server.stats)))

    def own(server, client) -> Net:
        """v_k, which is w_t the first time."""
        return tree.where(client.begun, client.net, Net(server.params, server.stats))

    def client_update(server, client, data, key):
        # 1 FedAvg's step on w from w_t.
        sent = base.client_update(server, (), data, key)
        # 2 E epochs: v <- v - lr (grad(v) + lam (v - w_t)).
        v, own_key = own(server, client), jax.random.fold_in(key, 1)
        optimizer = optax.chain(pull(server.params, lam), sgd_at(server.round))
        params, stats, metrics = train(optimizer, v.params, v.stats, data, own_key, personal_epochs)
        # 3 return w; keep v.
        gradients = sent.metrics["image_gradients"] + metrics["image_gradients"]
        more = {"personal_loss": metrics["loss"], "image_gradients": gradients}
        return sent._replace(client_state=ClientState(jnp.array(True), Net(params, stats)), metrics=sent.metrics | more)

    def personalize(server, client, data, key, steps):
        # 4 local test with v, which needs no further step.
        v, optimizer = own(server, client), optax.chain(pull(server.params, lam), sgd(finetune_lr))
        return Net(*train(optimizer, v.params, v.stats, data, key, setting.epochs, steps)[:2])

    return base._replace(init=init, client_update=client_update, personalize=personalize)
