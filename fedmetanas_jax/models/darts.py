"""The DARTS supernet and the discrete networks inside it (Liu, Simonyan, Yang: DARTS, ICLR 2019).

Stem, a stack of normal and reduction cells, global average pool, linear head. Every candidate operation's
weight is an argument (`mix`), so the network knows nothing of softmax, Gumbel noise or masks. `keep` says
statically which operations exist at all: pruning enters a smaller program here.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fedmetanas_jax.core import Array, SearchSpace, Supernet
from fedmetanas_jax.models import batchnorm, layers, operations
from fedmetanas_jax.models.cell import How, cell, suited
from fedmetanas_jax.models.plan import STEM_MULTIPLIER, Plan, carry_over, full_plan, multiply_adds, reductions
from fedmetanas_jax.topology import OPS, edge_ends


def declared(key: Array, shape: tuple[int, ...]) -> Array:
    """Stands where flax wants an initial value; `initial` makes the real ones."""
    return jnp.zeros(shape)


class Norm(nn.Module):
    """Batch norm without scale and shift; in training the batch's moments replace `batch_stats`."""

    shape: tuple[int, ...]  # [..., C]: moments of one or of several norms

    def setup(self):
        """Declares the statistics: mean 0, variance 1."""
        self.mean = self.variable("batch_stats", "mean", jnp.zeros, self.shape)
        self.variance = self.variable("batch_stats", "var", jnp.ones, self.shape)

    @property
    def moments(self) -> tuple[Array, Array]:
        """(mean, variance) as they are."""
        return self.mean.value, self.variance.value

    def put(self, moments: tuple[Array, Array]) -> None:
        """Replaces them, unless the module is only being declared."""
        if not self.is_initializing():
            self.mean.value, self.variance.value = moments

    def __call__(self, x: Array, train: bool) -> Array:
        if not train:
            return batchnorm.frozen_norm(x, *self.moments)
        y, mean, variance = batchnorm.batch_norm(x)
        self.put((mean, variance))
        return y


class Preprocess(nn.Module):
    """Brings a cell input to C channels and the cell's size: ReLU, 1x1 (or FactorizedReduce), batch norm."""

    width: int
    halve: bool

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        fan_in = x.shape[0]
        x = jax.nn.relu(x)
        if self.halve:
            half = (self.width // 2, fan_in)
            x = operations.factorized_reduce(x, self.param("even", declared, half), self.param("odd", declared, half))
        else:
            x = layers.pointwise(x, self.param("pointwise", declared, (self.width, fan_in)))
        return Norm((self.width,), name="norm")(x, train)


class Operation(nn.Module):
    """Weights and moments of one candidate operation on all edges that carry it, stacked."""

    op: str
    width: int
    stride: int
    count: int

    @nn.compact
    def __call__(self):
        weights = {}
        for name, shape in operations.op_shapes(self.op, self.width, self.stride).items():
            weights[name] = self.param(name, declared, (self.count, *shape))
        names = operations.norm_names(self.op, self.stride)
        norms = {name: Norm((self.count, self.width), name=name) for name in names}
        return weights, norms


class Cell(nn.Module):
    """A cell with its preprocessing: (s0, s1) -> concatenated nodes [nodes C, H, W, N]."""

    width: int
    nodes: int
    keep: operations.Keep
    reduce: bool
    after_reduction: bool
    how: How

    @nn.compact
    def __call__(self, s0: Array, s1: Array, mix: Array, train: bool) -> Array:
        s0 = Preprocess(self.width, self.after_reduction, name="preprocess_0")(s0, train)
        s1 = Preprocess(self.width, False, name="preprocess_1")(s1, train)
        weights, norms = {}, {}
        for k, op in enumerate(OPS):
            edges, stride = operations.stack(self.keep, k, self.nodes, self.reduce)
            if edges and operations.has_norm(op, stride):
                weights[op], norms[op] = Operation(op, self.width, stride, len(edges), name=op)()
        stats = {op: {name: norm.moments for name, norm in by_name.items()} for op, by_name in norms.items()}
        nodes, moments = cell(
            jnp.stack([s0, s1]), weights, stats, mix, self.keep, self.nodes, self.reduce, train, self.how
        )
        if train:
            for op, by_name in norms.items():
                for name, norm in by_name.items():
                    norm.put(moments[op][name])
        return nodes.reshape(-1, *nodes.shape[2:])


class Darts(nn.Module):
    """The whole network on normalised images [channels, H, W, N]."""

    classes: int
    width: int
    length: int
    nodes: int
    plan: Plan
    ways: tuple[How, How]  # of normal and reduction cells

    @nn.compact
    def __call__(self, x: Array, mix: Array, train: bool) -> Array:
        stem = STEM_MULTIPLIER * self.width
        kernel = self.param("stem", declared, (stem, x.shape[0], 3, 3))
        norm = Norm((stem,), name="stem_norm")
        x = norm(layers.convolution(x, kernel), train)
        scale = self.param("stem_scale", declared, (stem,)).astype(x.dtype)
        shift = self.param("stem_shift", declared, (stem,)).astype(x.dtype)
        s0 = s1 = scale[:, None, None, None] * x + shift[:, None, None, None]
        width, after_reduction = self.width, False
        for i in range(self.length):
            reduce = i in reductions(self.length)
            width *= 2 if reduce else 1
            kind = int(reduce)
            block = Cell(width, self.nodes, self.plan[kind], reduce, after_reduction, self.ways[kind], name=f"cell_{i}")
            s0, s1, after_reduction = s1, block(s0, s1, mix[kind], train), reduce
        features = jnp.mean(s1.astype(jnp.promote_types(s1.dtype, jnp.float32)), (1, 2))  # [F, N]
        kernel = self.param("head_kernel", declared, (self.classes, features.shape[0]))
        return (kernel @ features).T + self.param("head_bias", declared, (self.classes,))


def initial(key: Array, shapes: dict) -> dict:
    """Float32 weights of these shapes, as PyTorch draws them (DARTS sets none itself): U(-1, 1) / sqrt(fan_in).

    All are cut from one draw: XLA takes about half a second to compile each draw of its own.
    """
    shapes = {path: leaf.shape for path, leaf in flatten_dict(shapes).items()}
    ends = np.cumsum([np.prod(shape) for shape in shapes.values()])
    pieces = jnp.split(jax.random.uniform(key, (ends[-1],), jnp.float32, -1, 1), ends[:-1])
    features = shapes[("head_kernel",)][-1]
    values = {}
    for (path, shape), piece in zip(shapes.items(), pieces, strict=True):
        if path[-1] in ("stem_scale", "stem_shift"):
            values[path] = jnp.full(shape, path[-1] == "stem_scale", jnp.float32)
            continue
        # A kernel [..., k, k] sees a window (the stem's one of every channel); others [..., O, I] see I.
        inputs = {"stem": shape[1:], "head_bias": (features,)}.get(path[-1], shape[-1:])
        if path[-1].startswith("depthwise"):
            inputs = shape[-2:]
        values[path] = piece.reshape(shape) / np.sqrt(np.prod(inputs))
    return unflatten_dict(values)


def darts(
    *,
    shape: tuple[int, int, int],
    classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    width: int = 16,
    length: int = 8,
    nodes: int = 4,
    plan: Plan | None = None,
    dtype=jnp.float32,
    how: How | None = None,
) -> Supernet:
    """The search network (C = width, L = length) for images of `shape` (H, W, channels).

    `plan` says which operations exist; all where it is None.

    Weights, moments, logits and the mix are float32; `dtype` is what the layers compute in. `how` changes time and
    memory alone; None: what suits JAX's default backend. Its kernel "pallas" computes depthwise and pointwise layers
    by the GPU kernels of `fused`, which have NEVER RUN on a GPU and have no second derivative; "interpret" interprets
    them anywhere, slowly, for tests.

    ValueError where the image cannot be halved as often as there are reduction cells and for an unknown `kernel`;
    where the network is compiled for a CPU with "pallas".
    """
    halvings = len(reductions(length))
    if shape[0] % 2**halvings or shape[1] % 2**halvings:
        raise ValueError(
            f"the DARTS network halves its images {halvings} times with {length} cells, so height and width must be "
            f"multiples of {2**halvings}; they are {shape[0]} x {shape[1]}"
        )
    if how is not None and how.kernel not in operations.KERNELS:
        raise ValueError(f"there is no kernel {how.kernel!r}; choose among {', '.join(operations.KERNELS)}")
    plan = full_plan(nodes) if plan is None else plan
    ways = tuple(suited(jax.default_backend(), keep) if how is None else how for keep in plan)
    net = Darts(classes, width, length, nodes, plan, ways)
    mix_shape = (2, len(edge_ends(nodes)), len(OPS))

    def init(key):
        image = jnp.zeros((shape[2], *shape[:2], 1))
        shapes = jax.eval_shape(lambda: net.init(key, image, jnp.zeros(mix_shape), False))
        stats = flatten_dict(shapes["batch_stats"])
        stats = {path: jnp.full(x.shape, path[-1] == "var", jnp.float32) for path, x in stats.items()}
        return initial(key, shapes["params"]), unflatten_dict(stats)

    def apply(params, stats, image, mix, train):
        x = layers.normalize(image, mean, std, dtype)
        variables = {"params": params, "batch_stats": stats}
        if not train:
            return net.apply(variables, x, mix, False), stats
        logits, found = net.apply(variables, x, mix, True, mutable=["batch_stats"])
        return logits, found["batch_stats"]

    macs = multiply_adds(shape, classes, width, length, nodes, plan)
    return Supernet(init, apply, momentum=0.1, macs=macs)


def darts_space(*, nodes: int = 4, length: int = 8, **network) -> SearchSpace:
    """The supernet of `darts` with every plan it can be cut down to; `network` are its other arguments."""

    def as_plan(lists) -> Plan:
        return tuple(tuple(map(tuple, edges)) for edges in lists)

    def make(plan) -> Supernet:
        return darts(nodes=nodes, length=length, plan=as_plan(plan), **network)

    def cut(tree, old, new):
        return carry_over(tree, length, nodes, as_plan(old), as_plan(new))

    return SearchSpace(nodes, make, cut)
