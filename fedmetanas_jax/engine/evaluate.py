"""Accuracy of the network that serves everybody and of the one each client would use (methods section 12).

The server's test set holds every client's test images, so one pass over it answers for all of them.
`bn_eval` says which moments batch norm uses (D-10): "running" the averaged ones of training, "batch" those of
the images being classified, "recalibrated" the mean moments of un-augmented training images.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fedmetanas_jax.core import Algorithm, Array, Depth, Examples, FederatedData, Net, RoundState
from fedmetanas_jax.engine.mesh import ALL, OWN, STATE, on_mesh
from fedmetanas_jax.engine.round import apart, cohort, map_some, stream_key, train_examples

BN_EVAL = ("running", "batch", "recalibrated")
CALIBRATION = 2000  # images that statistics are recalibrated with (D-10)


class Correct(NamedTuple):
    """What a network makes of the server's test set."""

    correct: Array  # [q] bool, in the order of data.central
    loss: Array  # [] float32, mean cross entropy


def check_bn_eval(bn_eval: str) -> None:
    """ValueError unless it is one of BN_EVAL."""
    if bn_eval not in BN_EVAL:
        raise ValueError(f"bn_eval={bn_eval!r}: allowed are {', '.join(map(repr, BN_EVAL))}")


def recalibrate(forward: Callable, net: Net, image: Array, batch: int) -> Net:
    """The net with the mean, over batches of image [r, h, w, c], of the batches' own moments as its stats.

    Images past the last full batch are left out: the moments of a handful would count as much as a batch's.
    """
    batch = min(batch, image.shape[0])
    batches = image.shape[0] // batch
    chunks = image[: batches * batch].reshape(batches, batch, *image.shape[1:])
    moments = jax.lax.map(lambda chunk: forward(net, chunk, True)[1], chunks)
    return net._replace(stats=jax.tree.map(lambda x: jnp.mean(x, axis=0), moments))


def answers(
    forward: Callable, net: Net, image: Array, label: Array, size: Array, batch: int, train: bool
) -> tuple[Array, Array]:
    """For image [r, h, w, c] and label [r]: answered correctly, [r] bool, and the cross entropy, [r] float32.

    Only the first `size` rows are read; the answers past them repeat. The last chunk is filled up with
    repeats too and not with blanks, since with train=True it is classified by its own moments.
    """
    count = label.shape[0]
    batch = min(batch, count)
    chunks = (jnp.arange(-(-count // batch) * batch) % size).reshape(-1, batch)

    def chunk(rows: Array) -> tuple[Array, Array]:
        logits = forward(net, image[rows], train)[0].astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label[rows])
        return jnp.argmax(logits, -1) == label[rows], loss

    return jax.tree.map(lambda x: x.reshape(-1)[:count], jax.lax.map(chunk, chunks))


def make_evaluate(algorithm: Algorithm, *, batch: int, bn_eval: str) -> Callable:
    """-> evaluate(net, data, calibration_rows [r] int32 of the pool) -> Correct, jitted.

    `calibration_rows` are read when bn_eval is "recalibrated"; they may be None otherwise.
    """
    check_bn_eval(bn_eval)

    @jax.jit
    def evaluate(net: Net, data: FederatedData, calibration_rows: Array | None) -> Correct:
        if bn_eval == "recalibrated":
            net = recalibrate(algorithm.forward, net, data.image[calibration_rows], batch)
        image, label = data.image[data.central], data.label[data.central]
        correct, loss = answers(algorithm.forward, net, image, label, label.size, batch, bn_eval == "batch")
        return Correct(correct, jnp.mean(loss))

    return evaluate


@partial(jax.jit, static_argnums=(3, 4))
def calibration_rows(
    data: FederatedData, seed: Array | int, round: Array, cohort_size: int, count: int = CALIBRATION
) -> Array:
    """[count] int32: rows of the pool drawn from all training rows of that round's cohort together.

    Without replacement while there are enough (then over again in the same order); an image that two clients
    hold is there twice. A pure function of (seed, round).
    """
    chosen = cohort(seed, round, data.train.shape[0], cohort_size)
    rows = data.train[chosen]  # [cohort, n]
    held = jnp.arange(rows.shape[1]) < data.train_size[chosen, None]
    draw = jax.random.uniform(stream_key(seed, "calibration", round), rows.shape)
    order = jnp.argsort(jnp.where(held, draw, 2.0), axis=None)
    return rows.reshape(-1)[order[jnp.arange(count) % jnp.sum(held)]]


@jax.jit
def server_accuracy(correct: Array) -> Array:
    """[]: share of correct [q] that is true."""
    return jnp.mean(correct.astype(jnp.float32))


@jax.jit
def local_accuracy(correct: Array, data: FederatedData) -> Array:
    """[clients]: accuracy on each client's own test images, given correct [q] of the server's test set."""
    held = jnp.arange(data.test.shape[1]) < data.test_size[:, None]
    return jnp.sum(correct[data.test - data.central[0]] & held, axis=1) / data.test_size


@jax.jit
def summary(accuracy: Array) -> dict[str, Array]:
    """Of accuracy [clients]: "mean", "std" over clients (of the population), "worst_tenth" = mean of the
    lowest ceil(clients / 10).
    """
    worst = jnp.sort(accuracy)[: -(-accuracy.shape[0] // 10)]
    return {"mean": jnp.mean(accuracy), "std": jnp.std(accuracy), "worst_tenth": jnp.mean(worst)}


def make_personal(
    algorithm: Algorithm, *, batch: int, bn_eval: str, at_once: int, mesh: Mesh | None = None
) -> Callable:
    """-> personal(state: RoundState, clients [s], data, steps []) -> accuracy [s] after adaptation, jitted.

    Every one of `clients` int32 personalizes on its training rows for `steps` int32 steps (a value: one program
    for every depth) and answers its test rows; the state is left as it is. state.owns are the rows of
    just these clients. "recalibrated" takes the client's own training rows (the repeats that fill them up
    included). `at_once` as in make_round; on a mesh s is a multiple of its size, and a device works on the
    share whose states it holds. Randomness is a function of (seed, state.round, client), not training's.
    """
    check_bn_eval(bn_eval)

    def adapted(message, own, rows: Examples, key, steps, image: Array, label: Array, size: Array):
        net = algorithm.personalize(message, own, rows, key, steps)
        if bn_eval == "recalibrated":
            net = recalibrate(algorithm.forward, net, rows.image, batch)
        correct, _ = answers(algorithm.forward, net, image, label, size, batch, bn_eval == "batch")
        return jnp.sum(correct & (jnp.arange(label.size) < size)) / size

    def personal(state: RoundState, clients: Array, data: FederatedData, steps: Array) -> Array:
        def client(x) -> Array:
            k, own = x
            message = algorithm.send(state.server, k, stream_key(state.seed, "send", state.round, k))
            key = stream_key(state.seed, "personal", state.round, k)
            image, label = data.image[data.test[k]], data.label[data.test[k]]
            start = message, own, train_examples(data, k)
            return apart(adapted)(*start, key, steps, image, label, data.test_size[k])

        return map_some(client, (clients, state.owns), at_once)

    return jax.jit(on_mesh(personal, mesh, (STATE, OWN, ALL, ALL), OWN))


def depths(data: FederatedData, batch: int, epochs: int) -> dict[Depth, int]:
    """The steps of personalisation that local accuracy is measured after, by name; an epoch is a pass over the
    training rows in batches."""
    epoch = -(-data.train.shape[1] // batch)
    return {"none": 0, "step": 1, "epoch": epoch, "epochs": epochs * epoch}
