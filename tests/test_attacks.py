"""The script about bad clients and privacy: what it refuses, what bad clients send, its table, a small run."""

import json
from functools import partial

import attackers
import attacks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from fedmetanas_jax import build, tree
from fedmetanas_jax.core import Phase
from fedmetanas_jax.data.sources import load
from fedmetanas_jax.engine.report import NonFiniteError
from fedmetanas_jax.engine.round import train_examples
from fedmetanas_jax.files import write_json

KEY = jax.random.key(0)
CHANGE = {"params": {"w": jnp.array([3.0, -4.0]), "b": jnp.array(0.0)}, "stats": jnp.array([1.0])}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out=NAME is needed"),
        (["--out=x", "--methods="], "--methods is empty"),
        (["--out=x", "--aggregates=mode"], "--aggregates: mode is none of mean, clip, median, trimmed"),
        (["--out=x", "--attacks=lie"], "--attacks: lie is none of none, flip, scale, random"),
        (["--out=x", "--attackers=5"], "it must be less than half of the 10 clients"),
        (["--out=x", "--many=100"], "--many must be two numbers"),
        (["--out=x", "--partitions=dirichle"], "did you mean 'dirichlet'"),
        (["--out=x", "--methods=fedavgg"], "did you mean 'fedavg'"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(arguments, message, capsys):
    assert attacks.main(["attacks.py", "--config=digits_dir01", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_bad_clients_send():
    assert tuple(attackers.ATTACKS) == attacks.ATTACKS
    assert attackers.flip(CHANGE, KEY)["params"]["w"].tolist() == [-3, 4]
    assert attackers.scale(CHANGE, KEY)["stats"].tolist() == [1e6]
    noise = attackers.random(CHANGE, KEY)
    for part, length in {"params": 50.0, "stats": 10.0}.items():
        np.testing.assert_allclose(tree.global_norm(noise[part]), length, rtol=1e-5)
    assert noise["params"]["b"] != 0
    assert noise["params"]["w"].tolist() != attackers.random(CHANGE, jax.random.key(1))["params"]["w"].tolist()


def test_the_first_clients_are_bad_and_all_else_is_the_method():
    data, update = toy.make_data(), jax.jit(attackers.poisoned(toy.ALGORITHM, "none", 2).client_update)
    for attack, sign in (("none", 1.0), ("flip", -1.0), ("scale", 1e6)):
        bad = attackers.poisoned(toy.ALGORITHM, attack, 2)
        server, kept = bad.init(KEY)
        for client in (1, 2):
            rows = train_examples(data, client)
            honest = jax.jit(toy.client_update)(server, kept.own, rows, KEY)
            # The program of another attack: what they do is what clients keep.
            reply = update(bad.send(server, jnp.int32(client), None), kept, rows, KEY)
            expected = tree.scale(honest.change, sign if client == 1 else 1.0)
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6 * abs(sign)), reply.change, expected)
            assert reply.own.own["turns"] == 1
            assert reply.own.attack == kept.attack
            assert reply.weight == honest.weight


def test_phases_that_share_a_maker_still_do():
    def factory(space, setting, *, depth: int = 1):
        """A search."""
        make = toy.ALGORITHM._replace
        return [Phase(0, None, make), Phase(2, None, make), Phase(4, None, lambda plan: toy.ALGORITHM)]

    made = attackers.attacked(factory, "flip", 1)(None, None)
    assert made[0].make is made[1].make
    assert made[2].make is not made[0].make
    assert made[2].make(None).send(1, 2, None).client == 2


def test_the_table_by_hand():
    def cell(table, row, column, *runs):
        return {"table": table, "row": row, "column": column, "runs": dict(enumerate(runs))}

    stopped = {"stopped": "round 3, client 2: loss = nan is not finite; ..."}
    private = {"server_accuracy": 0.7, "epsilon": 12.345, "delta": 0.01}
    lines = attacks.markdown(
        {
            "command": "python experiments/attacks.py",
            "attackers": 2,
            "versions": {"device": "cpu", "devices": 1, "cpus": 2, "jax": "0"},
            "cells": [
                cell("fedavg, iid", "mean", "none", {"server_accuracy": 0.9}, {"server_accuracy": 0.8}),
                cell("fedavg, iid", "mean", "scale", {"server_accuracy": 0.9}, stopped),
                cell("fedavg, iid", "median", "none", {"server_accuracy": 0.85}),
                cell("fedavg, noise", "ten", "0", private | {"epsilon": None}),
                cell("fedavg, noise", "ten", "1", private),
            ],
        }
    ).splitlines()
    assert lines[0] == "| fedavg, iid | none | scale |"
    assert lines[2] == "| mean | 85.0 +- 7.1 | stopped in round 3 (1 of 2) |"
    assert lines[3] == "| median | 85.0 |  |"
    assert lines[7] == "| ten | 70.0, epsilon infinite | 70.0, epsilon 12.3 at delta 0.01 |"


def test_runs_are_of_the_attacked_method_and_not_done_again(tmp_path, monkeypatch, capsys):
    """Each in a workdir of its own; networks are made and not trained."""
    done = []

    def run(config, *, task, workdir, data_dir):
        phases, _ = build.make_phases(config, load("digits", "data"))
        algorithm = build.first_algorithm(phases)
        own = jax.eval_shape(algorithm.init, KEY)[1]
        assert isinstance(own, attackers.Own)
        done.append((config.method, config.aggregate, config.partition, config.cohort))
        if config.method == "fedavg+scale":
            raise NonFiniteError("round 2, client 1: loss = nan is not finite; there is no checkpoint yet")
        write_json(workdir / "result.json", {"server_accuracy": 0.5})

    monkeypatch.setattr(build, "run", run)
    asked = ["--partitions=iid", "--aggregates=trimmed", "--attacks=none,scale", f"--out={tmp_path / 'table'}"]
    argv = ["attacks.py", "--config=digits_dir01", "--config.network=mobilenetv3_tiny", *asked, "--noise="]
    argv.append(f"--workdir={tmp_path / 'runs'}")
    assert attacks.main(argv) == 0
    assert done == [(f"fedavg+{attack}", "trimmed:0.2", "iid", 10) for attack in ("none", "scale")]
    assert "| trimmed:0.2 | 50.0 | stopped in round 2 |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    figures = json.loads((tmp_path / "table.json").read_text())
    assert attacks.main(argv) == 0
    assert len(done) == 2
    assert json.loads((tmp_path / "table.json").read_text()) == figures
    assert attacks.main([*argv, "--config.lr=0.2"]) == 2
    assert "is of another config" in capsys.readouterr().err


def test_noise_is_added_in_a_small_and_a_large_federation_of_as_many_images():
    argv = ["attacks.py", "--config=digits_dir01", "--out=x", "--noise=0.5", "--many=100,50"]
    few, many = attacks.under_noise(attacks.parse(argv, attacks.OWN))
    assert few.fields["aggregate"] == many.fields["aggregate"] == "clip:1,gaussian:0.5"
    assert few.fields["method"] == "fedavg"
    assert (few.fields["clients"], few.fields["cohort"]) == (10, 5)
    assert (many.fields["clients"], many.fields["cohort"], many.fields["train_size"]) == (100, 50, 12)
