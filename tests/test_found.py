"""The network found, trained by its own program and by one that any network can share."""

import dataclasses
import json
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from toy_federation import SETTING, SHAPE, federation
from toy_model import ask, close, merged, same
from toy_space import everything, toy_space

from fedmetanas_jax import build, tree
from fedmetanas_jax.algorithms import averaging, found
from fedmetanas_jax.config import Config
from fedmetanas_jax.core import Phase, Reply
from fedmetanas_jax.engine import programs
from fedmetanas_jax.engine.kept import Kept
from fedmetanas_jax.engine.round import traffic_of, train_examples
from fedmetanas_jax.models.darts import darts_space
from fedmetanas_jax.nas import mask as masks

SPACE = toy_space(classes=4, every_edge=True)._replace(skips=True)
PLAN = [[[2], [1], [0], [2], [1]], [[1], [2], [2], [0], [2]]]
DATA = federation()


def phase_of(space, plan, server=None) -> Phase:
    return found.training(space, SETTING, 4, lambda *_: (plan, server), "prune")


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "records.jsonl").read_text().splitlines()]


def both(space, plan):
    """(the network's own algorithm and server, the shared one's, its plan) at the same fresh weights."""
    phase = phase_of(space, plan)
    own = phase.make(plan)
    server = jax.jit(own.init)(jax.random.key(1))[0]
    whole, shared = phase.shared(server, plan)
    return (own, server), (phase.make(whole), shared), whole


def test_a_shared_program_does_what_the_networks_own_does():
    (own, server), (algorithm, shared), whole = both(SPACE, PLAN)
    assert whole == everything(SPACE)
    assert tree.form(jax.eval_shape(algorithm.init, jax.random.key(0))[0]) == tree.form(shared)

    def kept(x):
        return SPACE.carry_over(x, whole, PLAN)

    same(kept(shared.params), server.params)
    replies = []
    for a, s in ((own, server), (algorithm, shared)):
        client = jax.jit(lambda *given, a=a: ask(a, *given))
        replies.append([client(s, (), train_examples(DATA, k), jax.random.key(k)) for k in (0, 1)])
    for wanted, got in zip(*replies, strict=True):
        for part in ("params", "stats"):
            close(kept(got.change[part]), wanted.change[part], atol=2e-4)
            here = algorithm.held(shared)[part]
            same(tree.only(jax.tree.map(jnp.logical_not, here), got.change[part]), tree.zeros_like(got.change[part]))
            assert tree.global_norm(wanted.change[part]) > 0.01
        macs = 3 * own.macs * float(wanted.metrics["image_gradients"])
        np.testing.assert_allclose(got.metrics["macs"], macs, rtol=1e-6)
        assert got.metrics["image_gradients"] == wanted.metrics["image_gradients"]
    after, now = own.server_update(server, merged(*replies[0])), algorithm.server_update(shared, merged(*replies[1]))
    assert (after.round, now.round) == (1, 1)
    close(kept(now.params), after.params, atol=2e-4)
    images = DATA.image[DATA.central]
    nets = own.discrete_model(server), algorithm.discrete_model(shared)
    same(nets[0].mix, nets[1].mix)
    close(*(a.forward(net, images, False)[0] for a, net in zip((own, algorithm), nets, strict=True)))
    rows, key = train_examples(DATA, 1), jax.random.key(9)
    mine = [
        jax.jit(a.personalize)(a.send(s, 1, None), (), rows, key, jnp.int32(3))
        for a, s in ((own, after), (algorithm, now))
    ]
    close(kept(mine[1].params), mine[0].params, atol=2e-4)
    assert tree.global_norm(tree.sub(mine[0].params, after.params)) > 0.001


def test_what_the_network_lacks_is_not_sent():
    (own, server), (algorithm, shared), _ = both(SPACE, PLAN)
    message = own.send(server, jnp.int32(0), None)
    change = {part: getattr(shared, part) for part in ("params", "stats")}  # shaped so
    sizes = traffic_of(algorithm.held(shared), shared, Reply(change, jnp.float32(1), (), (), {}))
    assert sizes["bytes_up"] == tree.nbytes((message.params, message.stats))
    assert sizes["bytes_down"] == tree.nbytes(message) + shared.ops.size  # which operations


def test_of_a_real_space_every_weight_finds_its_place():
    space = darts_space(**SHAPE, width=4, length=3, nodes=2)._replace(skips=True)  # with pairs: edges that are dead
    alpha = jax.tree.map(lambda x: jax.random.normal(jax.random.key(3), x.shape), masks.full(space.graph))
    plan = masks.plan_of(space.graph, masks.terminal(space.graph, alpha, masks.full(space.graph)))
    phase = phase_of(space, plan)
    params, stats = jax.jit(space.make(plan).init)(jax.random.key(1))
    whole, shared = phase.shared(averaging.Server(jnp.int32(4), params, stats), plan)
    for x, wanted in ((shared.params, params), (shared.stats, stats)):
        same(space.carry_over(x, whole, plan), wanted)
        assert sum(a.size for a in jax.tree.leaves(x)) > sum(a.size for a in jax.tree.leaves(wanted))
    assert masks.plan_of(space.graph, masks.Mask(shared.ops, masks.of_plan(space.graph, plan).pair)) == plan


@pytest.mark.parametrize(("compile_ahead", "shares"), [(0, False), (3, False), (4, True)])
def test_networks_have_programs_of_their_own_unless_the_run_ends_first(tmp_path, compile_ahead, shares):
    def search(server, plan, key):
        return PLAN, None

    first = Phase(0, lambda server, plan, key: (PLAN, None), phase_of(SPACE, PLAN).make)
    last = phase_of(SPACE, PLAN)._replace(enter=search)
    how = {"rounds": 8, "compile_ahead": compile_ahead, "clients": 6, "cohort": 3}
    outcome = toy.run([first, last], DATA, tmp_path / "run", [], **how)
    assert outcome.plan == (everything(SPACE) if shares else PLAN)
    resumed = toy.run([first, last], DATA, tmp_path / "again", [], stop_after=6, **how)
    assert resumed is None
    resumed = toy.run([first, last], DATA, tmp_path / "again", [], **how)
    same(resumed.state.server, outcome.state.server)
    assert resumed.plan == outcome.plan


def test_another_seed_compiles_nothing(tmp_path, monkeypatch):
    lowered, kept = Mock(wraps=programs._lowered), Kept()
    monkeypatch.setattr(programs, "_lowered", lowered)
    config = Config(
        method="fedrlnas", dataset="digits", width=2, cells=1, nodes=1, clients=4, cohort=2, train_size=32,
        test_size=16, rounds=4, epochs=1, batch=8, augment=(), at_once=1, devices=1, eval_every=0, lr=0.1,
        checkpoint_every=2, final_adapt=False, compile_ahead=4,
    )  # fmt: skip
    counts = []
    for seed, ahead in ((1, 4), (2, 4), (2, 0)):
        changed = dataclasses.replace(config, seed=seed, compile_ahead=ahead)
        build.run(changed, task="t", workdir=tmp_path / f"{seed}{ahead}", data_dir=tmp_path, kept=kept)
        counts.append(lowered.call_count)
    assert counts[0] == counts[1] < counts[2]
    shared, own = (tmp_path / name for name in ("24", "20"))
    for one, other in zip(records(shared), records(own), strict=True):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=2e-3)
        assert (one["macs"], one["bytes_up"]) == (other["macs"], other["bytes_up"])
    assert (shared / "genotype.json").read_text() == (own / "genotype.json").read_text()
    with np.load(shared / "network.npz") as one, np.load(own / "network.npz") as other:
        assert {name: one[name].shape for name in one.files} == {name: other[name].shape for name in other.files}
    assert json.loads((shared / "result.json").read_text())["network_largest_loss_difference"] < 1e-4
