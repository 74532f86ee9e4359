"""FedNAS: MiLeNAS on every client, DARTS's rule, training from scratch, and what is recorded at the border."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from toy_federation import CLASSES, SETTING, SHAPE, federation, phases
from toy_model import PIXELS, ask, close, examples, jit, same, unchanged

from fedmetanas_jax import build, local
from fedmetanas_jax.algorithms.averaging import averaging
from fedmetanas_jax.algorithms.fedavg import fedavg
from fedmetanas_jax.algorithms.fednas import alpha_gradient, fednas, weight_gradient
from fedmetanas_jax.config import MOST_CELLS, MOST_WIDTH, Config
from fedmetanas_jax.core import Alpha, Graph, Model, SearchSpace, Setting, Supernet
from fedmetanas_jax.engine import report
from fedmetanas_jax.engine.mesh import clients_mesh
from fedmetanas_jax.models.darts import darts_space
from fedmetanas_jax.models.nasbench201 import GRAPH as NASBENCH201
from fedmetanas_jax.models.plan import darts_graph
from fedmetanas_jax.nas import genotype as genotypes
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import relax
from fedmetanas_jax.optimizers import adam, cosine, local_sgd

# One edge, and a linear map and a tanh of one to choose from; its statistics depend on weights and mix.
GRAPH = Graph(("cell",), ("none", "linear", "tanh"), 1, ((0, 0),), (), (0,))
PLAN = masks.full_plan(GRAPH)
SMALL = Setting(rounds=8, epochs=2, batch=4, augment=unchanged, lr=0.1, clip=0.5)


def outputs(params, stats, image, mix, train):
    x = image.reshape(len(image), PIXELS).astype(jnp.float32) / 255 - 0.5
    out = mix[0, 0, 1] * (x @ params["linear"]) + mix[0, 0, 2] * jnp.tanh(x @ params["tanh"])
    own = jnp.mean(out, axis=0)
    stats = {"mean": own if train is True else jnp.where(train, own, stats["mean"])}
    return out - stats["mean"] + params["bias"], stats


def toy_space() -> SearchSpace:
    def init(key):
        drawn = 0.3 * jax.random.normal(key, (2, PIXELS, CLASSES))
        params = {"linear": drawn[0], "tanh": drawn[1], "bias": jnp.zeros(CLASSES)}
        return params, {"mean": jnp.zeros(CLASSES)}

    def make(plan, sampled=False):
        return Supernet(init, outputs, 0.1, PIXELS * CLASSES * len(plan[0][0]))

    def derive(plan):
        mix = jnp.asarray(masks.of_plan(GRAPH, plan).op, jnp.float32)

        def apply(params, stats, image, train, key=None):
            return outputs(params, stats, image, mix, train)

        return Model(init, apply, 0.1, PIXELS * CLASSES, ("bias",))

    return SearchSpace(GRAPH, 1, make, lambda x, old, new: x, derive, None, lambda **size: SPACE, {})


SPACE = toy_space()


def search_of(setting: Setting = SMALL, **options):
    return fednas(SPACE, setting, **options)[0].make(PLAN)


def reply(algorithm, data, server=None, key=3):
    server = algorithm.init(jax.random.key(1))[0] if server is None else server
    return jit(lambda *x: ask(algorithm, *x))(server, (), data, jax.random.key(key))


def alphas(a) -> Alpha:
    return Alpha(jnp.array([[a]], jnp.float32), jnp.zeros((1, 0)))


@pytest.mark.parametrize(
    ("weights", "slope", "after"),
    [((1, 1), (0, 0), (0, 0)), ((0, 1), (0.5, -0.5), (-3e-4, 3e-4)), ((1, 0), (-0.5, 0.5), (3e-4, -3e-4))],
    ids=["fednas", "darts", "one level"],
)
def test_the_logits_descend_along_both_halves(weights, slope, after):
    """Outputs 1 and 3 at equal weights make 2; the training rows want 1, the validation rows 3."""

    def loss(variables, stats, batch, key):
        out = jnp.sum(jax.nn.softmax(variables["alpha"].op) * jnp.array([1.0, 3.0])) * variables["params"]
        return jnp.mean((batch.label - out) ** 2) / 2, (stats, out)

    variables = {"params": jnp.float32(1), "alpha": alphas([0.0, 0.0])}
    train, valid = (examples(2)._replace(label=jnp.full(2, y)) for y in (1, 3))
    gradient = alpha_gradient(loss, *map(float, weights))
    found, _, _ = gradient.of(variables, {}, [train, valid], None)
    np.testing.assert_allclose(found["alpha"].op[0, 0], slope, atol=1e-7)
    assert found["params"] == 0
    optimizer = adam(3e-4, 1e-3)
    step, _ = optimizer.update(found["alpha"], optimizer.init(variables["alpha"]), variables["alpha"])
    np.testing.assert_allclose(step.op[0, 0], after, rtol=1e-5)
    # The weights' own: training rows alone, d (1 - 2 w)^2 / 2 dw = 2 at w = 1.
    found, _, metrics = weight_gradient(loss).of(variables, {}, [train, valid], None)
    assert found["params"] == 2
    assert metrics["loss"] == 0.5
    assert not jnp.any(found["alpha"].op)


def toy_loss(variables, stats, batch, key=None):
    mix = jax.nn.softmax(variables["alpha"].op)
    logits, moments = outputs(variables["params"], stats, batch.image, mix, True)
    return local.cross_entropy(logits, batch.label, batch.weight), (moments, 0.0)


def test_rows_of_the_logits_gradient_sum_to_zero_and_equal_halves_are_darts():
    variables = {"params": SPACE.make(PLAN).init(jax.random.key(1))[0], "alpha": alphas([0.3, -0.2, 0.5])}
    batches = [examples(4, classes=CLASSES, seed=seed) for seed in (1, 2)]
    found = alpha_gradient(toy_loss, 1.0, 1.0).of(variables, None, batches, None)[0]["alpha"].op
    assert jnp.max(jnp.abs(found)) > 1e-3
    assert abs(float(jnp.sum(found))) < 1e-6
    # With one half for both, DARTS of first order is the gradient by those rows, whichever of the two it is taken by.
    one = [batches[0]] * 2
    wanted = jax.grad(lambda v: toy_loss(v, None, batches[0])[0])(variables)["alpha"].op
    for weights in ((0.0, 1.0), (1.0, 0.0), (0.5, 0.5)):
        close(alpha_gradient(toy_loss, *weights).of(variables, None, one, None)[0]["alpha"].op, wanted)


def test_logits_that_differ_by_a_constant_are_the_same_search():
    algorithm, data = search_of(alpha_weight_decay=0.0, alpha_lr=0.05), examples(11, classes=CLASSES)
    server = algorithm.init(jax.random.key(1))[0]
    moved = server._replace(alpha=jax.tree.map(lambda x: x + 0.7, server.alpha))
    one, other = (reply(algorithm, data, s) for s in (server, moved))
    assert jnp.max(jnp.abs(one.change["alpha"].op)) > 0.01
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), one.change, other.change)


def test_without_steps_of_the_logits_it_is_fedavg_on_the_even_rows():
    algorithm, data = search_of(alpha_lr=0.0), examples(11, classes=CLASSES)
    server = algorithm.init(jax.random.key(1))[0]
    mix = jax.nn.softmax(server.alpha.op)

    def apply(params, stats, image, train, key=None):
        return outputs(params, stats, image, mix, train)

    def first_alone(loss):
        plain = local.plain(loss)
        return local.Gradient(lambda v, s, batches, key: plain.of(v, s, batches[:1], key), (1, 0))

    model = Model(None, apply, 0.1, 1, ("bias",))
    gradient = first_alone(local.classification_loss(model))
    half = SMALL._replace(rounds=4)  # of the search, over which the rate falls
    fixed = averaging(model, half, lambda sent: local_sgd(half, sent.round), gradient=gradient, tasks="halves")
    found, wanted = (reply(a, data, server._replace(round=jnp.int32(2))) for a in (algorithm, fixed))
    assert not jnp.any(found.change.pop("alpha").op)
    close(found.change, wanted.change)
    # The validation half is for the logits alone.
    other = data._replace(label=data.label.at[1::2].set(0))
    same(reply(algorithm, other, server).change["params"], reply(algorithm, data, server).change["params"])


def test_a_round_of_a_client_is_milenas_step_by_step():
    options = {"alpha_lr": 0.03, "lambda_train": 0.5}
    algorithm, data = search_of(**options), examples(11, size=9, classes=CLASSES)
    server = algorithm.init(jax.random.key(1))[0]
    found = reply(algorithm, data, server)
    variables, stats = {"params": server.params, "alpha": server.alpha}, server.stats
    order_key, _ = jax.random.split(jax.random.key(3))
    rows, weight = local.all_tasks(order_key, data.weight, 4, 2, "halves")
    assert rows.shape == (4, 2, 4)  # two epochs of six even rows in batches of four
    assert {*(rows % 2)[:, 0].ravel().tolist()} == {0}  # the halves are the same in every epoch
    assert {*(rows % 2)[:, 1].ravel().tolist()} == {1}
    trace = jax.tree.map(jnp.zeros_like, server.params)
    first = second = jnp.zeros((1, 1, 3))
    slopes = jit(jax.grad(toy_loss, has_aux=True))
    losses = []
    for t, (r, counted) in enumerate(zip(rows, weight, strict=True), 1):
        cut = zip(r, counted, strict=True)
        train, valid = (data._replace(image=data.image[i], label=data.label[i], weight=c) for i, c in cut)
        g = slopes(variables, stats, valid)[0]["alpha"].op + 0.5 * slopes(variables, stats, train)[0]["alpha"].op
        g = g + 1e-3 * variables["alpha"].op
        first, second = 0.5 * first + 0.5 * g, 0.999 * second + 0.001 * g**2
        step = 0.03 * (first / (1 - 0.5**t)) / (jnp.sqrt(second / (1 - 0.999**t)) + 1e-8)
        variables = variables | {"alpha": Alpha(variables["alpha"].op - step, variables["alpha"].pair)}
        slope, (moments, _) = slopes(variables, stats, train)
        losses.append(toy_loss(variables, stats, train)[0])
        norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(slope["params"])))
        assert norm > SMALL.clip or t > 1
        slope = jax.tree.map(lambda x, n=norm: x * min(1.0, SMALL.clip / n), slope["params"])
        decayed = jax.tree.map(lambda x, w: x + SMALL.weight_decay * w, slope, variables["params"])
        trace = jax.tree.map(lambda m, x: SMALL.momentum * m + x, trace, decayed)
        variables = variables | {"params": jax.tree.map(lambda w, m: w - SMALL.lr * m, variables["params"], trace)}
        stats = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, stats, moments)
    for part, wanted in (variables | {"stats": stats}).items():
        came = jax.tree.map(jnp.add, getattr(server, part), found.change[part])
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), came, wanted)
    of_rows = np.average(losses, weights=weight[:, 0].sum(axis=1))
    np.testing.assert_allclose(found.metrics["loss"], of_rows, rtol=1e-5)
    assert found.weight == 9


@pytest.mark.parametrize(("rows", "batch", "images"), [(600, 32, 920), (17, 4, 2 * 9 + 3 * 4), (2, 4, 2 + 1)])
def test_images_of_an_epoch(rows, batch, images):
    """The even rows twice, and for each of their batches one of the odd rows, if there are so many."""
    setting = SMALL._replace(epochs=1, batch=batch)
    found = reply(search_of(setting), examples(rows, classes=CLASSES))
    assert found.metrics["image_gradients"] == images
    assert search_of(setting).least_rows == 2


@pytest.mark.parametrize("graph", [darts_graph(4), NASBENCH201], ids=["darts", "nasbench201"])
def test_what_is_left_is_what_the_rule_of_darts_leaves(graph):
    for seed in range(100):
        alpha = relax.init_alpha(jax.random.key(seed), graph)
        alpha = alpha._replace(op=1e3 * alpha.op)
        wanted = genotypes.to_mix(graph, genotypes.darts_rule(graph, alpha, masks.full(graph)))
        mix = genotypes.darts_mix(graph, alpha.op)
        np.testing.assert_array_equal(mix, wanted)
    assert mix.sum() == (2 * 8 if graph.pairs else 6)
    everything_alike = genotypes.darts_mix(graph, jnp.zeros_like(alpha.op))  # ties go to the lowest index
    zeros = jax.tree.map(jnp.zeros_like, alpha)
    same(everything_alike, genotypes.to_mix(graph, genotypes.darts_rule(graph, zeros, masks.full(graph))))


def test_training_from_scratch_is_fedavg_of_the_network_found():
    first, last = fednas(SPACE, SMALL, search=0.75)
    assert (first.start, last.start, last.event, last.ends) == (0, 6, "retrain", "search")
    server = first.make(PLAN).init(jax.random.key(1))[0]._replace(alpha=alphas([3.0, 1.0, 2.0]))
    key = jax.random.key(5)
    plan, nothing = last.enter(server._replace(round=jnp.int32(6)), PLAN, key)
    assert (plan, nothing) == ([[[2]]], None)  # the best that is not none; init makes the server
    fresh, rest = jax.jit(last.make(plan).init)(key)[0], fedavg(SPACE.derive(plan), SMALL._replace(rounds=2))
    same(fresh, jax.jit(rest.init)(key)[0])
    found, wanted = (reply(a, examples(11, classes=CLASSES), fresh) for a in (last.make(plan), rest))
    same(found, wanted)
    assert (found.metrics["image_gradients"], last.make(plan).depth) == (22, "epochs")
    assert float(cosine(2, 0.1, 0.001)(fresh.round)) == pytest.approx(0.1)  # the rate begins anew


def test_two_inputs_a_node_are_kept_and_the_network_has_its_own_size():
    space = darts_space(**SHAPE, width=4, length=1, nodes=2)
    first, last = fednas(space, SETTING, retrain_width=6, retrain_cells=3)
    whole = first.make(masks.full_plan(space.graph)).space
    assert whole.graph.pairs == ()
    server = jax.eval_shape(first.make(masks.full_plan(space.graph)).init, jax.random.key(1))[0]
    logits = relax.init_alpha(jax.random.key(2), space.graph).op
    plan, _ = last.enter(server._replace(alpha=Alpha(logits, jnp.zeros((2, 0)))), None, jax.random.key(3))
    fresh, _ = jax.eval_shape(last.make(plan).init, jax.random.key(3))
    assert [sum(map(len, kind)) for kind in plan] == [4, 4]
    sized = darts_space(**SHAPE, width=6, length=3, nodes=2)
    wanted = jax.eval_shape(sized.derive(plan).init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, (fresh.params, fresh.stats)) == jax.tree.map(jnp.shape, wanted)
    assert last.make(plan).space.size == {"every_edge": True, "width": 6, "length": 3}
    # Of either graph it is one network: what genotype.json holds can be given to any method.
    found = genotypes.of_mix(whole.graph, genotypes.darts_mix(space.graph, logits))
    assert genotypes.to_plan(space.graph, found) == genotypes.to_plan(whole.graph, found) == plan


@pytest.mark.parametrize(
    ("rounds", "options", "message"),
    [
        (8, {"search": 0.0}, "search is 0.0; it must be above 0"),
        (8, {"lambda_train": -1.0}, "lambda_train is -1.0"),
        (8, {"alpha_lr": -1.0}, "alpha_lr is -1.0"),
        (8, {"search": 1.0, "retrain_width": 8}, "search is 1, which leaves nothing to train"),
        (8, {"retrain_cells": 0}, "retrain_cells, .* is 0; it must be 1 to 1000"),
        (8, {"retrain_cells": 2**31 - 1}, f"retrain_cells, .* must be 1 to {MOST_CELLS}$"),
        (8, {"retrain_width": 2**20}, f"retrain_width, .* must be 1 to {MOST_WIDTH}$"),
        (1, {}, "of 1 rounds the search takes 0"),
        (8, {"search": 0.99}, "of 8 rounds the search takes 8"),
    ],
)
def test_options_that_cannot_be_are_named(rounds, options, message):
    with pytest.raises(ValueError, match=message):
        fednas(SPACE, SMALL._replace(rounds=rounds), **options)
    assert len(fednas(SPACE, SMALL._replace(rounds=1), search=1.0)) == 1


@pytest.mark.parametrize(("devices", "bn_eval"), [(None, "recalibrated"), (4, "running")])
def test_accuracies_of_search_pruned_and_retrained_are_kept_apart(tmp_path, devices, bn_eval):
    said: list = []
    setting = SMALL._replace(rounds=4, epochs=1)
    how = {"clients": 6, "cohort": 3, "mesh": None if devices is None else clients_mesh(devices), "bn_eval": bn_eval}
    outcome = toy.run(fednas(SPACE, setting, alpha_lr=0.1), federation(), tmp_path / "run", said, **how)
    lines = [x for x in said if isinstance(x, dict)]
    border, last = lines[1], lines[3]  # nothing was to be evaluated but at the end
    assert "server_accuracy" not in lines[0]
    assert [line.get("event") for line in lines] == [None, "retrain", None, None]
    assert [line["phase"] for line in lines] == [0, 0, 1, 1]
    assert border["server_accuracy"] == border["event_accuracy_before"]
    assert border["event_accuracy_after"] is None  # of fresh weights
    assert border["server_accuracy_discrete"] == border[f"server_accuracy_discrete_{bn_eval}"]
    assert all(0 <= border[f"server_accuracy_discrete_{other}"] <= 1 for other in ("running", "recalibrated"))
    assert "server_accuracy_discrete" not in outcome.summary
    assert outcome.summary["server_accuracy"] == last["server_accuracy"]
    search = outcome.summary["search"]
    assert search["rounds"] == 2
    for name in ("server_accuracy", "server_accuracy_discrete", "server_accuracy_discrete_recalibrated"):
        assert search[name] == border[name]
    assert outcome.summary["server_accuracy_best"]["round"] > 2
    assert outcome.plan in ([[[1]]], [[[2]]])
    assert lines[2]["image_gradients"] == int(np.sum(np.asarray(federation().train_size)[lines[2]["cohort"]]))


def test_a_summary_of_a_run_that_goes_on_is_of_all_of_it():
    common = {"seconds": 1.0, "image_gradients": 1.0, "macs": 1.0, "bytes_up": 1, "bytes_down": 1}
    lines = [common | {"round": n, "server_accuracy": 1 - n / 10, "event": "prune"} for n in (1, 2)]
    found = report.summarize(lines)
    assert (found["rounds"], found["server_accuracy"], found["server_accuracy_best"]["round"]) == (2, 0.8, 1)
    assert "search" not in found


def test_fedmetanas_may_train_its_network_from_scratch_too():
    listed = phases("fedmetanas", retrain=0.5)
    plain = phases("fedmetanas", SETTING._replace(rounds=30))
    assert [phase.start for phase in listed] == [*(phase.start for phase in plain), 30]
    space = darts_space(**SHAPE, width=4, length=1, nodes=2)
    server = jax.eval_shape(listed[0].make(masks.full_plan(space.graph)).init, jax.random.key(1))[0]
    alpha = relax.init_alpha(jax.random.key(2), space.graph)
    server = server._replace(alpha=alpha, mask=masks.full(space.graph))  # the last event was put off
    plan, nothing = listed[-1].enter(server, None, jax.random.key(3))
    assert plan == masks.plan_of(space.graph, masks.terminal(space.graph, alpha, server.mask))
    assert nothing is None
    with pytest.raises(ValueError, match="retrain is 1.0; it must be from 0 to below 1"):
        phases("fedmetanas", retrain=1.0)


def test_what_a_run_leaves(tmp_path):
    config = Config(
        method="fednas", dataset="digits", width=2, cells=1, nodes=1, clients=4, cohort=2, train_size=32, test_size=16,
        rounds=4, epochs=1, batch=8, augment=(), at_once=1, eval_every=0, checkpoint_every=2, lr=0.1,
        final_adapt=False,
    )  # fmt: skip
    workdir = tmp_path / "run"
    for stop_after in (3, None):
        build.run(config, task="t", workdir=workdir, data_dir=tmp_path, stop_after=stop_after)
    result = json.loads((workdir / "result.json").read_text())
    assert result["network_largest_loss_difference"] < 1e-4
    assert result["network_accuracy"] == pytest.approx(result["server_accuracy"], abs=2e-2)
    search = result["search"]
    assert search["server_accuracy_discrete"] == search["server_accuracy_discrete_running"]
    assert {"server_accuracy", "server_accuracy_discrete_recalibrated", "local_accuracy"} < {*search}
    found = genotypes.from_json((workdir / "genotype.json").read_text())
    assert [[len(node) for node in cell] for cell in found.values()] == [[2], [2]]
    assert "none" not in (workdir / "genotype.json").read_text()
    assert "a network of 1 cells has reduction cells only" in (workdir / "genotype.txt").read_text()
    for name in ("cells.png", "alphas.png", "network.npz"):
        assert (workdir / name).stat().st_size > 1000
