"""Random crops, flips and cut-outs of a batch, on the device, uint8 in and out.

Every function is of one key and a batch [b, h, w, c] and treats each image by itself. Normalisation is part
of the network. D-36: the search uses crop and flip; cutout is for training a found network.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax.core import Array

NAMES = ("crop", "flip", "cutout")


def crop(key: Array, image: Array, pad: int) -> Array:
    """A random [h, w] window of each image after `pad` black pixels are added on every side."""
    b, h, w, c = image.shape
    padded = jnp.pad(image, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corner = jax.random.randint(key, (b, 2), 0, 2 * pad + 1)

    def window(image, corner):
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (h, w, c))

    return jax.vmap(window)(padded, corner)


def flip(key: Array, image: Array) -> Array:
    """Each image mirrored left to right with probability one half."""
    mirrored = jax.random.bernoulli(key, 0.5, (image.shape[0], 1, 1, 1))
    return jnp.where(mirrored, image[:, :, ::-1], image)


def cutout(key: Array, image: Array, length: int, fill: Array) -> Array:
    """Each image with a square of `length` pixels set to `fill` [c]: DeVries and Taylor, 2017.

    The square's centre is uniform over the image; what reaches beyond the border is cut off.
    """
    b, h, w, _ = image.shape
    centre = jax.random.randint(key, (b, 2, 1), 0, jnp.array([[h], [w]]))
    top_left = centre - length // 2

    def inside(size, axis):
        place = jnp.arange(size)
        return (place >= top_left[:, axis]) & (place < top_left[:, axis] + length)  # [b, size]

    hole = inside(h, 0)[:, :, None, None] & inside(w, 1)[:, None, :, None]
    return jnp.where(hole, jnp.asarray(fill, image.dtype), image)


def augmenter(
    names: tuple[str, ...], *, mean: tuple[float, ...], pad: int = 4, length: int = 16
) -> Callable[[Array, Array], Array]:
    """(key, image [b, h, w, c] uint8) -> the same shape and type: `names` one after another.

    `mean` is the data set's, per channel in [0, 1]: a cut-out filled with it is zero once normalised, within
    half a grey level. The defaults are those of DARTS (methods section 3.5). Raises ValueError for an unknown
    name.
    """
    known = {
        "crop": partial(crop, pad=pad),
        "flip": flip,
        "cutout": partial(cutout, length=length, fill=np.rint(255 * np.array(mean)).astype(np.uint8)),
    }
    for name in names:
        if name not in known:
            raise ValueError(f"no augmentation {name!r}; there are {', '.join(NAMES)}")

    def augment(key: Array, image: Array) -> Array:
        for i, name in enumerate(names):
            image = known[name](jax.random.fold_in(key, i), image)
        return image

    return augment
