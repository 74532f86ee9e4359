"""FedDSNAS: what a step moves, a decided search is FedAvg, the border to the network found."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from toy_federation import SETTING, federation
from toy_model import ask, examples, jit, unchanged
from toy_space import everything, flat, toy_space

from fedmetanas_jax import tree
from fedmetanas_jax.algorithms.fedavg import fedavg
from fedmetanas_jax.algorithms.feddsnas import feddsnas
from fedmetanas_jax.nas import mask as masks

ONE_STEP = SETTING._replace(epochs=1, batch=9, augment=unchanged, momentum=0.9, weight_decay=0.1)
SPACE = toy_space(classes=3, every_edge=True)
DATA = examples(9, 9)


@cache
def client(**options):
    algorithm = feddsnas(toy_space(classes=3), ONE_STEP, **options)[0].make(everything(SPACE))
    return algorithm, jit(lambda *x: ask(algorithm, *x))


def start(lead: float = 0.0):
    """A server whose likeliest operation is `dense` on every edge, by so much."""
    server, own = client()[0].init(jax.random.key(1))
    op = server.alpha.op.at[..., 2].add(lead)
    return server._replace(alpha=server.alpha._replace(op=op)), own


def test_a_step_leaves_what_was_not_drawn_as_it_was_to_the_bit():
    server, own = start()
    untouched = 0
    for k in range(5):
        reply = client()[1](server, own, DATA, jax.random.key(k))
        for cell in ("cell_0", "cell_1"):
            rows = np.asarray(reply.change["params"][cell]["dense"]["kernel"])
            moments = np.asarray(reply.change["stats"][cell]["dense"]["norm"]["mean"])
            moved = rows.any((1, 2))
            np.testing.assert_array_equal(moved, moments.any(1))  # decay 0.1 would have moved the others
            untouched += sum(~moved)
        assert np.asarray(reply.change["params"]["stem"]).any()
    assert 20 < untouched < 50  # of 50 layers, each drawn with probability 1/3


def test_logits_move_by_the_score_alone_and_each_edge_keeps_its_sum():
    server, own = start()
    change = np.asarray(client()[1](server, own, DATA, jax.random.key(0)).change["alpha"].op)
    assert change.any(-1).sum() > 5
    # Adam's first step is its rate in the gradient's direction: r (Z - p) is one way at Z and the other elsewhere.
    rate = 57.0 / (0.6 * SETTING.rounds * 1)
    for row in change[change.any(-1)]:
        assert sorted(np.sign(row).tolist()) in ([-1, -1, 1], [-1, 1, 1])
        np.testing.assert_allclose(abs(row), rate, rtol=1e-2)


def test_decided_logits_at_rest_are_fedavg_on_that_network():
    server, own = start(50.0)
    setting = ONE_STEP._replace(batch=4, epochs=2)
    plan = [[[2]] * 5] * 2
    algorithm = feddsnas(toy_space(classes=3), setting, alpha_lr=0.0)[0].make(everything(SPACE))
    reply = ask(algorithm, server, own, DATA, jax.random.key(3))
    fixed = fedavg(SPACE.derive(plan), setting)
    alone, _ = fixed.init(jax.random.key(0))
    alone = alone._replace(params=server.params, stats=server.stats)
    expected = ask(fixed, alone, (), DATA, jax.random.key(3))
    for part in ("params", "stats"):
        np.testing.assert_allclose(flat(reply.change[part]), flat(expected.change[part]), atol=1e-5)
    assert not flat(reply.change["alpha"]).any()
    macs = 3 * SPACE.make(plan).macs * reply.metrics["image_gradients"]
    np.testing.assert_allclose(reply.metrics["macs"], macs, rtol=1e-6)


def test_an_edge_that_is_ahead_is_frozen():
    server, own = start(2.0)  # p = 0.79, 0.11, 0.11
    for gap, frozen in ((0.6, True), (0.8, False)):
        change = client(freeze_gap=gap)[1](server, own, DATA, jax.random.key(1)).change
        assert (not flat(change["alpha"]).any()) == frozen
        assert all(flat(change["params"][cell]).any() for cell in ("cell_0", "cell_1"))


def test_the_network_found_is_trained_on_by_the_same_program_and_the_event_costs_nothing(tmp_path):
    setting, said = SETTING._replace(rounds=10), []
    phases = feddsnas(toy_space(), setting)
    assert [phase.start for phase in phases] == [0, 6]
    outcome = toy.run(
        phases, federation(), tmp_path / "run", said, rounds=10, clients=6, cohort=3, epochs=3, eval_every=2
    )
    lines = [line for line in said if isinstance(line, dict)]
    assert [line["ops_alive"] for line in lines] == [20] * 6 + [10] * 4  # without `none`
    border = lines[5]
    assert border["event_accuracy_before"] == border["event_accuracy_after"] == border["server_accuracy"]
    assert border["server_accuracy"] == border["server_accuracy_discrete"]  # what is evaluated is the child
    server = outcome.state.server
    plan = masks.plan_of(SPACE.graph, masks.terminal(SPACE.graph, server.alpha, server.mask))
    assert plan == outcome.plan  # logits stand still after the border
    macs = {line["macs"] / line["image_gradients"] for line in lines[6:]}
    assert macs == {3.0 * toy_space(every_edge=True).make(plan).macs}
    assert all(line["macs"] / line["image_gradients"] < 3 * SPACE.make(everything(SPACE)).macs for line in lines[:6])


@pytest.mark.parametrize("none", [False, True])
def test_none_is_a_candidate_where_it_is_asked_for_and_wins_nowhere_else(none):
    first = feddsnas(toy_space(classes=3), ONE_STEP, none=none)[0]
    algorithm = first.make(first.enter(None, None, jax.random.key(0))[0])
    server, _ = algorithm.init(jax.random.key(1))
    index = SPACE.graph.ops.index("none")
    ahead = server.alpha._replace(op=server.alpha.op.at[..., index].add(50.0))
    mix = np.asarray(algorithm.global_model(server._replace(alpha=ahead)).mix)
    assert (mix.argmax(-1) == index).all() if none else not mix[..., index].any()
    np.testing.assert_array_equal(mix.sum(-1), 1)


def test_a_client_adapts_the_weights_of_the_likeliest_network():
    algorithm, _ = client()
    server, own = start(1.0)
    net = algorithm.personalize(algorithm.send(server, 0, None), own, DATA, jax.random.key(0), jnp.int32(3))
    assert np.array_equal(np.asarray(net.mix), np.asarray(algorithm.global_model(server).mix))
    moved = tree.sub(net.params, server.params)
    assert flat(moved["cell_0"]).any()
    assert flat(moved["head_bias"]).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"search": 0.0}, "search is 0.0; it must be above 0, at most 1"),
        ({"freeze_gap": 1.5}, "freeze_gap is 1.5; it must be none"),
        ({"travel": -1.0}, "travel is -1.0; it must be 0 or more"),
    ],
)
def test_options_that_cannot_be_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        feddsnas(toy_space(), SETTING, **options)
