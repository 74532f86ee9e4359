"""Median and trimmed mean by hand and by law: who was left out does not count, who lies moves little."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from fedmetanas_jax import tree
from fedmetanas_jax.engine import aggregate, robust
from fedmetanas_jax.engine import round as engine
from fedmetanas_jax.options import UsageError

KEY = jax.random.key(0)
SIZE = 5
NAMES = ("median", "trimmed:0.2")
APPLY = {name: jax.jit(aggregate.parse(name).apply) for name in NAMES}
CHANGE = {
    "params": {"w": jnp.asarray(np.random.default_rng(0).normal(size=(SIZE, 2, 3)), jnp.float32)},
    "alpha": jnp.array([1.0, 2.0, 10.0, -5.0, 3.0]),
}
ALL = jnp.ones(SIZE)


def by_numpy(name: str, rows: np.ndarray) -> np.ndarray:
    """Of the rows heard, [c, ...]."""
    if name == "median":
        return np.median(rows, axis=0)
    cut = int(0.2 * len(rows))
    return np.sort(rows, axis=0)[cut : len(rows) - cut].mean(axis=0)


def test_by_hand():
    assert APPLY["median"](CHANGE, ALL, KEY)[0]["alpha"] == 2
    assert APPLY["median"](CHANGE, ALL.at[2].set(0), KEY)[0]["alpha"] == 1.5
    np.testing.assert_allclose(APPLY["trimmed:0.2"](CHANGE, ALL, KEY)[0]["alpha"], (1 + 2 + 3) / 3, rtol=1e-6)
    # Of four a fifth is nobody.
    np.testing.assert_allclose(APPLY["trimmed:0.2"](CHANGE, ALL.at[2].set(0), KEY)[0]["alpha"], 0.25, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_who_was_left_out_does_not_count_and_weights_do_not(name):
    for heard in itertools.product((0.0, 1.0), repeat=SIZE):
        heard = np.array(heard)
        weight = jnp.asarray(heard * [1, 700, 3, 0.5, 2], jnp.float32)
        merged, after, _ = APPLY[name](CHANGE, weight, KEY)
        assert after.tolist() == weight.tolist()
        for got, x in zip(jax.tree.leaves(merged), jax.tree.leaves(CHANGE), strict=True):
            rows = np.asarray(x)[heard > 0]
            expected = by_numpy(name, rows) if len(rows) else np.zeros(x.shape[1:])
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_equal_changes_are_the_change_and_the_order_is_nothing(name):
    row = tree.take(CHANGE, 0)
    same = jax.tree.map(lambda x: jnp.stack([x] * SIZE), row)
    tolerance = 0 if name == "median" else 1e-6
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance), APPLY[name](same, ALL, KEY)[0], row
    )
    first = APPLY[name](CHANGE, ALL, KEY)[0]
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        again = APPLY[name](tree.take(CHANGE, jnp.array(order)), ALL, KEY)[0]
        jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.parametrize(("name", "liars"), [("median", (3, 1)), ("trimmed:0.2", (3,))])
@pytest.mark.parametrize("lie", [3e38, -3e38, 1e6, 0.0])
def test_liars_stay_within_the_range_of_the_honest(name, liars, lie):
    honest = [k for k in range(SIZE) if k not in liars]
    told = jax.tree.map(lambda x: x.at[jnp.array(liars)].set(lie), CHANGE)
    merged = APPLY[name](told, ALL, KEY)[0]
    for got, x in zip(jax.tree.leaves(merged), jax.tree.leaves(CHANGE), strict=True):
        kept = np.asarray(x)[honest]
        assert np.all((np.min(kept, 0) - 1e-6 <= got) & (got <= np.max(kept, 0) + 1e-6))


def test_a_liar_more_than_is_trimmed_is_not_withstood():
    told = CHANGE | {"alpha": CHANGE["alpha"].at[:2].set(1e6)}
    assert APPLY["trimmed:0.2"](told, ALL, KEY)[0]["alpha"] > 1e5


def test_shares_are_the_decimal_numbers_as_written():
    found = [robust.cut_of(*given) for given in ((0.29, 100), (0.2, 5), (0.1, 30), (0.3, 10), (0.2, 4), (0.49, 5))]
    assert found == [29, 1, 3, 3, 0, 2]
    assert all(2 * robust.cut_of(share, c) < c for share in (0.01, 0.25, 0.4999) for c in range(1, 300))


def test_trimming_nobody_is_refused():
    with pytest.raises(UsageError, match="trimmed:0.1 trims nobody of 5 clients") as error:
        jax.eval_shape(aggregate.parse("trimmed:0.1").apply, CHANGE, ALL, KEY)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_clients_that_are_given_a_part_each_are_refused(name):
    some = toy.ALGORITHM._replace(held=lambda sent: {"params": jax.tree.map(lambda x: jnp.array(True), sent.params)})
    for algorithm, refused in ((some, True), (some._replace(held_alike=True), False), (toy.ALGORITHM, False)):
        step = engine.make_round(algorithm, cohort_size=SIZE, at_once=1, aggregate=aggregate.parse(name))
        given = engine.state_shapes(algorithm, 7), toy.make_data(7), jnp.int32(1)
        if refused:
            with pytest.raises(UsageError, match="given a part of the network each"):
                jax.eval_shape(step, *given)
        else:
            jax.eval_shape(step, *given)


def test_a_round_takes_the_median_of_those_whose_reply_is_finite():
    def client_update(told, own, data, key):
        reply = toy.client_update(told[0], own, data, key)
        lost = jnp.where(told[1] == 0, jnp.nan, 0)
        return reply._replace(change=jax.tree.map(lambda x: x + lost, reply.change))

    broken = toy.ALGORITHM._replace(send=lambda server, client, key: (server, client), client_update=client_update)
    data = toy.make_data(SIZE)
    step = engine.make_round(broken, cohort_size=SIZE, at_once=0, aggregate=aggregate.parse("finite:1,median"))
    state = engine.init_state(toy.ALGORITHM, 3, SIZE)
    before = jax.tree.map(jnp.copy, state)
    after, metrics = step(state, data, jnp.int32(1))
    assert metrics["finite"][0].sum() == SIZE - 1
    assert after.owns["turns"].tolist() == [0, 1, 1, 1, 1]
    keys = [engine.client_key(3, 0, k) for k in range(1, SIZE)]
    replies = [
        toy.client_update(before.server, tree.take(before.owns, k), engine.train_examples(data, k), key)
        for k, key in enumerate(keys, 1)
    ]
    stacked = jax.tree.map(lambda *x: np.stack(x), *[reply.change for reply in replies])
    expected = tree.add(before.server.params, jax.tree.map(lambda x: np.median(x, axis=0), stacked["params"]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), after.server.params, expected)
