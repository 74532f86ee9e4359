"""What a phase may be: fresh weights from a key, clients that start anew, a method without a global network."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from fedmetanas_jax.build import one_phase
from fedmetanas_jax.core import Array, Phase, Tree
from fedmetanas_jax.engine import worth
from fedmetanas_jax.engine.course import Course
from fedmetanas_jax.engine.kept import Kept
from fedmetanas_jax.engine.mesh import clients_mesh
from fedmetanas_jax.engine.programs import Programs
from fedmetanas_jax.engine.round import cohort, stream_key

DATA = toy.make_data()


def records(said: list) -> list[dict]:
    return [x for x in said if isinstance(x, dict)]


def without_the_clock(said: list) -> list[dict]:
    clock = ("seconds", "compile_seconds", "compile_seconds_ahead", "event_stall_seconds")
    return [{name: x for name, x in line.items() if name not in clock} for line in records(said)]


def retraining() -> list[Phase]:
    """Two rounds of the toy, then the same from fresh weights by clients that keep their last two numbers, not one."""

    def keeps_more(plan):
        def client_update(sent, own, data, key):
            reply = toy.client_update(sent, {"turns": own["turns"], "noise": own["noise"][0]}, data, key)
            return reply._replace(own=own | reply.own | {"noise": jnp.stack([reply.own["noise"], own["noise"][0]])})

        def init(key):
            server, own = toy.init(key)
            return server, own | {"noise": jnp.full(2, 0.5)}

        return toy.ALGORITHM._replace(init=init, client_update=client_update)

    def fresh(server, plan, key):
        return "second", toy.init(key)[0]._replace(round=server.round)

    first = Phase(0, lambda server, plan, key: ("first", server), lambda plan: toy.ALGORITHM)
    return [first, Phase(2, fresh, keeps_more, "retrain")]


def test_a_phase_may_start_from_fresh_weights_and_clients_anew(tmp_path):
    said: list = []
    outcome = toy.run(retraining(), DATA, tmp_path / "run", said, rounds=2, stop_after=2)
    outcome = toy.run(retraining(), DATA, tmp_path / "unbroken", said := [])
    assert "what clients keep has another form from round 3 on: all start anew" in said
    assert [line.get("event") for line in records(said)] == [None, "retrain", None, None]
    turns = np.bincount(np.concatenate([cohort(3, r, 7, 5) for r in (2, 3)]), minlength=7)
    np.testing.assert_array_equal(outcome.state.owns["turns"], turns)  # of the second phase alone
    assert outcome.state.owns["noise"].shape == (7, 2)
    assert outcome.plan == "second"
    # The fresh weights are those of the phase's own key.
    expected = toy.init(stream_key(3, "phase", 1))[0]
    halfway: list = []
    toy.run(retraining(), DATA, tmp_path / "half", halfway, stop_after=2)
    from fedmetanas_jax.engine.checkpoint import Checkpoints

    checkpoints = Checkpoints(tmp_path / "half" / "checkpoints")
    like = jax.eval_shape(lambda: jax.tree.map(lambda x: x, outcome.state))
    _, meta, state = checkpoints.restore_newest(lambda meta: like, print)
    checkpoints.close()
    assert (meta["phase"], meta["plan"]) == (1, "second")
    jax.tree.map(np.testing.assert_array_equal, state.server.params, expected.params)
    # And a run that was broken off there goes on as the unbroken one.
    toy.run(retraining(), DATA, tmp_path / "half", halfway)
    assert without_the_clock(halfway) == without_the_clock(said)


@pytest.mark.parametrize("places", [(None, 4), (4, None), (2, 4)])
def test_a_run_goes_on_on_another_number_of_devices(tmp_path, places):
    """What clients keep is saved once a client, so it is divided anew among the devices there are."""
    whole = toy.run(one_phase(toy.ALGORITHM), DATA, tmp_path / "whole", [])
    for devices, stop_after in zip(places, (2, None), strict=True):
        mesh = None if devices is None else clients_mesh(devices)
        outcome = toy.run(one_phase(toy.ALGORITHM), DATA, tmp_path / "run", [], mesh=mesh, stop_after=stop_after)
    state = outcome.state._replace(owns=jax.tree.map(lambda x: x[:7], outcome.state.owns))
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def events(costs: list[str], tolerance: float = 0.05) -> list[Phase]:
    """The toy, and events before rounds 2, 3, ... of which those called "harmful" would make it answer at random."""

    def phase(start: int, kind: str) -> Phase:
        def enter(server, plan, key):
            broken = jax.tree.map(lambda x: -x, server.params)
            return plan, server._replace(params=broken if kind == "harmful" else server.params)

        return Phase(start, enter, lambda plan: toy.ALGORITHM, kind, tolerance)

    first = Phase(0, lambda server, plan, key: (None, server), lambda plan: toy.ALGORITHM)
    return [first, *(phase(2 + n, kind) for n, kind in enumerate(costs))]


def keep(server, plan, smaller):
    return server


# What differs between a test's runs is no matter of their programs, which are compiled once.
PUT_OFF, SHRINKS = (partial(Course, kept=Kept()) for _ in range(2))


@pytest.mark.parametrize("ahead", [0, 1])
def test_an_event_that_was_put_off_ends_in_its_smaller_program(tmp_path, ahead):
    """Before round 4 the event would break the network; then it does not."""

    def enter(server, plan, key):
        broken = jax.tree.map(lambda x: -x, server.params)
        return plan, server._replace(params=broken if server.round < 4 else server.params)

    def make(plan):
        return toy.ALGORITHM._replace(macs=1 if plan == "small" else 2)

    first = Phase(0, lambda server, plan, key: ("full", server), make)
    phases = [first, Phase(2, enter, make, "prune", 0.05, lambda server: "small", keep)]
    for name, stops in (("whole", (None,)), ("broken off", (3, 1, None))):
        said: list = []
        for stop_after in stops:
            how = {"rounds": 7, "compile_ahead": ahead, "stop_after": stop_after, "make_course": PUT_OFF}
            outcome = toy.run(phases, DATA, tmp_path / name, said, **how)
        lines = records(said)
        assert [line["round"] for line in lines if "event_put_off" in line] == [2, 3]
        assert [line["round"] for line in lines if "event" in line] == [4]
        assert outcome.plan == "small"
        small = [line["macs"] == 3 * line["image_gradients"] for line in lines]
        assert small == [False] * (4 + ahead) + [True] * (3 - ahead)


def test_what_an_event_costs_is_measured_on_no_image_twice(monkeypatch, tmp_path):
    seen, judges = [], Programs.judges
    monkeypatch.setattr(Programs, "judges", lambda *given: seen.append(judges(*given)) or seen[-1])
    said: list = []
    toy.run(events(["harmless"]), DATA, tmp_path / "run", said)
    assert [line.get("event_cost_on_training_images") for line in records(said)] == [None, 0.0, None, None]
    held = np.concatenate([row[:n] for row, n in zip(DATA.train, DATA.train_size, strict=True)])
    assert len(seen) == 2  # before and after
    for rows in seen:
        np.testing.assert_array_equal(np.sort(rows), np.sort(held))  # as often as clients hold them


SHRINKING = {2: 9, 4: 8, 6: 5, 8: 4, 10: 1}  # multiply-adds of an image from an event on, of 10


@pytest.mark.parametrize(
    ("price", "by_round"),
    [
        (200, [10] * 4 + [8] * 4 + [4] * 2 + [1] * 2),
        (360, [10] * 6 + [5] * 4 + [1] * 2),
        (1000, [10] * 8 + [4] * 2 + [1] * 2),
        (1500, [10] * 10 + [1] * 2),
    ],
)
def test_a_smaller_program_is_entered_once_as_much_was_done_in_vain_as_it_costs(monkeypatch, tmp_path, price, by_round):
    """A round takes 120 times the multiply-adds of an image. In vain are 0, 240, 720 and 1920 of them at the events
    before rounds 3, 5, 7 and 9 as long as the first program runs; the program of 8, entered at 240, has done 720 in
    vain before round 9. At 1920 the two rounds before the last event would spare 1440, too little for 1500. The last
    event's program serves for the rest of the run, whatever it costs."""
    monkeypatch.setattr(worth, "COMPILING", {"cpu": price})

    def make(plan):
        return toy.ALGORITHM._replace(macs=plan)

    def event(start: int, macs: int) -> Phase:
        return Phase(start, lambda server, plan, key: (plan, server), make, "prune", None, lambda server: macs, keep)

    phases = [Phase(0, lambda server, plan, key: (10, server), make), *(event(*x) for x in SHRINKING.items())]
    for name, stops in (("whole", (None,)), ("broken off", (5, 2, 1, None))):
        said: list = []
        for stop_after in stops:
            how = {"rounds": 12, "stop_after": stop_after, "make_course": SHRINKS}
            toy.run(phases, DATA, tmp_path / name, said, **how)
        assert [line["macs"] / (3 * line["image_gradients"]) for line in records(said)] == by_round


def test_a_program_that_skips_what_is_pruned_stays_until_the_last_event(monkeypatch, tmp_path):
    """Nothing is done in vain then: clients say what they computed, which is what the smaller program would."""
    monkeypatch.setattr(worth, "COMPILING", {"cpu": 1})

    def make(plan):
        def client_update(message, own, data, key):
            reply = toy.ALGORITHM.client_update(message, own, data, key)
            alive = 10 - sum((message.round >= t) * fewer for t, fewer in zip(SHRINKING, (1, 1, 3, 1, 3), strict=True))
            return reply._replace(metrics=reply.metrics | {"macs": 3.0 * alive * reply.metrics["image_gradients"]})

        return toy.ALGORITHM._replace(macs=plan, client_update=client_update)

    def event(start: int, macs: int) -> Phase:
        return Phase(start, lambda server, plan, key: (plan, server), make, "prune", None, lambda server: macs, keep)

    phases = [Phase(0, lambda server, plan, key: (10, server), make), *(event(*x) for x in SHRINKING.items())]
    said: list = []
    toy.run(phases, DATA, tmp_path / "run", said, rounds=12)
    lines = records(said)
    assert [line["macs"] / (3 * line["image_gradients"]) for line in lines] == [10, 10, 9, 9, 8, 8, 5, 5, 4, 4, 1, 1]
    assert [line["round"] for line in lines if "compile_seconds_ahead" in line] == [10]


def test_an_event_that_would_cost_too_much_is_put_off_and_the_next_comes_in_its_place(tmp_path):
    said: list = []
    whole = toy.run(events(["harmful", "harmless"]), DATA, tmp_path / "run", said, rounds=6)
    lines = records(said)
    assert [line.get("event_put_off") for line in lines] == [None, "harmful", None, None, None, None]
    assert [line.get("event") for line in lines] == [None, None, "harmless", None, None, None]
    assert lines[1]["event_cost_on_training_images"] > 0.05 >= lines[2]["event_cost_on_training_images"]
    assert any(isinstance(x, str) and x.startswith("harmful after round 2 is put off until round 3") for x in said)
    plain = toy.run(events([]), DATA, tmp_path / "plain", [], rounds=6)
    jax.tree.map(np.testing.assert_array_equal, whole.state, plain.state)


def test_a_last_event_is_tried_again_also_by_a_resumed_run(tmp_path):
    said: list = []
    how = {"rounds": 5, "make_course": partial(Course, kept=Kept())}
    toy.run(events(["harmful"]), DATA, tmp_path / "whole", said, **how)
    assert [line.get("event_put_off") for line in records(said)] == [None, *["harmful"] * 4]
    again: list = []
    for stop_after in (3, None):
        toy.run(events(["harmful"]), DATA, tmp_path / "run", again, stop_after=stop_after, **how)
    assert without_the_clock(again) == without_the_clock(said)
    # Where an event may cost what it will, it is entered.
    free: list = []
    toy.run(events(["harmful"], tolerance=None), DATA, tmp_path / "free", free, **how)
    assert records(free)[1]["event_accuracy_after"] < records(free)[1]["event_accuracy_before"]


class Policies(NamedTuple):
    """A server that keeps something of every client's."""

    round: Array
    params: Tree
    stats: Tree
    policy: Array  # [clients, 2] logits of two rates


def personal_policies():
    """The toy with a learning rate drawn for every client from a policy of its own, which the server keeps and
    moves by the reward that the client reports (REINFORCE): nothing of it is anybody else's."""

    def init(key):
        server, own = toy.init(key)
        return Policies(*server, jnp.zeros((7, 2))), own

    def send(server, client, key):
        policy = server.policy[client]
        return toy.Server(*server[:3]), jnp.argmax(policy) if key is None else jax.random.categorical(key, policy)

    def client_update(sent, own, data, key):
        reply = toy.client_update(sent[0], own, data, key)
        scale = jnp.where(sent[1] == 0, 1.0, 0.1)
        change = jax.tree.map(lambda x: scale * x, reply.change)
        return reply._replace(change=change, report={"drawn": sent[1], "reward": -reply.metrics["loss"]})

    def server_update(server, merged):
        drawn, reward = merged.report["drawn"], jnp.where(merged.weight > 0, merged.report["reward"], 0)
        slope = reward[:, None] * (jax.nn.one_hot(drawn, 2) - jax.nn.softmax(server.policy[merged.client]))
        after = toy.server_update(toy.Server(*server[:3]), merged)
        return Policies(*after, server.policy.at[merged.client].add(slope))

    return toy.ALGORITHM._replace(
        init=init,
        send=send,
        client_update=client_update,
        server_update=server_update,
        personalize=lambda sent, *rest: toy.personalize(sent[0], *rest),
        global_model=None,
        report=lambda server: {"policy": jnp.mean(jnp.abs(server.policy))},
    )


def test_a_method_without_a_global_network_runs_to_its_end(tmp_path):
    said: list = []
    how = {"rounds": 2, "eval_every": 1, "final_adapt": True}
    outcome = toy.run(one_phase(personal_policies()), DATA, tmp_path / "run", said, **how)
    assert not any("server_accuracy" in name for name in outcome.summary)
    assert outcome.summary["local_accuracy_adapted"]["mean"] > 0
    asked = np.unique(np.concatenate([cohort(3, r, 7, 5) for r in (0, 1)]))
    moved = np.flatnonzero(np.any(np.asarray(outcome.state.server.policy) != 0, axis=1))
    np.testing.assert_array_equal(moved, asked)
    # A number and a choice of each client's travel as well, and are counted.
    assert records(said)[0]["bytes_up"] == 5 * (4 * (64 * 4 + 4 + 64) + 8)
    assert records(said)[0]["bytes_down"] == 5 * (4 * (64 * 4 + 4 + 64) + 4 + 4)


def test_an_event_without_a_global_network_has_no_accuracy(tmp_path):
    method = personal_policies()
    phases = [
        *one_phase(method),
        Phase(2, lambda server, plan, key: (None, server), lambda plan: method._replace(macs=1), "change"),
    ]
    said: list = []
    toy.run(phases, DATA, tmp_path / "run", said, rounds=3, stop_after=2)
    assert "change after round 2" in said
    assert records(said)[1]["event_accuracy_before"] is None
