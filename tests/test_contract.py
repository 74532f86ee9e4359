"""Laws that every algorithm obeys; a new one is tested on arrival.

A method's compiled round is shared by its tests: compiling takes seconds, running it milliseconds.
"""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_federation import CLIENTS, COHORT, NAMES, federation, first_algorithm

from fedmetanas_jax import tree
from fedmetanas_jax.core import Algorithm
from fedmetanas_jax.engine.checkpoint import Checkpoints
from fedmetanas_jax.engine.mesh import clients_mesh, put_data
from fedmetanas_jax.engine.round import client_key, cohort, init_state, make_round, train_examples

SEED = 3
DATA = federation()


class Case(NamedTuple):
    """A method with its compiled round, all clients of a cohort at once."""

    algorithm: Algorithm
    step: object
    client_update: object


@cache
def case(name: str) -> Case:
    algorithm = first_algorithm(name)
    step = make_round(algorithm, seed=SEED, cohort_size=COHORT, at_once=0)
    return Case(algorithm, step, jax.jit(algorithm.client_update))


def start(name: str):
    return init_state(case(name).algorithm, SEED, CLIENTS)


def run(name: str, state, rounds: int):
    """-> (state, [metrics of each round])."""
    seen = []
    for _ in range(rounds):
        state, metrics = case(name).step(state, DATA, state.round + 1)
        seen.append(jax.tree.map(np.asarray, metrics))
    return state, seen


def same_bits(a, b) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in leaves)


def assert_close(a, b, tolerance: float = 2e-4):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        scale = 1 + np.max(np.abs(x))
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", NAMES)
def test_a_round_keeps_structure_shapes_and_types(name):
    before = jax.eval_shape(lambda: init_state(case(name).algorithm, SEED, CLIENTS))
    after = jax.eval_shape(case(name).step, before, DATA, jnp.int32(1))[0]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), jax.tree_util.keystr(path)
        assert not x.weak_type, f"{jax.tree_util.keystr(path)} is weakly typed: a restored state would recompile"


@pytest.mark.parametrize("name", NAMES)
def test_later_rounds_do_not_recompile(name):
    run(name, start(name), 3)
    assert case(name).step._cache_size() == 1


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bits(name):
    first, second = (run(name, start(name), 2) for _ in range(2))
    assert same_bits(first, second)


@pytest.mark.parametrize("name", NAMES)
def test_clients_not_chosen_keep_their_state(name):
    state = start(name)
    before = jax.tree.map(np.asarray, state.client_states)
    state, (metrics,) = run(name, state, 1)
    others = np.setdiff1d(np.arange(CLIENTS), metrics["client"][0])
    assert len(others) == CLIENTS - COHORT
    assert same_bits(tree.take(before, others), tree.take(state.client_states, others))


@pytest.mark.parametrize("name", NAMES)
def test_all_at_once_is_one_by_one_in_any_order(name):
    algorithm, _, client_update = case(name)
    state = start(name)
    chosen = np.asarray(cohort(SEED, state.round, CLIENTS, COHORT))
    together, (metrics,) = run(name, start(name), 1)
    assert sorted(metrics["client"][0]) == sorted(chosen)

    def one(client):
        return client_update(
            state.server_state,
            tree.take(state.client_states, client),
            train_examples(DATA, client),
            client_key(SEED, state.round, client),
        )

    for order in (chosen, chosen[::-1]):
        outs = [one(client) for client in order]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *outs)
        mean = tree.weighted_mean(stacked.update, stacked.weight)
        assert_close(algorithm.server_update(state.server_state, mean), together.server_state)
        states = tree.put(state.client_states, order, stacked.client_state)
        assert_close(states, together.client_states)


@pytest.mark.parametrize("name", NAMES)
def test_a_mesh_of_four_devices_is_one_device(name):
    algorithm = case(name).algorithm
    mesh = clients_mesh(4)
    step = make_round(algorithm, seed=SEED, cohort_size=COHORT, at_once=1, mesh=mesh)
    state, data = put_data((start(name), DATA), mesh)
    state, metrics = step(state, data, state.round + 1)
    alone, (expected,) = run(name, start(name), 1)
    # One device computed its clients in one vmap, whose sums may be ordered otherwise.
    assert_close(state, alone)
    np.testing.assert_array_equal(metrics["client"], expected["client"])


@pytest.mark.parametrize("name", NAMES)
def test_four_rounds_are_two_and_save_and_restore_and_two(name, tmp_path):
    whole, _ = run(name, start(name), 4)
    half, _ = run(name, start(name), 2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, half, {})
    like = jax.eval_shape(lambda: init_state(case(name).algorithm, SEED, CLIENTS))
    _, _, restored = checkpoints.restore_newest(lambda meta: like, print)
    checkpoints.close()
    resumed, _ = run(name, restored, 2)
    assert same_bits(whole, resumed)
    assert case(name).step._cache_size() == 1


@pytest.mark.parametrize("name", NAMES)
def test_loss_falls_on_separable_data(name):
    _, seen = run(name, start(name), 15)
    losses = [float(np.mean(metrics["loss"])) for metrics in seen]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3]), losses
    assert all(metrics["finite"].all() for metrics in seen)


@pytest.mark.parametrize("name", NAMES)
def test_every_network_it_offers_answers_and_personalises(name):
    algorithm = case(name).algorithm
    state, _ = run(name, start(name), 1)
    images = DATA.image[DATA.central]
    nets = [make(state.server_state) for make in (algorithm.global_model, algorithm.discrete_model) if make]
    own = train_examples(DATA, 0)
    client_state = tree.take(state.client_states, 0)
    nets.append(jax.jit(algorithm.personalize)(state.server_state, client_state, own, jax.random.key(0)))
    assert len(nets) >= 2
    forward = jax.jit(algorithm.forward, static_argnums=2)
    for net in nets:
        logits, stats = forward(net, images, False)
        assert logits.shape == (len(images), 4)
        assert np.isfinite(logits).all()
        assert same_bits(stats, net.stats)
