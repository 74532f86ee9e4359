"""Accuracies, recalibration and adaptation on the toy method, recomputed by hand with numpy."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from fedmetanas_jax.config import Config
from fedmetanas_jax.core import Examples, Net
from fedmetanas_jax.deploy.work import Worker
from fedmetanas_jax.engine import evaluate as engine
from fedmetanas_jax.engine import measure
from fedmetanas_jax.engine.conduct import Conduct
from fedmetanas_jax.engine.mesh import clients_mesh, put_data, put_state, told
from fedmetanas_jax.engine.programs import Programs
from fedmetanas_jax.engine.round import cohort, init_state, stream_key, train_examples

CLIENTS, SEED = 7, 5


@pytest.fixture(scope="module")
def data():
    return toy.make_data(CLIENTS, m=5, q=23)


@pytest.fixture(scope="module")
def net():
    rng = np.random.default_rng(1)
    params = {"w": rng.normal(size=(toy.PIXELS, toy.CLASSES)), "b": rng.normal(size=toy.CLASSES)}
    return jax.tree.map(jnp.float32, Net(params, {"mean": rng.uniform(size=toy.PIXELS)}))


def pixels(image):
    return np.asarray(image, np.float64).reshape(len(image), -1) / 255


def logits(net, image, mean):
    return (pixels(image) - mean) @ np.float64(net.params["w"]) + np.float64(net.params["b"])


def by_hand(net, image, label, mean):
    out = logits(net, image, mean)
    out = out - out.max(1, keepdims=True)
    losses = np.log(np.exp(out).sum(1)) - out[np.arange(len(out)), label]
    return out.argmax(1) == label, losses


@pytest.mark.parametrize("batch", [1, 5, 23, 100])
def test_one_pass_answers_every_central_image_once(data, net, batch):
    image, label = np.asarray(data.image[60:]), np.asarray(data.label[60:])
    want, losses = by_hand(net, image, label, np.float64(net.stats["mean"]))
    got = engine.make_evaluate(toy.ALGORITHM, batch=batch, bn_eval="running")(net, data, data.central, 23, None)
    np.testing.assert_array_equal(got.correct, want)
    np.testing.assert_allclose(got.loss, losses, rtol=1e-4)
    assert 0 < want.mean() < 1


def test_batch_moments_are_those_of_real_images_in_the_filled_up_chunk_too(data, net):
    image, label = np.asarray(data.image[60:]), np.asarray(data.label[60:])
    rows = np.arange(30).reshape(3, 10) % 23  # the last chunk of ten repeats the first seven
    correct, losses = zip(*[by_hand(net, image[r], label[r], pixels(image[r]).mean(0)) for r in rows], strict=True)
    got = engine.make_evaluate(toy.ALGORITHM, batch=10, bn_eval="batch")(net, data, data.central, 23, None)
    np.testing.assert_array_equal(got.correct, np.concatenate(correct)[:23])
    np.testing.assert_allclose(got.loss, np.concatenate(losses)[:23], rtol=1e-4)


def test_recalibrated_moments_are_the_mean_over_full_batches(data, net):
    def recalibrated(count, distinct):
        seen = engine.Drawn(jnp.arange(count), jnp.int32(distinct))
        return engine.answers(toy.forward, net, data, data.central, 23, 4, "recalibrated", seen)[2]

    got = recalibrated(11, 11)
    np.testing.assert_allclose(got.stats["mean"], pixels(data.image[:8]).mean(0), rtol=1e-5)
    assert got.params is net.params
    np.testing.assert_allclose(recalibrated(3, 3).stats["mean"], pixels(data.image[:3]).mean(0), rtol=1e-5)
    padded = recalibrated(11, 7)  # the rest is none of a client's
    np.testing.assert_allclose(padded.stats["mean"], pixels(data.image[:4]).mean(0), rtol=1e-5)


@pytest.mark.parametrize(("bn_eval", "used"), [("running", None), ("batch", 7), ("recalibrated", 4)])
def test_a_networked_client_counts_its_own_images_by_its_own_moments(data, net, bn_eval, used):
    """Of eleven rows seven are its own, of which one batch of four is full."""
    worker = SimpleNamespace(config=Config(eval_batch=4 if bn_eval == "recalibrated" else 7, bn_eval=bn_eval))
    rows = Examples(data.image[:11], data.label[:11], jnp.arange(11) < 7)
    mean = np.float64(net.stats["mean"]) if used is None else pixels(data.image[:used]).mean(0)
    want = by_hand(net, np.asarray(data.image[:7]), np.asarray(data.label[:7]), mean)[0]
    assert Worker._judging(worker, toy.ALGORITHM)(net, rows, jnp.int32(7)) == want.sum()


@pytest.mark.parametrize(("distinct", "used"), [(18, 18), (17, 12), (6, 6), (4, 6), (0, None)])
def test_recalibrated_by_full_batches_of_distinct_images_then_evaluates_as_running(data, net, distinct, used):
    """At least one batch, though it repeats images; none at all for a net that was recalibrated before."""
    drawn = engine.Drawn(jnp.resize(jnp.arange(max(distinct, 1)), 18), distinct)
    mean = np.float64(net.stats["mean"]) if used is None else pixels(data.image[drawn.rows[:used]]).mean(0)
    got = engine.make_evaluate(toy.ALGORITHM, batch=6, bn_eval="recalibrated")(net, data, data.central, 23, drawn)
    want, losses = by_hand(net, np.asarray(data.image[60:]), np.asarray(data.label[60:]), mean)
    np.testing.assert_allclose(got.stats["mean"], mean, rtol=1e-5)
    np.testing.assert_array_equal(got.correct, want)
    np.testing.assert_allclose(got.loss, losses, rtol=1e-4)


def test_only_the_rows_asked_for_are_answered(data, net):
    evaluate = engine.make_evaluate(toy.ALGORITHM, batch=4, bn_eval="running")
    rows, size = jnp.resize(data.central[3:14], 30), 11
    got = evaluate(net, data, rows, size, None)
    want = evaluate(net, data, data.central, 23, None)
    np.testing.assert_array_equal(got.correct[:size], want.correct[3:14])
    assert not np.any(got.loss[12:])  # a chunk that holds none of them is not computed


@pytest.mark.parametrize("size", [1, 14, 23])
@pytest.mark.parametrize(("bn_eval", "distinct"), [("running", 0), *(("recalibrated", n) for n in (32, 14, 3, 0))])
def test_devices_divide_the_rows_and_the_moments(data, net, bn_eval, distinct, size):
    mesh, drawn = clients_mesh(4), engine.Drawn(jnp.resize(jnp.arange(max(distinct, 1)), 32), distinct)
    one = engine.make_evaluate(toy.ALGORITHM, batch=4, bn_eval=bn_eval)(net, data, data.central, size, drawn)
    shared = engine.make_evaluate(toy.ALGORITHM, batch=4, bn_eval=bn_eval, mesh=mesh)
    on = put_data((net, data), mesh)
    drawn = engine.divided_in_batches(drawn, mesh, 4)
    found = shared(*on, engine.divided(data.central, mesh), size, drawn)
    for x, wanted in zip(found[:2], one[:2], strict=True):
        np.testing.assert_allclose(engine.in_order(x, mesh)[:size], wanted[:size], rtol=1e-5)
    assert bool(found.stats) == bool(one.stats) == (bn_eval == "recalibrated")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found.stats, one.stats)


@pytest.mark.parametrize(
    ("bn_eval", "devices", "batch", "divides"),
    [
        ("running", 3, 7, True), ("recalibrated", 4, 250, True), ("recalibrated", 3, 250, False),
        ("recalibrated", 4, 300, False), ("batch", 2, 250, False),
    ],
)  # fmt: skip
def test_an_evaluation_is_divided_where_batch_norm_sees_the_same_batches(bn_eval, devices, batch, divides):
    mesh = clients_mesh(devices)
    assert engine.dividing(mesh, batch=batch, bn_eval=bn_eval) is (mesh if divides else None)
    assert engine.dividing(None, batch=batch, bn_eval=bn_eval) is None


def test_unknown_bn_eval_names_the_three(data):
    with pytest.raises(ValueError, match="'runing': allowed are 'running', 'batch', 'recalibrated'"):
        engine.make_evaluate(toy.ALGORITHM, batch=4, bn_eval="runing")


def test_local_accuracy_gathers_each_clients_valid_rows(data):
    correct = np.random.default_rng(2).integers(0, 2, 23).astype(bool)
    want = [
        np.mean([correct[row - 60] for row in np.asarray(data.test[k])[: data.test_size[k]]]) for k in range(CLIENTS)
    ]
    np.testing.assert_allclose(engine.local_accuracy(jnp.asarray(correct), data), want, rtol=1e-6)


def test_summary_by_hand():
    accuracy = jnp.array([0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.4, 0.6, 0.8, 1.0, 0.0])
    got = engine.summary(accuracy)
    assert got["mean"] == pytest.approx(0.5)
    assert got["std"] == pytest.approx(np.sqrt(0.1))
    assert got["worst_tenth"] == pytest.approx(0.05)  # the lowest ceil(11 / 10) = 2
    assert engine.summary(accuracy[:10])["worst_tenth"] == pytest.approx(0.1)


def test_calibration_rows_come_from_the_rounds_cohort(data):
    chosen = np.asarray(cohort(SEED, 4, CLIENTS, 3))
    held = [row for k in chosen for row in np.asarray(data.train[k])[: data.train_size[k]]]
    rows, distinct = engine.draw(data, SEED, jnp.int32(4), 3, len(held))
    assert sorted(np.asarray(rows)) == sorted(held)
    assert distinct == len(held)
    more, distinct = engine.draw(data, SEED, jnp.int32(4), 3)
    np.testing.assert_array_equal(more, np.resize(rows, 2000))
    assert distinct == len(held)
    few, distinct = engine.draw(data, SEED, jnp.int32(4), 3, 2)
    np.testing.assert_array_equal(few, rows[:2])
    assert distinct == 2
    longer = data._replace(train=jnp.pad(data.train, ((0, 0), (0, 7))))  # how long the padding is says nothing
    np.testing.assert_array_equal(more, engine.draw(longer, SEED, jnp.int32(4), 3).rows)
    assert np.any(more != engine.draw(data, SEED, jnp.int32(5), 3).rows)


ROUND, COHORT = 9, 3


def programs_of(data, bn_eval: str, mesh=None, hosted=False, algorithm=toy.ALGORITHM) -> Programs:
    conduct = Conduct(
        rounds=9, seed=SEED, clients=CLIENTS, cohort=COHORT, batch=4, epochs=2, at_once=1, block=1, compile_ahead=0,
        client_states="auto", bn_eval=bn_eval, eval_batch=10, eval_every=0, adapt_every=0, final_adapt=True,
        checkpoint_every=1,
    )  # fmt: skip
    return Programs(algorithm, conduct, put_data(data, mesh), mesh, hosted, None, lambda text: None)


def start(mesh=None, hosted=False):
    return init_state(toy.ALGORITHM, SEED, CLIENTS, mesh, hosted)._replace(round=jnp.int32(ROUND))


@pytest.mark.parametrize("bn_eval", engine.BN_EVAL)
@pytest.mark.parametrize(("devices", "hosted"), [(1, False), (4, False), (1, True)])
def test_adapted_accuracy_is_each_clients_own_net_on_its_own_test_rows(data, bn_eval, devices, hosted):
    """In portions of a cohort, or of a device's part of one, which do not come to all clients without rest."""
    drawn = engine.draw(data, SEED, jnp.int32(ROUND - 1), COHORT)
    used = np.asarray(drawn.rows)[: int(drawn.distinct) // 10 * 10]
    assert 10 <= len(used) < drawn.distinct
    state, personalize = start(), jax.jit(toy.personalize)
    want = {}
    for name, steps in engine.depths(data, 4, 2).items():
        accuracy = []
        for k in range(CLIENTS):
            key = stream_key(SEED, "personal", ROUND, k)
            net = personalize(state.server, None, train_examples(data, k), key, jnp.int32(steps))
            rows = np.asarray(data.test[k])[: data.test_size[k]]
            image, label = np.asarray(data.image)[rows], np.asarray(data.label)[rows]
            mean = {
                "running": np.asarray(net.stats["mean"]),
                "batch": pixels(np.resize(image, (10, *image.shape[1:]))).mean(0),
                "recalibrated": pixels(data.image[used]).mean(0),
            }[bn_eval]
            accuracy.append(by_hand(net, image, label, mean)[0].mean())
        want[name] = engine.summary(jnp.array(accuracy))
    assert len({float(x["mean"]) for x in want.values()}) > 1
    mesh = None if devices == 1 else clients_mesh(devices)
    programs, state = programs_of(data, bn_eval, mesh, hosted), start(mesh, hosted)
    got = measure.adapted(programs, state)["local_accuracy_by_depth"]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), got, want)
    assert not any(x.is_deleted() for x in jax.tree.leaves(state) if isinstance(x, jax.Array))


def in_another_form(*given):
    return toy.personalize(*given)._replace(mix=jnp.ones(2))


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("changed", [{}, {"global_model": None}, {"personalize": in_another_form}])
def test_whatever_the_global_network_is_clients_answer_alike_and_programs_are_ready_before_them(data, devices, changed):
    """What was compiled from shapes alone is what is asked; a network of another form has a program of its own."""
    want = measure.adapted(programs_of(data, "recalibrated"), start())
    mesh = None if devices == 1 else clients_mesh(devices)
    programs = programs_of(data, "recalibrated", mesh, algorithm=toy.ALGORITHM._replace(**changed))
    state = put_state(start(mesh), mesh)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    programs.compile_ahead(told(shapes, mesh, False), ["evaluation", "adaptation"])
    got = measure.adapted(programs, state)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), got, want)
    assert (programs.spent_compiling() > 0) == ("personalize" in changed)


@pytest.mark.parametrize("bn_eval", engine.BN_EVAL[::2])
def test_without_a_step_of_adaptation_clients_fare_as_with_the_global_network(data, bn_eval):
    programs, state = programs_of(data, bn_eval), start()
    local = measure.networks(programs, state)["local_accuracy"]
    assert measure.adapted(programs, state)["local_accuracy_by_depth"]["none"] == pytest.approx(local, rel=1e-6)


def test_recalibrated_or_not_one_program_answers(data):
    programs, state = programs_of(data, "recalibrated"), start()
    net = state.server._replace(stats={"mean": state.server.stats["mean"] + 0.3})
    programs.accuracies(net, state)
    found = programs.server_accuracy_by("running", net, state)
    image, label = (np.asarray(x[data.central]) for x in (data.image, data.label))
    assert found == pytest.approx(by_hand(net, image, label, np.float64(net.stats["mean"]))[0].mean())
    assert {*programs._compiled} == {"evaluation"}


def test_what_is_asked_of_a_network_twice_recalibrates_it_once(data, monkeypatch):
    """And is what it is if it is asked by itself."""
    programs, state, distinct = programs_of(data, "recalibrated"), start(), []
    answers = Programs.answers

    def counted(self, net, rows, seen):
        distinct.append(int(seen.distinct))
        return answers(self, net, rows, seen)

    monkeypatch.setattr(Programs, "answers", counted)
    held = np.concatenate([rows[:n] for rows, n in zip(data.train, data.train_size, strict=True)])
    drawn = engine.draw(data, SEED, jnp.int32(ROUND - 1), COHORT)
    mean = pixels(data.image[drawn.rows[: int(drawn.distinct) // 10 * 10]]).mean(0)
    other = state.server._replace(params=jax.tree.map(lambda x: -x, state.server.params))
    for server in (state.server, other):
        one = measure.Candidate(programs, state, server)
        found = [one.server_accuracy(), one.training_accuracy()]
        assert found[0] == measure.Candidate(programs, state, server).server_accuracy()
        assert found[1] == measure.Candidate(programs, state, server).training_accuracy()
        net = toy.ALGORITHM.global_model(server)
        want = by_hand(net, np.asarray(data.image)[held], np.asarray(data.label)[held], mean)[0]
        assert found[1] == pytest.approx(want.mean())
    assert distinct == 2 * [int(drawn.distinct), 0, int(drawn.distinct), int(drawn.distinct)]
