"""Networks as plain functions of nested dicts, whose weights and norms are declared once, by path.

One declaration gives initial values, statistics and multiply-adds, whatever the network's forward function does.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from fedmetanas_jax.core import Array
from fedmetanas_jax.models import batchnorm, layers

Path = tuple[str, ...]


class Weight(NamedTuple):
    """A declared weight."""

    shape: tuple[int, ...]
    area: int = 0  # positions of one image at which each of its numbers is multiplied
    scale: float = 1.0  # of its initial values
    start: float | None = None  # all of its initial values, where they are not drawn


def initial(key: Array, weights: dict[Path, Weight], draw: Callable) -> dict:
    """Float32 values, nested by path: cut from one draw(key, shape), each piece times its scale.

    XLA takes about half a second to compile each draw of its own.
    """
    values = {path: jnp.full(w.shape, w.start, jnp.float32) for path, w in weights.items() if w.start is not None}
    drawn = [path for path in sorted(weights) if path not in values]
    ends = np.cumsum([np.prod(weights[path].shape) for path in drawn], dtype=int)
    for path, piece in zip(drawn, jnp.split(draw(key, (ends[-1],)), ends[:-1]), strict=True):
        values[path] = weights[path].scale * piece.reshape(weights[path].shape)
    return unflatten_dict(values)


def functions(
    weights: dict[Path, Weight], norms: dict[Path, tuple[int, ...]], forward: Callable, draw: Callable,
    mean: tuple[float, ...], std: tuple[float, ...], dtype,
) -> tuple[Callable, Callable, int]:  # fmt: skip
    """(init: key -> (params, stats); apply: (params, stats, image, train, *more) -> (logits, stats); multiply-adds).

    forward(params, stats, x [channels, H, W, N], train, *more) -> (logits, moments found); `norms` are the shapes of
    the moments; see `initial` for `draw`. Multiply-adds are those of convolutions and linear layers for one image,
    taps on padding included; batch norm, pooling and sums are not counted. `dtype` is the type of x, mean and std
    are in units of 0..1.
    """

    def init(key):
        moments = {(*path, name): shape for path, shape in norms.items() for name in ("mean", "var")}
        stats = {path: jnp.full(shape, path[-1] == "var", jnp.float32) for path, shape in moments.items()}
        return initial(key, weights, draw), unflatten_dict(stats)

    def apply(params, stats, image, train, *more):
        x = layers.normalize(image, mean, std, dtype)
        if isinstance(train, bool):
            logits, moments = forward(params, stats, x, train, *more)
            return logits, moments if train else stats
        return forward(params, batchnorm.either(stats, train), x, False, *more)

    return init, apply, sum(int(np.prod(weight.shape)) * weight.area for weight in weights.values())
