"""One federated round as one compiled program; knows no algorithm by name.

    cohort, keys <- (seed, round)      map over the cohort: gather rows, algorithm.client_update
    weighted mean of the updates       algorithm.server_update       put the cohort's client states back

Here live jit, vmap, shard_map, donation and the choice of clients. Server state and data are replicated on
every device of a mesh; what is divided is the cohort's work and where the clients' states are kept.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from fedmetanas_jax import tree
from fedmetanas_jax.core import Algorithm, Array, Examples, FederatedData, RoundState, Tree
from fedmetanas_jax.engine import client_states
from fedmetanas_jax.engine.mesh import ALL, STATE, on_mesh, padded

STREAMS = ("init", "cohort", "train", "personal", "calibration")  # append only: the place is the salt


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
    """The state before round 0; every client starts from the one client_state that init returns.

    On a mesh the clients' states are filled up to equal shares and divided; `hosted` ones are numpy arrays.
    """

    def init(seed: Array) -> RoundState:
        server_state, client_state = algorithm.init(stream_key(seed, "init"))
        everyone = client_state
        if not hosted:
            rows = padded(clients, mesh)
            everyone = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *jnp.shape(x))), client_state)
        return RoundState(jnp.zeros((), jnp.int32), seed, server_state, everyone)

    spec = STATE._replace(client_states=ALL) if hosted else STATE
    where = None if mesh is None else RoundState(*(NamedSharding(mesh, part) for part in spec))
    state = jax.jit(init, out_shardings=where)(jnp.uint32(seed))
    if not hosted:
        return state
    return state._replace(client_states=jax.tree.map(lambda x: np.stack([x] * clients), state.client_states))


def state_shapes(algorithm: Algorithm, clients: int, mesh: Mesh | None = None, hosted: bool = False) -> RoundState:
    """`init_state` as a template to restore into: ShapeDtypeStructs, and empty numpy arrays where hosted."""
    shapes = jax.eval_shape(lambda: init_state(algorithm, 0, padded(clients, mesh)))
    if not hosted:
        return shapes
    return shapes._replace(client_states=jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes.client_states))


def train_examples(data: FederatedData, client: Array) -> Examples:
    """The training rows of one client, [n, h, w, c]; weight 0 past its train_size."""
    rows = data.train[client]
    weight = (jnp.arange(rows.shape[0]) < data.train_size[client]).astype(jnp.float32)
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


def make_round(
    algorithm: Algorithm,
    *,
    cohort_size: int,
    at_once: int,
    mesh: Mesh | None = None,
    block: int = 1,
    hosted: bool = False,
) -> Callable:
    """-> step(state: RoundState, data: FederatedData, stop [] int32) -> (state, metrics), jitted.

    It runs the rounds state.round ... stop-1, at most `block` of them, in one dispatch; `stop` is to lie past
    state.round (a block of 1 is one round and does not read it). The state given is donated, so gone after.

    metrics: name -> [block, cohort] of what the clients measured, "client" their ids int32, "finite" bool
    (all a client sends and keeps is a number); and name -> [block] of algorithm.report on the server's state
    after the round. Rows past the rounds run are zero.

    hosted: the given and the returned state.client_states are the rows of the round's cohort alone, for clients
    whose states stay on the host; a block is then one round.

    A mesh sums the updates in the cohort's order, as one device does, so it adds no rounding of its own.
    The same bits come out where the clients are worked on in the same groups (always for at_once=1).
    ValueError for a block below 1 and, at the first call, for a cohort or an `at_once` that cannot be and for
    a name that the metrics and the report both use.
    """
    if block < 1:
        raise ValueError(f"block={block}: a dispatch runs at least 1 round")
    if hosted and block > 1:
        raise ValueError(f"block={block}: with clients' states on the host a dispatch runs 1 round")

    # Jitted in itself so that it is traced once, though its shapes and its body are both asked for below.
    @jax.jit
    def one_round(state: RoundState, data: FederatedData) -> tuple[RoundState, dict]:
        chosen = cohort(state.seed, state.round, data.train.shape[0], cohort_size)
        own = state.client_states if hosted else client_states.take(state.client_states, chosen, mesh)

        def client(x):
            k, client_state = x
            key, work = client_key(state.seed, state.round, k), apart(algorithm.client_update)
            return work(state.server_state, client_state, train_examples(data, k), key)

        out = map_clients(client, (chosen, own), at_once, mesh)
        finite = jax.vmap(tree.all_finite)((out.update, out.weight, out.client_state))
        server_state = algorithm.server_update(state.server_state, tree.weighted_mean(out.update, out.weight))
        after = out.client_state
        if not hosted:
            after = client_states.put(state.client_states, chosen, after, mesh)
        engine, report = {"client": chosen, "finite": finite}, algorithm.report(server_state)
        names = [*engine, *out.metrics, *report]
        if len(set(names)) < len(names):
            raise ValueError(f"a name twice among metrics {[*out.metrics]}, report {[*report]}, {[*engine]}")
        return RoundState(state.round + 1, state.seed, server_state, after), engine | out.metrics | report

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

    state_spec = STATE._replace(client_states=ALL) if hosted else STATE
    return jax.jit(on_mesh(step, mesh, (state_spec, ALL, ALL), (state_spec, ALL)), donate_argnums=0)


def payload(algorithm: Algorithm, state: RoundState, data: FederatedData) -> dict[str, int]:
    """bytes_up, bytes_down: what one client sends and is sent in a round (methods section 12.2)."""

    def update(server_state: Tree, client_state: Tree, data: FederatedData) -> Tree:
        key = client_key(0, 0, 0)
        return algorithm.client_update(server_state, client_state, train_examples(data, 0), key).update

    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state.client_states)
    return {
        "bytes_up": tree.nbytes(jax.eval_shape(update, state.server_state, one, data)),
        "bytes_down": tree.nbytes(jax.eval_shape(algorithm.broadcast, state.server_state)),
    }
