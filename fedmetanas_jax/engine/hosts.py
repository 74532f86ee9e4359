"""One run over several processes, as a cluster starts them on many hosts: what they must say to one another.

Every process runs the same programs on its own devices, by `jax.distributed` (engine/together.py joins them). The first
one leads: it alone writes the workdir, and what only one of them can know or decide (what is on its disk, that a signal
came) it tells the others through the key-value store of JAX's coordination service. In a run of one process each
function here hands back what it is given.
"""

import json
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from fedmetanas_jax.core import Tree

SLICE = 1.0  # seconds of waiting after which is looked whether another process failed
PIECE = 1 << 26  # bytes of a state that are told at once


class HostError(RuntimeError):
    """Another process of the run failed or was lost, or they cannot come together. The message is one line."""


class _Known:
    """What this process knows of the others."""

    def __init__(self):
        self.turns: Counter[str] = Counter()  # of each kind of exchange; the same on all processes
        self.failed: str | None = None  # what another process noted
        self.stopping = False  # whether all have agreed to stop


known = _Known()


def state():
    """JAX's own: process_id, num_processes, and `client`, the key-value store, to which there is no public door (orbax
    takes this one as well). What jax.process_count says would start the backend."""
    from jax._src import distributed

    return distributed.global_state


def several() -> bool:
    """Whether the run has more than one process."""
    return state().num_processes > 1


def leader() -> bool:
    """Whether this is the first process."""
    return state().process_id == 0


def agreed(value: Any) -> Any:
    """The first process's value, JSON, on all of them."""
    if not several():
        return value
    key = _turn("agreed")
    if leader():
        state().client.key_value_set(key, json.dumps(value))
    return json.loads(_wait(key))


def everyones(value: Any, name: str = "everyones") -> list:
    """The values of all processes, JSON, in their order; each waits for the last. Where two threads call this at the
    same time they must do so by different names."""
    if not several():
        return [value]
    key, store = _turn(name), state().client
    store.key_value_set(f"{key}/{state().process_id}", json.dumps(value))
    if leader():
        found = [json.loads(_wait(f"{key}/{process}")) for process in range(state().num_processes)]
        store.key_value_set(f"{key}/all", json.dumps(found))
    return json.loads(_wait(f"{key}/all"))


def meet() -> None:
    """Waits for all processes."""
    everyones(None, "meet")


def least(number: int | None, name: str) -> int | None:
    """The least of all processes' numbers; None where none has one. The name as in `everyones`."""
    there = [one for one in everyones(number, name) if one is not None]
    return min(there, default=None)


def heard(signal: int | None) -> int | None:
    """A signal that some process got, or None: the same on all of them. The first process's counts at once, another's
    at the latest when this is asked again."""
    if not several():
        return signal
    if leader():
        others = state().client.key_value_dir_get("fedmetanas_jax/signal/")
        signal = signal or next((int(number) for _, number in others), None)
    elif signal is not None:
        key = f"fedmetanas_jax/signal/{state().process_id}"
        state().client.key_value_set(key, str(signal), allow_overwrite=True)
    signal = agreed(signal)
    known.stopping = signal is not None
    return signal


def obey(signal: int | None) -> None:
    """KeyboardInterrupt, holding its number, if there is one in `heard`: on all processes."""
    if (number := heard(signal)) is not None:
        raise KeyboardInterrupt(number)


def put(x: jax.typing.ArrayLike, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, as one of all their devices. That it is the same everywhere is not looked at,
    as `device_put` would by sending it around."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda rows: x[rows])


def gathered(tree: Tree) -> Tree:
    """The tree with what is spread over the processes' devices as numpy arrays of all of it."""
    if not several():
        return tree
    from jax.experimental import multihost_utils  # here, because only such runs need it

    def whole(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        return np.asarray(x) if x.is_fully_replicated else multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


def here(tree: Tree) -> Tree:
    """The tree with its arrays on this process's first device, for work that the others have no part in."""
    if not several():
        return tree
    return jax.tree.map(lambda x, mine: jnp.asarray(mine) if isinstance(x, jax.Array) else x, tree, gathered(tree))


def told(tree: Tree, like: Tree) -> Tree:
    """The first process's pytree of arrays, as numpy; elsewhere `tree` is not read. like: its structure, shapes and
    types."""
    from jax.experimental import multihost_utils  # as above

    leaves, structure = jax.tree.flatten(like)
    sizes = [int(np.prod(x.shape, dtype=np.int64)) * x.dtype.itemsize for x in leaves]
    if leader():
        row = np.concatenate([np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in jax.tree.leaves(tree)])
    else:
        row = np.zeros(sum(sizes), np.uint8)
    # As bytes, since the others add zeros, which would turn a -0.0 into 0.0.
    pieces = [row[start : start + PIECE] for start in range(0, row.size, PIECE)]
    row = np.concatenate([np.asarray(multihost_utils.broadcast_one_to_all(piece, leader())) for piece in pieces])
    parts = np.split(row, np.cumsum(sizes)[:-1])
    return structure.unflatten(
        part.view(x.dtype).reshape(x.shape).copy() for x, part in zip(leaves, parts, strict=True)
    )


def _turn(name: str) -> str:
    """The key of the next exchange of this kind. Keys stay: a round has a few, of some bytes each."""
    known.turns[name] += 1
    return f"fedmetanas_jax/{name}/{known.turns[name]}"


def _wait(key: str) -> str:
    """What a process sets under this key. HostError once one failed."""
    while True:
        try:
            return state().client.blocking_key_value_get(key, int(1000 * SLICE))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if known.failed is not None:
            raise HostError(known.failed)
