"""The DARTS supernet: known counts, a naive second implementation, smaller programs for pruned searches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive_darts import naive

from fedmetanas_jax.models import layers
from fedmetanas_jax.models.darts import darts_space
from fedmetanas_jax.models.plan import OPS, reductions

LENGTH, NODES = 3, 2  # cells: normal, reduction, reduction
EDGES = 5
REDUCTIONS = (1, 2)
SHAPE, CLASSES, BATCH = (8, 8, 2), 3, 4
MEAN, STD = (0.5, 0.4), (0.25, 0.2)


def full_plan(nodes):
    return ((tuple(range(len(OPS))),) * (nodes * (nodes + 3) // 2),) * 2


def space(dtype=jnp.float64, **size):
    """Three cells of two nodes, on 8 x 8 images of two channels."""
    size = {"width": 4, "length": LENGTH, "nodes": NODES} | size
    return darts_space(shape=SHAPE, classes=CLASSES, mean=MEAN, std=STD, dtype=dtype, **size)


def small(plan=None, dtype=jnp.float64):
    return space(dtype).make(plan or full_plan(NODES))


def full_size(shape, classes, plan=None):
    """The network of methods section 12.1: C = 16, 8 cells, 4 nodes."""
    one = (0.5,) * shape[2]
    return darts_space(shape=shape, classes=classes, mean=one, std=one).make(plan or full_plan(4))


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
        kept = {(i, j): (OPS.index(op),) for j, node in enumerate(cell) for op, i in node}
        plan.append(tuple(kept.get((i, j), ()) for j in range(len(cell)) for i in range(j + 2)))
    return tuple(plan)


NONE, MAX, AVG, SKIP, SEP3, SEP5, DIL3, DIL5 = OPS
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
    skip = OPS.index(SKIP)
    task = {"shape": (2, 2, 1), "classes": 5, "mean": (0.5,), "std": (0.5,)}
    net = darts_space(**task, width=1, length=1, nodes=1).make((((), ()), ((skip,), ())))
    assert net.macs == 108 + 48 + 4 + 10


@pytest.mark.parametrize("shape", [(30, 32, 3), (32, 30, 3), (7, 7, 1)])
def test_image_that_cannot_be_halved(shape):
    with pytest.raises(ValueError, match=f"multiples of 4; they are {shape[0]} x {shape[1]}"):
        full_size(shape, 10)


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
    return params, stats, image, rng.uniform(0.1, 1, (2, EDGES, len(OPS))).astype(dtype)


@pytest.fixture(scope="module")
def full():
    """Compiled `derivatives` of the full small network in training mode."""
    return jax.jit(derivatives(small().apply, True))


def assert_close(got, want, rtol=1e-7, atol=1e-9):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol, atol, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def full_eval():
    """Compiled evaluation of the full small network: logits."""
    net = small()
    return jax.jit(lambda *arguments: net.apply(*arguments, False)[0])


@pytest.fixture(scope="module")
def reference():
    """Compiled: (train, params, stats, image, mix) -> `derivatives` of the naive network."""

    def apply(params, stats, image, mix, train):
        # Shared, because it rounds to float32 and another formula would round another way.
        x = layers.normalize(image, MEAN, STD, jnp.float64).transpose(3, 0, 1, 2)
        return naive(params, stats, x, mix, train, LENGTH, NODES)

    return jax.jit(lambda train, *arguments: derivatives(apply, train)(*arguments))


@pytest.mark.usefixtures("double")
def test_training_mode_and_gradients_equal_the_naive_network(full, reference):
    got = full(*example(0))
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(got))
    assert_close(got, reference(True, *example(0)))


@pytest.mark.usefixtures("double")
def test_evaluation_equals_the_naive_network(full_eval, reference):
    assert_close(full_eval(*example(1)), reference(False, *example(1))[0])


def test_evaluation_returns_the_given_statistics():
    params, stats, image, mix = example(0, np.float32)
    found = jax.eval_shape(lambda s: small(dtype=jnp.float32).apply(params, s, image, mix, False)[1], stats)
    assert jax.tree.structure(found) == jax.tree.structure(stats)


# --- Smaller programs -----------------------------------------------------------------------------------


def named(*cell):
    """Operations by name, one tuple per edge, as their numbers."""
    return tuple(tuple(OPS.index(op) for op in edge) for edge in cell)


# One operation on every live edge, others on some; a dead edge in both cell types.
PARTIAL = (
    named((DIL3, MAX), (DIL3,), (NONE, MAX, DIL3), (), (SKIP, DIL3)),
    named((), (SKIP, AVG), (SKIP,), (AVG, DIL3), (SEP3,)),
)
# What a search ends with: `none` and the identity among the choices, no edge between a reduction's nodes.
TERMINAL = plan_of(
    [[(NONE, 0), (SEP3, 1)], [(SKIP, 0), (DIL3, 2)]],
    [[(SKIP, 0), (MAX, 1)], [(NONE, 0), (SKIP, 1)]],
)


def cut(tree, plan):
    return space().carry_over(tree, full_plan(NODES), plan)


def alive_in(plan):
    """[2, edges, ops], 1 where alive."""
    return np.array([[[float(k in edge) for k in range(len(OPS))] for edge in cell] for cell in plan])


def assert_same_as_full(full, got, plan, arguments):
    """`got` are the derivatives of plan's network on the weights cut from those in `arguments`."""
    params, stats, image, mix = arguments
    alive = alive_in(plan)
    logits, found, grad_params, grad_mix = full(params, stats, image, mix * alive)
    assert_close(got, (logits, cut(found, plan), cut(grad_params, plan), grad_mix * alive))


def conditionals(jaxpr):
    """How many conditionals a program holds, those of its loops and functions included."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "cond"
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                count += conditionals(getattr(value, "jaxpr", value))
    return count


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
    alone = jax.make_jaxpr(one)(*jax.tree.map(lambda leaf: leaf[0], stacked))
    # What is dead is skipped for many clients as for one: no `cond` has become a `select`.
    assert conditionals(traced.jaxpr.jaxpr) == conditionals(alone.jaxpr) > 0
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
        twice = space().carry_over(cut(tree, between), between, TERMINAL)
        assert_close(twice, cut(tree, TERMINAL), rtol=0, atol=0)


def test_carry_over_leaves_what_the_smaller_network_has():
    params, stats, _, _ = example(7)
    for plan in (PARTIAL, TERMINAL):
        want = shapes(small(plan))
        for got, expected in zip((cut(params, plan), cut(stats, plan)), want, strict=True):
            assert jax.tree.map(lambda leaf: leaf.shape, got) == jax.tree.map(lambda leaf: leaf.shape, expected)


@pytest.mark.usefixtures("double")
def test_derived_network_is_the_supernet_with_its_operations_alone(full_eval):
    params, stats, image, _ = example(10)
    model, small_params, small_stats = space().derive(TERMINAL), cut(params, TERMINAL), cut(stats, TERMINAL)
    logits, found = jax.jit(lambda *given: model.apply(*given, False))(small_params, small_stats, image)
    assert_close(logits, full_eval(params, stats, image, alive_in(TERMINAL).astype(float)))
    assert_close(found, small_stats, rtol=0, atol=0)
    assert model.macs == small(TERMINAL).macs < small().macs
    assert set(model.head) == {"head_kernel", "head_bias"} < set(params)


def test_derived_network_may_have_another_size():
    got, want = space().resized(width=6, length=4).derive(TERMINAL), space(width=6, length=4).make(TERMINAL)
    assert (shapes(got), got.macs) == (shapes(want), want.macs)
    with pytest.raises(ValueError, match="multiples of 4; they are 2 x 2"):
        darts_space(shape=(2, 2, 1), classes=2, mean=MEAN, std=STD, length=1).resized(length=8)


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
    arguments = cut(params, TERMINAL), cut(stats, TERMINAL), image, mix
    net = small(TERMINAL, jnp.bfloat16)
    for leaf in jax.tree.leaves(jax.eval_shape(derivatives(net.apply, True), *arguments)):
        assert leaf.dtype == jnp.float32
    logits, found = jax.jit(lambda *arguments: net.apply(*arguments, True))(*arguments)
    with jax.enable_x64(True):
        params, stats, image, mix = example(8)
        want_logits, want_found, *_ = full(params, stats, image, mix * alive_in(TERMINAL))
    for got, want in ((logits, want_logits), (found, cut(want_found, TERMINAL))):
        got, want = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (got, want))
        assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)


@pytest.mark.usefixtures("double")
def test_gradient_through_a_gradient_step():
    """What order=2 of the meta gradient needs: the slope of the loss after a step, by weights and mix.

    One reduction cell has both kinds of scan; with operations on some edges and on all.
    """
    plan = (((),) * EDGES, named((MAX,), (DIL3,), (), (), (SKIP, MAX)))
    net = space(length=1).make(plan)
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
