"""The devices of a run: one mesh axis, `clients`."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedmetanas_jax.core import Tree


def clients_mesh(devices: int) -> Mesh | None:
    """A mesh of that many devices along "clients"; 0 = all there are; None where that is one device.

    ValueError when fewer are there.
    """
    there = jax.devices()
    if not 0 <= devices <= len(there):
        have = f"{len(there)} ({there[0].platform})"
        raise ValueError(f"devices={devices}: JAX sees {have}; allowed are 0 (all) to {len(there)}")
    count = devices or len(there)
    return None if count == 1 else Mesh(np.array(there[:count]), ("clients",))


def put_data(data: Tree, mesh: Mesh | None) -> Tree:
    """The data (or a restored state, or `stop`) on the device, a full copy on each one of the mesh."""
    return jax.device_put(data, None if mesh is None else NamedSharding(mesh, PartitionSpec()))
