"""FedRLNAS: its policy's numbers by hand, what a client is given, trains and is judged by, and the network found."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_federation import SETTING, SHAPE, federation
from toy_model import ask, close, examples, jit, merged, same
from toy_space import everything, flat, toy_space

from fedmetanas_jax import tree
from fedmetanas_jax.algorithms.drawing import Report, judges
from fedmetanas_jax.algorithms.fedavg import fedavg
from fedmetanas_jax.algorithms.fedrlnas import fedrlnas
from fedmetanas_jax.core import Alpha, Graph, Mask, Reply
from fedmetanas_jax.engine.round import traffic_of, train_examples
from fedmetanas_jax.models.darts import darts_space
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import policy as policies
from fedmetanas_jax.nas import relax, sample

SPACE = toy_space(classes=4)
ALL = SPACE.resized(every_edge=True)
PLAN = everything(ALL)
DATA = federation()
DENSE = 2  # of its operations, the one that has weights


def one_edge(*logits) -> tuple[Graph, Alpha]:
    graph = Graph(("cell",), tuple(map(str, range(len(logits)))), 1, ((0, 0),), (), (0,))
    return graph, Alpha(jnp.array([[logits]], jnp.float32), jnp.zeros((1, 0)))


def chosen(op: int, ops: int) -> Mask:
    return Mask(jax.nn.one_hot(jnp.array([[op]]), ops, dtype=bool), jnp.zeros((1, 0), bool))


@cache
def method(**options):
    """(phases, the algorithm of the search, its server at first, its jitted client)."""
    phases = fedrlnas(SPACE, SETTING, **options)
    algorithm = phases[0].make(PLAN)
    server, _ = algorithm.init(jax.random.key(1))
    return phases, algorithm, server, jax.jit(algorithm.client_update)


def child(*ops) -> Mask:
    """A network of the toy space, these operations on the edges of its first cell and `none` in the second."""
    op = jnp.array([ops, [0] * 5])
    return Mask(jax.nn.one_hot(op, 3, dtype=bool), jnp.zeros((2, 0), bool))


def told(server, drawn: Mask):
    """The message with which a client is given this network."""
    _, algorithm, _, _ = method()
    sent = algorithm.send(server, jnp.int32(0), jax.random.key(0))
    return sent._replace(child=policies.to_child(ALL.graph, drawn))


def test_two_clients_rewards_move_a_policy_as_by_hand():
    graph, alpha = one_edge(0.0, 0.0)
    base = 0.1 + 0.99 * (0.6 - 0.1)
    both = [policies.gradient(graph, alpha, masks.full(graph), chosen(z, 2), a - base) for z, a in ((0, 0.8), (1, 0.4))]
    mean = Alpha(*(sum(x) / 2 for x in zip(*both, strict=True)))
    np.testing.assert_allclose(mean.op[0, 0], [-0.1, 0.1], atol=1e-6)
    np.testing.assert_allclose(0.005 * 0.5 - (np.array([0.4, 0.2]) - 0.595 * 0.5), mean.op[0, 0], atol=1e-6)
    after = policies.step(policies.fresh(alpha), mean, masks.full(graph), 3e-3, 3e-4)
    np.testing.assert_allclose(after.alpha.op[0, 0], [0.003, -0.003], rtol=1e-4)


def replies(server, *rewarded):
    """What clients would reply who changed nothing: of (network, accuracy) each."""
    _, _, _, update = method()
    nothing = update(told(server, child(0, 0, 0, 0, 0)), (), examples(26, classes=4), jax.random.key(0))
    nothing = nothing._replace(change=tree.zeros_like(nothing.change))
    made = (policies.to_child(ALL.graph, drawn) for drawn, _ in rewarded)
    accuracies = (jnp.float32(accuracy) for _, accuracy in rewarded)
    return [
        nothing._replace(report=nothing.report._replace(child=c, reward=a))
        for c, a in zip(made, accuracies, strict=True)
    ]


def test_the_server_compares_with_the_new_baseline_and_means_do_not_weigh_clients():
    _, algorithm, server, _ = method(policy_weight_decay=0.0)
    assert server.baseline == 0.25  # one over the classes
    server = server._replace(baseline=jnp.float32(0.1), policy=policies.fresh(tree.zeros_like(server.policy.alpha)))
    first, second = replies(server, (child(0, 1, 2, 0, 0), 0.8), (child(1, 1, 0, 0, 0), 0.4))
    answers = merged(first._replace(weight=jnp.float32(900)), second)
    after = algorithm.server_update(server, answers)
    np.testing.assert_allclose(after.baseline, 0.595, rtol=1e-6)
    zbar = 0.5 * (0.205 * child(0, 1, 2, 0, 0).op - 0.195 * child(1, 1, 0, 0, 0).op)
    np.testing.assert_allclose(after.policy.mean.op, 0.5 * (0.005 / 3 - zbar), atol=1e-6)  # (1 - 0.5) G
    rate = 3 / SETTING.rounds
    np.testing.assert_allclose(after.policy.alpha.op[0, 0], [rate, -rate, -rate], rtol=1e-3)
    # A client that was left out is not read.
    lost = second._replace(weight=jnp.float32(0), report=second.report._replace(reward=jnp.float32(jnp.nan)))
    alone = algorithm.server_update(server, merged(first, lost))
    np.testing.assert_allclose(alone.baseline, 0.1 + 0.99 * 0.7, rtol=1e-6)
    nobody = algorithm.server_update(server, merged(lost, lost))
    same(nobody._replace(round=server.round), server)


def test_equal_accuracies_teach_by_what_was_drawn_and_rows_sum_to_zero():
    _, algorithm, server, _ = method(policy_weight_decay=0.0)
    drawn = [child(0, 1, 2, 0, 0), child(0, 0, 2, 2, 1)]
    even = algorithm.server_update(
        server._replace(baseline=jnp.float32(0.5)), merged(*replies(server, *((d, 0.5) for d in drawn)))
    )
    assert not flat(even.policy.mean).any()
    same(even.policy.alpha, server.policy.alpha)
    above = algorithm.server_update(server, merged(*replies(server, *((d, 0.5) for d in drawn))))
    p = relax.softmax(ALL.graph, server.policy.alpha, masks.full(ALL.graph), 1.0).op
    gain = 0.5 - above.baseline
    np.testing.assert_allclose(above.policy.mean.op, 0.5 * gain * (p - (0.5 * drawn[0].op + 0.5 * drawn[1].op)), 1e-4)
    np.testing.assert_allclose(jnp.sum(above.policy.mean.op, -1), 0, atol=1e-9)


def test_a_frozen_policy_is_fedavg_of_its_network():
    _, algorithm, server, _ = method(policy_lr=0.0, reward="test")
    ops = jnp.array([[2, 1, 0, 2, 0], [1, 2, 1, 1, 1]])
    alpha = server.policy.alpha._replace(op=50.0 * jax.nn.one_hot(ops, 3))
    server = server._replace(policy=policies.fresh(alpha))
    plan = [[[int(k)] for k in edges] for edges in ops]
    fixed = fedavg(ALL.derive(plan), SETTING)
    carried = [ALL.carry_over(x, PLAN, plan) for x in (server.params, server.stats)]
    start = fixed.init(jax.random.key(2))[0]._replace(params=carried[0], stats=carried[1])
    client, fixed_client = jit(lambda *x: ask(algorithm, *x)), jit(lambda *x: ask(fixed, *x))
    found, wanted = [], []
    for k in (0, 1):
        key = jax.random.key(4 + k)
        found.append(client(server, (), train_examples(DATA, k, test=True), key))
        wanted.append(fixed_client(start, (), train_examples(DATA, k), key))
    assert tree.global_norm(wanted[0].change["params"]) > 0.01
    after, expected = algorithm.server_update(server, merged(*found)), fixed.server_update(start, merged(*wanted))
    for part, here in (("params", server.params), ("stats", server.stats)):
        learnt = getattr(after, part)
        close(ALL.carry_over(learnt, PLAN, plan), getattr(expected, part))
        given = algorithm.held(algorithm.send(server, 0, None))[part]
        untouched = jax.tree.map(lambda h, x, y: np.all(h | (x == y)), given, learnt, here)
        assert all(jax.tree.leaves(untouched))  # to the bit
        assert not all(np.all(h) for h in jax.tree.leaves(given))
    same(after.policy.alpha, server.policy.alpha)
    assert found[0].metrics["image_gradients"] == wanted[0].metrics["image_gradients"]
    macs = 3 * fixed.macs * float(found[0].metrics["image_gradients"])
    np.testing.assert_allclose(found[0].metrics["macs"], macs, rtol=1e-6)


def test_operations_that_nobody_was_given_keep_their_bits():
    _, algorithm, server, update = method()
    sent = [told(server, child(DENSE, 0, 0, 1, 0)), told(server, child(DENSE, 1, DENSE, 0, 0))]
    got = [update(s, (), train_examples(DATA, k), jax.random.key(k)) for k, s in enumerate(sent)]
    after = algorithm.server_update(server, merged(*got))
    for part in ("params", "stats"):
        before, now = (flat_rows(getattr(x, part)) for x in (server, after))
        moved = [not np.array_equal(x, y) for x, y in zip(before, now, strict=True)]
        assert moved == [True, False, True, False, False] + [False] * 5
    # What one of two clients trained moves by its share of both clients' images.
    alone = flat_rows(got[1].change["params"])[2]
    share = 26 / (17 + 26)
    np.testing.assert_allclose(flat_rows(after.params)[2] - flat_rows(server.params)[2], share * alone, atol=1e-6)
    assert not any(flat_rows(got[0].change["params"])[2].ravel())


def flat_rows(part) -> list[np.ndarray]:
    """Of the dense layers, or their statistics, what belongs to every edge, cell by cell."""
    return [np.asarray(row) for cell in ("cell_0", "cell_1") for row in jax.tree.leaves(part[cell])[0]]


@pytest.mark.parametrize(("sizes", "expected"), [((600, 600), 1.1), ((600, 200), 1.15)])
def test_a_weight_that_one_of_two_clients_had(sizes, expected):
    _, algorithm, server, _ = method()
    server = server._replace(params=jax.tree.map(jnp.ones_like, server.params))
    had, had_not = replies(server, (child(*[DENSE] * 5), 0.5), (child(0, 0, 0, 0, 0), 0.5))
    changed = jax.tree.map(lambda x: x + 0.2, had.change["params"])
    had = had._replace(change=had.change | {"params": changed}, weight=jnp.float32(sizes[0]))
    after = algorithm.server_update(server, merged(had, had_not._replace(weight=jnp.float32(sizes[1]))))
    np.testing.assert_allclose(flat(after.params), expected, rtol=1e-6)


def test_the_bytes_of_a_network_without_operations_at_full_size():
    space = darts_space(shape=(32, 32, 3), classes=10, mean=(0.5,) * 3, std=(0.25,) * 3)
    space = space.resized(every_edge=True)
    algorithm = fedrlnas(space, SETTING)[0].make(masks.full_plan(space.graph))
    server, _ = jax.eval_shape(algorithm.init, jax.random.key(0))
    sent = jax.eval_shape(algorithm.send, server, jnp.int32(0), jax.random.key(0))
    none = policies.Child(jnp.zeros((2, 14), jnp.int8), jnp.zeros((2, 0), jnp.int16))
    # Not traced, which takes 20 s here: that a change is shaped as what was sent, the laws say of every method.
    change = {"params": sent.params, "stats": sent.stats}
    reply = Reply(change, jnp.float32(1), (), Report(none, jnp.float32(0)), {})
    sizes = traffic_of(algorithm.held(sent._replace(child=none)), sent, reply)
    fixed, operations, number = 4 * (99_450 + 1_376), 28, 4
    assert sizes["bytes_down"] == fixed + operations + number  # which operations, and the round
    assert sizes["bytes_up"] == fixed + operations + number  # which operations, and the accuracy


def test_a_network_is_written_in_few_bytes_and_read_back():
    for space in (SPACE, ALL, darts_space(**SHAPE, width=4, length=1, nodes=4)):
        graph = space.graph
        alpha = relax.init_alpha(jax.random.key(0), graph)
        for seed in range(5):
            drawn = sample.draw(graph, alpha, masks.full(graph), jax.random.key(seed))
            read = policies.of_child(graph, policies.to_child(graph, drawn))
            np.testing.assert_array_equal(sample.drawn_mix(graph, read), sample.drawn_mix(graph, drawn))


def test_clients_draw_apart_and_a_user_of_the_network_draws_nothing():
    _, algorithm, server, _ = method()
    ops = [algorithm.send(server, k, jax.random.key(k)).child.op for k in range(300)]
    counts = np.bincount(np.ravel(ops), minlength=3)
    assert (abs(counts - 1000) < 4 * np.sqrt(3000 * 2 / 9)).all()
    likeliest = algorithm.send(server, 0, None).child.op
    np.testing.assert_array_equal(likeliest, jnp.argmax(server.policy.alpha.op, -1))
    net = algorithm.global_model(server)
    np.testing.assert_array_equal(net.mix, relax.harden(ALL.graph, server.policy.alpha, masks.full(ALL.graph)))


def test_exploration_is_the_share_of_uniform_draws():
    _, algorithm, server, _ = method(exploration=0.3)
    sure = policies.fresh(server.policy.alpha._replace(op=jnp.zeros((2, 5, 3)).at[..., 1].set(50.0)))
    send = jax.jit(lambda key: algorithm.send(server._replace(policy=sure), 0, key).child.op)
    ops = jax.vmap(send)(jax.random.split(jax.random.key(0), 1000))
    shares = np.bincount(np.ravel(ops), minlength=3) / ops.size
    np.testing.assert_allclose(shares, [0.1, 0.8, 0.1], atol=0.015)


@pytest.mark.parametrize(("size", "back"), [(26, 3), (20, 2), (5, 1), (2, 1), (1, 1), (0, 0)])
def test_the_last_rows_are_held_back(size, back):
    data = examples(26, size)
    rows, judging = judges("train", 0.1)(data)
    assert rows.weight.sum() == size - back
    assert judging.weight.sum() == back
    held = np.asarray(judging.image)[np.asarray(judging.weight) > 0]
    np.testing.assert_array_equal(held[::-1], data.image[size - back : size])
    np.testing.assert_array_equal(np.asarray(rows.image)[np.asarray(rows.weight) > 0], data.image[: size - back])


def test_what_judges_a_network_does_not_train_it():
    _, _, server, update = method()
    sent, data = told(server, child(DENSE, DENSE, 1, DENSE, 0)), train_examples(DATA, 1, test=True)
    key, back = jax.random.key(0), slice(23, 26)  # of the 26 rows of this client
    reply = update(sent, (), data, key)
    assert reply.weight == 26
    assert reply.metrics["image_gradients"] == SETTING.epochs * 23
    other = data._replace(image=data.image.at[back].set(0), label=data.label.at[back].set(3 - data.label[back]))
    same(update(sent, (), other, key).change, reply.change)
    assert update(sent, (), other, key).report.reward != reply.report.reward
    different = data._replace(test=data.test._replace(label=3 - data.test.label))
    same(update(sent, (), different, key), reply)  # test images play no part
    assert not method()[1].reads_test


def test_a_reward_by_test_images_is_their_accuracy_and_says_so():
    _, algorithm, server, update = method(reward="test")
    assert algorithm.reads_test
    sent, data = told(server, child(DENSE, DENSE, 1, DENSE, 0)), train_examples(DATA, 1, test=True)
    reply = update(sent, (), data, jax.random.key(0))
    assert reply.metrics["image_gradients"] == SETTING.epochs * 26
    learnt = {part: tree.add(getattr(sent, part), change) for part, change in reply.change.items()}
    mix = sample.drawn_mix(ALL.graph, child(DENSE, DENSE, 1, DENSE, 0))
    logits, _ = ALL.make(PLAN).apply(learnt["params"], learnt["stats"], data.test.image, mix, False)
    np.testing.assert_allclose(reply.report.reward, jnp.mean(jnp.argmax(logits, -1) == data.test.label))


def test_one_program_trains_every_network():
    _, algorithm, server, _ = method()
    update = jax.jit(lambda *x: algorithm.client_update(*x))
    for seed in range(4):
        sent = algorithm.send(server, jnp.int32(seed), jax.random.key(seed))
        update(sent, (), train_examples(DATA, seed), jax.random.key(seed))
    assert update._cache_size() == 1


def test_after_its_share_of_the_run_the_likeliest_network_goes_on():
    phases, algorithm, server, _ = method()
    assert [(phase.start, phase.event) for phase in phases] == [(0, ""), (36, "prune")]
    ops = jnp.array([[DENSE, 0, 1, DENSE, 0], [0, DENSE, 1, 1, 0]])
    alpha = server.policy.alpha._replace(op=jax.nn.one_hot(ops, 3))
    server = server._replace(policy=policies.fresh(alpha), round=jnp.int32(36))
    plan, after = phases[1].enter(server, PLAN, jax.random.key(0))
    assert plan == [[[int(k)] for k in edges] for edges in ops]
    then = phases[1].make(plan)
    assert tree.form(jax.eval_shape(then.init, jax.random.key(0))[0]) == tree.form(after)
    images = DATA.image[DATA.central]
    before, now = (a.forward(a.global_model(s), images, False)[0] for a, s in ((algorithm, server), (then, after)))
    np.testing.assert_allclose(before, now, atol=1e-5)
    assert then.space is not None
    np.testing.assert_array_equal(then.discrete_model(after).mix, jax.nn.one_hot(ops, 3))
    reply = jax.jit(lambda *x: ask(then, *x))(after, (), train_examples(DATA, 1), jax.random.key(0))
    assert reply.metrics["image_gradients"] == SETTING.epochs * 26  # nothing is held back any more
    assert len(fedrlnas(SPACE, SETTING, search=1.0)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy_lr": -1.0}, "policy_lr is -1.0; it must be none, 0 or more"),
        ({"exploration": 2.0}, "exploration is 2.0; it must be 0 to 1"),
        ({"search": 0.0}, "search is 0.0; it must be above 0, at most 1"),
        ({"held_out": 0.0}, "held_out is 0.0; it must be above 0, at most 0.5"),
        ({"reward": "loss"}, "reward is loss; it must be train or test"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        fedrlnas(SPACE, SETTING, **options)
