"""FedBABU: Toward Enhanced Representation for Federated Image Classification.

Oh, Kim, Yun; ICLR 2022. Body Aggregation and Body Update.
"""

from typing import Literal

from fedmetanas_jax import local, tree
from fedmetanas_jax.algorithms.fedavg import averaging
from fedmetanas_jax.core import Algorithm, ClientUpdate, Model, Setting
from fedmetanas_jax.optimizers import inside_and_outside, only, scheduled_sgd, sgd


def fedbabu(
    model: Model,
    setting: Setting,
    *,
    head: tuple[str, ...] | None = None,
    finetune: Literal["all", "head", "body"] = "all",
    finetune_lr: float = 0.01,
    lr: float = 0.025,
    lr_end: float = 0.001,
    momentum: float = 0.9,
    weight_decay: float = 3e-4,
    clip: float | None = None,
) -> Algorithm:
    """FedAvg of the body alone, under a head that keeps its random start until a client personalises.

    Paper: Oh, Kim and Yun, ICLR 2022

    Args:
      head: the top-level names of the parameters that are never trained; none = the last linear layer (D-25).
      finetune, finetune_lr: what a client fits to its own images before it is evaluated, by plain SGD.
      lr, lr_end, momentum, weight_decay, clip: local SGD of the body, cosine over the rounds.
    """
    head = local.head_of(model, head)
    is_head, is_body = inside_and_outside(head)
    sgd_at = scheduled_sgd(setting, lr, lr_end, momentum, weight_decay, clip)
    tuned = {"all": lambda path: True, "head": is_head, "body": is_body}[finetune]
    # 1 w <- (body_t, h_0).  2 E epochs: SGD on the body; gradients flow through the head.
    # 5 personalise: fine-tune.
    base = averaging(
        model, setting, lambda server: only(is_body, sgd_at(server.round)), only(tuned, sgd(finetune_lr))
    )

    def client_update(server, client_state, data, key) -> ClientUpdate:
        # 3 return the body.
        out = base.client_update(server, client_state, data, key)
        params, stats = out.update
        return out._replace(update=(tree.split(params, head)[1], stats))

    def server_update(server, mean):
        # 4 average.
        body, stats = mean
        return base.server_update(server, (server.params | body, stats))

    return base._replace(
        client_update=client_update,
        server_update=server_update,
        broadcast=lambda server: (tree.split(server.params, head)[1], server.stats),
        depth="epochs",
    )
