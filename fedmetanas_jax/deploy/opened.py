"""Of which clients this client has helped to open a round's sum.

Two sums of one round whose clients differ by one would tell that one's change, since a client that is asked again
answers the same. So a round is opened once, or again over the same clients, as a server needs that was killed before it
had kept the sum. No secret is in the file.
"""

import json
from pathlib import Path

from fedmetanas_jax.files import write_json


class Opened:
    """The last round that was opened, kept in a file. A file that cannot be read counts as one that forbids."""

    def __init__(self, path: Path):
        self._path = path

    def other(self, round: int, names: list[str]) -> str:
        """Why a sum over these clients is not to be opened, or ''."""
        try:
            last, before = self._read()
        except (OSError, ValueError, KeyError, TypeError):
            return f"{self._path.name} in its workdir, which says what sums it opened, cannot be read"
        if round < last:
            return f"it has opened the sum of round {last}, and opens none of an earlier round ({self._remedy()})"
        if round == last and before != sorted(names):
            return (
                f"it has opened a sum of round {round} over other clients already; two of them would tell the "
                f"difference ({self._remedy()})"
            )
        return ""

    def note(self, round: int, names: list[str]) -> None:
        """Remembers, before a share is sent. OSError."""
        write_json(self._path, {"round": round, "names": sorted(names)})

    def _read(self) -> tuple[int, list[str]]:
        if not self._path.exists():
            return 0, []
        found = json.loads(self._path.read_text())
        return int(found["round"]), list(found["names"])

    def _remedy(self) -> str:
        return f"to have it do so all the same, remove {self._path.name} from its workdir"
