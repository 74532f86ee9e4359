"""Passes of a batch through a supernet whose mix is made of logits: the loss, and what was computed on the way."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from fedmetanas_jax import local
from fedmetanas_jax.core import Array, Examples, Supernet, Tree
from fedmetanas_jax.nas.logits import Logits
from fedmetanas_jax.optimizers import Sampled


def losses(
    net: Supernet, logits: Logits, weigh: Callable, spread: Callable | None = None, samples: int = 1
) -> Callable:
    """-> loss: (variables, stats, batch, key) -> (cross entropy, (moments, accuracy, times)).

    variables: {"params": w, "alpha": what is learnt of the logits}. times [cell types, edges, ops] int32: how often
    each operation was computed; what never was keeps its statistics. samples > 1: so many passes, each by a mix of its
    own; the loss is that of the mean of their class probabilities, moments are the mean of the passes that have them.

    weigh: (Alpha, key) -> the mix [cell types, edges, ops]. spread: (value [cell types, edges, ops], a tree like the
    statistics, rest) -> a tree that broadcasts to it, the value of the operation that a statistic belongs to; None
    where everything is always computed.
    """

    def once(variables: dict, stats: Tree, batch: Examples, key: Array) -> tuple:
        entered, weights_of = logits.enter(variables["alpha"], lambda alpha: weigh(alpha, key))
        answers, moments = net.apply(variables["params"], stats, batch.image, entered, True)
        here = weights_of(moments) != 0
        if spread is not None:
            moments = jax.tree.map(jnp.where, spread(here, moments, True), moments, stats)
        return answers, moments, here

    def together(variables: dict, stats: Tree, batch: Examples, key: Array) -> tuple:
        def one(key: Array) -> tuple:
            answers, moments, here = once(variables, stats, batch, key)
            return jax.nn.log_softmax(answers), moments, here

        answers, moments, here = lax.map(one, jax.random.split(key, samples))
        times = jnp.sum(here, axis=0, dtype=jnp.int32)
        count = spread(times, stats, samples) if spread else jax.tree.map(lambda _: jnp.int32(samples), stats)
        # A pass that did not compute an operation has its statistics as they were, which adds exactly 0.
        moments = jax.tree.map(lambda s, m, n: s + jnp.sum(m - s, axis=0) / jnp.maximum(n, 1), stats, moments, count)
        return jax.nn.logsumexp(answers, axis=0) - jnp.log(samples), moments, times

    def loss(variables: dict, stats: Tree, batch: Examples, key: Array) -> tuple:
        answers, moments, times = (once if samples == 1 else together)(variables, stats, batch, key)
        value = local.cross_entropy(answers, batch.label, batch.weight)
        return value, (moments, local.accuracy(answers, batch.label, batch.weight), times.astype(jnp.int32))

    return loss


def plain(loss: Callable) -> Callable:
    """`losses`'s loss as `local.plain` and meta steps take it, which do not ask what was computed."""

    def of(variables, stats, batch, key):
        value, (moments, accuracy, _) = loss(variables, stats, batch, key)
        return value, (moments, accuracy)

    return of


def sampled(loss: Callable, samples: int = 1) -> local.Gradient:
    """The gradient of `losses`'s loss as `Sampled`: with how often each operation was drawn for it."""
    gradient = jax.value_and_grad(loss, has_aux=True)

    def of(variables, stats, batches, key):
        (value, (moments, accuracy, times)), grads = gradient(variables, stats, *batches, key)
        return Sampled(grads, times), moments, {"loss": value, "accuracy": accuracy}

    return local.Gradient(of, (samples,))
