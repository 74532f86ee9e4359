"""The types of the project and the shapes they carry; no logic.

Letters used for shapes everywhere: `clients` = all clients K, `cohort` = clients of one round S,
`n` = training rows a client holds (padded), `m` = its test rows, `b` = a batch, `h, w, c` = an image.
A thing is a NamedTuple of pure functions; its state goes in and comes out.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax

Array = jax.Array
Tree = Any  # a pytree of arrays


class Examples(NamedTuple):
    """Labelled images; `weight` is 0 where a row only pads to a common length."""

    image: Array  # [n, h, w, c] uint8
    label: Array  # [n] int32
    weight: Array  # [n] float32, 1 = an example, 0 = padding
    test: "Examples | None" = None  # the client's test images, for an algorithm that says that it reads them


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
    #   returned, so that whoever trains decides how to average them; `key` draws the dropout. train a [] bool array:
    #   it decides by which of the two the network goes, without dropout; where it is False, what is returned as
    #   statistics means nothing.
    momentum: float  # of the running statistics: running <- (1 - momentum) running + momentum batch
    macs: int  # multiply-adds of one image's forward pass
    head: tuple[str, ...]  # keys of `params` that make up the last linear layer (D-25)


class Supernet(NamedTuple):
    """A Model with one more argument: the weight of every candidate operation on every edge."""

    init: Callable  # key -> (params, stats)
    apply: Callable  # (params, stats, image, mix [cell types, edges, ops] float32, train) -> (logits, stats)
    #   A mix that depends on the images is a function: (cell i, what it reads [inputs, C, H, W, N]) -> (its row [edges,
    #   ops], further moments by name, which come back beside the network's where train=True)
    momentum: float
    macs: int


class Graph(NamedTuple):
    """What the cells of a search space are made of; hashable, so static under jit.

    Input i < `inputs` of a cell comes from outside, input `inputs` + j is the cell's own node j. Everything that
    has a row per edge, operation or pair has them in the order given here.
    """

    cell_types: tuple[str, ...]
    ops: tuple[str, ...]  # candidate operations of every edge
    inputs: int
    edges: tuple[tuple[int, int], ...]  # (input, node), node by node
    pairs: tuple[tuple[int, int, int], ...]  # (node, input, input): a node ends up with one of its pairs; () where
    #   every edge stays
    output: tuple[int, ...]  # the nodes that the output of a cell is made of


Plan = Sequence[Sequence[Sequence[int]]]  # [cell types][edges] -> live operations, ascending; lists of it are JSON


class SearchSpace(NamedTuple):
    """All the networks of one supernet, each by its plan."""

    graph: Graph
    cells: int  # in a row, from the stem to the head
    make: Callable  # (plan, sampled=False) -> Supernet that computes the plan's operations alone. sampled: of these,
    #   where that spares time, only what the mix does not make 0; moments of the rest are not to be read
    carry_over: Callable  # (params or stats, old plan, new plan) -> the rows that the new plan keeps
    derive: Callable  # plan -> Model: the plan's operations, each at weight 1
    spread: Callable  # (value [cell types, edges, ops], plan, params or stats, rest) -> a tree like it that broadcasts
    #   to it: the value of the operation that a number belongs to; `rest` for what belongs to none
    resized: Callable  # (**size) -> SearchSpace whose maker got these arguments instead
    size: dict = {}  # the arguments that it got that way
    reads: tuple[tuple[int, int, int], ...] = ()  # [cells] (C, H, W) of every input of a cell as its operations get it
    skips: bool = False  # whether a program made with sampled=True leaves out what the mix makes 0: a supernet's on a
    #   CPU, if clients are computed one after another


class Mask(NamedTuple):
    """What is still in the search; True = alive. Only ever shrinks."""

    op: Array  # [cell types, edges, ops] bool
    pair: Array  # [cell types, pairs] bool; no pairs where every edge stays


class Alpha(NamedTuple):
    """Architecture parameters: free logits (methods write them log alpha)."""

    op: Array  # [cell types, edges, ops] float32
    pair: Array  # [cell types, pairs] float32


class Net(NamedTuple):
    """A network somebody can use: `Algorithm.forward` serves it."""

    params: Tree
    stats: Tree  # running mean and variance of every batch norm
    mix: Tree = ()  # of a supernet; empty for a fixed architecture


class Reply(NamedTuple):
    """What a client answers to a message: all of it but `own` and `metrics` crosses the wire."""

    change: dict  # learnt minus sent, by part: "params", "stats", "alpha", ...; what was not sent counts as 0. This is
    #   what is checked, clipped and averaged; exactly 0 where the client had nothing to learn
    weight: Array  # [] n_k, or 1 where the paper averages evenly
    own: Tree  # kept by this client for its next turn
    report: Tree  # small; reaches the server client by client; usually ()
    metrics: dict  # name -> [] float32; "loss" and "image_gradients" always


class Merged(NamedTuple):
    """What the server learns of a round."""

    change: dict  # what `aggregate` made of the changes
    client: Array  # [cohort] int32, who was asked
    weight: Array  # [cohort] float32, what each one weighed; 0 = left out, and its report is not to be read
    report: Tree  # leaves [cohort, ...]


class Aggregate(NamedTuple):
    """How the changes of a cohort become one; see engine/aggregate.py."""

    apply: Callable  # (change [cohort, ...], weight [cohort], NaN = not finite, key) -> (change, weight, metrics)
    leaves_out: bool = False  # whether it may set a weight to 0; where it cannot, the round need not keep what was
    allowed: int = 0  # replies that may be left out for not being finite, in the whole run, before it stops
    by_rank: bool = False  # whether a number is judged by its rank among all clients', so that all must have learnt it
    noise: "Noise | None" = None  # of differential privacy, if there is any
    secure: "Secure | None" = None  # how clients' numbers are added up where the server is to see the sum alone


class Noise(NamedTuple):
    """What the mean of the changes is hidden in; see engine/privacy.py."""

    multiplier: float  # Z: its standard deviation is Z times what one client can add to the mean
    delta: float | None  # of the guarantee; None: 1 / clients
    stats: bool  # whether batch-norm statistics are part of it; else they are kept out


class Secure(NamedTuple):
    """What fixes the integers that clients add up; see engine/secure.py. Norms are those of clipping."""

    weights: float
    alpha: float | None
    stats: float | None
    most: float | None = None  # the largest weight of a client; None: not known yet


class Setting(NamedTuple):
    """The conditions common to every method."""

    rounds: int  # R, of the whole run: what schedules are measured against
    epochs: int  # E, local epochs a round
    batch: int  # B
    augment: Callable  # (key, image [b, h, w, c] uint8) -> the same shape and type
    share: float = 1.0  # S / K, clients of a round of all clients
    clients: int = 0  # K; 0 where it is not known, for methods that need not know it
    lr: float = 0.025  # of local SGD in round 0 (D-23)
    lr_end: float = 0.001  # in round R, half a cosine away (D-31)
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float | None = None  # largest norm of a gradient
    finetune_lr: float = 0.01  # of the plain SGD by which a client personalises a network (D-27)


# Steps of personalisation: none at all, one step, one epoch, as many epochs as a round has.
Depth = Literal["none", "step", "epoch", "epochs"]


class Algorithm(NamedTuple):
    """A federated method, written for one client. A message is all that a client learns of the server."""

    init: Callable  # key -> (server, own): what the server keeps, and what every client keeps at first, () for nothing;
    #   server.round counts rounds
    send: Callable  # (server, client [] int32, key) -> message; only arrays, since its size is the bytes down. key
    #   None: to a client that is not going to train but to use its network, so nothing is drawn
    client_update: Callable  # (message, own, Examples, key) -> Reply
    server_update: Callable  # (server, Merged) -> server
    personalize: Callable  # (message, own, Examples, key, steps [] int32) -> Net this client would use after that many
    #   of the method's own personalising steps on its own rows
    forward: Callable  # (Net, image, train) -> (logits, stats), as Model.apply
    macs: int  # of one image's forward pass
    depth: Depth = "none"  # how far the method itself personalises before a client uses its network
    least_rows: int = 1  # training rows without which a client cannot take part
    global_model: Callable | None = None  # server -> Net that serves everybody; None where there is none
    discrete_model: Callable | None = None  # server -> Net after pruning to one operation an edge
    report: Callable = lambda server: {}  # server -> dict of [] numbers for the round's record
    held: Callable | None = None  # message -> {part: tree of bool that broadcasts to the message's and the change's}:
    #   what of a part the client is given. The rest is not sent, and its change is exactly 0; None: everything is
    held_alike: bool = False  # whether that is the same for all clients of a round, as what pruning has left is
    reads_test: bool = False  # whether clients are given their test images in training, which no honest method needs
    space: SearchSpace | None = None  # that its network is of, if it is of one


class Phase(NamedTuple):
    """A stretch of rounds that runs one algorithm. A run is a list of them."""

    start: int  # its first round
    enter: Callable  # (the last phase's server, its plan, key) -> (plan, server), server None where it starts anew as
    #   the algorithm's init makes it; of the first phase (None, None, key) -> (plan, None)
    make: Callable  # plan -> Algorithm; the plan is JSON, so a resumed run makes the same program
    event: str = ""  # what entering it is called in the records
    tolerance: float | None = None  # accuracy on clients' training images that entering it may cost; where it would
    #   cost more it is put off: until the next phase or, of the last one, for a while. None: it is entered anyway
    smaller: Callable | None = None  # server -> the plan of the smallest program that computes what this server calls
    #   for. When the run moves there is the engine's affair; None: never
    carry: Callable | None = None  # (server, plan, smaller plan) -> server: what that program keeps of it
    shared: Callable | None = None  # (server, plan) -> (plan, server) of a program that computes the same of whatever
    #   network was found, more slowly: what runs share that give single networks no programs of their own
    ends: str = ""  # what entering it brings to an end, "search", where its weights start anew: what came before is
    #   then measured in full a last time, and the run's result has it under this name. "": the weights go on


class RoundState(NamedTuple):
    """Everything a run carries from round to round."""

    round: Array  # [] int32, rounds done
    seed: Array  # [] uint32, of all that is random; a value, so that runs of several seeds share a program
    server: Tree
    owns: Tree  # what clients keep, every leaf [clients, ...]
