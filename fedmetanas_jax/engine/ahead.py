"""The next program, compiled beside the rounds that still run."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh

from fedmetanas_jax import tree
from fedmetanas_jax.core import Algorithm, FederatedData
from fedmetanas_jax.engine import hosts
from fedmetanas_jax.engine.conduct import Conduct
from fedmetanas_jax.engine.mesh import told
from fedmetanas_jax.engine.programs import Programs
from fedmetanas_jax.engine.round import state_shapes


class Ahead:
    """At most one set of programs that is being compiled in a thread."""

    def __init__(self):
        self._compiler, self._programs, self._compiling = ThreadPoolExecutor(1), None, None

    def compile(
        self,
        algorithm: Algorithm,
        conduct: Conduct,
        data: FederatedData,
        mesh: Mesh | None,
        hosted: bool,
        names: Sequence[str],
        due: int,
        say: Callable[[str], None],
    ) -> None:
        """Starts on the programs of `algorithm` of these names, unless that is already going on.

        due: the round after which they are wanted; it is said.
        """
        if self._programs is not None and self._programs.algorithm is algorithm:
            return
        self._programs = Programs(algorithm, conduct, data, mesh, hosted, None, say)
        state = state_shapes(algorithm, conduct.clients, mesh, hosted)
        if hosted:
            chosen = np.arange(conduct.cohort)
            state = state._replace(owns=jax.eval_shape(tree.take, state.owns, chosen))
        say(f"compiling the {' and the '.join(names)} meanwhile, for after round {due}")
        self._compiling = self._compiler.submit(self._programs.compile_ahead, told(state, mesh, hosted), names)

    def take(self, algorithm: Algorithm) -> Programs | None:
        """The programs of `algorithm`, after waiting for them; None where others or none were begun. Raises what went
        wrong in the thread."""
        programs, self._programs = self._programs, None
        if programs is None or programs.algorithm is not algorithm:
            return None
        self._compiling.result()
        hosts.meet()  # else the first round would wait for a slower process
        return programs
