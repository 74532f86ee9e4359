"""FedBABU: Toward Enhanced Representation for Federated Image Classification.

Oh, Kim, Yun; ICLR 2022. Body Aggregation and Body Update.
"""

from typing import Literal

from fedmetanas_jax import local, tree
from fedmetanas_jax.algorithms.averaging import averaging
from fedmetanas_jax.core import Algorithm, Model, Setting
from fedmetanas_jax.optimizers import inside_and_outside, local_sgd, only, sgd


def fedbabu(
    model: Model,
    setting: Setting,
    *,
    head: tuple[str, ...] | None = None,
    finetune: Literal["all", "head", "body"] = "all",
) -> Algorithm:
    """FedAvg of the body alone, under a head that keeps its random start until a client personalises.

    Paper: Oh, Kim and Yun, ICLR 2022

    Args:
      head: the top-level names of the parameters that are never trained; none = the last linear layer (D-25).
      finetune: what a client fits to its own images before it is evaluated, by plain SGD at setting.finetune_lr.
    """
    head = local.head_of(model, head)
    is_head, is_body = inside_and_outside(head)
    tuned = {"all": lambda path: True, "head": is_head, "body": is_body}[finetune]
    finetuning = only(tuned, sgd(setting.finetune_lr))
    base = averaging(model, setting, lambda sent: only(is_body, local_sgd(setting, sent.round)), finetuning)

    def init(key):
        server, _ = base.init(key)
        return server, tree.split(server.params, head)[0]  # h_0, which every client is given once and keeps

    def send(server, client, key):
        return base.send(server, client, key)._replace(params=tree.split(server.params, head)[1])

    def client_update(sent, initial_head, data, key):
        # 1 w <- (body_t, h_0).  2 E epochs: SGD on the body; gradients flow through the head.
        whole = sent._replace(params=sent.params | initial_head)
        reply = base.client_update(whole, initial_head, data, key)
        # 3 return the body.
        return reply._replace(change=reply.change | {"params": tree.split(reply.change["params"], head)[1]})

    def server_update(server, merged):
        # 4 average.
        h_0, body = tree.split(server.params, head)
        after = base.server_update(server._replace(params=body), merged)
        return after._replace(params=after.params | h_0)

    def personalize(sent, initial_head, data, key, steps):
        # 5 personalise: fine-tune.
        return base.personalize(sent._replace(params=sent.params | initial_head), (), data, key, steps)

    return base._replace(
        init=init,
        send=send,
        client_update=client_update,
        server_update=server_update,
        personalize=personalize,
        depth="epochs",
    )
