"""The DARTS supernet: known counts, a naive second implementation, smaller programs for pruned searches."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedmetanas_jax.models import cell as cells
from fedmetanas_jax.models import layers
from fedmetanas_jax.models.darts import carry_over, darts, full_plan, multiply_adds, reductions

LENGTH, NODES = 3, 2  # cells: normal, reduction, reduction
EDGES = 5
REDUCTIONS = (1, 2)
SHAPE, CLASSES, BATCH = (8, 8, 2), 3, 4
MEAN, STD = (0.5, 0.4), (0.25, 0.2)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compile time is most of the time here, and the machine code need not be fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def small(plan=None, dtype=jnp.float64):
    """Three cells of two nodes, on 8 x 8 images of two channels."""
    size = {"width": 4, "length": LENGTH, "nodes": NODES}
    return darts(shape=SHAPE, classes=CLASSES, mean=MEAN, std=STD, plan=plan, dtype=dtype, **size)


def full_size(shape, classes, plan=None):
    """The network of methods section 12.1: C = 16, 8 cells, 4 nodes."""
    one = (0.5,) * shape[2]
    return darts(shape=shape, classes=classes, mean=one, std=one, plan=plan)


def shapes(net):
    return jax.eval_shape(net.init, jax.random.key(0))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_reduction_cells_stand_at_the_thirds():
    assert reductions(8) == (2, 5)
    assert reductions(LENGTH) == REDUCTIONS


# --- Counts (methods section 12.1) --------------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar10():
    net = full_size((32, 32, 3), 10)
    return net, *shapes(net)


def test_cifar10_counts_by_part(cifar10):
    net, params, stats = cifar10
    stem = sum(params[name].size for name in ("stem", "stem_scale", "stem_shift"))
    head = sum(params[name].size for name in ("head_kernel", "head_bias"))
    parts = [count(params[f"cell_{i}"]) for i in range(8)]
    assert (stem, head) == (1_392, 2_570)
    assert parts == [45_888, 46_144, 144_000, 137_856, 139_904, 484_608, 460_032, 468_224]
    assert count(params) == 1_930_618
    assert count(stats) == 74_592
    assert round(net.macs / 1e6, 2) == 300.26


@pytest.mark.parametrize(
    ("shape", "classes", "params", "mmacs"),
    [((32, 32, 3), 100, 1_953_748, 300.28), ((28, 28, 1), 10, 1_929_754, 229.21)],
    ids=["cifar100", "mnist"],
)
def test_counts_of_other_tasks(shape, classes, params, mmacs):
    net = full_size(shape, classes)
    sizes = shapes(net)
    assert (count(sizes[0]), count(sizes[1])) == (params, 74_592)
    assert round(net.macs / 1e6, 2) == mmacs


def test_number_of_convolutions_and_norms(cifar10):
    """Each row of a stack of weights is a convolution, each row of a stack of means a batch norm."""
    _, params, stats = cifar10
    convolutions = norms = 1  # the stem's
    for i in range(8):
        for name, block in params[f"cell_{i}"].items():
            rows = [1 if name.startswith("preprocess") else leaf.shape[0] for leaf in block.values()]
            convolutions += sum(rows)
        for name, block in stats[f"cell_{i}"].items():
            rows = [1 if name.startswith("preprocess") else norm["mean"].shape[0] for norm in block.values()]
            norms += sum(rows)
    assert (convolutions, norms) == (1_395, 929)


def plan_of(*genotype):
    """Plan of a genotype: per cell type and node, (operation, input) pairs."""
    plan = []
    for cell in genotype:
        keep = {(i, j): (cells.OPS.index(op),) for j, node in enumerate(cell) for op, i in node}
        plan.append(tuple(keep.get((i, j), ()) for j in range(len(cell)) for i in range(j + 2)))
    return tuple(plan)


NONE, MAX, AVG, SKIP, SEP3, SEP5, DIL3, DIL5 = cells.OPS
DARTS_V2 = (
    [[(SEP3, 0), (SEP3, 1)], [(SEP3, 0), (SEP3, 1)], [(SEP3, 1), (SKIP, 0)], [(SKIP, 0), (DIL3, 2)]],
    [[(MAX, 0), (MAX, 1)], [(SKIP, 2), (MAX, 1)], [(MAX, 0), (SKIP, 2)], [(SKIP, 2), (MAX, 1)]],
)


@pytest.mark.parametrize(
    ("genotype", "params", "mmacs"),
    [
        (DARTS_V2, 239_898, 43.4),
        (([[(SEP5, 0), (SEP5, 1)]] * 4,) * 2, 481_402, 81.9),
        (([[(SKIP, 0), (SKIP, 1)]] * 4,) * 2, 140_410, 24.7),
    ],
    ids=["DARTS_V2", "sep5x5", "skip"],
)
def test_counts_of_discrete_networks(genotype, params, mmacs):
    net = full_size((32, 32, 3), 10, plan_of(*genotype))
    assert count(shapes(net)[0]) == params
    assert round(net.macs / 1e6, 1) == mmacs


def test_multiply_adds_by_hand():
    """One cell (a reduction) of one node, 2 x 2 grey image, width 1, the identity's halving on edge 0.

    Stem 9 * 3 * 4 = 108; two preprocessing 1x1 from 3 to 2 channels at 4 pixels = 48; two 1x1 from 2 to 1
    channel at 1 pixel = 4; head from 2 features to 5 classes = 10.
    """
    skip = cells.OPS.index(SKIP)
    assert multiply_adds((2, 2, 1), 5, 1, 1, 1, (((), ()), ((skip,), ()))) == 108 + 48 + 4 + 10


@pytest.mark.parametrize("shape", [(30, 32, 3), (32, 30, 3), (7, 7, 1)])
def test_image_that_cannot_be_halved(shape):
    with pytest.raises(ValueError, match=f"multiples of 4; they are {shape[0]} x {shape[1]}"):
        full_size(shape, 10)


# --- A naive second implementation of methods section 3, [N, C, H, W] -----------------------------------


def conv(x, kernel, stride=1, dilation=1, groups=1):
    pad = dilation * (kernel.shape[-1] - 1) // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), ((pad, pad), (pad, pad)), rhs_dilation=(dilation, dilation),
        dimension_numbers=("NCHW", "OIHW", "NCHW"), feature_group_count=groups,
    )  # fmt: skip


def conv1x1(x, kernel, stride=1):
    return conv(x, kernel[:, :, None, None], stride)


def pool(x, start, operation, stride):
    return lax.reduce_window(
        x, start, operation, (1, 1, 3, 3), (1, 1, stride, stride), ((0, 0), (0, 0), (1, 1), (1, 1))
    )


def batch_norm(x, given, train):
    """Returns (y, the moments that running averages take)."""
    mean = jnp.where(train, x.mean((0, 2, 3)), given["mean"])
    variance = jnp.where(train, x.var((0, 2, 3)), given["var"])
    unbiased = jnp.where(train, variance * x[:, 0].size / (x[:, 0].size - 1), variance)
    wide = (slice(None), None, None)
    return (x - mean[wide]) / jnp.sqrt(variance[wide] + 1e-5), {"mean": mean, "var": unbiased}


def halving(x, weights):
    x = jax.nn.relu(x)
    return jnp.concatenate([conv1x1(x, weights["even"], 2), conv1x1(x[:, :, 1:, 1:], weights["odd"], 2)], 1)


def depthwise_pointwise(x, depthwise, pointwise, stride, dilation):
    x = conv(jax.nn.relu(x), depthwise[:, None], stride, dilation, groups=x.shape[1])
    return conv1x1(x, pointwise)


@partial(jax.jit, static_argnums=(0, 4))
def operation(op, x, w, s, stride, train):
    """One candidate operation with weights w and statistics s; (y, moments by norm).

    Compiled one by one, for both modes: as a single program the loops around it would take XLA long.
    """
    if op == "none":
        return jnp.zeros_like(x[:, :, ::stride, ::stride]), {}
    if op == "skip_connect" and stride == 1:
        return x, {}
    if op == "max_pool_3x3":
        y = pool(x, -jnp.inf, lax.max, stride)
    elif op == "avg_pool_3x3":
        y = pool(x, 0.0, lax.add, stride) / pool(jnp.ones_like(x), 0.0, lax.add, stride)
    elif op == "skip_connect":
        y = halving(x, w)
    else:
        y = depthwise_pointwise(x, w["depthwise"], w["pointwise"], stride, 2 if op.startswith("dil") else 1)
    y, moments = batch_norm(y, s["norm"], train)
    found = {"norm": moments}
    if op.startswith("sep"):
        y = depthwise_pointwise(y, w["depthwise_2"], w["pointwise_2"], 1, 1)
        y, found["norm_2"] = batch_norm(y, s["norm_2"], train)
    return y, found


def naive_cell(s0, s1, params, stats, mix, reduce, halve, train):
    first = halving(s0, params["preprocess_0"]) if halve else conv1x1(
        jax.nn.relu(s0), params["preprocess_0"]["pointwise"]
    )  # fmt: skip
    second = conv1x1(jax.nn.relu(s1), params["preprocess_1"]["pointwise"])
    states, found = [], {}
    for name, x in (("preprocess_0", first), ("preprocess_1", second)):
        y, moments = batch_norm(x, stats[name]["norm"], train)
        states.append(y)
        found[name] = {"norm": moments}
    collected = {op: [] for op in cells.OPS}
    for j in range(NODES):
        node = 0.0
        for i in range(j + 2):
            edge = j * (j + 3) // 2 + i
            stride = 2 if reduce and i < 2 else 1
            for k, op in enumerate(cells.OPS):
                row = len(collected[op])  # how many edges before this one have weights or norms
                at_row = partial(jax.tree.map, lambda leaf, row=row: leaf[row])
                bare = op == "skip_connect" and stride == 1
                w, s = ({}, {}) if bare else (at_row(params.get(op, {})), at_row(stats.get(op, {})))
                y, moments = operation(op, states[i], w, s, stride, train)
                node = node + mix[edge, k] * y
                collected[op] += [moments] if moments else []
        states.append(node)
    for op, rows in collected.items():
        if rows:
            found[op] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    return jnp.concatenate(states[2:], 1), found


def naive(params, stats, image, mix, train):
    """The supernet on plain convolutions, one loop over cells, nodes, inputs and operations."""
    # Float32 rounds another way in another program, and batch norm magnifies that; so one program for both.
    x = jax.jit(partial(layers.normalize, mean=MEAN, std=STD, dtype=jnp.float64))(image).transpose(3, 0, 1, 2)
    x, moments = batch_norm(conv(x, params["stem"]), stats["stem_norm"], train)
    found = {"stem_norm": moments}
    s0 = s1 = params["stem_scale"][:, None, None] * x + params["stem_shift"][:, None, None]
    for i in range(LENGTH):
        name, reduce = f"cell_{i}", i in REDUCTIONS
        arguments = params[name], stats[name], mix[int(reduce)], reduce, i - 1 in REDUCTIONS, train
        (s0, s1), found[name] = (s1, (out := naive_cell(s0, s1, *arguments))[0]), out[1]
    return s1.mean((2, 3)) @ params["head_kernel"].T + params["head_bias"], found


# --- What is compared -----------------------------------------------------------------------------------


@pytest.fixture
def double():
    """float64 for the time of one test."""
    with jax.enable_x64(True):
        yield


def curved(logits):
    """A loss whose gradient is another number for every logit."""
    return jnp.sum(jnp.sin(2 * logits + jnp.arange(CLASSES)))


def derivatives(apply, train):
    """(params, stats, image, mix) -> logits, stats, gradients of a curved loss by params and mix."""

    def loss(trained, stats, image):
        logits, stats = apply(trained[0], stats, image, trained[1], train)
        return curved(logits), (logits, stats)

    def run(params, stats, image, mix):
        grads, (logits, found) = jax.grad(loss, has_aux=True)((params, mix), stats, image)
        return logits, found, *grads

    return run


def example(seed, dtype=np.float64, net=None):
    """Weights, statistics, images and mix without zeros, ones or anything else special in them."""
    rng = np.random.default_rng(seed)
    params, stats = shapes(net or small())
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(dtype), params)
    stats = jax.tree.map(lambda leaf: rng.uniform(0.5, 2, leaf.shape).astype(dtype), stats)
    image = rng.integers(0, 256, (BATCH, *SHAPE)).astype(np.uint8)
    return params, stats, image, rng.uniform(0.1, 1, (2, EDGES, len(cells.OPS))).astype(dtype)


@pytest.fixture(scope="module")
def full():
    """Compiled `derivatives` of the full small network in training mode."""
    return jax.jit(derivatives(small().apply, True))


def assert_close(got, want, rtol=1e-7, atol=1e-9):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol, atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.usefixtures("double")
def test_training_mode_and_gradients_equal_the_naive_network(full):
    got = full(*example(0))
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(got))
    assert_close(got, derivatives(naive, True)(*example(0)))


@pytest.fixture(scope="module")
def full_eval():
    """Compiled evaluation of the full small network: logits."""
    net = small()
    return jax.jit(lambda *arguments: net.apply(*arguments, False)[0])


@pytest.mark.usefixtures("double")
def test_evaluation_equals_the_naive_network(full_eval):
    logits, *_ = derivatives(naive, False)(*example(1))  # reuses the compiled pieces of training mode
    assert_close(full_eval(*example(1)), logits)


def test_evaluation_returns_the_given_statistics():
    params, stats, image, mix = example(0, np.float32)
    found = jax.eval_shape(lambda s: small(dtype=jnp.float32).apply(params, s, image, mix, False)[1], stats)
    assert jax.tree.structure(found) == jax.tree.structure(stats)


# --- Smaller programs -----------------------------------------------------------------------------------


def named(*cell):
    """Operations by name, one tuple per edge, as their numbers."""
    return tuple(tuple(cells.OPS.index(op) for op in edge) for edge in cell)


# One operation on every live edge, others on some; a dead edge in both cell types.
PARTIAL = (
    named((SEP3, MAX), (SEP3,), (NONE, MAX, SEP3), (), (SKIP, SEP3, DIL3)),
    named((), (SKIP, AVG), (SKIP, DIL3), (AVG,), (MAX, DIL3)),
)
# What a search ends with: `none` and the identity among the choices, no edge between a reduction's nodes.
TERMINAL = plan_of(
    [[(NONE, 0), (SEP3, 1)], [(SKIP, 0), (DIL3, 2)]],
    [[(SKIP, 0), (MAX, 1)], [(NONE, 0), (SKIP, 1)]],
)


def cut(tree, plan):
    return carry_over(tree, LENGTH, NODES, full_plan(NODES), plan)


def alive_in(plan):
    """[2, edges, ops], 1 where alive."""
    return np.array([[[float(k in edge) for k in range(len(cells.OPS))] for edge in cell] for cell in plan])


def assert_same_as_full(full, got, plan, arguments):
    """`got` are the derivatives of plan's network on the weights cut from those in `arguments`."""
    params, stats, image, mix = arguments
    alive = alive_in(plan)
    logits, found, grad_params, grad_mix = full(params, stats, image, mix * alive)
    assert_close(got, (logits, cut(found, plan), cut(grad_params, plan), grad_mix * alive))


@pytest.mark.usefixtures("double")
def test_terminal_program_is_the_same_function(full):
    params, stats, image, mix = example(2)
    apply = small(TERMINAL).apply
    small_arguments = cut(params, TERMINAL), cut(stats, TERMINAL), image, mix
    logits, found = jax.jit(lambda *arguments: apply(*arguments, True))(*small_arguments)
    want_logits, want_found, *_ = full(params, stats, image, mix * alive_in(TERMINAL))
    assert_close((logits, found), (want_logits, cut(want_found, TERMINAL)))


@pytest.mark.usefixtures("double")
def test_partial_program_for_two_clients_at_once_is_the_same_function(full):
    """vmap over clients with their own weights, image and mix; the full network takes them one by one."""
    clients = [example(3), example(4)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[
        (cut(params, PARTIAL), cut(stats, PARTIAL), image, mix) for params, stats, image, mix in clients
    ])  # fmt: skip
    one = derivatives(small(PARTIAL).apply, True)
    traced = jax.jit(jax.vmap(one)).trace(*stacked)
    # What is dead is skipped for many clients as for one: no `cond` has become a `select`.
    alone = jax.make_jaxpr(one)(*jax.tree.map(lambda leaf: leaf[0], stacked))
    assert str(traced.jaxpr).count("cond[") == str(alone).count("cond[") > 0
    results = traced.lower().compile()(*stacked)
    for i, client in enumerate(clients):
        assert_same_as_full(full, jax.tree.map(lambda leaf, i=i: leaf[i], results), PARTIAL, client)


@pytest.mark.usefixtures("double")
def test_terminal_program_in_evaluation(full_eval):
    """Logits as the full network's; the gradient is the slope of the loss along a random direction."""
    params, stats, image, mix = example(5)
    run = jax.jit(derivatives(small(TERMINAL).apply, False))
    small_params, small_stats = cut(params, TERMINAL), cut(stats, TERMINAL)
    logits, found, *grads = run(small_params, small_stats, image, mix)
    assert_close(logits, full_eval(params, stats, image, mix * alive_in(TERMINAL)))
    assert_close(found, small_stats)

    def loss(params, mix):
        return curved(run(params, small_stats, image, mix)[0])

    assert_slope(loss, (small_params, mix), tuple(grads))


def test_carry_over_in_two_steps_is_carry_over_in_one():
    """Pruning twice leaves the rows that pruning once leaves."""
    params, stats, _, _ = example(6)
    between = tuple(
        tuple(tuple(sorted({*a, *b})) for a, b in zip(*both, strict=True))
        for both in zip(PARTIAL, TERMINAL, strict=True)
    )
    for tree in (params, stats):
        twice = carry_over(cut(tree, between), LENGTH, NODES, between, TERMINAL)
        assert_close(twice, cut(tree, TERMINAL), rtol=0, atol=0)


def test_carry_over_leaves_what_the_smaller_network_has():
    params, stats, _, _ = example(7)
    for plan in (PARTIAL, TERMINAL):
        want = shapes(small(plan))
        for got, expected in zip((cut(params, plan), cut(stats, plan)), want, strict=True):
            assert jax.tree.map(lambda leaf: leaf.shape, got) == jax.tree.map(lambda leaf: leaf.shape, expected)


# --- Initial values, types, second derivatives -----------------------------------------------------------


def test_initial_values():
    """U(-1, 1) / sqrt(fan-in) for every kernel (PyTorch's default), moments 0 and 1, all float32."""
    params, stats = jax.jit(small(TERMINAL).init)(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves((params, stats))} == {jnp.dtype(jnp.float32)}
    reduction = params["cell_1"]
    fan_in = [(params["stem"], 18), (params["head_kernel"], 32)]
    fan_in += [(params["cell_0"][SEP3][name], 9) for name in ("depthwise", "depthwise_2")]
    fan_in += [(params["cell_0"][SEP3][name], 4) for name in ("pointwise", "pointwise_2")]
    fan_in += [(reduction["preprocess_1"]["pointwise"], 8), (reduction[SKIP]["even"], 8)]
    for kernel, n in fan_in:
        assert np.max(np.abs(kernel)) <= n**-0.5
        np.testing.assert_allclose(np.sqrt(3 * n) * np.std(kernel), 1, atol=0.5)
    assert np.all(params["stem_scale"] == 1)
    assert np.all(params["stem_shift"] == 0)
    for path, leaf in jax.tree.leaves_with_path(stats):
        assert np.all(leaf == (1 if path[-1].key == "var" else 0))


def test_bfloat16_is_close_and_leaves_float32(full):
    params, stats, image, mix = example(8, np.float32)
    arguments = cut(params, PARTIAL), cut(stats, PARTIAL), image, mix
    net = small(PARTIAL, jnp.bfloat16)
    for leaf in jax.tree.leaves(jax.eval_shape(derivatives(net.apply, True), *arguments)):
        assert leaf.dtype == jnp.float32
    logits, found = jax.jit(lambda *arguments: net.apply(*arguments, True))(*arguments)
    with jax.enable_x64(True):
        params, stats, image, mix = example(8)
        want_logits, want_found, *_ = full(params, stats, image, mix * alive_in(PARTIAL))
    for got, want in ((logits, want_logits), (found, cut(want_found, PARTIAL))):
        got, want = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (got, want))
        assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)


@pytest.mark.usefixtures("double")
def test_gradient_through_a_gradient_step():
    """What order=2 of the meta gradient needs: the slope of the loss after a step, by weights and mix.

    One reduction cell has both kinds of scan; it has operations of every kind, on some edges each.
    """
    plan = (((),) * EDGES, named((SKIP, MAX), (SKIP,), (AVG,), (), (SKIP, SEP3)))
    net = darts(
        shape=SHAPE, classes=CLASSES, mean=MEAN, std=STD, width=4, length=1, nodes=NODES, plan=plan, dtype=jnp.float64
    )  # fmt: skip
    params, stats, image, mix = example(9, net=net)

    def loss(trained):
        return curved(net.apply(trained[0], stats, image, trained[1], True)[0])

    def after_a_step(params, mix):
        trained = params, mix
        return loss(jax.tree.map(lambda x, g: x - 0.01 * g, trained, jax.grad(loss)(trained)))

    run = jax.jit(jax.value_and_grad(after_a_step, (0, 1)))
    assert_slope(lambda *trained: run(*trained)[0], (params, mix), run(params, mix)[1])


def assert_slope(loss, at, grads):
    """Central difference along a random direction = gradient times direction."""
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), at)
    step = 1e-6
    ahead, behind = (loss(*jax.tree.map(lambda x, d, s=s: x + s * d, at, direction)) for s in (step, -step))
    slope = sum(np.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-5)
