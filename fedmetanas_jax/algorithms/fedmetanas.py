"""FedMetaNAS: federated architecture search with model-agnostic meta-learning.

Huang, Gao: Federated Neural Architecture Search with Model-Agnostic Meta Learning, arXiv 2504.06457.
Every client adapts weights and architecture parameters alpha to a support batch, takes the gradient of a
query batch there, and moves its own copy with it (Algorithm 1, "Client Search"). The server averages both.
From time to time it prunes operations and pairs of inputs whose noise-free weight has become small; the
rounds that follow run the smaller network, and what is left in the end needs no retraining.
"""

from typing import Literal

import optax

from fedmetanas_jax import maml
from fedmetanas_jax.algorithms import retraining
from fedmetanas_jax.algorithms.checks import check
from fedmetanas_jax.algorithms.personal import Part
from fedmetanas_jax.algorithms.searching import Server, hold, searching
from fedmetanas_jax.core import Array, Mask, Phase, Plan, SearchSpace, Setting
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import relax, schedule
from fedmetanas_jax.optimizers import adam, local_sgd, sgd, weights_and_alphas


def fedmetanas(
    space: SearchSpace,
    setting: Setting,
    *,
    M: int = 1,
    task_lr: float = 0.01,
    task_alpha_lr: float = 1.0,
    alpha_lr: float | None = None,
    travel: float = 40.0,
    alpha_weight_decay: float = 0.0,
    warmup: float = 0.06,
    anneal: Literal["exponential", "linear"] = "exponential",
    temperature: float = 1.0,
    temperature_end: float = 0.1,
    temperature_until: float = 0.5,
    gumbel: bool = True,
    prune: Literal["line", "threshold"] = "line",
    prune_from: float = 0.15,
    prune_until: float = 0.5,
    prune_events: int = 18,
    threshold: float = 0.01,
    cap: float = 0.25,
    terminal: bool = True,
    prune_tolerance: float | None = 0.01,
    retrain: float = 0.0,
    order: Literal[1, 2] = 1,
    tasks: Literal["pairs", "one", "split"] = "pairs",
    personal: Part | None = None,
) -> list[Phase]:
    """Joint first-order MAML search of weights and architecture, with soft pruning.

    The setting's local SGD is the weights' meta optimizer (D-8).

    Paper: Huang and Gao, arXiv 2504.06457

    Args:
      M: inner steps on the support batch before the query gradient (D-6).
      task_lr: of the weights in the inner steps, plain SGD (Eq. 9).
      task_alpha_lr: of the logits in the inner steps, times the temperature: at every temperature a step
        then moves a logit about as far, since the gradient grows as 1 / temperature.
      alpha_lr, alpha_weight_decay: the logits' meta optimizer, Adam with betas (0.5, 0.999). none = the rate at
        which a logit can go as far as `travel` between the warm-up and the last event, however long the run is. Of a
        decay Adam makes whole steps where the loss says little, which at a low temperature is nearly everywhere (D-8).
      warmup: share of the rounds in which the logits stand still.
      anneal, temperature, temperature_end, temperature_until: how it falls over that share of the rounds; then it is
        constant (D-9).
      gumbel: Gumbel-softmax (Eq. 1); False is the plain softmax.
      prune_from, prune_until, prune_events: the server prunes so many times between those shares of the run (D-13).
      threshold: an event clears what weighs less in a row, noise-free, at the temperature of the round (D-14).
      prune, cap: "line" lets an event clear further what weighs least, until no more is alive than on a straight line
        from everything at prune_from to a discrete network at prune_until; but nothing that weighs more than a bound,
        which grows from the cap to 1 in that time, by equal factors. "threshold" is the paper's rule alone.
      terminal: the last event leaves one pair per node and one operation per edge.
      prune_tolerance: accuracy on the clients' training images that an event may cost; one that would cost more is put
        off and said, so that pruning is never the reason for a drop. none = any.
      retrain: share of the rounds, at the end, in which the network found is trained again from scratch; the shares and
        schedules of the search are then of the rounds before. 0 = none, as the paper claims to need none.
      order: 2 differentiates through the inner steps; memory grows with M, time about doubles (D-33).
      tasks: how an epoch is cut into support and query (D-7).
      personal: what the inner steps move, for meta-FedPNAS; None: all of the network.
    """
    check(M=(M, M >= 0, "0 or more"), order=(order, order in (1, 2), "1 or 2"))
    check(prune_from=(prune_from, 0 <= prune_from <= prune_until <= 1, f"0 to prune_until = {prune_until}, that to 1"))
    check(prune_events=(prune_events, prune_events >= 1, "at least 1"))
    check(threshold=(threshold, 0 <= threshold < 1, "from 0 to below 1"))
    check(cap=(cap, 0 < cap <= 1, "above 0, at most 1"), warmup=(warmup, 0 <= warmup <= 1, "0 to 1"))
    check(alpha_lr=(alpha_lr, alpha_lr is None or alpha_lr >= 0, "none, 0 or more"))
    check(travel=(travel, travel >= 0, "0 or more"))
    bearable = prune_tolerance is None or prune_tolerance >= 0
    check(prune_tolerance=(prune_tolerance, bearable, "none, 0 or more"))
    check(temperature=(temperature, temperature > 0, "positive"))
    check(temperature_end=(temperature_end, temperature_end > 0, "positive"))
    check(temperature_until=(temperature_until, 0 < temperature_until <= 1, "above 0, at most 1"))
    check(retrain=(retrain, 0 <= retrain < 1, "from 0 to below 1"))
    whole, setting = setting, setting._replace(rounds=setting.rounds - round(retrain * setting.rounds))
    graph, falling = space.graph, schedule.SHAPES[anneal](temperature, temperature_end, temperature_until)

    def tau(sent: Server):
        return falling(sent.round / setting.rounds)

    def mix(sent: Server, alpha, key):  # Eq. 1 and 8
        return relax.mix(graph, alpha, sent.mask, tau(sent), key if gumbel else None)

    def held(sent: Server):
        return hold(sent.mask, sent.round / setting.rounds >= warmup)

    def inner(sent: Server):  # Eq. 9: w <- w - task_lr grad, alpha <- alpha - task_alpha_lr tau grad
        both = weights_and_alphas(sgd(task_lr), optax.chain(sgd(task_alpha_lr * tau(sent)), held(sent)))
        return both if personal is None else personal.alone(both)

    def client_search(sent: Server, loss, steps: Array):  # Algorithm 1, lines 11 to 18
        rate = alpha_lr
        if rate is None:
            rate = schedule.travel_rate(travel, (prune_until - warmup) * setting.rounds, steps)
        outer = weights_and_alphas(  # Eq. 10
            local_sgd(setting, sent.round), optax.chain(adam(rate, alpha_weight_decay), held(sent))
        )
        return maml.gradient(loss, inner(sent), M=M, order=order), outer

    def pruned(server: Server, round: int, last: bool) -> Mask:  # line 19, on the server (D-12)
        mask = masks.prune(graph, server.alpha, server.mask, tau(server), threshold)
        if last and terminal:
            return masks.terminal(graph, server.alpha, mask)
        if prune == "threshold":
            return mask
        share = (round / setting.rounds - prune_from) / max(prune_until - prune_from, 1e-9)
        ops, pairs = (schedule.alive_at(*ends, share) for ends in zip(*masks.sizes(graph), strict=True))
        bound = cap ** (1 - share)
        return masks.thin(graph, server.alpha, mask, tau(server), ops=ops, pairs=pairs, cap=bound)

    def found(server: Server) -> Plan:  # discrete also where the last event was put off, or is none
        return masks.plan_of(graph, masks.terminal(graph, server.alpha, server.mask))

    phases = searching(
        space._replace(skips=space.skips and order == 1),  # what skips has a first derivative alone
        setting,
        mix=mix,
        search=client_search,
        adapt=inner,  # inner steps, one after another over the client's images (D-27)
        prune=pruned,
        events=schedule.events(setting.rounds, prune_from, prune_until, prune_events),
        tolerance=prune_tolerance,
        batches=2,
        tasks=tasks,
        personal=(lambda name: True) if personal is None else personal.has,
        report=lambda server: {"temperature": tau(server)},
    )
    return [*phases, retraining.retrain(space, whole, setting.rounds, found)] if retrain else phases
