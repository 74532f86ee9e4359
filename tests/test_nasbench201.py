"""The NAS-Bench-201 space: a naive second implementation, counts by hand, smaller programs for pruned searches."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedmetanas_jax.core import Alpha, Mask
from fedmetanas_jax.models import layers
from fedmetanas_jax.models.nasbench201 import EDGES, GRAPH, OPS, nasbench201_space
from fedmetanas_jax.nas import genotype, mask, relax

SHAPE, CLASSES, BATCH = (8, 4, 2), 3, 3
MEAN, STD = (0.5, 0.4), (0.25, 0.2)
FULL = mask.full_plan(GRAPH)
NONE, SKIP, CONV1, CONV3, POOL = range(5)
# Each operation on some edges; the edge (0, 1) dead, nothing but `none` on (1, 2).
PARTIAL = [[[CONV1, SKIP], [], [CONV3, CONV1], [POOL, NONE], [NONE], [CONV3, SKIP, POOL]]]
ONE = [[[CONV3], [SKIP], [CONV1], [NONE], [POOL], [CONV1]]]


def space(dtype=jnp.float64, **size):
    """One cell a stage, on 8 x 4 images of two channels."""
    size = {"width": 2, "length": 3} | size
    return nasbench201_space(shape=SHAPE, classes=CLASSES, mean=MEAN, std=STD, dtype=dtype, **size)


@pytest.fixture
def double():
    """float64 for the time of one test."""
    with jax.enable_x64(True):
        yield


# --- The network a second time: [N, C, H, W], one edge and one operation after another ---------------------


def conv(x, kernel, stride=1):
    pad = (kernel.shape[-1] // 2,) * 2
    layout = ("NCHW", "OIHW", "NCHW")
    return lax.conv_general_dilated(x, kernel, (stride, stride), (pad, pad), dimension_numbers=layout)


def pool(x, size, stride, pad):
    add = partial(
        lax.reduce_window, init_value=0.0, computation=lax.add, window_dimensions=(1, 1, size, size),
        window_strides=(1, 1, stride, stride), padding=((0, 0), (0, 0), (pad, pad), (pad, pad)),
    )  # fmt: skip
    return add(x) / add(jnp.ones_like(x))


def batch_norm(x, given, train):
    mean = jnp.where(train, x.mean((0, 2, 3)), given["mean"])
    variance = jnp.where(train, x.var((0, 2, 3)), given["var"])
    count = x[:, 0].size
    unbiased = jnp.where(train, variance * count / (count - 1), variance)
    wide = (slice(None), None, None)
    return (x - mean[wide]) / jnp.sqrt(variance[wide] + 1e-5), {"mean": mean, "var": unbiased}


def naive_cell(x, params, stats, mix, train):
    states, found = [x], {op: [] for op in params}
    for j in range(3):
        node = 0.0
        for i in range(j + 1):
            e, x = EDGES.index((i, j)), states[i]
            node = node + mix[e, SKIP] * x + mix[e, POOL] * pool(x, 3, 1, 1)
            for op in params:
                kernel = params[op]["kernel"][e]
                y = conv(jax.nn.relu(x), kernel if kernel.ndim == 4 else kernel[:, :, None, None])
                y, moments = batch_norm(y, jax.tree.map(lambda leaf, e=e: leaf[e], stats[op]["norm"]), train)
                found[op].append({"norm": moments})
                node = node + mix[e, OPS.index(op)] * y
        states.append(node)
    return node, {op: jax.tree.map(lambda *m: jnp.stack(m), *rows) for op, rows in found.items()}


def naive(params, stats, image, mix, train):
    x = layers.normalize(image, MEAN, STD, jnp.float64).transpose(3, 0, 1, 2)
    found = {}
    x, found["stem_norm"] = batch_norm(conv(x, params["stem"]), stats["stem_norm"], train)
    for i in range(3):
        name = f"halving_{i}"
        if i:
            p, s = params[name], stats[name]
            y, first = batch_norm(conv(jax.nn.relu(x), p["first"], 2), s["first_norm"], train)
            y, second = batch_norm(conv(jax.nn.relu(y), p["second"]), s["second_norm"], train)
            x = conv(pool(x, 2, 2, 0), p["shortcut"][:, :, None, None]) + y
            found[name] = {"first_norm": first, "second_norm": second}
        x, found[f"cell_{i}"] = naive_cell(x, params[f"cell_{i}"], stats[f"cell_{i}"], mix[0], train)
    x, found["last_norm"] = batch_norm(x, stats["last_norm"], train)
    return jax.nn.relu(x).mean((2, 3)) @ params["head_kernel"].T + params["head_bias"], found


# --- What is compared ---------------------------------------------------------------------------------------


def shapes(net):
    return jax.eval_shape(net.init, jax.random.key(0))


def example(seed, dtype=np.float64):
    """Weights, statistics, images and mix without zeros, ones or anything else special in them."""
    rng = np.random.default_rng(seed)
    params, stats = shapes(space().make(FULL))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(dtype), params)
    stats = jax.tree.map(lambda leaf: rng.uniform(0.5, 2, leaf.shape).astype(dtype), stats)
    image = rng.integers(0, 256, (BATCH, *SHAPE)).astype(np.uint8)
    return params, stats, image, rng.uniform(0.1, 1, (1, 6, 5)).astype(dtype)


def derivatives(apply, params, stats, image, mix):
    """Logits, statistics, gradients of a curved loss by params and mix."""

    def loss(trained):
        logits, found = apply(trained[0], stats, image, trained[1])
        return jnp.sum(jnp.sin(2 * logits + jnp.arange(CLASSES))), (logits, found)

    grads, (logits, found) = jax.grad(loss, has_aux=True)((params, mix))
    return logits, found, *grads


@pytest.fixture(scope="module")
def reference():
    """Compiled: (train, params, stats, image, mix) -> `derivatives` of the naive network."""
    return jax.jit(lambda train, *given: derivatives(lambda *a: naive(*a, train), *given))


def alive_in(plan):
    return np.array([[[k in ops for k in range(5)] for ops in edges] for edges in plan])


def cut(tree, plan):
    return space().carry_over(tree, FULL, plan)


def assert_close(got, want, rtol=1e-7, atol=1e-9):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol, atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.usefixtures("double")
def test_training_mode_and_gradients_equal_the_naive_network(reference):
    net = space().make(FULL)
    got = jax.jit(lambda *given: derivatives(lambda *a: net.apply(*a, True), *given))(*example(0))
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(got))
    assert_close(got, reference(True, *example(0)))


@pytest.mark.usefixtures("double")
def test_evaluation_equals_the_naive_network(reference):
    net, (params, stats, image, mix) = space().make(FULL), example(1)
    logits, returned = jax.jit(lambda *given: net.apply(*given, False))(params, stats, image, mix)
    assert_close(logits, reference(False, params, stats, image, mix)[0])
    assert_close(returned, stats, rtol=0, atol=0)


@pytest.mark.usefixtures("double")
def test_partial_program_for_two_clients_at_once_is_the_same_function(reference):
    """vmap over clients with their own weights, images and mix."""
    clients = [example(2), example(3)]
    net = space().make(PARTIAL)
    small = [(cut(params, PARTIAL), cut(stats, PARTIAL), *rest) for params, stats, *rest in clients]
    run = jax.jit(jax.vmap(partial(derivatives, lambda *a: net.apply(*a, True))))
    results = run(*jax.tree.map(lambda *leaves: np.stack(leaves), *small))
    alive = alive_in(PARTIAL)
    for i, (params, stats, image, mix) in enumerate(clients):
        logits, found, grad, grad_mix = reference(True, params, stats, image, mix * alive)
        want = logits, cut(found, PARTIAL), cut(grad, PARTIAL), grad_mix * alive
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], results), want)


@pytest.mark.usefixtures("double")
def test_one_hot_mix_is_the_derived_network_with_the_weights_carried_over(reference):
    params, stats, image, _ = example(4)
    model = space().derive(ONE)
    logits, found = jax.jit(lambda *given: model.apply(*given, True))(cut(params, ONE), cut(stats, ONE), image)
    want, moments, *_ = reference(True, params, stats, image, alive_in(ONE).astype(np.float64))
    assert_close((logits, found), (want, cut(moments, ONE)))
    assert set(model.head) == {"head_kernel", "head_bias"} < set(params)


def test_carry_over_leaves_what_the_smaller_network_has():
    params, stats, *_ = example(5)
    bare = [[[SKIP]] * 6]  # cells without any weight
    for plan in (PARTIAL, ONE, bare):
        want = shapes(space().make(plan))
        got = cut(params, plan), cut(stats, plan)
        assert jax.tree.map(np.shape, got) == jax.tree.map(np.shape, want)
    between = [[sorted({*a, *b}) for a, b in zip(PARTIAL[0], ONE[0], strict=True)]]
    twice = space().carry_over(cut(params, between), between, ONE)
    assert_close(twice, cut(params, ONE), rtol=0, atol=0)


def test_a_derived_network_may_have_another_size():
    got, want = space().resized(width=3, length=6).derive(ONE), space(width=3, length=6).make(ONE)
    assert (shapes(got), got.macs, got.momentum) == (shapes(want), want.macs, 0.1)


# --- The search ---------------------------------------------------------------------------------------------


def random_alpha(seed):
    full = mask.full(GRAPH)
    op = np.random.default_rng(seed).normal(size=full.op.shape)
    return Alpha(jnp.array(op, jnp.float32), jnp.zeros(full.pair.shape))


def test_a_search_ends_with_one_operation_on_every_edge():
    alpha, full = random_alpha(0), mask.full(GRAPH)
    end = mask.terminal(GRAPH, alpha, full)
    assert [int(n) for n in mask.alive(GRAPH, end)] == [6, 0]
    plan = mask.plan_of(GRAPH, end)
    assert [len(ops) for ops in plan[0]] == [1] * 6
    assert genotype.to_plan(GRAPH, genotype.pair_rule(GRAPH, alpha, full)) == plan


def test_masked_logits_have_no_gradient():
    """Through the network and the relaxation: exactly 0 at what is dead, something elsewhere."""
    params, stats, image, _ = example(6, np.float32)
    alive = Mask(jnp.array(alive_in(PARTIAL)), mask.full(GRAPH).pair)
    net = space(jnp.float32).make(FULL)

    def loss(alpha):
        mix = relax.mix(GRAPH, alpha, alive, 0.5, jax.random.key(0))
        return jnp.sum(jnp.sin(net.apply(params, stats, image, mix, True)[0]))

    grad = jax.jit(jax.grad(loss))(random_alpha(1)).op
    assert not np.any(np.asarray(grad)[~alive.op])
    several = alive.op & (alive.op.sum(-1, keepdims=True) > 1)
    assert np.all(np.asarray(grad)[several])


# --- Counts, types, errors ----------------------------------------------------------------------------------


def test_multiply_adds_by_hand():
    """C = 1, one cell a stage, 4 x 4 grey images, 2 classes: 16, 4 and 1 positions.

    Stem 9 * 16 = 144. Cells with one 1x1 and one 3x3: 10 * (16 + 4 * 4 + 16 * 1) = 480. Residual blocks from 1 to 2
    channels at 4 positions, (18 + 36 + 2) * 4 = 224, and from 2 to 4 at one, 72 + 144 + 8 = 224. Head 4 * 2 = 8.
    """
    net = nasbench201_space(shape=(4, 4, 1), classes=2, mean=(0.5,), std=(0.5,), width=1, length=3)
    plan = [[[CONV1], [NONE], [], [SKIP, CONV3], [POOL], []]]
    assert net.make(plan).macs == 144 + 480 + 224 + 224 + 8


def test_counts_of_the_papers_size():
    """C = 16, 15 cells: 10 C^2 weights an edge and cell; those between have 56 C^2 and 224 C^2."""
    net = nasbench201_space(shape=(32, 32, 3), classes=10, mean=(0.5,) * 3, std=(0.5,) * 3)
    params, stats = shapes(net.make(FULL))
    cells = 5 * 6 * 10 * 16**2 * (1 + 4 + 16)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 432 + cells + (56 + 224) * 256 + 650
    norms = 16 + 5 * 6 * 2 * (16 + 32 + 64) + 2 * (32 + 64) + 64
    assert sum(leaf.size for leaf in jax.tree.leaves(stats)) == 2 * norms


def test_bfloat16_leaves_float32_and_initial_values_are_kernels_of_their_fan_in():
    net = space(jnp.bfloat16).make(PARTIAL)
    params, stats = jax.jit(net.init)(jax.random.key(0))
    image = np.zeros((2, *SHAPE), np.uint8)
    out = jax.eval_shape(lambda *given: net.apply(*given, True), params, stats, image, jnp.ones((1, 6, 5)))
    assert {leaf.dtype for leaf in jax.tree.leaves((params, stats, out))} == {jnp.dtype(jnp.float32)}
    assert jax.tree.structure(out[1]) == jax.tree.structure(stats)
    for kernel, n in (
        (params["stem"], 18),
        (params["cell_2"]["nor_conv_3x3"]["kernel"], 72),
        (params["cell_2"]["nor_conv_1x1"]["kernel"], 8),
        (params["halving_2"]["first"], 36),
    ):
        assert 0.8 * n**-0.5 < np.max(np.abs(kernel)) <= n**-0.5
    assert all(np.all(leaf == (path[-1].key == "var")) for path, leaf in jax.tree.leaves_with_path(stats))


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ({"length": 4}, "a multiple of 3, not 4"),
        ({"length": 0}, "a multiple of 3, not 0"),
        ({"shape": (6, 8, 1)}, "multiples of 4; they are 6 x 8"),
        ({"shape": (8, 2, 1)}, "multiples of 4; they are 8 x 2"),
    ],
)
def test_impossible_requests_are_refused(size, said):
    with pytest.raises(ValueError, match=said):
        nasbench201_space(**{"shape": (8, 8, 1), "classes": 2, "mean": (0.5,), "std": (0.5,)} | size)
