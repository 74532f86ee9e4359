"""What each augmentation may and may not do to an image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmetanas_jax.data.augment import augmenter, crop, cutout, flip

KEY = jax.random.key(0)
# Every pixel of an image differs from its others and from the padding's 0.
IMAGE = np.arange(1, 241, dtype=np.uint8).reshape(1, 8, 10, 3).repeat(64, axis=0)


def test_every_crop_is_a_window_of_the_padded_image_and_every_window_comes():
    pad = 1
    got = np.asarray(jax.jit(crop, static_argnums=2)(KEY, IMAGE, pad))
    padded = np.pad(IMAGE[0], ((pad, pad), (pad, pad), (0, 0)))
    windows = [padded[y : y + 8, x : x + 10].tobytes() for y in range(3) for x in range(3)]
    seen = [windows.index(image.tobytes()) for image in got]
    assert set(seen) == set(range(9))


def test_flip_mirrors_about_half_of_the_images():
    got = np.asarray(jax.jit(flip)(KEY, IMAGE))
    mirrored = [np.array_equal(image, IMAGE[0][:, ::-1]) for image in got]
    same = [np.array_equal(image, IMAGE[0]) for image in got]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 16 < sum(mirrored) < 48


@pytest.mark.parametrize("length", [1, 4, 5])
def test_cutout_fills_one_square_around_a_pixel_of_the_image(length):
    fill = np.array([251, 252, 253], np.uint8)  # in no image
    got = np.asarray(jax.jit(cutout, static_argnums=2)(KEY, IMAGE, length, fill))
    hole = (got == fill).all(-1)
    np.testing.assert_array_equal(got[~hole], IMAGE[~hole])
    heights, widths = hole.any(2).sum(1), hole.any(1).sum(1)
    np.testing.assert_array_equal(hole.sum((1, 2)), heights * widths)  # a rectangle
    assert heights.max() == widths.max() == length
    assert heights.min() >= length // 2  # no more than half is cut off at a border
    assert len({h.tobytes() for h in hole}) > 16


def test_augmenter_is_a_function_of_its_key():
    mean = (0.5, 0.25, 1.0)
    augment = jax.jit(augmenter(("crop", "flip", "cutout"), mean=mean, length=4))
    got = augment(KEY, IMAGE)
    assert (got.shape, got.dtype) == (IMAGE.shape, jnp.uint8)
    np.testing.assert_array_equal(got, augment(KEY, IMAGE))
    assert not np.array_equal(got, augment(jax.random.key(1), IMAGE))
    filled = (np.asarray(got) == [128, 64, 255]).all(-1)  # the mean, rounded to a grey level
    assert (filled.sum((1, 2)) > 0).all()


def test_augmenter_without_names_changes_nothing():
    np.testing.assert_array_equal(augmenter((), mean=(0.0,))(KEY, IMAGE), IMAGE)


def test_augmenter_maps_over_clients():
    augment = jax.jit(augmenter(("crop", "flip", "cutout"), mean=(0.5, 0.5, 0.5)))
    keys = jax.random.split(KEY, 3)
    batch = np.stack([IMAGE[:4]] * 3)
    together = jax.vmap(augment)(keys, batch)
    for key, image, got in zip(keys, batch, together, strict=True):
        np.testing.assert_array_equal(augment(key, image), got)


def test_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match="no augmentation 'mixup'; there are crop, flip, cutout"):
        augmenter(("crop", "mixup"), mean=(0.5,))
