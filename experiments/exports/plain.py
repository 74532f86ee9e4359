"""The steps in plain JAX: no loop, no barrier, no conditional, and a convolution is a convolution."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax

from exports.layers import IMAGE, Step

LAYOUT = ("NHWC", "HWIO", "NHWC")


def function(steps: list[Step]) -> Callable:
    """image [n, h, w, c] uint8 -> logits [n, classes] float32, with the weights as constants; n may be symbolic."""

    def forward(image):
        values = {IMAGE: image}
        for step in steps:
            inputs = [values[name] for name in step.inputs]
            values[step.name] = OPS[step.op](*inputs, **step.weights, **step.settings)
        return values[steps[-1].name]

    return forward


def _normalize(image, mean, std):
    return (image.astype(jnp.float32) / 255.0 - np.float32(mean)) / np.float32(std)


def _conv(x, kernel, stride, dilation, groups):
    padding = [(dilation * (size - 1) // 2,) * 2 for size in kernel.shape[2:]]
    return lax.conv_general_dilated(
        x, kernel.transpose(2, 3, 1, 0), (stride, stride), padding, rhs_dilation=(dilation, dilation),
        dimension_numbers=LAYOUT, feature_group_count=groups, precision=lax.Precision.HIGHEST,
    )  # fmt: skip


def _norm(x, mean, var, epsilon, scale=1.0, shift=0.0):
    factor = (scale / np.sqrt(var + np.float32(epsilon))).astype(np.float32)
    return x * factor + (shift - mean * factor).astype(np.float32)


def _windows(x, start, combine, stride, size=3, pad=1):
    window, strides, padding = (1, size, size, 1), (1, stride, stride, 1), ((0, 0), (pad, pad), (pad, pad), (0, 0))
    return lax.reduce_window(x, np.float32(start), combine, window, strides, padding)


def _avg_pool(x, stride):
    counts = []
    for size in x.shape[1:3]:
        at = np.arange(0, size, stride)
        counts.append(3.0 - (at == 0) - (at == size - 1))
    return _windows(x, 0, lax.add, stride) / np.float32(counts[0][:, None, None] * counts[1][:, None])


def _linear(x, kernel, bias):
    return jnp.matmul(x, kernel.T, precision=lax.Precision.HIGHEST) + bias


OPS = {
    "normalize": _normalize,
    "conv": _conv,
    "norm": _norm,
    "relu": lambda x: jnp.maximum(x, 0),
    "hard_swish": lambda x: x * jnp.clip(x / 6 + 0.5, 0, 1),
    "hard_sigmoid": lambda x: jnp.clip(x / 6 + 0.5, 0, 1),
    "max_pool": lambda x, stride: _windows(x, -np.inf, lax.max, stride),
    "avg_pool": _avg_pool,
    "mean_pool": lambda x: _windows(x, 0, lax.add, 2, size=2, pad=0) / 4,
    "crop": lambda x: x[:, 1:, 1:],
    "zeros": lambda x, stride: jnp.zeros_like(x[:, ::stride, ::stride]),
    "scale": lambda x, factor: np.float32(factor) * x,
    "add": lambda *terms: sum(terms[1:], terms[0]),
    "concat": lambda *parts: jnp.concatenate(parts, axis=-1),
    "gate": lambda x, gate: x * gate[:, None, None],
    "global_pool": lambda x: jnp.mean(x, (1, 2)),
    "linear": _linear,
}
