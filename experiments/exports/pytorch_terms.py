"""What every step is called in PyTorch: source text and the arrays of its module. Needs no torch."""

import numpy as np

from exports.layers import Step


def _conv(weights, stride, dilation, groups):
    out, inputs, size, _ = weights["kernel"].shape
    more = {"stride": stride, "padding": dilation * (size - 1) // 2, "dilation": dilation, "groups": groups}
    plain = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    said = "".join(f"{name}={value}, " for name, value in more.items() if value != plain[name])
    return f"nn.Conv2d({inputs * groups}, {out}, {size}, {said}bias=False)"


def _norm(weights, epsilon):
    about = "" if epsilon == 1e-5 else f", eps={epsilon!r}"
    return f"nn.BatchNorm2d({len(weights['mean'])}{about}{'' if 'scale' in weights else ', affine=False'})"


def _linear(weights):
    return f"nn.Linear({weights['kernel'].shape[1]}, {weights['kernel'].shape[0]})"


MODULES = {  # (weights, **settings) -> the module
    "conv": _conv,
    "norm": _norm,
    "relu": lambda weights: "nn.ReLU()",
    "hard_swish": lambda weights: "nn.Hardswish()",
    "hard_sigmoid": lambda weights: "nn.Hardsigmoid()",
    "max_pool": lambda weights, stride: f"nn.MaxPool2d(3, {stride}, 1)",
    "avg_pool": lambda weights, stride: f"nn.AvgPool2d(3, {stride}, 1, count_include_pad=False)",
    "mean_pool": lambda weights: "nn.AvgPool2d(2)",
    "linear": _linear,
}
FUNCTIONS = {  # (*names of the inputs, **settings) -> the expression
    "normalize": lambda x, mean, std: (
        f"(({x}.float() / 255 - {x}.new_tensor({mean}, dtype=torch.float32)) "
        f"/ {x}.new_tensor({std}, dtype=torch.float32)).permute(0, 3, 1, 2)"
    ),
    "crop": lambda x: f"{x}[:, :, 1:, 1:]",
    "zeros": lambda x, stride: f"torch.zeros_like({x}[:, :, ::{stride}, ::{stride}])",
    "scale": lambda x, factor: f"{factor!r} * {x}",
    "add": lambda *terms: " + ".join(terms),
    "concat": lambda *parts: f"torch.cat([{', '.join(parts)}], 1)",
    "gate": lambda x, gate: f"{x} * {gate}[:, :, None, None]",
    "global_pool": lambda x: f"{x}.mean((2, 3))",
}
NAMES = {
    "conv": {"kernel": "weight"},
    "norm": {"mean": "running_mean", "var": "running_var", "scale": "weight", "shift": "bias"},
    "linear": {"kernel": "weight", "bias": "bias"},
}
HEAD = '''"""A {kind} network for {classes} classes, written out. It needs torch, and network_pytorch.pt beside it.

    from network_pytorch import LABELS, load
    logits = load()(images)  # images [n, {shape[0]}, {shape[1]}, {shape[2]}] uint8, 0 to 255
    labels = [LABELS[i] for i in logits.argmax(1)]
"""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

LABELS = {labels!r}


def load(weights=Path(__file__).with_suffix(".pt")):
    """The network with its weights, ready to be asked."""
    network = Network()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval()


def chain(**modules):
    """One after another, under these names."""
    return nn.Sequential(OrderedDict(modules))


class Network(nn.Module):
    """Images [n, {shape[0]}, {shape[1]}, {shape[2]}] uint8, 0 to 255 -> logits [n, {classes}]."""

    def __init__(self):
        super().__init__()
'''
TAIL = '''
    def forward(self, image):
        """The image's pixels are normalised here."""
'''


def tensors(step: Step) -> dict[str, np.ndarray]:
    """The arrays of the step's module by the names they have in it."""
    named = {NAMES[step.op][name]: x for name, x in step.weights.items()}
    return named | ({"num_batches_tracked": np.array(0)} if step.op == "norm" else {})
