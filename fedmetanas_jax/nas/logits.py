"""Where the logits of a search come from: they are learnt themselves, or a small network scores what a cell reads."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedmetanas_jax.core import Alpha, Array, Graph, Tree
from fedmetanas_jax.nas import relax


class Logits(NamedTuple):
    """A source of logits. What is learnt of it is the part "alpha" of a message."""

    init: Callable  # key -> (what is learnt, further statistics by name, which are kept beside the network's)
    of: Callable  # (what is learnt, statistics or moments, which hold the further ones) -> Alpha
    enter: Callable  # (what is learnt, weigh: Alpha -> weights) -> (what a Supernet takes for its mix, the moments that
    #   it then found -> the weights)
    further: tuple[str, ...] = ()  # the names of the further statistics
    macs: int = 0  # multiply-adds an image that scoring takes


def free(graph: Graph) -> Logits:
    """The logits are what is learnt."""

    def enter(alpha, weigh):
        weights = weigh(alpha)
        return weights, lambda moments: weights

    return Logits(lambda key: (relax.init_alpha(key, graph), {}), lambda alpha, stats: alpha, enter)


def by_context(graph: Graph, reads: tuple[tuple[int, int, int], ...]) -> Logits:
    """Every cell has a sampler, which scores its operations by what the cell reads (the authors' upload of FedPNAS,
    sampler.py): `scores`. Both inputs of a cell count as images, so a batch has one score for each operation.

    The samplers are learnt. Their mean scores are statistics of the network, as a batch norm's are: found in training,
    averaged over clients, and the logits of whoever is to know what the network is like. No score is below 0 or above
    1, so none of n operations is ever drawn more often than e / (e + n - 1), or less than 1 / (1 + (n - 1) e).

    graph: without pairs, a cell type for each cell. reads: (C, H, W) of what each cell reads, `SearchSpace.reads`.
    ValueError for other graphs.
    """
    if len(reads) != len(graph.cell_types) or graph.pairs:
        raise ValueError(
            f"samplers need a graph without pairs and with a type for each cell whose size of inputs is known; there "
            f"are {len(graph.pairs)} pairs, {len(graph.cell_types)} types and sizes for {len(reads)} cells"
        )
    names = tuple(f"scores_{i}" for i in range(len(reads)))
    nothing = np.zeros((len(graph.edges), len(graph.ops)), np.float32)

    def init(key):
        keys = jax.random.split(key, len(reads))
        samplers = {f"cell_{i}": _sampler(keys[i], channels) for i, (channels, _, _) in enumerate(reads)}
        return samplers, dict.fromkeys(names, jnp.asarray(nothing))

    def of(_, stats):
        return _alpha([stats[name] for name in names])

    def enter(samplers, weigh):
        def mix(i: int, inputs: Array) -> tuple[Array, Tree]:
            found = scores(samplers[f"cell_{i}"], inputs, *nothing.shape)
            alone = _alpha([found if name == names[i] else nothing for name in names])
            return weigh(alone)[i], {names[i]: found}  # no edge's weights depend on another edge's logits

        return mix, lambda moments: weigh(of(samplers, moments))

    return Logits(init, of, enter, names, graph.inputs * sum(int(np.prod(size)) for size in reads))


def scores(sampler: dict, inputs: Array, edges: int, ops: int) -> Array:
    """[edges, ops] float32, in [0, 1): inputs [inputs, C, H, W, N], a 1x1 convolution to one channel, ReLU, its mean in
    edges x ops regions of the image (adaptive average pooling), tanh, and the mean over inputs and images."""
    kernel = sampler["kernel"].astype(inputs.dtype)
    z = jax.nn.relu(jnp.einsum("ichwn,c->ihwn", inputs, kernel).astype(jnp.float32) + sampler["bias"])
    in_rows, in_columns = (_regions(*n) for n in ((inputs.shape[2], edges), (inputs.shape[3], ops)))
    pooled = jnp.einsum("eh,ihwn,ow->ieon", in_rows, z, in_columns, precision=lax.Precision.HIGHEST)
    # Whoever asks what was drawn adds the same noise to the same scores: they are computed once, to the bit.
    return lax.optimization_barrier(jnp.mean(jnp.tanh(pooled), (0, 3)))


def _sampler(key: Array, channels: int) -> dict:
    """As PyTorch draws a convolution's: U(-1, 1) / sqrt(fan_in)."""
    draw = partial(jax.random.uniform, dtype=jnp.float32, minval=-1, maxval=1)
    values = channels**-0.5 * draw(key, (channels + 1,))
    return {"kernel": values[:-1], "bias": values[-1]}


def _alpha(rows: list[Array]) -> Alpha:
    return Alpha(jnp.stack(rows), jnp.zeros((len(rows), 0), jnp.float32))


def _regions(length: int, parts: int) -> np.ndarray:
    """[parts, length]: part i is the mean from floor(i length / parts) up to ceil((i + 1) length / parts), as PyTorch
    has it; where there are more parts than pixels, neighbours share one."""
    first, place = np.arange(parts)[:, None], np.arange(length)
    inside = (place >= first * length // parts) & (place < -(-(first + 1) * length // parts))
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)
