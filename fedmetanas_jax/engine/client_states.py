"""Where clients' states live between rounds (SCAFFOLD's c_k, Ditto's v_k, FedRep's heads).

As stacked arrays [clients, ...] on the device, a consecutive share on each device of a mesh; or, where they
would not fit, as numpy arrays in the host's memory, from which a round is handed its cohort's rows alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedmetanas_jax import tree
from fedmetanas_jax.core import Array, RoundState, Tree
from fedmetanas_jax.engine import hosts
from fedmetanas_jax.engine.mesh import free_bytes, padded, put_state

SHARE_OF_MEMORY = 0.4  # of a device's free memory that clients' states may take before they move to the host


def take(states: Tree, clients: Array, mesh: Mesh | None) -> Tree:
    """The rows of `clients` [s]: leaves [s, ...], on every device (on a mesh, to be called under on_mesh)."""
    if mesh is None:
        return tree.take(states, clients)

    def one(x: Array) -> Array:
        mine, own = _place(x, clients)
        row = x[jnp.where(own, mine, 0)]
        # Everybody adds its rows to the others' nothing. That is -0.0, since 0.0 would turn a -0.0 into 0.0.
        nothing = jnp.asarray(-0.0 if jnp.issubdtype(x.dtype, jnp.floating) else 0, x.dtype)
        row = jnp.where(own.reshape(-1, *[1] * (row.ndim - 1)), row, nothing)
        total = jax.lax.psum(row.astype(jnp.int8) if row.dtype == bool else row, "clients")
        return total.astype(row.dtype)

    return jax.tree.map(one, states)


def put(states: Tree, clients: Array, rows: Tree, mesh: Mesh | None) -> Tree:
    """The states with the rows of `clients` [s] replaced; the others keep their bits. On a mesh as `take`."""
    if mesh is None:
        return tree.put(states, clients, rows)

    def one(x: Array, values: Array) -> Array:
        mine, own = _place(x, clients)
        return x.at[jnp.where(own, mine, x.shape[0])].set(values, mode="drop")

    return jax.tree.map(one, states, rows)


def _place(x: Array, clients: Array) -> tuple[Array, Array]:
    """Where in this device's share x the clients are, and whether they are there at all."""
    mine = clients - jax.lax.axis_index("clients") * x.shape[0]
    return mine, (mine >= 0) & (mine < x.shape[0])


def divided(state: RoundState, clients: int, mesh: Mesh | None) -> RoundState:
    """A state with one row a client, filled up to equal shares of the devices and put there."""
    rows = np.arange(padded(clients, mesh)) % clients
    return put_state(state._replace(owns=tree.take(state.owns, rows)), mesh)


def put_fresh(state: RoundState, clients: int, mesh: Mesh | None, hosted: bool) -> RoundState:
    """A state whose rows, one a client, were just made, where they are to live."""
    if hosted:
        return state._replace(owns=jax.tree.map(np.array, state.owns))
    return divided(state, clients, mesh)


def put_on_host(states: Tree, clients: np.ndarray, rows: Tree) -> None:
    """Writes the rows of `clients` into states held as numpy arrays, in place."""
    for x, values in zip(jax.tree.leaves(states), jax.tree.leaves(rows), strict=True):
        x[clients] = np.asarray(values)


def place(asked: str, nbytes: int, devices: int) -> tuple[bool, str]:
    """(on the host?, a line that says where and why) for clients' states of `nbytes` in all.

    asked: "device", "host", or "auto", which is the device unless its share would take more than 40 % of
    the memory that is free there. A backend that does not tell (the CPU's, whose memory is the host's) has room.
    """
    size = f"clients' states take {nbytes / 1e9:.3g} GB"
    room = hosts.least(free_bytes(), "room for states")
    share = -(-nbytes // devices)
    fits = room is None or share <= SHARE_OF_MEMORY * room
    if asked == "auto" and not fits:
        return True, f"{size}, too much beside the {room / 1e9:.3g} GB free on a device: kept on the host"
    hosted = asked == "host"
    advice = "" if fits or hosted else f" ({room / 1e9:.3g} GB free there; client_states=host spares them)"
    return hosted, f"{size}, kept on the {'host' if hosted else 'device'}{advice}"
