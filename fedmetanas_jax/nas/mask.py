"""What is still in the search, as values: threshold pruning and its end (methods section 6.2, D-12 to D-14).

A mask is decided once, on the server, from noise-free weights. It only ever clears bits, and every node
always keeps a pair and every edge of that pair an operation.
"""

import jax
import jax.numpy as jnp

from fedmetanas_jax import topology
from fedmetanas_jax.core import Alpha, Array, Mask
from fedmetanas_jax.nas import relax

Keep = list[list[list[int]]]  # [cell types=2][edges] -> indices of the operations alive


def full(nodes: int) -> Mask:
    """Everything alive."""
    cells = len(topology.CELL_TYPES)
    op = jnp.ones((cells, topology.num_edges(nodes), len(topology.OPS)), bool)
    return Mask(op, jnp.ones((cells, len(topology.pairs(nodes))), bool))


def live_edges(mask: Mask) -> Array:
    """[2, edges] bool: the edge is in a surviving pair."""
    return relax.edge_weight(mask.pair.astype(jnp.float32)) > 0


@jax.jit
def prune(alpha: Alpha, mask: Mask, temperature, threshold: float) -> Mask:
    """Clears operations and pairs whose noise-free weight is below `threshold`, never the largest of a row.

    An edge left in no pair is dead: all its operations are cleared.
    """
    weights, winner = relax.softmax(alpha, mask, temperature), relax.best(alpha, mask)
    op = mask.op & ((weights.op >= threshold) | winner.op)
    pair = mask.pair & ((weights.pair >= threshold) | winner.pair)
    return _without_dead_edges(Mask(op, pair))


@jax.jit
def terminal(alpha: Alpha, mask: Mask) -> Mask:
    """One pair per node and one operation on each of its two edges: a discrete network."""
    return _without_dead_edges(relax.best(alpha, mask))


@jax.jit
def alive(mask: Mask) -> tuple[Array, Array]:
    """[] and [] int32: operations alive on live edges, pairs alive; both cell types together."""
    return jnp.sum(mask.op & live_edges(mask)[..., None]), jnp.sum(mask.pair)


def keep(mask: Mask) -> Keep:
    """The static description, fit for JSON, of a program that computes the live operations alone."""
    op = _without_dead_edges(mask).op.tolist()
    return [[[k for k, on in enumerate(edge) if on] for edge in cell] for cell in op]


def full_keep(nodes: int) -> Keep:
    """The `keep` of a search that has pruned nothing yet."""
    every = list(range(len(topology.OPS)))
    return [[every] * topology.num_edges(nodes) for _ in topology.CELL_TYPES]


@jax.jit
def confidence(alpha: Alpha, mask: Mask) -> Array:
    """[]: the probability that a Gumbel draw picks the argmax, averaged over live edges.

    That is an edge's largest softmax weight at temperature 1, whatever the temperature of the draw.
    """
    live = live_edges(mask)
    return jnp.sum(jnp.max(relax.softmax(alpha, mask, 1.0).op, axis=-1), where=live) / jnp.sum(live)


def _without_dead_edges(mask: Mask) -> Mask:
    return Mask(mask.op & live_edges(mask)[..., None], mask.pair)
