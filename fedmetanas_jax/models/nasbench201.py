"""The NAS-Bench-201 search space: supernet and discrete networks (Dong and Yang, ICLR 2020).

Stem, three stages of cells of one type with a residual block that halves the image between them, batch norm, global
average pool, linear head. A cell has one input and three nodes, each of which reads all before it; the last one is
its output. All edges stay, so a search chooses one of five operations for each of six edges.

The program is written out cell by cell. The edges that leave one source read the same image, so their convolutions
are one convolution with more outputs.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedmetanas_jax.core import Array, Graph, Plan, SearchSpace, Supernet, Tree
from fedmetanas_jax.models import batchnorm, layers
from fedmetanas_jax.models.plan import CellPlan
from fedmetanas_jax.models.sources import Source, sources, visit_all
from fedmetanas_jax.models.space import cell_types, head, head_weights, kernel, search_space, supernet

OPS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = tuple((i, j) for j in range(3) for i in range(j + 1))
GRAPH = Graph(("cell",), OPS, inputs=1, edges=EDGES, pairs=(), output=(2,))
CONVOLUTIONS = {"nor_conv_1x1": layers.pointwise, "nor_conv_3x3": layers.convolution}


def stacked(plan: CellPlan) -> dict[str, list[int]]:
    """{convolution: the edges whose weights and moments of it are stacked, in order}."""
    return {op: [e for e, ops in enumerate(plan) if OPS.index(op) in ops] for op in CONVOLUTIONS}


def cell(params: Tree, stats: Tree, x: Array, mix: Array, plan: CellPlan, train: bool) -> tuple[Array, Tree]:
    """x [C, H, W, N], mix [edges, ops] -> (the last node [C, H, W, N], moments of its batch norms)."""
    found, empty = sources(GRAPH, plan, lambda op, i: op in CONVOLUTIONS), [jnp.zeros_like(x)] * 3
    nodes, moments = visit_all(found, stacked(plan), _visit, [x], empty, params, stats, mix, train)
    return nodes[2], moments


def _visit(source: Source, x: Array, kernels: Tree, known: Tree | None, mix: Array) -> tuple[Array, Tree]:
    """As `sources.visit_all` has it."""
    parts: list[list[Array]] = [[] for _ in source.edges]
    moments = {}
    for op in source.shared:
        y = x if op == "skip_connect" else layers.settled(layers.avg_pool(x))
        for n in source.on[op]:
            parts[n].append(mix[n, OPS.index(op)].astype(y.dtype) * y)
    relu_x = lax.optimization_barrier(jax.nn.relu(x))
    for op in source.own:
        places, kernel = source.on[op], kernels[op]["kernel"]
        z = CONVOLUTIONS[op](relu_x, kernel.reshape(-1, *kernel.shape[2:])).reshape(*kernel.shape[:2], *x.shape[1:])
        given, weight = None if known is None else known[op]["norm"], mix[np.array(places), OPS.index(op)]
        y, found = jax.vmap(batchnorm.norm)(z, given, weight)
        moments[op] = {"norm": found}
        for n, part in zip(places, y, strict=True):
            parts[n].append(part)
    return jnp.stack([sum(terms[1:], terms[0]) for terms in parts]), moments


def halving(params: Tree, stats: Tree, x: Array, train: bool) -> tuple[Array, Tree]:
    """The residual block between stages: [C, H, W, N] -> ([2 C, H / 2, W / 2, N], moments of its batch norms)."""
    channels, height, width, batch = x.shape
    quarters = x.reshape(channels, height // 2, 2, width // 2, 2, batch)
    y, found = x, {}
    for name, stride in (("first", 2), ("second", 1)):
        y = layers.convolution(jax.nn.relu(y), params[name], stride)
        y, found[f"{name}_norm"] = batchnorm.norm(y, None if train else stats[f"{name}_norm"])
    return layers.pointwise(jnp.mean(quarters, (2, 4)), params["shortcut"]) + y, found


def cell_sizes(shape: tuple[int, int, int], width: int, length: int) -> tuple[tuple[int, int, int], ...]:
    """(C, H, W) of what each cell reads: twice as wide and half as large from stage to stage."""
    stages = (3 * i // length for i in range(length))
    return tuple((width << n, shape[0] >> n, shape[1] >> n) for n in stages)


def declared(shape, classes: int, width: int, types: list[int], plan: Plan) -> tuple[dict, dict]:
    """Weights and norms by path of the network whose cells are of these types, numbers of the plan."""
    length, sizes = len(types), cell_sizes(shape, width, len(types))
    weights = {("stem",): kernel((width, shape[2], 3, 3), shape[0] * shape[1])}
    norms: dict[tuple[str, ...], tuple[int, ...]] = {("stem_norm",): (width,)}
    for i, (width, height, columns) in enumerate(sizes):
        area = height * columns
        if i and i % (length // 3) == 0:
            block = f"halving_{i}"
            weights[block, "first"] = kernel((width, width // 2, 3, 3), area)
            weights[block, "second"] = kernel((width, width, 3, 3), area)
            weights[block, "shortcut"] = kernel((width, width // 2), area)
            norms |= {(block, "first_norm"): (width,), (block, "second_norm"): (width,)}
        for op, edges in stacked(plan[types[i]]).items():
            if edges:
                size = (width, width, 3, 3) if op == "nor_conv_3x3" else (width, width)
                weights[f"cell_{i}", op, "kernel"] = kernel(size, area, (len(edges),))
                norms[f"cell_{i}", op, "norm"] = (len(edges), width)
    return weights | head_weights(width, classes), norms | {("last_norm",): (width,)}


def nasbench201_space(
    *,
    shape: tuple[int, int, int],
    classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    width: int = 16,
    length: int = 15,
    parts: tuple[int, ...] = (),
    every_edge: bool = True,
    dtype=jnp.float32,
) -> SearchSpace:
    """The search space with C = width and length / 3 cells a stage, for images of `shape` (H, W, channels).

    Weights, moments, logits and the mix are float32; `dtype` is what the layers compute in. Batch norms have no
    scale and shift, in derived networks neither. parts: where the cells begin that have operations of their own
    (`space.cell_types`). every_edge: of this space every edge stays, always.

    ValueError where `length` is not a multiple of 3 or the image cannot be halved twice, or for `parts` that cannot be.
    """
    _check(shape, length)
    if not every_edge:
        raise ValueError("every_edge is False, but no edge of the NAS-Bench-201 space can be left out")
    names, types = cell_types(["cell"] * length, parts)

    def make(plan: Plan, sampled: bool = False) -> Supernet:  # nothing is left out of it
        def forward(params, stats, x, train, mix):
            x, moments = batchnorm.norm(layers.convolution(x, params["stem"]), None if train else stats["stem_norm"])
            found = {"stem_norm": moments}
            for i in range(length):
                block = f"halving_{i}"
                if block in params:
                    x, found[block] = halving(params[block], stats[block], x, train)
                name = f"cell_{i}"  # without a convolution it has no weights
                row, further = mix(i, x[None]) if callable(mix) else (mix[types[i]], {})
                x, moments = cell(params.get(name, {}), stats.get(name, {}), x, row, plan[types[i]], train)
                found |= ({name: moments} if moments else {}) | further
            x, found["last_norm"] = batchnorm.norm(x, None if train else stats["last_norm"])
            return head(jax.nn.relu(x), params), found

        return supernet(*declared(shape, classes, width, types, plan), forward, mean, std, dtype)

    def stacks(plan: Plan) -> dict:
        return {f"cell_{i}": stacked(plan[kind]) for i, kind in enumerate(types)}

    resized = partial(
        nasbench201_space, shape=shape, classes=classes, mean=mean, std=std, width=width, length=length, parts=parts,
        every_edge=every_edge, dtype=dtype,
    )  # fmt: skip
    graph, reads = GRAPH._replace(cell_types=names), cell_sizes(shape, width, length)
    return search_space(graph, types, make, stacks, resized, reads)


def _check(shape, length: int) -> None:
    if length < 3 or length % 3:
        raise ValueError(f"the NAS-Bench-201 network has three stages, so its cells are a multiple of 3, not {length}")
    if shape[0] % 4 or shape[1] % 4:
        raise ValueError(
            "the NAS-Bench-201 network halves its images twice, so height and width must be multiples of 4; "
            f"they are {shape[0]} x {shape[1]}"
        )
