"""Networks drawn from the architecture parameters: one operation an edge and, where there are pairs, one pair a node.

A mix of drawn operations is exactly 0 or 1. What its gradient is, is what methods differ in.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax.core import Alpha, Array, Graph, Mask, Plan, SearchSpace
from fedmetanas_jax.nas import relax


def draw(graph: Graph, alpha: Alpha, mask: Mask, key: Array) -> Mask:
    """One operation of every edge and one pair of every node, by their softmax over what is alive."""
    return relax.best(graph, relax.noisy(alpha, key), mask)


def drawn_mix(graph: Graph, drawn: Mask) -> Array:
    """[cell types, edges, ops] float32, 0 or 1: the operations drawn, on the edges of the pairs drawn. No gradient."""
    return relax.edge_weight(graph, drawn.pair.astype(jnp.float32))[..., None] * drawn.op


def scored(graph: Graph, alpha: Alpha, mask: Mask, key: Array) -> Array:
    """[cell types, edges, ops]: `drawn_mix` Z of a graph without pairs, whose gradient in an edge's logits is
    r (Z - p), where r is the loss's in the mix at what was drawn, p the softmax (DSNAS: Hu et al., CVPR 2020, Eq. 8).

    That is unbiased for p_k (r_k - sum_j p_j r_j), r_k as if k were drawn; not for the gradient of the mean loss.
    """
    z = draw(graph, alpha, mask, key).op
    probability = jnp.sum(relax.softmax(graph, alpha, mask, 1.0).op, axis=-1, where=z)
    log = jnp.log(jnp.where(probability > 0, probability, 1.0))  # 0 on an edge that has no operation
    return z * (1 + (log - jax.lax.stop_gradient(log)))[..., None]  # exactly 1: no rounding between


def hard_gumbel(graph: Graph, alpha: Alpha, mask: Mask, temperature, key: Array) -> Array:
    """[cell types, edges, ops]: `drawn_mix` of a graph without pairs, with the gradient in the logits of the
    Gumbel-softmax weight of what was drawn, at that temperature and that noise (FedPNAS's sampler)."""
    noisy = relax.noisy(alpha, key)
    z = relax.best(graph, noisy, mask).op
    weight = jnp.sum(relax.softmax(graph, noisy, mask, temperature).op, axis=-1, where=z)
    return z * (1 + (weight - jax.lax.stop_gradient(weight)))[..., None]


def held(space: SearchSpace, plan: Plan, ops: Array, sent) -> dict:
    """{part: tree of bool that broadcasts to it}: which numbers of sent.params and sent.stats, those of the plan's
    program, a client is given whose network has the operations `ops` [cell types, edges, ops] alone: theirs, and what
    belongs to no operation."""
    return {part: space.spread(ops, plan, getattr(sent, part), True) for part in ("params", "stats")}


def macs(space: SearchSpace, plan: Plan) -> tuple[int, np.ndarray]:
    """(multiply-adds of an image outside all operations, [cell types, edges, ops] those of each operation of the plan),
    in all cells of a type together."""
    none = [[[] for _ in edges] for edges in plan]
    rest = space.make(none).macs
    each = np.zeros((len(plan), len(space.graph.edges), len(space.graph.ops)))
    for t, edges in enumerate(plan):
        for e, ops in enumerate(edges):
            for k in ops:
                none[t][e] = [k]
                each[t, e, k] = space.make(none).macs - rest
            none[t][e] = []
    return rest, each
