"""MobileNetV3-Large (Howard et al.: Searching for MobileNetV3, ICCV 2019), with torchvision's numbers.

Stem, inverted residual blocks, a last 1x1 convolution, global average pool and two linear layers. The
`variant` "tiny" has the same parts in small, for tests and for demonstrations on a CPU.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from fedmetanas_jax.core import Array, Model, Tree
from fedmetanas_jax.models import batchnorm, layers
from fedmetanas_jax.models.weights import Path, Weight, functions

BN_EPSILON = 1e-3
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


def depthwise(x: Array, kernel: Array, stride: int) -> Array:
    """`layers.depthwise` without the taps that lie outside a small image at every position.

    Large networks on small images end in 2 x 2 or 1 x 1 maps, where a 5 x 5 kernel has 9 taps or 1 that
    ever meet the image.
    """
    reach = kernel.shape[-1] // 2
    cut = reach - min(reach, max(x.shape[1:3]) - 1)
    inner = slice(cut, kernel.shape[-1] - cut)
    return layers.depthwise(x, kernel[:, inner, inner], stride)


def conv_norm(params: Tree, stats: Tree, x: Array, train: bool, act: str = "", stride: int = 1) -> tuple[Array, Tree]:
    """Convolution, batch norm with scale and shift, activation; [I, H, W, N] -> [O, H/stride, W/stride, N], moments.

    The kernel's shape says which: pointwise [O, I], depthwise [C, k, k] or dense [O, I, k, k].
    """
    kernel = params["kernel"]
    if kernel.ndim == 2:
        x = layers.pointwise(x, kernel)
    else:
        x = (depthwise if kernel.ndim == 3 else layers.convolution)(x, kernel, stride)
    x, moments = batchnorm.norm(x, None if train else stats, epsilon=BN_EPSILON)
    scale, shift = (params[name].astype(x.dtype)[:, None, None, None] for name in ("scale", "shift"))
    return ACTIVATIONS[act](scale * x + shift), moments


def linear(params: Tree, x: Array) -> Array:
    """[I, N] -> [O, N]."""
    return params["kernel"] @ x + params["bias"][:, None]


def block(row: Row, params: Tree, stats: Tree, x: Array, train: bool) -> tuple[Array, Tree]:
    """Inverted residual: expand, depthwise, squeeze and excite, project; a residual where shapes allow."""
    entry, found = x, {}
    for name, act, stride in (("expand", row.act, 1), ("depthwise", row.act, row.stride), ("project", "", 1)):
        if name == "project" and row.squeeze:
            gate = jax.nn.relu(linear(params["squeeze"], layers.global_pool(x)))
            gate = jax.nn.hard_sigmoid(linear(params["excite"], gate))
            x = x * gate.astype(x.dtype)[:, None, None, :]
        if name in params:
            x, found[name] = conv_norm(params[name], stats[name], x, train, act, stride)
    return entry + x if row.stride == 1 and entry.shape[0] == row.out else x, found


def declared(shape, classes: int, stem: int, variant: Variant) -> tuple[dict[Path, Weight], dict]:
    """Weights and norms of the network by path.

    Kernels are normal, of deviation 0.01 in the last linear layers and He et al.'s sqrt(2 / fan_out) elsewhere, where
    fan_out is out * k * k for depthwise kernels too, as torchvision has it.
    """
    weights: dict[Path, Weight] = {}
    norms: dict[Path, tuple[int, ...]] = {}

    def conv(path: Path, *kernel: int) -> None:
        fan_out = kernel[0] * (kernel[-1] ** 2 if len(kernel) > 2 else 1)
        weights[*path, "kernel"] = Weight(kernel, height * width, (2 / fan_out) ** 0.5)
        norms[path] = kernel[:1]
        for name, start in (("scale", 1.0), ("shift", 0.0)):
            weights[*path, name] = Weight(kernel[:1], start=start)

    def dense(path: Path, out: int, inputs: int, deviation: float) -> None:
        weights[*path, "kernel"] = Weight((out, inputs), 1, deviation)
        weights[*path, "bias"] = Weight((out,), start=0.0)

    height, width = (-(-n // stem) for n in shape[:2])
    conv(("stem",), variant.stem, shape[2], 3, 3)
    channels = variant.stem
    for i, row in enumerate(variant.rows):
        name, inside = f"block_{i:02d}", squeezed(row.expand)
        if row.expand != channels:
            conv((name, "expand"), row.expand, channels)
        height, width = (-(-n // row.stride) for n in (height, width))
        conv((name, "depthwise"), row.expand, row.kernel, row.kernel)
        if row.squeeze:
            dense((name, "squeeze"), inside, row.expand, (2 / inside) ** 0.5)
            dense((name, "excite"), row.expand, inside, (2 / row.expand) ** 0.5)
        conv((name, "project"), row.out, row.expand)
        channels = row.out
    conv(("last",), variant.last, channels)
    dense(("hidden",), variant.hidden, variant.last, 0.01)
    dense(("head",), classes, variant.hidden, 0.01)
    return weights, norms


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
    numbers = VARIANTS[variant]

    def forward(params, stats, x, train, key):
        x, moments = conv_norm(params["stem"], stats["stem"], x, train, "HS", stem)
        found = {"stem": moments}
        for i, row in enumerate(numbers.rows):
            name = f"block_{i:02d}"
            x, found[name] = block(row, params[name], stats[name], x, train)
        x, found["last"] = conv_norm(params["last"], stats["last"], x, train, "HS")
        x = jax.nn.hard_swish(linear(params["hidden"], layers.global_pool(x)))
        if train and key is not None:
            kept = jax.random.bernoulli(key, 1 - dropout, x.shape)
            x = jnp.where(kept, x / (1 - dropout), 0)
        return linear(params["head"], x).T, found

    weights, norms = declared(shape, classes, stem, numbers)
    init, apply, macs = functions(weights, norms, forward, jax.random.normal, mean, std, dtype)
    return Model(
        init,
        lambda params, stats, image, train, key=None: apply(params, stats, image, train, key),
        momentum=numbers.momentum,
        macs=macs,
        head=("head",),
    )
