"""The JAX side of a timing: one compiled round of FedMetaNAS, clients mapped as asked.

The batches are drawn, the Gumbel noise too; images are not augmented, as the rival's are not.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax import tree
from fedmetanas_jax.algorithms.fedmetanas import fedmetanas
from fedmetanas_jax.core import Examples, Mask, Setting
from fedmetanas_jax.models.darts import darts_space
from fedmetanas_jax.networks import WAYS
from timing import hlo, memory
from timing.cases import ROUND, ROUNDS, Case, Variant, images, plan_and_mask


class Ours:
    """A round that is compiled once and run as often as asked."""

    def __init__(self, case: Case, variant: Variant, seed: int):
        self.case = case
        step, self.state, self.data = make_round(case, variant, seed)
        self.figures = {"trace_seconds": 0.0, "compile_seconds_cold": 0.0, "compile_seconds_warm": 0.0}
        for kind in ("cold", "warm"):  # the second time from the process's compilation cache on disk
            start = time.perf_counter()
            lowered = step.lower(self.state, *self.data)
            middle = time.perf_counter()
            self.compiled = lowered.compile()
            self.figures["trace_seconds"] = middle - start
            self.figures[f"compile_seconds_{kind}"] = time.perf_counter() - middle
            if kind == "cold":
                jax.clear_caches()
        self.figures["first_run_seconds"] = self.run()[0]
        self.forgotten = memory.forget_peak()

    def run(self) -> tuple[float, float]:
        """One round -> (seconds, mean query loss)."""
        start = time.perf_counter()
        self.state, loss = self.compiled(self.state, *self.data)
        jax.block_until_ready((self.state, loss))
        return time.perf_counter() - start, float(loss)

    def report(self) -> dict:
        """Compile seconds, memory and traffic."""
        device = jax.local_devices()[0]
        stats = device.memory_stats() or {}
        moved = hlo.traffic(self.compiled.as_text())
        cost = self.compiled.cost_analysis() or {}
        on_gpu = jax.default_backend() == "gpu"
        steps = self.case.tasks * (self.case.M + 1) * self.case.clients
        no_kernels = "a CPU launches no kernels"
        return self.figures | {
            "device_peak_bytes": stats.get("peak_bytes_in_use"),
            "device_peak_reason": None if stats else f"the {jax.default_backend()} backend has no memory_stats",
            "host_peak_bytes": memory.host_peak(),
            "host_peak_running_bytes": memory.peak_since_forgotten() if self.forgotten else None,
            "bytes_per_round": moved.bytes,
            "bytes_source": "operands and results of the optimized HLO, loop bodies times their trip counts",
            "bytes_unknown_loops": moved.unknown_loops,
            "cost_analysis_bytes_accessed": cost.get("bytes accessed"),  # loop bodies once
            "kernels_per_step": moved.kernels / steps if on_gpu else None,
            "kernels_reason": "counted in the optimized HLO, all clients' steps" if on_gpu else no_kernels,
        }


def make_round(case: Case, variant: Variant, seed: int):
    """-> (jitted step(state, image, label, key) -> (state, loss), its state, its data)."""
    plan, op, pair = plan_and_mask(case, seed)
    one = (0.5,) * case.image[2]
    dtype = jnp.dtype(case.dtype).type
    size = {"width": case.width, "length": case.cells, "nodes": case.nodes}
    how = WAYS[variant.way]
    space = darts_space(shape=case.image, classes=case.classes, mean=one, std=one, dtype=dtype, how=how, **size)
    setting = Setting(rounds=ROUNDS, epochs=1, batch=case.batch, augment=lambda key, image: image)
    algorithm = fedmetanas(space, setting, M=case.M)[0].make(plan)
    state, _ = jax.jit(algorithm.init)(jax.random.key(seed))
    state = state._replace(round=jnp.int32(ROUND), mask=Mask(jnp.asarray(op), jnp.asarray(pair)))
    image, label = images(case, seed)

    @partial(jax.jit, donate_argnums=0)
    def step(state, image, label, key):
        def client(x):
            image, label, key = x
            out = algorithm.client_update(state, (), Examples(image, label, jnp.ones(label.shape)), key)
            return out.update, out.weight, out.metrics["loss"]

        keys = jax.random.split(jax.random.fold_in(key, state.round), case.clients)
        clients = image, label, keys
        if 1 < case.clients == variant.at_once:
            update, weight, loss = jax.vmap(client)(clients)
        else:
            update, weight, loss = jax.lax.map(
                client, clients, batch_size=None if variant.at_once == 1 else variant.at_once
            )
        return algorithm.server_update(state, tree.weighted_mean(update, weight)), jnp.mean(loss)

    return step, state, (jnp.asarray(image), jnp.asarray(label), jax.random.key(seed))


def copy_bandwidth(megabytes: int, repeats: int = 7) -> float:
    """Bytes a second: reading an array and writing another, the best of `repeats`."""
    x = jnp.ones(megabytes * 2**18, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    jax.block_until_ready(add(x))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(add(x))
        seconds.append(time.perf_counter() - start)
    return 2 * x.nbytes / min(seconds)


def describe() -> dict:
    """The machine and the copy bandwidth measured on it."""
    device = jax.local_devices()[0]
    megabytes = 256 if device.platform == "cpu" else 1024
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.local_device_count(),
        "copy_bytes_per_second": copy_bandwidth(megabytes),
        "copy_megabytes": megabytes,
        "numpy": np.__version__,
    }
