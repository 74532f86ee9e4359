"""From a Config to a finished run: the one place that knows everything."""

import contextlib
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from fedmetanas_jax import deliver, environment, pictures
from fedmetanas_jax.algorithms import ALGORITHMS
from fedmetanas_jax.architecture import Architecture, make_architecture, searches
from fedmetanas_jax.config import FILE, SIZED, Config, alike, may_change, to_dict, validate
from fedmetanas_jax.core import Algorithm, FederatedData, Phase, Setting
from fedmetanas_jax.data import federated, manifest, natural, partition, picture, sources
from fedmetanas_jax.data.augment import augmenter
from fedmetanas_jax.engine import accountant, aggregate, hosts, identity, privacy, records, secure
from fedmetanas_jax.engine import run as engine
from fedmetanas_jax.engine.checkpoint import CheckpointError
from fedmetanas_jax.engine.claim import claim
from fedmetanas_jax.engine.conduct import Conduct
from fedmetanas_jax.engine.course import Course
from fedmetanas_jax.engine.interrupt import interruptible
from fedmetanas_jax.engine.kept import Kept
from fedmetanas_jax.engine.mesh import CPU_PARTS, clients_mesh
from fedmetanas_jax.engine.report import NonFiniteError
from fedmetanas_jax.engine.round import make_round, state_shapes
from fedmetanas_jax.engine.sinks import NONE, Sinks
from fedmetanas_jax.files import write_json
from fedmetanas_jax.network import NetworkError
from fedmetanas_jax.options import UsageError

AHEAD = 20  # rounds in which a GPU is expected to have the next program compiled; the paper-sized events are 21 apart
# What a user can cause or meet. An OSError on the way is a full disk, a folder that is gone or may not be read.
FAILURES = (
    UsageError, sources.DataError, records.WorkdirError, CheckpointError, NonFiniteError, NetworkError, hosts.HostError,
    OSError,
)  # fmt: skip


def prepare_jax(config: Config) -> None:
    """Settings that must precede the first array: the compilation cache (in the user's, unless
    JAX_COMPILATION_CACHE_DIR says otherwise) of all programs, float32, and a CPU cut into devices.

    UsageError for a variable of the environment with which jax cannot start.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(sources.cache("xla")))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX leaves out what compiles in less than a second: the ninety small programs of a run, 3 s together.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    parts = CPU_PARTS if config.devices == -1 else config.devices
    if parts > 1:
        try:
            jax.config.update("jax_num_cpu_devices", parts)  # only the CPU backend reads it
        except RuntimeError:  # jax is already running; clients_mesh will say how many devices it has
            pass
    environment.start_jax()


def one_phase(algorithm: Algorithm) -> list[Phase]:
    """A method that runs the same program from the first round to the last."""
    return [Phase(0, lambda server, plan, key: (None, server), lambda plan: algorithm)]


def make_setting(config: Config, augment, searching: bool) -> Setting:
    """The conditions common to all methods."""
    names = ("rounds", "epochs", "batch", "lr", "lr_end", "momentum", "weight_decay", "finetune_lr")
    clip = (5.0 if searching else 0.0) if config.clip == -1 else config.clip
    common = {name: getattr(config, name) for name in names}
    share = config.cohort / config.clients
    return Setting(augment=augment, share=share, clients=config.clients, clip=clip or None, **common)


def make_phases(config: Config, dataset: sources.Dataset) -> tuple[list[Phase], Architecture]:
    """The method's phases, and the network they are over. UsageError names what is off."""
    factory = ALGORITHMS[config.method]
    bfloat16 = config.compute == "bfloat16" or (config.compute == "auto" and not _on_cpu())
    mean, _ = sources.mean_std(config.dataset, dataset)
    try:
        setting = make_setting(config, augmenter(config.augment, mean=mean), searches(factory))
        chosen = make_architecture(config, dataset, factory, jnp.bfloat16 if bfloat16 else jnp.float32)
        made = factory(chosen.made, setting, **config.options)
        phases = one_phase(made) if isinstance(made, Algorithm) else made
        first_algorithm(phases)  # an image the network cannot take is found here
    except ValueError as error:
        raise UsageError(str(error)) from error
    return phases, chosen


def deal(config: Config, dataset: sources.Dataset, least_rows: int) -> partition.Partition:
    """Which images are whose.

    UsageError where a partition cannot be, or leaves a client fewer than `least_rows` training images; DataError for
    a file that holds none of these images.
    """
    parts = _dealt(config, dataset)
    smallest = min(len(rows) for rows in parts.train)
    if smallest < least_rows:
        most = smallest * config.batch // least_rows  # a task is so many batches
        fewer = f"; config.batch can be at most {most}" if least_rows >= config.batch and most else ""
        raise UsageError(
            f"a client has {smallest} training images, but {config.method} needs {least_rows} of every client{fewer}"
        )
    return parts


def _dealt(config: Config, dataset: sources.Dataset) -> partition.Partition:
    """The partition, with what says how it was dealt. Raises as `deal`."""
    if config.partition.endswith(FILE):
        parts = manifest.read(config.partition, dataset)
        if len(parts.train) != config.clients:
            raise UsageError(
                f"config.clients is {config.clients}, but {config.partition} deals to {len(parts.train)} clients"
            )
        return parts
    dealing = _dealing(config) | {"kind": config.partition, "dataset": config.dataset}
    try:
        if config.partition != "natural":
            labels = (dataset.train_labels, dataset.test_labels)
            classes = len(dataset.label_names)
            parts = partition.partition(config.partition, *labels, classes=classes, **_dealing(config))
            return parts._replace(dealing=dealing)
        if dataset.train_client is None:
            arrays = " and ".join(sources.CLIENTS)
            raise UsageError(f"config.partition is natural, but {config.dataset} has no {arrays}, so no clients")
        ids = (dataset.train_client, dataset.test_client)
        parts, names = natural.natural(*ids, clients=config.clients, seed=config.seed)
        return parts._replace(dealing=dealing | {"client_names": names})
    except ValueError as error:
        raise UsageError(str(error)) from error


def federate(config: Config, dataset: sources.Dataset, parts: partition.Partition) -> FederatedData:
    """The images with everybody's rows, in arrays that the runs of an experiment have as long."""
    sized = parts.dealing.get("kind", config.partition) in SIZED
    asked = (config.train_size, config.test_size) if config.partition in SIZED else (0, 0)  # a file deals what it has
    return federated.federate(dataset, parts, federated.lengths(parts, asked, sized, config.batch))


def _dealing(config: Config) -> dict:
    """What says how the images are dealt."""
    names = ("clients", "train_size", "test_size", "concentration", "tau", "seed")
    return {name: getattr(config, name) for name in names}


def describe(config: Config, dataset: sources.Dataset, parts: partition.Partition, workdir: Path) -> None:
    """Leaves partition.json and partition.png in the workdir."""
    classes = len(dataset.label_names)
    labels = (dataset.train_labels, dataset.test_labels)
    write_json(workdir / "partition.json", manifest.record(parts, *labels, classes, parts.dealing))
    counts = partition.histogram(parts.train, dataset.train_labels, classes)
    picture.draw(counts, dataset.label_names, workdir / "partition.png")


def run(
    config: Config,
    *,
    task: str,
    workdir: Path,
    data_dir: Path | None,
    stop_after: int | None = None,
    command: str = "the same command",
    sinks: Sinks = NONE,
    kept: Kept | None = None,
) -> None:
    """The whole run in `workdir`, begun or resumed. Raises one of FAILURES; KeyboardInterrupt, holding the signal's
    number, after Ctrl-C, SIGTERM or SIGHUP. kept: programs of runs before, of which those `alike` share theirs."""
    with interruptible() as interrupt:
        validate(config)
        prepare_jax(config)
        # Whatever can be refused is refused before the workdir is claimed, so that the request put right finds it free.
        dataset = sources.load(config.dataset, sources.data_dir(data_dir))
        conduct = make_conduct(config)
        try:
            mesh = clients_mesh(config.devices)
        except ValueError as error:
            raise UsageError(str(error)) from error
        phases, chosen = make_phases(config, dataset)
        parts = deal(config, dataset, first_algorithm(phases).least_rows)
        data = federate(config, dataset, parts)
        conduct = conduct._replace(aggregate=secure.within(conduct.aggregate, max(map(len, parts.train))))
        check_aggregate(config, conduct, phases, data)
        mine = identity.of(to_dict(config), may_change(config), data)
        hosts.obey(interrupt.signal)
        _check_processes(config, mine, stop_after)
        if not hosts.leader():
            engine.run(phases, data, conduct, workdir=workdir, mesh=mesh, stop_after=stop_after, identity=mine)
            return
        with claim(workdir, to_dict(config), print, may_change(config)) as claimed, hindrances(command):

            def accepted() -> None:
                if chosen.genotype is not None:
                    deliver.write_genotype(chosen, chosen.genotype, workdir)
                claimed.write()

            def draw() -> None:
                lines = records.read(workdir / records.RECORDS)
                if lines:
                    space = first_algorithm(phases).space
                    graph = None if space is None else space.graph
                    pictures.draw(lines, graph, workdir, f"{task}, {config.method}, seed {config.seed}")

            how = {"workdir": workdir, "mesh": mesh, "stop_after": stop_after, "go_on": command, "sinks": sinks}
            how["meanwhile"] = partial(describe, config, dataset, parts, workdir)
            how["make_course"] = partial(Course, kept=kept and kept.next_run(alike(config)))
            try:
                outcome = engine.run(phases, data, conduct, **how, identity=mine, accepted=accepted)
            except BaseException:
                if claimed.written:  # of a run that was stopped or failed too, to see how far it came
                    with contextlib.suppress(Exception):  # what is to be told is what stopped it
                        draw()
                raise
            draw()
            if outcome is not None:
                deliver.finish(dataset, chosen, data, outcome, workdir=workdir)
                sinks.end(outcome.summary)


def _check_processes(config: Config, mine: dict, stop_after: int | None) -> None:
    """UsageError unless every process of the run was asked for the same, has the same data and the same programs."""
    if not hosts.several():
        return
    programs = {name: value for name, value in records.versions().items() if name not in ("python", "cpus")}
    asked = {"config": to_dict(config), "stop_after": stop_after}
    first, *others = hosts.everyones(asked | {"data": mine["data"], "versions": programs})
    for number, other in enumerate(others, 1):
        if differs := identity.differences(first, other):
            raise UsageError(f"process {number} is of another run than process 0 of the same cluster: {differs}")


@contextlib.contextmanager
def hindrances(command: str):
    """WorkdirError, which says how to go on, in place of an OSError."""
    try:
        yield
    except BrokenPipeError:  # nothing is wrong with the workdir: nobody reads the output any more
        raise
    except OSError as error:
        what = f"{error.strerror}: {error.filename}" if error.filename else error.strerror or str(error)
        raise records.WorkdirError(
            f"the run could not go on ({what}); once that is mended, this goes on from its last checkpoint: {command}"
        ) from error


def make_conduct(config: Config) -> Conduct:
    """How the run goes about its rounds, with what suits the backend where the config leaves it open.

    On a CPU clients are worked on one after another, a dispatch is one round, so that a run can be stopped after each
    (they last), and a prune event waits for its smaller program, where that is worth compiling. On accelerators as many
    clients as fit are computed together, a dispatch has all rounds to the next checkpoint, and programs are compiled
    ahead. Clients' states that may be on the host allow dispatches of one round.
    """
    try:
        stages = aggregate.parse(config.aggregate)
    except ValueError as error:
        raise UsageError(f"config.{error}") from None
    same = {name: getattr(config, name) for name in Conduct._fields if name != "aggregate"}
    conduct = Conduct(**same, aggregate=stages)
    if conduct.at_once < 0 and _on_cpu():
        conduct = conduct._replace(at_once=1)
    if conduct.block == 0:
        alone = _on_cpu() or config.client_states == "host"
        conduct = conduct._replace(block=1 if alone else config.checkpoint_every)
    if conduct.compile_ahead < 0 and not _on_cpu():
        conduct = conduct._replace(compile_ahead=AHEAD)
    return conduct


def check_aggregate(config: Config, conduct: Conduct, phases: list[Phase], data: FederatedData) -> None:
    """UsageError where the aggregate is wrong for this run. One that may be is tried out on shapes alone."""
    stages = conduct.aggregate
    if stages.noise is not None:
        accountant.library()
        privacy.check_run(stages.noise, phases, config.bn_eval)
    if stages.noise is not None or stages.by_rank or stages.secure is not None:
        algorithm = first_algorithm(phases)
        step = make_round(algorithm, cohort_size=config.cohort, at_once=1, aggregate=stages)
        jax.eval_shape(step, state_shapes(algorithm, config.clients), data, jnp.int32(1))


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def first_algorithm(phases: list[Phase]) -> Algorithm:
    """What a run's first rounds run."""
    return phases[0].make(phases[0].enter(None, None, jax.random.key(0))[0])


def without_a_run(config: Config, data_dir: str | None) -> tuple[Algorithm, FederatedData]:
    """What a run of `config` would start with, for measurements; nothing is left behind. Raises as `run`."""
    validate(config)
    prepare_jax(config)
    dataset = sources.load(config.dataset, sources.data_dir(data_dir))
    algorithm = first_algorithm(make_phases(config, dataset)[0])
    return algorithm, federate(config, dataset, deal(config, dataset, algorithm.least_rows))
