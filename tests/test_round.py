"""Laws of one round and of several in one dispatch, on the toy method."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from fedmetanas_jax import tree
from fedmetanas_jax.core import Merged
from fedmetanas_jax.engine import client_states
from fedmetanas_jax.engine import round as engine
from fedmetanas_jax.engine.mesh import OWN, clients_mesh, padded, put_data, put_state

CLIENTS, COHORT, SEED = 7, 5, 3


@pytest.fixture(scope="module")
def data():
    return toy.make_data(CLIENTS)


compiled = cache(engine.make_round)
first_state = cache(engine.init_state)


def start(seed=SEED):
    return jax.tree.map(jnp.copy, first_state(toy.ALGORITHM, seed, CLIENTS))


def run(data, rounds=2, algorithm=toy.ALGORITHM, seed=SEED, at_once=1, cohort_size=COHORT, make=compiled):
    step = make(algorithm, cohort_size=cohort_size, at_once=at_once)
    state, rows = start(seed), []
    for r in range(rounds):
        state, metrics = step(state, data, jnp.int32(r + 1))
        rows.append(metrics)
    return state, jax.tree.map(lambda *x: np.concatenate(x), *rows)


@pytest.fixture(scope="module")
def two_rounds(data):
    return run(data)


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert x.tobytes() == y.tobytes()


def close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def test_cohort_is_a_function_of_seed_and_round():
    draw = jax.jit(lambda r: engine.cohort(SEED, r, CLIENTS, COHORT))
    rounds = np.stack([draw(jnp.int32(r)) for r in range(60)])
    assert rounds.dtype == np.int32
    assert all(len(set(row)) == COHORT for row in rounds)
    assert set(rounds.ravel()) == set(range(CLIENTS))
    np.testing.assert_array_equal(rounds[9], engine.cohort(SEED, 9, CLIENTS, COHORT))
    assert any(rounds[0] != rounds[1])
    assert any(rounds[0] != engine.cohort(SEED + 1, 0, CLIENTS, COHORT))
    assert sorted(engine.cohort(SEED, 0, CLIENTS, CLIENTS)) == list(range(CLIENTS))


def test_cohort_is_uniform():
    draws = jax.vmap(lambda r: engine.cohort(0, r, 10, 3))(jnp.arange(2000))
    turns = np.bincount(np.asarray(draws).ravel(), minlength=10)
    assert np.all(np.abs(turns - 600) < 5 * np.sqrt(2000 * 0.3 * 0.7))  # five standard deviations


def test_keys_of_streams_rounds_and_clients_differ():
    keys = [engine.client_key(0, r, k) for r in range(3) for k in range(3)]
    keys += [engine.stream_key(0, s, 1, 2) for s in engine.STREAMS if s != "train"]
    keys.append(engine.client_key(1, 0, 0))
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == len(keys)


def test_state_at_the_start_is_one_client_state_for_all():
    state = start()
    assert state.round == 0
    assert jax.tree.map(jnp.shape, state.owns) == {"turns": (CLIENTS,), "noise": (CLIENTS,)}
    stateless = toy.ALGORITHM._replace(init=lambda key: (toy.init(key)[0], ()))
    assert engine.init_state(stateless, 0, CLIENTS).owns == ()


def test_round_is_the_weighted_mean_of_its_clients_by_hand(data):
    state, metrics = run(data, rounds=1)
    before = start()
    chosen = metrics["client"][0]
    changes, losses = [], []
    client_update = jax.jit(toy.client_update)
    for k in chosen:
        out = client_update(
            before.server,  # which is the toy's message
            tree.take(before.owns, k),
            engine.train_examples(data, k),
            engine.client_key(SEED, 0, k),
        )
        changes.append(out.change)
        losses.append(out.metrics["loss"])
    share = data.train_size[chosen] / sum(data.train_size[chosen])
    mean = jax.tree.map(lambda *x: sum(s * y for s, y in zip(share, x, strict=True)), *changes)
    merged = Merged(mean, chosen, data.train_size[chosen].astype(jnp.float32), ())
    close(state.server, toy.server_update(before.server, merged))
    close(metrics["loss"][0], np.stack(losses))
    assert metrics["bias"][0] == pytest.approx(float(jnp.sum(jnp.abs(state.server.params["b"]))))
    assert metrics["server_round"] == [1]
    assert metrics["finite"].all()


def test_examples_weigh_what_the_client_holds_and_no_padding(data):
    for k in range(CLIENTS):
        own = engine.train_examples(data, jnp.int32(k))
        size = int(data.train_size[k])
        np.testing.assert_array_equal(own.weight, [1] * size + [0] * (data.train.shape[1] - size))
        np.testing.assert_array_equal(own.image, np.asarray(data.image)[np.asarray(data.train[k])])
        np.testing.assert_array_equal(own.label, np.asarray(data.label)[np.asarray(data.train[k])])


def test_schedules_get_the_servers_round_and_the_engine_its_own(data):
    state = start()._replace(round=jnp.int32(40))
    step = compiled(toy.ALGORITHM, cohort_size=COHORT, at_once=1)
    state, metrics = step(state, data, jnp.int32(41))
    assert (state.round, state.server.round) == (41, 1)
    np.testing.assert_array_equal(metrics["client"][0], engine.cohort(SEED, 40, CLIENTS, COHORT))


@pytest.mark.parametrize("at_once", [0, 2, 9])
def test_all_at_once_is_one_by_one(data, two_rounds, at_once):
    state, metrics = run(data, at_once=at_once)
    close((state, metrics), two_rounds)


def test_same_seed_same_bits(data, two_rounds):
    same_bits(run(data, make=engine.make_round), two_rounds)
    assert np.any(run(data, seed=SEED + 1)[1]["loss"] != two_rounds[1]["loss"])
    # The seed is a value: runs of other seeds share the program.
    assert compiled(toy.ALGORITHM, cohort_size=COHORT, at_once=1)._cache_size() == 1


def test_order_of_the_cohort_is_irrelevant(data, two_rounds, monkeypatch):
    plain = engine.cohort
    monkeypatch.setattr(engine, "cohort", lambda *args: plain(*args)[::-1])
    state, metrics = run(data, make=engine.make_round)
    close(state, two_rounds[0])
    np.testing.assert_array_equal(metrics["client"], two_rounds[1]["client"][:, ::-1])
    close(metrics["loss"], two_rounds[1]["loss"][:, ::-1])


def test_clients_not_chosen_keep_their_state_bit_for_bit(data):
    step = engine.make_round(toy.ALGORITHM, cohort_size=2, at_once=1)
    odd = jnp.arange(CLIENTS, dtype=jnp.float32) / 3
    state = start()
    state = state._replace(owns=state.owns | {"noise": odd})
    before = jax.tree.map(np.array, state.owns)
    state, metrics = step(state, data, jnp.int32(1))
    rest = np.setdiff1d(np.arange(CLIENTS), metrics["client"])
    same_bits(tree.take(state.owns, rest), tree.take(before, rest))
    turns = np.zeros(CLIENTS, int)
    turns[metrics["client"][0]] = 1
    np.testing.assert_array_equal(state.owns["turns"], turns)


def test_states_on_the_host_are_handed_to_the_round_and_taken_back(data, two_rounds):
    step = engine.make_round(toy.ALGORITHM, cohort_size=COHORT, at_once=1, hosted=True)
    state = engine.init_state(toy.ALGORITHM, SEED, CLIENTS, hosted=True)
    everyone = state.owns
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(everyone))
    for r in range(2):
        chosen = np.asarray(engine.cohort(SEED, r, CLIENTS, COHORT))
        given = state._replace(owns=jax.tree.map(jnp.asarray, tree.take(everyone, chosen)))
        state, metrics = step(given, data, jnp.int32(r + 1))
        client_states.put_on_host(everyone, chosen, state.owns)
        np.testing.assert_array_equal(metrics["client"][0], chosen)
    same_bits(state._replace(owns=everyone), two_rounds[0])


def test_where_states_are_kept_is_said(monkeypatch):
    assert client_states.place("auto", 2 * 10**9, 1) == (False, "clients' states take 2 GB, kept on the device")
    assert client_states.place("host", 10**6, 1) == (True, "clients' states take 0.001 GB, kept on the host")

    class Device:
        def memory_stats(self):
            return {"bytes_limit": 10 * 10**9, "bytes_in_use": 2 * 10**9}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert not client_states.place("auto", 3 * 10**9, 1)[0]
    hosted, why = client_states.place("auto", 4 * 10**9, 1)
    assert hosted
    assert why == "clients' states take 4 GB, too much beside the 8 GB free on a device: kept on the host"
    assert not client_states.place("auto", 4 * 10**9, 2)[0]  # half of it on each of two
    hosted, why = client_states.place("device", 4 * 10**9, 1)
    assert not hosted
    assert "client_states=host" in why


def test_turns_add_up_over_rounds(two_rounds):
    state, metrics = two_rounds
    counted = np.bincount(metrics["client"].ravel(), minlength=CLIENTS)
    np.testing.assert_array_equal(state.owns["turns"], counted)


def test_a_block_of_rounds_is_its_rounds_one_by_one(data):
    single, rows = run(data, rounds=6)
    step = engine.make_round(toy.ALGORITHM, cohort_size=COHORT, at_once=1, block=4)
    state, first = step(start(), data, jnp.int32(100))
    assert state.round == 4
    same_bits(jax.tree.map(np.asarray, first), jax.tree.map(lambda x: x[:4], rows))
    state, second = step(state, data, jnp.int32(6))
    same_bits(state, single)
    same_bits(jax.tree.map(lambda x: np.asarray(x[:2]), second), jax.tree.map(lambda x: x[4:], rows))
    assert all(not np.any(x[2:]) for x in second.values())
    assert step._cache_size() == 1


@pytest.mark.parametrize("block", [1, 3])
def test_a_round_moves_nothing_between_host_and_device_and_compiles_once(data, block):
    step = engine.make_round(toy.ALGORITHM, cohort_size=COHORT, at_once=1, block=block)
    state, stops = start(), [jnp.int32(block), jnp.int32(2 * block)]
    for stop in stops:
        donated = state
        with jax.transfer_guard("disallow"):
            state, _ = step(state, data, stop)
        assert all(x.is_deleted() for x in jax.tree.leaves(donated))
    assert step._cache_size() == 1


def test_a_block_traces_the_client_once(data):
    chex.clear_trace_counter()
    client_update = chex.assert_max_traces(toy.client_update, n=1)
    step = engine.make_round(toy.ALGORITHM._replace(client_update=client_update), cohort_size=2, at_once=1, block=3)
    step.lower(start(), data, jnp.int32(3))
    with pytest.raises(AssertionError, match="traced"):  # the counter counts
        step.lower(start(), jax.tree.map(lambda x: x[:-1] if x.ndim == 4 else x, data), jnp.int32(3))


def test_a_method_that_changes_its_form_is_told_at_the_door(data):
    def weak(server, merged):
        return toy.server_update(server, merged)._replace(round=server.round + 1.0)

    def forgets(sent, own, rows, key):
        return toy.client_update(sent, own, rows, key)._replace(own=())

    wrong = {"changed the server": {"server_update": weak}, "changed own": {"client_update": forgets}}
    for message, changed in wrong.items():
        with pytest.raises(AssertionError, match=message):
            run(data, algorithm=toy.ALGORITHM._replace(**changed))


def test_a_client_that_is_not_finite_is_named(data):
    broken = int(engine.cohort(SEED, 1, CLIENTS, COHORT)[2])
    mean = jnp.mean(data.image[data.train[broken]])

    def client_update(sent, own, rows, key):
        reply = toy.client_update(sent, own, rows, key)
        bad = (sent.round == 1) & (jnp.mean(rows.image) == mean)
        bias = reply.change["params"]["b"].at[1].add(jnp.where(bad, jnp.nan, 0))
        return reply._replace(change=reply.change | {"params": reply.change["params"] | {"b": bias}})

    _, metrics = run(data, algorithm=toy.ALGORITHM._replace(client_update=client_update))
    assert metrics["finite"][0].all()
    np.testing.assert_array_equal(metrics["finite"][1], metrics["client"][1] != broken)


def test_bytes_by_hand(two_rounds):
    floats = toy.PIXELS * toy.CLASSES + toy.CLASSES + toy.PIXELS
    _, metrics = two_rounds
    assert np.all(metrics["bytes_up"] == 4 * floats)
    assert np.all(metrics["bytes_down"] == 4 * (floats + 1))  # and the round


def test_wrong_requests_are_refused_in_words(data):
    with pytest.raises(ValueError, match="cohort of 8: allowed are 1 to the 7 clients"):
        run(data, cohort_size=8)
    with pytest.raises(ValueError, match="cohort of 0"):
        run(data, cohort_size=0)
    with pytest.raises(ValueError, match="at_once=-1"):
        run(data, at_once=-1)
    with pytest.raises(ValueError, match="block=0"):
        engine.make_round(toy.ALGORITHM, cohort_size=1, at_once=1, block=0)
    with pytest.raises(ValueError, match="a name twice"):
        run(data, algorithm=toy.ALGORITHM._replace(report=lambda server: {"loss": server.round}))
    there = len(jax.devices())
    with pytest.raises(ValueError, match=f"JAX sees {there} "):
        clients_mesh(there + 1)
    with pytest.raises(ValueError, match="devices=-2"):
        clients_mesh(-2)


def test_one_device_is_no_mesh(data, monkeypatch):
    assert clients_mesh(1) is None
    same_bits(put_data(data, None), data)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="gpu")] * 4)
    assert clients_mesh(-1) is None  # only a CPU is cut in two


def on_several_devices():
    """Run in a process of its own: four and eight virtual devices against one, bit for bit."""
    from fedmetanas_jax.engine.evaluate import make_personal

    assert clients_mesh(0).size == len(jax.devices()) == 8
    assert clients_mesh(-1).size == 2  # of a CPU
    data = toy.make_data(CLIENTS)
    cases = [(5, 1, 1, 4), (4, 1, 2, 4), (5, 1, 1, 8)]  # cohort, at_once, block, devices
    for size, at_once, block, devices in cases:
        got, mesh = [], clients_mesh(devices)
        for where in (None, mesh):
            step = engine.make_round(toy.ALGORITHM, cohort_size=size, at_once=at_once, mesh=where, block=block)
            state = engine.init_state(toy.ALGORITHM, SEED, CLIENTS, where)
            # A negative zero must come through the mesh as one.
            noise = jnp.full_like(state.owns["noise"], -0.0)
            state = put_state(state._replace(owns=state.owns | {"noise": noise}), where)
            rows, local, stop = [], put_data(data, where), put_data(jnp.int32(100), where)
            for _ in range(2):
                with jax.transfer_guard("disallow"):
                    state, metrics = step(state, local, stop)
                rows.append(jax.tree.map(np.asarray, metrics))
            assert step._cache_size() == 1, (size, at_once, block, step._cache_size())
            if where is not None:
                shard = state.owns["turns"].addressable_shards[0].data
                assert shard.shape == (8 // devices,), shard.shape  # 7 clients, filled up to 8
            host = jax.tree.map(np.asarray, state)
            host = host._replace(owns=jax.tree.map(lambda x: x[:CLIENTS], host.owns))
            got.append((host, rows))
        same_bits(*got)
        print("same bits", size, at_once, block, devices)
    found = []
    for where in (None, mesh):
        personal = make_personal(toy.ALGORITHM, at_once=1, mesh=where)
        state = engine.init_state(toy.ALGORITHM, SEED, CLIENTS, where)
        ids = put_data(jnp.arange(padded(CLIENTS, where), dtype=jnp.int32) % CLIENTS, where, OWN)
        given = put_data((data, jnp.int32(1), jnp.int32(0)), where)
        found.append(jax.tree.map(lambda x: np.asarray(x)[:CLIENTS], personal(state, ids, *given)))
    same_bits(*found)


def test_a_mesh_of_four_or_eight_devices_is_one_device_bit_for_bit():
    here = Path(__file__).parent
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    code = "import test_round; test_round.on_several_devices()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("same bits") == 3
