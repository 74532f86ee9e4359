"""How a run goes about its rounds."""

from typing import NamedTuple

from fedmetanas_jax.core import Aggregate
from fedmetanas_jax.engine.round import MEAN


class Conduct(NamedTuple):
    """How a run goes about its rounds; the names are Config's."""

    rounds: int
    seed: int
    clients: int
    cohort: int
    batch: int
    epochs: int
    at_once: int  # -1: as many as the device's memory allows
    block: int
    compile_ahead: int  # -1: 0, or at the end where compiling does not pay
    client_states: str
    bn_eval: str
    eval_batch: int
    eval_every: int
    adapt_every: int
    final_adapt: bool
    checkpoint_every: int
    aggregate: Aggregate = MEAN
