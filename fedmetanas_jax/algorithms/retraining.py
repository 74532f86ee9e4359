"""What a method does that trains the network it found again from scratch: a last phase of FedAvg."""

from collections.abc import Callable

from fedmetanas_jax.algorithms import found
from fedmetanas_jax.core import Phase, SearchSpace, Setting

MOST = {"width": 65_536, "cells": 1_000}  # as of a task's network in config.py, which says why


def retrain(
    space: SearchSpace,
    setting: Setting,
    start: int,
    decode: Callable,
    *,
    width: int | None = None,
    cells: int | None = None,
) -> Phase:
    """From round `start` to the last one, federated averaging of a network of `space` from fresh weights.

    Nothing of the search survives but the network's plan: weights, statistics, optimizers and the schedule of the
    local SGD start anew.

    Paper: McMahan et al., AISTATS 2017

    Args:
      decode: the search's server -> the plan of the network it found.
      width, cells: the network's own size; None: the space's. ValueError where the space has no such size.

    ValueError where `start` leaves no round before it or after it.
    """
    if not 0 < start < setting.rounds:
        raise ValueError(
            f"of {setting.rounds} rounds the search takes {start} and training from scratch the rest; both must be at "
            "least 1"
        )
    size = {name: value for name, value in (("width", width), ("cells", cells)) if value is not None}
    if wrong := [name for name, value in size.items() if not 1 <= value <= MOST[name]]:
        raise ValueError(
            f"retrain_{wrong[0]}, of the network to train from scratch, is {size[wrong[0]]}; it must be 1 to "
            f"{MOST[wrong[0]]}"
        )
    size = {"length" if name == "cells" else name: value for name, value in size.items()}
    sized, rest = space.resized(**size), setting._replace(rounds=setting.rounds - start)

    def enter(server, plan, key):
        return decode(server), None

    return found.training(sized, rest, start, enter, "retrain", ends="search", show=False)
