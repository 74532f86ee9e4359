"""What makes a run this run and no other: its config and its data, as every checkpoint notes them.

The config is noted in full and not by a hash, so that a refusal can name the fields that differ. Of the data there is
a hash of each part: 180 MB of images take a third of a second, once, at the start.
"""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

import numpy as np

from fedmetanas_jax.core import FederatedData
from fedmetanas_jax.engine.checkpoint import CheckpointError
from fedmetanas_jax.files import to_json


def of(config: dict, may_change: Collection[str], data: FederatedData) -> dict:
    """JSON; two runs with equal ones have the same rounds. `may_change`: fields that say how a run is run."""
    parts = {"images": [data.image], "labels": [data.label], "rows of the clients": data[2:]}
    hashes = {name: _hash(arrays) for name, arrays in parts.items()}
    return json.loads(to_json({"config": fixed(config, may_change), "data": hashes}))  # as it will be read


def fixed(config: dict, may_change: Collection[str]) -> dict:
    """The fields that say what the run is."""
    return {name: value for name, value in config.items() if name not in may_change}


def check(saved: dict | None, mine: dict, directory: Path) -> None:
    """CheckpointError, with what differs, unless the checkpoints in `directory` noted this very run."""
    if saved is None:
        raise CheckpointError(
            f"the checkpoints in {directory} are of an older version, which did not note their config and data; "
            "start over in another workdir"
        )
    was, now = saved.get("data", {}), mine.get("data", {})
    others = [f"the {name} are not the same" for name in was | now if was.get(name) != now.get(name)]
    if saved != mine:
        differs = "; ".join(filter(None, [differences(saved.get("config", {}), mine.get("config", {})), *others]))
        raise CheckpointError(
            f"the checkpoints in {directory} are of another run: {differs}; "
            "go on with that config and those data, or use another workdir"
        )


def differences(old: dict, new: dict) -> str:
    """'seed was 0, is 1; options.M was absent, is 3', or '' where the two are equal."""
    old, new = dict(_flat(old)), dict(_flat(new))
    pairs = {name: (_spell(old, name), _spell(new, name)) for name in old | new}
    return "; ".join(f"{name} was {was}, is {now}" for name, (was, now) in pairs.items() if was != now)


def _spell(values: dict, name: str) -> str:
    return json.dumps(values[name]) if name in values else "absent"


def _flat(values: dict, prefix: str = ""):
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _hash(arrays) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in map(np.asarray, arrays):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()
