"""Policies over the networks of a search space: what a reward teaches them, and how a draw is written in few bytes.

A policy draws the operation of every edge and, where there are pairs, the pair of every node, each apart, by the
softmax of its logits at temperature 1. It learns by REINFORCE (Yao et al., FedRLNAS, ICDCS 2021, who step with Adam).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedmetanas_jax.core import Alpha, Array, Graph, Mask
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import relax

B1, B2, EPSILON = 0.5, 0.999, 1e-8  # Adam's, with DARTS's betas


class Policy(NamedTuple):
    """Logits, and what Adam knows of each of them."""

    alpha: Alpha
    mean: Alpha  # of the gradients, in the shapes of the logits, as the next two
    square: Alpha  # mean of their squares
    steps: Alpha  # int32, how often it stepped


class Child(NamedTuple):
    """A network that was drawn, in few bytes."""

    op: Array  # [cell types, edges] int8, the operation of every edge
    pair: Array  # [cell types, nodes] int16, the number of every node's pair; no nodes where every edge stays


def fresh(alpha: Alpha) -> Policy:
    """The policy of these logits, before its first step."""
    zeros = jax.tree.map(jnp.zeros_like, alpha)
    return Policy(alpha, zeros, zeros, jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.int32), alpha))


def to_child(graph: Graph, drawn: Mask) -> Child:
    """What was drawn (`sample.draw`), written down."""
    op = jnp.argmax(drawn.op, axis=-1).astype(jnp.int8)
    if not graph.pairs:
        return Child(op, jnp.zeros((len(op), 0), jnp.int16))
    pair = jnp.argmax(drawn.pair[:, None] & relax.pairs_of_node(graph), axis=-1)
    return Child(op, pair.astype(jnp.int16))


def of_child(graph: Graph, child: Child) -> Mask:
    """The inverse of `to_child`, on the edges of the pairs drawn; on others there may be an operation too many."""
    op = jax.nn.one_hot(child.op, len(graph.ops), dtype=bool)
    return Mask(op, jnp.any(jax.nn.one_hot(child.pair, len(graph.pairs), dtype=bool), axis=1))


def gradient(graph: Graph, alpha: Alpha, alive: Mask, drawn: Mask, reward: Array) -> Alpha:
    """REINFORCE's gradient in the logits, to be descended along: reward (p - Z), Z what was drawn. Rows sum to 0.

    A row of an edge that is in none of the pairs drawn has a value that means nothing: see `decided`.
    """
    probability = relax.softmax(graph, alpha, alive, 1.0)
    return Alpha(*(reward * (p - z) for p, z in zip(probability, drawn, strict=True)))


def decided(graph: Graph, alive: Mask, drawn: Mask) -> Mask:
    """The logits that the reward of a draw says something about: what is alive of the edges that are in it, and of
    every node's pairs."""
    return Mask(alive.op & masks.live_edges(graph, drawn)[..., None], alive.pair)


def step(policy: Policy, gradient: Alpha, moves: Mask, rate: float, weight_decay: float = 0.0) -> Policy:
    """A step of Adam, with L2 decay in the gradient, on the logits that `moves`; of the others nothing changes.

    Every logit counts its own steps, so that the first one is as long as the rate whenever it comes.
    """

    def of_leaf(a, mean, square, steps, g, moves):
        g = g + weight_decay * a
        after = mean + (1 - B1) * (g - mean), square + (1 - B2) * (g * g - square), steps + 1
        m, s = (x / -jnp.expm1(after[2] * math.log(b)) for x, b in zip(after, (B1, B2), strict=False))  # 1 - b^steps
        moved = a - rate * m / (jnp.sqrt(s) + EPSILON), *after
        return [jnp.where(moves, new, old) for new, old in zip(moved, (a, mean, square, steps), strict=True)]

    leaves = zip(*policy, gradient, moves, strict=True)  # operations, then pairs
    return Policy(*(Alpha(*parts) for parts in zip(*(of_leaf(*leaf) for leaf in leaves), strict=True)))
