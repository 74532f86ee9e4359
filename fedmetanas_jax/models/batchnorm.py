"""Batch norm without scale and shift, in the layout of `layers`, [C, H, W, N]; its gradient is written by hand."""

from functools import partial

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from fedmetanas_jax.core import Array, Tree

BN_EPSILON = 1e-5  # PyTorch's default, DARTS's value
EITHER = "var_or_own"  # in place of "var": a variance or, below 0, word that the batch's own moments count


def wide(x: Array) -> Array:
    """At least float32: what sums and moments are taken in, whatever the layer computes in."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def norm(x: Array, given: dict | None, weight: Array | None = None, epsilon: float = BN_EPSILON) -> tuple[Array, dict]:
    """Batch norm of x [C, H, W, N], times `weight` [], and the moments found, {"mean": [C], "var": [C]} float32.

    `given` are such moments to normalise by, and then none are found; where it is None the batch's own do. Those of
    `either` leave that to a value, and the batch's own are found.
    """
    if given is None:
        y, mean, variance = weighted_norm(x, jnp.ones((), wide(x).dtype) if weight is None else weight, epsilon)
        return y, {"mean": mean, "var": variance}
    if "var" in given:
        mean, variance, found = given["mean"], given["var"], {}
    else:
        own_mean, own_variance, unbiased = _moments(x)
        own = given[EITHER] < 0
        mean, variance = jnp.where(own, own_mean, given["mean"]), jnp.where(own, own_variance, given[EITHER])
        found = {"mean": own_mean, "var": unbiased}
    y = frozen_norm(x, mean, variance, epsilon)
    return (y if weight is None else weight.astype(y.dtype) * y), found


def either(stats: Tree, own: Array) -> Tree:
    """The moments of a network's norms, by which `norm` goes only where `own` [] bool is False: where it is True it
    goes by the batch's own, so that one program does both. Not for training: the gradient is that of fixed moments."""

    def named(path: tuple[str, ...], x: Array) -> tuple[tuple[str, ...], Array]:
        return ((*path[:-1], EITHER), jnp.where(own, -1, x)) if path[-1] == "var" else (path, x)

    return unflatten_dict(dict(named(path, x) for path, x in flatten_dict(stats).items()))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def weighted_norm(x: Array, weight: Array, epsilon: float = BN_EPSILON) -> tuple[Array, Array, Array]:
    """(weight [] times x normalised by the batch's own moments, mean [C], variance [C]): training mode.

    The variance handed out for the running average is the unbiased one, as in PyTorch. No gradient flows through the
    moments. The gradient is written by hand, because the weight's and the norm's need the same sum of g y over each
    channel, and the mean of g, the same for all operations that end in one node, is then taken once.
    """
    return _weighted_norm_forward(x, weight, epsilon)[0]


@partial(jax.jit, static_argnums=2)
def _weighted_norm_forward(x, weight, epsilon):
    mean, variance, unbiased = _moments(x)
    scale = lax.rsqrt(variance + epsilon)
    y = weight.astype(x.dtype) * _standardized(x, mean, scale).astype(x.dtype)
    return (y, mean, unbiased), (x, mean, scale, weight)


def _moments(x: Array) -> tuple[Array, Array, Array]:
    """Mean, variance and unbiased variance of x, each [C]."""
    count = x[0].size
    # Mean and variance in one pass. Away from zero the mean of squares drowns the variance, so that the
    # first value of each channel is taken off before.
    shift = wide(x[:, :1, :1, :1])
    shifted = wide(x) - shift
    offset, square = jnp.mean(shifted, (1, 2, 3)), jnp.mean(jnp.square(shifted), (1, 2, 3))
    variance = jnp.maximum(square - jnp.square(offset), 0)
    return shift[:, 0, 0, 0] + offset, variance, variance * (count / max(count - 1, 1))


def _standardized(x, mean, scale):
    return (wide(x) - _spatial(mean)) * _spatial(scale)


@partial(jax.jit, static_argnums=0)
def _weighted_norm_backward(epsilon, saved, cotangents):
    x, mean, scale, weight = saved
    g, y = wide(cotangents[0]), _standardized(x, mean, scale)
    mean_g = jnp.mean(g, (1, 2, 3))
    sum_gy = jnp.sum(g * y, (1, 2, 3))
    dx = (g - _spatial(mean_g) - y * _spatial(sum_gy / g[0].size)) * _spatial(scale * weight)
    return dx.astype(x.dtype), jnp.sum(sum_gy).astype(weight.dtype)  # dx has what passes through the moments


weighted_norm.defvjp(_weighted_norm_forward, _weighted_norm_backward)


def _spatial(values: Array) -> Array:
    """[C] -> [C, 1, 1, 1]."""
    return values[:, None, None, None]


def frozen_norm(x: Array, mean: Array, variance: Array, epsilon: float = BN_EPSILON) -> Array:
    """Batch norm with given moments [C] (evaluation mode)."""
    scale = lax.rsqrt(variance + epsilon)
    return (wide(x) * _spatial(scale) + _spatial(-mean * scale)).astype(x.dtype)
