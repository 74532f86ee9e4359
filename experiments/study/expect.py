"""What a study would take, and where it stands."""

import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from quality.tables import table

from fedmetanas_jax import build
from fedmetanas_jax.config import Config, to_dict
from fedmetanas_jax.core import Algorithm, FederatedData
from fedmetanas_jax.engine.round import init_state, make_round, state_shapes, train_examples
from fedmetanas_jax.files import to_json
from study.plan import Run
from study.worker import Study

HOUR = 3600
# The one accelerator that a round of the paper was timed on: `python experiments/bench.py --gpu`.
MEASURED = Path(__file__).parents[2] / "results" / "bench-nvidia-h200.json"
CASE = ("three tasks, full", "ours")  # a batch of each of three tasks, before pruning


def image_gradients(config: Config, algorithm: Algorithm, data: FederatedData) -> float:
    """Image-gradients of a round of a method's first phase, averaged over clients."""
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state_shapes(algorithm, 1))
    own, key = jax.tree.map(lambda x: x[0], state.owns), jax.random.key(0)

    @jax.jit
    def count(client):  # no training is left in this program: the number depends on the rows alone
        message = algorithm.send(state.server, client, key)
        reply = algorithm.client_update(message, own, train_examples(data, client), key)
        return reply.metrics["image_gradients"]

    return config.cohort * float(np.mean([count(client) for client in range(config.clients)]))


def planned(study: Study, runs: list[Run], data_dir: str | None) -> str:
    """The runs that are left, by method and split: how many, the image-gradients of one, and its hours.

    Hours are those of a finished run with the same program, else image-gradients times the multiply-adds of the whole
    network times what FedMetaNAS's round takes for one. That bounds a search that prunes on the way, and FedNAS, whose
    second half costs less than its first; for MobileNetV3 and for subnets that are drawn it is a guess.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.row, run.column), []).append(run)
    counted: dict[str, tuple[float, int]] = {}
    rate, source = None, ""
    rows, total = [], 0.0
    for (row, column), members in groups.items():
        left = [run for run in members if not study.finished(run)]
        known = [seconds for run in members if run not in left and (seconds := study.spent(run))]
        config = members[0].config
        shape = to_json(to_dict(config) | {"seed": None} | ({"concentration": 0} if config.partition != "iid" else {}))
        if shape not in counted:
            algorithm, data = build.without_a_run(config, data_dir)
            counted[shape] = image_gradients(config, algorithm, data) * config.rounds, algorithm.macs
            jax.clear_caches()
        gradients, macs = counted[shape]
        if known:
            hours, how = float(np.mean(known)) / HOUR, "finished runs"
        else:
            if rate is None:
                rate, source = _rate(members[0], data_dir)
            hours, how = 3 * gradients * macs * rate / HOUR, "bound"
        total += hours * len(left)
        rows.append([row, column, str(len(members)), str(len(left)), f"{gradients:.3g}", f"{hours:.3g}", how])
    head = ["method", "split", "runs", "left", "image-gradients a run", "hours a run", "by"]
    said = f"{len(runs)} runs; about {total:.1f} hours are left for one process, compiling only by finished runs."
    return "\n\n".join(filter(None, [table(head, rows), said, source]))


def _rate(run: Run, data_dir: str | None) -> tuple[float, str]:
    """Seconds per multiply-add, forward or backward, of a FedMetaNAS round of this size; where that is from."""
    config = dataclasses.replace(run.config, method="fedmetanas", options={})
    algorithm, data = build.without_a_run(config, data_dir)
    work = 3 * algorithm.macs * image_gradients(config, algorithm, data)
    paper_size = (config.width, config.cells, config.nodes, config.cohort) == (16, 8, 4, 5)
    if jax.default_backend() == "cpu" and paper_size:
        found = json.loads(MEASURED.read_text())["results"]
        one = next(one for one in found if (one["case"]["name"], one["variant"]["side"]) == CASE)
        seconds = float(np.median(one["seconds"])) * one["case"]["round_tasks"] / one["case"]["tasks"]
        return seconds / work, f"One H200: {seconds:.2f} s for a FedMetaNAS round before pruning ({MEASURED.name})."
    conduct = build.make_conduct(config)
    step = make_round(algorithm, cohort_size=config.cohort, at_once=conduct.at_once)
    state, clocks = init_state(algorithm, seed=1, clients=config.clients), []
    for number in (1, 2):  # the first compiles
        clock = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, data, jnp.int32(number)))
        clocks.append(time.perf_counter() - clock)
    device = jax.devices()[0].device_kind
    return clocks[1] / work, f"{device}: {clocks[1]:.2f} s for a FedMetaNAS round before pruning, measured just now."


def status(study: Study, runs: list[Run]) -> str:
    """Done, running, failed, left; when it should end, by the time that finished runs of the same method took."""
    done = [run for run in runs if study.finished(run)]
    failed = {run.name: found for run in runs if run not in done and (found := study.failure(run))}
    held = study.claims.held()
    running = [run for run in runs if run.name in held]
    left = [run for run in runs if run not in done and run.name not in failed]
    lines = [f"{len(done)} done, {len(running)} running, {len(failed)} failed, {len(left) - len(running)} left"]
    for run in running:
        who = held[run.name]
        since = (time.time() - who["since"]) / 60 if who["since"] else 0
        lines.append(
            f"running: {run.name}, round {study.rounds(run)} of {run.config.rounds}, "
            f"on {who['host']} (process {who['pid']}) for {since:.0f} min"
        )
    lines += [f"failed: {name}: {found['error']}" for name, found in failed.items()]
    spent: dict[str, list[float]] = {}
    for run in done:
        if seconds := study.spent(run):
            spent.setdefault(run.row, []).append(seconds)
    if left and spent:
        every = [seconds for known in spent.values() for seconds in known]
        wanted = sum(
            np.mean(spent.get(run.row, every)) * (1 - study.rounds(run) / run.config.rounds) for run in left
        )
        hours = wanted / HOUR / max(1, len(running))
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + hours * HOUR))
        lines.append(f"about {hours:.1f} hours to go with {max(1, len(running))} processes: {end}")
    return "\n".join(lines)
