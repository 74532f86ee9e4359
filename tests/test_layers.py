"""The layers against XLA's own convolutions and windows, in float64: values, gradients, second derivatives.

Images are [C, H, W, N]. A height of 8 and a width of 7 show even and odd sizes at once.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedmetanas_jax.models import batchnorm, layers

SHAPE = (3, 8, 7, 2)
LAYOUT = ("CHWN", "OIHW", "CHWN")


@pytest.fixture
def double():
    """float64 for the time of one test."""
    with jax.enable_x64(True):
        yield


def batch_norm(x):
    """(y, mean, variance) in training mode."""
    y, moments = batchnorm.norm(x, None)
    return y, moments["mean"], moments["var"]


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def reference_depthwise(x, kernel, stride, dilation):
    pad = dilation * (kernel.shape[-1] - 1) // 2
    return lax.conv_general_dilated(
        x, kernel[:, None], (stride, stride), ((pad, pad),) * 2, rhs_dilation=(dilation, dilation),
        dimension_numbers=LAYOUT, feature_group_count=x.shape[0],
    )  # fmt: skip


def reference_convolution(x, kernel, stride):
    pad = (kernel.shape[-1] - 1) // 2
    return lax.conv_general_dilated(x, kernel, (stride, stride), ((pad, pad),) * 2, dimension_numbers=LAYOUT)


def window(x, start, operation, stride):
    space = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, start, operation, (1, 3, 3, 1), (1, stride, stride, 1), space)


def reference_max_pool(x, stride):
    return window(x, -np.inf, lax.max, stride)


def reference_avg_pool(x, stride):
    return window(x, 0.0, lax.add, stride) / window(jnp.ones_like(x), 0.0, lax.add, stride)


def reference_batch_norm(x):
    mean, variance = jnp.mean(x, (1, 2, 3), keepdims=True), jnp.var(x, (1, 2, 3), keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-5)


@partial(jax.jit, static_argnums=0)
def value_and_vjp(layer, arguments):
    y, pull = jax.vjp(layer, *arguments)
    return y, pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


@partial(jax.jit, static_argnums=0)
def second_derivative(layer, arguments):
    """Gradient of (the gradient of a curved loss) along a fixed direction."""

    def loss(arguments):
        y = layer(*arguments)
        return jnp.sum(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape) * jnp.sin(y))

    def slope(arguments):
        grads = jax.grad(loss)(arguments)
        return sum(jnp.vdot(jnp.sin(jnp.arange(g.size, dtype=g.dtype) + 1), g.ravel()) for g in grads)

    return jax.grad(slope)(arguments)


def assert_close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def assert_same_layer(layer, reference, arguments):
    assert_close(value_and_vjp(layer, arguments), value_and_vjp(reference, arguments))


def assert_same_second_derivative(layer, reference, arguments):
    got = second_derivative(layer, arguments)
    assert all(np.any(np.abs(g) > 1e-3) for g in got)
    assert_close(got, second_derivative(reference, arguments))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("size", [3, 5])
def test_depthwise_is_a_grouped_convolution(size, dilation, stride):
    arguments = normal(0, SHAPE), normal(1, (SHAPE[0], size, size))
    assert_same_layer(
        lambda x, kernel: layers.depthwise(x, kernel, stride, dilation),
        lambda x, kernel: reference_depthwise(x, kernel, stride, dilation),
        arguments,
    )


@pytest.mark.usefixtures("double")
def test_depthwise_reaches_beyond_the_image():
    """A 5x5 kernel with dilation 2 spans 9 pixels; at the end of the supernet the image has 2."""
    arguments = normal(0, (2, 2, 2, 3)), normal(1, (2, 5, 5))
    assert_same_layer(
        lambda x, kernel: layers.depthwise(x, kernel, 1, 2),
        lambda x, kernel: reference_depthwise(x, kernel, 1, 2),
        arguments,
    )


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("stride", "dilation"), [(2, 1), (1, 2)])
def test_second_derivative_of_depthwise(stride, dilation):
    arguments = normal(0, SHAPE), normal(1, (SHAPE[0], 3, 3))
    assert_same_second_derivative(
        lambda x, kernel: layers.depthwise(x, kernel, stride, dilation),
        lambda x, kernel: reference_depthwise(x, kernel, stride, dilation),
        arguments,
    )


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_is_a_dense_convolution(stride):
    arguments = normal(0, SHAPE), normal(1, (4, SHAPE[0], 3, 3))
    assert_same_layer(
        lambda x, kernel: layers.convolution(x, kernel, stride),
        lambda x, kernel: reference_convolution(x, kernel, stride),
        arguments,
    )


@pytest.mark.usefixtures("double")
def test_pointwise_is_a_1x1_convolution():
    arguments = normal(0, SHAPE), normal(1, (4, SHAPE[0]))
    assert_same_layer(
        layers.pointwise, lambda x, kernel: reference_convolution(x, kernel[:, :, None, None], 1), arguments
    )


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", ["max_pool", "avg_pool"])
def test_pooling_is_a_window(name, stride):
    layer, reference = getattr(layers, name), globals()[f"reference_{name}"]
    for shape in (SHAPE, (2, 7, 8, 1)):
        arguments = (normal(0, shape),)
        assert_same_layer(lambda x: layer(x, stride), lambda x: reference(x, stride), arguments)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", ["max_pool", "avg_pool"])
def test_second_derivative_of_pooling(name):
    layer, reference = getattr(layers, name), globals()[f"reference_{name}"]
    arguments = (normal(0, SHAPE),)
    assert_same_second_derivative(lambda x: layer(x, 2), lambda x: reference(x, 2), arguments)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("stride", [1, 2])
def test_max_pool_gives_the_gradient_to_the_first_of_equals(stride):
    """Three grey levels make ties in nearly every window; XLA's window breaks them the same way."""
    x = jnp.round(normal(0, SHAPE))
    assert_same_layer(lambda x: layers.max_pool(x, stride), lambda x: reference_max_pool(x, stride), (x,))


def test_max_pool_of_a_flat_image():
    """Output (r, c) of a flat image is won by the upper left pixel of its window that lies inside."""
    counts = jax.jit(jax.grad(lambda x: layers.max_pool(x).sum()))(jnp.zeros((1, 4, 4, 1)))[0, :, :, 0]
    # Rows and columns 0 and 1 are won at 0, row 2 at 1, row 3 at 2.
    np.testing.assert_array_equal(counts, np.outer([2, 1, 1, 0], [2, 1, 1, 0]))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_avg_pool_keeps_a_constant(dtype, stride):
    y = jax.jit(layers.avg_pool, static_argnums=1)(jnp.full(SHAPE, 3, dtype), stride)
    np.testing.assert_array_equal(y.astype(jnp.float32), 3)


@pytest.mark.usefixtures("double")
def test_batch_norm_and_its_gradients():
    x = 3 * normal(0, SHAPE) + 5
    assert_same_layer(lambda x: batch_norm(x)[0], reference_batch_norm, (x,))
    assert_same_second_derivative(lambda x: batch_norm(x)[0], reference_batch_norm, (x,))


@pytest.mark.usefixtures("double")
def test_batch_norm_hands_out_unbiased_moments():
    x = normal(0, SHAPE)
    _, mean, variance = batch_norm(x)
    np.testing.assert_allclose(mean, np.mean(x, (1, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(variance, np.var(x, (1, 2, 3), ddof=1), rtol=1e-12)


def test_batch_norm_by_hand():
    """0, 2, 4, 6: mean 3, squared deviations 9 + 1 + 1 + 9, so variance 5, unbiased 20/3."""
    y, mean, variance = batch_norm(jnp.array([0.0, 2.0, 4.0, 6.0]).reshape(1, 2, 2, 1))
    np.testing.assert_allclose(y.ravel(), np.array([-3, -1, 1, 3]) / np.sqrt(5 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose([mean[0], variance[0]], [3, 20 / 3], rtol=1e-6)


def test_no_gradient_through_the_moments():
    grad = jax.jit(jax.grad(lambda x: sum(m.sum() for m in batch_norm(x)[1:])))(normal(0, SHAPE))
    np.testing.assert_array_equal(grad, 0)


@jax.jit
def value_and_vjp_of_norm(x):
    out, pull = jax.vjp(batch_norm, x)
    return out, pull(jax.tree.map(jnp.ones_like, out))


@pytest.mark.parametrize("shape", [SHAPE, (3, 1, 1, 1)])
def test_batch_norm_of_a_constant_is_zero(shape):
    """No spread and, with a single value, no degree of freedom: still numbers."""
    (y, mean, variance), (grad,) = value_and_vjp_of_norm(jnp.full(shape, 7.0))
    for got, want in ((y, 0), (mean, 7), (variance, 0)):
        np.testing.assert_allclose(got, want, atol=1e-3)
    assert np.all(np.isfinite(grad))


def test_batch_norm_far_from_zero():
    """Mean of squares minus square of mean would lose the variance here in float32."""
    spread = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    _, _, variance = batch_norm(jnp.asarray(spread) + 4096)
    np.testing.assert_allclose(variance, spread.var((1, 2, 3), ddof=1), rtol=1e-3)


@pytest.mark.usefixtures("double")
def test_frozen_norm_with_the_batch_moments_is_batch_norm():
    x = normal(0, SHAPE)
    y = batchnorm.frozen_norm(x, jnp.mean(x, (1, 2, 3)), jnp.var(x, (1, 2, 3)))
    np.testing.assert_allclose(y, batch_norm(x)[0], rtol=1e-9, atol=1e-12)


def test_normalize_by_hand():
    """255 is 1.0: (1 - 0.5) / 0.25 = 2; 0 is 0.0: (0 - 0.2) / 0.1 = -2. The batch goes last."""
    image = np.zeros((2, 3, 4, 2), np.uint8)
    image[1, :, :, 0] = 255
    x = layers.normalize(jnp.asarray(image), (0.5, 0.2), (0.25, 0.1), jnp.bfloat16)
    assert x.shape == (2, 3, 4, 2)
    assert x.dtype == jnp.bfloat16
    np.testing.assert_allclose(x[0, 0, 0].astype(jnp.float32), [-2, 2], rtol=1e-2)
    np.testing.assert_allclose(x[1].astype(jnp.float32), -2, rtol=1e-2)


LAYERS = {
    "depthwise": (lambda x: layers.depthwise(x, jnp.full((3, 3, 3), 0.3), 2, 1)),
    "convolution": (lambda x: layers.convolution(x, jnp.full((4, 3, 3, 3), 0.3), 2)),
    "pointwise": (lambda x: layers.pointwise(x, jnp.full((4, 3), 0.3))),
    "max_pool": (lambda x: layers.max_pool(x, 2)),
    "avg_pool": (lambda x: layers.avg_pool(x, 2)),
    "batch_norm": (lambda x: batch_norm(x)[0]),
    "frozen_norm": (lambda x: batchnorm.frozen_norm(x, jnp.full(3, 0.1), jnp.full(3, 2.0))),
}


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16_stays_bfloat16(name):
    """Values and input gradients keep the type and lie within bfloat16's 8 bits of the float32 ones."""
    wide = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)

    def run(x):
        y, pull = jax.vjp(LAYERS[name], x)
        return y, pull(jnp.ones_like(y))[0]

    x = jnp.asarray(wide, jnp.bfloat16)
    for got, want in zip(jax.jit(run)(x), jax.jit(run)(x.astype(jnp.float32)), strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=0.02, atol=0.02)


def test_moments_and_kernel_gradients_stay_float32():
    x = jnp.ones(SHAPE, jnp.bfloat16)
    _, mean, variance = batch_norm(x)
    assert mean.dtype == variance.dtype == jnp.float32
    kernel = jnp.ones((3, 3, 3), jnp.float32)
    grad = jax.jit(jax.grad(lambda kernel: layers.depthwise(x, kernel).astype(jnp.float32).sum()))(kernel)
    assert grad.dtype == jnp.float32
    # The middle tap meets all 8 * 7 * 2 ones, more than bfloat16 could count in steps of 1.
    np.testing.assert_array_equal(grad[:, 1, 1], 112)
