"""What a finished run leaves: the genotype and a picture of it, the network as one file, and the figures."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from fedmetanas_jax import network, tree
from fedmetanas_jax.architecture import Architecture
from fedmetanas_jax.config import Config
from fedmetanas_jax.core import Algorithm, FederatedData, Net
from fedmetanas_jax.data.dataset import Dataset
from fedmetanas_jax.engine.evaluate import calibration_rows, recalibrate
from fedmetanas_jax.engine.programs import Kept
from fedmetanas_jax.engine.records import WorkdirError, versions
from fedmetanas_jax.engine.run import Outcome
from fedmetanas_jax.files import write_json, write_text
from fedmetanas_jax.nas import genotype as genotypes
from fedmetanas_jax.nas import picture

ASKED = 64  # test images whose answers are compared, of the run's program and of the file


def finish(
    config: Config,
    dataset: Dataset,
    chosen: Architecture,
    data: FederatedData,
    outcome: Outcome,
    *,
    workdir: Path,
    kept: Kept | None = None,
) -> None:
    """Writes result.json and, of a method with a network that serves everybody, what that network is. kept: programs,
    as `build.run` has them."""
    kept, of = kept or Kept(), json.dumps(outcome.plan)
    algorithm, summary = outcome.algorithm, outcome.summary
    if (workdir / "partition.json").exists():  # else nobody here knows what clients hold
        majority = json.loads((workdir / "partition.json").read_text())["majority_accuracy"]
        summary["majority_class_local_accuracy"] = majority
    summary["versions"] = versions()
    served = algorithm.discrete_model or algorithm.global_model
    if served is not None:
        net = served(outcome.state.server)
        if config.bn_eval == "recalibrated":
            rows = calibration_rows(data, outcome.state.seed, outcome.state.round - 1, config.cohort)

            def recalibrated(net, image):
                return recalibrate(algorithm.forward, net, image, config.eval_batch)

            net = _compiled(kept, ("recalibration", of), recalibrated, net, data.image[rows])

        def logits(net, image):
            return algorithm.forward(net, image, False)[0]

        expected = _compiled(kept, ("logits", of), logits, net, data.image[data.central[:ASKED]])
        summary |= _network(dataset, chosen, data, algorithm, outcome.plan, net, np.asarray(expected), workdir)
    write_json(workdir / "result.json", summary)
    print(_last_words(summary, workdir))


def _compiled(kept: Kept, name: tuple[str, str], function: Callable, *arguments):
    """function(*arguments), by a program: operation by operation a hundred small ones would be compiled."""
    wanted = *name, *tree.form(arguments)
    program = kept.get(wanted)
    if program is None:
        program = jax.jit(function).lower(*arguments).compile()
        kept.put(wanted, program)
    return program(*arguments)


def _network(
    dataset: Dataset,
    chosen: Architecture,
    data: FederatedData,
    algorithm: Algorithm,
    plan,
    net: Net,
    expected: np.ndarray,
    workdir: Path,
) -> dict:
    """Writes the network and its genotype -> the figures of the file, which is read back and asked.

    expected [n, classes]: what the run's own program answers to the first test images.
    """
    arguments = chosen.arguments
    if chosen.genotype is not None:
        graph = chosen.space.graph
        plan = genotypes.to_plan(graph, chosen.genotype)
        net = net._replace(mix=genotypes.to_mix(graph, chosen.genotype))
    elif algorithm.space is not None:
        space, arguments = algorithm.space, arguments | algorithm.space.size
        genotype = genotypes.of_mix(space.graph, net.mix)
        write_genotype(chosen, genotype, workdir)
        text = genotypes.to_text(space.graph, genotype)
        if chosen.kind == "darts" and arguments["length"] < 3:
            cells = arguments["length"]
            text += f"\na network of {cells} cells has reduction cells only: the normal cell is none of them"
        write_text(workdir / "genotype.txt", text)
        picture.draw(space.graph, genotype, workdir / "cells.png")
        found = genotypes.to_plan(space.graph, genotype)
        params, stats = (space.carry_over(x, plan, found) for x in (net.params, net.stats))
        plan, net = found, Net(params, stats, net.mix)
    path, names = workdir / "network.npz", dataset.label_names
    network.save(path, net, kind=chosen.kind, arguments=arguments, plan=plan, label_names=names)
    # What is delivered is what was measured.
    answers = network.load(path).logits(np.asarray(data.image[data.central]))
    return {
        "network_accuracy": float(np.mean(answers.argmax(-1) == np.asarray(data.label[data.central]))),
        "network_parameters": int(sum(x.size for x in jax.tree.leaves(net.params))),
        "network_bytes": tree.nbytes((net.params, net.stats)),
        "network_largest_logit_difference": float(np.max(np.abs(answers[:ASKED] - expected))),
    }


def write_genotype(chosen: Architecture, genotype: genotypes.Genotype, workdir: Path) -> None:
    """Leaves genotype.json: what a search found, or what a run was given. WorkdirError where the run was given
    another one when it began."""
    path, text = workdir / "genotype.json", genotypes.to_json(genotype)
    if chosen.genotype is not None and path.exists() and path.read_text() != text:
        raise WorkdirError(f"{path} is not the genotype that config.network now holds; use another workdir")
    write_text(path, text)


def _last_words(summary: dict, workdir: Path) -> str:
    search = summary.get("search", {})  # of a network that was trained again since
    named = {
        "supernet": search.get("server_accuracy"),
        "pruned": search.get("server_accuracy_discrete"),
        "server accuracy": summary.get("server_accuracy"),
        "after pruning": summary.get("server_accuracy_discrete"),
        "local accuracy": summary.get("local_accuracy", {}).get("mean"),
        "adapted": summary.get("local_accuracy_adapted", {}).get("mean"),
        "majority class": summary.get("majority_class_local_accuracy"),
        "epsilon": summary.get("epsilon"),
    }
    figures = [f"{name} {value:.4f}" for name, value in named.items() if value is not None]
    return f"{', '.join(figures)}\nall of it is in {workdir}: result.json, curves.png, network.npz, ..."
