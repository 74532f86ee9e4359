"""MobileNetV3: published counts, one block against XLA's convolutions in float64, and the Model's promises.

Images are [C, H, W, N] inside the network. Compile time is most of a test's time, so nets that run are tiny.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedmetanas_jax.models import layers
from fedmetanas_jax.models.mobilenetv3 import Row, Variant, block, declared, depthwise, mobilenetv3, squeezed

LAYOUT = ("CHWN", "OIHW", "CHWN")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)

# The machine code need not be fast.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture
def double():
    """float64 for the time of one test."""
    with jax.enable_x64(True):
        yield


def network(size=(8, 8), variant="tiny", classes=4, **options):
    return mobilenetv3(shape=(*size, 3), classes=classes, mean=MEAN, std=STD, variant=variant, **options)


def images(n, size=(8, 8), seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, (n, *size, 3)), jnp.uint8)


def varied(tree, seed=1):
    """The tree with values that hide nothing: no zero bias, no unit scale; variances stay positive."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.2, 1, x.shape), x.dtype), tree)


@pytest.fixture(scope="module")
def tiny():
    """A tiny network, its variables, and its two modes compiled."""
    model = network()
    params, stats = jax.jit(model.init)(jax.random.key(0))
    train = jit(lambda params, stats, image, key: model.apply(params, stats, image, True, key))
    still = jit(lambda params, stats, image: model.apply(params, stats, image, False))
    return params, stats, train, still


def convolve(x, kernel, stride=1, groups=1):
    """XLA's convolution with padding (k - 1) / 2: kernel [O, I / groups, k, k]."""
    space = ((kernel.shape[-1] // 2,) * 2,) * 2
    strides = (stride, stride)
    return lax.conv_general_dilated(
        x, kernel, strides, space, dimension_numbers=LAYOUT, feature_group_count=groups
    )


def sizes(model):
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    return tuple(map(count, jax.eval_shape(model.init, jax.random.key(0))))


@pytest.mark.parametrize(
    ("size", "stem", "classes", "parameters", "macs"),
    [
        (32, 1, 10, 4_214_842, 20_101_760),
        (32, 2, 10, 4_214_842, 7_087_040),
        (32, 2, 100, 4_330_132, 7_202_240),
        (224, 2, 1000, 5_483_032, 216_589_760),  # torchvision's own: 5,483,032 and 0.22 G
    ],
)
def test_large_has_the_published_counts(size, stem, classes, parameters, macs):
    model = network((size, size), "large", classes, stem=stem)
    assert sizes(model) == (parameters, 24_400)
    assert model.macs == macs
    assert model.momentum == 0.01


def test_tiny_is_tiny():
    assert sizes(network(classes=10))[0] == 10_946


def test_parts_have_readable_names():
    params, stats = jax.eval_shape(network(variant="large").init, jax.random.key(0))
    blocks = {f"block_{i:02d}" for i in range(15)}
    assert set(params) == {"stem", "last", "hidden", "head"} | blocks
    assert set(stats) == {"stem", "last"} | blocks
    assert set(params["block_00"]) == {"depthwise", "project"}
    assert set(params["block_03"]) == {"expand", "depthwise", "squeeze", "excite", "project"}
    assert set(stats["block_03"]["expand"]) == {"mean", "var"}
    assert {name: leaf.shape for name, leaf in params["head"].items()} == {"kernel": (4, 1280), "bias": (4,)}


def test_squeezed_channels_are_those_of_torchvision():
    assert [squeezed(n) for n in (72, 120, 480, 672, 960)] == [24, 32, 120, 168, 240]


def test_initial_values_have_torchvisions_deviations(tiny):
    params, stats, *_ = tiny
    block = params["block_02"]
    for kernel, deviation in [
        (params["stem"]["kernel"], (2 / (8 * 9)) ** 0.5),
        (block["expand"]["kernel"], (2 / 48) ** 0.5),
        (block["depthwise"]["kernel"], (2 / (48 * 25)) ** 0.5),
        (block["squeeze"]["kernel"], (2 / 16) ** 0.5),
        (params["hidden"]["kernel"], 0.01),
        (params["head"]["kernel"], 0.01),
    ]:
        # The deviation of n normal numbers is itself known to 1 / sqrt(2 n); 5 of those is certain enough.
        assert abs(np.std(kernel) / deviation - 1) < 5 / (2 * kernel.size) ** 0.5
        assert abs(np.mean(kernel)) < 5 * deviation / kernel.size**0.5
    assert not any(jnp.any(leaf) for leaf in (block["squeeze"]["bias"], params["head"]["bias"]))
    assert jnp.all(params["stem"]["scale"] == 1)
    assert jnp.all(stats["stem"]["var"] == 1)
    assert not jnp.any(params["stem"]["shift"])
    assert {leaf.dtype for leaf in jax.tree.leaves((params, stats))} == {jnp.dtype("float32")}
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((params, stats)))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 5)])
def test_depthwise_without_padding_only_taps_is_the_whole_convolution(double, size, stride):
    rng = np.random.default_rng(0)
    x, kernel = jnp.asarray(rng.normal(size=(3, *size, 2))), jnp.asarray(rng.normal(size=(3, 5, 5)))

    g = jnp.asarray(rng.normal(size=(3, -(-size[0] // stride), -(-size[1] // stride), 2)))

    def value_and_pullback(function):
        y, pull = jax.vjp(function, x, kernel)
        return y, *pull(g)

    found = jit(lambda: value_and_pullback(partial(depthwise, stride=stride)))()
    whole = jit(lambda: value_and_pullback(lambda x, kernel: convolve(x, kernel[:, None], stride, 3)))()
    for a, b in zip(found, whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def plain_block(row, params, x):
    """The block in training mode with XLA's convolutions and norms written out."""
    act = jax.nn.relu if row.act == "RE" else lambda x: x * jnp.clip(x + 3, 0, 6) / 6

    def norm(x, p):
        mean = jnp.mean(x, (1, 2, 3), keepdims=True)
        variance = jnp.mean((x - mean) ** 2, (1, 2, 3), keepdims=True)
        scale, shift = (p[name].reshape(-1, 1, 1, 1) for name in ("scale", "shift"))
        return (x - mean) / jnp.sqrt(variance + 1e-3) * scale + shift

    entry = x
    if "expand" in params:
        p = params["expand"]
        x = act(norm(convolve(x, p["kernel"][..., None, None]), p))
    p = params["depthwise"]
    x = act(norm(convolve(x, p["kernel"][:, None], row.stride, x.shape[0]), p))
    if row.squeeze:
        p, q = params["squeeze"], params["excite"]
        gate = jnp.maximum(p["kernel"] @ jnp.mean(x, (1, 2)) + p["bias"][:, None], 0)
        gate = jnp.clip(q["kernel"] @ gate + q["bias"][:, None] + 3, 0, 6) / 6
        x = x * gate[:, None, None, :]
    p = params["project"]
    x = norm(convolve(x, p["kernel"][..., None, None]), p)
    return x + entry if x.shape == entry.shape else x


@pytest.mark.parametrize(
    "row",
    [
        Row(3, 4, 4, False, "RE", 1),  # not expanded, residual
        Row(5, 32, 4, True, "HS", 1),  # squeezed, residual
        Row(5, 32, 6, True, "RE", 2),  # squeezed, strided
    ],
)
def test_block_is_the_plain_formula(double, row):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 8, 7, 3)))
    weights, norms = declared((8, 7, 3), 2, 1, Variant(stem=4, rows=(row,), last=2, hidden=2))
    params: dict = {}
    for path, weight in weights.items():
        if path[0] == "block_00":
            params.setdefault(path[1], {})[path[2]] = jnp.asarray(rng.normal(size=weight.shape))
    no_stats = {path[1]: None for path in norms if path[0] == "block_00"}
    y, _ = jit(lambda params, x: block(row, params, no_stats, x, True))(params, x)
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, jit(partial(plain_block, row))(params, x), atol=1e-11)


def test_training_returns_the_moments_of_the_batch(tiny):
    params, stats, train, _ = tiny
    image = images(5)
    logits, moments = train(params, stats, image, None)
    stem = layers.convolution(layers.normalize(image, MEAN, STD, jnp.float32), params["stem"]["kernel"])
    np.testing.assert_allclose(moments["stem"]["mean"], jnp.mean(stem, (1, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(moments["stem"]["var"], jnp.var(stem, (1, 2, 3), ddof=1), rtol=1e-4)
    again, same = train(params, varied(stats), image, None)
    np.testing.assert_array_equal(logits, again)
    jax.tree.map(np.testing.assert_array_equal, moments, same)
    assert jax.tree.map(jnp.shape, moments) == jax.tree.map(jnp.shape, stats)


def test_evaluation_uses_the_given_moments_and_returns_them(tiny):
    params, stats, _, still = tiny
    params, stats, image = varied(params, 2), varied(stats), images(6)
    logits, returned = still(params, stats, image)
    assert logits.shape == (6, 4)
    jax.tree.map(np.testing.assert_array_equal, returned, stats)
    assert not np.allclose(logits, still(params, varied(stats, 7), image)[0])
    # With given moments an image's answer does not depend on its neighbours.
    shuffled, _ = still(params, stats, image[::-1])
    np.testing.assert_allclose(logits, shuffled[::-1], rtol=1e-5)


def test_dropout_is_a_function_of_the_key(tiny):
    params, stats, train, _ = tiny
    image = images(5)
    first, second = jax.random.split(jax.random.key(0))
    logits, _ = train(params, stats, image, first)
    np.testing.assert_array_equal(logits, train(params, stats, image, first)[0])
    assert not np.allclose(logits, train(params, stats, image, second)[0])
    assert not np.allclose(logits, train(params, stats, image, None)[0])


def test_dropout_keeps_the_expected_features():
    """Where the head sums one hidden unit, a logit is 0 or 1 / (1 - rate) times the undropped one."""
    model = network((2, 2), classes=64, dropout=0.5)
    params, stats = jax.eval_shape(model.init, jax.random.key(0))
    params, stats = varied(params), varied(stats)
    params["head"] = {"kernel": jnp.eye(64), "bias": jnp.zeros(64)}
    apply = jit(lambda key: model.apply(params, stats, images(4, (2, 2)), True, key)[0])
    whole, dropped = apply(None), apply(jax.random.key(1))
    kept = dropped != 0
    assert 64 < int(kept.sum()) < 192  # of 256, half of them expected
    np.testing.assert_allclose(dropped, jnp.where(kept, 2 * whole, 0), rtol=1e-6)


@pytest.mark.parametrize(("size", "stem"), [((1, 1), 1), ((3, 5), 2)])
def test_any_image_size_gives_finite_gradients(tiny, size, stem):
    """A 1 x 1 map and a batch of one: the hardest case for a variance."""
    model = network(size, stem=stem)
    params, stats, *_ = tiny

    def loss(params, image):
        logits, moments = model.apply(params, stats, image, True, jax.random.key(1))
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 0]), (logits, moments)

    grads, (logits, moments) = jit(jax.grad(loss, has_aux=True))(params, images(1, size))
    assert logits.shape == (1, 4)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((grads, moments)))


def test_large_on_odd_maps_has_the_right_shapes():
    """28 x 28 with the strided stem goes 14, 7, 4, 2, 1."""
    model = network((28, 28), "large", 10, stem=2)
    params, stats = jax.eval_shape(model.init, jax.random.key(0))
    image = jax.ShapeDtypeStruct((2, 28, 28, 3), jnp.uint8)
    logits, moments = jax.eval_shape(lambda *a: model.apply(*a, True), params, stats, image)
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)
    assert moments == stats


def test_bfloat16_computes_alike_and_keeps_float32_outside(tiny):
    half = network(dtype=jnp.bfloat16)
    params, stats, train, _ = tiny
    params, image = varied(params, 4), images(5)
    logits, moments = jit(lambda p: half.apply(p, stats, image, True))(params)
    exact, _ = train(params, stats, image, None)
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, moments))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(logits, exact, rtol=0.05)


def test_tiny_learns_what_can_be_separated(tiny):
    """Four classes, each bright in its own quarter of the image."""
    rng = np.random.default_rng(0)
    label = np.arange(32) % 4
    image = rng.integers(0, 100, (32, 8, 8, 3))
    for i, quarter in enumerate(label):
        top, left = 4 * (quarter // 2), 4 * (quarter % 2)
        image[i, top : top + 4, left : left + 4] += 150
    image = jnp.asarray(image, jnp.uint8)
    params, stats, *_ = tiny
    velocity = jax.tree.map(jnp.zeros_like, params)

    def loss(params, key):
        logits, _ = network().apply(params, stats, image, True, key)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(32), label])

    @jax.jit
    def step(params, velocity, key):
        value, grads = jax.value_and_grad(loss)(params, key)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        return jax.tree.map(lambda p, v: p - 0.1 * v, params, velocity), velocity, value

    losses = []
    for key in jax.random.split(jax.random.key(1), 60):
        params, velocity, value = step(params, velocity, key)
        losses.append(float(value))
    assert losses[0] == pytest.approx(np.log(4), abs=0.05)  # a head of N(0, 0.01) knows nothing yet
    assert losses[-1] < 0.1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"variant": "small"}, "no MobileNetV3 variant 'small'; there are large, tiny"),
        ({"stem": 3}, "stride 1 or 2, not 3"),
        ({"dropout": 1.0}, "below 1, not 1.0"),
    ],
)
def test_impossible_requests_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        network(**options)
