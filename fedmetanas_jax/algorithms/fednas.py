"""FedNAS: federated deep learning via neural architecture search.

He, Annavaram, Avestimehr: FedNAS, arXiv 2004.08546: MiLeNAS (He, Ye, Shen, Zhang; CVPR 2020) on every client, the mean
of weights and logits on the server. A client holds half of its rows back from its weights, to move the logits by. What
the search ends with is cut to two inputs a node by DARTS's rule, and that network is trained again from scratch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedmetanas_jax import local, tree
from fedmetanas_jax.algorithms import retraining
from fedmetanas_jax.algorithms.checks import check
from fedmetanas_jax.algorithms.searching import Server, searching
from fedmetanas_jax.core import Array, Phase, Plan, SearchSpace, Setting
from fedmetanas_jax.nas import genotype as genotypes
from fedmetanas_jax.nas import relax, schedule
from fedmetanas_jax.optimizers import adam, local_sgd, sgd, weights_and_alphas


def fednas(
    space: SearchSpace,
    setting: Setting,
    *,
    search: float = 0.5,
    lambda_train: float = 1.0,
    lambda_valid: float = 1.0,
    alpha_lr: float | None = None,
    travel: float = 8.0,
    alpha_weight_decay: float = 1e-3,
    retrain_width: int | None = None,
    retrain_cells: int | None = None,
) -> list[Phase]:
    """Mixed-level search on every client, averaged; then the network found is trained from scratch by FedAvg.

    Nodes sum all their inputs. The setting's local SGD moves the weights, at a cosine over each of the two stages.

    Paper: He, Annavaram and Avestimehr, FedNAS, arXiv 2004.08546; its local search: MiLeNAS, He et al., CVPR 2020

    Args:
      search: share of the rounds that search; the others train what was found. 1 = none do, and the network found
        keeps the weights of the search.
      lambda_train, lambda_valid: what the losses of the two halves of a client's rows weigh in the logits' gradient.
        0 and 1 are first-order DARTS, 1 and 0 learn weights and logits from the same rows.
      alpha_lr, alpha_weight_decay: of the logits, Adam with betas (0.5, 0.999), started afresh each round (the
        source's rate is 3e-4). none = the rate at which a logit can go as far as `travel` in the search, however long
        it is.
      retrain_width, retrain_cells: size of the network that is trained from scratch; none = as in the search.
    """
    check(search=(search, 0 < search <= 1, "above 0, at most 1"))
    rates = {"alpha_lr": alpha_lr or 0.0, "travel": travel, "alpha_weight_decay": alpha_weight_decay}
    weights = {"lambda_train": lambda_train, "lambda_valid": lambda_valid}
    check(**{name: (value, value >= 0, "0 or more") for name, value in (rates | weights).items()})
    size = {"width": retrain_width, "cells": retrain_cells}
    if search == 1 and any(value is not None for value in size.values()):
        raise ValueError(f"search is 1, which leaves nothing to train from scratch, but it is to have the size {size}")
    rounds = round(search * setting.rounds)  # of the search
    whole, graph = space.resized(every_edge=True), space.graph  # the rule still keeps two inputs where there are pairs

    def mix(sent: Server, alpha, key):  # softmax(alpha) of every edge, and no noise
        return relax.mix(whole.graph, alpha, sent.mask, 1.0)

    def client_search(sent: Server, loss, steps: Array):
        rate = schedule.travel_rate(travel, rounds, steps) if alpha_lr is None else alpha_lr
        still = optax.set_to_zero()
        # 1 alpha <- Adam(alpha, lambda_valid grad L(V; w, alpha) + lambda_train grad L(T; w, alpha))
        alphas = weights_and_alphas(still, adam(rate, alpha_weight_decay))
        # 2 w <- SGD(w, grad L(T; w, alpha)), which sees the new alpha
        weights = weights_and_alphas(local_sgd(setting._replace(rounds=rounds), sent.round), still)
        return [alpha_gradient(loss, lambda_train, lambda_valid), weight_gradient(loss)], [alphas, weights]

    def decode(server: Server) -> Array:  # 3 two inputs a node, an operation on each
        return genotypes.darts_mix(graph, server.alpha.op)

    def plan_of(server: Server) -> Plan:
        return genotypes.plan_of_mix(decode(server))

    phases = searching(
        whole,
        setting,
        mix=mix,
        search=client_search,
        adapt=lambda sent: weights_and_alphas(sgd(setting.finetune_lr), optax.set_to_zero()),
        batches=2,
        tasks="halves",
        depth="epochs",
        discrete=decode,
    )
    if search == 1:
        return phases
    return [*phases, retraining.retrain(whole, setting, rounds, plan_of, **size)]  # 4 w <- w_0, then FedAvg


def alpha_gradient(loss: Callable, lambda_train: float, lambda_valid: float) -> local.Gradient:
    """The logits' by (training, validation) batches, both at the same weights and logits; 0 for the weights."""

    def of(variables, stats, batches, key):
        def slope(batch):
            return jax.grad(lambda alpha: loss(variables | {"alpha": alpha}, stats, batch, key)[0])(variables["alpha"])

        # One batch after the other by one program: both at once would take twice the memory.
        slopes = jax.lax.map(slope, jax.tree.map(lambda *x: jnp.stack(x), *batches))
        alpha = jax.tree.map(lambda x: lambda_train * x[0] + lambda_valid * x[1], slopes)
        return {"params": tree.zeros_like(variables["params"]), "alpha": alpha}, stats, {}

    return local.Gradient(of, passes=(1, 1), metrics=())


def weight_gradient(loss: Callable) -> local.Gradient:
    """The gradient of the first batch alone for the weights; 0 for the logits."""

    def of(variables, stats, batches, key):
        def value(params):
            return loss(variables | {"params": params}, stats, batches[0], key)

        (found, (moments, accuracy)), slope = jax.value_and_grad(value, has_aux=True)(variables["params"])
        slopes = {"params": slope, "alpha": tree.zeros_like(variables["alpha"])}
        return slopes, moments, {"loss": found, "accuracy": accuracy}

    return local.Gradient(of, passes=(1, 0))
