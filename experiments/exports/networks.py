"""The steps of a network of whatever kind."""

import numpy as np

from exports.darts import darts
from exports.layers import IMAGE, Layers, Step
from exports.mobilenetv3 import mobilenetv3
from exports.nasbench201 import nasbench201
from fedmetanas_jax.network import Network

WRITERS = {"darts": darts, "nasbench201": nasbench201, "mobilenetv3": mobilenetv3}  # of every kind


def steps(network: Network) -> list[Step]:
    """What the network computes: image uint8 [n, h, w, c] -> logits [n, classes]."""
    layers, arguments = Layers(), network.header["arguments"]
    # Written down as float32, which the network computes in.
    pixels = {name: np.asarray(arguments[name], np.float32).tolist() for name in ("mean", "std")}
    WRITERS[network.header["kind"]](layers, layers.add("normalize", "pixels", IMAGE, **pixels), network)
    return _needed(layers.steps)


def _needed(steps: list[Step]) -> list[Step]:
    """Those that the last one reads, directly or through others: a node of a cell may have no reader."""
    wanted, kept = {steps[-1].name}, []
    for step in reversed(steps):
        if step.name in wanted:
            wanted |= {*step.inputs}
            kept.append(step)
    return kept[::-1]
