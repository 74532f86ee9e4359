"""ReLU, depthwise k x k, pointwise and the sums of a batch norm in one Pallas (Triton) kernel; and its gradient.

For GPUs, and off by default: these kernels have been interpreted, and compiled for a GPU, but NEVER RUN ON ONE.
`layers.depthwise` and `layers.pointwise` are the reference.

A program takes `TILE` values: all channels of a run of output positions (h, w, n), counted in the order they
lie in memory. Shifted reads of one array meet in the cache, so that main memory sees it about once. Forward:
reads x, writes y. Backward, in two kernels: the first reads x and the gradient g of y, computes the depthwise
output again and sums up the weight gradients, and writes the depthwise output's gradient; the second reads
that and x and writes dx. One kernel alone would do the pointwise product once for each of the k*k taps.

What programs sum up, each writes in a place of its own, and XLA adds it: no atomics, the same bits each time.
Triton takes arrays of powers of two alone and products from 16 a side, so channels are padded with zeros.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from fedmetanas_jax.core import Array

# Both are guesses until a GPU has measured them.
TILE = 2048  # values a program holds of one array: 16 for each thread of four warps
PROGRAMS = 32  # at most, that sum up weight gradients of one client: each writes k*k C + O C numbers of its own


class Window(NamedTuple):
    """A depthwise layer without its weights."""

    size: int
    stride: int
    dilation: int

    @property
    def pad(self) -> int:
        """Zeros on each side."""
        return self.dilation * (self.size - 1) // 2

    def taps(self):
        """(number, offset of the row, offset of the column) of each weight."""
        for t in range(self.size**2):
            yield t, t // self.size * self.dilation - self.pad, t % self.size * self.dilation - self.pad


def relu_depthwise_pointwise(
    x: Array, depthwise: Array, pointwise: Array, stride: int = 1, dilation: int = 1, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """pointwise(depthwise(relu(x))) and what its batch norm needs.

    x [C, H, W, N] float32 or bfloat16, depthwise [C, k, k], pointwise [O, C] -> (y [O, H/stride, W/stride, N] of
    x's type, its sums [O], its squared deviations from the mean, summed [O], both float32). Padding and rounding
    are those of `layers.depthwise` and `layers.pointwise`; products are summed in float32. No gradient flows
    through the sums, as through the moments of `batchnorm.batch_norm`.

    `interpret` runs the kernels without a GPU, slowly, for tests. ValueError for shapes or types that do not fit
    and, when it is compiled without `interpret`, on a CPU; NotImplementedError for second derivatives.
    """
    channels, size = depthwise.shape[0], depthwise.shape[-1]
    if depthwise.shape != (channels, size, size) or size % 2 == 0:
        raise ValueError(f"depthwise must be [C, k, k] with an odd k, and is {list(depthwise.shape)}")
    if x.ndim != 4 or x.shape[0] != channels or pointwise.shape[1:] != (channels,):
        raise ValueError(
            f"x [C, H, W, N], depthwise [C, k, k] and pointwise [O, C] do not fit: {list(x.shape)}, "
            f"{list(depthwise.shape)}, {list(pointwise.shape)}"
        )
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"the kernels compute in float32 or bfloat16, not in {x.dtype}")
    return _block(Window(size, stride, dilation), interpret, x, depthwise, pointwise)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _block(window, interpret, x, depthwise, pointwise):
    out = (pointwise.shape[0], *(-(-n // window.stride) for n in x.shape[1:3]), x.shape[3])
    weights = _padded(x.dtype, depthwise, pointwise)
    tile, tiles = _tiling(weights[1], out)
    shapes = _shape(out, x.dtype), _shape((tiles, 2, weights[1].shape[0]))
    y, parts = _call(partial(_forward_kernel, window, tile), shapes, tiles, interpret, x, *weights)
    # Chan, Golub and LeVeque (1979): the mean of squares less the squared mean would lose the variance far from 0.
    sums, squares = parts[:, 0, : out[0]], parts[:, 1, : out[0]]
    count = np.prod(out[1:])
    counts = np.minimum(tile, count - tile * np.arange(tiles))[:, None].astype(np.float32)
    total = sums.sum(0)
    apart = counts * jnp.square(sums / counts - total / count)
    return y, total, (squares + apart).sum(0)


def _block_forward(window, interpret, x, depthwise, pointwise):
    return _block(window, interpret, x, depthwise, pointwise), (x, depthwise, pointwise)


def _block_backward(window, interpret, saved, cotangents):
    x, depthwise, pointwise = saved
    g = cotangents[0]
    weights = _padded(x.dtype, depthwise, pointwise)
    outputs, channels = weights[1].shape
    tile, tiles = _tiling(weights[1], g.shape)
    each = -(-tiles // PROGRAMS)
    programs = -(-tiles // each)
    shapes = (
        _shape((x.shape[0], *g.shape[1:]), x.dtype),
        _shape((programs, window.size**2, channels)),
        _shape((programs, outputs, channels)),
    )
    kernel = partial(_weights_kernel, window, tile, each)
    d_middle, d_depthwise, d_pointwise = _call(kernel, shapes, programs, interpret, x, g, *weights)
    tile, tiles = _tiling(weights[1], x.shape)
    shape = (_shape(x.shape, x.dtype),)
    (dx,) = _call(partial(_input_kernel, window, tile), shape, tiles, interpret, x, d_middle, weights[0])
    d_depthwise = d_depthwise.sum(0)[:, : len(depthwise)].T.reshape(depthwise.shape)
    d_pointwise = d_pointwise.sum(0)[: len(pointwise), : len(depthwise)]
    return dx, d_depthwise.astype(depthwise.dtype), d_pointwise.astype(pointwise.dtype)


_block.defvjp(_block_forward, _block_backward)


def _shape(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _padded(dtype, depthwise, pointwise):
    """Weights as the kernels read them: [k*k, C'] float32 and [O', C'] of the type computed in."""
    more = [max(16, 1 << (n - 1).bit_length()) - n for n in pointwise.shape]
    flat = depthwise.reshape(len(depthwise), -1).T.astype(jnp.float32)
    return jnp.pad(flat, ((0, 0), (0, more[1]))), jnp.pad(pointwise.astype(dtype), [(0, n) for n in more])


def _tiling(pointwise, shape):
    """(positions a program takes, programs that cover those of an array of this shape)."""
    tile = max(16, TILE // max(pointwise.shape))
    return tile, pl.cdiv(int(np.prod(shape[1:])), tile)


def _call(kernel, shapes, programs, interpret, *arrays):
    """Runs `kernel`; its derivative is refused in words, where that of a Pallas call would fail in some way."""
    # With stages, Triton prefetches every tap into shared memory: more than an H200 has for a 5x5 kernel of 64
    # channels, and it compiles several times longer.
    params = triton.CompilerParams(num_warps=4, num_stages=1)
    run = jax.custom_jvp(
        pl.pallas_call(kernel, shapes, grid=(programs,), interpret=interpret, compiler_params=params)
    )

    @run.defjvp
    def refuse(primals, tangents):
        raise NotImplementedError("the Pallas kernels have no second derivative; take kernel='plain'")

    return run(*arrays)


# --- Inside the kernels ---------------------------------------------------------------------------------------


def _positions(number, tile, shape):
    """(h, w, n) [tile] of a tile's positions in an array [C, H, W, N], and which of them exist."""
    _, height, width, batch = shape
    place = number * tile + jnp.arange(tile, dtype=jnp.int32)
    row = lax.div(place, jnp.int32(width * batch))
    return (row, lax.rem(lax.div(place, jnp.int32(batch)), jnp.int32(width)), lax.rem(place, jnp.int32(batch))), (
        row < height
    )


def _at(ref, channels, place, exists):
    """The view [channels, positions] of an array [C, H, W, N], and its mask."""
    every = jnp.arange(channels, dtype=jnp.int32)[:, None]
    return ref.at[(every, *(p[None, :] for p in place))], (every < ref.shape[0]) & exists[None, :]


def _load(ref, channels, place, exists):
    view, mask = _at(ref, channels, place, exists)
    return triton.load(view, mask=mask, other=0.0)


def _store(ref, value, place, exists):
    view, mask = _at(ref, value.shape[0], place, exists)
    triton.store(view, value, mask=mask)


def _tap(window, x, channels, place, exists, rows, columns):
    """relu(x), in float32, where a tap of the output positions `place` reads it; zero outside the image."""
    row, column = place[0] * window.stride + rows, place[1] * window.stride + columns
    inside = exists & (row >= 0) & (row < x.shape[1]) & (column >= 0) & (column < x.shape[2])
    return jnp.maximum(_load(x, channels, (row, column, place[2]), inside).astype(jnp.float32), 0)


def _product(a, b, contract):
    """Matrix product over dimensions `contract` of a and b, summed in float32, with float32's own precision."""
    return lax.dot_general(
        a, b, ((contract[:1], contract[1:]), ((), ())), lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _forward_kernel(window, tile, x, depthwise, pointwise, y, parts):
    number = pl.program_id(0)
    place, exists = _positions(number, tile, y.shape)
    outputs, channels = pointwise.shape
    middle = jnp.zeros((channels, tile), jnp.float32)
    for t, rows, columns in window.taps():
        middle += depthwise[t, :][:, None] * _tap(window, x, channels, place, exists, rows, columns)
    value = _product(pointwise[:, :], middle.astype(x.dtype), (1, 0)).astype(y.dtype)
    _store(y, value, place, exists)
    wide = value.astype(jnp.float32)
    count = jnp.sum(exists.astype(jnp.float32))
    total = jnp.sum(wide, 1)
    apart = jnp.where(exists[None, :], wide - (total / count)[:, None], 0)
    parts[number, 0, :] = total
    parts[number, 1, :] = jnp.sum(apart * apart, 1)


def _weights_kernel(window, tile, each, x, g, depthwise, pointwise, d_middle, d_depthwise, d_pointwise):
    number = pl.program_id(0)
    outputs, channels = pointwise.shape

    def visit(step, sums):
        by_tap, by_output = sums
        place, exists = _positions(number * each + step, tile, g.shape)
        g_here = _load(g, outputs, place, exists)
        d_here = _product(pointwise[:, :], g_here, (0, 0)).astype(x.dtype)
        _store(d_middle, d_here, place, exists)
        wide, middle, found = d_here.astype(jnp.float32), jnp.zeros(d_here.shape, jnp.float32), []
        for t, rows, columns in window.taps():
            tap = _tap(window, x, channels, place, exists, rows, columns)
            middle += depthwise[t, :][:, None] * tap
            found.append(by_tap[t] + jnp.sum(wide * tap, 1))
        return tuple(found), by_output + _product(g_here, middle.astype(x.dtype), (1, 1))

    start = (jnp.zeros(channels, jnp.float32),) * window.size**2, jnp.zeros((outputs, channels), jnp.float32)
    by_tap, by_output = lax.fori_loop(0, each, visit, start)
    for t, total in enumerate(by_tap):
        d_depthwise[number, t, :] = total
    d_pointwise[number, :, :] = by_output


def _input_kernel(window, tile, x, d_middle, depthwise, dx):
    place, exists = _positions(pl.program_id(0), tile, x.shape)
    channels = depthwise.shape[1]
    total = jnp.zeros((channels, tile), jnp.float32)
    for t, rows, columns in window.taps():
        # Output r meets input r stride + rows by this tap.
        row, column = place[0] - rows, place[1] - columns
        inside = exists & (row >= 0) & (column >= 0)
        if window.stride > 1:
            stride = jnp.int32(window.stride)
            inside &= (lax.rem(row, stride) == 0) & (lax.rem(column, stride) == 0)
            row, column = lax.div(row, stride), lax.div(column, stride)
        inside &= (row < d_middle.shape[1]) & (column < d_middle.shape[2])
        total += depthwise[t, :][:, None] * _load(d_middle, channels, (row, column, place[2]), inside)
    kept = _load(x, channels, place, exists) > 0
    _store(dx, jnp.where(kept, total, 0).astype(dx.dtype), place, exists)
