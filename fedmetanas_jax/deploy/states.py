"""What a client keeps between its turns, on its own disk: one file for each of its last turns.

The server says after which of them it goes on: a round whose reply was not taken leaves a file that nobody asks for,
and a server that resumes may ask for an older one than the last.
"""

import hashlib
import io
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax.core import Tree
from fedmetanas_jax.deploy import layout
from fedmetanas_jax.files import write_bytes

KEEP = 4  # files


class States:
    """The own states of one client, by round."""

    def __init__(self, folder: Path):
        self._folder = folder

    def rounds(self) -> list[int]:
        """The rounds whose state is there, newest first."""
        names = (path.stem for path in self._folder.glob("*.npz"))
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def save(self, round: int, own: Tree) -> None:
        """OSError, with the file that was there before in its place, where the disk is full."""
        parts = [layout.Part(own)]
        row = np.frombuffer(layout.pack(parts), np.uint8)
        about = np.frombuffer((layout.digest(parts) + hashlib.sha256(row).hexdigest()).encode(), np.uint8)
        with io.BytesIO() as file:
            np.savez(file, row=row, about=about)
            write_bytes(self._path(round), file.getvalue())
        undone = [other for other in self.rounds() if other > round]  # the server is done with them, or began anew
        for other in [*undone, *self.rounds()[len(undone) + KEEP :]]:
            self._path(other).unlink(missing_ok=True)

    def load(self, round: int, like: Tree) -> Tree | None:
        """The state after that round, in the shapes of `like`; None where it is not there, or is damaged."""
        parts = [layout.Part(like)]
        try:
            with np.load(self._path(round), allow_pickle=False) as file:
                row, about = file["row"].tobytes(), file["about"].tobytes().decode()
            if about != layout.digest(parts) + hashlib.sha256(row).hexdigest():
                return None
            return jax.tree.map(jnp.asarray, layout.unpack(row, parts)[0])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
            return None

    def _path(self, round: int) -> Path:
        return self._folder / f"{round}.npz"
