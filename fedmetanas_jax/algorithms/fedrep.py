"""FedRep: Exploiting Shared Representations for Personalized Federated Learning.

Collins, Hassani, Mokhtari, Shakkottai; ICML 2021.
"""

import jax
import jax.numpy as jnp

from fedmetanas_jax import local, tree
from fedmetanas_jax.algorithms.fedavg import averaging
from fedmetanas_jax.core import Algorithm, ClientUpdate, Model, Setting
from fedmetanas_jax.optimizers import inside_and_outside, only, scheduled_sgd, sgd


def fedrep(
    model: Model,
    setting: Setting,
    *,
    head: tuple[str, ...] | None = None,
    head_epochs: int | None = None,
    body_epochs: int = 1,
    lr: float = 0.025,
    lr_end: float = 0.001,
    momentum: float = 0.9,
    weight_decay: float = 3e-4,
    clip: float | None = None,
    finetune_lr: float = 0.01,
) -> Algorithm:
    """A body that all clients share and average, under a head of each client's own.

    Paper: Collins et al., ICML 2021

    Args:
      head: the top-level names of the parameters that stay with the client; none = the last linear layer (D-25).
      head_epochs, body_epochs: local epochs on the head with the body frozen, then the other way round; none =
        all of a round's epochs but those of the body.
      lr, lr_end, momentum, weight_decay, clip: local SGD of both, cosine over the rounds.
      finetune_lr: of the plain SGD that fits the head of a client before it is evaluated, body frozen.
    """
    head = local.head_of(model, head)
    head_epochs = setting.epochs - body_epochs if head_epochs is None else head_epochs
    if head_epochs < 0 or body_epochs < 0:
        raise ValueError(f"head_epochs is {head_epochs} and body_epochs is {body_epochs}; both must be 0 or more")
    sgd_at = scheduled_sgd(setting, lr, lr_end, momentum, weight_decay, clip)
    train, (is_head, is_body) = local.trainer(model, setting), inside_and_outside(head)
    base = averaging(model, setting, lambda server: sgd_at(server.round), only(is_head, sgd(finetune_lr)))

    def init(key):
        server, _ = base.init(key)
        return server, tree.split(server.params, head)[0]  # every client's first head is the common one

    def client_update(server, own_head, data, key):
        # 1 body <- server, head <- own.  2 E - 1 epochs: SGD on the head, body frozen. Freezing is of weights
        # alone: batch norms go on averaging in both stages, and their statistics travel with the body.
        optimizer, head_key = sgd_at(server.round), jax.random.fold_in(key, 1)
        params, stats, first = train(
            only(is_head, optimizer), server.params | own_head, server.stats, data, head_key, head_epochs
        )
        # 3 one epoch: SGD on the body, head frozen.
        params, stats, metrics = train(only(is_body, optimizer), params, stats, data, key, body_epochs)
        metrics["image_gradients"] += first["image_gradients"]
        # 4 return the body; keep the head. It is sent as well, for the mean head of the server's network (D-24).
        return ClientUpdate((params, stats), jnp.sum(data.weight), tree.split(params, head)[0], metrics)

    def personalize(server, own_head, data, key, steps):
        # 6 body frozen, SGD on the head.
        return base.personalize(server._replace(params=server.params | own_head), (), data, key, steps)

    return base._replace(
        init=init,
        client_update=client_update,
        personalize=personalize,
        broadcast=lambda server: (tree.split(server.params, head)[1], server.stats),
        depth="epochs",
    )
