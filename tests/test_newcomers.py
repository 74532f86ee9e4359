"""What a newcomer has to write: a method and a search method in a file each, and nothing anywhere else."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from newcomers import darts_fedavg, fedprox_from_nothing
from toy_model import ask, close, examples, jit, merged, toy_model, unchanged

from fedmetanas_jax import build
from fedmetanas_jax.algorithms import ALGORITHMS
from fedmetanas_jax.algorithms.fedprox import fedprox
from fedmetanas_jax.config import Config
from fedmetanas_jax.core import Setting
from fedmetanas_jax.nas import genotype as genotypes
from fedmetanas_jax.network import load

TINY = Config(
    dataset="digits", clients=4, cohort=2, train_size=32, test_size=16, rounds=4, epochs=1, batch=8, augment=(),
    width=2, cells=1, nodes=1, at_once=1, eval_every=2, checkpoint_every=2, network="mobilenetv3_tiny", lr=0.1,
)  # fmt: skip


@pytest.mark.parametrize(("module", "most"), [(fedprox_from_nothing, 40), (darts_fedavg, 60)])
def test_it_is_short(module, most):
    assert len(Path(module.__file__).read_text().splitlines()) < most


def test_fedprox_from_nothing_is_fedprox():
    model, setting = toy_model(hidden=4, centred=True), Setting(10, 2, 4, unchanged)
    found = []
    for factory in (fedprox, fedprox_from_nothing.mine):
        algorithm = factory(model, setting, mu=0.5)
        server, own = algorithm.init(jax.random.key(1))
        client = jit(lambda *x, algorithm=algorithm: ask(algorithm, *x))
        for r in range(2):
            replies = [client(server, own, examples(9, 9 - k, seed=k), jax.random.key(10 * r + k)) for k in (0, 1)]
            server = algorithm.server_update(server, merged(*replies))
        found.append((server.params, server.stats))
    close(*found)


def run(monkeypatch, tmp_path, factory, config: Config) -> tuple[list[dict], dict, Path]:
    monkeypatch.setitem(ALGORITHMS, "mine", factory)
    build.run(dataclasses.replace(config, method="mine"), task="t", workdir=tmp_path / "run", data_dir=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    return lines, json.loads((tmp_path / "run" / "result.json").read_text()), tmp_path / "run"


def test_a_line_in_the_list_of_methods_is_enough_to_run_it(monkeypatch, tmp_path):
    lines, result, _ = run(monkeypatch, tmp_path, fedprox_from_nothing.mine, TINY)
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    assert result["network_largest_loss_difference"] < 1e-4


def test_so_it_is_for_a_search(monkeypatch, tmp_path):
    config = dataclasses.replace(TINY, options={"cut": 0.5, "alpha_lr": 0.1})
    lines, result, workdir = run(monkeypatch, tmp_path, darts_fedavg.darts_fedavg, config)
    assert [line.get("event") for line in lines] == [None, "prune", None, None]
    assert lines[-1]["ops_alive"] == 4  # two edges of one node, in both cell types
    assert lines[1]["alpha_max"] > lines[0]["alpha_max"] > 0.12  # of 8 operations; they are learnt
    assert result["server_accuracy"] == result["server_accuracy_discrete"]
    assert result["network_largest_loss_difference"] < 1e-4
    assert set(genotypes.from_json((workdir / "genotype.json").read_text())) == {"normal", "reduce"}


def test_fedmetanas_searches_another_space_with_nothing_changed(tmp_path):
    """NAS-Bench-201's cell: one type, every edge stays, one operation of five on each."""
    config = dataclasses.replace(
        TINY, space="nasbench201", cells=3, devices=1, final_adapt=False, compile_ahead=4,
        options={
            "prune_from": 0.5, "prune_until": 0.5, "prune_events": 1, "alpha_lr": 0.05, "warmup": 0.0,
            "prune_tolerance": None,
        },
    )  # fmt: skip
    workdir = tmp_path / "run"
    build.run(config, task="t", workdir=workdir, data_dir=tmp_path)
    lines = [json.loads(line) for line in (workdir / "records.jsonl").read_text().splitlines()]
    assert [line["ops_alive"] for line in lines] == [30, 30, 6, 6]
    assert lines[1]["event_ops_alive"] == 6
    assert lines[0]["pairs_alive"] == 0
    result = json.loads((workdir / "result.json").read_text())
    assert result["network_largest_loss_difference"] < 1e-4
    found = genotypes.from_json((workdir / "genotype.json").read_text())
    assert [len(node) for node in found["cell"]] == [1, 2, 3]
    assert (workdir / "cells.png").stat().st_size > 1000
    assert load(workdir / "network.npz").predict(np.zeros((3, 8, 8, 1), np.uint8)).shape == (3,)
    # What was found can be trained from scratch, at another size.
    again = dataclasses.replace(config, method="fedavg", network=str(workdir / "genotype.json"), width=4, options={})
    algorithm, _ = build.without_a_run(again, str(tmp_path))
    server, _ = jax.eval_shape(algorithm.init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(server.params)) > result["network_parameters"]
