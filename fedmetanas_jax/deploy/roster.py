"""Who may join, and as which of the run's clients."""

import json
import threading
from pathlib import Path

from fedmetanas_jax.files import write_json
from fedmetanas_jax.options import UsageError


class NotRegistered(Exception):
    """One line, which the client is told, too."""


class Roster:
    """The places 0 to clients - 1 of a run, by name.

    With TLS the file `registered` has a name a line, and the line is the place; it is read anew for whoever is not in
    it, so that a line can be added while the server runs. Without it places are given in the order of arrival and noted
    in `noted`, so that they stay when the server is started again.
    """

    def __init__(self, clients: int, registered: Path | None, noted: Path):
        self._clients, self._file, self._noted = clients, registered, noted
        self._lock = threading.Lock()  # clients come in threads of their own
        if registered is None:
            self.names = json.loads(noted.read_text()) if noted.exists() else []
        else:
            self.names = self._read()

    def place(self, name: str) -> int:
        """NotRegistered: there is none for this name."""
        with self._lock:
            return self._place(name)

    def _place(self, name: str) -> int:
        if name not in self.names and self._file is not None:
            self.names = self._read()
        if name not in self.names:
            if self._file is not None:
                raise NotRegistered(f"'{name}' is not registered: it is no line of the server's {self._file.name}")
            if len(self.names) == self._clients:
                raise NotRegistered(f"all {self._clients} places (config.clients) are taken")
            self.names = [*self.names, name]
            write_json(self._noted, self.names)
        place = self.names.index(name)
        if place >= self._clients:
            raise NotRegistered(f"'{name}' is client number {place + 1}; the run has {self._clients} (config.clients)")
        return place

    def name(self, place: int) -> str:
        """Of a client that may not have come yet."""
        return self.names[place] if place < len(self.names) else f"client {place}"

    def places(self) -> list[int]:
        """Those that somebody may take: without a list of names, all."""
        return list(range(self._clients if self._file is None else min(self._clients, len(self.names))))

    def _read(self) -> list[str]:
        try:
            lines = self._file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{self._file}, the list of registered clients, cannot be read ({error})") from None
        names = [line.strip() for line in lines if line.strip()]
        if len(set(names)) < len(names):
            raise UsageError(f"{self._file} has a name twice")
        return names
