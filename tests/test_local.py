"""Laws of a client's batches, tasks, optimizer and local epochs."""

import typing
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_model import close, examples, jit, model_loss, same, toy_model, unchanged

from fedmetanas_jax import local, optimizers, tree
from fedmetanas_jax.core import Setting

KEY = jax.random.key(7)


def prefix(n, size):
    return (jnp.arange(n) < size).astype(jnp.float32)


@lru_cache
def compiled(model, sgd, batch, epochs, augment):
    params, stats = model.init(jax.random.key(1))
    options = dict(setting=Setting(1, epochs, batch, augment), momentum=model.momentum)
    gradient, optimizer = local.plain(model_loss(model)), optimizers.sgd(*sgd)
    return jit(lambda data: local.fit(gradient, optimizer, params, stats, data, KEY, **options))


def fit(data, *, model=None, sgd=(0.1, 0.9, 0.1), batch=4, epochs=2, augment=unchanged):
    return compiled(model or toy_model(), sgd, batch, epochs, augment)(data)


@pytest.mark.parametrize(("n", "size", "batch"), [(8, 8, 4), (10, 10, 4), (10, 7, 4), (10, 2, 4), (3, 3, 8)])
def test_an_epoch_has_every_real_row_once(n, size, batch):
    rows, weight = local.epoch_batches(KEY, prefix(n, size), batch)
    assert rows.shape == weight.shape == (-(-n // batch), batch)
    assert sorted(rows[weight == 1].tolist()) == list(range(size))
    assert set(np.unique(weight)) <= {0.0, 1.0}
    assert rows.max() < size  # what fills a batch is a real row too


def test_the_real_rows_need_not_come_first():
    weight = jnp.array([0.0, 1, 0, 1, 1, 0])
    rows, chosen = local.epoch_batches(KEY, weight, 4)
    assert sorted(rows[chosen == 1].tolist()) == [1, 3, 4]
    assert set(rows.ravel().tolist()) == {1, 3, 4}


def test_only_steps_past_the_clients_size_are_empty():
    _, weight = local.epoch_batches(KEY, prefix(10, 5), 4)
    assert weight.sum(axis=1).tolist() == [4, 1, 0]


def test_epochs_are_shuffled_afresh_and_by_key():
    rows, weight = local.all_batches(KEY, prefix(12, 12), 4, 3)
    assert rows.shape == weight.shape == (9, 4)
    first, second = rows[:3].ravel(), rows[3:6].ravel()
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(12))
    assert first.tolist() != second.tolist()
    same(rows, local.all_batches(KEY, prefix(12, 12), 4, 3)[0])
    assert rows.tolist() != local.all_batches(jax.random.key(8), prefix(12, 12), 4, 3)[0].tolist()


def test_pairs_are_disjoint_and_drop_the_rest():
    rows, weight = local.epoch_tasks(KEY, prefix(600, 600), 32)
    assert rows.shape == weight.shape == (9, 2, 32)
    assert (weight == 1).all()
    assert len(set(rows.ravel().tolist())) == 9 * 64


def test_a_task_is_valid_only_if_all_its_rows_are_real():
    rows, weight = local.epoch_tasks(KEY, prefix(30, 21), 4)
    assert weight.sum((1, 2)).tolist() == [8, 8, 0]  # 8 rows a task, 21 // 8 = 2
    assert set(rows[:2].ravel().tolist()) <= set(range(21))


def test_one_task_an_epoch():
    rows, weight = local.all_tasks(KEY, prefix(30, 30), 4, 5, "one")
    assert rows.shape == weight.shape == (5, 2, 4)
    assert (weight == 1).all()
    assert all(len(set(task.ravel().tolist())) == 8 for task in rows)


def test_split_keeps_its_halves_in_every_epoch():
    rows, weight = local.all_tasks(KEY, prefix(25, 22), 4, 6, "split")
    valid = weight.all((1, 2))
    assert rows.shape == (6 * 3, 2, 4)
    support, query = (set(rows[valid][:, i].ravel().tolist()) for i in (0, 1))
    assert support == set(range(0, 22, 2))
    assert query == set(range(1, 22, 2))
    assert valid.reshape(6, 3).tolist() == [[True, True, False]] * 6  # 11 real rows a half


def test_tasks_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match="2 batches of 16 rows but no client has more than 20"):
        local.epoch_tasks(KEY, prefix(20, 20), 16)
    with pytest.raises(ValueError, match="'pair'; there are pairs, one, split"):
        local.epoch_tasks(KEY, prefix(20, 20), 4, "pair")


def test_cross_entropy_and_accuracy_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]], jnp.bfloat16))
    exact = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]))
    label, weight = jnp.array([0, 0, 2]), jnp.array([1.0, 1.0, 0.0])
    np.testing.assert_allclose(
        local.cross_entropy(exact, label, weight), (np.log(2) + np.log(10)) / 2, rtol=1e-6
    )
    assert local.cross_entropy(logits, label, weight).dtype == jnp.float32
    assert local.accuracy(exact, label, weight) == 0.5
    assert local.cross_entropy(exact, label, jnp.zeros(3)) == 0
    assert local.accuracy(exact, label, jnp.zeros(3)) == 0


def test_sgd_clips_then_decays_then_adds_momentum():
    params, grads = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 4.0])}
    optimizer = optimizers.sgd(0.1, momentum=0.5, weight_decay=0.2, clip=1.0)
    state = optimizer.init(params)
    first, state = optimizer.update(grads, state, params)
    # (3, 4) / 5 + 0.2 (1, 2) = (0.8, 1.2)
    np.testing.assert_allclose(first["w"], [-0.08, -0.12], rtol=1e-6)
    second, _ = optimizer.update(grads, state, params)
    np.testing.assert_allclose(second["w"], [-0.12, -0.18], rtol=1e-6)


def test_sgd_takes_a_traced_rate():
    params = jnp.array([1.0])

    @jit
    def step(lr):
        optimizer = optimizers.sgd(lr)
        return optimizer.update(jnp.array([2.0]), optimizer.init(params), params)[0]

    np.testing.assert_allclose([step(0.5)[0], step(0.25)[0]], [-1.0, -0.5])
    assert step._cache_size() == 1


def test_cosine_end_points():
    lr = jit(optimizers.cosine(100, 0.025, 0.001))
    np.testing.assert_allclose([lr(0), lr(50), lr(100), lr(140)], [0.025, 0.013, 0.001, 0.001], rtol=1e-5)


def test_only_the_selected_leaves_move():
    params = {"body": {"kernel": jnp.ones(2), "bias": jnp.ones(1)}, "head": {"kernel": jnp.ones(3)}}
    seen = []

    def selected(path):
        seen.append(path)
        return path.startswith("head/")

    optimizer = optimizers.only(selected, optimizers.sgd(1.0, momentum=0.9, weight_decay=0.5, clip=1.0))
    state = optimizer.init(params)
    grads = {"body": tree.scale(params["body"], 100.0), "head": {"kernel": jnp.array([0.6, 0.0, 0.8])}}
    updates, _ = optimizer.update(grads, state, params)
    assert set(seen) == {"body/kernel", "body/bias", "head/kernel"}
    same(updates["body"], tree.zeros_like(params["body"]))
    # Norm 1 over the head alone: the clip leaves it, the decay adds 0.5.
    np.testing.assert_allclose(updates["head"]["kernel"], [-1.1, -0.5, -1.3], rtol=1e-6)


def test_one_batch_is_one_optimizer_step():
    model, data = toy_model(hidden=5, centred=True), examples(6)
    params, stats = model.init(jax.random.key(1))
    sgd = (0.1, 0.9, 1e-2, 0.5)
    optimizer = optimizers.sgd(*sgd)

    @jit
    def step(params):
        gradient = jax.value_and_grad(model_loss(model), has_aux=True)
        (value, (moments, _)), grads = gradient(params, stats, data, KEY)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates), moments, value

    expected, moments, value = step(params)
    fitted, fitted_stats, metrics = fit(data, model=model, sgd=sgd, batch=6, epochs=1)
    close(fitted, expected)
    close(fitted_stats, tree.scale(moments, 0.1))  # 0.9 * 0 + 0.1 * the batch's
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    assert metrics["image_gradients"] == 6


def test_momentum_lasts_through_the_epochs():
    model, data = toy_model(), examples(6)
    params, stats = model.init(jax.random.key(1))
    optimizer = optimizers.sgd(0.1, 0.9, 0.1)
    fitted, *_ = fit(data, model=model, batch=6, epochs=3)

    @jit
    def step(params, state):
        grads = jax.grad(model_loss(model), has_aux=True)(params, stats, data, KEY)[0]
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(3):
        params, state = step(params, state)
    close(fitted, params)


def test_padding_never_reaches_the_weights_without_batch_statistics():
    data = examples(10, size=6)
    spoilt = data._replace(  # the padding's own pixels and labels are never seen
        image=data.image.at[6:].set(255), label=data.label.at[6:].set(0)
    )
    same(fit(data)[0], fit(spoilt)[0])
    # A batch that holds all 6 rows and 4 fillers steps as a batch of the 6 alone does.
    alone = jax.tree.map(lambda x: x[:6], data)
    close(fit(data, batch=10, epochs=3)[0], fit(alone, batch=6, epochs=3)[0])


def test_empty_steps_change_nothing_even_with_momentum_and_decay():
    params, stats, metrics = fit(examples(16, size=4), batch=4, epochs=1)
    data = jax.tree.map(lambda x: x[:4], examples(16, size=4))
    alone, alone_stats, alone_metrics = fit(data, batch=4, epochs=1)
    close(params, alone)
    close(stats, alone_stats)
    close(metrics, alone_metrics)


@pytest.mark.parametrize("size", [15, 6])
@pytest.mark.parametrize("kind", ["batches", *typing.get_args(local.Tasks)])
def test_how_long_the_padding_is_says_nothing(kind, size):
    model = toy_model(centred=True)
    params, stats = model.init(jax.random.key(1))
    plain, options = local.plain(model_loss(model)), {"setting": Setting(1, 3, 3, noisy), "momentum": model.momentum}

    def of_both(variables, stats, batches, key):
        return plain.of(variables, stats, [jax.tree.map(lambda *x: jnp.concatenate(x), *batches)], key)

    if kind == "batches":
        gradient = plain
    else:
        options["tasks"], gradient = kind, local.Gradient(of_both, passes=(1, 1))

    @jit
    def fitted(data, steps=None):
        return local.fit(gradient, optimizers.sgd(0.1, 0.9, 0.1), params, stats, data, KEY, **options, steps=steps)

    short, long = (examples(n, size=size) for n in (16, 40))
    long = jax.tree.map(lambda x, y: y.at[:size].set(x[:size]), short, long)
    close(fitted(short), fitted(long))
    assert fitted(short)[2]["image_gradients"] > 0
    close(fitted(short, 2), fitted(long, 2))
    assert not np.array_equal(*(jax.tree.leaves(fitted(short, n)[0])[0] for n in (0, 1)))


def noisy(key, image):
    return image + jax.random.randint(key, image.shape, 0, 9, image.dtype)


@pytest.mark.parametrize("size", [30, 17, 6])
@pytest.mark.parametrize("kind", ["batches", *typing.get_args(local.Tasks)])
def test_steps_are_counted_as_they_are_taken(kind, size):
    setting, weight = Setting(1, 3, 3, unchanged), prefix(40, size)
    if kind == "batches":
        _, taken = local.all_batches(KEY, weight, setting.batch, setting.epochs)
        assert local.steps_a_round(weight, 1, setting) == np.sum(np.any(taken > 0, axis=1))
    else:
        _, taken = local.all_tasks(KEY, weight, setting.batch, setting.epochs, kind)
        assert local.steps_a_round(weight, 2, setting, kind) == np.sum(np.any(taken > 0, axis=(1, 2)))


def test_a_client_of_padding_alone_is_the_identity():
    params, stats = toy_model().init(jax.random.key(1))
    fitted, fitted_stats, metrics = fit(examples(10, size=0))
    same((fitted, fitted_stats), (params, stats))
    assert all(value == 0 for value in metrics.values())


def test_no_epochs_are_the_identity():
    params, stats = toy_model().init(jax.random.key(1))
    same(fit(examples(8), epochs=0)[:2], (params, stats))


@pytest.mark.parametrize(("n", "size", "batch"), [(13, 13, 4), (13, 6, 4)])
def test_metrics_average_the_real_rows_alone(n, size, batch):
    # lr 0: the loss of all steps is that of the rows, also where the last step holds few of them.
    model, data = toy_model(), examples(n, size=size)
    params, stats = model.init(jax.random.key(1))
    _, _, metrics = fit(data, sgd=(0.0,), batch=batch, epochs=1)
    value, (_, correct) = model_loss(model)(params, stats, data, KEY)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], correct, rtol=1e-5)
    assert metrics["image_gradients"] == size


def test_augmentation_is_drawn_anew_at_every_step():
    def augment(key, image):
        return jnp.full_like(image, jax.random.randint(key, (), 0, 256))

    # Momentum 1 makes the statistic the last batch's mean image: the last draw / 255.
    model = toy_model(momentum=1.0)
    means = [fit(examples(4), model=model, epochs=e, augment=augment)[1]["mean"][0] for e in (1, 2)]
    assert len({float(m) for m in means}) == 2


def test_what_a_gradient_measures_is_what_it_is_said_to_measure():
    model = toy_model()
    params, stats = model.init(jax.random.key(1))
    gradient = local.plain(model_loss(model))._replace(metrics=("loss", "macs"))
    how = {"setting": Setting(1, 1, 4, unchanged), "momentum": 0.1}
    with pytest.raises(ValueError, match="has metrics loss, accuracy but is said to have loss, macs"):
        jax.eval_shape(lambda data: local.fit(gradient, optax.sgd(0.1), params, stats, data, KEY, **how), examples(4))


def test_the_gradient_is_traced_once():
    traces = []
    model = toy_model()
    inner = model_loss(model)

    def loss(*args):
        traces.append(1)
        return inner(*args)

    params, stats = model.init(jax.random.key(1))
    run = dict(setting=Setting(1, 3, 4, unchanged), momentum=0.1)
    jit(lambda d: local.fit(local.plain(loss), optax.sgd(0.1), params, stats, d, KEY, **run)).lower(examples(12))
    assert len(traces) == 1
