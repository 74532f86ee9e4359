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
from fedmetanas_jax.algorithms.searching import Server, hold, searching
from fedmetanas_jax.core import Mask, Phase, SearchSpace, Setting
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
    alpha_lr: float = 3e-4,
    alpha_weight_decay: float = 1e-3,
    warmup: float = 0.05,
    temperature: float = 1.0,
    temperature_end: float = 0.1,
    temperature_until: float = 0.8,
    gumbel: bool = True,
    prune_from: float = 0.3,
    prune_until: float = 0.8,
    prune_every: int = 50,
    threshold: float = 0.01,
    terminal: bool = True,
    order: Literal[1, 2] = 1,
    tasks: Literal["pairs", "one", "split"] = "pairs",
) -> list[Phase]:
    """Joint first-order MAML search of weights and architecture, with soft pruning.

    The setting's local SGD is the weights' meta optimizer (D-8).

    Paper: Huang and Gao, arXiv 2504.06457

    Args:
      M: inner steps on the support batch before the query gradient (D-6).
      task_lr: of the weights in the inner steps, plain SGD (Eq. 9).
      task_alpha_lr: of the logits in the inner steps, times the temperature: at every temperature a step
        then moves a logit about as far, since the gradient grows as 1 / temperature.
      alpha_lr, alpha_weight_decay: the logits' meta optimizer, Adam with betas (0.5, 0.999).
      warmup: share of the rounds in which the logits stand still.
      temperature, temperature_end, temperature_until: linear over that share of the rounds, then constant (D-9).
      gumbel: Gumbel-softmax (Eq. 1); False is the plain softmax.
      prune_from, prune_until, prune_every, threshold: events every so many rounds between those shares of
        the run clear what weighs less than the threshold (D-13, D-14).
      terminal: the last event leaves one pair per node and one operation per edge.
      order: 2 differentiates through the inner steps; memory grows with M, time about doubles (D-33).
      tasks: how an epoch is cut into support and query (D-7).
    """
    _check(M=(M, M >= 0, "0 or more"), order=(order, order in (1, 2), "1 or 2"))
    _check(prune_from=(prune_from, 0 <= prune_from <= prune_until <= 1, f"0 to prune_until = {prune_until}, that to 1"))
    _check(prune_every=(prune_every, prune_every >= 1, "at least 1 round"))
    _check(threshold=(threshold, 0 <= threshold < 1, "from 0 to below 1"))
    _check(temperature=(temperature, temperature > 0, "positive"))
    _check(temperature_end=(temperature_end, temperature_end > 0, "positive"))
    _check(temperature_until=(temperature_until, 0 < temperature_until <= 1, "above 0, at most 1"))
    falling = schedule.linear(temperature, temperature_end, temperature_until)

    def tau(sent: Server):
        return falling(sent.round / setting.rounds)

    def mix(sent: Server, alpha, key):  # Eq. 1 and 8
        return relax.mix(space.graph, alpha, sent.mask, tau(sent), key if gumbel else None)

    def held(sent: Server):
        return hold(sent.mask, sent.round / setting.rounds >= warmup)

    def inner(sent: Server):  # Eq. 9: w <- w - task_lr grad, alpha <- alpha - task_alpha_lr tau grad
        return weights_and_alphas(sgd(task_lr), optax.chain(sgd(task_alpha_lr * tau(sent)), held(sent)))

    def client_search(sent: Server, loss):  # Algorithm 1, lines 11 to 18
        outer = weights_and_alphas(  # Eq. 10
            local_sgd(setting, sent.round), optax.chain(adam(alpha_lr, alpha_weight_decay), held(sent))
        )
        return maml.gradient(loss, inner(sent), M=M, order=order), outer

    def prune(server: Server, last: bool) -> Mask:  # line 19, on the server (D-12)
        mask = masks.prune(space.graph, server.alpha, server.mask, tau(server), threshold)
        return masks.terminal(space.graph, server.alpha, mask) if last and terminal else mask

    return searching(
        space,
        setting,
        mix=mix,
        search=client_search,
        adapt=inner,  # inner steps, one after another over the client's images (D-27)
        prune=prune,
        events=schedule.events(setting.rounds, prune_from, prune_until, prune_every),
        batches=2,
        tasks=tasks,
        report=lambda server: {"temperature": tau(server)},
    )


def _check(**options: tuple) -> None:
    for name, (value, good, allowed) in options.items():
        if not good:
            raise ValueError(f"{name} is {value}; it must be {allowed}")
