"""One federated round as one compiled program; knows no algorithm by name.

    cohort, keys <- (seed, round)      map over the cohort: algorithm.send, gather rows, algorithm.client_update
    aggregate the changes              algorithm.server_update       put back what the cohort's clients keep

Here live jit, vmap, shard_map, donation and the choice of clients. The server and the data are replicated on
every device of a mesh; what is divided is the cohort's work and where clients' own states are kept.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from fedmetanas_jax import tree
from fedmetanas_jax.core import Aggregate, Algorithm, Array, Examples, FederatedData, Merged, Reply, RoundState, Tree
from fedmetanas_jax.engine import aggregate as aggregates
from fedmetanas_jax.engine import client_states, privacy, secure
from fedmetanas_jax.engine.mesh import ALL, STATE, on_mesh, padded

# Append only: the place is the salt.
STREAMS = ("init", "cohort", "train", "personal", "calibration", "send", "aggregate", "phase")
MEAN = aggregates.mean()


def stream_key(seed: Array | int, stream: str, *numbers) -> Array:
    """The key of one of STREAMS at these numbers (a round, a client): a pure function, nothing is carried."""
    key = jax.random.fold_in(jax.random.key(seed), STREAMS.index(stream))
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def client_key(seed: Array | int, round: Array, client: Array) -> Array:
    """The key of a client's work in a round, whatever its place in the cohort."""
    return stream_key(seed, "train", round, client)


def cohort(seed: Array | int, round: Array, clients: int, size: int) -> Array:
    """[size] int32: the clients of a round, uniform without replacement, a pure function of (seed, round)."""
    if not 1 <= size <= clients:
        raise ValueError(f"cohort of {size}: allowed are 1 to the {clients} clients there are")
    everyone = jnp.arange(clients, dtype=jnp.int32)
    return jax.random.permutation(stream_key(seed, "cohort", round), everyone)[:size]


def init_state(
    algorithm: Algorithm, seed: int, clients: int, mesh: Mesh | None = None, hosted: bool = False
) -> RoundState:
    """The state before round 0; every client starts from the one `own` that init returns.

    On a mesh clients' own states are filled up to equal shares and divided; `hosted` ones are numpy arrays.
    """

    def init(seed: Array) -> RoundState:
        server, own = algorithm.init(stream_key(seed, "init"))
        owns = own if hosted else everyones(own, padded(clients, mesh))
        return RoundState(jnp.zeros((), jnp.int32), seed, server, owns)

    spec = STATE._replace(owns=ALL) if hosted else STATE
    where = None if mesh is None else RoundState(*(NamedSharding(mesh, part) for part in spec))
    state = jax.jit(init, out_shardings=where)(jnp.uint32(seed))
    if not hosted:
        return state
    return state._replace(owns=jax.tree.map(lambda x: np.stack([x] * clients), state.owns))


def everyones(own: Tree, rows: int) -> Tree:
    """The state of one client as that of all: leaves [...] -> [rows, ...]."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *jnp.shape(x))), own)


def state_shapes(algorithm: Algorithm, clients: int, mesh: Mesh | None = None, hosted: bool = False) -> RoundState:
    """`init_state` as a template to restore into: ShapeDtypeStructs, and empty numpy arrays where hosted."""
    shapes = jax.eval_shape(lambda: init_state(algorithm, 0, padded(clients, mesh)))
    if not hosted:
        return shapes
    return shapes._replace(owns=jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes.owns))


def train_examples(data: FederatedData, client: Array, test: bool = False) -> Examples:
    """The training rows of one client, [n, h, w, c], weight 0 past its train_size; with its test rows, if asked for."""
    mine = _examples(data, data.train[client], data.train_size[client])
    return mine._replace(test=_examples(data, data.test[client], data.test_size[client])) if test else mine


def _examples(data: FederatedData, rows: Array, size: Array) -> Examples:
    weight = (jnp.arange(rows.shape[0]) < size).astype(jnp.float32)
    return Examples(data.image[rows], data.label[rows], weight)


def apart(function: Callable) -> Callable:
    """The function, compiled apart from what surrounds it.

    Without the fences XLA moves arithmetic between a client's work and the loop, block or device share it
    stands in, and the last bits of a client's update would depend on these.
    """

    def fenced(*args):
        return jax.lax.optimization_barrier(function(*jax.lax.optimization_barrier(args)))

    return fenced


def map_some(function: Callable, xs: Tree, at_once: int) -> Tree:
    """function(x) for every row x of xs, leaves [s, ...] -> leaves [s, ...], in that order.

    at_once: 0 = all in one vmap, 1 = one after another, k = k at a time (a remainder that k leaves is a
    second copy of the program to compile). ValueError below 0.
    """
    if at_once < 0:
        raise ValueError(f"at_once={at_once}: allowed are 0 (all), 1 (one after another) and k at a time")
    size = len(jax.tree.leaves(xs)[0])
    if at_once == 0 or 1 < size <= at_once:
        return jax.vmap(function)(xs)
    return jax.lax.map(function, xs, batch_size=None if at_once == 1 else at_once)


def map_clients(function: Callable, xs: Tree, at_once: int, mesh: Mesh | None) -> Tree:
    """`map_some`; under `on_mesh` each device takes an equal share of the rows and gets all results.

    Where they do not divide, some rows at the end are done twice.
    """
    if mesh is None:
        return map_some(function, xs, at_once)
    size = len(jax.tree.leaves(xs)[0])
    share = -(-size // mesh.size)
    mine = (jax.lax.axis_index("clients") * share + jnp.arange(share)) % size
    gathered = jax.lax.all_gather(map_some(function, tree.take(xs, mine), at_once), "clients", tiled=True)
    return jax.tree.map(lambda x: x[:size], gathered)


def ask(algorithm: Algorithm, server: Tree, own: Tree, data: FederatedData, seed, round, client: Array) -> Reply:
    """What a client replies to the server's message of this round, on its own training rows."""
    # `send` is part of what is mapped over clients, so what is the same for all of them exists once.
    message = algorithm.send(server, client, stream_key(seed, "send", round, client))
    work = apart(algorithm.client_update)
    rows = train_examples(data, client, algorithm.reads_test)
    reply = work(message, own, rows, client_key(seed, round, client))
    if algorithm.held is None:
        return reply
    return reply._replace(metrics=reply.metrics | traffic_of(algorithm.held(message), message, reply))


def learn(
    algorithm: Algorithm,
    aggregate: Aggregate,
    server: Tree,
    clients: Array,
    change: Tree,
    weight: Array,
    report: Tree,
    seed: Array | int,
    round: Array,
) -> tuple[Tree, Array, dict]:
    """What the server makes of replies, leaves [cohort, ...], of `clients` [cohort] -> (server, weight, metrics) as
    the aggregate left them. Where it left everybody out, the server stays as it was, but for its round; not so where it
    adds noise, without which that would show.

    UsageError for an aggregate that is wrong for the method; AssertionError for a method that changes structure,
    shapes or types of its server.
    """
    aggregates.check(aggregate, algorithm, report)
    change, weight, more = aggregate.apply(change, weight, stream_key(seed, "aggregate", round))
    private = aggregate.noise is not None
    told = jnp.ones_like(weight) if private else weight  # who was left out of a private mean must not show
    moved = algorithm.server_update(server, Merged(change, clients, told, report))
    # A method that changes the form of what it keeps would fail far from where it does so.
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, server, custom_message="server_update changed the server")
    if private:
        moved = privacy.plausible(moved)
    elif aggregate.leaves_out:
        moved = tree.where(jnp.any(weight > 0), moved, server._replace(round=moved.round))
    return moved, weight, more


def traffic_of(held: dict, message: Tree, reply: Reply) -> dict[str, Array]:
    """`traffic` of a client that is given, and answers, what it holds alone."""

    def absent(part: str, whole: Tree) -> Array:
        # One of `here`, which broadcasts to x, stands for several numbers of x.
        def of_one(here: Array, x: Array) -> Array:
            return jnp.sum(~here) * (x.size // here.size * x.dtype.itemsize)

        return sum(jax.tree.leaves(jax.tree.map(of_one, held[part], whole)))

    down = tree.nbytes(message) - sum(absent(part, getattr(message, part)) for part in held)
    up = tree.nbytes((reply.change, reply.report)) - sum(absent(part, reply.change[part]) for part in held)
    return {"bytes_up": up.astype(jnp.int32), "bytes_down": down.astype(jnp.int32)}


def traffic(algorithm: Algorithm, server: Tree, replies: Reply) -> dict[str, int]:
    """bytes_up, bytes_down: the sizes of what one client sends and is sent in a round (methods section 12.2)."""
    message = jax.eval_shape(lambda: algorithm.send(server, jnp.int32(0), jax.random.key(0)))
    one = jax.eval_shape(lambda: tree.take((replies.change, replies.report), 0))
    return {"bytes_up": tree.nbytes(one), "bytes_down": tree.nbytes(message)}


def make_round(
    algorithm: Algorithm,
    *,
    cohort_size: int,
    at_once: int,
    mesh: Mesh | None = None,
    block: int = 1,
    hosted: bool = False,
    aggregate: Aggregate = MEAN,
) -> Callable:
    """-> step(state: RoundState, data: FederatedData, stop [] int32) -> (state, metrics), jitted.

    It runs the rounds state.round ... stop-1, at most `block` of them, in one dispatch; `stop` is to lie past
    state.round (a block of 1 is one round and does not read it). The state given is donated, so gone after.

    metrics: name -> [block, cohort] of what the clients measured, "client" their ids int32, "rows" the training images
    that they hold int32, "finite" bool (all a client sends, keeps and measures is a number), "bytes_up" and
    "bytes_down" int32 (`traffic`, unless the clients measure them); and name -> [block] of algorithm.report on the
    server after the round. Rows past the rounds run are zero.

    A client whose weight the aggregate sets to 0 keeps what it had. Where that is the whole cohort, so does the
    server, but for its round, unless the aggregate adds noise.

    hosted: the given and the returned state.owns are the rows of the round's cohort alone, for clients whose states
    stay on the host; a block is then one round.

    A mesh takes the changes in the cohort's order, as one device does, so it adds no rounding of its own.
    The same bits come out where the clients are worked on in the same groups (always for at_once=1), as far as XLA
    compiles a client's work alike on one device and on several: a supernet's it did on one kind of CPU, not on another.
    ValueError for a block below 1 and, at the first call, for a cohort or an `at_once` that cannot be and for
    a name that two of the metrics use; UsageError there for an aggregate that is wrong for the method; AssertionError
    for a method that changes structure, shapes or types of its server or of what clients keep.
    """
    if block < 1:
        raise ValueError(f"block={block}: a dispatch runs at least 1 round")
    if hosted and block > 1:
        raise ValueError(f"block={block}: with clients' states on the host a dispatch runs 1 round")

    # Jitted in itself so that it is traced once, though its shapes and its body are both asked for below.
    @jax.jit
    def one_round(state: RoundState, data: FederatedData) -> tuple[RoundState, dict]:
        _, seed, server, owns = state
        chosen = cohort(seed, state.round, data.train.shape[0], cohort_size)
        before = owns if hosted else client_states.take(owns, chosen, mesh)
        replies = map_clients(
            lambda x: ask(algorithm, server, x[1], data, seed, state.round, x[0]), (chosen, before), at_once, mesh
        )
        finite = jax.vmap(tree.all_finite)(replies)
        heard = replies.change, jnp.where(finite, replies.weight, jnp.nan), replies.report
        stages = secure.within(aggregate, data.train.shape[1])
        moved, weight, more = learn(algorithm, stages, server, chosen, *heard, seed, state.round)
        chex.assert_trees_all_equal_shapes_and_dtypes(replies.own, before, custom_message="client_update changed own")
        after = replies.own
        if aggregate.leaves_out:
            after = jax.vmap(tree.where)(weight > 0, after, before)
        if not hosted:
            after = client_states.put(owns, chosen, after, mesh)
        sent = {name: jnp.full(cohort_size, n, jnp.int32) for name, n in traffic(algorithm, server, replies).items()}
        about = {"client": chosen, "rows": data.train_size[chosen], "finite": finite}
        measured = sent | replies.metrics
        if aggregate.secure is not None:  # sums are of whole changes
            measured["bytes_up"] = sent["bytes_up"]
        found = [about, measured, more, algorithm.report(moved)]
        names = [name for part in found for name in part]
        if len(set(names)) < len(names):
            raise ValueError(f"a name twice among the metrics of engine, clients, aggregate and report: {names}")
        return RoundState(state.round + 1, seed, moved, after), {n: x for part in found for n, x in part.items()}

    def step(state: RoundState, data: FederatedData, stop: Array) -> tuple[RoundState, dict]:
        if block == 1:
            state, row = one_round(state, data)
            return state, jax.tree.map(lambda x: x[None], row)

        def body(carry):
            done, state, rows = carry
            state, row = one_round(state, data)
            return done + 1, state, tree.put(rows, done, row)

        shapes = jax.eval_shape(one_round, state, data)[1]
        rows = jax.tree.map(lambda x: jnp.zeros((block, *x.shape), x.dtype), shapes)
        _, state, rows = jax.lax.while_loop(
            lambda carry: (carry[0] < block) & (carry[1].round < stop), body, (jnp.int32(0), state, rows)
        )
        return state, rows

    state_spec = STATE._replace(owns=ALL) if hosted else STATE
    return jax.jit(on_mesh(step, mesh, (state_spec, ALL, ALL), (state_spec, ALL)), donate_argnums=0)
