"""From a Config to a finished run: the one place that knows everything."""

import json
import os
import typing
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
from fedmetanas_jax.engine.report import NonFiniteError
from fedmetanas_jax.models.darts import darts_space
from fedmetanas_jax.models.mobilenetv3 import mobilenetv3
from fedmetanas_jax.nas import genotype as genotypes
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import picture as cell_picture
from fedmetanas_jax.options import UsageError

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


def network_arguments(config: Config, dataset: sources.Dataset, searched: bool) -> dict:
    """What the makers of both networks are called with, but for the type they compute in; JSON-able."""
    mean, std = sources.mean_std(config.dataset, dataset)
    common = {
        "shape": dataset.train_images.shape[1:],
        "classes": len(dataset.label_names),
        "mean": mean,
        "std": std,
    }
    if searched:
        return common | {"width": config.width, "length": config.cells, "nodes": config.nodes}
    return common | {"stem": config.stem, "variant": config.mobilenet}


def searches(factory) -> bool:
    """Whether a method takes a search space, rather than one model, as its first argument."""
    return next(iter(typing.get_type_hints(factory).values())) is SearchSpace


def one_phase(algorithm: Algorithm) -> list[Phase]:
    """A method that runs the same program from the first round to the last."""
    return [Phase(0, lambda server_state: (None, server_state), lambda plan: algorithm)]


def make_phases(config: Config, dataset: sources.Dataset) -> tuple[list[Phase], SearchSpace | None]:
    """The method's phases over its network, and the search space if it has one. UsageError names what is off."""
    factory = ALGORITHMS[config.method]
    on_cpu = jax.default_backend() == "cpu"
    bfloat16 = config.compute == "bfloat16" or (config.compute == "auto" and not on_cpu)
    dtype = jnp.bfloat16 if bfloat16 else jnp.float32
    mean, _ = sources.mean_std(config.dataset, dataset)
    try:
        setting = Setting(config.rounds, config.epochs, config.batch, augmenter(config.augment, mean=mean))
        arguments = network_arguments(config, dataset, searches(factory)) | {"dtype": dtype}
        space = darts_space(**arguments) if searches(factory) else None
        made = factory(mobilenetv3(**arguments) if space is None else space, setting, **config.options)
        phases = one_phase(made) if isinstance(made, Algorithm) else made
        phases[0].make(phases[0].enter(None)[0])  # an image the network cannot take is found here
    except ValueError as error:
        raise UsageError(str(error)) from error
    return phases, space


def make_data(config: Config, dataset: sources.Dataset, workdir: Path) -> FederatedData:
    """The clients' data; leaves partition.json and partition.png in the workdir."""
    classes = len(dataset.label_names)
    labels = (dataset.train_labels, dataset.test_labels)
    names = ("clients", "train_size", "test_size", "concentration", "tau", "seed")
    parameters = {name: getattr(config, name) for name in names}
    try:
        parts = partition.partition(config.partition, *labels, classes=classes, **parameters)
    except ValueError as error:
        raise UsageError(str(error)) from error
    smallest = min(len(rows) for rows in parts.train)
    if smallest < 2 * config.batch and searches(ALGORITHMS[config.method]):
        raise UsageError(
            f"a client has {smallest} training images, but a support and a query batch take {2 * config.batch}; "
            f"config.batch can be at most {smallest // 2}"
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
        phases, space = make_phases(config, dataset)
        try:
            mesh = clients_mesh(config.devices)
        except ValueError as error:
            raise UsageError(str(error)) from error
        data = make_data(config, dataset, workdir)
        names = engine.Plan._fields
        plan = engine.Plan(**{name: getattr(config, name) for name in names})
        if config.at_once < 0:
            plan = plan._replace(at_once=1 if jax.default_backend() == "cpu" else 0)
        outcome = engine.run(
            phases, data, plan, workdir=workdir, mesh=mesh, stop_after=stop_after, go_on=command
        )
        title = f"{task}, {config.method}, seed {config.seed}"
        curves.draw(records.read(workdir / "records.jsonl"), workdir / "curves.png", title)
        if outcome is not None:
            finish(config, dataset, space, data, *outcome, workdir=workdir)


def finish(
    config: Config,
    dataset: sources.Dataset,
    space: SearchSpace | None,
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
    net, plan = served(server), None
    if config.bn_eval == "recalibrated":
        rows = calibration_rows(data, config.seed, state.round - 1, config.cohort)
        net = recalibrate(algorithm.forward, net, data.image[rows], config.eval_batch)
    expected = np.asarray(algorithm.forward(net, data.image[data.central[:64]], False)[0])
    if space is not None:
        genotype = genotypes.pair_rule(server.alpha, server.mask)
        records.write_text(workdir / "genotype.json", genotypes.to_json(genotype))
        records.write_text(workdir / "genotype.txt", genotypes.to_text(genotype))
        cell_picture.draw(genotype, workdir / "cells.png")
        plan = masks.keep(masks.terminal(server.alpha, server.mask))
        cut = [space.carry_over(x, masks.keep(server.mask), plan) for x in (net.params, net.stats)]
        net = Net(*cut, net.mix)
    arguments = network_arguments(config, dataset, space is not None)
    kind = "mobilenetv3" if space is None else "darts"
    path = workdir / "network.npz"
    network.save(path, net, kind=kind, arguments=arguments, plan=plan, label_names=dataset.label_names)

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
