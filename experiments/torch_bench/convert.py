"""JAX pytrees of weights and statistics to PyTorch modules and back; images to batches.

Both sides hold the same numbers in the same order: a leaf of the pytree that stacks edges is cut into its
rows, a [C, k, k] kernel becomes [C, 1, k, k], a matrix a 1x1 kernel. So every step is a reshape, and one list
of (place in the pytree, row, name in the module) serves both directions.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from torch_bench.client import Batch
from torch_bench.operations import FactorizedReduce
from torch_bench.relaxation import Alpha
from torch_bench.supernet import Supernet


class Place(NamedTuple):
    """Where one tensor of a module stands in the pytree {"params": ..., "stats": ...}."""

    path: tuple[str, ...]
    row: int | None  # of the leaf; None: the whole leaf
    name: str  # in the module's state_dict


def _norm(path: tuple[str, ...], row: int | None, name: str) -> list[Place]:
    """Running statistics of a batch norm; path without "stats"."""
    pairs = (("mean", "running_mean"), ("var", "running_var"))
    return [Place(("stats", *path, ours), row, f"{name}.{theirs}") for ours, theirs in pairs]


def _kernels(path: tuple[str, ...], row: int | None, name: str, renamed: dict[str, str]) -> list[Place]:
    return [Place(("params", *path, ours), row, f"{name}.{theirs}.weight") for ours, theirs in renamed.items()]


def _reduce(path, row, name) -> list[Place]:
    return _kernels(path, row, name, {"even": "even", "odd": "odd"}) + _norm((*path, "norm"), row, f"{name}.norm")


def _operation(op: str, module: nn.Module, path, row: int, name: str) -> list[Place]:
    """Places of one candidate on one edge; none where it has neither weights nor statistics."""
    if isinstance(module, FactorizedReduce):
        return _reduce(path, row, name)
    if "pool" in op:
        return _norm((*path, "norm"), row, f"{name}.norm")
    kernels = {"depthwise": "depthwise", "pointwise": "pointwise"}
    if op.startswith("dil"):
        return _kernels(path, row, name, kernels) + _norm((*path, "norm"), row, f"{name}.norm")
    if op.startswith("sep"):
        renamed = {f"{k}{end}": f"{half}.{k}" for half, end in (("first", ""), ("second", "_2")) for k in kernels}
        norms = [("norm", "first"), ("norm_2", "second")]
        found = [place for ours, half in norms for place in _norm((*path, ours), row, f"{name}.{half}.norm")]
        return _kernels(path, row, name, renamed) + found
    return []


def supernet_places(net: Supernet) -> list[Place]:
    """All weights and statistics of a Supernet, of whatever plan."""
    places = [
        Place(("params", "stem"), None, "stem.weight"),
        Place(("params", "stem_scale"), None, "stem_norm.weight"),
        Place(("params", "stem_shift"), None, "stem_norm.bias"),
        Place(("params", "head_kernel"), None, "head.weight"),
        Place(("params", "head_bias"), None, "head.bias"),
        *_norm(("stem_norm",), None, "stem_norm"),
    ]
    for i, cell in enumerate(net.cells):
        for which in ("preprocess_0", "preprocess_1"):
            path, name = (f"cell_{i}", which), f"cells.{i}.{which}"
            if isinstance(getattr(cell, which), FactorizedReduce):
                places += _reduce(path, None, name)
            else:
                places += _kernels(path, None, name, {"pointwise": "pointwise"})
                places += _norm((*path, "norm"), None, f"{name}.norm")
        rows: dict[str, int] = {}  # edges so far that carry the operation's weights or statistics
        for e, edge in enumerate(cell.edges):
            for op, module in edge.ops.items():
                name = f"cells.{i}.edges.{e}.ops.{op}"
                found = _operation(op, module, (f"cell_{i}", op), rows.get(op, 0), name)
                rows[op] = rows.get(op, 0) + bool(found)
                places += found
    return places


def mobilenet_places(net: nn.Module) -> list[Place]:
    """All weights and statistics of a MobileNetV3."""
    places = []
    for name in net.state_dict():
        *folders, module, leaf = name.split(".")
        if leaf == "num_batches_tracked":
            continue
        if folders[:1] == ["blocks"]:
            folders[:2] = [f"block_{int(folders[1]):02d}"]
        path = [folder for folder in folders if folder != "gate"]
        if module == "norm":
            ours = {"weight": "scale", "bias": "shift", "running_mean": "mean", "running_var": "var"}[leaf]
        else:
            ours = {"weight": "kernel", "bias": "bias"}[leaf]
            path += [] if module == "conv" else [module]
        side = "stats" if ours in ("mean", "var") else "params"
        places.append(Place((side, *path, ours), None, name))
    return places


def _leaf(tree, path):
    for step in path:
        tree = tree[step]
    return np.asarray(tree)


@torch.no_grad()
def load(net: nn.Module, places: list[Place], params, stats) -> None:
    """Copies the numbers of both pytrees into the module. KeyError or ValueError where the two do not fit."""
    state, tree = net.state_dict(), {"params": params, "stats": stats}
    counts: dict[tuple, int] = {}
    for path, row, name in places:
        leaf = _leaf(tree, path)
        value = leaf if row is None else leaf[row]
        if value.size != state[name].numel():
            raise ValueError(f"{'/'.join(path)} has {value.shape}, {name} has {tuple(state[name].shape)}")
        state[name].copy_(torch.from_numpy(value.reshape(state[name].shape).copy()))
        counts[path] = counts.get(path, 0) + value.size
    sizes = {}
    for side, part in tree.items():
        sizes |= {(side, *path): np.size(x) for path, x in _leaves(part)}
    if sizes != counts:
        raise ValueError(f"not carried over: {sorted(sizes.items() ^ counts.items())}")


def _leaves(tree, path=()):
    if isinstance(tree, dict):
        for name, part in tree.items():
            yield from _leaves(part, (*path, name))
    else:
        yield path, tree


def unload(tensors: dict[str, torch.Tensor], places: list[Place], like) -> dict:
    """Tensors by name in the module (a state_dict, or gradients) as a pytree {"params": ..., "stats": ...}.

    `like` is a pytree of the wanted shapes; places whose tensor is absent are left out.
    """
    found: dict = {}
    rows: dict[tuple, dict] = {}
    for path, row, name in places:
        if name in tensors:
            rows.setdefault(path, {})[row] = tensors[name].detach().cpu().numpy()
    for path, values in rows.items():
        shape = np.shape(_leaf(like, path))
        *folders, leaf = path
        place = found
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = np.stack([values[row] for row in sorted(values, key=lambda r: r or 0)]).reshape(shape)
    return found


def alpha_to_torch(alpha) -> Alpha:
    """A pair of arrays (op, pair), logits, noise or mask, as tensors."""
    return Alpha(*(torch.from_numpy(np.array(x)) for x in alpha))


def batch_to_torch(image, label, *, device=None, channels_last: bool = False) -> Batch:
    """image [N, H, W, C] uint8 and label [N] -> a Batch, [N, C, H, W] as PyTorch has it."""
    image = torch.from_numpy(np.array(image)).permute(0, 3, 1, 2)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    image = image.to(device=device).contiguous(memory_format=layout)
    return Batch(image, torch.from_numpy(np.array(label)).long().to(device))
