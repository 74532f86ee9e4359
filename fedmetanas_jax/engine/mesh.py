"""The devices of a run: one mesh axis, `clients`; what every device holds, and what is divided among them."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedmetanas_jax.core import RoundState, Tree
from fedmetanas_jax.engine import hosts

ALL = PartitionSpec()  # a full copy on every device
OWN = PartitionSpec("clients")  # the leading axis divided, a consecutive share each
CPU_PARTS = 2  # a number of its own, not that of the cores, so that a run gives the same bits on every CPU of a kind
STATE = RoundState(round=ALL, seed=ALL, server=ALL, owns=OWN)


def clients_mesh(devices: int) -> Mesh | None:
    """A mesh of that many devices along "clients"; 0 = all there are, -1 = CPU_PARTS of a CPU that was cut into as
    many, else one; None where that is one device.

    ValueError when fewer are there, and for less than all of several processes'.
    """
    there = jax.devices()
    if hosts.several() and devices:
        raise ValueError(f"devices={devices}: a run of several processes uses all devices of all; allowed is 0 (all)")
    if jax.process_count() > 1 and not hosts.several():
        raise ValueError(f"JAX sees {jax.process_count()} processes, which know nothing of each other; use --cluster")
    if devices == -1:
        devices = min(CPU_PARTS, len(there)) if there[0].platform == "cpu" else 1
    if not 0 <= devices <= len(there):
        have = f"{len(there)} ({there[0].platform})"
        raise ValueError(f"devices={devices}: JAX sees {have}; allowed are 0 (all) to {len(there)}")
    count = devices or len(there)
    return None if count == 1 else Mesh(np.array(there[:count]), ("clients",))


def free_bytes() -> int | None:
    """Memory that is free on a device of this process; None where the backend does not tell (a CPU's is the host's)."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in statistics:
        return None
    return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)


def devices_of(mesh: Mesh | None) -> int:
    """The devices that share the work."""
    return 1 if mesh is None else mesh.size


def padded(clients: int, mesh: Mesh | None) -> int:
    """The rows that clients' states have: as many as clients, filled up to equal shares of the devices."""
    return -(-clients // devices_of(mesh)) * devices_of(mesh)


def put_data(data: Tree, mesh: Mesh | None, spec: PartitionSpec = ALL) -> Tree:
    """The data (or `stop`, ...) on the device; on each one of the mesh, in full unless `spec` divides it."""
    where = None if mesh is None else NamedSharding(mesh, spec)
    if mesh is not None and hosts.several():
        return jax.tree.map(lambda x: hosts.put(x, where), data)
    return jax.device_put(data, where)


def put_state(state: RoundState, mesh: Mesh | None) -> RoundState:
    """A state on the devices, the clients' states divided among them."""
    return RoundState(*(put_data(part, mesh, spec) for part, spec in zip(state, STATE, strict=True)))


def told(shapes: RoundState, mesh: Mesh | None, hosted: bool) -> RoundState:
    """The shapes of a state with word of where it will lie, as a program that is compiled ahead must know."""
    if mesh is None:
        return shapes
    specs = STATE._replace(owns=ALL) if hosted else STATE

    def lying(spec: PartitionSpec) -> Callable:
        return lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return RoundState(*(jax.tree.map(lying(spec), part) for part, spec in zip(shapes, specs, strict=True)))


def sum_of_devices(values: Tree, mesh: Mesh) -> Tree:
    """The sum of every device's values, on all of them; to be called under `on_mesh`."""
    if not hosts.several():
        return jax.lax.psum(values, mesh.axis_names)

    def summed(x: jax.Array) -> jax.Array:
        # In the devices' order, as those of one process add: a network has one of its own, so other last bits.
        return functools.reduce(jnp.add, jax.lax.all_gather(x, mesh.axis_names))

    return jax.tree.map(summed, values)


def on_mesh(function: Callable, mesh: Mesh | None, in_specs: Tree, out_specs: Tree) -> Callable:
    """The function, run by every device of the mesh on what the specs give it."""
    if mesh is None:
        return function
    # check_vma would make a client's gradient of the replicated server state a sum over all devices.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
