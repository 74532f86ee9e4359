"""FedRep: Exploiting Shared Representations for Personalized Federated Learning.

Collins, Hassani, Mokhtari, Shakkottai; ICML 2021.
"""

import jax.numpy as jnp

from fedmetanas_jax import local, tree
from fedmetanas_jax.algorithms.averaging import averaging
from fedmetanas_jax.core import Algorithm, Model, Reply, Setting
from fedmetanas_jax.optimizers import inside_and_outside, local_sgd, only, sgd


def fedrep(
    model: Model,
    setting: Setting,
    *,
    head: tuple[str, ...] | None = None,
    head_epochs: int | None = None,
    body_epochs: int = 1,
) -> Algorithm:
    """A body that all clients share and average, under a head of each client's own.

    Before it is evaluated a client fits its head, body frozen, by plain SGD at setting.finetune_lr.

    Paper: Collins et al., ICML 2021

    Args:
      head: the top-level names of the parameters that stay with the client; none = the last linear layer (D-25).
      head_epochs, body_epochs: local epochs on the head with the body frozen, then the other way round; none =
        all of a round's epochs but those of the body.
    """
    head = local.head_of(model, head)
    head_epochs = setting.epochs - body_epochs if head_epochs is None else head_epochs
    if head_epochs < 0 or body_epochs < 0:
        raise ValueError(f"head_epochs is {head_epochs} and body_epochs is {body_epochs}; both must be 0 or more")
    train, (is_head, is_body) = local.trainer(model, setting), inside_and_outside(head)
    finetune = only(is_head, sgd(setting.finetune_lr))
    base = averaging(model, setting, lambda sent: local_sgd(setting, sent.round), finetune)

    def init(key):
        server, _ = base.init(key)
        return server, tree.split(server.params, head)[0]  # every client's first head is the common one

    def send(server, client, key):
        return base.send(server, client, key)._replace(params=tree.split(server.params, head)[1])

    def client_update(sent, own_head, data, key):
        # 1 body <- server, head <- own.  2 E - 1 epochs: SGD on the head, body frozen. Freezing is of weights
        # alone: batch norms go on averaging in both stages, and their statistics travel with the body.
        optimizer, (*_, head_key) = local_sgd(setting, sent.round), local.keys_of_training(key)
        params, stats, first = train(
            only(is_head, optimizer), sent.params | own_head, sent.stats, data, head_key, head_epochs
        )
        # 3 one epoch: SGD on the body, head frozen.
        params, stats, metrics = train(only(is_body, optimizer), params, stats, data, key, body_epochs)
        metrics["image_gradients"] += first["image_gradients"]
        # 4 return the body; keep the head. It is sent as well, for the mean head of the server's network (D-24): whole,
        # since nothing of a head was sent that it could differ from.
        kept, body = tree.split(params, head)
        change = {"params": tree.sub(body, sent.params) | kept, "stats": tree.sub(stats, sent.stats)}
        return Reply(change, jnp.sum(data.weight), kept, (), metrics)

    def server_update(server, merged):
        # 5 average.
        none, body = tree.split(server.params, head)
        return base.server_update(server._replace(params=body | tree.zeros_like(none)), merged)

    def personalize(sent, own_head, data, key, steps):
        # 6 body frozen, SGD on the head.
        return base.personalize(sent._replace(params=sent.params | own_head), (), data, key, steps)

    return base._replace(
        init=init,
        send=send,
        client_update=client_update,
        server_update=server_update,
        personalize=personalize,
        depth="epochs",
    )
