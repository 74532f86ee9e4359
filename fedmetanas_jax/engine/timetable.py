"""What a run does before which round: phases, smaller programs, evaluations, checkpoints.

All of it is a function of the round's number and of what is in a checkpoint, so that a resumed run does what an
unbroken one does.
"""

import json

from fedmetanas_jax.core import Algorithm, Phase, Tree
from fedmetanas_jax.engine.conduct import Conduct
from fedmetanas_jax.engine.programs import EVALUATION
from fedmetanas_jax.engine.worth import Worth


class Timetable:
    """What is due, at round `done` of phase `phase` under `plan`."""

    phase: int
    plan: object
    done: int
    algorithm: Algorithm
    hosted: bool  # whether clients' states are on the host

    def __init__(self, phases: list[Phase], conduct: Conduct):
        self.phases, self.conduct = phases, conduct
        self.entered = 0  # the round before which the phase was entered: its start, unless it was put off
        self.put_off = None  # the round of the next try at a last phase that was put off
        self.worth = Worth()
        self._made: dict[tuple, Algorithm] = {}

    def _next_stop(self, limit: int) -> int:
        conduct, done = self.conduct, self.done
        first = 1 if conduct.eval_every else 0
        stops = [conduct.rounds, limit, done + conduct.block, self._smaller_from() or 0, self._due() or 0, first]
        for every in (conduct.eval_every, conduct.adapt_every, conduct.checkpoint_every):
            if every:
                stops.append(done - done % every + every)
        return min(stop for stop in stops if stop > done)

    def _measures(self) -> bool:
        """Whether the network is measured after this round: after every so many, after the last one and, since what is
        wrong should show soon, after the first."""
        every = self.conduct.eval_every
        return falls_due(self.done, every, self.conduct.rounds) or (self.done == 1 and every > 0)

    def _is_last(self) -> bool:
        return self.phase + 1 == len(self.phases)

    def _due(self) -> int | None:
        """The round before which the next phase is entered."""
        return self.put_off or next((phase.start for phase in self.phases[self.phase + 1 :]), None)

    def _settle(self, server: Tree) -> None:
        """Before an event: counts what a smaller program would have spared since the last one."""
        smaller = self.phases[self.phase].smaller
        self.worth.settle(0.0 if smaller is None else self._spared(smaller(server)))

    def _spared(self, plan) -> float:
        """The share of the last round's multiply-adds, or of the program's before one, that one of this plan spares."""
        present = self.worth.macs_an_image or self._algorithm_of(self.phase, self.plan).macs
        return 1 - self._algorithm_of(self.phase, plan).macs / present

    def _pays(self, plan) -> bool:
        """Whether a program of this plan is worth compiling: it serves for the rest of the run, or until the last event
        spares enough."""
        return self._is_last() or self.worth.pays(self._spared(plan), self.phases[-1].start - self.done)

    def _smaller_from(self) -> int | None:
        """The round before which the phase's smaller program is entered; None where it is not."""
        phase, following = self.phases[self.phase], self.phases[self.phase + 1 : self.phase + 2]
        if phase.smaller is None:
            return None
        if self.worth.stays and self.conduct.compile_ahead < 0:
            return None if self.conduct.adapt_every else self.conduct.rounds
        due = self.entered + max(0, self.conduct.compile_ahead)
        until = following[0].start if following else self.conduct.rounds
        return due if due < until or due == self.entered else None

    def _shares(self) -> bool:
        """Whether no network gets a program of its own any more: the run would move to one after its last round."""
        return self.conduct.compile_ahead > 0 and self.done + self.conduct.compile_ahead >= self.conduct.rounds

    def _stays(self, server: Tree) -> bool:
        """Whether the rounds after the last event are left to the present program: it computes what is alive alone,
        and is nearly as fast as one of nothing else, which is not worth compiling for them."""
        phase, space = self.phases[self.phase], self._algorithm_of(self.phase, self.plan).space
        if not self._is_last() or phase.smaller is None or space is None or not space.skips:
            return False
        return not self.worth.pays_at_last(self._spared(phase.smaller(server)), self.conduct.rounds - self.done)

    def _algorithm_of(self, phase: int, plan) -> Algorithm:
        made = self.phases[phase].make
        key = made, json.dumps(plan)
        if key not in self._made:
            self._made[key] = made(plan)
        return self._made[key]

    def _later(self) -> list[str]:
        """The programs that this algorithm will need after some of its rounds."""
        adapts = self.conduct.adapt_every or (self._is_last() and self.conduct.final_adapt)
        if adapts and not self.hosted:
            return [EVALUATION, "adaptation"]
        return [EVALUATION] if self.algorithm.global_model is not None else []

    def _at(self, due: int) -> list[str]:
        """The programs that are needed first where the run moves to an algorithm before this round or at the end."""
        if due == self.conduct.rounds:
            return ["adaptation", EVALUATION] if self.conduct.final_adapt and not self.hosted else []
        return ["round"] if self.algorithm.global_model is None else ["round", EVALUATION]


def falls_due(done: int, every: int, last: int | None) -> bool:
    """Whether what is done every so many rounds (0: never), and after the round `last`, is due after round `done`."""
    return done == last or (every > 0 and done % every == 0)
