"""MobileNetV3-Large (Howard et al.: Searching for MobileNetV3, ICCV 2019), with torchvision's numbers.

Stem, inverted residual blocks, a last 1x1 convolution, global average pool and two linear layers. The
`variant` "tiny" has the same parts in small, for tests and for demonstrations on a CPU.
"""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fedmetanas_jax.core import Array, Model
from fedmetanas_jax.models import batchnorm, layers

BN_EPSILON = 1e-3
zeros = nn.initializers.zeros  # the modules only declare shapes; `initial` fills them
ACTIVATIONS = {"RE": jax.nn.relu, "HS": jax.nn.hard_swish, "": lambda x: x}


class Row(NamedTuple):
    """One inverted residual block."""

    kernel: int
    expand: int  # channels inside; the 1x1 expansion is left out where they equal the input's
    out: int
    squeeze: bool  # squeeze-and-excite after the depthwise convolution
    act: str  # "RE" ReLU, "HS" hard-swish
    stride: int


class Variant(NamedTuple):
    """The numbers of one network."""

    stem: int  # channels of the stem
    rows: tuple[Row, ...]
    last: int  # channels of the last 1x1 convolution
    hidden: int  # width of the first linear layer
    momentum: float = 0.01  # of the running statistics


VARIANTS = {
    "large": Variant(
        stem=16,
        rows=(
            Row(3, 16, 16, False, "RE", 1),
            Row(3, 64, 24, False, "RE", 2),
            Row(3, 72, 24, False, "RE", 1),
            Row(5, 72, 40, True, "RE", 2),
            Row(5, 120, 40, True, "RE", 1),
            Row(5, 120, 40, True, "RE", 1),
            Row(3, 240, 80, False, "HS", 2),
            Row(3, 200, 80, False, "HS", 1),
            Row(3, 184, 80, False, "HS", 1),
            Row(3, 184, 80, False, "HS", 1),
            Row(3, 480, 112, True, "HS", 1),
            Row(3, 672, 112, True, "HS", 1),
            Row(5, 672, 160, True, "HS", 2),
            Row(5, 960, 160, True, "HS", 1),
            Row(5, 960, 160, True, "HS", 1),
        ),
        last=960,
        hidden=1280,
    ),
    "tiny": Variant(
        stem=8,
        rows=(
            Row(3, 8, 8, False, "RE", 1),
            Row(3, 24, 16, True, "RE", 2),
            Row(5, 48, 16, True, "HS", 1),
        ),
        last=48,
        hidden=64,
        # PyTorch's default. Runs this small take a few hundred steps, and statistics that average over a hundred
        # would lag behind the weights, most of all those of a model that only its own client trains.
        momentum=0.1,
    ),
}


def squeezed(expand: int) -> int:
    """Channels between squeeze and excite: a quarter, as a multiple of 8, at most 10 % below it."""
    quarter = expand / 4
    rounded = max(8, int(quarter + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * quarter else rounded


def deviation(layer: str, shape: tuple[int, ...]) -> float:
    """Of a kernel's initial values: 0.01 in the linear layers, He et al.'s sqrt(2 / fan_out) elsewhere.

    fan_out is out * k * k for depthwise kernels too, as torchvision has it.
    """
    if layer in ("hidden", "head"):
        return 0.01
    window = shape[-1] ** 2 if len(shape) > 2 else 1
    return (2 / (shape[0] * window)) ** 0.5


def initial(key: Array, shapes: dict) -> dict:
    """float32 variables of these shapes: normal kernels, scales and variances 1, everything else 0.

    All kernels are cut from one draw: XLA takes about half a second to compile each draw of its own.
    """
    shapes = {path: leaf.shape for path, leaf in flatten_dict(shapes).items()}
    ends = np.cumsum([np.prod(shape) for path, shape in shapes.items() if path[-1] == "kernel"], dtype=int)
    pieces = iter(jnp.split(jax.random.normal(key, (ends[-1],), jnp.float32), ends[:-1]))
    values = {}
    for path, shape in shapes.items():
        *_, layer, name = path
        if name == "kernel":
            values[path] = deviation(layer, shape) * next(pieces).reshape(shape)
        else:
            values[path] = jnp.full(shape, name in ("scale", "var"), jnp.float32)
    return unflatten_dict(values)


def pooled(x: Array) -> Array:
    """Global average pool [C, H, W, N] -> [C, N], in at least float32."""
    return jnp.mean(x.astype(jnp.promote_types(x.dtype, jnp.float32)), (1, 2))


def depthwise(x: Array, kernel: Array, stride: int) -> Array:
    """`layers.depthwise` without the taps that lie outside a small image at every position.

    Large networks on small images end in 2 x 2 or 1 x 1 maps, where a 5 x 5 kernel has 9 taps or 1 that
    ever meet the image.
    """
    reach = kernel.shape[-1] // 2
    cut = reach - min(reach, max(x.shape[1:3]) - 1)
    inner = slice(cut, kernel.shape[-1] - cut)
    return layers.depthwise(x, kernel[:, inner, inner], stride)


class ConvNorm(nn.Module):
    """Convolution, batch norm with scale and shift, activation; [I, H, W, N] -> [O, H/stride, W/stride, N].

    In training the batch's moments normalise and replace `batch_stats`.
    """

    kind: Literal["dense", "depthwise", "pointwise"]
    out: int
    size: int = 1
    stride: int = 1
    act: str = ""

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        out, window = (self.out,), (self.size, self.size)
        if self.kind == "pointwise":
            x = layers.pointwise(x, self.param("kernel", zeros, (*out, x.shape[0])))
        elif self.kind == "depthwise":
            x = depthwise(x, self.param("kernel", zeros, out + window), self.stride)
        else:
            x = layers.convolution(x, self.param("kernel", zeros, (*out, x.shape[0], *window)), self.stride)
        mean = self.variable("batch_stats", "mean", jnp.zeros, out)
        variance = self.variable("batch_stats", "var", jnp.zeros, out)
        if train:
            x, mean.value, variance.value = batchnorm.batch_norm(x, BN_EPSILON)
        else:
            x = batchnorm.frozen_norm(x, mean.value, variance.value, BN_EPSILON)
        scale = self.param("scale", zeros, out).astype(x.dtype)
        shift = self.param("shift", zeros, out).astype(x.dtype)
        return ACTIVATIONS[self.act](scale[:, None, None, None] * x + shift[:, None, None, None])


class Linear(nn.Module):
    """[I, N] -> [O, N]."""

    out: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", zeros, (self.out, x.shape[0]))
        return kernel @ x + self.param("bias", zeros, (self.out,))[:, None]


class Block(nn.Module):
    """Inverted residual: expand, depthwise, squeeze and excite, project; a residual where shapes allow."""

    row: Row

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        row, entry = self.row, x
        if row.expand != x.shape[0]:
            x = ConvNorm("pointwise", row.expand, act=row.act, name="expand")(x, train)
        x = ConvNorm("depthwise", row.expand, row.kernel, row.stride, row.act, name="depthwise")(x, train)
        if row.squeeze:
            gate = jax.nn.relu(Linear(squeezed(row.expand), name="squeeze")(pooled(x)))
            gate = jax.nn.hard_sigmoid(Linear(row.expand, name="excite")(gate))
            x = x * gate.astype(x.dtype)[:, None, None, :]
        x = ConvNorm("pointwise", row.out, name="project")(x, train)
        return entry + x if row.stride == 1 and entry.shape[0] == row.out else x


class MobileNetV3(nn.Module):
    """The whole network on normalised images [channels, H, W, N] -> logits [N, classes]."""

    variant: Variant
    classes: int
    stride: int  # of the stem
    dropout: float

    @nn.compact
    def __call__(self, x: Array, train: bool, key: Array | None) -> Array:
        x = ConvNorm("dense", self.variant.stem, 3, self.stride, "HS", name="stem")(x, train)
        for i, row in enumerate(self.variant.rows):
            x = Block(row, name=f"block_{i:02d}")(x, train)
        x = pooled(ConvNorm("pointwise", self.variant.last, act="HS", name="last")(x, train))
        x = jax.nn.hard_swish(Linear(self.variant.hidden, name="hidden")(x))
        if train and key is not None:
            keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0)
        return Linear(self.classes, name="head")(x).T


def mobilenetv3(
    *,
    shape: tuple[int, int, int],
    classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    stem: int = 1,
    variant: Literal["large", "tiny"] = "large",
    dropout: float = 0.2,
    dtype=jnp.float32,
) -> Model:
    """MobileNetV3 for images of any `shape` (H, W, channels); every stride rounds sizes up.

    `stem` is the stride of the first convolution: 2 is torchvision's and leaves a 1 x 1 map of a 32 x 32
    image, on which batch norm sees one value an image; 1 leaves 2 x 2 (D-26). "large" has 4,214,842
    parameters with 10 classes, "tiny" (3 blocks: plain, squeezed with stride 2, residual with hard-swish)
    10,946.
    `params["head"]` is the last linear layer, the part that personalised methods keep (D-25).
    Weights, moments, squeeze-and-excite, linear layers and logits are float32; `dtype` is what the
    convolutions compute in.
    Dropout happens only where `apply` trains and is given a key: training with key=None drops nothing.
    ValueError for another stem or variant, or a dropout rate outside [0, 1).
    """
    if variant not in VARIANTS:
        raise ValueError(f"no MobileNetV3 variant {variant!r}; there are {', '.join(VARIANTS)}")
    if stem not in (1, 2):
        raise ValueError(f"the MobileNetV3 stem has stride 1 or 2, not {stem!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"the dropout rate must be at least 0 and below 1, not {dropout!r}")
    net = MobileNetV3(VARIANTS[variant], classes, stem, dropout)

    def init(key):
        # No variable's shape depends on the image's size.
        image = jnp.zeros((shape[2], 1, 1, 1))
        variables = initial(key, jax.eval_shape(lambda: net.init(key, image, False, None)))
        return variables["params"], variables["batch_stats"]

    def apply(params, stats, image, train, key=None):
        x = layers.normalize(image, mean, std, dtype)
        variables = {"params": params, "batch_stats": stats}
        if not train:
            return net.apply(variables, x, False, None), stats
        logits, found = net.apply(variables, x, True, key, mutable=["batch_stats"])
        return logits, found["batch_stats"]

    macs = multiply_adds(shape, classes, stem, VARIANTS[variant])
    return Model(init, apply, momentum=VARIANTS[variant].momentum, macs=macs, head=("head",))


def multiply_adds(shape, classes: int, stem: int, variant: Variant) -> int:
    """Multiply-adds of convolutions and linear layers for one image, taps on padding included."""
    height, width = (-(-n // stem) for n in shape[:2])
    total = 9 * shape[2] * variant.stem * height * width
    channels = variant.stem
    for row in variant.rows:
        if row.expand != channels:
            total += channels * row.expand * height * width
        height, width = (-(-n // row.stride) for n in (height, width))
        total += (row.kernel**2 + row.out) * row.expand * height * width
        total += 2 * row.expand * squeezed(row.expand) * row.squeeze
        channels = row.out
    total += channels * variant.last * height * width
    return total + variant.last * variant.hidden + variant.hidden * classes
