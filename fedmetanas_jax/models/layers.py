"""The few layers both networks are made of, written for speed.

Inside a network an image batch is laid out [C, H, W, N], batch last: the inner loop of every layer then
runs over N and (W, N) without gaps, which suits a CPU's vector units.

Five choices need a word:
* A depthwise convolution is k*k shifted multiply-adds. Under `vmap` over clients XLA turns grouped
  convolutions with per-client kernels, and above all their weight gradients, into dense ones; shifts stay
  what they are.
* Shifts, pooling and batch norm (`batchnorm`) have hand-written gradients. Automatic ones turn every shifted
  read into a shifted write, and keep far more for the backward pass.
* `optimization_barrier` stops XLA from recomputing a cheap producer (ReLU, padding) once for each tap.
* `settled` stops XLA:CPU from merging a loop over taps with the reshape that a pointwise layer reads through.
* What is long is a `jax.jit` of its own: traced once for each shape, and the same program to XLA.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedmetanas_jax.core import Array
from fedmetanas_jax.models.batchnorm import wide


def normalize(image: Array, mean: Array, std: Array, dtype) -> Array:
    """uint8 [N, H, W, C] -> dtype [C, H, W, N] with `mean` and `std` [C] in units of 0..1."""
    scaled = (image.astype(jnp.float32) / 255.0 - jnp.asarray(mean)) / jnp.asarray(std)
    return scaled.transpose(3, 1, 2, 0).astype(dtype)


def pointwise(x: Array, kernel: Array) -> Array:
    """1x1 convolution: x [I, H, W, N], kernel [O, I] -> [O, H, W, N], a plain matrix product."""
    flat = x.reshape(x.shape[0], -1)
    return (kernel.astype(x.dtype) @ flat).reshape(kernel.shape[0], *x.shape[1:])


@jax.custom_vjp
def settled(x: Array) -> Array:
    """x, kept by XLA:CPU as an array of its own instead of computed inside whatever reads it.

    A pointwise layer reads its input as [C, H W N]. XLA:CPU would merge that reshape into the loop before
    it; a loop over shifted or strided slices then no longer knows its rows and runs four to eight times
    slower. Nothing is fused across a conditional; elsewhere this is the identity.
    """
    return lax.platform_dependent(x, cpu=_through_conditional, default=lambda x: x)


def _through_conditional(x):
    # The barrier hides the constant from the passes that would remove the conditional, and leaves in time.
    return lax.cond(lax.optimization_barrier(jnp.bool_(True)), lambda x: x, jnp.zeros_like, x)


settled.defvjp(lambda x: (settled(x), None), lambda _, g: (g,))


def _pad(x: Array, low: int, high: int, value: float = 0.0, interior: int = 0) -> Array:
    """Pads H and W; a negative pad crops; `interior` values between neighbours undo a stride."""
    space = (low, high, interior)
    return lax.pad(x, jnp.asarray(value, x.dtype), ((0, 0, 0), space, space, (0, 0, 0)))


def _taps(x: Array, size: int, dilation: int, stride: int, out: tuple[int, int]):
    """The size*size shifted views [C, *out, N] of a padded x, row by row."""
    for i in range(size):
        for j in range(size):
            start = (0, i * dilation, j * dilation, 0)
            # Not x[...]: indexing takes many times longer to trace, and there are hundreds of taps.
            stop = (x.shape[0], *(s + stride * (n - 1) + 1 for s, n in zip(start[1:3], out, strict=True)), x.shape[3])
            yield lax.slice(x, start, stop, (1, stride, stride, 1))


def _spread(g: Array, size: int, dilation: int, stride: int, pad: int, shape) -> Array:
    """Output gradients laid out so that input position p meets them at p .. p + dilation (size - 1)."""
    reach = dilation * (size - 1)
    low = reach - pad
    height, width = (stride * (n - 1) + 1 for n in g.shape[1:3])
    g = lax.pad(
        g,
        jnp.zeros((), g.dtype),
        (
            (0, 0, 0),
            (low, shape[1] + reach - low - height, stride - 1),
            (low, shape[2] + reach - low - width, stride - 1),
            (0, 0, 0),
        ),
    )
    return lax.optimization_barrier(g)


def _weighted_taps(taps, kernel: Array, order) -> Array:
    """sum_t kernel[:, t] * tap_t in float32, rounded once."""
    flat = wide(kernel.reshape(kernel.shape[0], -1))
    total = 0.0
    for t, tap in zip(order, taps, strict=True):
        total = total + flat[:, t, None, None, None] * wide(tap)
    return total


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(x: Array, kernel: Array, stride: int = 1, dilation: int = 1) -> Array:
    """Depthwise convolution: x [C, H, W, N], kernel [C, k, k] -> [C, H/stride, W/stride, N].

    Zero padding dilation (k - 1) / 2 on each side, as every depthwise layer here has it.
    """
    return depthwise_forward(x, kernel, stride, dilation)[0]


@partial(jax.jit, static_argnums=(2, 3))
def depthwise_forward(x: Array, kernel: Array, stride: int, dilation: int) -> tuple[Array, tuple]:
    """`depthwise`, and what its gradient reads: (x padded, kernel)."""
    size = kernel.shape[-1]
    pad = dilation * (size - 1) // 2
    out = tuple(-(-n // stride) for n in x.shape[1:3])
    padded = lax.optimization_barrier(_pad(x, pad, pad))
    y = _weighted_taps(_taps(padded, size, dilation, stride, out), kernel, range(size * size))
    return y.astype(x.dtype), (padded, kernel)


@partial(jax.jit, static_argnums=(0, 1))
def depthwise_backward(stride: int, dilation: int, saved: tuple, g: Array) -> tuple[Array, Array]:
    """The gradients of x and kernel from that of the output."""
    padded, kernel = saved
    size = kernel.shape[-1]
    pad = dilation * (size - 1) // 2
    shape = [n - 2 * pad * (axis in (1, 2)) for axis, n in enumerate(padded.shape)]
    spread = _spread(g, size, dilation, stride, pad, shape)
    flipped = range(size * size - 1, -1, -1)
    dx = _weighted_taps(_taps(spread, size, dilation, 1, shape[1:3]), kernel, flipped)
    # One reduction over all taps at once reads x and g a single time instead of k*k times.
    products = [wide(g) * wide(tap) for tap in _taps(padded, size, dilation, stride, g.shape[1:3])]
    sums = lax.reduce(
        products,
        [jnp.zeros((), products[0].dtype)] * len(products),
        lambda a, b: [p + q for p, q in zip(a, b, strict=True)],
        dimensions=(1, 2, 3),
    )
    dk = jnp.stack(sums, -1).reshape(kernel.shape)
    return dx.astype(padded.dtype), dk.astype(kernel.dtype)


depthwise.defvjp(depthwise_forward, depthwise_backward)


def convolution(x: Array, kernel: Array, stride: int = 1) -> Array:
    """Dense k x k convolution of the stems: x [I, H, W, N], kernel [O, I, k, k], zero padding (k - 1) / 2.

    Patches are gathered and multiplied as one matrix product, which has a cheap gradient under `vmap`.
    """
    size = kernel.shape[-1]
    pad = (size - 1) // 2
    out = tuple(-(-n // stride) for n in x.shape[1:3])
    patches = jnp.stack(list(_taps(_pad(x, pad, pad), size, 1, stride, out)), 1)
    weight = kernel.reshape(*kernel.shape[:2], -1).astype(x.dtype)
    return jnp.einsum("oit,ithwn->ohwn", weight, patches)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x: Array, stride: int = 1) -> Array:
    """3x3 maximum, padding 1. Among equal values the first of the window, row by row, gets the gradient."""
    return _max_pool_forward(x, stride)[0]


@partial(jax.jit, static_argnums=1)
def _max_pool_index(x, stride):
    out = tuple(-(-n // stride) for n in x.shape[1:3])
    padded = lax.optimization_barrier(_pad(x, 1, 1, -np.inf))
    best, index = None, None
    for t, tap in enumerate(_taps(padded, 3, 1, stride, out)):
        if best is None:
            best, index = tap, jnp.zeros(tap.shape, jnp.int8)
        else:
            index = jnp.where(tap > best, jnp.int8(t), index)
            best = jnp.maximum(best, tap)
    return best, index


def _max_pool_forward(x, stride):
    best, index = _max_pool_index(x, stride)
    return best, (index, x.shape)


def _max_pool_backward(stride, saved, g):
    return (_to_winners(*saved, g, stride),)


@partial(jax.jit, static_argnums=(1, 3))
def _to_winners(index, shape, g, stride):
    spread = _spread(g, 3, 1, stride, 1, shape)
    # Zeros between strided outputs carry gradient 0, so whatever index stands there does no harm.
    chosen = _spread(index, 3, 1, stride, 1, shape)
    dx = 0.0
    pairs = zip(_taps(spread, 3, 1, 1, shape[1:3]), _taps(chosen, 3, 1, 1, shape[1:3]), strict=True)
    for t, (grad, winner) in enumerate(pairs):
        dx = dx + jnp.where(winner == 8 - t, grad, 0)
    return dx


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def global_pool(x: Array) -> Array:
    """Mean over each image: [C, H, W, N] -> [C, N], in at least float32."""
    return jnp.mean(wide(x), (1, 2))


def avg_pool(x: Array, stride: int = 1) -> Array:
    """3x3 mean, padding 1, padding excluded from the count: a constant image stays constant."""
    position = [np.arange(0, size, stride) for size in x.shape[1:3]]
    inside = [3.0 - (at == 0) - (at == n - 1) for at, n in zip(position, x.shape[1:3], strict=True)]
    count = jnp.asarray(inside[0][:, None, None] * inside[1][:, None], jnp.float32)  # [H', W', 1]
    return (wide(depthwise(x, jnp.ones((x.shape[0], 3, 3)), stride)) / count).astype(x.dtype)
