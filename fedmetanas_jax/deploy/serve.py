"""From a Config to a finished run whose clients are elsewhere."""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax import build, deliver, pictures
from fedmetanas_jax.config import MAY_CHANGE, Config, to_dict, validate
from fedmetanas_jax.core import FederatedData, Phase
from fedmetanas_jax.data import sources
from fedmetanas_jax.deploy import credentials, share, terms
from fedmetanas_jax.deploy.board import Board, Metrics
from fedmetanas_jax.deploy.course import DeployedCourse
from fedmetanas_jax.deploy.gather import Gather, Patience
from fedmetanas_jax.deploy.hub import Hub
from fedmetanas_jax.deploy.roster import Roster
from fedmetanas_jax.engine import identity, records
from fedmetanas_jax.engine import run as engine
from fedmetanas_jax.engine.claim import claim
from fedmetanas_jax.engine.interrupt import interruptible
from fedmetanas_jax.engine.sinks import NONE, Sinks
from fedmetanas_jax.options import UsageError

PLACES = "places.json"  # in the workdir: who got which place, without certificates


class Listening(NamedTuple):
    """Where and how a server listens, and how long it waits."""

    host: str
    port: int
    certs: Path | None  # None: without TLS
    patience: Patience
    max_norm: float
    metrics_port: int | None


def own_data(dataset: sources.Dataset, config: Config) -> FederatedData:
    """What the server has: its test set, and images of its own in the place of clients' training images, by which it
    recalibrates batch norm."""
    n, m = len(dataset.train_images), len(dataset.test_images)
    rows = np.resize(np.random.default_rng(config.seed).permutation(n), (config.cohort, min(n, config.train_size)))
    return FederatedData(
        image=jnp.asarray(np.concatenate([dataset.train_images, dataset.test_images])),
        label=jnp.asarray(np.concatenate([dataset.train_labels, dataset.test_labels]), jnp.int32),
        train=jnp.asarray(rows, jnp.int32),
        train_size=jnp.full(config.cohort, rows.shape[1], jnp.int32),
        test=jnp.full((1, 1), n, jnp.int32),
        test_size=jnp.ones(1, jnp.int32),
        central=jnp.arange(n, n + m, dtype=jnp.int32),
    )


def serve(
    config: Config,
    listening: Listening,
    *,
    task: str,
    workdir: Path,
    data_dir: str | None,
    command: str = "the same command",
    sinks: Sinks = NONE,
    make_hub: Callable[..., Hub] = Hub,
) -> None:
    """The whole run in `workdir`, begun or resumed. Raises as `build.run`.

    make_hub: what has the connections, with Hub's arguments; another one may have them carried by something else.
    """
    with interruptible() as interrupt:
        validate(config)
        _check(config, listening)
        pair = None if listening.certs is None else credentials.read(listening.certs, "server")
        build.prepare_jax(config)
        dataset = sources.load(config.dataset, sources.data_dir(data_dir))
        once = {"block": 1, "checkpoint_every": 1, "client_states": "device", "final_adapt": False, "adapt_every": 0}
        conduct = build.make_conduct(config)._replace(**once)
        conduct = conduct._replace(compile_ahead=min(0, conduct.compile_ahead))
        phases, chosen = build.make_phases(config, dataset)
        data = own_data(dataset, config)
        if conduct.aggregate.noise is not None:
            raise UsageError(
                "config.aggregate adds noise that is drawn from config.seed, which all clients of a networked run "
                "know, so it would hide nothing from them; leave gaussian out"
            )
        build.check_aggregate(config, conduct, phases, data)
        make = DeployedCourse if conduct.aggregate.secure is None else _summing(config, pair, phases)
        agreed = terms.of(config, dataset, _compute(config))
        run = terms.run_of(agreed)
        mine = identity.of(to_dict(config), MAY_CHANGE, data)
        interrupt.obey()
        with claim(workdir, to_dict(config), print, MAY_CHANGE) as claimed, build.hindrances(command):
            registered = None if listening.certs is None else listening.certs / credentials.CLIENTS
            roster = Roster(config.clients, registered, workdir / PLACES)
            hub = make_hub(agreed, run, roster, partial(print, flush=True))
            gather = Gather(hub, listening.patience, interrupt)
            shapes = partial(share.shapes, agreed, config)
            how = {"gather": gather, "log": workdir / records.RECORDS, "examples": shapes}
            metrics = None if listening.metrics_port is None else Metrics(listening.metrics_port, gather)
            courses: list[DeployedCourse] = []

            def accepted() -> None:
                if chosen.genotype is not None:
                    deliver.write_genotype(chosen, chosen.genotype, workdir)
                claimed.write()

            def shown(*given) -> Board:
                show = Board(*given, gather=gather, taken=lambda: courses[0].last, metrics=metrics)
                hub.say = show.say
                return show

            def course(*given) -> DeployedCourse:
                courses.append(make(*given, **how, max_norm=listening.max_norm))
                return courses[0]

            def draw() -> None:
                if lines := records.read(workdir / records.RECORDS):
                    space = build.first_algorithm(phases).space
                    graph = None if space is None else space.graph
                    pictures.draw(lines, graph, workdir, f"{task}, {config.method}, seed {config.seed}")

            hub.listen(listening.host, listening.port, config.clients, pair)
            try:
                outcome = engine.run(
                    phases, data, conduct, workdir=workdir, go_on=command, identity=mine, accepted=accepted,
                    sinks=sinks, progress=shown, make_course=course,
                )  # fmt: skip
            except BaseException:
                hub.close("closed", reason="the server stops", final=False)
                if claimed.written:
                    with contextlib.suppress(Exception):  # what is to be told is what stopped it
                        draw()
                raise
            hub.close("done", rounds=config.rounds)
            draw()
            deliver.finish(dataset, chosen, data, outcome, workdir=workdir)
            sinks.end(outcome.summary)


def _summing(config: Config, pair: credentials.Pair | None, phases: list[Phase]) -> Callable[..., DeployedCourse]:
    """Makes the course of a run with secure sums. UsageError where there can be none."""
    try:
        from fedmetanas_jax.deploy import turn
        from fedmetanas_jax.deploy.secure_course import SecureCourse
    except ModuleNotFoundError as error:
        raise UsageError(f"secure sums need the extra: pip install 'fedmetanas_jax[deploy]' ({error})") from None
    turn.check(config.cohort, pair is not None, phases)
    return partial(SecureCourse, ca=pair.ca)


def _compute(config: Config) -> str:
    """What clients are to compute in, whatever devices they have."""
    if config.compute != "auto":
        return config.compute
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _check(config: Config, listening: Listening) -> None:
    """UsageError for what a server cannot do."""
    if config.devices not in (-1, 1):
        raise UsageError(f"config.devices is {config.devices}; a server with clients elsewhere uses 1 (or -1)")
    if listening.patience.quorum > config.cohort:
        raise UsageError(
            f"quorum is {listening.patience.quorum}; it must be at most the {config.cohort} clients of a round "
            "(config.cohort)"
        )
    if listening.certs is None:
        credentials.check_loopback(listening.host)
