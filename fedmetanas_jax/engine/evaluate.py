"""Accuracy of the network that serves everybody and of the one each client would use (methods section 12).

The server's test set holds every client's test images, so one pass over it answers for all of them.
`bn_eval` says which moments batch norm uses (D-10): "running" the averaged ones of training, "batch" those of
the images being classified, "recalibrated" the mean moments of un-augmented training images, none of which counts
twice. A client's own network is made by one program and answers by the other, which all networks share.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from fedmetanas_jax import tree
from fedmetanas_jax.core import Algorithm, Array, Depth, Examples, FederatedData, Net, RoundState, Tree
from fedmetanas_jax.engine import hosts
from fedmetanas_jax.engine.mesh import ALL, OWN, STATE, devices_of, on_mesh, padded, put_data, sum_of_devices
from fedmetanas_jax.engine.round import apart, cohort, map_some, stream_key, train_examples

BN_EVAL = ("running", "batch", "recalibrated")
CALIBRATION = 2000  # images that statistics are recalibrated with (D-10)
JUDGES = 2000  # training images that what an event costs is measured on


class Correct(NamedTuple):
    """What a network makes of some images."""

    correct: Array  # [q] bool
    loss: Array  # [q] float32, cross entropy
    stats: Tree = ()  # of batch norm, where they were recalibrated for it


def check_bn_eval(bn_eval: str) -> None:
    """ValueError unless it is one of BN_EVAL."""
    if bn_eval not in BN_EVAL:
        raise ValueError(f"bn_eval={bn_eval!r}: allowed are {', '.join(map(repr, BN_EVAL))}")


class Drawn(NamedTuple):
    """Training images, by which batch norm is recalibrated or an event is judged."""

    rows: Array  # [r] int32 of the pool; where these are all there are, they go on from the first one
    distinct: Array  # [] int32: how many come before they do


def _mine(count: Array, mesh: Mesh | None) -> Array:
    """How many of `count` things that go round the devices, one to each, come to this one."""
    if mesh is None:
        return count
    return (count - jax.lax.axis_index(mesh.axis_names) + mesh.size - 1) // mesh.size


def answers(
    forward: Callable,
    net: Net,
    data: Examples | FederatedData,
    rows: Array,
    size: Array,
    batch: int,
    bn_eval: str,
    seen: Drawn | None = None,
    mesh: Mesh | None = None,
) -> tuple[Array, Array, Net]:
    """For rows [q] of the pool: answered correctly, [q] bool, the cross entropy, [q] float32, and the net with the
    statistics that it had; `seen` is read where they are recalibrated.

    Only the first `size` [] rows are read, and only the chunks that hold them are computed. The last chunk is filled up
    with repeats and not with blanks, since by "batch" it is classified by its own moments; what is returned past `size`
    means nothing.
    """
    if bn_eval == "recalibrated":
        return _recalibrated_answers(forward, net, data, rows, size, batch, seen, mesh)
    chunks = _chunks(rows, size, min(batch, len(rows)))

    def chunk(i: Array, found: Answered) -> Answered:
        return found.put(i, data, chunks[i], forward(net, data.image[chunks[i]], bn_eval == "batch")[0])

    found = jax.lax.fori_loop(0, -(-size // chunks.shape[1]), chunk, Answered.nothing(chunks))
    return *found.first(len(rows)), net


def _recalibrated_answers(
    forward: Callable,
    net: Net,
    data: Examples | FederatedData,
    rows: Array,
    size: Array,
    batch: int,
    seen: Drawn,
    mesh: Mesh | None,
) -> tuple[Array, Array, Net]:
    """`answers` by the mean, over batches of images `seen`, of the batches' own moments.

    Only distinct images count, and those past the last full batch are left out: the moments of a handful would count as
    much as a batch's. Fewer than a batch make one all the same, with what follows them; of none the net stays as it is.
    Under `on_mesh` they are this device's of `divided_in_batches`, and the mean is all devices'.

    Both go over chunks of images with one forward pass, which compiles for three quarters of what a pass for each takes
    (docs/formulations.md).
    """
    batch = min(batch, len(seen.rows))
    batches = jnp.where(seen.distinct > 0, jnp.maximum(seen.distinct // batch, 1), 0)
    whole = seen.rows[: len(seen.rows) // batch * batch].reshape(-1, batch)
    asked = _chunks(rows, size, batch)
    most = max(len(whole), len(asked))
    chunks = jnp.stack([jnp.resize(x, (most, batch)) for x in (whole, asked)])
    counts = jnp.stack([_mine(batches, mesh), -(-size // batch)])

    def turn(stats: Tree, x: tuple[Array, Array, Array]) -> tuple[Tree, Answered]:
        calibrates, chunks, count = x

        def chunk(i: Array, so_far: tuple[Tree, Answered]) -> tuple[Tree, Answered]:
            logits, moments = forward(net._replace(stats=stats), data.image[chunks[i]], calibrates)
            return tree.add(so_far[0], moments), so_far[1].put(i, data, chunks[i], logits)

        sums, found = jax.lax.fori_loop(0, count, chunk, (tree.zeros_like(stats), Answered.nothing(chunks)))
        if mesh is not None:
            sums = sum_of_devices(sums, mesh)
        mean = jax.tree.map(lambda x: x / jnp.maximum(batches, 1), sums)
        return tree.where(calibrates & (batches > 0), mean, stats), found

    stats, found = jax.lax.scan(turn, net.stats, (jnp.array([True, False]), chunks, counts))
    return *tree.take(found, 1).first(len(rows)), net._replace(stats=stats)


class Answered(NamedTuple):
    """What was found for chunks of rows, [chunks, batch]."""

    correct: Array  # bool
    loss: Array  # float32, cross entropy

    @classmethod
    def nothing(cls, chunks: Array) -> "Answered":
        """Yet, for any of them."""
        return cls(jnp.zeros(chunks.shape, bool), jnp.zeros(chunks.shape))

    def put(self, i: Array, data: Examples | FederatedData, rows: Array, logits: Array) -> "Answered":
        """With these logits [batch, classes] for rows [batch] of the pool, which are chunk i."""
        label, logits = data.label[rows], logits.astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return tree.put(self, i, Answered(jnp.argmax(logits, -1) == label, loss))

    def first(self, count: int) -> tuple[Array, Array]:
        """Of the first rows, [count]."""
        return self.correct.reshape(-1)[:count], self.loss.reshape(-1)[:count]


def _chunks(rows: Array, size: Array, batch: int) -> Array:
    """[chunks, batch] of rows [q], the first `size` [] of them over and over."""
    return rows[jnp.arange(-(-len(rows) // batch) * batch) % jnp.maximum(size, 1)].reshape(-1, batch)


def make_evaluate(algorithm: Algorithm, *, batch: int, bn_eval: str, mesh: Mesh | None = None) -> Callable:
    """-> evaluate(net, data, rows [q], size [], calibration: Drawn | None) -> Correct of the first `size` rows, jitted.

    rows: int32 rows of the pool. calibration is read when bn_eval is "recalibrated", and may be None otherwise; where
    none of it is distinct, the net's stats stay as they are: it was recalibrated before. On a mesh (see `dividing`)
    every device answers a share of `rows`, as `divided` deals them, and takes the moments of a share of the
    calibration, as `divided_in_batches` does.
    """
    check_bn_eval(bn_eval)
    recalibrates = bn_eval == "recalibrated"

    def share(net: Net, data: FederatedData, rows: Array, size: Array, calibration: Drawn | None) -> Correct:
        given = data, rows, _mine(size, mesh), batch, bn_eval, calibration, mesh
        *found, net = answers(algorithm.forward, net, *given)
        return Correct(*found, net.stats if recalibrates else ())

    drawn = Drawn(OWN, ALL) if recalibrates else ALL
    return jax.jit(on_mesh(share, mesh, (ALL, ALL, OWN, ALL, drawn), Correct(OWN, OWN, ALL)))


def dividing(mesh: Mesh | None, *, batch: int, bn_eval: str) -> Mesh | None:
    """The mesh, if its devices can share an evaluation and batch norm still sees the batches that one device would
    make; else None, and each device does the whole."""
    whole = bn_eval == "running" or (bn_eval == "recalibrated" and mesh and CALIBRATION % (mesh.size * batch) == 0)
    return mesh if whole else None


def divided(rows: Array, mesh: Mesh | None) -> Array:
    """rows [q] -> [q'] on the devices, which take them in turn: of two, the first has rows 0, 2, 4 ... Repeats fill up
    the last shares."""
    devices = devices_of(mesh)
    rows = np.resize(np.asarray(rows), padded(len(rows), mesh))
    return put_data(rows.reshape(-1, devices).T.reshape(-1), mesh, OWN)


def divided_in_batches(drawn: Drawn, mesh: Mesh | None, batch: int) -> Drawn:
    """drawn on the devices, which take batches in turn: of two, the first has batches 0, 2, 4 ..."""
    devices = devices_of(mesh)
    rows = np.asarray(drawn.rows)
    if devices > 1:
        rows = rows.reshape(-1, devices, batch).swapaxes(0, 1).reshape(-1)
    return Drawn(put_data(rows, mesh, OWN), jnp.int32(drawn.distinct))


def none_of(drawn: Drawn | None) -> Drawn | None:
    """For a net that was recalibrated by them before."""
    return None if drawn is None else drawn._replace(distinct=jnp.int32(0))


def in_order(found: Array, mesh: Mesh | None) -> np.ndarray:
    """What was found for the rows of `divided`, in the order they had before."""
    devices = devices_of(mesh)
    return np.asarray(hosts.gathered(found)).reshape(devices, -1).T.reshape(-1)


@partial(jax.jit, static_argnums=(3, 4))
def draw(data: FederatedData, seed: Array | int, round: Array, cohort_size: int, count: int = CALIBRATION) -> Drawn:
    """`count` rows of the pool drawn from all training rows of that round's cohort together.

    Without replacement while there are enough (then over again in the same order); an image that two clients
    hold is there twice. A pure function of (seed, round).
    """
    chosen = cohort(seed, round, data.train.shape[0], cohort_size)
    rows = data.train[chosen]  # [cohort, n]
    held = jnp.arange(rows.shape[1]) < data.train_size[chosen, None]
    number = jax.random.uniform(stream_key(seed, "calibration", round), (rows.size,))
    number = number[jnp.cumsum(held) - 1].reshape(rows.shape)  # one for each row held, however long the padding
    order = jnp.argsort(jnp.where(held, number, 2.0), axis=None)
    there = jnp.sum(held)
    return Drawn(rows.reshape(-1)[order[jnp.arange(count) % there]], jnp.minimum(there, count))


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


@jax.jit
def local_summary(correct: Array, data: FederatedData) -> dict[str, Array]:
    """`summary` of `local_accuracy`."""
    return summary(local_accuracy(correct, data))


def make_personal(algorithm: Algorithm, *, at_once: int, mesh: Mesh | None = None) -> Callable:
    """-> personal(state: RoundState, clients [s], data, steps [], first []) -> Net, leaves [s, ...]: what each of
    `clients` int32 makes of the server's message in `steps` int32 steps on its training rows (a value: one program for
    every depth), jitted. The state is left as it is.

    state.owns are more clients' states, of which these have s rows from `first` on. `at_once` as in make_round. On a
    mesh s is a multiple of its size, and a device works on s / size clients whose states it holds, from `first` on of
    its share. Randomness is a function of (seed, state.round, client), not training's.
    """

    def personal(state: RoundState, clients: Array, data: FederatedData, steps: Array, first: Array) -> Net:
        def client(x) -> Net:
            k, own = x
            message = algorithm.send(state.server, k, None)
            key = stream_key(state.seed, "personal", state.round, k)
            return apart(algorithm.personalize)(message, own, train_examples(data, k), key, steps)

        owns = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, len(clients)), state.owns)
        return map_some(client, (clients, owns), at_once)

    return jax.jit(on_mesh(personal, mesh, (STATE, OWN, ALL, ALL, ALL), OWN))


def depths(data: FederatedData, batch: int, epochs: int) -> dict[Depth, int]:
    """The steps of personalisation that local accuracy is measured after, by name; an epoch is a pass over the
    training rows in batches."""
    epoch = -(-data.train.shape[1] // batch)
    return {"none": 0, "step": 1, "epoch": epoch, "epochs": epochs * epoch}
