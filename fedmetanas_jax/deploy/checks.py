"""What the server makes sure of before it takes a client's reply. It believes nothing that it was sent."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax.core import Tree
from fedmetanas_jax.deploy import layout
from fedmetanas_jax.deploy.wire import Message
from fedmetanas_jax.options import LARGEST_FLOAT


class Refused(Exception):
    """A reply that is not taken. One line, which the client is told, too."""


class Wanted(NamedTuple):
    """What a reply must be like."""

    run: str
    round: int
    change: dict  # shapes
    report: Tree  # shapes
    given: dict | None  # what of the parts travels, see layout
    layout: str  # digest
    metrics: frozenset[str]
    most_weight: float
    max_norm: float

    def parts(self) -> list[layout.Part]:
        """Of the row."""
        return layout.of_reply(self.change, self.report, self.given)


class Exchange(NamedTuple):
    """A reply of another kind, which is good if `check` says so."""

    kind: str
    round: int
    check: Callable[[Message], Any]  # -> what it holds. Refused


class Answer(NamedTuple):
    """A reply that was found good."""

    change: dict
    report: Tree
    weight: np.float32
    metrics: dict[str, np.float32]
    own: int  # the round of the state that the client went on from


def reply(message: Message, wanted: Wanted) -> Answer:
    """The reply in a message. Refused: with what is wrong with it."""
    fields = message.fields
    if fields["run"] != wanted.run:
        raise Refused("it is of another run (another config)")
    if fields["round"] != wanted.round:
        raise Refused(f"it is of round {fields['round']}; round {wanted.round} was asked for")
    if fields["layout"] != wanted.layout:
        raise Refused("its arrays have another layout than this run's program makes")
    try:
        change, report = layout.to_reply(message.payload, wanted.change, wanted.report, wanted.given)
    except ValueError as error:
        raise Refused(str(error)) from None
    _check_finite({"change": change, "report": report})
    norm = math.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in jax.tree.leaves(change)))
    if norm > wanted.max_norm:
        raise Refused(f"the norm of its change is {norm:.4g}; at most {wanted.max_norm:g} is taken (--max_norm)")
    weight = _number("weight", fields["weight"])
    if not 0 < weight <= wanted.most_weight:
        raise Refused(f"its weight is {weight:g}; it must be above 0 and at most {wanted.most_weight:g}")
    if not 0 <= fields["own"] < wanted.round:
        raise Refused(f"it goes on from round {fields['own']}, which is not before round {wanted.round}")
    return Answer(change, report, weight, _metrics(fields["metrics"], wanted.metrics), fields["own"])


def judged(fields: Mapping, round: int, most: int) -> dict:
    """What a client counted of its images, of which it can have `most`. Refused: as `reply`."""
    if fields["round"] != round:
        raise Refused(f"it is of round {fields['round']}; round {round} was asked for")
    right, count = (fields["before"], fields["after"]), fields["count"]
    if not 0 < count <= most or not all(0 <= one <= count for one in right):
        raise Refused(f"it counts {right[0]} and {right[1]} right of {count} images; it can have 1 to {most}")
    return dict(fields)


def _check_finite(found: dict) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(found):
        if jnp.issubdtype(x.dtype, jnp.inexact) and not np.all(np.isfinite(x)):
            raise Refused(f"its {jax.tree_util.keystr(path)[:200]} is not finite")


def _metrics(found: Mapping, names: frozenset[str]) -> dict[str, np.float32]:
    if found.keys() != names:
        raise Refused(f"its metrics are not {', '.join(sorted(names))}")
    return {name: _number(name, found[name]) for name in sorted(names)}


def _number(name: str, value) -> np.float32:
    # A float32 that is too large for one would be infinite.
    if type(value) is not float or not math.isfinite(value) or abs(value) > LARGEST_FLOAT:
        raise Refused(f"its {name} is no finite number")
    return np.float32(value)
