"""From a Config to a finished run: the one place that knows everything."""

import json
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax import network, tree
from fedmetanas_jax.algorithms import ALGORITHMS
from fedmetanas_jax.config import Config, to_dict, validate
from fedmetanas_jax.core import Algorithm, FederatedData, Net, Phase, RoundState, SearchSpace, Setting
from fedmetanas_jax.data import federated, partition, picture, sources
from fedmetanas_jax.data.augment import augmenter
from fedmetanas_jax.engine import curves, records
from fedmetanas_jax.engine import run as engine
from fedmetanas_jax.engine.checkpoint import CheckpointError
from fedmetanas_jax.engine.evaluate import calibration_rows, recalibrate
from fedmetanas_jax.engine.mesh import clients_mesh
from fedmetanas_jax.engine.programs import Plan
from fedmetanas_jax.engine.report import NonFiniteError
from fedmetanas_jax.nas import genotype as genotypes
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import picture as cell_picture
from fedmetanas_jax.networks import Network, make_network
from fedmetanas_jax.options import UsageError

AHEAD = 25  # rounds in which a GPU is expected to have the next program compiled
FAILURES = (UsageError, sources.DataError, records.WorkdirError, CheckpointError, NonFiniteError)
CACHE = "~/.cache/fedmetanas_jax/xla"  # compiled programs, unless JAX_COMPILATION_CACHE_DIR says otherwise


def prepare_jax(config: Config) -> None:
    """Settings that must precede the first array: the compilation cache, and a CPU cut into devices."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path(CACHE).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    if config.devices > 1:
        try:
            jax.config.update("jax_num_cpu_devices", config.devices)  # only the CPU backend reads it
        except RuntimeError:  # jax is already running; clients_mesh will say how many devices it has
            pass


def one_phase(algorithm: Algorithm) -> list[Phase]:
    """A method that runs the same program from the first round to the last."""
    return [Phase(0, lambda server_state, plan: (None, server_state), lambda plan: algorithm)]


def make_phases(config: Config, dataset: sources.Dataset) -> tuple[list[Phase], Network]:
    """The method's phases, and the network they are over. UsageError names what is off."""
    factory = ALGORITHMS[config.method]
    on_cpu = jax.default_backend() == "cpu"
    bfloat16 = config.compute == "bfloat16" or (config.compute == "auto" and not on_cpu)
    mean, _ = sources.mean_std(config.dataset, dataset)
    ahead = config.compile_ahead if config.compile_ahead >= 0 else 0 if on_cpu else AHEAD
    try:
        augment, share = augmenter(config.augment, mean=mean), config.cohort / config.clients
        setting = Setting(config.rounds, config.epochs, config.batch, augment, share, ahead)
        network = make_network(config, dataset, factory, jnp.bfloat16 if bfloat16 else jnp.float32)
        made = factory(network.made, setting, **config.options)
        phases = one_phase(made) if isinstance(made, Algorithm) else made
        first_algorithm(phases)  # an image the network cannot take is found here
    except ValueError as error:
        raise UsageError(str(error)) from error
    return phases, network


def make_data(config: Config, dataset: sources.Dataset, least_rows: int, workdir: Path) -> FederatedData:
    """The clients' data; leaves partition.json and partition.png in the workdir.

    UsageError where a partition cannot be, or leaves a client fewer than `least_rows` training images.
    """
    classes = len(dataset.label_names)
    labels = (dataset.train_labels, dataset.test_labels)
    names = ("clients", "train_size", "test_size", "concentration", "tau", "seed")
    parameters = {name: getattr(config, name) for name in names}
    try:
        parts = partition.partition(config.partition, *labels, classes=classes, **parameters)
    except ValueError as error:
        raise UsageError(str(error)) from error
    smallest = min(len(rows) for rows in parts.train)
    if smallest < least_rows:
        batches = least_rows // config.batch
        raise UsageError(
            f"a client has {smallest} training images, but a task of {config.method} takes {batches} batches, "
            f"{least_rows} images; config.batch can be at most {smallest // batches}"
        )
    parameters |= {"kind": config.partition, "dataset": config.dataset}
    manifest = partition.manifest(parts, *labels, classes, parameters)
    records.write_json(workdir / "partition.json", manifest)
    counts = partition.histogram(parts.train, dataset.train_labels, classes)
    picture.draw(counts, dataset.label_names, workdir / "partition.png")
    return federated.federate(dataset, parts)


def run(
    config: Config,
    *,
    task: str,
    workdir: Path,
    data_dir: Path | None,
    stop_after: int | None = None,
    command: str = "the same command",
) -> None:
    """The whole run in `workdir`, begun or resumed. Raises one of FAILURES; KeyboardInterrupt after Ctrl-C."""
    validate(config)
    prepare_jax(config)
    dataset = sources.load(config.dataset, sources.data_dir(data_dir))
    with records.claim(workdir, to_dict(config), print):
        phases, chosen = make_phases(config, dataset)
        if chosen.genotype is not None:
            keep_genotype(chosen, workdir)
        try:
            mesh = clients_mesh(config.devices)
        except ValueError as error:
            raise UsageError(str(error)) from error
        data = make_data(config, dataset, first_algorithm(phases).least_rows, workdir)
        names = Plan._fields
        plan = Plan(**{name: getattr(config, name) for name in names})
        plan = plan._replace(at_once=clients_at_once(config), block=rounds_in_a_dispatch(config))
        outcome = engine.run(
            phases, data, plan, workdir=workdir, mesh=mesh, stop_after=stop_after, go_on=command
        )
        title = f"{task}, {config.method}, seed {config.seed}"
        curves.draw(records.read(workdir / "records.jsonl"), workdir / "curves.png", title)
        if outcome is not None:
            finish(config, dataset, chosen, data, *outcome, workdir=workdir)


def first_algorithm(phases: list[Phase]) -> Algorithm:
    """What a run's first rounds run."""
    return phases[0].make(phases[0].enter(None, None)[0])


def without_a_run(config: Config, data_dir: str | None) -> tuple[Algorithm, FederatedData]:
    """What a run of `config` would start with, for measurements; nothing is left behind. Raises as `run`."""
    validate(config)
    prepare_jax(config)
    dataset = sources.load(config.dataset, sources.data_dir(data_dir))
    algorithm = first_algorithm(make_phases(config, dataset)[0])
    with tempfile.TemporaryDirectory() as folder:
        return algorithm, make_data(config, dataset, algorithm.least_rows, Path(folder))


def clients_at_once(config: Config) -> int:
    """config.at_once, or what suits the backend: one after another on a CPU, else -1, as many as fit."""
    if config.at_once >= 0:
        return config.at_once
    return 1 if jax.default_backend() == "cpu" else -1


def rounds_in_a_dispatch(config: Config) -> int:
    """config.block, or what suits the backend: on a CPU, whose rounds last, one, so that a run can be stopped
    after each; else all to the next checkpoint. Clients' states that may be on the host allow one."""
    if config.block > 0:
        return config.block
    alone = jax.default_backend() == "cpu" or config.client_states == "host"
    return 1 if alone else config.checkpoint_every


def keep_genotype(chosen: Network, workdir: Path) -> None:
    """Leaves the architecture a run was given beside what it finds. WorkdirError where another one is there."""
    path, text = workdir / "genotype.json", genotypes.to_json(chosen.genotype)
    if path.exists() and path.read_text() != text:
        raise records.WorkdirError(f"{path} is not the genotype that config.network now holds; use another workdir")
    records.write_text(path, text)
    cell_picture.draw(chosen.genotype, workdir / "cells.png")


def finish(
    config: Config,
    dataset: sources.Dataset,
    chosen: Network,
    data: FederatedData,
    algorithm: Algorithm,
    state: RoundState,
    summary: dict,
    *,
    workdir: Path,
) -> None:
    """Leaves what was found: genotype, picture of the cells, the network as one file, and the figures."""
    server = state.server_state
    served = algorithm.discrete_model or algorithm.global_model
    net, plan, space = served(server), None, chosen.made
    if config.bn_eval == "recalibrated":
        rows = calibration_rows(data, state.seed, state.round - 1, config.cohort)
        net = recalibrate(algorithm.forward, net, data.image[rows], config.eval_batch)
    expected = np.asarray(algorithm.forward(net, data.image[data.central[:64]], False)[0])
    if isinstance(space, SearchSpace):
        genotype = genotypes.pair_rule(server.alpha, server.mask)
        records.write_text(workdir / "genotype.json", genotypes.to_json(genotype))
        records.write_text(workdir / "genotype.txt", genotypes.to_text(genotype))
        cell_picture.draw(genotype, workdir / "cells.png")
        plan = masks.keep(masks.terminal(server.alpha, server.mask))
        cut = [space.carry_over(x, masks.keep(server.mask), plan) for x in (net.params, net.stats)]
        net = Net(*cut, net.mix)
    elif chosen.genotype is not None:
        nodes = chosen.arguments["nodes"]
        plan = genotypes.to_keep(chosen.genotype, nodes)
        net = net._replace(mix=genotypes.to_mix(chosen.genotype, nodes))
    path = workdir / "network.npz"
    network.save(
        path, net, kind=chosen.kind, arguments=chosen.arguments, plan=plan, label_names=dataset.label_names
    )

    # The file is read back and asked, so that what is delivered is what was measured.
    loaded = network.load(path)
    images = np.asarray(data.image[data.central])
    answers = loaded.logits(images)
    right = answers.argmax(-1) == np.asarray(data.label[data.central])
    summary |= {
        "network_accuracy": float(np.mean(right)),
        "network_parameters": int(sum(x.size for x in jax.tree.leaves(net.params))),
        "network_bytes": tree.nbytes((net.params, net.stats)),
        "network_largest_logit_difference": float(np.max(np.abs(answers[:64] - expected))),
        "majority_class_local_accuracy": json.loads((workdir / "partition.json").read_text())["majority_accuracy"],
        "versions": records.versions(),
    }
    records.write_json(workdir / "result.json", summary)
    print(_last_words(summary, workdir))


def _last_words(summary: dict, workdir: Path) -> str:
    figures = [f"server accuracy {summary['server_accuracy']:.4f}"]
    if "server_accuracy_discrete" in summary:
        figures.append(f"after pruning {summary['server_accuracy_discrete']:.4f}")
    if "local_accuracy" in summary:
        figures.append(f"local accuracy {summary['local_accuracy']['mean']:.4f}")
    if "local_accuracy_adapted" in summary:
        figures.append(f"adapted {summary['local_accuracy_adapted']['mean']:.4f}")
    figures.append(f"majority class {summary['majority_class_local_accuracy']:.4f}")
    return f"{', '.join(figures)}\nall of it is in {workdir}: result.json, curves.png, network.npz, ..."
