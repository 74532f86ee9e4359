"""The stages that make one change of a cohort's, by hand; and what the round and a run do with who was left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from fedmetanas_jax import tree
from fedmetanas_jax.build import one_phase
from fedmetanas_jax.engine import aggregate
from fedmetanas_jax.engine import round as engine
from fedmetanas_jax.engine.report import NonFiniteError

KEY = jax.random.key(0)
CLIENTS, COHORT, SEED, ROUNDS = 7, 5, 3, 4
DATA = toy.make_data(CLIENTS)
CHANGE = {
    "params": {"w": jnp.array([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]])},
    "alpha": jnp.array([[0.5], [-2.0], [1.0]]),
    "stats": jnp.array([[1.0], [2.0], [3.0]]),
}
WEIGHT = jnp.array([1.0, 1.0, 2.0])


def apply(text: str, change=CHANGE, weight=WEIGHT):
    return jax.jit(aggregate.parse(text).apply)(change, weight, KEY)


def test_the_mean_is_weighted():
    change, weight, metrics = apply("mean")
    np.testing.assert_allclose(change["params"]["w"], [(3 + 0 + 12) / 4, (4 + 1 + 16) / 4])
    np.testing.assert_allclose(change["alpha"], [0.125])
    assert (weight.tolist(), metrics) == ([1, 1, 2], {})


def test_what_is_not_finite_weighs_nothing():
    broken = CHANGE | {"stats": CHANGE["stats"].at[1].set(jnp.nan)}
    change, weight, _ = apply("finite:1,mean", broken, WEIGHT.at[1].set(jnp.nan))
    assert weight.tolist() == [1, 0, 2]
    np.testing.assert_allclose(change["stats"], [7 / 3], rtol=1e-6)
    np.testing.assert_allclose(change["params"]["w"], [5, 20 / 3], rtol=1e-6)
    nobody, weight, _ = apply("finite:3,mean", broken, jnp.full(3, jnp.nan))
    assert weight.tolist() == [0, 0, 0]
    assert not any(np.any(x) for x in jax.tree.leaves(nobody))
    # Without the stage it reaches the mean.
    assert np.isnan(apply("mean", broken)[0]["stats"]).all()


def test_weights_and_alphas_are_clipped_apart():
    clipped, _, metrics = jax.jit(aggregate.clip(5.0, 1.0).apply)(CHANGE, WEIGHT, KEY)
    np.testing.assert_allclose(clipped["params"]["w"], [[3, 4], [0, 1], [3, 4]], rtol=1e-6)
    np.testing.assert_allclose(clipped["alpha"], [[0.5], [-1], [1]], rtol=1e-6)
    np.testing.assert_array_equal(clipped["stats"], CHANGE["stats"])
    assert metrics["clipped"].tolist() == [0, 1, 1]
    clipped, _, metrics = jax.jit(aggregate.clip(100.0, None, 2.5).apply)(CHANGE, WEIGHT, KEY)
    np.testing.assert_allclose(clipped["stats"], [[1], [2], [2.5]], rtol=1e-6)
    np.testing.assert_array_equal(clipped["alpha"], CHANGE["alpha"])
    assert metrics["clipped"].tolist() == [0, 0, 1]


def test_stages_come_one_after_another():
    change, _, metrics = apply("clip:5,mean")
    np.testing.assert_allclose(change["params"]["w"], [9 / 4, 13 / 4], rtol=1e-6)
    assert metrics["clipped"].tolist() == [0, 0, 1]
    assert aggregate.parse("finite:7,clip:5:1:10,mean").allowed == 7
    assert aggregate.parse("mean").allowed == 0


def test_a_stage_after_the_mean_sees_one_change():
    """The seam that noise needs: what privacy adds is one stage more, and no change of the round."""
    seen = []

    def noise(change, weight, key):
        seen.append(change["stats"].shape)
        return jax.tree.map(lambda x: x + jax.random.normal(key, x.shape), change), weight, {}

    stages = aggregate.chain(aggregate.clip(5.0), aggregate.mean(), aggregate.Aggregate(noise))
    change, _, _ = stages.apply(CHANGE, WEIGHT, KEY)
    assert seen == [(1,)]
    assert jnp.any(change["stats"] != apply("clip:5,mean")[0]["stats"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mode", "no stage 'mode'; there are mean, median, trimmed, gaussian, secure, finite, clip"),
        ("median:1", "median takes no numbers"),
        ("trimmed", "trimmed takes the share of the clients"),
        ("trimmed:0.5", "must be above 0 and below 0.5"),
        ("trimmed:nan", "must be above 0 and below 0.5"),
        ("median,trimmed:0.2", "exactly one stage must be"),
        ("median,clip:5", "clip comes after the median"),
        ("finite,mean", "finite takes the replies that may be left out"),
        ("finite:0,mean", "it must be at least 1"),
        ("finite:x,mean", "finite takes"),
        ("clip:-1,mean", "must be positive"),
        ("clip:1:2:3:4,mean", "clip takes the largest norm"),
        ("mean:3", "mean takes no numbers"),
        ("clip:1", "exactly one stage must be mean"),
        ("mean,mean", "exactly one stage must be mean"),
        ("mean,clip:5", "clip comes after the mean"),
        ("clip:5,clip:3,mean", "clip stands there twice"),
        ("", "no stage ''"),
    ],
)
def test_what_is_no_aggregate_is_named(text, message):
    with pytest.raises(ValueError, match=message) as error:
        aggregate.parse(text)
    assert "\n" not in str(error.value)
    assert f"aggregate={text!r}" in str(error.value)


def poisoned(rounds: dict[int, str]):
    """The toy method; in these rounds "one" client (0, if it is asked) or "all" send or keep what is not finite."""

    def client_update(sent, own, data, key):
        reply = toy.client_update(sent[0], own, data, key)
        for number, who in rounds.items():
            bad = (sent[0].round == number) & ((sent[1] == 0) | (who == "all"))
            bias = reply.change["params"]["b"] + jnp.where(bad & (who != "own"), jnp.nan, 0)
            change = reply.change | {"params": reply.change["params"] | {"b": bias}}
            kept = reply.own | {"noise": reply.own["noise"] + jnp.where(bad, jnp.inf, 0)}
            reply = reply._replace(change=change, own=kept)
        return reply

    return toy.ALGORITHM._replace(
        send=lambda server, client, key: (server, client),
        client_update=client_update,
        personalize=lambda sent, *rest: toy.personalize(sent[0], *rest),
    )


def asked_in(number: int) -> np.ndarray:
    return np.asarray(engine.cohort(SEED, number, CLIENTS, COHORT))


@pytest.mark.parametrize("who", ["one", "own"])
def test_who_is_left_out_keeps_what_it_had_and_the_others_go_on(who):
    number = next(n for n in range(9) if 0 in asked_in(n))
    step = engine.make_round(
        poisoned({number: who}), cohort_size=COHORT, at_once=0, aggregate=aggregate.parse("finite:1,mean")
    )
    state = engine.init_state(toy.ALGORITHM, SEED, CLIENTS)._replace(round=jnp.int32(number))
    state = state._replace(server=state.server._replace(round=jnp.int32(number)))
    before = jax.tree.map(jnp.copy, state)
    after, metrics = step(state, DATA, jnp.int32(number + 1))
    chosen = asked_in(number)
    np.testing.assert_array_equal(metrics["finite"][0], chosen != 0)
    assert after.owns["turns"].tolist() == [int(k in chosen and k != 0) for k in range(CLIENTS)]
    assert after.owns["noise"][0] == before.owns["noise"][0]
    replies = [
        toy.client_update(before.server, tree.take(before.owns, k), engine.train_examples(DATA, k), key)
        for k in chosen if k != 0
        for key in [engine.client_key(SEED, number, k)]
    ]  # fmt: skip
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *replies)
    mean = tree.weighted_mean(stacked.change, stacked.weight)
    for part in ("params", "stats"):
        expected = tree.add(getattr(before.server, part), mean[part])
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), getattr(after.server, part), expected)


def a_run(algorithm, workdir, text: str, said: list, **changed):
    how = {"clients": CLIENTS, "cohort": COHORT, "seed": SEED, "rounds": ROUNDS, "aggregate": aggregate.parse(text)}
    return toy.run(one_phase(algorithm), DATA, workdir, said, **how | changed)


def test_a_run_names_who_was_left_out_and_goes_on(tmp_path):
    """Round 2 loses everybody: the server stays as it was, but for its round."""
    said = []
    outcome = a_run(poisoned({1: "all"}), tmp_path / "run", f"finite:{COHORT},mean", said)
    records = [x for x in said if isinstance(x, dict)]
    assert records[1]["dropped"] == asked_in(1).tolist()
    assert "loss" not in records[1]
    assert [("dropped" in record) for record in records] == [False, True, False, False]
    assert records[1]["bias"] == records[0]["bias"] != records[2]["bias"]
    line = next(x for x in said if isinstance(x, str) and "left out" in x)
    assert line.startswith("round 2: left out clients ")
    assert line.endswith("nobody is left, so the server stays as it was")
    assert outcome.state.server.round == ROUNDS
    assert outcome.summary["replies_dropped"] == COHORT
    assert outcome.state.owns["turns"].sum() == (ROUNDS - 1) * COHORT


def test_beyond_the_limit_the_run_stops_also_when_it_was_resumed(tmp_path):
    algorithm = poisoned({1: "all", 3: "all"})
    limits = {"mean": "round 2", f"finite:{COHORT - 1},mean": "round 2", f"finite:{COHORT},mean": "round 4"}
    for text, place in limits.items():
        workdir = tmp_path / text.replace(":", "-")
        for _ in range(2):  # the second time from the checkpoint before, which knows what was lost until then
            with pytest.raises(NonFiniteError, match=f"{place}, client .* is not finite"):
                a_run(algorithm, workdir, text, [], block=1)


def test_the_mean_is_a_loop_on_a_cpu_and_products_elsewhere():
    """Either is the mean of Eq. 3, and that of equal rows is the row."""
    rng = np.random.default_rng(0)
    stacked = {"w": jnp.float32(rng.normal(size=(5, 3, 7))), "b": jnp.float16(rng.normal(size=5))}
    weight = jnp.array([3.0, 0, 1, 2, 4])
    lowered = jax.jit(tree.weighted_mean).trace(stacked, weight)
    found = {name: lowered.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda", "tpu")}
    assert {name: ("stablehlo.while" in text, "dot_general" in text) for name, text in found.items()} == {
        "cpu": (True, False), "cuda": (False, True), "tpu": (False, True)
    }  # fmt: skip
    mean = jax.jit(tree.weighted_mean)(stacked, weight)
    for name, x in stacked.items():
        by_hand = np.average(np.float64(x), axis=0, weights=np.float64(weight))
        np.testing.assert_allclose(mean[name], by_hand, rtol=1e-3 if name == "b" else 1e-6)
        assert mean[name].dtype == x.dtype
    alike = jax.tree.map(lambda x: jnp.stack([x[0]] * 5), stacked)
    jax.tree.map(lambda m, x: np.testing.assert_allclose(m, x[0], rtol=1e-6), tree.weighted_mean(alike, weight), alike)
    assert not np.any(tree.weighted_mean(stacked, jnp.zeros(5))["w"])
