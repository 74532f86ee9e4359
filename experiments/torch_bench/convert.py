"""What the JAX side has, for the PyTorch side: weights and statistics (and back), images, and its random numbers.

Both sides hold the same numbers in the same order: a leaf of the pytree that stacks edges is cut into its
rows, a [C, k, k] kernel becomes [C, 1, k, k], a matrix a 1x1 kernel. So every step is a reshape, and one list
of places, a path in the pytree for every name in the module, serves both directions.
"""

import re
from collections import Counter

import jax
import numpy as np
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.flatten_util import ravel_pytree

from fedmetanas_jax import local
from torch_bench.rounds import Batch, Task
from torch_bench.supernet import Alpha, Supernet

# A tensor's name in the module as its path in the pytree: what each pattern finds is replaced, from first to last.
RULES = {
    r"^cells\.(\d+)\.(edges\.\d+\.ops\.)?": r"cell_\1.",
    r"\.first\.": ".",
    r"\.second\.(\w+)": r".\1_2",
    r"^stem_norm\.weight": "stem_scale",
    r"^stem_norm\.bias": "stem_shift",
    r"^head\.weight": "head_kernel",
    r"^head\.bias": "head_bias",
    r"\.running_": ".",
    r"\.weight$": "",
}


Place = tuple[tuple[str, ...], int | None, str]  # path in {"params": ..., "stats": ...}, row of the leaf (None: the
#   whole leaf), name in the module's state_dict


def places_of(net: Supernet) -> list[Place]:
    """All weights and statistics of a supernet, of whatever plan."""
    places, rows = [], Counter()
    for name in net.state_dict():
        if name.endswith("num_batches_tracked"):
            continue
        path = name
        for pattern, replacement in RULES.items():
            path = re.sub(pattern, replacement, path)
        path = ("stats" if ".running_" in name else "params", *path.split("."))
        places.append((path, rows[path] if ".edges." in name else None, name))
        rows[path] += 1
    return places


@torch.no_grad()
def load(net: Supernet, places: list[Place], params, stats) -> None:
    """Copies the numbers of both pytrees into the module. KeyError or ValueError where the two do not fit."""
    state, leaves, carried = net.state_dict(), flatten_dict({"params": params, "stats": stats}), Counter()
    for path, row, name in places:
        value = np.asarray(leaves[path] if row is None else leaves[path][row])
        if value.size != state[name].numel():
            raise ValueError(f"{'/'.join(path)} has {value.shape}, {name} has {tuple(state[name].shape)}")
        state[name].copy_(torch.from_numpy(value.reshape(state[name].shape).copy()))
        carried[path] += value.size
    if (sizes := {path: leaf.size for path, leaf in leaves.items()}) != carried:
        raise ValueError(f"not carried over: {sorted(sizes.items() ^ carried.items())}")


def unload(tensors: dict[str, torch.Tensor], places: list[Place], like) -> dict:
    """Tensors by name in the module (a state_dict, or gradients) as a pytree {"params": ..., "stats": ...}.

    `like` is a pytree of the wanted shapes; places without a tensor are left out.
    """
    rows: dict[tuple, list] = {}
    for path, _, name in places:  # the rows of a leaf stand in their order
        if name in tensors:
            rows.setdefault(path, []).append(tensors[name].detach().cpu().numpy())
    leaves = flatten_dict(like)
    return unflatten_dict({path: np.stack(values).reshape(leaves[path].shape) for path, values in rows.items()})


def alpha_to_torch(alpha) -> Alpha:
    """A pair of arrays (op, pair), logits, noise or mask, as tensors."""
    return Alpha(*(torch.from_numpy(np.array(x)) for x in alpha))


def batch_to_torch(image, label) -> Batch:
    """image [N, H, W, C] uint8 and label [N] -> a Batch, [N, C, H, W] as PyTorch has it."""
    image = torch.from_numpy(np.array(image)).permute(0, 3, 1, 2).contiguous()
    return Batch(image, torch.from_numpy(np.array(label)).long())


def tasks_of(key, data, alpha, *, M: int, batch: int, epochs: int) -> list[Task]:
    """The tasks that `fedmetanas.client_update(message, (), data, key)` works on, without augmentation.

    The rows and the Gumbel noise are drawn by the project's own functions, with the keys that `local.fit`,
    `maml.gradient` and `relax.softmax` derive. data: Examples; alpha: of the message, for its shapes. To be called
    under the float precision that the JAX side runs in: the draws differ. ValueError where a task holds padding,
    which the JAX client skips and the PyTorch one cannot.
    """
    order_key, step_key = jax.random.split(key)
    rows, weight = local.all_tasks(order_key, data.weight, batch, epochs)
    if not np.all(weight):
        raise ValueError("a task holds padding; give data whose rows are all real")
    flat, unravel = ravel_pytree(alpha)
    tasks = []
    for halves, task_key in zip(rows, jax.random.split(step_key, len(rows)), strict=True):
        *_, loss_key = jax.random.split(task_key, 3)
        draws = [jax.random.gumbel(jax.random.fold_in(loss_key, m), flat.shape) for m in range(M + 1)]
        noise = [alpha_to_torch(unravel(draw.astype(flat.dtype))) for draw in draws]
        tasks.append(Task(*(batch_to_torch(data.image[half], data.label[half]) for half in halves), noise))
    return tasks
