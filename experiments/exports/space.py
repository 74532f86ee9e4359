"""What the networks of both search spaces have in common."""

from exports.layers import Layers
from fedmetanas_jax.core import Graph, SearchSpace
from fedmetanas_jax.models.space import parts_of
from fedmetanas_jax.network import SPACES, Network


def space_of(network: Network) -> SearchSpace:
    """The space that the network is of, at its size."""
    arguments = {n: tuple(x) if isinstance(x, list) else x for n, x in network.header["arguments"].items()}
    return SPACES[network.header["kind"]](**arguments)


def type_of(graph: Graph, kind: str, i: int) -> int:
    """The number of the type of cell i, which is a `kind` cell of one of the parts that the network was cut into."""
    parts = parts_of(graph.cell_types)
    return graph.cell_types.index(f"{kind}_{max(x for x in (0, *parts) if x <= i)}" if parts else kind)


def head(layers: Layers, x: str, params) -> None:
    """Global average pool and linear layer."""
    x = layers.add("global_pool", "head.pool", x)
    layers.add("linear", "head.logits", x, weights={"kernel": params["head_kernel"], "bias": params["head_bias"]})
