"""Sums of integers in the place of a mean: by hand, at the edge of what 32 bits hold, and in a round."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from toy_federation import NAMES, federation, first_algorithm

from fedmetanas_jax import main, tree
from fedmetanas_jax.engine import aggregate, secure
from fedmetanas_jax.engine import round as engine
from fedmetanas_jax.engine.mesh import clients_mesh, put_data
from fedmetanas_jax.options import UsageError

KEY = jax.random.key(0)
TEXT = "clip:5:1:10,secure"
CHANGE = {
    "params": {"w": jnp.array([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]])},
    "alpha": jnp.array([[0.5], [-2.0], [1.0]]),
    "stats": jnp.array([[1.0], [2.0], [3.0]]),
}
WEIGHT = jnp.array([5.0, 5.0, 10.0])


def stages(text: str = TEXT, most: float = 20.0):
    return secure.within(aggregate.parse(text), most)


def apply(change=CHANGE, weight=WEIGHT, text: str = TEXT, most: float = 20.0):
    return jax.jit(stages(text, most).apply)(change, weight, KEY)


def encoded(change, weight, clients: int, text: str = TEXT, most: float = 20.0):
    """What each client adds, computed by itself."""
    how = stages(text, most).secure
    encode = jax.jit(lambda x, w: secure.encode(how, x, w, clients)[0])
    return [jax.device_get(encode(jax.tree.map(lambda x, n=n: x[n], change), weight[n])) for n in range(clients)]


def test_by_hand():
    """Three clients; weights 1/4, 1/4, 1/2; norms 5, 1 and 10: scales 2^27, 2^29 and 2^26, and 2^29 of the weights."""
    assert [secure.exponent(norm, 3) for norm in (5, 1, 10)] == [27, 29, 26]
    first, second, third = encoded(CHANGE, WEIGHT, 3)
    assert first.change["params"]["w"].tolist() == [3 * 2**25, 4 * 2**25]
    assert second.change["alpha"].tolist() == [-(2**27)]  # clipped to -1
    assert third.change["stats"].tolist() == [3 * 2**25]
    assert [x.weight for x in (first, second, third)] == [2**27, 2**27, 2**28]
    merged, heard, metrics = apply()
    np.testing.assert_allclose(merged["params"]["w"], [(3 / 4 + 3 / 2), (4 / 4 + 1 / 4 + 4 / 2)], rtol=1e-6)
    np.testing.assert_allclose(merged["alpha"], [0.5 / 4 - 1 / 4 + 1 / 2], rtol=1e-6)
    assert merged["stats"] == 1 / 4 + 2 / 4 + 3 / 2
    assert heard.tolist() == [1, 1, 1]
    assert metrics["clipped"].tolist() == [0, 1, 1]


@pytest.mark.parametrize("norm", [1e-18, 1.0, 7.3, 1e15])
@pytest.mark.parametrize("clients", [1, 3, 30])
def test_no_sum_wraps_and_no_finer_scale_would_do(norm, clients):
    """Every client sends the largest number that the norm allows; sums in Python's integers, which do not wrap."""
    k = secure.exponent(norm, clients)
    assert clients * round(norm * 2.0**k) < 2**31
    assert clients * round(norm * 2.0 ** (k + 1)) >= 2**31
    for sign in (1.0, -1.0):
        change = {"params": jnp.full((clients, 1), sign * 10 * norm)}
        summands = encoded(change, jnp.full(clients, 20.0), clients, f"clip:{norm!r},secure")
        total = sum(int(x.change["params"][0]) for x in summands)
        assert abs(total) < 2**31
        assert sum(int(x.weight) for x in summands) < 2**31
        merged = apply(change, jnp.full(clients, 20.0), f"clip:{norm!r},secure")[0]
        np.testing.assert_allclose(merged["params"], [sign * norm], rtol=1e-6)


def test_it_is_the_weighted_mean_up_to_rounding():
    rng = np.random.default_rng(0)
    clients, norm = 6, 4.0
    change = {"params": jnp.asarray(rng.normal(size=(clients, 5000)) * 0.05, jnp.float32)}
    weight = jnp.asarray(rng.integers(1, 21, clients), jnp.float32)
    merged = np.asarray(apply(change, weight, f"clip:{norm},secure")[0]["params"], np.float64)
    x, w = np.asarray(change["params"], np.float64), np.asarray(weight, np.float64)
    x *= np.minimum(1, norm / np.linalg.norm(x, axis=1))[:, None]
    unit = 2.0 ** -secure.exponent(norm, clients)
    most = clients * unit / 2 / (w.sum() / 20)  # half a unit of each client, over the weights' sum
    assert np.max(np.abs(merged - w @ x / w.sum())) < 1.2 * most + 1e-7 * norm
    assert np.max(np.abs(merged - w @ x / w.sum())) > 0.01 * most  # or it would not have been rounded at all


def test_what_a_client_computes_alone_is_what_the_round_adds():
    """To the bit, whatever the order, and the server needs nothing but the sum."""
    rng = np.random.default_rng(1)
    clients = 7
    parts = {"params": (31, 17), "alpha": (9,), "stats": (40,)}
    change = {name: jnp.asarray(rng.normal(size=(clients, *of)), jnp.float32) for name, of in parts.items()}
    weight = jnp.asarray(rng.integers(1, 21, clients), jnp.float32)
    merged, *_ = apply(change, weight)
    summands = encoded(change, weight, clients)
    total = jax.tree.map(lambda *x: np.sum(x[::-1], axis=0, dtype=np.int32), *summands)
    how = stages().secure
    summed, heard, _ = jax.jit(secure.of_sum(how, clients).apply)(total, jnp.ones(clients), KEY)
    jax.tree.map(np.testing.assert_array_equal, summed, merged)
    assert heard.tolist() == [1] * clients


def test_who_weighs_nothing_adds_nothing_and_of_nobody_it_is_nothing():
    whole, some = apply(weight=WEIGHT.at[1].set(0))[0], {"params": {"w": CHANGE["params"]["w"].at[1].set(0)}}
    again = apply(CHANGE | some, WEIGHT.at[1].set(0))[0]
    np.testing.assert_array_equal(whole["params"]["w"], again["params"]["w"])
    nobody, heard, _ = apply(weight=jnp.zeros(3))
    assert heard.tolist() == [0, 0, 0]
    assert not any(np.any(x) for x in jax.tree.leaves(nobody))
    broken = {"params": CHANGE["params"]["w"].at[1, 0].set(jnp.nan)}
    (_, marked, _) = encoded(broken, WEIGHT.at[1].set(jnp.nan), 3)
    assert marked.weight == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("secure", "secure takes clip alone before it"),
        ("finite:3,clip:1,secure", "secure takes clip alone before it"),
        ("clip:1,secure:2", "secure takes no numbers"),
        ("clip:1,gaussian:1,secure", "exactly one stage must be mean, median, trimmed, gaussian or secure"),
        ("clip:1,median,secure", "exactly one stage must be"),
        ("secure,clip:1", "clip comes after the secure"),
        ("clip:0,secure", "must be positive and finite"),
    ],
)
def test_what_is_no_secure_aggregate_is_named(text, message):
    with pytest.raises(ValueError, match=message) as error:
        aggregate.parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "text", "said"),
    [
        (CHANGE, "clip:5,secure", "needs a norm for the architecture parameters that this method sends, as the second"),
        (CHANGE, "clip:5:1,secure", "needs a norm for the batch-norm statistics that this method sends, as the third"),
        ({"params": jnp.ones((3, 2), jnp.int32)}, "clip:5,secure", "a change's ['params'] is int32"),
        ({"params": jnp.ones((3, 2))}, "clip:1e-35,secure", "cannot scale a norm of 1e-35"),
    ],
)
def test_changes_that_cannot_be_summed_are_refused(change, text, said):
    with pytest.raises(UsageError) as error:
        apply(change, text=text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_part_without_numbers_needs_no_norm():
    merged = apply({"params": jnp.ones((3, 2)), "stats": {}}, text="clip:5,secure")[0]
    assert merged["stats"] == {}


def test_it_is_not_applied_before_it_knows_what_a_client_can_weigh():
    with pytest.raises(ValueError, match="is not known yet"):
        aggregate.parse(TEXT).apply(CHANGE, WEIGHT, KEY)


@pytest.mark.parametrize("name", NAMES)
def test_changes_of_every_method_are_float32(name):
    algorithm, data = first_algorithm(name, real=False), federation()

    def ask(server, own):
        return engine.ask(algorithm, server, own, data, 3, jnp.int32(0), jnp.int32(1))

    reply = jax.eval_shape(ask, *jax.eval_shape(algorithm.init, KEY))
    assert {x.dtype for x in jax.tree.leaves(reply.change)} == {jnp.dtype("float32")}


def test_a_sum_that_cannot_be_is_told():
    how, clients = stages().secure, 3
    total = jax.tree.map(lambda *x: np.sum(x, axis=0, dtype=np.int32), *encoded(CHANGE, WEIGHT, clients))
    assert secure.unlikely(how, total, clients, clients) == ""
    extreme = {"params": {"w": jnp.array([[30.0, 40.0]] * 3)}, "alpha": jnp.ones((3, 1)), "stats": jnp.ones((3, 1))}
    most = jax.tree.map(lambda *x: np.sum(x, axis=0, dtype=np.int32), *encoded(extreme, WEIGHT, clients))
    assert secure.unlikely(how, most, clients, clients) == ""  # each at its norm, all in one direction
    wild = np.random.default_rng(0).integers(-(2**31), 2**31, 2, np.int64).astype(np.int32)
    off = total._replace(change=total.change | {"params": {"w": wild}})
    assert "the norm of the sum of their params is" in secure.unlikely(how, off, clients, clients)
    assert "their weights come to" in secure.unlikely(how, total._replace(weight=np.int32(-1)), clients, clients)
    assert "their weights come to" in secure.unlikely(how, total._replace(weight=np.int32(2**30 + 1)), 2, clients)


def test_a_round_adds_what_its_clients_learnt():
    data = toy.make_data(7)
    given = jnp.int32(0), data.train.shape[1]
    step = engine.make_round(toy.ALGORITHM, cohort_size=5, at_once=1, aggregate=aggregate.parse("clip:1:1:1,secure"))
    state = engine.init_state(toy.ALGORITHM, 3, 7)
    after, metrics = step(jax.tree.map(jnp.copy, state), data, jnp.int32(1))
    one = jax.jit(lambda own, k: engine.ask(toy.ALGORITHM, state.server, own, data, 3, given[0], k))
    replies = [
        one(jax.tree.map(lambda x, k=k: x[k], state.owns), k) for k in np.asarray(engine.cohort(3, 0, 7, 5))
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *replies)
    assert len(set(stacked.weight.tolist())) > 1
    merged = apply(stacked.change, stacked.weight, "clip:1:1:1,secure", given[1])[0]
    for part in ("params", "stats"):
        expected = tree.add(getattr(state.server, part), merged[part])
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), getattr(after.server, part), expected)
    assert metrics["clipped"].shape == (1, 5)


def test_what_all_clients_lack_alike_is_not_sent_down_but_added_up_as_zeros():
    """Where clients lack different parts, which would show, they are refused."""
    some = toy.ALGORITHM._replace(held=lambda sent: {"params": jax.tree.map(lambda x: jnp.array(False), sent.params)})
    state, given = engine.init_state(some, 0, 7), (toy.make_data(), jnp.int32(1))
    sizes = {}
    for name, text in (("plain", "mean"), ("secure", "clip:1:1:1,secure")):
        how = {"cohort_size": 5, "at_once": 1, "aggregate": aggregate.parse(text)}
        alike = engine.make_round(some._replace(held_alike=True), **how)
        metrics = alike(jax.tree.map(jnp.copy, state), *given)[1]
        sizes[name] = {way: int(metrics[f"bytes_{way}"][0][0]) for way in ("up", "down")}
    params = tree.nbytes(state.server.params)
    assert sizes["secure"]["down"] == sizes["plain"]["down"] == whole_message(state) - params
    assert sizes["secure"]["up"] == sizes["plain"]["up"] + params
    with pytest.raises(UsageError, match="which part would show"):
        jax.eval_shape(engine.make_round(some, **how), state, *given)


def whole_message(state) -> int:
    return tree.nbytes(jax.eval_shape(lambda: toy.ALGORITHM.send(state.server, jnp.int32(0), jax.random.key(0))))


def test_several_devices_have_the_bits_of_one():
    data, found = toy.make_data(7), []
    for mesh in (None, clients_mesh(4)):
        how = {"cohort_size": 5, "at_once": 1, "mesh": mesh, "aggregate": aggregate.parse("clip:1:1:1,secure")}
        state = engine.init_state(toy.ALGORITHM, 3, 7, mesh)
        found.append(engine.make_round(toy.ALGORITHM, **how)(state, put_data(data, mesh), jnp.int32(1))[0].server)
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_run_that_cannot_be_is_refused_before_it_begins(tmp_path, capsys):
    small = ["--config.network=mobilenetv3_tiny", "--config.method=fedavg", f"--workdir={tmp_path / 'run'}"]
    given = ["main.py", "--config=digits_dir01", *small, "--config.aggregate=clip:5,secure"]
    assert main.main(given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "needs a norm for the batch-norm statistics" in error
    assert not (tmp_path / "run").exists()
