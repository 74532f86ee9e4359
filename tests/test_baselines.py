"""What single baselines do, recomputed by hand: on a quadratic, and on a network of two layers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_model import ask, close, examples, jit, learnt, merged, same, toy_model, unchanged

from fedmetanas_jax import local, optimizers, tree
from fedmetanas_jax.algorithms.ditto import ditto
from fedmetanas_jax.algorithms.fedavg import fedavg
from fedmetanas_jax.algorithms.fedbabu import fedbabu
from fedmetanas_jax.algorithms.fedprox import fedprox
from fedmetanas_jax.algorithms.fedrep import fedrep
from fedmetanas_jax.algorithms.perfedavg import perfedavg
from fedmetanas_jax.algorithms.scaffold import scaffold
from fedmetanas_jax.core import Examples, Model, Setting

KEY = jax.random.key(3)
MODEL = toy_model(hidden=4, centred=True)
CONSTANT = {"lr_end": 0.1, "lr": 0.1, "weight_decay": 0.0}
SETTING = Setting(rounds=10, epochs=3, batch=4, augment=unchanged, **CONSTANT)


def labelled(label: int, n: int = 4) -> Examples:
    return Examples(jnp.zeros((n, 8, 8, 1), jnp.uint8), jnp.full(n, label, jnp.int32), jnp.ones(n))


@pytest.fixture
def scalar(monkeypatch):
    """A model of one number w; the loss is what the test makes of w and the batch's label."""

    def use(value) -> Model:
        def loss(params, stats, batch, key):
            a = jnp.mean(batch.label.astype(jnp.float32))
            return value(params["w"], a), (stats, jnp.float32(0))

        monkeypatch.setattr(local, "classification_loss", lambda model: loss)
        return Model(lambda key: ({"w": jnp.float32(0)}, {"mean": jnp.float32(0)}), None, 0.1, 1, ("w",))

    return use


def test_scaffold_two_rounds_of_two_steps_by_hand(scalar):
    """f_k = (w - b_k)^2 / 2 with b = 2 and 6, lr 1/2, two steps a round, both clients in every round."""
    model = scalar(lambda w, b: 0.5 * (w - b) ** 2)
    algorithm = scaffold(model, Setting(10, 2, 4, unchanged, lr=0.5, lr_end=0.5, weight_decay=0.0))
    server, control = algorithm.init(KEY)
    states = [control, control]
    expected = [
        # w_1, w_2, c_1, c_2, then the server's w and c
        # w: 0 -> 1 -> 1.5 and 0 -> 3 -> 4.5; c_k = (w_t - w_k) / (2 lr)
        (1.5, 4.5, -1.5, -4.5, 3.0, -3.0),
        # corrections c - c_k = -1.5, 1.5: 3 -> 3.25 -> 3.375 and 3 -> 3.75 -> 4.125; c_k' = c_k - c + (3 - w_k)
        (3.375, 4.125, 1.125, -2.625, 3.75, -0.75),
    ]
    for w_1, w_2, c_1, c_2, w, c in expected:
        replies = [ask(algorithm, server, *x, KEY) for x in zip(states, map(labelled, (2, 6)), strict=True)]
        for reply, w_k, c_k in zip(replies, (w_1, w_2), (c_1, c_2), strict=True):
            np.testing.assert_allclose(server.params["w"] + reply.change["params"]["w"], w_k, rtol=1e-6)
            np.testing.assert_allclose(reply.own["w"], c_k, rtol=1e-6)
        states = [reply.own for reply in replies]
        server = algorithm.server_update(server, merged(*replies))
        np.testing.assert_allclose([server.params["w"], server.control["w"]], [w, c], rtol=1e-6)


def test_scaffolds_control_moves_by_the_share_of_clients_that_took_part():
    algorithm = scaffold(MODEL, SETTING._replace(share=0.25))
    server, control = algorithm.init(KEY)
    reply = jit(algorithm.client_update)(server, control, examples(6), KEY)  # the server is the message
    after = algorithm.server_update(server, merged(reply))
    close(after.control, tree.scale(reply.own, 0.25))
    assert jax.tree.structure(after.control) == jax.tree.structure(after.params)  # none for the statistics
    close(after.stats, tree.add(server.stats, reply.change["stats"]))


@pytest.mark.parametrize(
    ("order", "expected"),
    # f = a w^2 / 2 with a = 2, inner rate 1/4: w' = w / 2. First order w <- w - 0.1 a w' = 0.9 w; exact has
    # the factor 1 - a / 4 = 1/2 on that gradient, so 0.95 w; a difference of gradients is exact here.
    [("first", 4 * 0.9**2), ("exact", 4 * 0.95**2), ("hf", 4 * 0.95**2)],
)
def test_perfedavg_two_steps_by_hand(scalar, order, expected):
    model = scalar(lambda w, a: 0.5 * a * w**2)
    setting = Setting(10, 2, 4, unchanged, momentum=0.0, **CONSTANT)  # two epochs of one task each
    algorithm = perfedavg(model, setting, task_lr=0.25, order=order)
    server, _ = algorithm.init(KEY)
    server = server._replace(params={"w": jnp.float32(4)})
    data = labelled(2, algorithm.least_rows)
    reply = ask(algorithm, server, (), data, KEY)
    np.testing.assert_allclose(learnt(server, reply)["params"]["w"], expected, rtol=1e-4)
    assert reply.metrics["image_gradients"] == 2 * 4 * {"first": 2, "exact": 2, "hf": 4}[order]
    assert algorithm.least_rows == {"first": 8, "exact": 8, "hf": 12}[order]
    assert algorithm.depth == "step"
    net = algorithm.personalize(algorithm.send(server, 0, KEY), (), data, KEY, jnp.int32(1))
    assert net.params["w"] == 2.0  # 4 - 0.25 * 2 * 4


def test_perfedavg_refuses_more_inner_steps_than_the_hessian_free_form_has():
    with pytest.raises(ValueError, match="M is 2, but order=hf takes 1 inner step"):
        perfedavg(MODEL, SETTING, M=2, order="hf")


def test_pull_is_the_gradient_of_the_squared_distance(scalar):
    """FedProx at a constant loss: w - w_t shrinks by 1 - lr mu a step; from w_t itself nothing moves."""
    step = optimizers.pull({"w": jnp.float32(1)}, 2.0)
    updates, _ = step.update({"w": jnp.float32(0.5)}, step.init(None), {"w": jnp.float32(4)})
    assert updates["w"] == 0.5 + 2.0 * 3
    model = scalar(lambda w, b: 0.5 * (w - b) ** 2)
    algorithm = fedprox(model, Setting(10, 2, 4, unchanged, momentum=0.0, **CONSTANT), mu=1.0)
    server, _ = algorithm.init(KEY)
    reply = ask(algorithm, server, (), labelled(2), KEY)
    # w: 0 -> 0.2; then gradient (0.2 - 2) + 1 (0.2 - 0) = -1.6 -> 0.36
    np.testing.assert_allclose(reply.change["params"]["w"], 0.36, rtol=1e-6)


def test_ditto_two_turns_by_hand(scalar):
    """The first turn starts at w_t, the second one at the client's own v and pulls to the new w_t."""
    model = scalar(lambda w, b: 0.5 * (w - b) ** 2)
    setting = Setting(10, 1, 4, unchanged, momentum=0.0, finetune_lr=0.5, **CONSTANT)
    algorithm = ditto(model, setting, lam=1.0)
    server, own = algorithm.init(KEY)
    sent = algorithm.send(server, 0, KEY)
    assert algorithm.personalize(sent, own, labelled(2), KEY, jnp.int32(0)).params["w"] == 0.0  # w_t
    reply = algorithm.client_update(sent, own, labelled(2), KEY)
    np.testing.assert_allclose(reply.own.net.params["w"], 0.2, rtol=1e-6)  # 0 - 0.1 (0 - 2)
    sent = algorithm.send(server._replace(params={"w": jnp.float32(1)}), 0, KEY)
    reply = algorithm.client_update(sent, reply.own, labelled(2), KEY)
    # v <- 0.2 - 0.1 ((0.2 - 2) + 1 (0.2 - 1)) = 0.46, while w <- 1 - 0.1 (1 - 2) = 1.1
    np.testing.assert_allclose(reply.own.net.params["w"], 0.46, rtol=1e-6)
    np.testing.assert_allclose(reply.change["params"]["w"], 0.1, rtol=1e-6)
    assert reply.metrics["image_gradients"] == 8  # both models'
    for steps, v in ((0, 0.46), (1, 0.46 - 0.5 * ((0.46 - 2) + (0.46 - 1)))):
        net = algorithm.personalize(sent, reply.own, labelled(2), KEY, jnp.int32(steps))
        np.testing.assert_allclose(net.params["w"], v, rtol=1e-5)


def test_fedrep_trains_the_head_then_the_body():
    data = examples(4)
    algorithm = fedrep(MODEL, SETTING)
    server, head = algorithm.init(KEY)
    assert set(head) == {"layer1"}
    same(head["layer1"], server.params["layer1"])
    sent = algorithm.send(server, 0, KEY)
    assert set(sent.params) == {"layer0"}
    reply = jit(algorithm.client_update)(sent, head, data, KEY)

    loss = local.classification_loss(MODEL)

    def train(params, stats, part, steps):
        """Full batches, so that the order of rows does not matter."""
        optimizer = optimizers.sgd(0.1, 0.9)
        state = optimizer.init(params[part])
        for _ in range(steps):
            grads, (moments, _) = jax.grad(loss, has_aux=True)(params, stats, data, KEY)
            updates, state = optimizer.update(grads[part], state)
            params = params | {part: tree.add(params[part], updates)}
            stats = tree.lerp(stats, moments, MODEL.momentum)
        return params, stats

    expected = train(*train(server.params, server.stats, "layer1", 2), "layer0", 1)
    same(reply.own, {"layer1": reply.change["params"]["layer1"]})  # of which nothing was sent
    assert reply.metrics["image_gradients"] == 3 * 4

    # The server's network has the mean head, a client's its own, under the shared body.
    other = jax.tree.map(lambda x: x + 1, reply.own)
    after = algorithm.server_update(server, merged(reply))
    close((after.params, after.stats), expected)
    two = reply._replace(change=reply.change | {"params": reply.change["params"] | other})
    both = algorithm.server_update(server, merged(reply, two))
    close(both.params["layer1"], jax.tree.map(lambda x: x + 0.5, reply.own["layer1"]))
    sent = algorithm.send(after, 0, KEY)
    own = algorithm.personalize(sent, other, data, KEY, jnp.int32(0))
    same(own.params, after.params | other)
    fitted = algorithm.personalize(sent, other, data, KEY, jnp.int32(2))
    same(fitted.params["layer0"], after.params["layer0"])
    assert jnp.any(fitted.params["layer1"]["kernel"] != other["layer1"]["kernel"])
    assert algorithm.depth == "epochs"


def test_fedbabu_never_moves_its_head():
    data = examples(4)
    algorithm = fedbabu(MODEL, SETTING)
    server, head = algorithm.init(KEY)
    same(head, {"layer1": server.params["layer1"]})
    sent = algorithm.send(server, 0, KEY)
    reply = jit(algorithm.client_update)(sent, head, data, KEY)
    assert set(reply.change["params"]) == set(sent.params) == {"layer0"}
    same(reply.own, head)
    after = algorithm.server_update(server, merged(reply))
    same(after.params["layer1"], server.params["layer1"])
    assert jnp.any(after.params["layer0"]["kernel"] != server.params["layer0"]["kernel"])
    whole = ask(fedavg(MODEL, SETTING), server, (), data, KEY).change["params"]["layer0"]["kernel"]
    assert jnp.any(whole != reply.change["params"]["layer0"]["kernel"])  # whose head moves along
    assert algorithm.depth == "epochs"


@pytest.mark.parametrize(("finetune", "moved"), [("all", [0, 1]), ("head", [1]), ("body", [0])])
def test_fedbabu_fine_tunes_what_it_is_told(finetune, moved):
    algorithm = fedbabu(MODEL, SETTING._replace(finetune_lr=0.1), finetune=finetune)
    server, head = algorithm.init(KEY)
    net = jit(algorithm.personalize)(algorithm.send(server, 0, KEY), head, examples(4), KEY, jnp.int32(1))
    kernels = [[params[f"layer{i}"]["kernel"] for i in range(2)] for params in (net.params, server.params)]
    assert [i for i, (x, y) in enumerate(zip(*kernels, strict=True)) if jnp.any(x != y)] == moved


@pytest.mark.parametrize("factory", [fedrep, fedbabu])
def test_a_head_that_the_network_has_not_is_named(factory):
    with pytest.raises(ValueError, match="no part 'haed' to be a head; there are layer0, layer1"):
        factory(MODEL, SETTING, head=("haed",))


def test_statistics_of_every_method_are_the_mean_of_its_clients():
    """Running statistics travel and are averaged like weights, whatever else a method does with weights."""
    for factory in (fedavg, fedprox, scaffold, perfedavg, fedrep, fedbabu, ditto):
        algorithm = factory(MODEL, SETTING)
        server, own = algorithm.init(KEY)
        shapes = jax.eval_shape(partial(ask, algorithm), server, own, examples(8), KEY)
        reply = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
        reply = reply._replace(change=reply.change | {"stats": jax.tree.map(lambda x: x + 0.25, server.stats)})
        same(algorithm.server_update(server, merged(reply)).stats, jax.tree.map(lambda x: 2 * x + 0.25, server.stats))
