"""What clients add up: many integers modulo 2^32, which engine/secure.py makes of a change, and a few modulo 2^128.

The few are what a record needs of clients: how many images they have and what they measured. 128 bits hold a float32
between 2^-40 and 2^60 without rounding, so the sum is that of the numbers themselves.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from fedmetanas_jax.core import Tree
from fedmetanas_jax.deploy import layout
from fedmetanas_jax.engine.report import of_images
from fedmetanas_jax.engine.secure import Summand

WIDE = 16  # bytes of one of the few
SCALE, MODULUS = 1 << 64, 1 << 128
ROWS, CLIPPED = "rows", "clipped"  # figures of every client, beside its metrics


class Vector(NamedTuple):
    """A client's summand, a mask, a masked summand or a sum."""

    narrow: np.ndarray  # uint32 [n + 1]: the change's numbers, and its weight at the end
    wide: list[int]  # 0 to 2^128 - 1, of `names`


class Form(NamedTuple):
    """What the vectors of a run's program are like."""

    change: dict  # shapes, float32
    names: tuple[str, ...]  # of the figures

    def words(self) -> int:
        """Of the narrow part."""
        return layout.size(self._parts()) // 4 + 1

    def size(self) -> int:
        """Bytes of a row."""
        return 4 * self.words() + WIDE * len(self.names)

    def digest(self) -> str:
        """SHA-256 of all names and shapes."""
        return hashlib.sha256(json.dumps([layout.digest(self._parts()), *self.names]).encode()).hexdigest()

    def of(self, summand: Summand, figures: Sequence[int]) -> Vector:
        """The vector of what a client adds, numpy int32."""
        row = layout.pack([*self._parts_of(summand.change), layout.Part(np.asarray(summand.weight, np.int32))])
        return Vector(np.frombuffer(row, np.uint32).copy(), list(figures))

    def summand(self, vector: Vector) -> Summand:
        """The inverse, of a sum."""
        whole = vector.narrow.view(np.int32)
        like = self._parts_of({name: _int32(part) for name, part in self.change.items()})
        *parts, weight = layout.unpack(whole.tobytes(), [*like, layout.Part(np.zeros((), np.int32))])
        found = dict(zip(sorted(self.change), parts, strict=True))
        return Summand({name: found[name] for name in self.change}, weight)

    def unpack(self, row: bytes | bytearray) -> Vector:
        """The vector of a row. ValueError for one of another size."""
        if len(row) != self.size():
            raise ValueError(f"{len(row)} bytes where a client adds {self.size()}")
        narrow = np.frombuffer(row, "<u4", self.words()).astype(np.uint32)
        rest = bytes(row[narrow.nbytes :])
        return Vector(narrow, [_number(rest, place) for place in range(len(self.names))])

    def _parts(self) -> list[layout.Part]:
        return self._parts_of(self.change)

    def _parts_of(self, change: dict) -> list[layout.Part]:
        return [layout.Part(change[name]) for name in sorted(change)]


def form(change: dict, metrics) -> Form:
    """Of clients whose changes have these shapes, and who measure these metrics."""
    return Form(change, (ROWS, *sorted(metrics), CLIPPED))


def pack(vector: Vector) -> bytes:
    """The row."""
    return vector.narrow.astype("<u4").tobytes() + b"".join(x.to_bytes(WIDE, "little") for x in vector.wide)


def add(to: Vector, other: Vector, sign: int) -> None:
    """to += sign other, in place; both modulo their powers of two."""
    (np.add if sign > 0 else np.subtract)(to.narrow, other.narrow, out=to.narrow)
    to.wide[:] = [(a + sign * b) % MODULUS for a, b in zip(to.wide, other.wide, strict=True)]


def figures(names: Sequence[str], rows: float, metrics: Mapping[str, float], clipped: float, cohort: int) -> list[int]:
    """What a client adds of its figures; those that are means over its images (report.of_images) times these.
    ValueError for one that so many clients could not add up."""
    values = dict(metrics) | {ROWS: rows, CLIPPED: clipped}
    found = []
    for name in names:
        value = float(values[name]) * (float(rows) if of_images(name) else 1.0)
        if not math.isfinite(value) or abs(value) * cohort >= MODULUS // (2 * SCALE):
            raise ValueError(f"its {name} is too large for a sum")  # how large is the client's affair
        found.append(round(value * SCALE) % MODULUS)
    return found


def sums(names: Sequence[str], wide: Sequence[int]) -> dict[str, float]:
    """What the figures of some clients come to."""
    signed = [x - MODULUS if x >= MODULUS // 2 else x for x in wide]
    return {name: x / SCALE for name, x in zip(names, signed, strict=True)}


def _number(row: bytes, place: int) -> int:
    return int.from_bytes(row[WIDE * place : WIDE * (place + 1)], "little")


def _int32(part: Tree) -> Tree:
    return jax.tree.map(lambda x: np.zeros(x.shape, np.int32), part)
