"""The order in which a cell is computed, and that every way of computing it gives the same numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmetanas_jax.models import operations
from fedmetanas_jax.models.cell import How, cell, suited
from fedmetanas_jax.models.darts import darts
from fedmetanas_jax.models.layout import placed
from fedmetanas_jax.models.schedule import stages, tabulate
from fedmetanas_jax.topology import NONE, OPS, edge_ends

ALL = tuple(range(len(OPS)))
MAX, SKIP, SEP3, DIL3 = (OPS.index(op) for op in ("max_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3"))


@pytest.fixture
def double():
    """float64 for the time of one test."""
    with jax.enable_x64(True):
        yield


# --- Stages ---------------------------------------------------------------------------------------------


def test_stage_of_a_normal_cell_by_hand():
    """Edges 0, 1 end in node 0; 2, 3, 4 in node 1; 5 .. 8 in node 2; 9 .. 13 in node 3."""
    (stage,) = stages((ALL,) * 14, 4, reduce=False)
    assert stage.sources == (0, 1, 2, 3, 4)
    assert stage.slots == ((0, 2, 5, 9), (1, 3, 6, 10), (4, 7, 11, -1), (8, 12, -1, -1), (13, -1, -1, -1))
    assert tabulate(stage).end[0].tolist() == [2, 3, 4, 5]  # rows after those of the two inputs
    assert [op.number for op in stage.shared] == [1, 2, 3]


def test_stages_of_a_reduction_cell_by_hand():
    inputs, between = stages((ALL,) * 5, 2, reduce=True)
    assert (inputs.stride, inputs.slots) == (2, ((0, 2), (1, 3)))
    assert (between.stride, between.slots) == (1, ((4,),))
    assert SKIP in [op.number for op in inputs.own]  # halving the image takes weights
    assert SKIP in [op.number for op in between.shared]
    assert tabulate(between).start.tolist() == [0]  # node 0


@pytest.mark.parametrize("reduce", [False, True])
def test_every_live_operation_has_one_place(reduce):
    """In random plans; and no edge is read before the edges that complete its source."""
    rng = np.random.default_rng(0)
    ends = edge_ends(3)
    for _ in range(50):
        keep = tuple(tuple(k for k in ALL if rng.random() < 0.15) for _ in ends)
        placed_ops, done = [], []
        for stage in stages(keep, 3, reduce):
            table = tabulate(stage)
            for s, source in enumerate(stage.sources):
                late = [e for e, (_, j) in enumerate(ends) if j == source - 2 and {*keep[e]} - {NONE}]
                assert {*late} <= {*done}
                for op in stage.shared:
                    reached = [table.out[s, j] for j in range(3) if table.reaches[s, j, op.number]]
                    placed_ops += [(e, op.number) for e in reached]
                for op in stage.own:
                    placed_ops += [(e, op.number) for e in table.slot[s][table.alive[s, :, op.number]]]
                done += [e for e, (i, _) in enumerate(ends) if i == source]
        assert sorted(placed_ops) == [(e, k) for e in range(len(ends)) for k in keep[e] if k != NONE]


def test_placed_and_its_gradient():
    x = jnp.arange(1.0, 4)
    rows = ((2, 0), (-1, -1), (1, -1))
    y, pull = jax.vjp(lambda x: placed(x, rows), x)
    np.testing.assert_array_equal(y[np.array(rows) >= 0], [3, 1, 2])
    np.testing.assert_array_equal(pull(jnp.array([[10.0, 20], [30, 40], [50, 60]]))[0], [20, 50, 10])
    assert pull(y)[0].shape == x.shape


# --- Ways to compute a cell -------------------------------------------------------------------------------

WIDTH, NODES = 2, 3
EDGES = len(edge_ends(NODES))
# `sep_conv_3x3` on some edges that carry weights, `max_pool_3x3` on some that leave a source, an edge without any.
SOME = ((SEP3, MAX), (DIL3,), (SKIP, SEP3, DIL3), (DIL3, MAX), (DIL3,), (SKIP,), (MAX,), (DIL3,), ())


def derivatives(keep, reduce, how):
    """(inputs, weights, mix) -> nodes, moments and gradients of a curved loss."""

    def loss(inputs, weights, mix):
        nodes, moments = cell(inputs, weights, {}, mix, keep, NODES, reduce, True, how)
        return jnp.sum(jnp.sin(nodes) * jnp.cos(jnp.arange(nodes.size, dtype=nodes.dtype)).reshape(nodes.shape)), (
            nodes,
            moments,
        )

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


def example(keep, reduce):
    rng = np.random.default_rng(0)
    weights = {}
    for k, op in enumerate(OPS):
        edges, stride = operations.stack(keep, k, NODES, reduce)
        named = operations.op_shapes(op, WIDTH, stride) if edges else {}
        weights[op] = {name: rng.normal(size=(len(edges), *shape)) for name, shape in named.items()}
    return rng.normal(size=(2, WIDTH, 4, 4, 3)), weights, rng.uniform(0.1, 1, (EDGES, len(OPS)))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "how", [How(remat=False), How(True, True), How(False, True)], ids=["stored", "batched-remat", "batched"]
)
@pytest.mark.parametrize(("keep", "reduce"), [(SOME, False), (((SEP3, MAX, SKIP),) * EDGES, True)], ids=["some", "all"])
def test_every_way_gives_the_same_numbers(keep, reduce, how):
    arguments = example(keep, reduce)
    got, want = (derivatives(keep, reduce, way)(*arguments) for way in (how, How()))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("reduce", [False, True])
def test_every_way_evaluates_alike(reduce):
    inputs, weights, mix = example(SOME, reduce)
    rng, stats = np.random.default_rng(1), {}
    for k, op in enumerate(OPS):
        edges, stride = operations.stack(SOME, k, NODES, reduce)
        shape = (len(edges), WIDTH)
        stats[op] = {
            name: (rng.normal(size=shape), rng.uniform(1, 2, shape)) for name in operations.norm_names(op, stride)
        }

    def nodes(how):
        run = jax.jit(lambda *given: cell(*given, SOME, NODES, reduce, False, how)[0])
        return run(inputs, weights, stats, mix)

    np.testing.assert_allclose(nodes(How(False, True)), nodes(How()), rtol=1e-9, atol=1e-11)


def test_edges_of_one_source_share_their_pool():
    """The moments of its batch norm, one row an edge, agree to the bit."""
    keep = ((MAX,),) * EDGES
    inputs = jnp.float32(example(keep, False)[0])
    mix = jnp.ones((EDGES, len(OPS)))
    found = jax.jit(lambda inputs: cell(inputs, {}, {}, mix, keep, NODES, False, True, How())[1])(inputs)
    source = np.array([i for i, _ in edge_ends(NODES)])
    for moments in map(np.asarray, found["max_pool_3x3"]["norm"]):
        assert moments.shape == (EDGES, WIDTH)
        assert {(i, row.tobytes()) for i, row in zip(source, moments, strict=True)} == {
            (i, moments[e].tobytes()) for e, i in enumerate(source) if i not in source[:e]
        }
        assert len(np.unique(moments, axis=0)) == len({*source})


def test_what_suits_a_backend():
    """Small arrays for a CPU until one operation an edge is left; large ones elsewhere."""
    several, one = ((SEP3, MAX), (SKIP,)), ((SEP3,), ())
    assert suited("cpu", several) == How(remat=True, batched=False)
    assert {suited("cpu", one), suited("gpu", several), suited("tpu", one)} == {How(remat=False, batched=True)}


# --- Other platforms ----------------------------------------------------------------------------------------


def conditionals(platform, how, plan=None, dtype=jnp.float32):
    """Types of what conditionals choose in the gradient of a tiny network, lowered for a platform not at hand.

    The choice by platform leaves a conditional of one branch behind, and one over the number of the platform,
    a constant; XLA removes both.
    """
    task = {"shape": (4, 4, 1), "classes": 2, "mean": (0.5,), "std": (0.5,)}
    net = darts(**task, width=2, length=1, nodes=2, plan=plan, how=how, dtype=dtype)
    params, stats = jax.eval_shape(net.init, jax.random.key(0))

    def loss(trained, stats, image):
        return jnp.sum(net.apply(trained[0], stats, image, trained[1], True)[0])

    image = jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.uint8)
    mix = jax.ShapeDtypeStruct((2, 5, len(OPS)), jnp.float32)
    text = jax.export.export(jax.jit(jax.grad(loss)), platforms=[platform])((params, mix), stats, image).mlir_module()
    assert "stablehlo.dot_general" in text
    cases = re.findall(r'"stablehlo\.case"\([^)]*\) \(\{(.*?)\}\) : \(tensor<i32>\) -> (\S+)', text, re.DOTALL)
    return {kind for branches, kind in cases if "}, {" in branches} - {"tensor<i32>"}


@pytest.mark.parametrize("plan", [None, (((SEP3,), (), (DIL3, MAX), (SKIP,), (SEP3,)),) * 2], ids=["full", "pruned"])
def test_gradient_lowers_for_cuda_without_conditionals(plan):
    """A conditional makes a GPU wait for the host: what a CPU needs to keep arrays apart must not reach it."""
    assert not conditionals("cuda", suited("gpu", plan or ()), plan, jnp.bfloat16)


def test_conditionals_keep_arrays_apart_on_a_cpu():
    assert any(kind.endswith("xf32>") for kind in conditionals("cpu", How(batched=True)))
