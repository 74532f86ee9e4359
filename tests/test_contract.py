"""Laws that every algorithm obeys; a new one is tested on arrival. At the end, what methods are equal to.

A method's compiled round is shared by its tests: compiling takes seconds, running it milliseconds.
"""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model
from toy_federation import CLIENTS, COHORT, NAMES, SHAPE, federation, first_algorithm
from toy_model import examples, unchanged

from fedmetanas_jax import local, maml, optimizers, tree
from fedmetanas_jax.algorithms.ditto import ditto
from fedmetanas_jax.algorithms.fedavg import fedavg
from fedmetanas_jax.algorithms.fedbabu import fedbabu
from fedmetanas_jax.algorithms.fedmetanas import fedmetanas
from fedmetanas_jax.algorithms.fedprox import fedprox
from fedmetanas_jax.algorithms.fedrep import fedrep
from fedmetanas_jax.algorithms.perfedavg import perfedavg
from fedmetanas_jax.algorithms.scaffold import scaffold
from fedmetanas_jax.core import Algorithm, Model, Setting
from fedmetanas_jax.engine.checkpoint import Checkpoints
from fedmetanas_jax.engine.mesh import clients_mesh, put_data
from fedmetanas_jax.engine.round import client_key, cohort, init_state, make_round, state_shapes, train_examples

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
    step = make_round(algorithm, cohort_size=COHORT, at_once=0)
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
    before = state_shapes(case(name).algorithm, CLIENTS)
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
    step = make_round(algorithm, cohort_size=COHORT, at_once=1, mesh=mesh)
    state = init_state(algorithm, SEED, CLIENTS, mesh)
    assert_close(jax.tree.map(lambda x: x[:CLIENTS], state.client_states), start(name).client_states, 0.0)
    state, metrics = step(state, put_data(DATA, mesh), state.round + 1)
    alone, (expected,) = run(name, start(name), 1)
    # One device computed its clients in one vmap, whose sums may be ordered otherwise.
    # Their states are filled up to equal shares of the devices.
    state = state._replace(client_states=jax.tree.map(lambda x: x[:CLIENTS], state.client_states))
    assert_close(state, alone)
    np.testing.assert_array_equal(metrics["client"], expected["client"])


@pytest.mark.parametrize("name", NAMES)
def test_four_rounds_are_two_and_save_and_restore_and_two(name, tmp_path):
    whole, _ = run(name, start(name), 4)
    half, _ = run(name, start(name), 2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, half, {})
    like = state_shapes(case(name).algorithm, CLIENTS)
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
    nets.append(jax.jit(algorithm.personalize)(state.server_state, client_state, own, jax.random.key(0), jnp.int32(2)))
    assert len(nets) >= 2
    forward = jax.jit(algorithm.forward, static_argnums=2)
    for net in nets:
        logits, stats = forward(net, images, False)
        assert logits.shape == (len(images), 4)
        assert np.isfinite(logits).all()
        assert same_bits(stats, net.stats)


# --- Identities: what one method is when another's difference is taken away ------------------------------

MODEL = toy_model.toy_model(hidden=4, centred=True)
SETTING = Setting(rounds=10, epochs=3, batch=4, augment=unchanged, share=0.5)
HOLDERS = [examples(9, size, seed=size) for size in (9, 5, 7)]  # unequal clients


def rounds(algorithm: Algorithm, count: int = 2):
    """(server state, clients' states) after rounds in which the same three clients take part."""
    client_update = toy_model.jit(algorithm.client_update)
    server, one = algorithm.init(jax.random.key(1))
    states = [one] * len(HOLDERS)
    for r in range(count):
        keys = [jax.random.fold_in(jax.random.key(r), k) for k in range(len(HOLDERS))]
        outs = [client_update(server, *x) for x in zip(states, HOLDERS, keys, strict=True)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *[(out.update, out.weight) for out in outs])
        server = algorithm.server_update(server, tree.weighted_mean(*stacked))
        states = [out.client_state for out in outs]
    return server, states


@cache
def plain_fedavg(momentum: float = 0.9, count: int = 2):
    return rounds(fedavg(MODEL, SETTING, momentum=momentum), count)[0]


def networks_close(a, b, tolerance=2e-5):
    assert_close((a.params, a.stats), (b.params, b.stats), tolerance)


def test_fedprox_without_its_pull_is_fedavg():
    networks_close(rounds(fedprox(MODEL, SETTING, mu=0.0))[0], plain_fedavg())
    start = fedavg(MODEL, SETTING).init(jax.random.key(1))[0].params
    moved = [
        tree.global_norm(tree.sub(rounds(fedprox(MODEL, SETTING, mu=mu), 1)[0].params, start)) for mu in (0.0, 5.0)
    ]
    assert moved[1] < 0.8 * moved[0]  # with it, clients stay nearer


def test_dittos_global_part_is_fedavg():
    server, clients = rounds(ditto(MODEL, SETTING))
    networks_close(server, plain_fedavg())
    assert all(client.begun for client in clients)
    assert tree.global_norm(tree.sub(clients[0].net.params, clients[1].net.params)) > 1e-3


def test_dittos_personal_model_without_a_pull_is_a_clients_own_training():
    _, clients = rounds(ditto(MODEL, SETTING, lam=0.0), 1)
    algorithm = fedavg(MODEL, SETTING)
    server, _ = algorithm.init(jax.random.key(1))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), 1)  # round 0, client 1, its own stream
    alone = algorithm.client_update(server, (), HOLDERS[1], key).update
    assert_close((clients[1].net.params, clients[1].net.stats), alone, 2e-5)


def test_scaffolds_first_round_is_fedavg_without_momentum_and_later_ones_are_not():
    first, second = (rounds(scaffold(MODEL, SETTING), count)[0] for count in (1, 2))
    networks_close(first, plain_fedavg(0.0, 1))
    assert tree.global_norm(tree.sub(second.params, plain_fedavg(0.0).params)) > 1e-4


def test_perfedavg_without_inner_steps_is_sgd_on_the_query_batches():
    algorithm = perfedavg(MODEL, SETTING, M=0)
    server, _ = algorithm.init(jax.random.key(1))
    data, key = HOLDERS[0], jax.random.key(5)
    sent = algorithm.client_update(server, (), data, key)
    order_key, _ = jax.random.split(key)
    rows, _ = local.all_tasks(order_key, data.weight, SETTING.batch, SETTING.epochs)
    optimizer = optimizers.sgd(0.025, 0.9, 3e-4)
    params, stats, state = server.params, server.stats, optimizer.init(server.params)
    loss = local.classification_loss(MODEL)
    for _, query in rows:
        batch = jax.tree.map(lambda x, query=query: x[query], data)
        grads, (moments, _) = jax.grad(loss, has_aux=True)(params, stats, batch, key)
        updates, state = optimizer.update(grads, state, params)
        params, stats = tree.add(params, updates), tree.lerp(stats, moments, MODEL.momentum)
    assert_close(sent.update, (params, stats), 2e-5)


def test_fedrep_with_an_empty_head_is_fedavg():
    algorithm = fedrep(MODEL, SETTING, head=(), head_epochs=0, body_epochs=3)
    server, heads = rounds(algorithm)
    networks_close(server, plain_fedavg())
    assert heads == [{}] * 3


def test_fedbabu_with_an_empty_head_is_fedavg():
    networks_close(rounds(fedbabu(MODEL, SETTING, head=()))[0], plain_fedavg())


def test_fedmetanas_with_frozen_alphas_is_perfedavg_on_the_supernet():
    from fedmetanas_jax.models.darts import darts_space
    from fedmetanas_jax.nas import mask as masks
    from fedmetanas_jax.nas import relax

    space = darts_space(**SHAPE, width=4, length=1, nodes=1)
    supernet = space.make(masks.full_keep(1))
    search = fedmetanas(space, SETTING, warmup=1.0, gumbel=False)[0].make(masks.full_keep(1))
    server, _ = search.init(jax.random.key(1))
    mix = relax.mix(server.alpha, server.mask, 1.0)

    def apply(params, stats, image, train, key=None):
        return supernet.apply(params, stats, image, mix, train)

    model = Model(lambda key: (server.params, server.stats), apply, supernet.momentum, supernet.macs, ("head_bias",))
    fixed = perfedavg(model, SETTING, clip=5.0)
    start, _ = fixed.init(jax.random.key(2))
    own, key = train_examples(DATA, 0), jax.random.key(3)
    params, stats, alpha = jax.jit(search.client_update)(server, (), own, key).update
    assert_close((params, stats), jax.jit(fixed.client_update)(start, (), own, key).update)
    assert same_bits(alpha, server.alpha)
    assert maml.batches_of_a_task(1) * SETTING.batch == search.least_rows == fixed.least_rows
