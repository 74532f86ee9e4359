"""DARTS (Liu et al., ICLR 2019) under FedAvg: softmax alphas, trained with the weights, no MAML, one cut at the end."""

from fedmetanas_jax import local
from fedmetanas_jax.algorithms.searching import hold, searching
from fedmetanas_jax.core import Phase, SearchSpace, Setting
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import relax
from fedmetanas_jax.optimizers import adam, local_sgd, sgd, weights_and_alphas


def darts_fedavg(
    space: SearchSpace, setting: Setting, *, alpha_lr: float = 3e-4, alpha_weight_decay: float = 1e-3, cut: float = 0.9
) -> list[Phase]:
    """FedAvg of a supernet whose operations are weighed by the softmax of their logits.

    Args:
      alpha_lr, alpha_weight_decay: of the logits, Adam.
      cut: share of the rounds after which the best pairs and operations alone are left.
    """
    graph = space.graph

    def mix(sent, alpha, key):
        return relax.mix(graph, alpha, sent.mask, 1.0)

    def search(sent, loss, steps):
        alphas = adam(alpha_lr, alpha_weight_decay)
        return local.plain(loss), weights_and_alphas(local_sgd(setting, sent.round), alphas)

    def adapt(sent):
        return weights_and_alphas(sgd(setting.finetune_lr), hold(sent.mask, False))

    def prune(server, round, last):
        return masks.terminal(graph, server.alpha, server.mask)

    events = [round(cut * setting.rounds)]
    return searching(space, setting, mix=mix, search=search, adapt=adapt, prune=prune, events=events)
