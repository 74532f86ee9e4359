"""The DARTS search space: supernet and discrete networks (Liu, Simonyan, Yang: DARTS, ICLR 2019).

Stem, a stack of normal and reduction cells, global average pool, linear head. Every candidate operation's
weight is an argument (`mix`), so the network knows nothing of softmax, Gumbel noise or masks. A plan says
statically which operations exist at all: pruning enters a smaller program here.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from fedmetanas_jax.core import Array, Plan, SearchSpace, Supernet, Tree
from fedmetanas_jax.models import batchnorm, layers, operations
from fedmetanas_jax.models.plan import (
    OPS,
    TYPES,
    CellPlan,
    cell_sizes,
    darts_graph,
    norm_names,
    num_nodes,
    op_shapes,
    reductions,
    stack_stride,
    stacked,
)
from fedmetanas_jax.models.scan import scanned_cell
from fedmetanas_jax.models.side_by_side import unrolled_cell
from fedmetanas_jax.models.skipping import skipping_cell
from fedmetanas_jax.models.space import cell_types, head, head_weights, kernel, search_space, supernet
from fedmetanas_jax.models.weights import Weight

STEM_MULTIPLIER = 3
Way = Literal["scan", "side_by_side", "one_by_one"]


def suited(backend: str, plan: CellPlan) -> Way:
    """The way for a backend ("cpu", "gpu", "tpu") and the live operations of a cell (docs/formulations.md).

    A CPU is fastest on small arrays one after another: in a loop over the edges until each has at most one operation
    left, then written out. An accelerator wants few large kernels and no conditionals.
    """
    if backend != "cpu":
        return "side_by_side"
    return "scan" if any(len(ops) > 1 for ops in plan) else "one_by_one"


def declared(shape, classes: int, width: int, types: list[int], plan: Plan) -> tuple[dict, dict]:
    """Weights and norms by path of the network whose cells are of these types, numbers of the plan."""
    sizes, stem = cell_sizes(shape, width, len(types)), STEM_MULTIPLIER * width
    weights = {("stem",): kernel((stem, shape[2], 3, 3), shape[0] * shape[1])}
    weights |= {("stem_scale",): Weight((stem,), start=1.0), ("stem_shift",): Weight((stem,), start=0.0)}
    norms: dict[tuple[str, ...], tuple[int, ...]] = {("stem_norm",): (stem,)}
    before_last, last, after_reduction = stem, stem, False
    for i, (width, height, columns) in enumerate(sizes):
        cell, reduce, area = f"cell_{i}", i in reductions(len(types)), height * columns
        # The older input still has the size from before the last reduction; its 1x1 runs at half of it.
        halving = {name: (width // 2, before_last) for name in ("even", "odd")}
        first = halving if after_reduction else {"pointwise": (width, before_last)}
        for name, kernels in (("preprocess_0", first), ("preprocess_1", {"pointwise": (width, last)})):
            weights |= {(cell, name, weight): kernel(size, area) for weight, size in kernels.items()}
            norms[cell, name, "norm"] = (width,)
        area //= 4 if reduce else 1
        stacks = stacked(plan[types[i]], reduce)
        for op, rows in ((op, len(edges)) for op, edges in stacks.items() if edges):
            stride = stack_stride(op)
            for name, size in op_shapes(op, width, stride).items():
                weights[cell, op, name] = kernel(size, area, (rows,))
            norms |= {(cell, op, name): (rows, width) for name in norm_names(op, stride)}
        before_last, last, after_reduction = last, num_nodes(plan[0]) * width, reduce
    return weights | head_weights(last, classes), norms


def preprocess(params: Tree, stats: Tree, x: Array, train: bool) -> tuple[Array, Tree]:
    """Brings a cell input to C channels and the cell's size: ReLU, 1x1 (or FactorizedReduce), batch norm."""
    x = jax.nn.relu(x)
    if "even" in params:
        x = operations.factorized_reduce(x, params["even"], params["odd"])
    else:
        x = layers.pointwise(x, params["pointwise"])
    y, moments = batchnorm.norm(x, None if train else stats["norm"])
    return y, {"norm": moments}


def darts_space(
    *,
    shape: tuple[int, int, int],
    classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    width: int = 16,
    length: int = 8,
    nodes: int = 4,
    every_edge: bool = False,
    parts: tuple[int, ...] = (),
    dtype=jnp.float32,
    way: Way | None = None,
    in_turn: bool = False,
) -> SearchSpace:
    """The search space (C = width, L = length) for images of `shape` (H, W, channels).

    Weights, moments, logits and the mix are float32; `dtype` is what the layers compute in. `way` changes time and
    memory alone; None: what suits JAX's default backend and the plan. Batch norms have no scale and shift, in
    derived networks neither, so weights found by a search fit them.

    in_turn: whether programs compute one client after another, so that what the mix makes 0 can be left out.

    every_edge: nodes sum all their inputs (`plan.darts_graph`). parts: where the cells begin that have operations of
    their own (`plan.cell_types`).

    ValueError where the image cannot be halved as often as there are reduction cells, or for `parts` that cannot be.
    """
    _check_halvings(shape, length)
    names, types = cell_types([TYPES[i in reductions(length)] for i in range(length)], parts)
    if not parts:  # a network of one cell has both types all the same
        names, types = TYPES, [int(i in reductions(length)) for i in range(length)]

    def make(plan: Plan, sampled: bool = False) -> Supernet:
        ways = [way or suited(jax.default_backend(), part) for part in plan]

        def forward(params, stats, x, train, mix):
            x, moments = batchnorm.norm(layers.convolution(x, params["stem"]), None if train else stats["stem_norm"])
            found = {"stem_norm": moments}
            scale, shift = (params[name].astype(x.dtype)[:, None, None, None] for name in ("stem_scale", "stem_shift"))
            s0 = s1 = scale * x + shift
            for i in range(length):
                reduce, name, kind = i in reductions(length), f"cell_{i}", types[i]
                compute = {
                    "scan": skipping_cell if sampled and in_turn else scanned_cell,
                    "side_by_side": unrolled_cell,
                    "one_by_one": partial(unrolled_cell, apart=True),
                }[ways[kind]]
                block, given = params[name], stats[name]
                first, moments_0 = preprocess(block["preprocess_0"], given["preprocess_0"], s0, train)
                second, moments_1 = preprocess(block["preprocess_1"], given["preprocess_1"], s1, train)
                own = [{op: tree[op] for op in OPS if op in tree} for tree in (block, given)]
                inputs = jnp.stack([first, second])
                row, further = mix(i, inputs) if callable(mix) else (mix[kind], {})
                out, moments = compute(inputs, *own, row, plan[kind], reduce, train)
                found |= {name: {"preprocess_0": moments_0, "preprocess_1": moments_1, **moments}, **further}
                s0, s1 = s1, out.reshape(-1, *out.shape[2:])
            return head(s1, params), found

        return supernet(*declared(shape, classes, width, types, plan), forward, mean, std, dtype)

    def stacks(plan: Plan) -> dict:
        return {f"cell_{i}": stacked(plan[kind], i in reductions(length)) for i, kind in enumerate(types)}

    resized = partial(
        darts_space, shape=shape, classes=classes, mean=mean, std=std, width=width, length=length, nodes=nodes,
        every_edge=every_edge, parts=parts, dtype=dtype, way=way, in_turn=in_turn,
    )  # fmt: skip
    skips = in_turn and (way or suited(jax.default_backend(), [range(len(OPS))])) == "scan"
    graph, reads = darts_graph(nodes, names, every_edge), cell_sizes(shape, width, length)
    return search_space(graph, types, make, stacks, resized, reads, skips)


def _check_halvings(shape, length: int) -> None:
    halvings = len(reductions(length))
    if shape[0] % 2**halvings or shape[1] % 2**halvings:
        raise ValueError(
            f"the DARTS network halves its images {halvings} times with {length} cells, so height and width must be "
            f"multiples of {2**halvings}; they are {shape[0]} x {shape[1]}"
        )
