"""Checkpoints: the state of a run, bit for bit, with the few JSON values that say how to read it.

A checkpoint is written under a temporary name and renamed once complete, and one that has become old is
renamed before it is deleted: a process killed at any moment leaves whole checkpoints only. A SHA-256 over
the state and one over the meta tell a damaged file from a good one, whatever the storage did to it.

All leaves are stored as one row of bytes: storage costs 0.5 ms an array, and a supernet has thousands.
Their names, types and shapes stand in the meta, in order.
"""

import contextlib
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax.core import Tree
from fedmetanas_jax.engine import hosts
from fedmetanas_jax.files import beside

PIECE = 1 << 28  # bytes of the row in one stored array; compressors give up at 2 GiB
# Folders beside the checkpoints; what they hold is never restored. What is in the first is deleted, so its name must be
# one that nobody gives to a folder of their own.
OLD, DAMAGED = ".being_deleted", "damaged"


class CheckpointError(Exception):
    """No checkpoint can be used. The message is one line for the user."""


class DamagedCheckpoint(CheckpointError):
    """This one checkpoint is not what was saved. The message says in one line what is wrong with it."""


class Checkpoints:
    """The `keep` newest checkpoints of a run, one folder `directory/STEP` each.

    One process at a time may hold a Checkpoints on a directory: opening it clears away what a killed one
    left half written or half deleted. `keep` is at least 2, so that there is one to fall back to.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2):
        import orbax.checkpoint as ocp  # here, because it is slow to import and only runs need it

        if keep < 2:
            raise ValueError(f"keep = {keep}: at least 2 checkpoints are needed to survive a damaged one")
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.directory / OLD, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            todelete_subdir=OLD,
            cleanup_tmp_directories=True,
            # Saving is done when save returns: the next round may overwrite (donate) the state's buffers.
            enable_async_checkpointing=False,
            **self._alone(ocp),
        )
        self._args = ocp.args
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def _alone(self, ocp) -> dict:
        """Keeps storage from waiting for the run's other processes, which have no part in this."""
        if not hosts.several():
            return {}
        me = jax.process_index()
        only = {"primary_host": me, "active_processes": {me}, "barrier_sync_key_prefix": f"process{me}"}
        return {"create": False, "multiprocessing_options": ocp.options.MultiprocessingOptions(**only)}

    def candidates(self) -> list[int]:
        """Steps that have a checkpoint, newest first; whether it can be read is not looked at."""
        return steps(self.directory)

    def save(self, step: int, state: Tree, meta: dict) -> None:
        """Saves a pytree of arrays and a JSON-able dict; on return the checkpoint is complete.

        A step that is already there with the same contents is left as it is.
        ValueError: `step` is there with other contents, or is older than the newest. CheckpointError: it cannot be
        written; the older ones stay.
        """
        if not self.directory.is_dir():  # storage would make it anew, apart from the run's other files
            raise CheckpointError(f"{self.directory} was removed while the run wrote in it; put it back to go on")
        row = np.concatenate([_bytes(x) for x in jax.tree.leaves(state)])
        digest = hashlib.sha256(row).hexdigest()
        body = {"step": step, "meta": meta, "layout": _layout(state), "state_sha256": digest}
        body = json.loads(json.dumps(body))  # as it will be read: a tuple comes back as a list
        newest = max(self.candidates(), default=-1)
        if step == newest and self._body(step) == body:
            return
        if step <= newest:
            raise ValueError(f"cannot save step {step}: {self.directory} already holds step {newest}")
        pieces = {f"{start}": row[start : start + PIECE] for start in range(0, row.size, PIECE)}
        state_args = self._args.StandardSave(pieces)
        meta_args = self._args.JsonSave(body | {"sha256": _seal(body)})
        try:
            with _told_once():
                self._manager.save(step, args=self._args.Composite(state=state_args, meta=meta_args))
        except Exception as error:  # storage names no set of errors for a full disk or a folder that is gone
            raise CheckpointError(
                f"checkpoint {step} cannot be saved in {self.directory} ({_one_line(error)}); once the folder can be "
                "written, the same command goes on from the one before"
            ) from error
        shutil.rmtree(self.directory / OLD, ignore_errors=True)

    def meta(self, step: int) -> dict:
        """The meta that was saved with `step`. DamagedCheckpoint: it cannot be read or was altered."""
        return self._body(step)["meta"]

    def digest(self, step: int) -> str:
        """The SHA-256 of the state that was saved with `step`; raises as `meta`."""
        return self._body(step)["state_sha256"]

    def restore(self, step: int, like: Tree) -> Tree:
        """The state of `step` in the structure of `like`, a pytree of arrays or ShapeDtypeStructs.

        Leaves are numpy arrays where they are in `like`, else jax arrays on the default device, committed to none.
        DamagedCheckpoint: it is not what was saved. CheckpointError: it is, but `like` is another state.
        """
        body = self._body(step)
        layout = _layout(like)
        if layout != body["layout"]:
            saved, wanted = next(pair for pair in zip_longest(body["layout"], layout) if pair[0] != pair[1])
            raise CheckpointError(
                f"checkpoint {step} in {self.directory} is of another program: it holds {_spell(saved)} "
                f"where this program has {_spell(wanted)}"
            )
        sizes = [_size(x) for x in jax.tree.leaves(like)]
        total = sum(sizes)
        pieces = {f"{a}": np.empty(min(PIECE, total - a), np.uint8) for a in range(0, total, PIECE)}
        try:
            args = self._args.Composite(state=self._args.StandardRestore(pieces))
            pieces = self._manager.restore(step, args=args)["state"]
        except Exception as error:  # storage names no set of errors for damaged files
            raise DamagedCheckpoint(f"its state cannot be read: {_one_line(error)}") from error
        row = np.concatenate([pieces[f"{start}"] for start in range(0, total, PIECE)])
        if hashlib.sha256(row).hexdigest() != body["state_sha256"]:
            raise DamagedCheckpoint("its state is not the one whose SHA-256 was saved with it")
        parts = np.split(row, np.cumsum(sizes)[:-1])

        def leaf(x, part: np.ndarray):
            value = part.view(x.dtype).reshape(x.shape)
            # Both copy: jax's buffers must be its own to be donated, and numpy's to be written to.
            return value.copy() if isinstance(x, np.ndarray) else jnp.array(value)

        return jax.tree.map(leaf, like, jax.tree.unflatten(jax.tree.structure(like), parts))

    def restore_newest(
        self, template: Callable[[dict], Tree], say: Callable[[str], None]
    ) -> tuple[int, dict, Tree] | None:
        """(step, meta, state) of the newest good checkpoint, or None if there is none at all.

        `template(meta)` makes the pytree of `restore`'s `like`. Each damaged checkpoint passed over is moved
        to `directory/damaged/STEP`, so that its step can be saved again, and is said in one line.
        CheckpointError: every checkpoint is damaged (all stay where they are, so that a second try does
        not start over either), or a good one holds another program's state.
        """
        damaged = {}
        for step in self.candidates():
            try:
                meta = self.meta(step)
                state = self.restore(step, template(meta))
            except DamagedCheckpoint as error:
                damaged[step] = str(error)
                continue
            for bad, why in damaged.items():
                moved = self._set_aside(bad)
                say(f"checkpoint {bad} is damaged ({why}); using checkpoint {step}; moved it to {moved}")
            return step, meta, state
        if damaged:
            reasons = "; ".join(f"{step}: {why}" for step, why in damaged.items())
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged ({reasons}); "
                "put one back from a copy, or start over in a new workdir"
            )
        return None

    def close(self) -> None:
        """Releases the directory."""
        self._manager.close()

    def _body(self, step: int) -> dict:
        try:
            args = self._args.Composite(meta=self._args.JsonRestore())
            body = self._manager.restore(step, args=args)["meta"]
            intact = body["step"] == step and body.pop("sha256") == _seal(body)
        except Exception as error:  # as in restore
            raise DamagedCheckpoint(f"its meta cannot be read: {_one_line(error)}") from error
        if not intact:
            raise DamagedCheckpoint("its meta is not the one whose SHA-256 was saved with it")
        return body

    def _set_aside(self, step: int) -> Path:
        target = self.directory / DAMAGED / str(step)
        target.parent.mkdir(exist_ok=True)
        target = beside(target) if target.exists() else target
        (self.directory / str(step)).rename(target)
        self._manager.reload()
        return target


@contextlib.contextmanager
def _told_once():
    """Keeps storage from writing to the log, as tracebacks of its threads, what it raises as well."""
    log = logging.getLogger("absl")

    def shown(record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)

    log.addFilter(shown)
    try:
        yield
    finally:
        log.removeFilter(shown)


def steps(directory: Path) -> list[int]:
    """Steps that have a checkpoint in the directory, newest first; [] if it is not there."""
    if not directory.is_dir():
        return []
    return sorted((int(p.name) for p in directory.iterdir() if p.name.isdecimal()), reverse=True)


def _layout(tree: Tree) -> list:
    """[[name, "float32[3, 4]"], ...] in the order of the leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [[jax.tree_util.keystr(path), f"{x.dtype}{list(x.shape)}"] for path, x in leaves]


def _spell(entry: list | None) -> str:
    return "state{} {}".format(*entry) if entry else "nothing more"


def _size(x) -> int:
    return math.prod(x.shape) * x.dtype.itemsize


def _bytes(x) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def _seal(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no reason given"
    return f"{type(error).__name__}: {text if len(text) <= 100 else text[:100] + '...'}"
