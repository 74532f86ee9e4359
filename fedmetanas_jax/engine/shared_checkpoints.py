"""The first process's checkpoints as those of all processes of a run: it reads and writes, the others are told.

What it raises is raised there alone, and ends all.
"""

from collections.abc import Callable
from pathlib import Path

from fedmetanas_jax.core import Tree
from fedmetanas_jax.engine import hosts
from fedmetanas_jax.engine.checkpoint import Checkpoints


class SharedCheckpoints:
    """Its methods are those of `Checkpoints`, called by all processes alike."""

    def __init__(self, kept: Checkpoints | None, directory: Path):
        """`kept` is the first process's; None elsewhere."""
        self.directory, self._kept = directory, kept

    def candidates(self) -> list[int]:
        """As `Checkpoints.candidates`."""
        return hosts.agreed(self._kept.candidates() if hosts.leader() else None)

    def save(self, step: int, state: Tree, meta: dict) -> None:
        """As `Checkpoints.save`, of a state that this process can read; the others wait for it here, where they can
        for as long as it takes."""
        if hosts.leader():
            self._kept.save(step, state, meta)
        hosts.meet()

    def restore_newest(
        self, template: Callable[[dict], Tree], say: Callable[[str], None]
    ) -> tuple[int, dict, Tree] | None:
        """As `Checkpoints.restore_newest`, with numpy arrays alone; the template is made on all processes."""
        found = meta = like = None
        if hosts.leader():
            found = self._kept.restore_newest(lambda meta: template(hosts.agreed(meta)), say)
            hosts.agreed(None)
        else:
            while (more := hosts.agreed(None)) is not None:
                meta, like = more, template(more)
        step = hosts.agreed(found and found[0])
        if step is None:
            return None
        if hosts.leader():
            _, meta, like = found
        return step, meta, hosts.told(like, like)

    def close(self) -> None:
        """As `Checkpoints.close`."""
        if hosts.leader():
            self._kept.close()
