"""What a finished run leaves: the genotype and a picture of it, the network as one file, and the figures."""

import json
from pathlib import Path

import jax
import numpy as np

from fedmetanas_jax import network, tree
from fedmetanas_jax.architecture import Architecture
from fedmetanas_jax.core import FederatedData, Net, SearchSpace
from fedmetanas_jax.data.dataset import Dataset
from fedmetanas_jax.engine.course import Served
from fedmetanas_jax.engine.records import WorkdirError, versions
from fedmetanas_jax.engine.run import Outcome
from fedmetanas_jax.files import write_json, write_text
from fedmetanas_jax.nas import genotype as genotypes
from fedmetanas_jax.nas import picture


def finish(
    dataset: Dataset,
    chosen: Architecture,
    data: FederatedData,
    outcome: Outcome,
    *,
    workdir: Path,
) -> None:
    """Writes result.json and, of a method with a network that serves everybody, what that network is."""
    summary = outcome.summary
    if (workdir / "partition.json").exists():  # else nobody here knows what clients hold
        majority = json.loads((workdir / "partition.json").read_text())["majority_accuracy"]
        summary["majority_class_local_accuracy"] = majority
    summary["versions"] = versions()
    if outcome.served is not None:
        summary |= _network(dataset, chosen, data, outcome.algorithm.space, outcome.served, workdir)
    write_json(workdir / "result.json", summary)
    print(_last_words(summary, workdir))


def _network(
    dataset: Dataset,
    chosen: Architecture,
    data: FederatedData,
    space: SearchSpace | None,
    served: Served,
    workdir: Path,
) -> dict:
    """Writes the network and its genotype -> the figures of the file, which is read back and asked."""
    from scipy.special import logsumexp  # slow to import, and needed once a run

    arguments, plan, net = chosen.arguments, served.plan, jax.device_get(served.net)
    if chosen.genotype is not None:
        graph = chosen.space.graph
        plan = genotypes.to_plan(graph, chosen.genotype)
        net = net._replace(mix=genotypes.to_mix(graph, chosen.genotype))
    elif space is not None:
        arguments = arguments | space.size
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
    image, label = (np.asarray(x[data.central]) for x in (data.image, data.label))
    answers = network.load(path).logits(image)
    loss = logsumexp(answers, axis=-1) - answers[np.arange(len(label)), label]
    return {
        "network_accuracy": float(np.mean(answers.argmax(-1) == label)),
        "network_parameters": int(sum(x.size for x in jax.tree.leaves(net.params))),
        "network_bytes": tree.nbytes((net.params, net.stats)),
        "network_largest_loss_difference": float(np.max(np.abs(loss - served.loss))),  # of an image, nats
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
