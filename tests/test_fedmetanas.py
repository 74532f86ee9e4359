"""FedMetaNAS: its schedules, what pruning may and may not change, and what it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_federation import CLIENTS, COHORT, SETTING, federation, first_algorithm, phases
from toy_model import merged

from fedmetanas_jax.core import Alpha
from fedmetanas_jax.engine.round import client_key, init_state, make_round, train_examples
from fedmetanas_jax.models.darts import darts_graph
from fedmetanas_jax.nas import mask as masks

SEED = 5
GRAPH = darts_graph(2)
FULL = masks.full_plan(GRAPH)
DATA = federation()


# The schedule as the paper reads most literally, thresholds alone at a temperature that falls nearly to the end, and
# DARTS's rate and decay of alpha: decided logits move by the decay alone.
PAPER = {
    "warmup": 0.05, "alpha_lr": 3e-4, "alpha_weight_decay": 1e-3, "anneal": "linear", "temperature_until": 0.8,
    "prune": "threshold", "prune_from": 0.3, "prune_until": 0.8, "prune_events": 6, "prune_tolerance": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def search():
    """The full program: (algorithm, compiled client update). The server is the message."""
    algorithm = first_algorithm("fedmetanas", **PAPER)
    return algorithm, jax.jit(algorithm.client_update)


def plan_and_server(phase, server):
    """What the engine has after the phase's event and its smaller program."""
    plan, server = phase.enter(server, FULL, jax.random.key(0))
    assert plan == FULL  # the event itself changes the mask alone
    after = phase.smaller(server)
    return after, phase.carry(server, plan, after)


def server_at(algorithm, round: int, alpha: Alpha | None = None):
    server = init_state(algorithm, SEED, CLIENTS).server
    return server._replace(round=jnp.int32(round), alpha=server.alpha if alpha is None else alpha)


def clear_alpha(server) -> Alpha:
    """Logits of which some weigh less than 1 % and one is far ahead, differently on every edge."""
    rng = np.random.default_rng(0)
    return Alpha(*(jnp.asarray(6 * rng.normal(size=x.shape), jnp.float32) for x in server.alpha))


def test_prune_events_of_the_paper_sized_run():
    start, *events = [phase.start for phase in phases("fedmetanas", SETTING._replace(rounds=1000))]
    assert (start, events[0], events[-1], len(events)) == (0, 150, 500, 18)
    assert {int(gap) for gap in np.diff(events)} == {20, 21}
    # Of any length a run has the same shape.
    short = [phase.start for phase in phases("fedmetanas", SETTING._replace(rounds=100))]
    np.testing.assert_allclose(short[1:], np.array(events) / 10, atol=0.5)


def test_a_run_too_short_to_prune_is_one_phase():
    """prune_until = 0.1 of three rounds is round 0."""
    listed = phases("fedmetanas", SETTING._replace(rounds=3), prune_from=0.05, prune_until=0.1)
    assert [phase.start for phase in listed] == [0]


def test_temperature_falls_linearly_and_stays(search):
    algorithm, _ = search
    at = [float(algorithm.report(server_at(algorithm, t))["temperature"]) for t in (0, 24, 48, 60)]
    np.testing.assert_allclose(at, [1.0, 0.55, 0.1, 0.1], rtol=1e-6)  # 60 rounds, down to 0.1 at round 48


def test_alphas_stand_still_in_warm_up_and_move_after_it(search):
    algorithm, client_update = search
    key = client_key(SEED, jnp.int32(0), jnp.int32(1))
    for round, moves in ((0, False), (2, False), (3, True)):  # 5 % of 60 rounds
        server = server_at(algorithm, round)
        change = client_update(server, (), train_examples(DATA, 1), key).change
        assert [bool(jnp.any(x)) for x in change["alpha"]] == [moves] * 2
        assert all(jnp.any(x) for x in jax.tree.leaves(change["params"]))


@pytest.mark.parametrize(("decay", "moves"), [({}, False), ({"alpha_weight_decay": 1e-3}, True)])
def test_logits_that_the_loss_does_not_ask_to_move_stand_still(decay, moves):
    """Weights that stand still and answer nothing: no gradient reaches a logit. Of a decay Adam makes whole steps."""
    still = SETTING._replace(lr=0.0, lr_end=0.0)
    algorithm = first_algorithm("fedmetanas", still, real=False, task_lr=0.0, travel=8.0, **decay)
    server = server_at(algorithm, 20)
    silent = server.params | {"head_kernel": jnp.zeros_like(server.params["head_kernel"])}
    server = server._replace(params=silent, alpha=jax.tree.map(jnp.ones_like, server.alpha))
    reply = jax.jit(algorithm.client_update)(server, (), train_examples(DATA, 1), client_key(SEED, 20, 1))
    for change in reply.change["alpha"]:
        assert bool(jnp.all(change < -0.1 if moves else change == 0))


def test_image_gradients_count_support_and_query(search):
    algorithm, client_update = search
    for client in range(3):
        own = train_examples(DATA, client)
        reply = client_update(server_at(algorithm, 4), (), own, client_key(SEED, jnp.int32(4), jnp.int32(client)))
        held = int(DATA.train_size[client])
        assert reply.weight == held
        # The remainder of an epoch that fills no pair of batches is dropped (D-37).
        assert reply.metrics["image_gradients"] == SETTING.epochs * (held // 8) * 8


def test_pruned_logits_do_not_move(search):
    """Neither by a client's steps, momentum and decay, nor by the server's mean."""
    algorithm, client_update = search
    server = server_at(algorithm, 30)
    alpha = clear_alpha(server)
    server = server._replace(alpha=alpha, mask=masks.prune(GRAPH, alpha, server.mask, 0.5, 0.01))
    replies = [
        client_update(server, (), train_examples(DATA, k), client_key(SEED, jnp.int32(30), jnp.int32(k)))
        for k in range(2)
    ]
    after = algorithm.server_update(server, merged(*replies))
    for alive, before, now in zip(server.mask, server.alpha, after.alpha, strict=True):
        assert not jnp.all(alive)
        np.testing.assert_array_equal(before[~alive], now[~alive])
        assert jnp.any(before[alive] != now[alive])


def test_a_prune_event_enters_a_smaller_program_of_the_same_function(search):
    """The full program with the new mask and the cut one answer alike, soft and discrete, and train alike."""
    algorithm, client_update = search
    listed = phases("fedmetanas", **PAPER)
    server = server_at(algorithm, listed[1].start)
    server = server._replace(alpha=clear_alpha(server))
    plan, cut = plan_and_server(listed[1], server)
    small = listed[1].make(plan)
    full = server._replace(mask=cut.mask)

    alive, pairs = (int(x) for x in masks.alive(GRAPH, cut.mask))
    assert alive < 80
    assert pairs < 8
    count = [sum(x.size for x in jax.tree.leaves(s.params)) for s in (full, cut)]
    assert count[1] < count[0]
    assert small.macs < algorithm.macs

    images = DATA.image[DATA.central]
    for model in ("global_model", "discrete_model"):
        logits = [
            jax.jit(a.forward, static_argnums=2)(getattr(a, model)(s), images, False)[0]
            for a, s in ((algorithm, full), (small, cut))
        ]
        np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)

    key = client_key(SEED, jnp.int32(18), jnp.int32(2))
    whole = client_update(full, (), train_examples(DATA, 2), key)
    part = jax.jit(small.client_update)(cut, (), train_examples(DATA, 2), key)
    np.testing.assert_allclose(whole.metrics["loss"], part.metrics["loss"], rtol=1e-4)
    for x, y in zip(whole.change["alpha"], part.change["alpha"], strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-4)


def test_what_is_pruned_is_skipped_where_clients_are_computed_one_after_another(search):
    """What is left learns and answers as if the rest were computed, and counts as the smaller program does, whatever
    the pruned operations' weights are."""
    algorithm, client_update = search
    listed = phases("fedmetanas", in_turn=True, **PAPER)
    skipping = listed[0].make(FULL)
    server = server_at(algorithm, listed[1].start)
    server = server._replace(alpha=clear_alpha(server))
    plan, cut = plan_and_server(listed[1], server)
    pruned = server._replace(mask=cut.mask)
    alive = masks.live(GRAPH, cut.mask).op
    here = skipping.space.spread(alive, FULL, server.params, True)
    assert skipping.held_alike
    jax.tree.map(np.testing.assert_array_equal, skipping.held(pruned)["params"], here)
    poisoned = pruned._replace(params=jax.tree.map(lambda x, m: jnp.where(m, x, jnp.nan), server.params, here))

    images, key = DATA.image[DATA.central], client_key(SEED, jnp.int32(18), jnp.int32(2))
    for model in ("global_model", "discrete_model"):
        logits = [
            jax.jit(a.forward, static_argnums=2)(getattr(a, model)(s), images, False)[0]
            for a, s in ((algorithm, pruned), (skipping, poisoned))
        ]
        np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)

    update, examples = jax.jit(skipping.client_update), train_examples(DATA, 2)
    whole, part = client_update(pruned, (), examples, key), update(poisoned, (), examples, key)
    np.testing.assert_allclose(whole.metrics["loss"], part.metrics["loss"], rtol=1e-4)
    for x, y in zip(whole.change["alpha"], part.change["alpha"], strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-4)
    for m, x, y in zip(*map(jax.tree.leaves, (here, whole.change["params"], part.change["params"])), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-4)
        for change in (x, y):  # weight decay would move them
            assert not np.asarray(change)[np.broadcast_to(~np.asarray(m), change.shape)].any()

    for sent, macs in ((poisoned, listed[1].make(plan).macs), (server, algorithm.macs)):
        metrics = update(sent, (), examples, key).metrics
        np.testing.assert_allclose(metrics["macs"], 3 * macs * metrics["image_gradients"], rtol=1e-6)


def test_after_the_last_event_soft_and_discrete_are_one_network(search):
    algorithm, _ = search
    last = phases("fedmetanas", **PAPER)[-1]
    server = server_at(algorithm, last.start)
    plan, cut = plan_and_server(last, server)
    assert [sum(map(len, kind)) for kind in plan] == [4, 4]  # two nodes, two edges each, one operation an edge
    small = last.make(plan)
    images = DATA.image[DATA.central]
    forward = jax.jit(small.forward, static_argnums=2)
    soft, discrete = (forward(model(cut), images, False)[0] for model in (small.global_model, small.discrete_model))
    np.testing.assert_array_equal(soft, discrete)


def test_without_terminal_only_the_threshold_prunes():
    last = phases("fedmetanas", **PAPER | {"terminal": False})[-1]
    algorithm = first_algorithm("fedmetanas", **PAPER)
    plan, _ = plan_and_server(last, server_at(algorithm, last.start))
    assert plan == FULL  # logits of 1e-3 leave no weight below 1 %


def test_along_the_line_a_search_ends_discrete_whatever_its_logits(search):
    """Alive is never more than on the line, never grows, and what an event clears weighs least of what may go."""
    algorithm, _ = search
    listed = phases("fedmetanas", cap=1.0, prune_tolerance=None)
    server = server_at(algorithm, 0)
    server = server._replace(alpha=Alpha(*(0.05 * x for x in clear_alpha(server))))  # far from any threshold
    seen = []
    for phase in listed[1:]:
        _, server = phase.enter(server._replace(round=jnp.int32(phase.start)), FULL, None)
        seen.append(tuple(int(x) for x in masks.alive(GRAPH, server.mask)))
        share = (phase.start / SETTING.rounds - 0.15) / 0.35
        assert seen[-1][0] <= max(80 - 72 * share, 8) + 1
        assert seen[-1][1] <= max(8 - 4 * share, 4) + 1
    assert seen[-1] == (8, 4)
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) > 12  # gradually


def test_the_rate_of_the_logits_follows_the_length_of_the_search():
    """A logit that always moves one way goes as far in 60 rounds as in 600."""
    from fedmetanas_jax.nas.schedule import travel_rate

    for rounds, steps in ((60, 6), (600, 6), (600, 45)):
        assert travel_rate(8.0, 0.54 * rounds, steps) * 0.54 * rounds * steps == pytest.approx(8.0)
    assert travel_rate(8.0, 540, 45) == pytest.approx(3e-4, rel=0.1)  # DARTS's, at the paper's size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"M": -1}, "M is -1"),
        ({"prune_from": 0.9}, "prune_from is 0.9"),
        ({"prune_events": 0}, "prune_events is 0"),
        ({"cap": 0.0}, "cap is 0.0"),
        ({"prune_tolerance": -0.1}, "prune_tolerance is -0.1"),
        ({"alpha_lr": -1.0}, "alpha_lr is -1.0"),
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"temperature_end": 0.0}, "temperature_end is 0.0"),
        ({"temperature_until": 0.0}, "temperature_until is 0.0"),
        ({"order": 3}, "order is 3"),
    ],
)
def test_options_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        phases("fedmetanas", **options)


def test_second_order_and_more_inner_steps_run_and_differ():
    """On a small dense space: through a DARTS cell the gradient of a gradient is tested in test_darts.py."""
    setting = SETTING._replace(epochs=1)
    losses = []
    for options in ({"M": 2, "task_lr": 0.5}, {"M": 2, "task_lr": 0.5, "order": 2}):
        algorithm = first_algorithm("fedmetanas", setting, real=False, **options)
        step = make_round(algorithm, cohort_size=COHORT, at_once=1)
        state, metrics = step(init_state(algorithm, SEED, CLIENTS), DATA, jnp.int32(1))
        assert metrics["finite"].all()
        losses.append(float(jnp.sum(jnp.abs(state.server.params["head_kernel"]))))
        held = np.asarray(DATA.train_size)[np.asarray(metrics["client"][0])]
        np.testing.assert_array_equal(metrics["image_gradients"][0], (held // 8) * 4 * 3)
    assert losses[0] != losses[1]


def test_second_order_asks_nothing_that_skips_for_a_second_derivative():
    """Clients one after another; what skips would fail where it is traced."""
    algorithm = first_algorithm("fedmetanas", nodes=1, in_turn=True, order=2, **PAPER)
    given = server_at(algorithm, 0), (), train_examples(DATA, 2), jax.random.key(0)
    reply = jax.eval_shape(algorithm.client_update, *given)
    assert jax.tree.structure(reply.change["params"]) == jax.tree.structure(given[0].params)
