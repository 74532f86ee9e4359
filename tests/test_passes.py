"""Passes through a supernet under drawn mixes: what several of them together are, by what each of them is alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_federation import SETTING
from toy_model import ask, examples, jit, unchanged
from toy_space import everything, flat, toy_space

from fedmetanas_jax import local
from fedmetanas_jax.algorithms import passes
from fedmetanas_jax.algorithms.fedpnas import fedpnas
from fedmetanas_jax.nas import logits, relax, sample
from fedmetanas_jax.nas import mask as masks

SPACE = toy_space(classes=3, every_edge=True)
PLAN, GRAPH, SAMPLES = everything(SPACE), SPACE.graph, 4
BATCH, KEY = examples(8, 8), jax.random.key(7)
FREE = logits.free(GRAPH)


def weigh(alpha, key):
    return sample.hard_gumbel(GRAPH, alpha, masks.full(GRAPH), 0.1, key)


def spread(value, like, rest):
    return SPACE.spread(value, PLAN, like, rest)


@pytest.fixture(scope="module")
def network():
    """(net, variables, statistics that no batch has)."""
    net = SPACE.make(PLAN, True)
    params, stats = net.init(jax.random.key(0))
    stats = jax.tree.map(lambda x: x + 7.0, stats)
    return net, {"params": params, "alpha": relax.init_alpha(jax.random.key(1), GRAPH)}, stats


def test_a_pass_says_what_it_computed_and_leaves_the_other_statistics(network):
    net, variables, stats = network
    loss = jit(passes.losses(net, FREE, weigh, spread))
    value, (moments, accuracy, times) = loss(variables, stats, BATCH, KEY)
    drawn = np.asarray(weigh(variables["alpha"], KEY)) != 0
    np.testing.assert_array_equal(times, drawn)
    assert times.dtype == jnp.int32
    answers, _ = net.apply(variables["params"], stats, BATCH.image, jnp.asarray(drawn, jnp.float32), True)
    np.testing.assert_allclose(value, local.cross_entropy(answers, BATCH.label, BATCH.weight), rtol=1e-5)
    assert float(accuracy) == pytest.approx(float(local.accuracy(answers, BATCH.label, BATCH.weight)))
    for cell in (0, 1):
        now, before = (x[f"cell_{cell}"]["dense"]["norm"]["mean"] for x in (moments, stats))
        np.testing.assert_array_equal(np.all(now == before, -1), ~drawn[cell, :, 2])


def test_several_passes_average_probabilities_and_the_moments_that_were_found(network):
    net, variables, stats = network
    value, (moments, _, times) = jit(passes.losses(net, FREE, weigh, spread, SAMPLES))(variables, stats, BATCH, KEY)
    probabilities, found, drawn = [], [], []
    for key in jax.random.split(KEY, SAMPLES):
        weights = weigh(variables["alpha"], key)
        answers, own = net.apply(variables["params"], stats, BATCH.image, weights, True)
        probabilities.append(jax.nn.softmax(answers))
        found.append(own)
        drawn.append(np.asarray(weights) != 0)
    np.testing.assert_array_equal(times, np.sum(drawn, 0))
    picked = np.take_along_axis(np.mean(probabilities, 0), np.asarray(BATCH.label)[:, None], 1)
    np.testing.assert_allclose(value, -np.mean(np.log(picked)), rtol=1e-5)
    np.testing.assert_allclose(moments["stem_norm"]["mean"], found[0]["stem_norm"]["mean"], rtol=1e-5)
    never = 0
    for cell in ("cell_0", "cell_1"):
        for edge in range(len(GRAPH.edges)):
            here = [n for n in range(SAMPLES) if drawn[n][int(cell[-1]), edge, 2]]
            got, before = (x[cell]["dense"]["norm"]["mean"][edge] for x in (moments, stats))
            if here:
                mean = np.mean([found[n][cell]["dense"]["norm"]["mean"][edge] for n in here], 0)
                np.testing.assert_allclose(got, mean, rtol=1e-4, atol=1e-5)
            else:
                np.testing.assert_array_equal(got, before)
                never += 1
    assert 0 < never < 10
    # Where everything is computed whatever was drawn, moments are the mean of all.
    _, (whole, _, _) = jit(passes.losses(net, FREE, weigh, None, SAMPLES))(variables, stats, BATCH, KEY)
    np.testing.assert_allclose(flat(whole), np.mean([flat(x) for x in found], 0), rtol=1e-4, atol=1e-5)


def test_the_gradient_is_that_of_the_loss_and_brings_the_times(network):
    net, variables, stats = network
    loss = passes.losses(net, FREE, weigh, spread, SAMPLES)
    gradient = passes.sampled(loss, SAMPLES)
    assert gradient.passes == (SAMPLES,)
    (got, times), moments, metrics = jit(gradient.of)(variables, stats, (BATCH,), KEY)
    assert set(metrics) == set(gradient.metrics)
    (value, (same, _, counted)), expected = jit(jax.value_and_grad(loss, has_aux=True))(variables, stats, BATCH, KEY)
    np.testing.assert_array_equal(times, counted)
    np.testing.assert_allclose(flat(got), flat(expected), atol=1e-6)
    np.testing.assert_allclose(flat(moments), flat(same), atol=1e-6)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    plain = passes.plain(loss)(variables, stats, BATCH, KEY)
    assert len(plain[1]) == 2


def test_fedpnas_by_several_draws_counts_them_all():
    """And what no draw had keeps its weights, to the bit."""
    setting = SETTING._replace(epochs=1, batch=16, augment=unchanged)
    phase = fedpnas(toy_space(classes=3), setting, samples=2, task_lr=0.001)[0]
    algorithm = phase.make(phase.enter(None, None, None)[0])
    server, own = algorithm.init(jax.random.key(1))
    reply = jit(lambda *x: ask(algorithm, *x))(server, own, examples(16, 16), jax.random.key(2))
    assert float(reply.metrics["image_gradients"]) == 2 * 2 * 16
    macs = float(reply.metrics["macs"]) / (3 * float(reply.metrics["image_gradients"]))
    drawn = 4 * (macs - 64 * 6 - 6 * 3) / 36  # dense layers, in one step of two passes of two draws
    assert drawn == pytest.approx(round(drawn), abs=1e-2)
    moved = [flat(x).any() for cell in ("cell_0", "cell_1") for x in reply.change["params"][cell]["dense"]["kernel"]]
    assert 0 < sum(moved) <= round(drawn) < 40
    assert not all(moved)
