"""FedMetaNAS: federated architecture search with model-agnostic meta-learning.

Huang, Gao: Federated Neural Architecture Search with Model-Agnostic Meta Learning, arXiv 2504.06457.
Every client adapts weights and architecture parameters alpha to a support batch, takes the gradient of a
query batch there, and moves its own copy with it (Algorithm 1, "Client Search"). The server averages both.
From time to time it prunes operations and pairs of inputs whose noise-free weight has become small; the
rounds that follow run the smaller network, and what is left in the end needs no retraining.
"""

from itertools import pairwise
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedmetanas_jax import local, maml, optimizers
from fedmetanas_jax.core import (
    Algorithm,
    Alpha,
    Array,
    ClientUpdate,
    Examples,
    Mask,
    Net,
    Phase,
    SearchSpace,
    Setting,
    Tree,
)  # fmt: skip
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import relax


class ServerState(NamedTuple):
    """What the server keeps between rounds."""

    round: Array  # [] int32
    params: Tree  # w
    stats: Tree
    alpha: Alpha
    mask: Mask


def fedmetanas(
    space: SearchSpace,
    setting: Setting,
    *,
    M: int = 1,
    task_lr: float = 0.01,
    task_alpha_lr: float = 1.0,
    lr: float = 0.025,
    lr_end: float = 0.001,
    momentum: float = 0.9,
    weight_decay: float = 3e-4,
    clip: float = 5.0,
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

    Paper: Huang and Gao, arXiv 2504.06457

    Args:
      M: inner steps on the support batch before the query gradient (D-6).
      task_lr: of the weights in the inner steps, plain SGD (Eq. 9).
      task_alpha_lr: of the logits in the inner steps, times the temperature: at every temperature a step
        then moves a logit about as far, since the gradient grows as 1 / temperature.
      lr, lr_end, momentum, weight_decay, clip: the weights' meta optimizer, SGD, cosine over the rounds (D-8).
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

    def share(round: Array) -> Array:
        return round / setting.rounds

    def temperature_at(round: Array) -> Array:
        progress = jnp.clip(share(round) / temperature_until, 0.0, 1.0)
        return temperature + (temperature_end - temperature) * progress

    lr_at = optimizers.cosine(setting.rounds, lr, lr_end)

    def make(plan) -> Algorithm:
        net = space.make(plan)

        def init(key):
            net_key, alpha_key = jax.random.split(key)
            params, stats = net.init(net_key)
            alpha = relax.init_alpha(alpha_key, space.nodes)
            return ServerState(jnp.int32(0), params, stats, alpha, masks.full(space.nodes)), ()

        def pieces(server: ServerState):
            """Loss and optimizers of this round; `variables` are the weights and alpha together (Eq. 9, 10)."""
            temperature = temperature_at(server.round)
            searching = share(server.round) >= warmup

            def loss(variables, stats, batch: Examples, key):
                mix = relax.mix(variables["alpha"], server.mask, temperature, key if gumbel else None)
                logits, moments = net.apply(variables["params"], stats, batch.image, mix, True)
                value = local.cross_entropy(logits, batch.label, batch.weight)
                return value, (moments, local.accuracy(logits, batch.label, batch.weight))

            hold = _hold(server.mask, searching)
            task = _each(
                optimizers.sgd(task_lr), optax.chain(optimizers.sgd(task_alpha_lr * temperature), hold)
            )
            meta = _each(
                optimizers.sgd(lr_at(server.round), momentum, weight_decay, clip),
                optax.chain(_adam(alpha_lr, alpha_weight_decay), hold),
            )
            return loss, task, meta

        def client_update(server: ServerState, client_state, data: Examples, key) -> ClientUpdate:
            loss, task, meta = pieces(server)
            variables = {"params": server.params, "alpha": server.alpha}
            variables, stats, metrics = maml.fit(  # Algorithm 1, lines 11-18
                loss, task, meta, variables, server.stats, data, key,
                batch=setting.batch, epochs=setting.epochs, augment=setting.augment,
                momentum=net.momentum, steps=M, order=order, tasks=tasks,
            )  # fmt: skip
            update = (variables["params"], stats, variables["alpha"])  # line 21: the meta variables
            return ClientUpdate(update, jnp.sum(data.weight), client_state, metrics)

        def server_update(server: ServerState, mean) -> ServerState:
            params, stats, alpha = mean  # lines 7 and 8
            # A mean of equal numbers may differ in the last bit; what is pruned must not move at all.
            alpha = Alpha(*map(jnp.where, server.mask, alpha, server.alpha))
            return server._replace(round=server.round + 1, params=params, stats=stats, alpha=alpha)

        def personalize(server: ServerState, client_state, data: Examples, key, steps) -> Net:
            loss, task, _ = pieces(server)  # inner steps, one after another over the client's images (D-27)
            variables, stats, _ = local.fit(
                loss, task,
                {"params": server.params, "alpha": server.alpha}, server.stats, data, key,
                batch=setting.batch, epochs=setting.epochs, augment=setting.augment, momentum=net.momentum, steps=steps,
            )  # fmt: skip
            mix = relax.mix(variables["alpha"], server.mask, temperature_at(server.round))
            return Net(variables["params"], stats, mix)

        def soft_model(server: ServerState) -> Net:
            mix = relax.mix(server.alpha, server.mask, temperature_at(server.round))
            return Net(server.params, server.stats, mix)

        def discrete_model(server: ServerState) -> Net:
            return Net(server.params, server.stats, relax.harden(server.alpha, server.mask))

        def report(server: ServerState) -> dict:
            ops, pairs = masks.alive(server.mask)
            return {
                "temperature": temperature_at(server.round),
                "ops_alive": ops,
                "pairs_alive": pairs,
                "alpha_max": masks.confidence(server.alpha, server.mask),
            }

        return Algorithm(
            init, client_update, server_update, personalize,
            forward=lambda model, image, train: net.apply(model.params, model.stats, image, model.mix, train),
            broadcast=lambda server: (server.params, server.stats, server.alpha, server.mask),
            macs=net.macs, depth="epoch", least_rows=2 * setting.batch,
            global_model=soft_model, discrete_model=discrete_model, report=report,
        )  # fmt: skip

    def prune(server: ServerState, plan, last: bool):
        """Line 19, on the server (D-12): clears the mask; the program `plan` still computes everything."""
        mask = masks.prune(server.alpha, server.mask, temperature_at(server.round), threshold)
        if last and terminal:
            mask = masks.terminal(server.alpha, mask)
        return plan, server._replace(mask=mask)

    def shrink(server: ServerState, plan):
        """The same function by a smaller program: -> (what is alive, the state cut down to it)."""
        after = masks.keep(server.mask)
        params, stats = (space.carry_over(x, plan, after) for x in (server.params, server.stats))
        return after, server._replace(params=params, stats=stats)

    def phases_of(t: int, until: int) -> list[Phase]:
        """An event at round t, and its smaller program at once or, with `setting.ahead`, some rounds later."""
        if setting.ahead == 0:
            return [Phase(t, lambda server, plan: shrink(prune(server, plan, t == last)[1], plan), make, "prune")]
        event = Phase(t, lambda server, plan: prune(server, plan, t == last), make, "prune")
        smaller = Phase(t + setting.ahead, shrink, make, "program", lambda server: masks.keep(server.mask))
        return [event, smaller] if smaller.start < until else [event]

    last = round(prune_until * setting.rounds)
    events = sorted({*range(round(prune_from * setting.rounds), last, prune_every), last} - {0})
    events = [t for t in events if t < setting.rounds]
    search = Phase(0, lambda server, plan: (masks.full_keep(space.nodes), server), make)
    spans = pairwise([*events, setting.rounds])
    return [search, *(phase for t, until in spans for phase in phases_of(t, until))]


def _check(**options: tuple) -> None:
    for name, (value, good, allowed) in options.items():
        if not good:
            raise ValueError(f"{name} is {value}; it must be {allowed}")


def _each(params: optax.GradientTransformation, alpha: optax.GradientTransformation):
    """One optimizer for the weights and one for the logits."""
    return optax.multi_transform({"params": params, "alpha": alpha}, {"params": "params", "alpha": "alpha"})


def _adam(lr: float, weight_decay: float) -> optax.GradientTransformation:
    """Adam with L2 decay in the gradient, as PyTorch has it, and DARTS's betas."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay), optax.scale_by_adam(b1=0.5, b2=0.999), optax.scale_by_learning_rate(lr)
    )


def _hold(mask: Mask, searching: Array) -> optax.GradientTransformation:
    """No step for pruned logits (decay and momentum would move them), nor for any during warm-up."""

    def step(updates: dict, variables=None) -> dict:
        held = (jnp.where(alive & searching, x, 0) for alive, x in zip(mask, updates["alpha"], strict=True))
        return updates | {"alpha": Alpha(*held)}

    return optax.stateless(step)
