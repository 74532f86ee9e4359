"""network.safetensors: the arrays of network.npz by the names that they have there, its header as metadata.

Metadata are texts, so each entry of the header is one, as JSON: format, kind, arguments, plan, label_names. Together
they say the architecture whole; `docs/exports.md` says in what terms.
"""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from exports.layers import Step
from fedmetanas_jax import network
from fedmetanas_jax.files import write_bytes


def write(net: network.Network, steps: list[Step], folder: Path) -> list[Path]:
    """-> the files."""
    from safetensors.numpy import save

    arrays = {name: np.asarray(x) for name, x in net.arrays().items()}
    path = folder / "network.safetensors"
    write_bytes(path, save(arrays, {name: json.dumps(value) for name, value in net.header.items()}))
    return [path]


def read(files: list[Path]) -> Callable:
    """images [n, h, w, c] uint8 -> logits, by the files alone."""
    from safetensors import safe_open

    with safe_open(files[0], "numpy") as file:
        header = {name: json.loads(text) for name, text in file.metadata().items()}
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    return network.assemble(files[0], header, arrays).apply


def runtime() -> str:
    """What `read` runs it in."""
    return f"jax {jax.__version__}"
