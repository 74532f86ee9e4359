"""The Pallas kernels, interpreted on a CPU, against the layers they stand for; and that they lower for CUDA.

None of this runs on a GPU. Images are [C, H, W, N]; tiles are small, so that an image takes several programs and
does not fill the last one.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmetanas_jax.models import fused, layers, operations
from fedmetanas_jax.models.cell import How, cell
from fedmetanas_jax.models.darts import darts, darts_space
from fedmetanas_jax.topology import OPS, edge_ends

TRITON = "__gpu$xla.gpu.triton"
CHANNELS, OUTPUTS = 5, 6


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """32 positions a program and three programs for weight gradients, instead of 128 or fewer and 32."""
    monkeypatch.setattr(fused, "TILE", 16 * 32)
    monkeypatch.setattr(fused, "PROGRAMS", 3)


def example(shape=(7, 6, 3), size=3, dtype=jnp.float32, clients=(), channels=CHANNELS, outputs=OUTPUTS):
    """x, depthwise and pointwise weights."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(*clients, channels, *shape)), dtype)
    shapes = (channels, size, size), (outputs, channels)
    return x, *(jnp.asarray(rng.normal(size=(*clients, *shape)), jnp.float32) for shape in shapes)


def plain(stride, dilation, x, depthwise, pointwise):
    """The same three values by the layers."""
    y = layers.pointwise(layers.depthwise(jax.nn.relu(x), depthwise, stride, dilation), pointwise)
    wide = y.astype(jnp.float32)
    return y, wide.sum((1, 2, 3)), jnp.square(wide - wide.mean((1, 2, 3), keepdims=True)).sum((1, 2, 3))


def kernels(stride, dilation, x, depthwise, pointwise):
    return fused.relu_depthwise_pointwise(x, depthwise, pointwise, stride, dilation, interpret=True)


def with_gradients(form, stride, dilation, clients=False):
    """jitted arguments -> (y, sums, squares), gradients of y along a fixed direction."""

    def run(*arguments):
        out, pull = jax.vjp(partial(form, stride, dilation), *arguments)
        g = jnp.cos(jnp.arange(out[0].size, dtype=jnp.float32)).reshape(out[0].shape).astype(out[0].dtype)
        return out, pull((g, *map(jnp.zeros_like, out[1:])))

    return jax.jit(jax.vmap(run) if clients else run)


def assert_close(got, want, tolerance):
    """Within `tolerance` of each array's largest value."""
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert a.shape == b.shape
        a, b = np.float32(a), np.float32(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


# --- Numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "stride", "dilation"), [(3, 1, 1), (3, 1, 2), (3, 2, 1), (3, 2, 2), (5, 1, 1), (5, 2, 2)]
)
def test_values_and_gradients_are_those_of_the_layers(size, stride, dilation):
    arguments = example(size=size)
    got, want = (with_gradients(form, stride, dilation)(*arguments) for form in (kernels, plain))
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(got))
    assert_close(got, want, 2e-6)


@pytest.mark.parametrize(("size", "shape"), [(5, (2, 2, 3)), (3, (1, 1, 1)), (3, (8, 4, 4))])
def test_images_smaller_than_the_window_and_ones_that_fill_their_tiles(size, shape):
    """A 5x5 kernel with dilation 2 spans 9 pixels, a 3x3 one 5; 8 * 4 * 4 positions are four tiles of 32."""
    arguments = example(shape, size)
    got, want = (with_gradients(form, 1, 2)(*arguments) for form in (kernels, plain))
    assert_close(got, want, 2e-6)


def test_tiles_of_the_size_a_gpu_would_get(monkeypatch):
    monkeypatch.undo()
    arguments = example((9, 9, 5), channels=16, outputs=16)  # 405 positions, 128 a program
    got, want = (with_gradients(form, 1, 1)(*arguments) for form in (kernels, plain))
    assert_close(got, want, 2e-6)


@pytest.mark.parametrize(("stride", "dilation"), [(2, 1), (1, 2)])
def test_bfloat16_is_as_near_to_float32_as_the_layers_are(stride, dilation):
    """bfloat16 has 8 bits; depthwise output, y and their gradients are rounded to it, each by up to 1/256."""
    arguments = example(dtype=jnp.bfloat16)
    wide = arguments[0].astype(jnp.float32), *arguments[1:]
    out, gradients = with_gradients(kernels, stride, dilation)(*arguments)
    assert [a.dtype for a in (*out, *gradients)] == [jnp.bfloat16, *[jnp.float32] * 2, jnp.bfloat16, *[jnp.float32] * 2]
    assert_close((out, gradients), with_gradients(plain, stride, dilation)(*wide), 0.02)


def test_the_sums_of_bfloat16_are_those_of_the_rounded_values():
    y, sums, squares = jax.jit(partial(kernels, 1, 1))(*example(dtype=jnp.bfloat16))
    wide = np.float64(y.astype(jnp.float32))
    np.testing.assert_allclose(sums, wide.sum((1, 2, 3)), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(squares, wide.var((1, 2, 3)) * wide[0].size, rtol=1e-5)


def test_squares_far_from_zero():
    """Sum of squares less squared sum would lose them here in float32."""
    spread = np.random.default_rng(0).normal(size=(1, 7, 6, 3)).astype(np.float32)
    one = jnp.ones((1, 1))
    y, sums, squares = jax.jit(partial(kernels, 1, 1))(jnp.asarray(spread) + 4096, one[:, :, None], one)
    np.testing.assert_allclose(sums, np.float64(y).sum((1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(squares, np.float64(y).var() * y.size, rtol=1e-4)


def test_every_client_has_its_own_weights():
    arguments = example(size=3, clients=(2,))
    got, want = (with_gradients(form, 2, 1, clients=True)(*arguments) for form in (kernels, plain))
    assert_close(got, want, 2e-6)


def test_no_gradient_through_the_sums():
    grads = jax.jit(jax.grad(lambda *a: sum(s.sum() for s in kernels(1, 1, *a)[1:]), (0, 1, 2)))(*example((3, 2, 2)))
    assert all(np.all(np.asarray(g) == 0) for g in grads)


# --- In a cell ------------------------------------------------------------------------------------------------


def test_a_cell_computed_by_the_kernels():
    """Separable and dilated convolutions on every edge: nodes, moments and gradients."""
    keep = ((OPS.index("sep_conv_3x3"), OPS.index("dil_conv_3x3")),) * len(edge_ends(1))
    rng = np.random.default_rng(0)
    weights = {}
    for k in keep[0]:
        shapes = operations.op_shapes(OPS[k], 2, 2)
        weights[OPS[k]] = {name: jnp.float32(rng.normal(size=(len(keep), *shape))) for name, shape in shapes.items()}
    arguments = jnp.float32(rng.normal(size=(2, 2, 6, 6, 3))), weights, jnp.float32(rng.uniform(0.1, 1, (2, len(OPS))))

    def derivatives(how):
        def loss(inputs, weights, mix):
            nodes, moments = cell(inputs, weights, {}, mix, keep, 1, True, True, how)
            return jnp.sum(nodes * jnp.cos(jnp.arange(nodes.size, dtype=nodes.dtype)).reshape(nodes.shape)), (
                nodes,
                moments,
            )

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arguments)

    assert_close(derivatives(How(kernel="interpret")), derivatives(How()), 1e-5)


def network(kernel, dtype=jnp.float32):
    """A tiny network of one edge with a separable and one with a dilated convolution."""
    plan = (((OPS.index("sep_conv_3x3"),), (OPS.index("dil_conv_5x5"),)),) * 2
    task = {"shape": (4, 4, 1), "classes": 2, "mean": (0.5,), "std": (0.5,), "width": 2, "length": 1, "nodes": 1}
    net = darts(**task, plan=plan, how=How(kernel=kernel), dtype=dtype)

    def loss(trained, stats, image):
        return jnp.sum(net.apply(trained[0], stats, image, trained[1], True)[0])

    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    mix = jax.ShapeDtypeStruct((2, 2, len(OPS)), jnp.float32)
    return jax.grad(loss), ((params, mix), stats, jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.uint8))


# --- Other platforms, refusals --------------------------------------------------------------------------------


def for_cuda(function, *arguments):
    checks = [jax.export.DisabledSafetyCheck.custom_call(TRITON)]
    exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)
    return exported(*arguments).mlir_module()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("width", [5, 16, 64])
def test_kernels_lower_for_cuda(monkeypatch, width, dtype):
    """One for the value and two for the gradients, for two clients, with the tiles a GPU would get."""
    monkeypatch.undo()

    def run(*arguments):
        out, pull = jax.vjp(lambda *a: fused.relu_depthwise_pointwise(*a, 2, 1), *arguments)
        return pull(out)

    arguments = example((8, 8, 3), 3, dtype, (2,), width, width)
    assert for_cuda(jax.vmap(run), *arguments).count(TRITON) == 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_network_lowers_for_cuda(dtype):
    function, arguments = network("pallas", dtype)
    assert for_cuda(function, *arguments).count(TRITON) > 3
    function, arguments = network("plain", dtype)
    assert TRITON not in for_cuda(function, *arguments)


def test_a_cpu_refuses_without_interpret():
    function, arguments = network("pallas")
    for refused in (lambda: jax.jit(function).lower(*arguments), lambda: fused.relu_depthwise_pointwise(*example())):
        with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
            refused()


def test_unknown_kernel():
    how = How(kernel="triton")
    space = darts_space(shape=(8, 8, 1), classes=2, mean=(0.5,), std=(0.5,), nodes=1, how=how)
    with pytest.raises(ValueError, match="no kernel 'triton'; choose among plain, pallas, interpret"):
        space.make((((), ()),) * 2)


def test_second_derivatives_are_refused():
    x, *weights = example((3, 2, 2))

    def slope(x):
        return jax.grad(lambda x: jnp.sum(kernels(1, 1, x, *weights)[0] ** 2))(x).sum()

    with pytest.raises(NotImplementedError, match="no second derivative"):
        jax.grad(slope)(x)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": jnp.ones((5, 4, 4, 2), jnp.float16)}, "not in float16"),
        ({"x": jnp.ones((4, 4, 4, 2))}, "do not fit"),
        ({"depthwise": jnp.ones((5, 4, 4))}, "odd k"),
        ({"pointwise": jnp.ones((5, 6))}, "do not fit"),
    ],
)
def test_arguments_that_do_not_fit(changed, message):
    arguments = dict(zip(("x", "depthwise", "pointwise"), example(), strict=True)) | changed
    with pytest.raises(ValueError, match=message):
        fused.relu_depthwise_pointwise(**arguments, interpret=True)
