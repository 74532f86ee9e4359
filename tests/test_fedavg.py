"""FedAvg, recomputed by hand on softmax regression."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_model import ask, close, examples, jit, learnt, merged, model_loss, same, toy_model, unchanged

from fedmetanas_jax import optimizers, tree
from fedmetanas_jax.algorithms import ALGORITHMS
from fedmetanas_jax.algorithms.fedavg import fedavg
from fedmetanas_jax.core import Merged, Setting
from fedmetanas_jax.engine import report

KEY = jax.random.key(7)
MODEL = toy_model(hidden=4, centred=True)


@lru_cache
def method(**conditions):
    algorithm = fedavg(MODEL, Setting(rounds=10, epochs=3, batch=6, augment=unchanged, **conditions))
    return algorithm._replace(
        client_update=jit(algorithm.client_update), personalize=jit(algorithm.personalize)
    )


def train_by_hand(params, stats, data, optimizer, steps):
    """Full-batch steps, whose order of rows does not matter."""

    @jit
    def step(params, stats, state):
        grads, (moments, _) = jax.grad(model_loss(MODEL), has_aux=True)(params, stats, data, KEY)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), tree.lerp(stats, moments, MODEL.momentum), state

    state = optimizer.init(params)
    for _ in range(steps):
        params, stats, state = step(params, stats, state)
    return params, stats


def test_it_is_listed():
    assert ALGORITHMS["fedavg"] is fedavg


@pytest.mark.parametrize("round", [0, 5])
def test_one_client_is_sgd_at_the_rate_of_the_round(round):
    algorithm, data = method(lr=0.3, lr_end=0.1, clip=0.2), examples(6)
    server, own = algorithm.init(jax.random.key(1))
    server = server._replace(round=jnp.int32(round))
    reply = ask(algorithm, server, own, data, KEY)
    rate = {0: 0.3, 5: 0.2}[round]  # half-way along the cosine at round 5 of 10
    expected = train_by_hand(server.params, server.stats, data, optimizers.sgd(rate, 0.9, 3e-4, 0.2), 3)
    assert reply.weight == 6
    after = algorithm.server_update(server, merged(reply))
    close((after.params, after.stats), expected)
    assert after.round == round + 1


def test_momentum_starts_afresh_every_round():
    algorithm, data = method(lr=0.2, lr_end=0.2), examples(6)
    server, own = algorithm.init(jax.random.key(1))
    for _ in range(2):
        server = algorithm.server_update(server, merged(ask(algorithm, server, own, data, KEY)))
    start, _ = algorithm.init(jax.random.key(1))
    optimizer = optimizers.sgd(0.2, 0.9, 3e-4)
    once = train_by_hand(start.params, start.stats, data, optimizer, 3)
    close((server.params, server.stats), train_by_hand(*once, data, optimizer, 3))


def test_clients_of_unequal_size_weigh_by_their_rows():
    algorithm = method()
    server, own = algorithm.init(jax.random.key(1))
    sizes = [2, 6, 4]
    replies = [ask(algorithm, server, own, examples(6, size, seed=size), KEY) for size in sizes]
    assert [reply.weight for reply in replies] == sizes
    assert [reply.metrics["image_gradients"] for reply in replies] == [3 * size for size in sizes]
    after = algorithm.server_update(server, merged(*replies))
    came_to = [learnt(server, reply) for reply in replies]
    by_hand = jax.tree.map(lambda a, b, c: (2 * a + 6 * b + 4 * c) / 12, *came_to)
    close({"params": after.params, "stats": after.stats}, by_hand)


def test_the_recorded_loss_is_of_all_rows_of_the_cohort_that_was_heard():
    sizes, losses = np.array([1, 2, 40, 7, 9]), np.array([1.0, 3.0, 1.5, 0.5, np.nan])
    metrics = {"loss": losses, "reward": losses, "image_gradients": 3.0 * sizes, "rows": sizes}
    metrics |= {name: np.full(5, 10) for name in ("bytes_up", "bytes_down")}
    metrics |= {"client": np.arange(5), "finite": np.isfinite(losses)}
    one_round = {name: x[None] for name, x in metrics.items()} | {"baseline": np.array([0.25])}
    (line,) = report.lines(one_round, 0, 1, 0.5, 0, method())
    np.testing.assert_allclose(line["loss"], (1 + 2 * 3 + 40 * 1.5 + 7 * 0.5) / 50)
    assert (line["reward"], line["baseline"], line["image_gradients"]) == (1.5, 0.25, 150)


def test_the_mean_of_identical_clients_is_that_client():
    algorithm, data = method(), examples(6)
    server, own = algorithm.init(jax.random.key(1))
    reply = ask(algorithm, server, own, data, KEY)
    close(merged(*[reply] * 5).change, reply.change)  # running statistics included


def test_a_client_without_rows_changes_nothing():
    algorithm = method()
    server, own = algorithm.init(jax.random.key(1))
    reply = ask(algorithm, server, own, examples(6)._replace(weight=jnp.zeros(6)), KEY)
    assert not any(np.any(x) for x in jax.tree.leaves(reply.change))
    assert reply.weight == 0


def test_personalize_is_plain_sgd_from_the_global_model_for_as_many_steps_as_asked():
    data = examples(6)
    algorithm = method(finetune_lr=0.2)
    server, _ = algorithm.init(jax.random.key(1))
    for steps in (0, 1, 3):
        net = algorithm.personalize(algorithm.send(server, 0, KEY), (), data, KEY, jnp.int32(steps))
        close((net.params, net.stats), train_by_hand(server.params, server.stats, data, optimizers.sgd(0.2), steps))
    most = algorithm.personalize(algorithm.send(server, 0, KEY), (), data, KEY, jnp.int32(100))
    close(most, net)  # three epochs of one batch each are all there is
    assert algorithm.personalize._cache_size() == 1


def changed(state, change) -> Merged:
    """A mean change by so much of every weight and statistic."""
    full = jax.tree.map(lambda x: jnp.full_like(x, change), {"params": state.params, "stats": state.stats})
    return Merged(full, jnp.zeros(1, jnp.int32), jnp.ones(1), ())


def test_the_momentum_of_the_server_by_hand():
    algorithm = fedavg(MODEL, Setting(10, 1, 6, unchanged), server="momentum", server_lr=0.1)
    state, _ = algorithm.init(jax.random.key(1))
    state = state._replace(params=jax.tree.map(jnp.ones_like, state.params))
    after = algorithm.server_update(state, changed(state, -0.5))
    for x in jax.tree.leaves(after.params):
        np.testing.assert_allclose(x, 1 - 0.1 * 0.5, rtol=1e-5)
    same(after.stats, jax.tree.map(lambda x: x - 0.5, state.stats))  # statistics are never stepped
    again = algorithm.server_update(after, changed(after, -0.5))  # velocity 0.9 * 0.5 + 0.5
    np.testing.assert_allclose(jax.tree.leaves(again.params)[0], 0.95 - 0.1 * (0.45 + 0.5), rtol=1e-5)
    assert again.round == 2


@pytest.mark.parametrize("tau", [1e-8, 1e-3, 0.3])
@pytest.mark.parametrize("server", ["adam", "yogi"])
def test_adaptive_servers_are_those_of_the_paper(server, tau):
    """Reddi et al., Algorithm 2, in numpy: m_-1 = 0, v_-1 = tau^2, no correction, tau beside the root."""
    options = {"server_lr": 0.1, "server_momentum": 0.8, "server_epsilon": tau}
    algorithm = fedavg(MODEL, Setting(10, 1, 6, unchanged), server=server, **options)
    state, _ = algorithm.init(jax.random.key(1))
    name = next(iter(state.params))
    x, m, v = np.asarray(state.params[name]["kernel"], float), 0.0, tau**2
    for change in (0.5, -0.02, 0.0, 0.1):
        m = 0.8 * m + 0.2 * change
        v = 0.99 * v + 0.01 * change**2 if server == "adam" else v - 0.01 * change**2 * np.sign(v - change**2)
        x = x + 0.1 * m / (np.sqrt(v) + tau)
        before, state = state, algorithm.server_update(state, changed(state, change))
        np.testing.assert_allclose(state.params[name]["kernel"], x, rtol=1e-4, atol=1e-6)
        same(state.stats, jax.tree.map(lambda s, change=change: s + jnp.float32(change), before.stats))


def test_an_adaptive_server_without_adaptivity_is_refused():
    with pytest.raises(ValueError, match="server_epsilon is 0; it must be positive"):
        fedavg(MODEL, Setting(10, 1, 6, unchanged), server="yogi", server_epsilon=0)


def test_a_server_rate_without_a_server_optimizer_is_refused():
    with pytest.raises(ValueError, match="server_lr is 0.1, but server=mean"):
        fedavg(MODEL, Setting(10, 1, 6, unchanged), server_lr=0.1)


def test_forward_serves_with_running_statistics():
    algorithm, data = method(), examples(6)
    server, _ = algorithm.init(jax.random.key(1))
    net = algorithm.global_model(server)
    together, stats = algorithm.forward(net, data.image, False)
    alone, _ = algorithm.forward(net, data.image[:1], False)
    close(together[:1], alone)  # independent of the rest of the batch
    same(stats, server.stats)
    _, moments = algorithm.forward(net, data.image, True)
    np.testing.assert_allclose(moments["mean"], np.mean(np.asarray(data.image), 0).ravel() / 255, rtol=1e-5)


def test_loss_falls_over_rounds():
    algorithm, data = method(lr=0.2, lr_end=0.2), examples(6)
    server, own = algorithm.init(jax.random.key(1))
    losses = []
    for round in range(8):
        reply = ask(algorithm, server, own, data, jax.random.fold_in(KEY, round))
        server = algorithm.server_update(server, merged(reply))
        losses.append(float(reply.metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    assert algorithm.client_update._cache_size() == 1  # the schedule does not recompile
