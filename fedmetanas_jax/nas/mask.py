"""What is still in the search, as values: threshold pruning and its end (methods section 6.2, D-12 to D-14).

A mask is decided once, on the server, from noise-free weights. It only ever clears bits; every node always
keeps a pair (in a graph that has pairs) and every edge that stays an operation.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax.core import Alpha, Array, Graph, Mask, Plan
from fedmetanas_jax.nas import relax


def full(graph: Graph) -> Mask:
    """Everything alive."""
    cells = len(graph.cell_types)
    op = jnp.ones((cells, len(graph.edges), len(graph.ops)), bool)
    return Mask(op, jnp.ones((cells, len(graph.pairs)), bool))


def live_edges(graph: Graph, mask: Mask) -> Array:
    """[cell types, edges] bool: the edge is in a surviving pair, or the graph has no pairs."""
    return relax.edge_weight(graph, mask.pair.astype(jnp.float32)) > 0


def live(graph: Graph, mask: Mask) -> Mask:
    """The mask without the operations of edges that are in no surviving pair."""
    return Mask(mask.op & live_edges(graph, mask)[..., None], mask.pair)


@partial(jax.jit, static_argnums=0)
def prune(graph: Graph, alpha: Alpha, mask: Mask, temperature, threshold: float) -> Mask:
    """Clears operations and pairs whose noise-free weight is below `threshold`, never the largest of a row.

    An edge left in no pair is dead: all its operations are cleared.
    """
    weights, winner = relax.softmax(graph, alpha, mask, temperature), relax.best(graph, alpha, mask)
    op = mask.op & ((weights.op >= threshold) | winner.op)
    pair = mask.pair & ((weights.pair >= threshold) | winner.pair)
    return live(graph, Mask(op, pair))


def thin(graph: Graph, alpha: Alpha, mask: Mask, temperature, *, ops: int, pairs: int, cap: float) -> Mask:
    """Clears the smallest noise-free weights, one after another over all rows, until at most `ops` operations and
    `pairs` pairs are alive, but none that weighs `cap` or more and never the largest of a row.

    Pairs first: an edge left in no pair takes its operations along. What weighs least in its row is removed first, so
    that an event changes what is computed as little as it can.
    """
    weights = jax.device_get(softmax(graph, alpha, mask, temperature))
    winner = jax.device_get(relax.best(graph, alpha, mask))
    pair = _without_smallest(np.array(mask.pair), weights.pair, winner.pair, pairs, cap)
    live = np.array(live_edges(graph, Mask(mask.op, jnp.asarray(pair))))[..., None]
    op = _without_smallest(np.array(mask.op) & live, weights.op, winner.op, ops, cap)
    return Mask(jnp.asarray(op), jnp.asarray(pair))


softmax = jax.jit(relax.softmax, static_argnums=0)


def _without_smallest(alive: np.ndarray, weight: np.ndarray, winner: np.ndarray, most: int, cap: float) -> np.ndarray:
    may_go = np.flatnonzero(alive & ~winner & (weight < cap))
    smallest = may_go[np.argsort(weight.ravel()[may_go], kind="stable")]
    kept = alive.copy()
    kept.ravel()[smallest[: max(int(alive.sum()) - most, 0)]] = False
    return kept


@partial(jax.jit, static_argnums=0)
def terminal(graph: Graph, alpha: Alpha, mask: Mask) -> Mask:
    """One pair per node and one operation on each edge that stays: a discrete network."""
    return live(graph, relax.best(graph, alpha, mask))


@partial(jax.jit, static_argnums=0)
def alive(graph: Graph, mask: Mask) -> tuple[Array, Array]:
    """[] and [] int32: operations alive on live edges, pairs alive; all cell types together."""
    return jnp.sum(mask.op & live_edges(graph, mask)[..., None]), jnp.sum(mask.pair)


def sizes(graph: Graph) -> tuple[tuple[int, int], tuple[int, int]]:
    """(operations, pairs), all cell types together, of a search that has pruned nothing and of a discrete network."""
    cells, nodes = len(graph.cell_types), len({node for node, *_ in graph.pairs})
    edges = 2 * nodes if graph.pairs else len(graph.edges)
    return (cells * len(graph.edges) * len(graph.ops), cells * len(graph.pairs)), (cells * edges, cells * nodes)


def plan_of(graph: Graph, mask: Mask) -> Plan:
    """The static description, fit for JSON, of a program that computes the live operations alone."""
    op = live(graph, mask).op.tolist()
    return [[[k for k, on in enumerate(edge) if on] for edge in cell] for cell in op]


def of_plan(graph: Graph, plan: Plan) -> Mask:
    """What a program of this plan can compute: its operations, and the pairs whose edges both have one.

    The inverse of `plan_of` for the full plan and for discrete networks.
    """
    op = np.array([[[k in ops for k in range(len(graph.ops))] for ops in edges] for edges in plan])
    dead = ~op.any(-1)  # [cell types, edges]
    pair = np.ones((len(plan), len(graph.pairs)), bool)
    if graph.pairs:
        pair = dead.astype(np.float32) @ relax.incidence(graph).T == 0
    return Mask(jnp.asarray(op), jnp.asarray(pair))


def full_plan(graph: Graph, none: bool = True) -> Plan:
    """The plan of a search that has pruned nothing yet; without `none` where that is no candidate."""
    ops = [k for k, name in enumerate(graph.ops) if none or name != "none"]
    return [[list(ops) for _ in graph.edges] for _ in graph.cell_types]


def undecided_edges(graph: Graph, mask: Mask) -> Array:
    """[cell types, edges] bool: the live edges that still have several operations."""
    return live_edges(graph, mask) & (jnp.sum(mask.op, axis=-1) > 1)


@partial(jax.jit, static_argnums=0)
def confidence(graph: Graph, alpha: Alpha, mask: Mask) -> tuple[Array, Array]:
    """[] and []: the probability that a Gumbel draw picks the argmax, averaged over all live edges, and over those that
    still have several operations, 1 where none has: pruning alone raises the first.

    That is an edge's largest softmax weight at temperature 1, whatever the temperature of the draw.
    """
    live, undecided = live_edges(graph, mask), undecided_edges(graph, mask)
    largest = jnp.max(relax.softmax(graph, alpha, mask, 1.0).op, axis=-1)
    every = jnp.sum(largest, where=live) / jnp.sum(live)
    some = jnp.sum(largest, where=undecided) / jnp.maximum(jnp.sum(undecided), 1)
    return every, jnp.where(jnp.any(undecided), some, 1.0)


@partial(jax.jit, static_argnums=0)
def entropy(graph: Graph, alpha: Alpha, mask: Mask) -> Array:
    """[] from 0, decided, to 1, nothing known: the entropy of an edge's softmax at temperature 1 as a share of the
    largest that its operations alive allow, log of their number; averaged over the undecided edges, 0 without any.

    Unlike the largest probability it does not rise because there are fewer operations to share it.
    """
    undecided = undecided_edges(graph, mask)
    nats = jnp.sum(jax.scipy.special.entr(relax.softmax(graph, alpha, mask, 1.0).op), axis=-1)
    share = nats / jnp.log(jnp.maximum(jnp.sum(mask.op, axis=-1), 2))
    return jnp.sum(share, where=undecided) / jnp.maximum(jnp.sum(undecided), 1)
