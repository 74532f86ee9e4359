"""A found network as one file: weights, statistics and the few facts needed to run it.

    from fedmetanas_jax.network import load
    network = load("runs/digits_dir01-fedmetanas/network.npz")
    labels = network.predict(images)  # images [n, h, w, c] uint8
"""

import io
import json
from collections.abc import Callable
from functools import lru_cache, partial
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
from fedmetanas_jax.network_file import NetworkError, check_arguments, check_arrays, check_names, check_plan, read
from fedmetanas_jax.options import brief

FORMAT = 1
SPACES = {"darts": darts_space, "nasbench201": nasbench201_space}  # their networks have a plan and a mix
MAKERS = SPACES | {"mobilenetv3": mobilenetv3}  # of every kind


class Network(NamedTuple):
    """A network that is ready to use."""

    net: Net
    header: dict  # kind, arguments, plan, label_names
    apply: object  # image [b, h, w, c] uint8 -> logits [b, classes]

    @property
    def label_names(self) -> tuple[str, ...]:
        """One name per class."""
        return tuple(self.header["label_names"])

    def arrays(self) -> dict:
        """Weights, statistics and mix by the names that they have in a file."""
        return _arrays(self.net, self.header["kind"])

    def logits(self, images, batch: int = 250) -> np.ndarray:
        """images [n, h, w, c] uint8 -> [n, classes] float32; one image [h, w, c] -> [classes].

        An image may be PIL's too, and images a list of those, of the network's size and mode (L, RGB, RGBA).

        `batch` images are computed together, the last ones filled up with repeats; where there are fewer from the
        start, they are filled up to the next power of two only. Each of these sizes is compiled once. NetworkError for
        images of another kind, which says what is needed, and a batch of none.
        """
        shape = tuple(self.header["arguments"]["shape"])
        if isinstance(batch, bool) or not isinstance(batch, int | np.integer) or batch < 1:
            raise NetworkError(f"batch is {brief(batch)}; it must be a whole number of at least 1")
        images = taken(images, shape)
        many = images.reshape(-1, *shape)
        size, out = min(int(batch), 1 << max(len(many) - 1, 0).bit_length()), []
        for start in range(0, len(many), size):
            chunk = many[start : start + size]
            out.append(np.asarray(self.apply(np.resize(chunk, (size, *shape))))[: len(chunk)])
        found = np.concatenate(out) if out else np.zeros((0, len(self.label_names)), np.float32)
        return found if images.ndim == 4 else found[0]

    def predict(self, images) -> np.ndarray:
        """images as `logits` takes them -> the most likely class of each, [n]; of one image its class, []."""
        return np.argmax(self.logits(images), -1)


def save(path: Path, net: Net, *, kind: str, arguments: dict, plan, label_names: tuple[str, ...]) -> None:
    """Writes `path` (.npz) whole or not at all.

    `kind` is one of MAKERS, `arguments` those of its maker; one of SPACES needs the plan of the network's operations.
    """
    header = {"format": FORMAT, "kind": kind, "arguments": arguments, "plan": plan, "label_names": label_names}
    arrays = {name: np.asarray(x) for name, x in _arrays(net, kind).items()}
    file = io.BytesIO()
    np.savez(file, header=np.array(json.dumps(header)), **arrays)
    write_bytes(path, file.getvalue())


def load(path: str | Path) -> Network:
    """The network in `path`, computing in float32. NetworkError where there is none, or none that computes."""
    return assemble(path, *read(path))


def assemble(path: str | Path, header: dict, arrays: dict[str, np.ndarray]) -> Network:
    """The network of what was read from `path`, in whatever format: a header as `save` writes it and `Network.arrays`.
    NetworkError where they make none."""
    if header.get("format") != FORMAT:
        raise NetworkError(f"{path} has format {brief(header.get('format'))}; this version reads {FORMAT}")
    kind = header.get("kind")
    if not isinstance(kind, str) or kind not in MAKERS:
        raise NetworkError(f"{path} holds a network of kind {brief(kind)!r}; there are {', '.join(MAKERS)}")
    if lacking := [name for name in ("arguments", "plan", "label_names") if name not in header]:
        raise NetworkError(f"{path} holds no network: its header lacks {', '.join(lacking)}")
    try:
        forward, shapes = _made(kind, json.dumps(header["arguments"]), json.dumps(header["plan"]))
        check_names(header["label_names"], header["arguments"]["classes"])
        check_arrays(arrays, shapes)
    except NetworkError as error:
        raise NetworkError(f"{path} holds no network: {error}") from None
    net = Net(_nested(arrays, "params/"), _nested(arrays, "stats/"))
    if kind in SPACES:
        net = net._replace(mix=jnp.asarray(arrays["mix"]))
    return Network(net, header, partial(forward, net))


def taken(images, shape: tuple[int, int, int]) -> np.ndarray:
    """A caller's images, an array or PIL's, as uint8 [n, h, w, c] or one [h, w, c] of that shape. NetworkError for
    others, which says what to do. Floats are not guessed at: 0 to 1 and 0 to 255 look alike where an image is dark."""
    if hasattr(images, "getbands"):
        return _of_pil(images, shape)
    if isinstance(images, list | tuple) and images and all(hasattr(image, "getbands") for image in images):
        return np.stack([_of_pil(image, shape) for image in images])
    try:
        images = np.asarray(images)
    except ValueError as error:
        raise NetworkError(f"images are no array ({brief(error)})") from None
    if images.dtype == np.uint8 and images.shape[-3:] == shape and images.ndim in (3, 4):
        return images
    sizes = ", ".join(map(str, shape))
    said = f"images are {images.dtype} {images.shape}; the network takes uint8 [n, {sizes}], or one [{sizes}], 0 to 255"
    if images.dtype.kind == "f":
        said += ": of floats from 0 to 1, (255 * images).round().astype('uint8')"
    raise NetworkError(said)


def _of_pil(image, shape: tuple[int, int, int]) -> np.ndarray:
    """[h, w, c] uint8. Neither size nor colours are changed, since it is the caller who knows how to."""
    height, width, channels = shape
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)
    if image.mode != mode or image.size != (width, height):
        wanted = f"{mode} of {width} x {height}: image.convert({mode!r}).resize(({width}, {height}))"
        wanted = wanted if mode else f"arrays of {channels} channels, which PIL's have not"
        found = f"{image.mode} of {image.width} x {image.height}"
        raise NetworkError(f"images are PIL's, {found}; the network takes {wanted}")
    return np.asarray(image).reshape(shape)


@lru_cache(maxsize=8)
def _made(kind: str, arguments: str, plan: str) -> tuple[Callable, dict[str, tuple[int, ...]]]:
    """(forward: (Net, image [b, h, w, c] uint8) -> logits; the shape of every array of the file) of the network that
    these make, as JSON. NetworkError where they make none, which is found without compiling."""
    plan, taken = json.loads(plan), check_arguments(MAKERS[kind], json.loads(arguments))
    try:
        made, mix = MAKERS[kind](**taken), ()
        if kind in SPACES:
            graph = made.graph
            check_plan(graph, plan)
            made = made.make(plan)
            mix = jax.ShapeDtypeStruct((len(graph.cell_types), len(graph.edges), len(graph.ops)), jnp.float32)
        elif plan is not None:
            raise NetworkError(f"the plan is {brief(plan)}, but a network of kind {kind} has none")

        @jax.jit
        def forward(net, image):
            more = (net.mix,) if kind in SPACES else ()
            return made.apply(net.params, net.stats, image, *more, False)[0]

        net = Net(*jax.eval_shape(made.init, jax.random.key(0)), mix)
        jax.eval_shape(forward, net, jax.ShapeDtypeStruct((1, *taken["shape"]), jnp.uint8))
    except NetworkError:
        raise
    except Exception as error:  # makers and JAX each have their own for sizes that cannot be
        said = " ".join(brief(error, 200).split())
        raise NetworkError(f"its arguments and plan make no network ({type(error).__name__}: {said})") from None
    return forward, {name: x.shape for name, x in _arrays(net, kind).items()}


def _arrays(net: Net, kind: str) -> dict:
    """The leaves of the net by the names that they have in a file."""
    parts = {"params": net.params, "stats": net.stats} | ({"mix": net.mix} if kind in SPACES else {})
    leaves = jax.tree_util.tree_leaves_with_path(parts)
    return {"/".join(str(key.key) for key in path): x for path, x in leaves}


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
