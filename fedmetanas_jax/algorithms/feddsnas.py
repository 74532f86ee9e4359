"""FedDSNAS: direct federated neural architecture search.

Garg, Saha, Dutta: Direct Federated Neural Architecture Search, arXiv 2010.06223: DSNAS (Hu et al., CVPR 2020) on every
client, the mean of weights and logits on the server. Every step draws one operation for each edge and trains it alone;
one backward pass gives the weights' gradient and, from what each edge's output was worth, that of its logits.
"""

import jax.numpy as jnp
import optax

from fedmetanas_jax import local
from fedmetanas_jax.algorithms.checks import check
from fedmetanas_jax.algorithms.searching import Server, searching
from fedmetanas_jax.core import Array, Mask, Phase, SearchSpace, Setting
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import relax, sample, schedule
from fedmetanas_jax.optimizers import adam, local_sgd, sgd, weights_and_alphas


def feddsnas(
    space: SearchSpace,
    setting: Setting,
    *,
    alpha_lr: float | None = None,
    travel: float = 57.0,
    alpha_clip: float = 10.0,
    freeze_gap: float | None = None,
    none: bool = False,
    search: float = 0.6,
) -> list[Phase]:
    """Single-path search by DSNAS's score on every client, averaged; then the likeliest network by FedAvg.

    Nodes sum all their inputs. The network that is evaluated has the likeliest operation of every edge.

    Paper: Garg, Saha and Dutta, arXiv 2010.06223; Hu et al., DSNAS, CVPR 2020

    Args:
      alpha_lr: of the logits, Adam with betas (0.5, 0.999) and no decay, started afresh each round. none = the rate at
        which a logit can go as far as `travel` in the search, however long it is.
      travel: 57 is DSNAS's rate 1e-3 in the 600 rounds of 95 steps of the paper-sized search (D-47).
      alpha_clip: largest norm of the logits' gradient.
      freeze_gap: an edge is decided once its likeliest operation is ahead by so much probability (DSNAS on ImageNet:
        0.3); none = never before the end.
      none: whether `none` is a candidate. DSNAS's own space has no such operation, and its score cannot tell when one
        is needed: the score of an output of 0 is 0, so `none` gains whatever the others lose, and on CIFAR-10 it took
        all inputs of a cell within 10 rounds (D-34).
      search: share of the rounds that search; the rest trains the network found, its weights inherited (D-44).
    """
    check(search=(search, 0 < search <= 1, "above 0, at most 1"), travel=(travel, travel >= 0, "0 or more"))
    check(freeze_gap=(freeze_gap, freeze_gap is None or 0 < freeze_gap <= 1, "none, or above 0, at most 1"))
    check(alpha_lr=(alpha_lr, alpha_lr is None or alpha_lr >= 0, "none, 0 or more"))
    check(alpha_clip=(alpha_clip, alpha_clip > 0, "positive"))
    space, rounds = space.resized(every_edge=True), search * setting.rounds
    graph = space.graph

    def mix(sent: Server, alpha, key):  # 1 Z ~ softmax(alpha); without a key the likeliest
        if key is None:
            return relax.harden(graph, alpha, sent.mask)
        return sample.scored(graph, alpha, decided(sent), key)

    def decided(sent: Server) -> Mask:
        if freeze_gap is None:
            return sent.mask
        first_two = jnp.sort(relax.softmax(graph, sent.alpha, sent.mask, 1.0).op, axis=-1)[..., -2:]
        ahead = first_two[..., 1] - first_two[..., 0] >= freeze_gap
        best = relax.best(graph, sent.alpha, sent.mask)
        return sent.mask._replace(op=jnp.where(ahead[..., None], best.op, sent.mask.op))

    def client_search(sent: Server, backward: local.Gradient, steps: Array):
        # 2 one pass through Z: the gradient of w, and r (Z - p) for alpha.
        # 3 w <- SGD(w), of what was drawn alone (D-17).  4 alpha <- Adam(alpha).
        rate = schedule.travel_rate(travel, rounds, steps) if alpha_lr is None else alpha_lr
        alphas = optax.chain(optax.clip_by_global_norm(alpha_clip), adam(rate, 0.0))
        return backward, weights_and_alphas(local_sgd(setting, sent.round), alphas)

    border = round(rounds)
    return searching(
        space,
        setting,
        mix=mix,
        search=client_search,
        adapt=lambda sent: weights_and_alphas(sgd(setting.finetune_lr), optax.set_to_zero()),
        adapt_mix=lambda sent, alpha, key: mix(sent, alpha, None),
        prune=lambda server, round, last: masks.terminal(graph, server.alpha, server.mask),
        events=[border] if 0 < border < setting.rounds else [],
        depth="epochs",
        begin=lambda key: masks.full_plan(graph, none),
        sampled=True,
    )
