"""The steps of a NAS-Bench-201 network: what `models.nasbench201` computes by its plan and mix."""

import jax
import numpy as np

from exports.layers import Layers
from exports.space import head, space_of, type_of
from fedmetanas_jax.models.nasbench201 import stacked
from fedmetanas_jax.network import Network


def nasbench201(layers: Layers, x: str, network: Network) -> None:
    """Adds all of it to the layers; x is the normalised image."""
    (params, stats, mix), plan, space = network.net, network.header["plan"], space_of(network)
    x = layers.norm("stem.norm", layers.conv("stem.conv", x, params["stem"]), stats["stem_norm"])
    for i in range(space.cells):
        if (block := f"halving_{i}") in params:
            x = _halving(layers, block, x, params[block], stats[block])
        name, kind = f"cell_{i}", type_of(space.graph, "cell", i)
        stacks, given = stacked(plan[kind]), [tree.get(name, {}) for tree in (params, stats)]

        def run(where, op, edge, start, x, given=given, stacks=stacks):
            if op == "skip_connect":
                return x
            if op == "avg_pool_3x3":
                return layers.add("avg_pool", where, x, stride=1)
            row = stacks[op].index(edge)
            weights, moments = (jax.tree.map(lambda a: np.asarray(a)[row], tree[op]) for tree in given)
            x = layers.conv(f"{where}.conv", layers.add("relu", f"{where}.relu", x), weights["kernel"])
            return layers.norm(f"{where}.norm", x, moments["norm"])

        x = layers.cell(name, space.graph, plan[kind], np.asarray(mix)[kind], [x], run)[-1]
    head(layers, layers.add("relu", "last.relu", layers.norm("last.norm", x, stats["last_norm"])), params)


def _halving(layers: Layers, name: str, x: str, params: dict, stats: dict) -> str:
    """The residual block between stages."""
    y = x
    for which, stride in (("first", 2), ("second", 1)):
        y = layers.conv(f"{name}.{which}", layers.add("relu", f"{name}.{which}_relu", y), params[which], stride)
        y = layers.norm(f"{name}.{which}_norm", y, stats[f"{which}_norm"])
    mean = layers.add("mean_pool", f"{name}.shortcut.mean", x)
    return layers.add("add", name, layers.conv(f"{name}.shortcut.conv", mean, params["shortcut"]), y)
