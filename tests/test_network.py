"""Networks as files: every kind comes back and computes what it did; what is no network is named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fedmetanas_jax.core import Net
from fedmetanas_jax.network import MAKERS, NetworkError, load, save, taken

COMMON = {"shape": (4, 4, 1), "classes": 3, "mean": (0.5,), "std": (0.25,)}
ARGUMENTS = {
    "darts": COMMON | {"width": 2, "length": 1, "nodes": 1},
    "nasbench201": COMMON | {"width": 2, "length": 3},
    "mobilenetv3": COMMON | {"variant": "tiny"},
}
PLANS = {"darts": [[[3], [1]], [[3], [0]]], "nasbench201": [[[3], [1], [], [4], [0], [2]]], "mobilenetv3": None}
NAMES = ("a", "b", "c")


def saved(path, kind):
    """Writes a network of the kind; returns (net, images, its logits)."""
    made = MAKERS[kind](**ARGUMENTS[kind])
    image = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1)).astype(np.uint8)
    if PLANS[kind] is None:
        net = Net(*made.init(jax.random.key(0)))
        logits, _ = jax.jit(lambda image: made.apply(net.params, net.stats, image, False))(image)
    else:
        supernet, graph = made.make(PLANS[kind]), made.graph
        mix = jnp.full((len(graph.cell_types), len(graph.edges), len(graph.ops)), 0.5)
        net = Net(*supernet.init(jax.random.key(0)), mix)
        logits, _ = jax.jit(lambda image: supernet.apply(net.params, net.stats, image, mix, False))(image)
    save(path, net, kind=kind, arguments=ARGUMENTS[kind], plan=PLANS[kind], label_names=NAMES)
    return net, image, logits


@pytest.mark.parametrize("kind", MAKERS)
def test_a_saved_network_comes_back(tmp_path, kind):
    net, image, logits = saved(tmp_path / "network.npz", kind)
    network = load(tmp_path / "network.npz")
    assert jax.tree.structure(network.net) == jax.tree.structure(net)
    jax.tree.map(np.testing.assert_array_equal, network.net, net)
    np.testing.assert_allclose(network.logits(image, batch=2), logits, rtol=1e-4, atol=1e-5)
    assert network.predict(image).tolist() == np.argmax(logits, -1).tolist()
    assert network.label_names == NAMES
    assert [path.name for path in tmp_path.iterdir()] == ["network.npz"]
    assert network.logits(image[:0]).shape == (0, 3)
    with pytest.raises(NetworkError, match=r"images are uint8 \(3, 2, 4, 1\)"):
        network.logits(image[:, :2])


def test_one_image_costs_one(tmp_path):
    saved(tmp_path / "network.npz", "mobilenetv3")
    network, sizes = load(tmp_path / "network.npz"), []

    def noted(images):
        sizes.append(len(images))
        return np.zeros((len(images), 3), np.float32)

    images = np.zeros((300, 4, 4, 1), np.uint8)
    for count in (1, 2, 3, 200, 300):
        assert network._replace(apply=noted).logits(images[:count]).shape == (count, 3)
    assert sizes == [1, 2, 4, 250, 250, 250]
    np.testing.assert_array_equal(network.logits(images[0]), network.logits(images[:1])[0])
    assert network.predict(images[0]).shape == ()
    for batch in (0, -1, 1.5, True):
        with pytest.raises(NetworkError, match="it must be a whole number of at least 1"):
            network.logits(images, batch=batch)
    for other in (images[0, 0], images[..., 0], images.astype(np.float32), [[1], [1, 2]], "images"):
        with pytest.raises(NetworkError, match="images are"):
            network.logits(other)


def test_pictures_of_pil_are_taken_and_floats_are_not_guessed_at(tmp_path):
    saved(tmp_path / "network.npz", "mobilenetv3")
    network = load(tmp_path / "network.npz")
    network = network._replace(apply=lambda images: np.asarray(images, np.float32)[:, 0, :3, 0])
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 1)).astype(np.uint8)
    pictures = [Image.fromarray(x[..., 0]) for x in pixels]
    np.testing.assert_array_equal(network.logits(pictures), network.logits(pixels))
    np.testing.assert_array_equal(network.logits(pictures[0]), network.logits(pixels[0]))
    assert network.predict(pictures[0]).shape == ()
    needed = r"PIL's, RGB of 5 x 4; the network takes L of 4 x 4: image.convert\('L'\).resize\(\(4, 4\)\)"
    with pytest.raises(NetworkError, match=needed):
        network.predict(Image.new("RGB", (5, 4)))
    with pytest.raises(NetworkError, match="PIL's, P of 4 x 4"):  # whose numbers are those of colours
        network.predict([pictures[0], pictures[0].convert("P")])
    with pytest.raises(NetworkError, match=r"float32 .* takes uint8 .*, 0 to 255: of floats from 0 to 1, \(255"):
        network.predict(pixels.astype(np.float32) / 255)
    with pytest.raises(NetworkError, match=r"the network takes uint8 \[n, 4, 4, 1\], or one \[4, 4, 1\], 0 to 255$"):
        network.predict(pixels.astype(int))
    np.testing.assert_array_equal(taken((255 * (pixels / 255)).round().astype("uint8"), (4, 4, 1)), pixels)
    for shape, said in (((4, 4, 2), "arrays of 2 channels"), ((4, 4, 3), "takes RGB of 4 x 4")):
        with pytest.raises(NetworkError, match=said):
            taken(pictures[0], shape)


def test_what_is_no_network_is_named(tmp_path):
    path = tmp_path / "network.npz"
    with pytest.raises(NetworkError, match="there is no network file"):
        load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(NetworkError, match="is no network file, or a damaged one"):
        load(path)
    for header, said in (({"format": 0}, "has format 0"), ({"format": 1, "kind": "x", "arguments": {}}, "kind 'x'")):
        np.savez(path, header=np.array(json.dumps(header)))
        with pytest.raises(NetworkError, match=said):
            load(path)
