"""Noise that hides clients: how large it is, what one client can move, what is refused, and what the account says."""

import math
import sys
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from scipy.stats import norm
from toy_federation import NAMES, federation, first_algorithm

from fedmetanas_jax import main, tree
from fedmetanas_jax.build import one_phase
from fedmetanas_jax.core import Noise, Phase
from fedmetanas_jax.engine import accountant, aggregate, privacy
from fedmetanas_jax.engine import round as engine
from fedmetanas_jax.options import UsageError

KEY = jax.random.key(1)
SIZE = 5
ONES = jnp.ones(SIZE)


@cache
def compiled(text: str):
    return jax.jit(aggregate.parse(text).apply)


def private(text: str, change, weight=ONES, key=KEY):
    return compiled(text)(change, weight, key)


def test_the_noise_of_each_part_is_as_large_as_the_account_believes():
    """Standard deviation Z C / m: measured on 200,000 numbers, of which the estimate strays by 0.16 %."""
    zeros = {name: jnp.zeros((SIZE, 200_000)) for name in ("params", "control", "alpha", "stats")}
    merged, _, metrics = private("clip:3:0.5:10,gaussian:2", zeros)
    assert metrics["noised_parts"] == 3  # weights with control variates, alphas, statistics
    for name, most in {"params": 3.0, "control": 3.0, "alpha": 0.5, "stats": 10.0}.items():
        np.testing.assert_allclose(jnp.std(merged[name]), 2 * most / SIZE, rtol=0.01)
        assert abs(jnp.mean(merged[name])) < 5 * 2 * most / SIZE / math.sqrt(200_000)
    flat = np.stack([x / jnp.std(x) for x in merged.values()])
    assert np.max(np.abs(np.corrcoef(flat) - np.eye(4))) < 0.02  # no number serves twice
    again = private("clip:3:0.5:10,gaussian:2", zeros)[0]
    jax.tree.map(np.testing.assert_array_equal, merged, again)
    other = private("clip:3:0.5:10,gaussian:2", zeros, key=jax.random.key(2))[0]
    assert not np.any(other["params"] == merged["params"])


def test_statistics_without_a_norm_stay_out():
    change = {"params": jnp.ones((SIZE, 3)), "stats": {"var": jnp.ones((SIZE, 3))}}
    merged, _, metrics = private("clip:3,gaussian:1", change)
    assert merged["stats"]["var"].tolist() == [0, 0, 0]
    assert metrics["noised_parts"] == 1
    with pytest.raises(UsageError, match=r"decides by some of them \(scores_0\); give it as the third number"):
        private("clip:3,gaussian:1", change | {"stats": {"scores_0": jnp.ones((SIZE, 3)), **change["stats"]}})
    assert aggregate.parse("clip:3,gaussian:1").noise == Noise(1.0, None, stats=False)
    assert aggregate.parse("clip:3:1:1,gaussian:0.5:1e-5").noise == Noise(0.5, 1e-5, stats=True)


def test_one_client_moves_the_mean_by_two_norms_at_most():
    rng = np.random.default_rng(0)
    largest = 0.0
    for scale in (1e-3, 1.0, 1e6, 1e30, np.nan):
        change = {"params": jnp.asarray(rng.normal(size=(SIZE, 40)), jnp.float32)}
        other = {"params": change["params"].at[2].set(scale * (1 - 2 * change["params"][2]))}
        moved = tree.sub(*(sent_mean(x) for x in (change, other)))
        largest = max(largest, float(tree.global_norm(moved)))
    assert largest <= 2 * 3 / SIZE * (1 + 1e-6)
    against = {"params": jnp.zeros((SIZE, 40)).at[2, 0].set(1e9)}
    moved = tree.sub(sent_mean(against), sent_mean(tree.scale(against, -1.0)))
    np.testing.assert_allclose(tree.global_norm(moved), 2 * 3 / SIZE, rtol=1e-6)  # so the bound is met


def sent_mean(change):
    """Without noise, as the round marks what is not finite."""
    finite = jax.vmap(tree.all_finite)(change)
    return private("clip:3,gaussian:0", change, jnp.where(finite, 1.0, jnp.nan))[0]


def test_clients_weigh_the_same_and_the_denominator_is_fixed():
    change = {"params": jnp.array([[1.0], [2.0], [-1.0], [0.5], [jnp.nan]])}
    weight = jnp.array([100.0, 1, 7, 3, jnp.nan])
    merged, after, _ = private("clip:10,gaussian:0", change, weight)
    np.testing.assert_allclose(merged["params"], [(1 + 2 - 1 + 0.5) / SIZE])
    assert after.tolist() == [100, 1, 7, 3, 0]


def test_the_server_does_not_learn_who_was_left_out_and_no_variance_is_negative():
    """Of a round in which nobody's reply is finite, too."""
    seen = []

    def server_update(server, merged):
        seen.append(merged.weight)
        stats = {"mean": server.stats["mean"], "var": server.stats["var"] - 5}
        return toy.Server(server.round + 1, tree.add(server.params, merged.change["params"]), stats)

    algorithm = toy.ALGORITHM._replace(server_update=server_update)
    server = toy.Server(jnp.int32(0), {"w": jnp.zeros(3)}, {"mean": -jnp.ones(2), "var": jnp.array([1.0, 9.0])})
    change = {"params": {"w": jnp.full((SIZE, 3), jnp.nan)}}
    given = jnp.arange(SIZE), change, jnp.full(SIZE, jnp.nan), (), 3, jnp.int32(0)
    moved, weight, _ = engine.learn(algorithm, aggregate.parse("clip:1,gaussian:1"), server, *given)
    assert weight.tolist() == [0] * SIZE
    assert seen[0].tolist() == [1] * SIZE
    assert np.all(np.isfinite(moved.params["w"]))
    assert np.all(moved.params["w"] != 0)
    assert moved.stats["var"].tolist() == [0, 4]
    assert moved.stats["mean"].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gaussian:1", "gaussian takes clip alone before it"),
        ("finite:3,clip:1,gaussian:1", "gaussian takes clip alone before it"),
        ("clip:1,gaussian", "gaussian takes the noise multiplier"),
        ("clip:1,gaussian:-1", "must be 0 or more"),
        ("clip:1,gaussian:inf", "0 or more, and finite"),
        ("clip:1,gaussian:nan", "0 or more, and finite"),
        ("clip:inf,gaussian:1", "must be positive and finite"),
        ("clip:1,gaussian:1:1", "delta must be above 0 and below 1"),
        ("clip:1,gaussian:1:0.1:2", "gaussian takes the noise multiplier"),
        ("clip:1,mean,gaussian:1", "exactly one stage must be mean, median, trimmed, gaussian or secure"),
        ("gaussian:1,clip:1", "clip comes after the gaussian"),
    ],
)
def test_what_is_no_private_aggregate_is_named(text, message):
    with pytest.raises(ValueError, match=message) as error:
        aggregate.parse(text)
    assert "\n" not in str(error.value)


def test_what_no_noise_would_cover_is_refused():
    def refused(function, *given):
        with pytest.raises(UsageError) as error:
            function(*given)
        assert "\n" not in str(error.value)
        return str(error.value)

    phase = Phase(0, lambda *_: None, lambda plan: toy.ALGORITHM)
    kept_out, noised = Noise(1.0, None, stats=False), Noise(1.0, None, stats=True)
    assert "config.bn_eval is recalibrated" in refused(privacy.check_run, noised, [phase], "recalibrated")
    assert "config.bn_eval is running" in refused(privacy.check_run, kept_out, [phase], "running")
    careful = phase._replace(tolerance=0.01)
    assert "prune_tolerance" in refused(privacy.check_run, noised, [phase, careful], "batch")
    privacy.check_run(noised, [phase], "running")
    privacy.check_run(kept_out, [phase], "batch")
    aggregated = aggregate.parse("clip:1,gaussian:1")
    assert "report to the server one by one" in refused(aggregate.check, aggregated, toy.ALGORITHM, {"reward": ONES})
    aggregate.check(aggregated, toy.ALGORITHM, ())
    alphas = {"alpha": jnp.zeros((SIZE, 2))}
    assert "needs a norm for the architecture" in refused(private, "clip:1,gaussian:1", alphas)


@pytest.mark.parametrize("name", NAMES)
def test_methods_whose_clients_send_more_than_a_change_are_refused_and_no_other(name):
    algorithm, data = first_algorithm(name, real=False), federation()

    def ask(server, own):
        return engine.ask(algorithm, server, own, data, 3, jnp.int32(0), jnp.int32(1))

    reply = jax.eval_shape(ask, *jax.eval_shape(algorithm.init, KEY))
    draws = name in ("fedrlnas", "perfedrlnas", "metaperfedrlnas")
    for text in ("clip:1:1:1,gaussian:1", "median", "clip:1:1:1,secure"):
        given = aggregate.parse(text), algorithm, reply.report
        if draws:
            with pytest.raises(UsageError):
                aggregate.check(*given)
        else:
            aggregate.check(*given)


def test_a_run_that_cannot_be_private_is_refused_before_it_begins(tmp_path, capsys, monkeypatch):
    def answer(*arguments):
        small = ["--config.network=mobilenetv3_tiny", "--config.method=fedavg", f"--workdir={tmp_path / 'run'}"]
        assert main.main(["main.py", "--config=digits_dir01", *small, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert not (tmp_path / "run").exists()
        return error

    assert "trims nobody of 5 clients" in answer("--config.aggregate=trimmed:0.1")
    monkeypatch.setitem(sys.modules, "dp_accounting", None)  # as if it were not installed
    assert "pip install 'fedmetanas_jax[privacy]'" in answer("--config.aggregate=clip:1,gaussian:1")


# --- The account, which needs the library -------------------------------------------------------------------


@pytest.fixture
def library():
    return pytest.importorskip("dp_accounting", reason="the extra privacy is not installed")


def delta_of_gaussian(distance: float, epsilon: float) -> float:
    """Of two normal distributions of deviation 1 so far apart (Balle and Wang 2018, Theorem 5)."""
    far = epsilon / distance
    return norm.cdf(distance / 2 - far) - math.exp(epsilon) * norm.cdf(-distance / 2 - far)


def test_epsilon_without_sampling_is_the_exact_one(library):
    """Everybody every round. A client that is replaced moves each of p parts by 2 C, the noise is Z C, T times: normal
    distributions 2 sqrt(p T) / Z apart."""
    for multiplier, parts, rounds, delta in ((8.0, 1, 1, 1e-5), (20.0, 2, 30, 1e-3), (3.0, 3, 4, 0.1)):
        found = accountant.epsilon(multiplier, {parts: rounds}, 50, 50, delta)
        distance = 2 * math.sqrt(parts * rounds) / multiplier
        assert delta_of_gaussian(distance, found) == pytest.approx(delta, rel=1e-6)


def by_theorem(multiplier: float, rounds: int, q: float, delta: float) -> float:
    """Epsilon by Theorem 27 of Wang, Balle and Kasiviswanathan (arXiv 1808.00087) at whole orders, its alternating sums
    taken as they stand, in 200 digits. From RDP: Proposition 12 of Canonne, Kamath and Steinke (arXiv 2004.00010)."""
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps, orders = 200, range(2, 64)

    def moment(order):  # exp((order - 1) times the RDP of the Gaussian mechanism), one client moving the sum by 2 C
        return mpmath.exp(order * (order - 1) * (2 / mpmath.mpf(multiplier)) ** 2 / 2)

    def difference(j):
        return sum((-1) ** (j - i) * math.comb(j, i) * moment(i) for i in range(j + 1))

    differences = {j: difference(j) for j in range(2, orders.stop + 1, 2)}
    terms = {2: min(4 * (moment(2) - 1), 2 * moment(2))}
    for j in range(3, orders.stop):
        even = differences[2 * (j // 2)] * differences[2 * -(-j // 2)]
        terms[j] = min(4 * mpmath.sqrt(even), 2 * moment(j))
    found = []
    for order in orders:
        whole = 1 + sum(mpmath.mpf(q) ** j * math.comb(order, j) * terms[j] for j in range(2, order + 1))
        spent = rounds * mpmath.log(whole) / (order - 1)
        found.append(spent + mpmath.log1p(-1 / mpmath.mpf(order)) - mpmath.log(delta * order) / (order - 1))
    return float(min(found))


def test_epsilon_of_drawn_cohorts_is_that_of_the_theorem(library):
    """The library also has orders that are not whole, so it may be a little sharper."""
    for multiplier, rounds, clients, cohort in ((10.0, 200, 1000, 20), (4.0, 100, 1000, 10)):
        found = accountant.epsilon(multiplier, {1: rounds}, clients, cohort, 1e-5)
        expected = by_theorem(multiplier, rounds, cohort / clients, 1e-5)
        assert 0.98 * expected <= found <= expected * (1 + 1e-6)
        assert found < accountant.epsilon(multiplier, {1: rounds}, clients, clients, 1e-5)


def test_parts_and_rounds_compose(library):
    where = (100, 5, 1e-3)
    assert accountant.epsilon(4.0, {4: 20}, *where) == pytest.approx(accountant.epsilon(2.0, {1: 20}, *where))
    assert accountant.epsilon(4.0, {1: 10, 3: 5}, *where) < accountant.epsilon(4.0, {3: 15}, *where)
    assert accountant.epsilon(0.0, {1: 1}, *where) == math.inf
    assert accountant.epsilon(4.0, {}, *where) == 0
    # Where the bound for drawn cohorts is worse than none, none is taken.
    assert accountant.epsilon(1.0, {1: 10}, 10, 5, 0.1) == accountant.epsilon(1.0, {1: 10}, 10, 10, 0.1)


def test_an_account_that_lacks_rounds_says_nothing(library):
    account = accountant.Account(Noise(1.0, None, stats=True), 7, 5)
    account.add([2.0] * 3)
    assert account.spent(3)["delta"] == 1 / 7
    with pytest.raises(AssertionError, match="3 of 4 rounds"):
        account.spent(4)


def test_a_resumed_run_has_spent_what_an_unbroken_one_has(library, tmp_path):
    said: list = []
    how = {"aggregate": aggregate.parse("clip:1:1:1,gaussian:1")}
    given = one_phase(toy.ALGORITHM), toy.make_data(7), tmp_path / "run", said
    assert toy.run(*given, stop_after=3, **how) is None
    outcome = toy.run(*given, **how)
    lines = [line for line in said if isinstance(line, dict)]
    assert [line["noised_parts"] for line in lines] == [2] * 4
    spent = accountant.epsilon(1.0, {2: 4}, 7, 5, 1 / 7)
    assert [line["epsilon"] for line in lines if "epsilon" in line] == [spent]
    assert (outcome.summary["epsilon"], outcome.summary["delta"]) == (spent, 1 / 7)
