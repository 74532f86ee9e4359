"""Laws of first- and second-order MAML on functions small enough to differentiate by hand."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_model import close, examples, jit, model_loss, same, toy_model, unchanged

from fedmetanas_jax import local, maml, optimizers, tree
from fedmetanas_jax.core import Examples, Setting

KEY = jax.random.key(7)


def quadratic(variables, stats, batch, key):
    """a w^2 / 2, the curvature a being the batch's label; the moment is that label too."""
    a = jnp.mean(batch.label.astype(jnp.float32))
    return 0.5 * a * variables["w"] ** 2, ({"mean": a}, jnp.float32(0))


def curvature(a) -> Examples:
    return Examples(jnp.zeros((1, 8, 8, 1), jnp.uint8), jnp.array([a], jnp.int32), jnp.ones(1))


def meta_gradient(loss, variables, stats, support, query, *, eta, **options):
    options.setdefault("optimizer", optax.sgd(eta))

    @jit
    def run(variables, support, query):
        return maml.meta_gradient(loss, variables, stats, support, query, KEY, **options)

    return run(variables, support, query)


def quadratic_gradient(**options):
    variables, stats = {"w": jnp.float32(4)}, {"mean": jnp.float32(0)}
    return meta_gradient(quadratic, variables, stats, curvature(2), curvature(3), eta=0.25, **options)


@pytest.mark.parametrize(
    ("steps", "order", "expected"),
    # w = 4, a_s = 2, a_q = 3, eta = 1/4: w_M = 4 / 2^M; first order 3 w_M, second order 3 w_M / 2^M.
    [(0, 1, 12.0), (0, 2, 12.0), (1, 1, 6.0), (1, 2, 3.0), (3, 1, 1.5), (3, 2, 0.1875)],
)
def test_quadratic_by_hand(steps, order, expected):
    grads, moments, metrics = quadratic_gradient(steps=steps, order=order)
    np.testing.assert_allclose(grads["w"], expected, rtol=1e-6)
    assert moments["mean"] == 3  # of the query; the support's 2 is dropped
    np.testing.assert_allclose(metrics["loss"], 1.5 * (4 / 2**steps) ** 2, rtol=1e-6)
    if steps:
        assert metrics["support_loss"] == 16  # before adaptation
    else:
        assert "support_loss" not in metrics


def test_another_order_is_refused():
    with pytest.raises(ValueError, match="order of the meta gradient is 3"):
        quadratic_gradient(steps=1, order=3)


def network(seed=0):
    model = toy_model(hidden=4, centred=True)
    params, stats = model.init(jax.random.key(1))
    return model_loss(model), params, stats, examples(5, seed=seed), examples(5, seed=seed + 1)


@pytest.mark.parametrize("steps", [1, 3])
def test_first_order_is_the_gradient_through_a_stopped_inner_loop(steps):
    loss, params, stats, support, query = network()

    def by_hand(params):
        for _ in range(steps):
            grads = jax.grad(loss, has_aux=True)(params, stats, support, KEY)[0]
            params = jax.tree.map(lambda p, g: p - 0.5 * jax.lax.stop_gradient(g), params, grads)
        return loss(params, stats, query, KEY)[0]

    value, expected = jit(jax.value_and_grad(by_hand))(params)
    grads, moments, metrics = meta_gradient(loss, params, stats, support, query, steps=steps, eta=0.5)
    close(grads, expected)
    np.testing.assert_allclose(moments["mean"], np.mean(query.image, axis=0).ravel() / 255, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)


def test_second_order_is_the_gradient_through_the_whole_inner_loop():
    loss, params, stats, support, query = network()

    def by_hand(params):
        for _ in range(2):
            grads = jax.grad(loss, has_aux=True)(params, stats, support, KEY)[0]
            params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
        return loss(params, stats, query, KEY)[0]

    both = [meta_gradient(loss, params, stats, support, query, steps=2, order=o, eta=0.5) for o in (1, 2)]
    close(both[1][0], jit(jax.grad(by_hand))(params))
    close(both[0][1:], both[1][1:])  # the same point, so the same loss and moments
    assert tree.global_norm(tree.sub(both[0][0], both[1][0])) > 1e-2 * tree.global_norm(both[1][0])


@pytest.mark.parametrize("order", [1, 2])
def test_a_task_rate_of_zero_leaves_the_plain_query_gradient(order):
    loss, params, stats, support, query = network()
    grads, moments, metrics = meta_gradient(
        loss, params, stats, support, query, steps=2, order=order, eta=0.0
    )
    plain = meta_gradient(loss, params, stats, support, query, steps=0, eta=0.5)
    close((grads, moments), plain[:2])
    np.testing.assert_allclose(metrics["loss"], plain[2]["loss"], rtol=1e-6)


def test_every_forward_has_noise_of_its_own():
    def noisy(variables, stats, batch, key):
        return variables * jax.random.uniform(key), ((), jnp.float32(0))

    noise = [jax.random.uniform(jax.random.fold_in(KEY, m)) for m in range(3)]
    assert len({float(u) for u in noise}) == 3
    for order in (1, 2):
        grads, _, metrics = meta_gradient(
            noisy, jnp.float32(1), (), curvature(1), curvature(1), steps=2, order=order, eta=1.0
        )
        np.testing.assert_allclose(grads, noise[2], rtol=1e-6)
        np.testing.assert_allclose(metrics["support_loss"], noise[0], rtol=1e-6)
        np.testing.assert_allclose(metrics["loss"], (1 - noise[0] - noise[1]) * noise[2], rtol=1e-5)


def test_adapt_takes_one_step_a_batch():
    batches = jax.tree.map(lambda *x: jnp.stack(x), curvature(2), curvature(1))
    variables, grads, moments, visited = maml.adapt(
        quadratic, {"w": jnp.float32(4)}, {"mean": jnp.float32(0)}, batches, KEY, optimizer=optax.sgd(0.25)
    )
    assert variables["w"] == 1.5  # 4 -> 4 - 2*4/4 = 2 -> 2 - 2/4
    assert grads["w"] == 2
    assert moments["mean"] == 1
    assert visited["loss"].tolist() == [16, 2]


META = optimizers.sgd(0.1, 0.9, 0.1, 1.0)


@lru_cache
def compiled(steps, eta=0.5, epochs=3, tasks="split"):
    model = toy_model(hidden=4, centred=True)
    params, stats = model.init(jax.random.key(1))
    loss, task = model_loss(model), optax.sgd(eta)
    options = dict(setting=Setting(1, epochs, 4, unchanged), momentum=0.1, tasks=tasks)
    gradient = maml.gradient(loss, task, M=steps)
    return jit(lambda data: local.fit(gradient, META, params, stats, data, KEY, **options))


def fit(data, **options):
    return compiled(**options)(data)


@pytest.mark.parametrize(("steps", "eta"), [(0, 0.5), (2, 0.0)])
def test_without_adaptation_it_is_sgd_on_the_query(steps, eta):
    # "split" over 8 rows in batches of 4: the query of every epoch is the odd rows.
    model, data = toy_model(hidden=4, centred=True), examples(8)
    params, stats, metrics = fit(data, steps=steps, eta=eta)
    plain, plain_stats = model.init(jax.random.key(1))
    query = jax.tree.map(lambda x: x[1::2], data)
    options = dict(setting=Setting(1, 3, 4, unchanged), momentum=model.momentum)
    gradient = local.plain(model_loss(model))
    run = jit(lambda data: local.fit(gradient, META, plain, plain_stats, data, KEY, **options))
    plain, plain_stats, plain_metrics = run(query)
    close(params, plain)
    close(stats, plain_stats)
    np.testing.assert_allclose(metrics["loss"], plain_metrics["loss"], rtol=1e-5)
    assert metrics["image_gradients"] == 3 * 4 * (steps + 1)


def test_meta_steps_by_hand():
    # 8 rows, batch 4, "split": an epoch is one task, support the even rows and query the odd ones.
    model, data = toy_model(hidden=4, centred=True), examples(8)
    loss = model_loss(model)
    params, stats = model.init(jax.random.key(1))
    support, query = (jax.tree.map(lambda x, i=i: x[i::2], data) for i in (0, 1))

    @jit
    def task(params, stats, state):
        (before, _), inner = jax.value_and_grad(loss, has_aux=True)(params, stats, support, KEY)
        adapted = jax.tree.map(lambda p, g: p - 0.5 * g, params, inner)
        outer, (moments, _) = jax.grad(loss, has_aux=True)(adapted, stats, query, KEY)
        updates, state = META.update(outer, state, params)
        return optax.apply_updates(params, updates), tree.lerp(stats, moments, 0.1), state, before

    state, first = META.init(params), []
    for _ in range(3):
        params, stats, state, before = task(params, stats, state)
        first.append(before)
    fitted, fitted_stats, metrics = fit(data, steps=1)
    close(fitted, params)
    close(fitted_stats, stats)
    np.testing.assert_allclose(metrics["support_loss"], np.mean(first), rtol=1e-5)


def test_tasks_with_padding_change_nothing():
    # In "split" the 8 real rows of 16 make one whole task; the second one is padding alone.
    data = examples(16, size=8)
    whole = jax.tree.map(lambda x: x[:8], data)
    close(fit(data, steps=1), fit(whole, steps=1))
    # In "pairs" the second of two tasks holds one real row, and so does not count.
    assert fit(examples(16, size=9), steps=2, tasks="pairs")[2]["image_gradients"] == 3 * 4 * (2 + 1)


def test_a_client_without_a_whole_task_is_the_identity():
    params, stats = toy_model(hidden=4, centred=True).init(jax.random.key(1))
    fitted, fitted_stats, metrics = fit(examples(16, size=7), steps=2, tasks="pairs")
    same((fitted, fitted_stats), (params, stats))
    assert all(value == 0 for value in metrics.values())


def test_what_the_task_optimizer_freezes_still_gets_its_meta_gradient():
    def product(variables, stats, batch, key):
        return variables["params"] * variables["alpha"], ((), jnp.float32(0))

    labels = {"params": "params", "alpha": "alpha"}
    task = optax.multi_transform({"params": optax.sgd(1.0), "alpha": optax.set_to_zero()}, labels)
    variables = {"params": jnp.float32(5), "alpha": jnp.float32(2)}
    grads, *_ = meta_gradient(
        product, variables, (), curvature(1), curvature(1), steps=1, eta=None, optimizer=task
    )
    assert (grads["params"], grads["alpha"]) == (2, 3)  # at params 5 - 2 = 3, alpha 2


def test_the_gradient_is_traced_once_for_support_and_query():
    model, traces = toy_model(), []
    inner, (params, stats) = model_loss(model), model.init(jax.random.key(1))

    def loss(*args):
        traces.append(1)
        return inner(*args)

    gradient, how = maml.gradient(loss, optax.sgd(0.1), M=3), dict(setting=Setting(1, 2, 4, unchanged), momentum=0.1)
    jit(lambda data: local.fit(gradient, META, params, stats, data, KEY, **how)).lower(examples(16))
    assert len(traces) == 1
