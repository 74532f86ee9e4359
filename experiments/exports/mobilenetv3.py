"""The steps of a MobileNetV3: what `models.mobilenetv3` computes."""

from exports.layers import Layers
from fedmetanas_jax.models.mobilenetv3 import BN_EPSILON, VARIANTS, Row
from fedmetanas_jax.network import Network

ACTIVATIONS = {"RE": "relu", "HS": "hard_swish"}


def mobilenetv3(layers: Layers, x: str, network: Network) -> None:
    """Adds all of it to the layers; x is the normalised image."""
    params, stats, _ = network.net
    variant = VARIANTS[network.header["arguments"].get("variant", "large")]
    x = _conv_norm(layers, "stem", x, params["stem"], stats["stem"], "HS", network.header["arguments"].get("stem", 1))
    channels = variant.stem
    for i, row in enumerate(variant.rows):
        name = f"block_{i:02d}"
        y = _block(layers, name, x, row, params[name], stats[name])
        x = layers.add("add", name, x, y) if row.stride == 1 and channels == row.out else y
        channels = row.out
    x = _conv_norm(layers, "last", x, params["last"], stats["last"], "HS")
    x = layers.add("linear", "head.hidden", layers.add("global_pool", "pool", x), weights=params["hidden"])
    layers.add("linear", "head.logits", layers.add("hard_swish", "head.act", x), weights=params["head"])


def _block(layers: Layers, name: str, x: str, row: Row, params: dict, stats: dict) -> str:
    """Expand, depthwise, squeeze and excite, project."""
    for which, stride in (("expand", 1), ("depthwise", row.stride)):
        if which in params:
            where = f"{name}.inside.{which}"
            x = _conv_norm(layers, where, x, params[which], stats[which], row.act, stride)
    if row.squeeze:
        gate = layers.add("global_pool", f"{name}.pool", x)
        gate = layers.add("linear", f"{name}.gate.squeeze", gate, weights=params["squeeze"])
        gate = layers.add("relu", f"{name}.gate.relu", gate)
        gate = layers.add("linear", f"{name}.gate.excite", gate, weights=params["excite"])
        x = layers.add("gate", f"{name}.gated", x, layers.add("hard_sigmoid", f"{name}.gate.sigmoid", gate))
    return _conv_norm(layers, f"{name}.project", x, params["project"], stats["project"])


def _conv_norm(layers: Layers, name: str, x: str, params: dict, stats: dict, act: str = "", stride: int = 1) -> str:
    x = layers.conv(f"{name}.conv", x, params["kernel"], stride)
    x = layers.norm(f"{name}.norm", x, stats, params["scale"], params["shift"], BN_EPSILON)
    return layers.add(ACTIVATIONS[act], f"{name}.act", x) if act else x
