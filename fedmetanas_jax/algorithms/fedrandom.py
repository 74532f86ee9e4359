"""A network drawn at random, trained by FedAvg: what a search has to beat.

Li, Talwalkar: Random Search and Reproducibility for Neural Architecture Search, UAI 2019. Whatever a search ends in
is drawn alike: a pair of inputs for every node and an operation for every edge that stays, `none` among them (D-34).
"""

import jax
import jax.numpy as jnp
import optax

from fedmetanas_jax import local
from fedmetanas_jax.algorithms.searching import Server, searching
from fedmetanas_jax.core import Array, Graph, Phase, Plan, SearchSpace, Setting
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import relax
from fedmetanas_jax.optimizers import local_sgd, sgd, weights_and_alphas


def draw(graph: Graph, key: Array) -> Plan:
    """The plan of a network drawn uniformly from all that a terminal event can leave."""
    everything = masks.full(graph)  # the largest of logits that are drawn alike is any one of them, equally often
    return masks.plan_of(graph, masks.terminal(graph, relax.init_alpha(key, graph), everything))


def fedrandom(space: SearchSpace, setting: Setting, *, architecture_seed: int | None = None) -> list[Phase]:
    """Federated averaging of a network that is drawn from the search space before the first round.

    Paper: Li and Talwalkar, UAI 2019 (the control), McMahan et al., AISTATS 2017 (its training)

    Args:
      architecture_seed: of the draw alone, so that many networks can share one federation; none = the run's seed.
    """
    if architecture_seed is not None and not 0 <= architecture_seed < 2**32:
        raise ValueError(f"architecture_seed is {architecture_seed}; it must be none, or 0 to 2**32 - 1")

    def begin(key):
        return draw(space.graph, key if architecture_seed is None else jax.random.key(architecture_seed))

    def mix(sent: Server, alpha, key):  # what the mask has, each at weight 1; the logits play no part
        weight = relax.edge_weight(space.graph, sent.mask.pair.astype(jnp.float32))
        return weight[..., None] * sent.mask.op

    def weights_alone(optimizer):
        return weights_and_alphas(optimizer, optax.set_to_zero())

    return searching(
        space,
        setting,
        mix=mix,
        search=lambda sent, loss, steps: (local.plain(loss), weights_alone(local_sgd(setting, sent.round))),
        adapt=lambda sent: weights_alone(sgd(setting.finetune_lr)),
        begin=begin,
    )
