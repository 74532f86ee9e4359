"""FedPNAS and meta-FedPNAS: what is personal, the corrected gradient, what they are equal to."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_federation import SETTING
from toy_model import ask, examples, jit, unchanged
from toy_space import flat, toy_space

from fedmetanas_jax import optimizers
from fedmetanas_jax.algorithms.fedavg import fedavg
from fedmetanas_jax.algorithms.fedmetanas import fedmetanas
from fedmetanas_jax.algorithms.fedpnas import _corrected, fedpnas
from fedmetanas_jax.algorithms.metafedpnas import metafedpnas
from fedmetanas_jax.algorithms.personal import base_of, personal_part
from fedmetanas_jax.architecture import make_architecture
from fedmetanas_jax.config import Config
from fedmetanas_jax.core import Alpha
from fedmetanas_jax.data import sources
from fedmetanas_jax.models.darts import darts_space
from fedmetanas_jax.models.nasbench201 import nasbench201_space
from fedmetanas_jax.nas import genotype as genotypes
from fedmetanas_jax.options import UsageError

SHAPE = {"shape": (8, 8, 1), "classes": 3, "mean": (0.5,), "std": (0.25,)}
SHORT = SETTING._replace(epochs=1, batch=4, augment=unchanged)
DATA = examples(16, 16)


@cache
def made(factory, **options):
    """(the first algorithm of the method on the toy space, a compiled client)."""
    options = dict(options)
    setting = SHORT._replace(**options.pop("setting", {}))
    phase = factory(toy_space(classes=3), setting, **options)[0]
    algorithm = phase.make(phase.enter(None, None, None)[0])
    return algorithm, jit(lambda *x: ask(algorithm, *x))


def after(factory, round: int = 30, key: int = 0, **options):
    """(server, reply) of a client in that round."""
    algorithm, client = made(factory, **options)
    server, own = algorithm.init(jax.random.key(1))
    server = server._replace(round=jnp.int32(round))
    return server, client(server, own, DATA, jax.random.key(key))


def test_a_quarter_of_the_cells_and_the_head_are_personal():
    space = darts_space(**SHAPE, length=8, nodes=1, width=4)
    assert (base_of(space, None), base_of(space.resized(length=3), None), base_of(space, 0)) == (6, 2, 0)
    part = personal_part(space.resized(parts=tuple(range(1, 8))), 6)
    names = ("stem", "stem_scale", "cell_0", "cell_5", "cell_6", "cell_7", "head_bias", "head_kernel")
    assert [part.has(name) for name in names] == [False] * 4 + [True] * 4
    assert part.rows.tolist() == [6, 7]
    by_type = space.resized(parts=(5,))
    assert by_type.graph.cell_types == ("normal_0", "reduce_0", "reduce_5", "normal_5")
    assert personal_part(by_type, 5).rows.tolist() == [2, 3]
    other = nasbench201_space(**SHAPE, length=6, width=4)
    part = personal_part(other.resized(parts=(4,)), 4)
    assert [part.has(n) for n in ("halving_2", "halving_4", "cell_4", "last_norm")] == [False, True, True, True]
    with pytest.raises(ValueError, match="base_cells is 9; it must be none, or 0 to the 8 cells"):
        base_of(space, 9)


def test_corrected_gradient_by_hand():
    # g1 = (3, 4), g2 = (1, 2), eta = 0.01: g2 - 0.01 * 11 * g1 = (0.67, 1.56).
    got = _corrected(0.01)({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 4.0])})
    np.testing.assert_allclose(got["w"], [0.67, 1.56], rtol=1e-6)


def test_part_takes_weights_and_logits_apart_and_its_optimizer_moves_nothing_else():
    part = personal_part(toy_space(parts=(1,)), 1)
    variables = {
        "params": {"stem": jnp.ones(2), "cell_0": jnp.ones(2), "cell_1": jnp.ones(2), "head_bias": jnp.ones(2)},
        "alpha": Alpha(jnp.ones((2, 5, 3)), jnp.ones((2, 4))),
    }
    optimizer = part.alone(optimizers.weights_and_alphas(optimizers.sgd(0.5), optimizers.sgd(0.25)))
    updates, _ = optimizer.update(variables, optimizer.init(variables), variables)
    assert {name: float(x[0]) for name, x in updates["params"].items()} == {
        "stem": 0.0, "cell_0": 0.0, "cell_1": -0.5, "head_bias": -0.5,
    }  # fmt: skip
    assert updates["alpha"].op[:, 0, 0].tolist() == [0, -0.25] == updates["alpha"].pair[:, 0].tolist()


def test_without_a_trial_step_and_with_an_empty_personal_part_it_is_the_second_pass_alone():
    _, still = after(fedpnas, task_lr=0.0, task_alpha_lr=0.0)
    _, empty = after(fedpnas, base_cells=2)
    for part, atol in (("params", 1e-6), ("stats", 1e-6), ("alpha", 2e-3)):  # Adam makes much of a rounded gradient
        np.testing.assert_allclose(flat(still.change[part]), flat(empty.change[part]), atol=atol)
    _, moved = after(fedpnas, task_lr=0.5)
    assert abs(flat(moved.change["params"]["cell_0"]) - flat(empty.change["params"]["cell_0"])).max() > 1e-4
    assert still.metrics["image_gradients"] == 2 * 16


def test_warm_up_is_a_plain_step_on_everything():
    # Where the first pass has the key of a plain search's step, it is that step whatever the trial's rates.
    _, one = after(fedpnas, round=0, task_lr=0.5)
    _, other = after(fedpnas, round=0, task_lr=0.0, task_alpha_lr=0.0)
    np.testing.assert_allclose(flat(one.change), flat(other.change), atol=1e-6)
    assert abs(flat(after(fedpnas, round=6, task_lr=0.5)[1].change) - flat(one.change)).max() > 1e-4  # 6 of 60: 10 %


def test_adapting_leaves_the_base_and_its_statistics_to_the_bit():
    for factory in (fedpnas, metafedpnas):
        algorithm, _ = made(factory, base_cells=1)
        server, own = algorithm.init(jax.random.key(1))
        server = server._replace(round=jnp.int32(30))
        net = jit(algorithm.personalize)(server, own, DATA, jax.random.key(0), jnp.int32(4))
        for before, now in ((server.params, net.params), (server.stats, net.stats)):
            for name in before:
                base = name in ("stem", "stem_norm", "cell_0")
                assert np.array_equal(flat(before[name]), flat(now[name])) == base, name
        start = made(factory, base_cells=1)[0].global_model(server).mix
        np.testing.assert_array_equal(net.mix[0], start[0])


@pytest.mark.parametrize("none", [False, True])
def test_network_is_discrete_and_every_cell_has_its_own(none):
    algorithm, _ = made(fedpnas, none=none)
    server, _ = algorithm.init(jax.random.key(1))
    assert algorithm.space.graph.cell_types == ("normal_0", "reduce_1")
    assert server.alpha.op.shape == (2, 5, 3)
    assert server.alpha.pair.shape == (2, 0)
    index = algorithm.space.graph.ops.index("none")
    ahead = server.alpha._replace(op=server.alpha.op.at[:, 0, index].add(50.0))
    mix = np.asarray(algorithm.global_model(server._replace(alpha=ahead)).mix)
    logits = np.array(ahead.op)
    if not none:  # no candidate, however far ahead
        logits[..., index] = -np.inf
    np.testing.assert_array_equal(mix, np.eye(3)[logits.argmax(-1)])


def test_metafedpnas_with_everything_personal_is_fedmetanas():
    _, meta = after(metafedpnas, base_cells=0)
    _, whole = after(fedmetanas)
    np.testing.assert_allclose(flat(meta.change), flat(whole.change), atol=1e-6)


def test_metafedpnas_with_nothing_personal_is_fedmetanas_without_inner_rates():
    _, meta = after(metafedpnas, base_cells=2)
    _, still = after(fedmetanas, task_lr=0.0, task_alpha_lr=0.0)
    np.testing.assert_allclose(flat(meta.change), flat(still.change), atol=1e-6)


def test_metafedpnas_moves_everything_by_its_meta_step_but_nothing_of_the_base_by_its_inner_ones():
    server, reply = after(metafedpnas, base_cells=1)
    assert all(flat(x).any() for x in reply.change["params"].values())
    assert np.asarray(reply.change["alpha"].op).any((1, 2)).all()
    # The base's gradient knows of the inner step only through the personal part: with the base's own rate it would not
    # be the same. Without a personal part's step it is FedMetaNAS's at rates 0.
    _, still = after(metafedpnas, base_cells=1, task_lr=0.0, task_alpha_lr=0.0)
    _, plain = after(fedmetanas, task_lr=0.0, task_alpha_lr=0.0)
    for name in ("stem", "head_bias"):
        np.testing.assert_allclose(flat(still.change["params"][name]), flat(plain.change["params"][name]), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warmup": 1.0}, "warmup is 1.0; it must be from 0 to below 1"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        ({"base_cells": 7}, "base_cells is 7; it must be none, or 0 to the 2 cells"),
        ({"samples": 0}, "samples is 0; it must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        fedpnas(toy_space(), SETTING, **options)


def test_a_space_of_one_cell_has_one_part():
    space = darts_space(**SHAPE, width=4, length=1, nodes=1)
    phase = fedpnas(space, SETTING)[0]
    assert phase.make(everything_of(space)).space.size == {"every_edge": True, "parts": ()}


def everything_of(space):
    return [[list(range(8)) for _ in space.graph.edges] for _ in space.graph.cell_types]


def test_a_genotype_with_cells_of_its_own_can_be_given_to_any_method(tmp_path):
    space = darts_space(**SHAPE, width=4, length=3, nodes=1).resized(every_edge=True, parts=(1, 2))
    mix = np.zeros((3, 2, 8))
    for kind, ops in enumerate([(4, 3), (5, 1), (0, 6)]):
        mix[kind, (0, 1), ops] = 1
    genotype = genotypes.of_mix(space.graph, mix)
    assert list(genotype) == ["normal_0", "reduce_1", "reduce_2"]
    path = tmp_path / "genotype.json"
    path.write_text(genotypes.to_json(genotype))
    dataset = sources.load("digits", tmp_path)
    config = Config(dataset="digits", network=str(path), width=4, cells=3)
    chosen = make_architecture(config, dataset, fedavg, jnp.float32)
    assert chosen.arguments["parts"] == (1, 2)
    wanted = space.derive(genotypes.to_plan(space.graph, genotype))
    assert chosen.made.macs > wanted.macs  # ten classes and not three
    shapes = [jax.tree.map(jnp.shape, jax.eval_shape(m.init, jax.random.key(0))[0]) for m in (chosen.made, wanted)]
    assert all(shapes[0][f"cell_{i}"] == shapes[1][f"cell_{i}"] for i in range(3))
    with pytest.raises(UsageError, match="the genotype has cells normal_0"):
        make_architecture(replace(config, cells=6), dataset, fedavg, jnp.float32)
