"""A picture of a federation: who is there, who works, who is late, round and accuracy.

On a terminal a table above the bar, by rich; elsewhere plain lines; for programs the same numbers as Prometheus
metrics on 127.0.0.1.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from fedmetanas_jax.deploy.gather import STATES, Gather
from fedmetanas_jax.engine.progress import Progress
from fedmetanas_jax.options import UsageError

NAMED = 10  # clients in one line
ROWS = 30  # of the table; of more clients those at the end are counted


class Board(Progress):
    """Progress, with the clients. gather: of whom it is; taken: () -> the last round taken of each place."""

    def __init__(self, *given, gather: Gather, taken: Callable[[], Sequence[int]], metrics: "Metrics | None", **how):
        super().__init__(*given, **how)
        self._gather, self._taken, self._metrics = gather, taken, metrics

    def __enter__(self) -> "Board":
        super().__enter__()
        if not self._plain:
            bar, below = self._bar, self._bar.get_renderables
            bar.get_renderables = lambda: [self._table(), *below()]
        return self

    def round(self, record: dict) -> None:
        """Shows a round's record; on plain lines who is there where that changed, or somebody was left out."""
        super().round(record)
        if self._metrics is not None:
            self._metrics.round(record)
        if self._plain and any(record.get(name) for name in ("joined", "left_out", "refused")):
            self.say(self.line())

    def line(self) -> str:
        """'3 clients: 2 ready, 1 late (client-7)'"""
        gather = self._gather
        places = gather.hub.roster.places()
        states = {place: gather.state_of(place) for place in places}
        parts = []
        for state in STATES:
            there = [gather.hub.roster.name(place) for place in places if states[place] == state]
            shown = ", ".join(there[:NAMED]) + (", ..." if len(there) > NAMED else "")
            names = f" ({shown})" if state in ("late", "away") else ""
            parts += [f"{len(there)} {state}{names}"] if there else []
        return f"{len(places)} clients: {', '.join(parts)}"

    def _table(self):
        from rich.table import Table

        gather, taken = self._gather, self._taken()
        table = Table("client", "state", "last round taken", "sent it, MB", "got from it, MB", box=None, pad_edge=False)
        places = gather.hub.roster.places()
        for place in places[:ROWS]:
            connection = gather.hub.here.get(place)
            sizes = ("", "") if connection is None else (connection.sent, connection.reader.seen)
            shown = [f"{x / 1e6:.1f}" if x != "" else "" for x in sizes]
            last = str(taken[place]) if place < len(taken) and taken[place] else ""
            table.add_row(gather.hub.roster.name(place), gather.state_of(place), last, *shown)
        if len(places) > ROWS:
            table.add_row(f"{len(places) - ROWS} more")
        return table


class Metrics:
    """Prometheus metrics; read while they are asked for, so that they are never old."""

    def __init__(self, port: int, gather: Gather):
        """UsageError where the package or the port is not to be had."""
        try:
            import prometheus_client as prometheus
        except ModuleNotFoundError:
            raise UsageError("--metrics_port needs the extra: pip install 'fedmetanas_jax[deploy]'") from None
        registry = prometheus.CollectorRegistry()

        def gauge(name: str, text: str, labels: Sequence[str] = ()) -> Any:
            return prometheus.Gauge(f"fedmetanas_{name}", text, labels, registry=registry)

        def counter(name: str, text: str) -> Any:
            return prometheus.Counter(f"fedmetanas_{name}", text, registry=registry)

        clients = gauge("clients", "registered clients by state", ("state",))
        for state in STATES:
            clients.labels(state).set_function(lambda state=state: _count(gather)[state])
        gauge("round", "the round that is under way").set_function(lambda: gather.hub.round)
        gauge("replies", "replies that the round under way has").set_function(lambda: len(gather.answered))
        self._seconds, self._loss = gauge("round_seconds", "of the last round"), gauge("loss", "of the last round")
        self._accuracy = gauge("server_accuracy", "on the server's test set, when it was last measured")
        self._accuracy.set(float("nan"))
        self._up, self._down = counter("wire_up_bytes", "from clients"), counter("wire_down_bytes", "to clients")
        self._left_out = counter("left_out", "clients that were asked in vain")
        self._refused = counter("refused", "refusals of replies and of clients")
        try:
            prometheus.start_http_server(port, addr="127.0.0.1", registry=registry)
        except OSError as error:
            raise UsageError(f"metrics_port is {port}, which cannot be had ({error.strerror})") from None

    def round(self, record: dict) -> None:
        """The numbers of a round's record."""
        self._seconds.set(record["seconds"])
        self._loss.set(record.get("loss", float("nan")))
        if record.get("server_accuracy") is not None:
            self._accuracy.set(record["server_accuracy"])
        self._up.inc(record["wire_up"])
        self._down.inc(record["wire_down"])
        self._left_out.inc(len(record.get("left_out", ())))
        self._refused.inc(len(record.get("refused", ())) + record.get("refused_more", 0))


def _count(gather: Gather) -> Counter:
    return Counter(gather.state_of(place) for place in gather.hub.roster.places())
