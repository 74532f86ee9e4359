"""The JAX side of a timing: the engine's own round of FedMetaNAS, every client in it, images not augmented."""

import time

import jax
import jax.numpy as jnp

from fedmetanas_jax.algorithms.fedmetanas import fedmetanas
from fedmetanas_jax.core import FederatedData, Mask, RoundState, Setting
from fedmetanas_jax.engine import records
from fedmetanas_jax.engine.round import init_state, make_round
from fedmetanas_jax.models.darts import darts_space
from timing.cases import ROUND, ROUNDS, SCHEDULE, Case, Variant, images, plan_and_mask

describe = records.versions


class Side:
    """A round that is run as often as asked. warm: it is compiled a second time, from the cache."""

    def __init__(self, case: Case, variant: Variant, seed: int, warm: bool):
        step, self.state, self.data = federation(case, variant, seed)
        self.figures = {}
        for kind in ("cold", "warm")[: 1 + warm]:
            start = time.perf_counter()
            lowered = step.lower(self.state, self.data, jnp.int32(ROUNDS))
            middle = time.perf_counter()
            self.compiled = lowered.compile()
            self.figures[f"compile_seconds_{kind}"] = time.perf_counter() - middle
            self.figures[f"trace_seconds_{kind}"] = middle - start
            if kind == "cold" and warm:
                jax.clear_caches()
        self.figures["first_run_seconds"] = self.run()[0]

    def run(self) -> tuple[float, float]:
        """One round -> (seconds, mean query loss)."""
        start = time.perf_counter()
        self.state, metrics = self.compiled(self.state, self.data, jnp.int32(ROUNDS))
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start, float(jnp.mean(metrics["loss"]))

    def report(self) -> dict:
        """Compile seconds, and the device's peak memory where its backend says."""
        stats = jax.local_devices()[0].memory_stats() or {}
        reason = None if stats else f"the {jax.default_backend()} backend has no memory_stats"
        return self.figures | {"device_peak_bytes": stats.get("peak_bytes_in_use"), "device_peak_reason": reason}


def federation(case: Case, variant: Variant, seed: int) -> tuple:
    """-> (jitted step(state, data, stop), RoundState, FederatedData): all of the case's clients in every round."""
    plan, op, pair = plan_and_mask(case, seed)
    half = (0.5,) * case.image[2]
    size = {"width": case.width, "length": case.cells, "nodes": case.nodes, "way": variant.way}
    dtype = jnp.dtype(case.dtype).type
    space = darts_space(shape=case.image, classes=case.classes, mean=half, std=half, dtype=dtype, **size)
    setting = Setting(rounds=ROUNDS, epochs=1, batch=case.batch, augment=lambda key, image: image, clip=5.0)
    algorithm = fedmetanas(space, setting, M=case.M, **SCHEDULE)[0].make(plan)
    state: RoundState = init_state(algorithm, seed, case.clients)
    server = state.server._replace(round=jnp.int32(ROUND), mask=Mask(jnp.asarray(op), jnp.asarray(pair)))

    image, label = images(case, seed)
    rows = jnp.arange(label.size, dtype=jnp.int32).reshape(label.shape)
    sizes = jnp.full(case.clients, label.shape[1], jnp.int32)
    pool = jnp.asarray(image.reshape(-1, *case.image)), jnp.asarray(label.reshape(-1))
    data = FederatedData(*pool, train=rows, train_size=sizes, test=rows, test_size=sizes, central=rows.reshape(-1))
    step = make_round(algorithm, cohort_size=case.clients, at_once=variant.at_once)
    return step, state._replace(round=jnp.int32(ROUND), server=server), data
