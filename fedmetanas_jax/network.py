"""A found network as one file: weights, statistics and the few facts needed to run it.

    from fedmetanas_jax.network import load
    network = load("runs/digits_dir01-fedmetanas/network.npz")
    labels = network.predict(images)  # images [n, h, w, c] uint8
"""

import io
import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax.core import Net
from fedmetanas_jax.files import write_bytes
from fedmetanas_jax.models.darts import darts_space
from fedmetanas_jax.models.mobilenetv3 import mobilenetv3
from fedmetanas_jax.models.nasbench201 import nasbench201_space

FORMAT = 1
SPACES = {"darts": darts_space, "nasbench201": nasbench201_space}  # their networks have a plan and a mix
MAKERS = SPACES | {"mobilenetv3": mobilenetv3}  # of every kind


class NetworkError(ValueError):
    """A file that holds no network, or images it cannot take; the message is one line."""


class Network(NamedTuple):
    """A network that is ready to use."""

    net: Net
    header: dict  # kind, arguments, plan, label_names
    apply: object  # image [b, h, w, c] uint8 -> logits [b, classes]

    @property
    def label_names(self) -> tuple[str, ...]:
        """One name per class."""
        return tuple(self.header["label_names"])

    def logits(self, images: np.ndarray, batch: int = 250) -> np.ndarray:
        """images [n, h, w, c] uint8 -> [n, classes] float32. NetworkError for images of another kind."""
        images, shape = np.asarray(images), tuple(self.header["arguments"]["shape"])
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape:
            raise NetworkError(f"images are {images.dtype} {images.shape}; the network takes uint8 [n, {shape}]")
        out = []
        for start in range(0, len(images), batch):
            chunk = images[start : start + batch]
            filled = np.resize(chunk, (batch, *shape))  # one shape, so one program
            out.append(np.asarray(self.apply(filled))[: len(chunk)])
        return np.concatenate(out) if out else np.zeros((0, len(self.label_names)), np.float32)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """images [n, h, w, c] uint8 -> the most likely class of each, [n]."""
        return np.argmax(self.logits(images), -1)


def save(path: Path, net: Net, *, kind: str, arguments: dict, plan, label_names: tuple[str, ...]) -> None:
    """Writes `path` (.npz) whole or not at all.

    `kind` is one of MAKERS, `arguments` those of its maker; one of SPACES needs the plan of the network's operations.
    """
    header = {"format": FORMAT, "kind": kind, "arguments": arguments, "plan": plan, "label_names": label_names}
    arrays = {f"params/{name}": x for name, x in _named(net.params).items()}
    arrays |= {f"stats/{name}": x for name, x in _named(net.stats).items()}
    if kind in SPACES:
        arrays["mix"] = np.asarray(net.mix)
    file = io.BytesIO()
    np.savez(file, header=np.array(json.dumps(header)), **arrays)
    write_bytes(path, file.getvalue())


def load(path: str | Path) -> Network:
    """The network in `path`, computing in float32. NetworkError where there is none."""
    try:
        # ZipFile.read verifies the checksum of every array.
        with zipfile.ZipFile(path) as file:
            arrays = {
                name.removesuffix(".npy"): np.lib.format.read_array(io.BytesIO(file.read(name)), allow_pickle=False)
                for name in file.namelist()
            }
        header = json.loads(str(arrays.pop("header")))
    except FileNotFoundError:
        raise NetworkError(f"there is no network file {path}") from None
    except Exception as error:  # damage shows as nearly any exception of zipfile, zlib, numpy and json
        raise NetworkError(f"{path} is no network file, or a damaged one ({error})") from error
    if header.get("format") != FORMAT:
        raise NetworkError(f"{path} has format {header.get('format')}; this version reads {FORMAT}")
    params, stats = _nested(arrays, "params/"), _nested(arrays, "stats/")
    arguments = {name: tuple(x) if isinstance(x, list) else x for name, x in header["arguments"].items()}
    if header["kind"] not in MAKERS:
        raise NetworkError(f"{path} holds a network of kind {header['kind']!r}; there are {', '.join(MAKERS)}")
    made, net = MAKERS[header["kind"]](**arguments), Net(params, stats)
    if header["kind"] in SPACES:
        supernet, net = made.make(header["plan"]), net._replace(mix=jnp.asarray(arrays["mix"]))
        apply = jax.jit(lambda image: supernet.apply(params, stats, image, net.mix, False)[0])
    else:
        apply = jax.jit(lambda image: made.apply(params, stats, image, False)[0])
    return Network(net, header, apply)


def _named(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path): np.asarray(x) for path, x in leaves}


def _nested(arrays: dict[str, np.ndarray], prefix: str) -> dict:
    tree: dict = {}
    for name, x in arrays.items():
        if name.startswith(prefix):
            *folders, leaf = name.removeprefix(prefix).split("/")
            place = tree
            for folder in folders:
                place = place.setdefault(folder, {})
            place[leaf] = jnp.asarray(x)
    return tree
