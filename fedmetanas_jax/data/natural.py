"""A federation that a data set brings along: every client has the images that are its own, as in FEMNIST."""

import logging

import numpy as np

from fedmetanas_jax.data.partition import Partition
from fedmetanas_jax.options import brief

SHOWN = 10  # names in one line
_SAMPLE, _TRAIN, _TEST = 1, 2, 3  # what a stream of random numbers is for

_log = logging.getLogger(__name__)


def natural(train_client: np.ndarray, test_client: np.ndarray, *, clients: int, seed: int) -> tuple[Partition, list]:
    """Everybody's own rows, and the clients' names in the order in which they are numbered.

    train_client, test_client: [n] and [m], integers or strings, whose an image is. Who has no training images could
    learn nothing, and of who has no test images no local accuracy could be measured: both are left out, which a warning
    says. Where more than `clients` are left, a sample of so many is drawn by the seed. Clients are in the order of
    their names; a client's rows, in random order, do not depend on who else takes part.

    Raises ValueError where there are fewer.
    """
    names = np.intersect1d(train_client, test_client)
    untrained, untested = np.setdiff1d(test_client, train_client), np.setdiff1d(train_client, test_client)
    lacking = [_lacking(kind, lost) for kind, lost in (("training", untrained), ("test", untested)) if len(lost)]
    if len(names) < clients:
        there = f"{len(names)} clients have training and test images of their own"
        raise ValueError("; ".join([f"clients is {clients}, but {there}", *lacking]))
    if lacking:
        _log.warning("left out: %s", "; ".join(lacking))
    places = np.arange(len(names))
    if clients < len(names):
        places = np.sort(np.random.default_rng([seed, _SAMPLE]).choice(places, clients, replace=False))
    chosen = names[places].tolist()
    sides = []
    for ids, purpose in ((train_client, _TRAIN), (test_client, _TEST)):
        held = _held(ids)
        keyed = zip(places.tolist(), chosen, strict=True)
        sides.append([np.random.default_rng([seed, purpose, place]).permutation(held[own]) for place, own in keyed])
    return Partition(*sides), chosen


def _held(ids: np.ndarray) -> dict:
    """The rows of every name, ascending."""
    names, place, count = np.unique(ids, return_inverse=True, return_counts=True)
    rows = np.split(np.argsort(place, kind="stable"), np.cumsum(count)[:-1])
    return dict(zip(names.tolist(), rows, strict=True))


def _lacking(kind: str, names: np.ndarray) -> str:
    """'2 clients without test images (f7, f9)'"""
    shown = ", ".join(brief(name, 30) for name in names[:SHOWN].tolist())
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} client{'s' if len(names) > 1 else ''} without {kind} images ({shown}{more})"
