"""The steps of a DARTS network: what `models.darts` computes by its plan and mix."""

import jax
import numpy as np

from exports.layers import Layers
from exports.space import head, space_of, type_of
from fedmetanas_jax.models.plan import TYPES, reductions, stack_rows
from fedmetanas_jax.network import Network


def darts(layers: Layers, x: str, network: Network) -> None:
    """Adds all of it to the layers; x is the normalised image."""
    (params, stats, mix), plan, space = network.net, network.header["plan"], space_of(network)
    graph = space.graph
    x = layers.conv("stem.conv", x, params["stem"])
    s0 = s1 = layers.norm("stem.norm", x, stats["stem_norm"], params["stem_scale"], params["stem_shift"])
    for i in range(space.cells):
        name, reduce = f"cell_{i}", i in reductions(space.cells)
        kind, weights, moments = type_of(graph, TYPES[reduce], i), params[f"cell_{i}"], stats[f"cell_{i}"]
        inputs = [
            _preprocess(layers, f"{name}.{which}", x, weights[which], moments[which])
            for which, x in (("preprocess_0", s0), ("preprocess_1", s1))
        ]
        rows = stack_rows(plan[kind], reduce)

        def run(where, op, edge, start, x, given=(weights, moments), rows=rows, reduce=reduce):
            own = [jax.tree.map(lambda a: np.asarray(a)[rows[op][edge]], tree.get(op, {})) for tree in given]
            return _operation(layers, where, op, x, 2 if reduce and start < 2 else 1, *own)

        nodes = layers.cell(name, graph, plan[kind], np.asarray(mix)[kind], inputs, run, 1 + reduce)
        s0, s1 = s1, layers.add("concat", f"{name}.out", *nodes)
    head(layers, s1, params)


def _preprocess(layers: Layers, name: str, x: str, params: dict, stats: dict) -> str:
    x = layers.add("relu", f"{name}.relu", x)
    if "even" in params:
        return _halved(layers, name, x, params, stats)
    return layers.norm(f"{name}.norm", layers.conv(f"{name}.pointwise", x, params["pointwise"]), stats["norm"])


def _halved(layers: Layers, name: str, x: str, params: dict, stats: dict) -> str:
    """Half the size by two convolutions, of which the second one sees the image shifted by a pixel."""
    even = layers.conv(f"{name}.even", x, params["even"], stride=2)
    odd = layers.conv(f"{name}.odd", layers.add("crop", f"{name}.shifted", x), params["odd"], stride=2)
    return layers.norm(f"{name}.norm", layers.add("concat", f"{name}.both", even, odd), stats["norm"])


def _operation(layers: Layers, name: str, op: str, x: str, stride: int, params: dict, stats: dict) -> str:
    if op in ("max_pool_3x3", "avg_pool_3x3"):
        x = layers.add(op.removesuffix("_3x3"), f"{name}.pool", x, stride=stride)
        return layers.norm(f"{name}.norm", x, stats["norm"])
    if op == "skip_connect":
        return _halved(layers, name, layers.add("relu", f"{name}.relu", x), params, stats) if stride == 2 else x
    dilation = 2 if op.startswith("dil") else 1
    for half in ("", "_2") if op.startswith("sep") else ("",):
        x = layers.add("relu", f"{name}.relu{half}", x)
        x = layers.conv(f"{name}.depthwise{half}", x, params[f"depthwise{half}"], 1 if half else stride, dilation)
        x = layers.conv(f"{name}.pointwise{half}", x, params[f"pointwise{half}"])
        x = layers.norm(f"{name}.norm{half}", x, stats[f"norm{half}"])
    return x
