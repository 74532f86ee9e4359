"""A Model small enough for hand calculation: one or two layers on 8x8x1 images, one running statistic."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax import local, tree
from fedmetanas_jax.core import Examples, Merged, Model, Reply

PIXELS = 64

# Compile time is most of a test's time here, and the machine code need not be fast.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@lru_cache  # equal arguments, equal functions: what is compiled with them is shared between tests
def toy_model(classes=3, hidden=0, centred=False, momentum=0.1) -> Model:
    """Softmax regression, or a tanh layer of `hidden` units before it.

    The statistic is the mean image. `centred` subtracts it, the batch's in training, so that logits then
    depend on the whole batch as they do under batch norm.
    """
    sizes = [PIXELS, hidden, classes] if hidden else [PIXELS, classes]

    def init(key):
        keys = jax.random.split(key, len(sizes))
        params = {
            f"layer{i}": {
                "kernel": 0.3 * jax.random.normal(keys[i], (sizes[i], sizes[i + 1])),
                "bias": jnp.zeros(sizes[i + 1]),
            }
            for i in range(len(sizes) - 1)
        }
        return params, {"mean": jnp.zeros(PIXELS)}

    def apply(params, stats, image, train, key=None):
        x = image.reshape(len(image), PIXELS).astype(jnp.float32) / 255
        stats = {"mean": jnp.where(train, jnp.mean(x, axis=0), stats["mean"])}
        if centred:
            x = x - stats["mean"]
        for i, layer in enumerate(params.values()):
            x = jnp.tanh(x) if i else x
            x = x @ layer["kernel"] + layer["bias"]
        return x, stats

    macs = sum(a * b for a, b in zip(sizes, sizes[1:], strict=False))
    return Model(init, apply, momentum, macs, head=(f"layer{len(sizes) - 2}",))


def model_loss(model: Model):
    """The loss that `local.fit` and `maml` take."""

    def loss(params, stats, batch, key):
        logits, moments = model.apply(params, stats, batch.image, True, key)
        value = local.cross_entropy(logits, batch.label, batch.weight)
        return value, (moments, local.accuracy(logits, batch.label, batch.weight))

    return loss


def ask(algorithm, server, own, data, key, client=0) -> Reply:
    """What a client replies to the server's message."""
    return algorithm.client_update(algorithm.send(server, jnp.int32(client), key), own, data, key)


@jax.jit
def merged(*replies: Reply) -> Merged:
    """What the server learns of these replies of clients 0, 1, ...: their weighted mean."""
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *replies)
    mean = tree.weighted_mean(stacked.change, stacked.weight)
    return Merged(mean, jnp.arange(len(replies), dtype=jnp.int32), stacked.weight, stacked.report)


def learnt(server, reply: Reply) -> dict:
    """Where a client came to: what the server had, and the reply's change."""
    return {part: tree.add(getattr(server, part), change) for part, change in reply.change.items()}


def examples(n, size=None, classes=3, seed=0) -> Examples:
    """n rows of random images, the first `size` of them real, the others repeats of those."""
    size = n if size is None else size
    rng = np.random.default_rng(seed)
    rows = np.arange(n) % max(size, 1)
    image = rng.integers(0, 256, (n, 8, 8, 1), dtype=np.uint8)[rows]
    label = rng.integers(0, classes, n)[rows]
    weight = (np.arange(n) < size).astype(np.float32)
    return Examples(jnp.asarray(image), jnp.asarray(label, jnp.int32), jnp.asarray(weight))


def unchanged(key, image):
    """No augmentation."""
    return image


def close(a, b, atol=1e-6):
    """Asserts that two pytrees have equal structure and, to float tolerance, equal leaves."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol)


def same(a, b):
    """Asserts equal structure and equal bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
