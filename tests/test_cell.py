"""The order in which a cell is computed, and that every way of computing it gives the same numbers."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmetanas_jax.models import batchnorm
from fedmetanas_jax.models.darts import darts_space, suited
from fedmetanas_jax.models.plan import NONE, OPS, edge_ends, norm_names, op_shapes, stack_stride, stacked
from fedmetanas_jax.models.scan import scanned_cell
from fedmetanas_jax.models.side_by_side import unrolled_cell
from fedmetanas_jax.models.skipping import skipping_cell
from fedmetanas_jax.models.sources import groups_of
from fedmetanas_jax.models.stages import at_slots, stages

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
    (stage,) = stages((ALL,) * 14, reduce=False)
    assert stage.start.tolist() == [0, 1, 2, 3, 4]
    slots = [[0, 2, 5, 9], [1, 3, 6, 10], [4, 7, 11, -1], [8, 12, -1, -1], [13, -1, -1, -1]]
    assert stage.slot.tolist() == slots
    assert stage.end[0].tolist() == [2, 3, 4, 5]  # rows after those of the two inputs
    assert [op.number for op in stage.shared] == [1, 2, 3]


def test_stages_of_a_reduction_cell_by_hand():
    inputs, between = stages((ALL,) * 5, reduce=True)
    assert (inputs.stride, inputs.slot.tolist()) == (2, [[0, 2], [1, 3]])
    assert (between.stride, between.slot.tolist()) == (1, [[4]])
    assert SKIP in [op.number for op in inputs.own]  # halving the image takes weights
    assert SKIP in [op.number for op in between.shared]
    assert between.start.tolist() == [0]  # node 0


@pytest.mark.parametrize("reduce", [False, True])
def test_every_live_operation_has_one_place(reduce):
    """In random plans; and no edge is read before the edges that complete its source."""
    rng = np.random.default_rng(0)
    ends = edge_ends(3)
    for _ in range(50):
        plan = tuple(tuple(k for k in ALL if rng.random() < 0.15) for _ in ends)
        placed_ops, done = [], []
        for stage in stages(plan, reduce):
            inputs = stage.start + (2 if reduce and stage.stride == 1 else 0)
            for s, source in enumerate(inputs.tolist()):
                late = [e for e, (_, j) in enumerate(ends) if j == source - 2 and {*plan[e]} - {NONE}]
                assert {*late} <= {*done}
                for op in stage.shared:
                    reached = [stage.out[s, j] for j in range(3) if stage.reaches[s, j, op.number]]
                    placed_ops += [(e, op.number) for e in reached]
                for op in stage.own:
                    placed_ops += [(e, op.number) for e in stage.slot[s][stage.alive[s, :, op.number]]]
                done += [e for e, (i, _) in enumerate(ends) if i == source]
        assert sorted(placed_ops) == [(e, k) for e in range(len(ends)) for k in plan[e] if k != NONE]


def test_weights_at_slots_and_their_gradient():
    x = jnp.arange(1.0, 4)
    rows = ((2, 0), (-1, -1), (1, -1))
    y, pull = jax.vjp(lambda x: at_slots(x, rows), x)
    np.testing.assert_array_equal(y[np.array(rows) >= 0], [3, 1, 2])
    np.testing.assert_array_equal(pull(jnp.array([[10.0, 20], [30, 40], [50, 60]]))[0], [20, 50, 10])
    assert pull(y)[0].shape == x.shape


def test_groups_of_rows_and_their_gradient():
    x = jnp.arange(1.0, 4)
    y, pull = jax.vjp(lambda x: groups_of(x, ((2, 0), (1,))), x)
    assert [part.tolist() for part in y] == [[3, 1], [2]]
    np.testing.assert_array_equal(pull((jnp.array([10.0, 20]), jnp.array([30.0])))[0], [20, 30, 10])


# --- Ways to compute a cell -------------------------------------------------------------------------------

WIDTH, NODES = 2, 3
EDGES = len(edge_ends(NODES))
# `sep_conv_3x3` on some edges that carry weights, `max_pool_3x3` on some that leave a source, an edge without any.
SOME = ((SEP3, MAX), (DIL3,), (SKIP, SEP3, DIL3), (DIL3, MAX), (DIL3,), (SKIP,), (MAX,), (DIL3,), ())


def derivatives(plan, reduce, cell):
    """(inputs, weights, mix) -> nodes, moments and gradients of a curved loss."""

    def loss(inputs, weights, mix):
        nodes, moments = cell(inputs, weights, {}, mix, plan, reduce, True)
        return jnp.sum(jnp.sin(nodes) * jnp.cos(jnp.arange(nodes.size, dtype=nodes.dtype)).reshape(nodes.shape)), (
            nodes,
            moments,
        )

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


one_by_one = partial(unrolled_cell, apart=True)


def example(plan, reduce):
    rng = np.random.default_rng(0)
    weights = {}
    for op, edges in stacked(plan, reduce).items():
        named = op_shapes(op, WIDTH, stack_stride(op)) if edges else {}
        weights[op] = {name: rng.normal(size=(len(edges), *shape)) for name, shape in named.items()}
    return rng.normal(size=(2, WIDTH, 4, 4, 3)), weights, rng.uniform(0.1, 1, (EDGES, len(OPS)))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("plan", "reduce"), [(SOME, False), (((SEP3, MAX, SKIP),) * EDGES, True)], ids=["some", "all"])
def test_all_ways_give_the_same_numbers(plan, reduce):
    arguments = example(plan, reduce)
    want = derivatives(plan, reduce, scanned_cell)(*arguments)
    for cell in (unrolled_cell, one_by_one, skipping_cell):
        got = derivatives(plan, reduce, cell)(*arguments)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def example_stats(reduce):
    rng, stats = np.random.default_rng(1), {}
    for op, edges in stacked(SOME, reduce).items():
        shape = (len(edges), WIDTH)
        names = norm_names(op, stack_stride(op)) if edges else ()
        stats[op] = {name: {"mean": rng.normal(size=shape), "var": rng.uniform(1, 2, shape)} for name in names}
    return {op: named for op, named in stats.items() if named}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("reduce", [False, True])
def test_all_ways_evaluate_alike(reduce):
    """And have the same gradients then, of the moments that are given, too."""
    (inputs, weights, mix), stats = example(SOME, reduce), example_stats(reduce)
    alive = np.array([[k in ops for k in ALL] for ops in SOME])

    def found(cell):
        def total(*given):
            nodes = cell(*given, SOME, reduce, False)[0]
            return jnp.sum(jnp.sin(nodes)), nodes

        (*grads, g_mix), nodes = jax.jit(jax.grad(total, (0, 1, 2, 3), has_aux=True))(inputs, weights, stats, mix)
        return nodes, grads, jnp.where(alive, g_mix, 0)

    want = found(scanned_cell)
    for cell in (unrolled_cell, one_by_one, skipping_cell):
        for a, b in zip(*map(jax.tree.leaves, (found(cell), want)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("reduce", [False, True])
def test_a_value_says_by_whose_moments_a_cell_goes(reduce):
    (inputs, weights, mix), stats = example(SOME, reduce), example_stats(reduce)

    def run(cell, stats, train):
        return jax.jit(lambda *given: cell(*given, SOME, reduce, train))(inputs, weights, stats, mix)

    evaluated, (trained, moments) = run(scanned_cell, stats, False)[0], run(scanned_cell, stats, True)
    assert not np.allclose(trained, evaluated)
    for cell in (scanned_cell, skipping_cell, unrolled_cell, one_by_one):

        @jax.jit
        def either(own, cell=cell):
            return cell(inputs, weights, batchnorm.either(stats, own), mix, SOME, reduce, False)

        np.testing.assert_allclose(either(False)[0], evaluated, rtol=1e-9, atol=1e-11)
        nodes, found = either(True)
        np.testing.assert_allclose(nodes, trained, rtol=1e-9, atol=1e-11)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11), found, moments)


@pytest.mark.usefixtures("double")
def test_what_the_mix_makes_0_is_left_out_and_the_rest_stays():
    """One program for what is alive in turn: nothing, an edge without operations, and several on each."""
    plan, reduce = ((SEP3, MAX, SKIP),) * EDGES, True
    inputs, weights, mix = example(plan, reduce)
    dense, sparse = (derivatives(plan, reduce, cell) for cell in (scanned_cell, skipping_cell))
    rng = np.random.default_rng(2)
    for share in (0.0, 0.2, 0.6):
        alive = rng.random(mix.shape) < share
        given = inputs, weights, mix * alive
        (want, (nodes, found)), (got, (nodes_here, found_here)) = dense(*given), sparse(*given)
        np.testing.assert_allclose(nodes_here, nodes, rtol=1e-9, atol=1e-11)
        for a, b in zip(*map(jax.tree.leaves, (got[:2], want[:2])), strict=True):  # of inputs and weights
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(got[2], np.where(alive, want[2], 0), rtol=1e-9, atol=1e-11)
        for op, edges in stacked(plan, reduce).items():
            here = alive[np.array(edges, int), OPS.index(op)]
            for a, b in zip(*map(jax.tree.leaves, (found_here.get(op, {}), found.get(op, {}))), strict=True):
                if op != "max_pool_3x3":  # whose moments are its source's, computed if any edge of that is alive
                    np.testing.assert_allclose(a, np.where(here[:, None], b, 0), rtol=1e-9, atol=1e-11)
                np.testing.assert_allclose(a[here], b[here], rtol=1e-9, atol=1e-11)


def loops_around(program: str, name: str) -> set[int]:
    """In how many loops the instructions of a compiled program stand whose names of origin contain this one."""
    bodies = re.findall(r"^(ENTRY )?%([\w.-]+) [^\n]*\{\n(.*?)^\}", program, re.M | re.S)
    (entry,) = (place for first, place, _ in bodies if first)
    text, found, left = {place: body for _, place, body in bodies}, set(), [(entry, 0)]
    while left:
        place, depth = left.pop()
        for line in text[place].splitlines():
            if "op_name=" in line and name in line.split("op_name=")[1]:
                found.add(depth)
            inside = re.findall(r"(body|calls|to_apply|true_computation|false_computation)=%([\w.-]+)", line)
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                inside += [("calls", branch.strip(" %")) for branch in branches.split(",")]
            left += [(other, depth + (how == "body")) for how, other in inside]
    return found


def test_nothing_of_what_may_be_left_out_is_computed_before_its_loop():
    """Whatever in a loop does not depend on its count XLA would take out of it, for all sources and at any count."""
    plan = ((SEP3, MAX, DIL3),) * EDGES
    arguments = example(plan, False)
    program = derivatives(plan, False, skipping_cell).lower(*arguments).compile().as_text()
    for name in ("(depthwise", "(_max_pool", "(_weighted_norm"):
        assert loops_around(program, name) == {2}, name  # over the sources, and over what is alive of one


def test_edges_of_one_source_share_their_pool():
    """The moments of its batch norm, one row an edge, agree to the bit."""
    plan = ((MAX,),) * EDGES
    inputs = jnp.float32(example(plan, False)[0])
    mix = jnp.ones((EDGES, len(OPS)))
    found = jax.jit(lambda inputs: scanned_cell(inputs, {}, {}, mix, plan, False, True)[1])(inputs)
    source = np.array([i for i, _ in edge_ends(NODES)])
    for moments in map(np.asarray, found["max_pool_3x3"]["norm"].values()):
        assert moments.shape == (EDGES, WIDTH)
        assert {(i, row.tobytes()) for i, row in zip(source, moments, strict=True)} == {
            (i, moments[e].tobytes()) for e, i in enumerate(source) if i not in source[:e]
        }
        assert len(np.unique(moments, axis=0)) == len({*source})


def test_what_suits_a_backend():
    """Small arrays for a CPU, without a loop once one operation an edge is left; large ones elsewhere."""
    several, one = ((SEP3, MAX), (SKIP,)), ((SEP3,), ())
    assert (suited("cpu", several), suited("cpu", one)) == ("scan", "one_by_one")
    assert {suited(where, plan) for where in ("gpu", "tpu") for plan in (several, one)} == {"side_by_side"}


# --- Other platforms ----------------------------------------------------------------------------------------


def conditionals(platform, way, plan=((ALL,) * 5,) * 2, dtype=jnp.float32):
    """Types of what conditionals choose in the gradient of a tiny network, lowered for a platform not at hand.

    The choice by platform leaves a conditional of one branch behind, and one over the number of the platform,
    a constant; XLA removes both.
    """
    task = {"shape": (4, 4, 1), "classes": 2, "mean": (0.5,), "std": (0.5,)}
    net = darts_space(**task, width=2, length=1, nodes=2, way=way, dtype=dtype).make(plan)
    params, stats = jax.eval_shape(net.init, jax.random.key(0))

    def loss(trained, stats, image):
        return jnp.sum(net.apply(trained[0], stats, image, trained[1], True)[0])

    image = jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.uint8)
    mix = jax.ShapeDtypeStruct((2, 5, len(OPS)), jnp.float32)
    text = jax.export.export(jax.jit(jax.grad(loss)), platforms=[platform])((params, mix), stats, image).mlir_module()
    assert "stablehlo.dot_general" in text
    cases = re.findall(r'"stablehlo\.case"\([^)]*\) \(\{(.*?)\}\) : \(tensor<i32>\) -> (\S+)', text, re.DOTALL)
    return {kind for branches, kind in cases if "}, {" in branches} - {"tensor<i32>"}


FULL = ((ALL,) * 5,) * 2
PRUNED = (((SEP3,), (), (DIL3, MAX), (SKIP,), (SEP3,)),) * 2


@pytest.mark.parametrize("plan", [FULL, PRUNED], ids=["full", "pruned"])
def test_gradient_lowers_for_cuda_without_conditionals(plan):
    """A conditional makes a GPU wait for the host: what a CPU needs to keep arrays apart must not reach it."""
    assert not conditionals("cuda", suited("gpu", plan[0]), plan, jnp.bfloat16)


def test_conditionals_keep_arrays_apart_on_a_cpu():
    assert any(kind.endswith("xf32>") for kind in conditionals("cpu", "side_by_side"))
