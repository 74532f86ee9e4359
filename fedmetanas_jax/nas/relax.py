"""Architecture parameters to mixing weights: softmax and Gumbel-softmax over what is still in the search.

FedMetaNAS Eq. 1 and 8 as methods sections 2 and 4 read them: the parameters are free logits (D-4), an edge
normalises its operations and a node its pairs of inputs, both at one temperature (D-28), and one Gumbel
draw serves the whole batch and every cell of a type (D-11). In a graph without pairs every edge weighs 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from fedmetanas_jax.core import Alpha, Array, Graph, Mask


def init_alpha(key: Array, graph: Graph) -> Alpha:
    """Logits 1e-3 N(0, 1), as DARTS and MetaNAS start (D-5)."""
    op_key, pair_key = jax.random.split(key)
    cells = len(graph.cell_types)
    op = jax.random.normal(op_key, (cells, len(graph.edges), len(graph.ops)))
    pair = jax.random.normal(pair_key, (cells, len(graph.pairs)))
    return Alpha(1e-3 * op, 1e-3 * pair)


def softmax(graph: Graph, alpha: Alpha, mask: Mask, temperature, key: Array | None = None) -> Alpha:
    """Weights Z in the shapes of `alpha`: Z = softmax((logit + G) / temperature), Eq. 1.

    `key` draws the Gumbel noise G; without it G = 0. The rows of `op` sum to 1 per edge, those of `pair` to 1
    per node. Masked entries have weight and gradient exactly 0, also where a whole row is masked.
    """
    if key is not None:
        alpha = noisy(alpha, key)
    pair = alpha.pair
    if graph.pairs:
        # Every node normalises the whole list with the other nodes' pairs masked out; each pair has one owner.
        per_node = _masked_softmax(pair[:, None] / temperature, mask.pair[:, None] & pairs_of_node(graph))
        pair = jnp.sum(per_node, axis=1)
    return Alpha(_masked_softmax(alpha.op / temperature, mask.op), pair)


def noisy(alpha: Alpha, key: Array) -> Alpha:
    """Logits with Gumbel noise. The largest of a row is then any of its entries as often as its softmax weight says."""
    flat, unravel = ravel_pytree(alpha)  # one draw for all, since every draw costs compile time
    return unravel(flat + jax.random.gumbel(key, flat.shape))


def edge_weight(graph: Graph, pair: Array) -> Array:
    """u [cell types, edges] from pair weights Z [cell types, pairs]: u_ij sums Z over node j's pairs that hold input i.

    This turns Eq. 8's sum over pairs into a weighted sum over edges; a node's u sum to 2 (D-29: node 0 of DARTS
    has a single pair, so its u are 1 and 1). All ones in a graph without pairs.
    """
    if not graph.pairs:
        return jnp.ones((*pair.shape[:-1], len(graph.edges)))
    return jnp.matmul(pair, incidence(graph), precision=jax.lax.Precision.HIGHEST)


def mix(graph: Graph, alpha: Alpha, mask: Mask, temperature, key: Array | None = None) -> Array:
    """[cell types, edges, ops]: u_ij Z_k^ij, the factor of every candidate operation in Eq. 8."""
    weights = softmax(graph, alpha, mask, temperature, key)
    return edge_weight(graph, weights.pair)[..., None] * weights.op


def best(graph: Graph, alpha: Alpha, mask: Mask) -> Mask:
    """The largest logit alone: one operation per edge that has any, one pair per node.

    Ties go to the lowest index. `none` may win (D-34).
    """
    pair = mask.pair
    if graph.pairs:
        pair = jnp.any(_masked_argmax(alpha.pair[:, None], pair[:, None] & pairs_of_node(graph)), axis=1)
    return Mask(_masked_argmax(alpha.op, mask.op), pair)


def harden(graph: Graph, alpha: Alpha, mask: Mask) -> Array:
    """[cell types, edges, ops], 0 or 1: the mix of the best pair and the best operations alone."""
    winner = best(graph, alpha, mask)
    return edge_weight(graph, winner.pair.astype(jnp.float32))[..., None] * winner.op


def incidence(graph: Graph) -> np.ndarray:
    """P [pairs, edges] float32: 1 where the pair contains the edge; every row holds two ones."""
    rows = [[(i, j) in ((first, node), (second, node)) for i, j in graph.edges] for node, first, second in graph.pairs]
    return np.array(rows, np.float32)


def pairs_of_node(graph: Graph) -> np.ndarray:
    """[nodes, pairs] bool: whose pair it is."""
    owner = np.array([node for node, *_ in graph.pairs])
    return np.unique(owner)[:, None] == owner


def _masked_softmax(logit: Array, alive: Array) -> Array:
    """Softmax over the last axis of what is alive; a row with nothing alive is all 0.

    Such a row is computed as if all of it were alive and cleared afterwards: -inf throughout would make
    NaN, in the gradient even behind a `where`.
    """
    alive_or_empty = alive | ~jnp.any(alive, axis=-1, keepdims=True)
    return jnp.where(alive, jax.nn.softmax(logit, where=alive_or_empty), 0)


def _masked_argmax(logit: Array, alive: Array) -> Array:
    winner = jnp.argmax(jnp.where(alive, logit, -jnp.inf), axis=-1, keepdims=True)
    return (jnp.arange(alive.shape[-1]) == winner) & alive
