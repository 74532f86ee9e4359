"""PerFedRLNAS and meta-PerFedRLNAS: policies of clients by hand, who learns and who does not, pruning, and MAML."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_federation import CLIENTS, SETTING, SHAPE, federation
from toy_model import ask, close, jit, merged, same
from toy_space import everything, toy_space

from fedmetanas_jax import local, tree
from fedmetanas_jax.algorithms.fedavg import fedavg
from fedmetanas_jax.algorithms.metaperfedrlnas import metaperfedrlnas
from fedmetanas_jax.algorithms.perfedavg import perfedavg
from fedmetanas_jax.algorithms.perfedrlnas import perfedrlnas
from fedmetanas_jax.core import Alpha, Graph, Mask
from fedmetanas_jax.engine.round import train_examples
from fedmetanas_jax.models.darts import darts_space
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import policy as policies
from fedmetanas_jax.nas import relax, sample
from fedmetanas_jax.optimizers import local_sgd

SPACE = toy_space(classes=4)
ALL = SPACE.resized(every_edge=True)
PLAN = everything(ALL)
DATA = federation()
METHODS = {"perfedrlnas": (perfedrlnas, ALL), "metaperfedrlnas": (metaperfedrlnas, SPACE)}


def one_edge(ops: int) -> Graph:
    return Graph(("cell",), tuple(map(str, range(ops))), 1, ((0, 0),), (), (0,))


def visit(graph: Graph, policy: policies.Policy, op: int, reward: float) -> tuple[policies.Policy, np.ndarray]:
    """A policy of one edge and its probabilities after it drew `op`."""
    ops, everything = len(graph.ops), masks.full(graph)
    drawn = Mask(jax.nn.one_hot(jnp.array([[op]]), ops, dtype=bool), jnp.zeros((1, 0), bool))
    gradient = policies.gradient(graph, policy.alpha, everything, drawn, jnp.float32(reward))
    policy = policies.step(policy, gradient, policies.decided(graph, everything, drawn), 0.5)
    return policy, np.asarray(relax.softmax(graph, policy.alpha, everything, 1.0).op[0, 0])


def flat_policy(ops: int) -> policies.Policy:
    return policies.fresh(Alpha(jnp.zeros((1, 1, ops)), jnp.zeros((1, 0))))


@cache
def method(name: str, **options):
    """(algorithm, its server at first, its jitted server update, its jitted message)."""
    factory, space = METHODS[name]
    algorithm = factory(SPACE, SETTING, **options)[0].make(everything(space))
    server, _ = algorithm.init(jax.random.key(1))
    return algorithm, server, jax.jit(algorithm.server_update), jax.jit(algorithm.send)


@cache
def a_reply(name: str):
    algorithm, server, *_ = method(name)
    reply = jit(lambda *x: ask(algorithm, *x))(server, (), train_examples(DATA, 1), jax.random.key(0))
    return reply._replace(change=tree.zeros_like(reply.change))


def after(name: str, server, visits: dict, seed: int = 0, **options):
    """(server after a round in which these clients replied with these accuracies, the networks they drew)."""
    algorithm, _, update, send = method(name, **options)
    drawn = {k: send(server, jnp.int32(k), jax.random.key(100 * seed + k)).child for k in visits}
    some = [
        a_reply(name)._replace(report=a_reply(name).report._replace(child=drawn[k], reward=jnp.float32(accuracy)))
        for k, accuracy in visits.items()
    ]
    answers = merged(*some)._replace(client=jnp.array(list(visits), jnp.int32))
    graph = algorithm.space.graph
    return update(server, answers), {k: policies.of_child(graph, child) for k, child in drawn.items()}


def test_two_visits_move_a_policy_as_by_hand():
    graph = one_edge(2)
    policy, p = visit(graph, flat_policy(2), 0, 0.1)
    np.testing.assert_allclose(policy.mean.op[0, 0], 0.5 * np.array([-0.05, 0.05]), rtol=1e-6)
    np.testing.assert_allclose(policy.alpha.op[0, 0], [0.5, -0.5], rtol=1e-5)
    np.testing.assert_allclose(p, [0.7311, 0.2689], atol=1e-4)
    policy, p = visit(graph, policy, 1, -0.1)
    np.testing.assert_allclose(policy.mean.op[0, 0], [-0.025 / 2 - 0.07311 / 2, 0.025 / 2 + 0.07311 / 2], rtol=1e-4)
    np.testing.assert_allclose(policy.alpha.op[0, 0], [1.02212, -1.02212], rtol=2e-5)
    np.testing.assert_allclose(p, [0.88536, 0.11464], atol=1e-5)


@pytest.mark.parametrize(
    ("reward", "drawn", "others"), [(0.3, 0.2797, 0.1029), (1e-3, 0.2797, 0.1029), (-0.2, 0.0499, 0.1357)]
)
def test_a_first_visit_does_not_care_how_large_its_reward_is(reward, drawn, others):
    _, p = visit(one_edge(8), flat_policy(8), 3, reward)
    np.testing.assert_allclose(p[3], drawn, atol=1e-4)
    np.testing.assert_allclose(np.delete(p, 3), others, atol=1e-4)


def test_accuracies_are_compared_with_the_best_of_clients_seen_before():
    _, server, *_ = method("perfedrlnas")
    first, _ = after("perfedrlnas", server, {0: 0.8, 4: 0.4})
    same(first.policy, server.policy)  # nobody had been seen
    np.testing.assert_allclose(first.best[jnp.array([0, 4])], [0.8, 0.4])
    assert first.visited.tolist() == [True, False, False, False, True, False]
    second, drawn = after("perfedrlnas", first, {0: 0.7, 2: 0.5})
    p = relax.softmax(ALL.graph, tree.take(first.policy.alpha, 0), masks.full(ALL.graph), 1.0).op
    np.testing.assert_allclose(second.policy.mean.op[0], 0.5 * 0.1 * (p - drawn[0].op), atol=1e-6)  # 0.7 - 0.6
    np.testing.assert_allclose(second.policy.mean.op[2], -0.5 * 0.1 * (p - drawn[2].op), atol=1e-6)  # 0.5 - 0.6
    np.testing.assert_allclose(second.best[jnp.array([0, 2, 4])], [0.8, 0.5, 0.4])
    third, drawn = after("perfedrlnas", second, {5: 0.9})  # its first visit: its policy still is the common one
    gain = 0.9 - (0.8 + 0.5 + 0.4) / 3
    np.testing.assert_allclose(third.policy.mean.op[5], 0.5 * gain * (p - drawn[5].op), atol=1e-6)


def test_by_its_own_baseline_a_client_is_compared_with_itself():
    _, server, *_ = method("perfedrlnas", baseline="own")
    first, _ = after("perfedrlnas", server, {1: 0.6}, baseline="own")
    second, drawn = after("perfedrlnas", first, {1: 0.7, 2: 0.9}, baseline="own")
    same(*(tree.take(x.policy, 2) for x in (second, server)))  # it had not been seen
    everyone = masks.full(ALL.graph)
    mine, before = tree.take(first.policy, 1), jnp.float32(0.6)  # FedRLNAS's step from this baseline
    gradient = policies.gradient(ALL.graph, mine.alpha, everyone, drawn[1], jnp.float32(0.7) - before)
    close(tree.take(second.policy, 1), policies.step(mine, gradient, everyone, 0.5))
    np.testing.assert_allclose(second.best[1], 0.7)


@pytest.mark.parametrize("name", METHODS)
def test_clients_that_were_not_heard_keep_everything(name):
    algorithm, server, update, _ = method(name)
    server, _ = after(name, server, {0: 0.5, 1: 0.6})
    kept = [field for field in server._fields if field in ("policy", "best", "visited", "mask")]
    moved, _ = after(name, server, {1: 0.9, 3: 0.1})
    others = jnp.array([0, 2, 4, 5])
    for field in kept:
        same(*(tree.take(getattr(x, field), others) for x in (moved, server)))
    assert not np.array_equal(moved.policy.alpha.op[3], server.policy.alpha.op[3])
    lost = a_reply(name)._replace(weight=jnp.float32(0))
    lost = lost._replace(report=lost.report._replace(reward=jnp.float32(jnp.nan)))
    nothing = update(server, merged(lost, lost)._replace(client=jnp.array([1, 3], jnp.int32)))
    for field in kept:
        same(getattr(nothing, field), getattr(server, field))


@pytest.mark.parametrize("name", METHODS)
def test_clients_begin_alike_and_use_the_likeliest_network_of_their_own(name):
    algorithm, server, *_ = method(name)
    assert all(np.ptp(x, axis=0).max(initial=0) == 0 for x in jax.tree.leaves(server.policy))
    assert algorithm.global_model is None
    assert algorithm.discrete_model is None
    graph = algorithm.space.graph
    changed = server.policy.alpha._replace(op=server.policy.alpha.op.at[2, 0, 0].set(jnp.array([0.0, 0.0, 9.0])))
    server = server._replace(policy=server.policy._replace(alpha=changed))
    for k in (0, 2):
        wanted = relax.harden(graph, tree.take(changed, k), masks.full(graph))
        sent = algorithm.send(server, jnp.int32(k), None)
        np.testing.assert_array_equal(sample.drawn_mix(graph, policies.of_child(graph, sent.child)), wanted)
    report = algorithm.report(server)
    assert report["clients_visited"] == 0
    visited, _ = after(name, server, {0: 0.5, 1: 0.6})
    assert algorithm.report(visited)["clients_visited"] == 2
    assert 1 / 3 < algorithm.report(visited)["alpha_max"] < 0.34


def test_multiply_adds_cost_reward_where_asked():
    _, server, *_ = method("perfedrlnas", lambda_macs=0.5)
    server, _ = after("perfedrlnas", server, {0: 0.5}, lambda_macs=0.5)
    found, drawn = after("perfedrlnas", server, {0: 0.5}, lambda_macs=0.5)
    macs = ALL.make([[[k for k in range(3) if on[k]] for on in edges] for edges in drawn[0].op.tolist()]).macs
    p = relax.softmax(ALL.graph, tree.take(server.policy.alpha, 0), masks.full(ALL.graph), 1.0).op
    expected = -0.5 * macs / ALL.make(PLAN).macs * (p - drawn[0].op)
    np.testing.assert_allclose(found.policy.mean.op[0], 0.5 * expected, atol=1e-6)


def test_a_frozen_policy_is_fedavg_of_its_network_and_the_rest_keeps_its_bits():
    algorithm, server, *_ = method("perfedrlnas", policy_lr=0.0, reward="test")
    assert algorithm.reads_test
    ops = jnp.array([[2, 1, 0, 2, 0], [1, 2, 1, 1, 1]])
    alpha = jnp.broadcast_to(50.0 * jax.nn.one_hot(ops, 3), server.policy.alpha.op.shape)
    alpha = server.policy.alpha._replace(op=alpha)
    server = server._replace(policy=server.policy._replace(alpha=alpha))
    plan = [[[int(k)] for k in edges] for edges in ops]
    setting = SETTING
    fixed = fedavg(ALL.derive(plan), setting)
    carried = [ALL.carry_over(x, PLAN, plan) for x in (server.params, server.stats)]
    start = fixed.init(jax.random.key(2))[0]._replace(params=carried[0], stats=carried[1])
    key = jax.random.key(4)
    found = jax.jit(lambda *x: ask(algorithm, *x))(server, (), train_examples(DATA, 0, test=True), key)
    wanted = jax.jit(lambda *x: ask(fixed, *x))(start, (), train_examples(DATA, 0), key)
    assert tree.global_norm(wanted.change["params"]) > 0.01
    learnt = algorithm.server_update(server, merged(found))
    expected = fixed.server_update(start, merged(wanted))
    for part in ("params", "stats"):
        close(ALL.carry_over(getattr(learnt, part), PLAN, plan), getattr(expected, part))
        given = algorithm.held(algorithm.send(server, 0, None))[part]
        for h, x, y in zip(*map(jax.tree.leaves, (given, getattr(learnt, part), getattr(server, part))), strict=True):
            assert np.all(h | (x == y))
    same(learnt.policy.alpha, server.policy.alpha)


# --- meta-PerFedRLNAS ------------------------------------------------------------------------------------


def test_a_pair_that_was_drawn_moves_its_node_as_by_hand():
    graph = darts_space(**SHAPE, width=4, length=1, nodes=2).graph
    policy = policies.fresh(Alpha(jnp.zeros((2, 5, 8)), jnp.zeros((2, 4))))
    child = policies.Child(jnp.zeros((2, 5), jnp.int8), jnp.array([[0, 1], [0, 1]], jnp.int16))
    alive, drawn = masks.full(graph), policies.of_child(graph, child)  # of node 1 its first pair, edges 2 and 3
    gradient = policies.gradient(graph, policy.alpha, alive, drawn, jnp.float32(0.1))
    np.testing.assert_allclose(gradient.pair[0], [0, -0.0667, 0.0333, 0.0333], atol=1e-4)
    moves = policies.decided(graph, alive, drawn)
    assert moves.op[0].all(-1).tolist() == [True, True, True, True, False]
    stepped = policies.step(policy, gradient, moves, 0.5)
    np.testing.assert_allclose(stepped.alpha.pair[0], [0, 0.5, -0.5, -0.5], rtol=1e-5)
    np.testing.assert_allclose(stepped.alpha.op[0, 0], [0.5] + [-0.5] * 7, rtol=1e-5)
    for field in stepped:
        assert not np.any(field.op[:, 4])  # neither the logits of an edge that was not drawn nor what Adam knows
    again = policies.step(stepped, gradient, policies.decided(graph, alive, policies.of_child(graph, child)), 0.5)
    assert again.steps.op[0, :, 0].tolist() == [2, 2, 2, 2, 0]


def network_of(space, ops, pairs):
    """(frozen alpha of every client, plan) of the network with these operations and, of all pairs, these."""
    graph = space.graph
    one = Alpha(50.0 * jax.nn.one_hot(ops, len(graph.ops)), 50.0 * jnp.isin(jnp.arange(len(graph.pairs)), pairs))
    one = one._replace(pair=jnp.tile(one.pair[None], (len(graph.cell_types), 1)))
    plan = masks.plan_of(graph, masks.terminal(graph, one, masks.full(graph)))
    return jax.tree.map(lambda x: jnp.tile(x, (CLIENTS, *[1] * x.ndim)), one), plan


@pytest.mark.parametrize("M", [1, 2])
def test_a_frozen_policy_is_first_order_perfedavg_of_its_network(M):
    algorithm, server, *_ = method("metaperfedrlnas", policy_lr=0.0, M=M)
    alpha, plan = network_of(SPACE, jnp.array([[2, 1, 0, 2, 2], [1, 2, 2, 1, 1]]), jnp.array([0, 2]))
    assert sum(len(ops) for cell in plan for ops in cell) == 8
    server = server._replace(policy=server.policy._replace(alpha=alpha))
    fixed = perfedavg(SPACE.derive(plan), SETTING, M=M)
    carried = [SPACE.carry_over(x, PLAN, plan) for x in (server.params, server.stats)]
    start = fixed.init(jax.random.key(2))[0]._replace(params=carried[0], stats=carried[1])
    rows, key = train_examples(DATA, 1), jax.random.key(4)
    found = jax.jit(lambda *x: ask(algorithm, *x))(server, (), rows, key)
    wanted = jax.jit(lambda *x: ask(fixed, *x))(start, (), rows, key)
    for part in ("params", "stats"):
        close(SPACE.carry_over(found.change[part], PLAN, plan), wanted.change[part], atol=2e-6)
    np.testing.assert_allclose(found.report.reward, wanted.metrics["accuracy"], rtol=1e-6)  # on query batches
    assert found.metrics["image_gradients"] == wanted.metrics["image_gradients"]
    assert algorithm.least_rows == fixed.least_rows == 2 * SETTING.batch
    own = jax.jit(algorithm.personalize)(algorithm.send(server, 1, None), (), rows, key, jnp.int32(3))
    start_message = fixed.send(start, 1, None)
    theirs = jax.jit(fixed.personalize)(start_message, (), rows, key, jnp.int32(3))
    close(SPACE.carry_over(own.params, PLAN, plan), theirs.params, atol=2e-6)


def test_without_inner_steps_and_pairs_it_is_perfedrlnas_on_query_batches():
    setting = SETTING._replace(clip=5.0)
    meta = metaperfedrlnas(ALL, setting, M=0)[0].make(PLAN)
    plain = perfedrlnas(ALL, setting)[0].make(PLAN)
    server, _ = meta.init(jax.random.key(1))
    other, _ = plain.init(jax.random.key(1))
    alpha = server.policy.alpha
    other = other._replace(policy=other.policy._replace(alpha=Alpha(alpha.op, other.policy.alpha.pair)))
    rows, key = train_examples(DATA, 1), jax.random.key(5)
    sent = meta.send(server, 1, key)
    found = jit(meta.client_update)(sent, (), rows, key)

    net, mix = ALL.make(PLAN), sample.drawn_mix(ALL.graph, policies.of_child(ALL.graph, sent.child))
    given = ALL.spread(mix != 0, PLAN, server.stats, True)

    def loss(params, stats, batch, key):
        logits, moments = net.apply(params, stats, batch.image, mix, True)
        moments = jax.tree.map(jnp.where, given, moments, stats)
        value = local.cross_entropy(logits, batch.label, batch.weight)
        return value, (moments, local.accuracy(logits, batch.label, batch.weight))

    one = local.plain(loss)
    on_query = local.Gradient(lambda p, s, batches, key: one.of(p, s, batches[1:], key), passes=(0, 1))
    train = jit(lambda params, stats: local.fit(
        on_query, local_sgd(setting, server.round), params, stats, rows, key, setting=setting, momentum=net.momentum
    ))  # fmt: skip
    params, stats, metrics = train(server.params, server.stats)
    held = {part: ALL.spread(mix != 0, PLAN, x, True) for part, x in (("params", params), ("stats", stats))}
    for part, x in (("params", params), ("stats", stats)):
        change = jax.tree.map(lambda h, a, b: jnp.where(h, a - b, 0), held[part], x, getattr(server, part))
        close(found.change[part], change, atol=2e-6)
    np.testing.assert_allclose(found.report.reward, metrics["accuracy"], rtol=1e-6)

    # The same accuracies of the same networks teach the policies of either the same.
    def taught(algorithm, server, child):
        reply = found._replace(report=found.report._replace(child=child))
        for accuracy in (0.5, 0.8, 0.2):
            reply = reply._replace(report=reply.report._replace(reward=jnp.float32(accuracy)))
            server = algorithm.server_update(server, merged(reply)._replace(client=jnp.array([1], jnp.int32)))
        return server.policy

    child = sent.child
    ours, theirs = (
        taught(meta, server, child), taught(plain, other, child._replace(pair=jnp.zeros((2, 0), jnp.int16)))
    )  # fmt: skip
    for a, b in zip(ours, theirs, strict=True):
        close(a.op, b.op)


def test_what_a_policy_does_not_draw_any_more_goes_and_never_comes_back():
    algorithm, server, *_ = method("metaperfedrlnas")
    graph = SPACE.graph
    server, _ = after("metaperfedrlnas", server._replace(round=jnp.int32(0)), {1: 0.1})
    alpha = server.policy.alpha
    unlikely = alpha.op.at[0, 0, 0, 2].set(-9.0).at[1, 0, 0, 2].set(-9.0)
    pair = alpha.pair.at[:2, 0, 3].set(-9.0)
    alpha = Alpha(unlikely, pair)
    server = server._replace(policy=server.policy._replace(alpha=alpha), round=jnp.int32(5))
    early, _ = after("metaperfedrlnas", server, {0: 0.5})
    same(early.mask, server.mask)  # before a tenth of the run nothing goes
    pruned, _ = after("metaperfedrlnas", server._replace(round=jnp.int32(6)), {0: 0.5})
    assert not pruned.mask.op[0, 0, 0, 2]
    assert not pruned.mask.pair[0, 0, 3]
    assert pruned.mask.op[1, 0, 0, 2]  # a client prunes at its own visit
    ops, pairs = (jnp.sum(~x[0]) for x in pruned.mask)
    assert (ops, pairs) == (1, 1)
    send = jax.jit(lambda key: algorithm.send(pruned, 0, key).child)
    children = jax.vmap(send)(jax.random.split(jax.random.key(0), 10_000))
    drawn = jax.vmap(lambda child: policies.of_child(graph, child))(children)
    assert not jnp.any(drawn.op & ~pruned.mask.op[0])
    assert not jnp.any(drawn.pair & ~pruned.mask.pair[0])
    assert jnp.all(jnp.any(drawn.pair, axis=0) == pruned.mask.pair[0])


def test_masks_only_shrink_and_in_the_end_every_client_has_one_network():
    algorithm, server, _, send = method("metaperfedrlnas", policy_lr=2.0)
    rng, alive = np.random.default_rng(0), []
    for t in range(40):
        before = server.mask
        visits = {int(k): float(rng.random()) for k in rng.permutation(CLIENTS)[:3]}
        frozen = server.policy
        server, _ = after("metaperfedrlnas", server, visits, seed=t, policy_lr=2.0)
        assert all(np.all(~now | was) for was, now in zip(before, server.mask, strict=True))
        assert jnp.all(jnp.any(server.mask.op, -1) | ~jax.vmap(lambda m: masks.live_edges(SPACE.graph, m))(server.mask))
        alive.append(float(algorithm.report(server)["ops_alive"]))
        if t >= 36:  # 0.6 of 60 rounds
            same(server.policy, frozen)
    assert alive[0] == 30
    assert alive[34] < 30
    assert alive[-1] == 8  # two edges of two nodes of two cell types
    for k in range(CLIENTS):
        same(send(server, jnp.int32(k), jax.random.key(k)).child, algorithm.send(server, jnp.int32(k), None).child)


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (perfedrlnas, {"baseline": "mean"}, "baseline is mean; it must be clients or own"),
        (perfedrlnas, {"policy_lr": -1.0}, "policy_lr is -1.0; it must be 0 or more"),
        (perfedrlnas, {"lambda_macs": -1.0}, "lambda_macs is -1.0; it must be 0 or more"),
        (perfedrlnas, {"held_out": 0.9}, "held_out is 0.9; it must be above 0, at most 0.5"),
        (metaperfedrlnas, {"threshold": 1.0}, "threshold is 1.0; it must be from 0 to below 1"),
        (metaperfedrlnas, {"M": -1}, "M is -1; it must be 0 or more"),
        (metaperfedrlnas, {"search": 0.0}, "search is 0.0; it must be above 0, at most 1"),
    ],
)
def test_options_that_cannot_be(factory, options, message):
    with pytest.raises(ValueError, match=message):
        factory(SPACE, SETTING, **options)


@pytest.mark.parametrize("factory", [perfedrlnas, metaperfedrlnas])
def test_the_number_of_clients_must_be_known(factory):
    with pytest.raises(ValueError, match="the setting's clients is 0"):
        factory(SPACE, SETTING._replace(clients=0))
