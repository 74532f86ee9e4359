"""The types of the project and the shapes they carry; no logic.

Letters used for shapes everywhere: `clients` = all clients K, `cohort` = clients of one round S,
`n` = training rows a client holds (padded), `m` = its test rows, `b` = a batch, `h, w, c` = an image.
A thing is a NamedTuple of pure functions; its state goes in and comes out.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

Array = jax.Array
Tree = Any  # a pytree of arrays


class Examples(NamedTuple):
    """Labelled images; `weight` is 0 where a row only pads to a common length."""

    image: Array  # [n, h, w, c] uint8
    label: Array  # [n] int32
    weight: Array  # [n] float32, 1 = an example, 0 = padding


class FederatedData(NamedTuple):
    """Every client's examples, as rows of one pool that lives on the device."""

    image: Array  # [pool, h, w, c] uint8
    label: Array  # [pool] int32
    train: Array  # [clients, n] int32, rows of the pool; rows at and past train_size repeat earlier ones
    train_size: Array  # [clients] int32, n_k
    test: Array  # [clients, m] int32, rows of the pool
    test_size: Array  # [clients] int32
    central: Array  # [q] int32, the server's test set: consecutive rows of the pool that hold every `test` row


class Model(NamedTuple):
    """A network of fixed architecture. Images enter as uint8; normalisation is part of the network."""

    init: Callable  # key -> (params, stats)
    apply: Callable  # (params, stats, image [b, h, w, c], train, key=None) -> (logits [b, classes], stats)
    #   train=False: `stats` are used and returned. train=True: the batch's own moments are used and
    #   returned, so that whoever trains decides how to average them; `key` draws the dropout.
    momentum: float  # of the running statistics: running <- (1 - momentum) running + momentum batch
    macs: int  # multiply-adds of one image's forward pass
    head: tuple[str, ...]  # keys of `params` that make up the last linear layer (D-25)


class Supernet(NamedTuple):
    """A Model with one more argument: the weight of every candidate operation on every edge."""

    init: Callable  # key -> (params, stats)
    apply: Callable  # (params, stats, image, mix [cell types=2, edges, ops] float32, train) -> (logits, stats)
    momentum: float
    macs: int


class SearchSpace(NamedTuple):
    """All the networks of one supernet. A plan, [2][edges] lists of live operations, is JSON."""

    nodes: int  # intermediate nodes of a cell; edges = nodes (nodes + 3) / 2
    make: Callable  # plan -> Supernet that computes the plan's operations alone
    carry_over: Callable  # (params or stats, old plan, new plan) -> the rows that the new plan keeps


class Mask(NamedTuple):
    """What is still in the search; True = alive. Only ever shrinks."""

    op: Array  # [cell types=2, edges, ops] bool
    pair: Array  # [cell types=2, pairs] bool


class Alpha(NamedTuple):
    """Architecture parameters: free logits (methods write them log alpha)."""

    op: Array  # [cell types=2, edges, ops] float32
    pair: Array  # [cell types=2, pairs] float32


class Net(NamedTuple):
    """A network somebody can use: `Algorithm.forward` serves it."""

    params: Tree
    stats: Tree  # running mean and variance of every batch norm
    mix: Tree = ()  # of a supernet; empty for a fixed architecture


class ClientUpdate(NamedTuple):
    """What one client sends after its local work."""

    update: Tree  # averaged over the cohort
    weight: Array  # [] n_k, or 1 where the paper averages evenly
    client_state: Tree  # kept for this client's next turn
    metrics: dict  # name -> [] float32; "loss" and "image_gradients" always


class Setting(NamedTuple):
    """The conditions common to every method."""

    rounds: int  # R, of the whole run: what schedules are measured against
    epochs: int  # E, local epochs a round
    batch: int  # B
    augment: Callable  # (key, image [b, h, w, c] uint8) -> the same shape and type
    share: float = 1.0  # S / K, clients of a round of all clients
    ahead: int = 0  # rounds between deciding on a smaller program and entering it; it is compiled meanwhile


# Steps of personalisation: none at all, one step, one epoch, as many epochs as a round has.
Depth = Literal["none", "step", "epoch", "epochs"]


class Algorithm(NamedTuple):
    """A federated method, written for one client."""

    init: Callable  # key -> (server_state, client_state); server_state.round counts rounds
    client_update: Callable  # (server_state, client_state, Examples, key) -> ClientUpdate
    server_update: Callable  # (server_state, mean update) -> server_state
    personalize: Callable  # (server_state, client_state, Examples, key, steps [] int32) -> Net this client would
    #   use after that many of the method's own personalising steps on its own rows
    forward: Callable  # (Net, image, train) -> (logits, stats), as Model.apply
    broadcast: Callable  # server_state -> what a client is sent (counted as bytes down)
    macs: int  # of one image's forward pass
    depth: Depth = "none"  # how far the method itself personalises before a client uses its network
    least_rows: int = 1  # training rows without which a client cannot take part
    global_model: Callable | None = None  # server_state -> Net that serves everybody
    discrete_model: Callable | None = None  # server_state -> Net after pruning to one operation an edge
    report: Callable = lambda server_state: {}  # server_state -> dict of [] numbers for the round's record


class Phase(NamedTuple):
    """A stretch of rounds that runs one algorithm. A run is a list of them."""

    start: int  # its first round
    enter: Callable  # (last phase's server_state, its plan), two None at the start -> (plan, server_state)
    make: Callable  # plan -> Algorithm; the plan is JSON, so a resumed run makes the same program
    event: str = ""  # what entering it is called in the records
    foresee: Callable | None = None  # server_state before -> the plan that `enter` will come to, where rounds in
    #   between do not change it: the phase's program can then be compiled before it is due


class RoundState(NamedTuple):
    """Everything a run carries from round to round."""

    round: Array  # [] int32, rounds done
    seed: Array  # [] uint32, of all that is random; a value, so that runs of several seeds share a program
    server_state: Tree
    client_states: Tree  # every leaf [clients, ...]
