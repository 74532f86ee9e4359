"""Ditto: Fair and Robust Federated Learning Through Personalization.

Li, Hu, Beirami, Smith; ICML 2021.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from fedmetanas_jax import local, tree
from fedmetanas_jax.algorithms.averaging import averaging
from fedmetanas_jax.core import Algorithm, Array, Model, Net, Setting
from fedmetanas_jax.optimizers import local_sgd, pull, sgd


class Own(NamedTuple):
    """What a client keeps between its turns."""

    begun: Array  # [] bool; before its first turn a client has no model of its own
    net: Net  # v_k


def ditto(model: Model, setting: Setting, *, lam: float = 1.0, personal_epochs: int | None = None) -> Algorithm:
    """FedAvg, and beside it a personal model of each client's own that is pulled towards the global one.

    Before it is evaluated the personal model may go on by plain, pulled SGD at setting.finetune_lr.

    Paper: Li et al., ICML 2021

    Args:
      lam: strength of the pull (lambda in the paper).
      personal_epochs: local epochs of the personal model; none = as many as of the global one.
    """
    personal_epochs = setting.epochs if personal_epochs is None else personal_epochs
    if personal_epochs < 0:
        raise ValueError(f"personal_epochs is {personal_epochs}; it must be 0 or more")
    train = local.trainer(model, setting)
    base = averaging(model, setting, lambda sent: local_sgd(setting, sent.round))

    def init(key):
        server, _ = base.init(key)
        return server, Own(jnp.array(False), tree.zeros_like(Net(server.params, server.stats)))

    def personal(sent, own) -> Net:
        """v_k, which is w_t the first time."""
        return tree.where(own.begun, own.net, Net(sent.params, sent.stats))

    def client_update(sent, own, data, key):
        # 1 FedAvg's step on w from w_t.
        reply = base.client_update(sent, (), data, key)
        # 2 E epochs: v <- v - lr (grad(v) + lam (v - w_t)).
        v, (*_, own_key) = personal(sent, own), local.keys_of_training(key)
        optimizer = optax.chain(pull(sent.params, lam), local_sgd(setting, sent.round))
        params, stats, metrics = train(optimizer, v.params, v.stats, data, own_key, personal_epochs)
        # 3 return w - w_t; keep v.
        gradients = reply.metrics["image_gradients"] + metrics["image_gradients"]
        more = {"personal_loss": metrics["loss"], "image_gradients": gradients}
        return reply._replace(own=Own(jnp.array(True), Net(params, stats)), metrics=reply.metrics | more)

    def personalize(sent, own, data, key, steps):
        # 4 local test with v, which needs no further step.
        v, optimizer = personal(sent, own), optax.chain(pull(sent.params, lam), sgd(setting.finetune_lr))
        return Net(*train(optimizer, v.params, v.stats, data, key, steps=steps)[:2])

    return base._replace(init=init, client_update=client_update, personalize=personalize)
