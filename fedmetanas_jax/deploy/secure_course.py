"""The course of a run whose server learns the sum of a round's changes and no single one."""

import jax
import numpy as np

from fedmetanas_jax.core import Aggregate, Tree
from fedmetanas_jax.deploy import layout, vector
from fedmetanas_jax.deploy.checks import Exchange
from fedmetanas_jax.deploy.connection import Connection
from fedmetanas_jax.deploy.course import DeployedCourse
from fedmetanas_jax.deploy.exchanges import Exchanges, Summed
from fedmetanas_jax.deploy.session import message_of, threshold
from fedmetanas_jax.deploy.signatures import Authority
from fedmetanas_jax.deploy.vector import ROWS, Vector
from fedmetanas_jax.engine import secure
from fedmetanas_jax.engine.report import of_images
from fedmetanas_jax.options import UsageError

MOST_FAILED = 10  # attempts at a round's sum whose end a record tells, the last ones


class SecureCourse(DeployedCourse):
    """DeployedCourse, whose replies are sums. What clients measured is summed with what they learnt."""

    def __init__(self, *given, ca: bytes, **how):
        """ca: PEM, by which clients' certificates are judged."""
        self._ca = ca
        super().__init__(*given, **how)

    def begin(self, say) -> bool:
        """As DeployedCourse's."""
        cohort = self.conduct.cohort
        self._exchanges = Exchanges(self.gather, Authority(self._ca), cohort)
        say(f"secure sums: a round takes {threshold(cohort)} of {cohort} clients in every exchange")
        return super().begin(say)

    def _aggregate(self) -> Aggregate:
        self._how = secure.within(self.conduct.aggregate, self._most_rows).secure
        return secure.of_sum(self._how, self.conduct.cohort)

    def _gathered(self, round: int, everyone: list[int]) -> Summed:
        self._adds = vector.form(self._wanted.change, self._wanted.metrics)

        def ask(place: int, connection: Connection, owes: Exchange, attempt: int) -> None:
            self._send(place, connection, round, owes, "train_to_sum", attempt=attempt)

        given = self.state.server, jax.numpy.int32(everyone[0]), self.state.seed, self.state.round
        message = jax.device_get(self._message(*given))
        first = layout.pack(layout.of_message(message, self._given(message)))
        self._same = message_of(self.gather.plan, first)
        return self._exchanges.sum(round, everyone, self._adds, self._same, ask, self._wrong)

    def _sends(self, row: bytes) -> None:
        if message_of(self.gather.plan, row) != self._same:
            raise UsageError(
                "config.aggregate: secure adds up what clients learnt of the same message, but this method "
                "(config.method) sends them different ones"
            )

    def _wrong(self, total: Vector, heard: int) -> str:
        found = vector.sums(self._adds.names, total.wide)
        if not 0 < found[ROWS] <= heard * self._most_rows:
            return f"the clients say that they have {found[ROWS]:g} images; they can have {heard * self._most_rows:g}"
        return secure.unlikely(self._how, self._adds.summand(total), heard, self.conduct.cohort)

    def _learn(self, found: Summed, everyone: list[int]) -> tuple[Tree, np.ndarray, dict]:
        heard, size = len(found.answers), self.conduct.cohort
        total = jax.tree.map(jax.numpy.asarray, self._adds.summand(found.total))
        weight = jax.numpy.asarray(np.arange(size) < heard, np.float32)
        given = self.state.server, self._asked(found.answers, everyone), total, weight, self._wanted.report
        moved, taken, more = self._learning(*given, self.state.seed, self.state.round)
        return moved, np.asarray(taken)[:heard], jax.device_get(more)

    def _line(self, heard: Summed, weight: np.ndarray, more: dict, seconds: float) -> dict:
        """A record as everybody's measurements would make it, of one client that measured their mean (and, of
        gradients and multiply-adds, which a record adds up, their sum)."""
        count, found = len(heard.answers), vector.sums(self._adds.names, heard.total.wide)
        rows = found.pop(ROWS)
        means = {}
        for name, total in found.items():
            if of_images(name):
                means[name] = np.array([total / rows])
            elif name in ("image_gradients", "macs"):
                means[name] = np.array([total])
            else:  # as the mean of so many float32 numbers is
                means[name] = np.array([total / count], np.float32)
        up, down = np.array([self._sizes[place] for place in heard.answers]).T
        about = {"client": np.array([-1]), "rows": np.ones(1), "finite": np.ones(1, bool)}
        sent = {"bytes_up": up, "bytes_down": down}
        line = self._recorded(about | sent | means | more, seconds) | {"cohort": list(heard.answers)}
        failed = {"sums_failed": heard.failed[-MOST_FAILED:], "sum_attempts": len(heard.failed) + 1}
        return line | (failed if heard.failed else {})
