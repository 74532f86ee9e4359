"""Pytrees as rows of bytes: little-endian leaves one after another, in the order of their tree.

Both sides know the shapes from their own program, so none are sent; a digest of them tells whether they agree. Of a
part that comes with a mask, the numbers where it holds alone are in the row.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from fedmetanas_jax.core import Algorithm, Tree


class Part(NamedTuple):
    """A tree of arrays, or of their shapes, and what of it travels."""

    tree: Tree
    given: Tree | None = None  # trees of bool that broadcast to the tree's leaves; None: everything


def digest(parts: Sequence[Part]) -> str:
    """SHA-256 of the names, types and shapes of all leaves."""
    leaves = jax.tree_util.tree_leaves_with_path([part.tree for part in parts])
    names = [[jax.tree_util.keystr(path), str(np.dtype(x.dtype)), list(x.shape)] for path, x in leaves]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def size(parts: Sequence[Part]) -> int:
    """Bytes of their row."""
    return sum(
        (int(x.size) if here is None else int(here.sum())) * np.dtype(x.dtype).itemsize for x, here in _leaves(parts)
    )


def pack(parts: Sequence[Part]) -> bytes:
    """The row."""
    return b"".join((np.asarray(x) if here is None else np.asarray(x)[here]).tobytes() for x, here in _leaves(parts))


def unpack(row: bytes | bytearray, parts: Sequence[Part]) -> list[Tree]:
    """The trees of a row; `parts` hold their shapes. What did not travel is 0. ValueError for a row of another size,
    and for a bool that is none."""
    if len(row) != size(parts):
        raise ValueError(f"{len(row)} bytes where the layout has {size(parts)}")
    found, place = [], 0
    for x, here in _leaves(parts):
        kind = np.dtype(x.dtype)
        count = int(x.size) if here is None else int(here.sum())
        values = np.frombuffer(row, np.uint8, count * kind.itemsize, place)
        place += values.size
        if kind == np.bool_ and np.any(values > 1):
            raise ValueError("a bool that is neither 0 nor 1")
        values = values.view(kind)
        if here is None:
            leaf = values.reshape(x.shape)
        else:
            leaf = np.zeros(x.shape, kind)
            leaf[here] = values
        found.append(leaf)
    trees, start = [], 0
    for part in parts:
        structure = jax.tree.structure(part.tree)
        trees.append(jax.tree.unflatten(structure, found[start : start + structure.num_leaves]))
        start += structure.num_leaves
    return trees


def of_message(message: Tree, given: dict | None) -> list[Part]:
    """A message's parts; those that a client is given in part come last, since what says which part comes first."""
    if given is None:
        return [Part(message)]
    parts = message._asdict()
    whole = {name: x for name, x in parts.items() if name not in given}
    return [Part(whole), *(Part(parts[name], given[name]) for name in given)]


def to_message(row: bytes | bytearray, like: Tree, algorithm: Algorithm, held) -> tuple[Tree, dict | None]:
    """The message in a row, and what the client was given of it. `held` is the algorithm's, jitted. ValueError as
    `unpack`."""
    if algorithm.held is None:
        return unpack(row, of_message(like, None))[0], None
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    first = of_message(like, dict.fromkeys(_held_names(algorithm, like)))[0]
    begun = nothing._replace(**unpack(row[: size([first])], [first])[0])
    given = {name: jax.tree.map(np.asarray, mask) for name, mask in held(begun).items()}
    whole, *rest = unpack(row, of_message(like, given))
    return like._replace(**whole, **dict(zip(given, rest, strict=True))), given


def _held_names(algorithm: Algorithm, like: Tree) -> list[str]:
    return list(jax.eval_shape(algorithm.held, like))


def of_reply(change: dict, report: Tree, given: dict | None) -> list[Part]:
    """What of a reply crosses the network in a row, beside its few numbers."""
    given = given or {}
    return [*(Part(change[name], given.get(name)) for name in sorted(change)), Part(report)]


def to_reply(row: bytes | bytearray, change: dict, report: Tree, given: dict | None) -> tuple[dict, Tree]:
    """The change and the report in a row; those given hold their shapes. ValueError as `unpack`."""
    *changes, report = unpack(row, of_reply(change, report, given))
    found = dict(zip(sorted(change), changes, strict=True))
    return {name: found[name] for name in change}, report


def _leaves(parts: Sequence[Part]):
    """(leaf, mask of its shape or None) of all parts, in order."""
    for part in parts:
        leaves = jax.tree.leaves(part.tree)
        masks = [None] * len(leaves) if part.given is None else jax.tree.leaves(part.given)
        for x, here in zip(leaves, masks, strict=True):
            yield x, None if here is None else np.broadcast_to(np.asarray(here), x.shape)
