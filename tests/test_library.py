"""The package as a library: a whole run as one call."""

import numpy as np
import pytest
import toy_study

import fedmetanas_jax as fm
from fedmetanas_jax import build
from fedmetanas_jax.data import sources
from fedmetanas_jax.options import UsageError

IMAGES = np.full((50, 4, 4, 1), np.arange(50)[:, None, None, None], np.uint8)
LABELS = np.arange(50) % 5


@pytest.fixture
def asked(monkeypatch):
    """What `build.run` was asked for; nothing runs."""
    found = {}

    def run(config, *, task, workdir, data_dir, command):
        found.update(config=config, data=sources.load(config.dataset, data_dir))
        toy_study.run(config, task=task, workdir=workdir, data_dir=data_dir)

    monkeypatch.setattr(build, "run", run)
    return found


def test_a_call_is_a_run_on_the_images_it_was_given(asked, tmp_path):
    found = fm.search(IMAGES, LABELS, method="fedavg", workdir=tmp_path, rounds=3, clients=5, cohort=2, seed=4)
    config, data = asked["config"], asked["data"]
    assert (config.method, config.rounds, config.clients, config.options["server"]) == ("fedavg", 3, 5, "mean")
    assert (len(data.train_images), len(data.test_images)) == (40, 10)
    both = np.concatenate([data.train_images, data.test_images])[:, 0, 0, 0]
    assert sorted(both) == sorted(IMAGES[:, 0, 0, 0])  # each is in one of the two
    labels = np.concatenate([data.train_labels, data.test_labels])
    assert dict(zip(both.tolist(), labels.tolist(), strict=True)) == dict(
        zip(IMAGES[:, 0, 0, 0].tolist(), LABELS.tolist(), strict=True)
    )
    assert found.result["server_accuracy"] == pytest.approx(0.543)
    assert [line["round"] for line in found.records] == [1, 2, 3]
    assert (found.network, repr(found)) == (None, f"Found({tmp_path}, server accuracy 0.543)")


def test_test_images_of_ones_own_are_taken_as_they_are(asked, tmp_path):
    how = {"test_images": IMAGES[:7], "test_labels": LABELS[:7], "label_names": tuple("abcde"), "workdir": tmp_path}
    fm.search(IMAGES, LABELS, method="fedavg", **how)
    data = asked["data"]
    assert (len(data.train_images), data.label_names) == (50, tuple("abcde"))
    np.testing.assert_array_equal(data.test_images, IMAGES[:7])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"task": "digit"}, "no task 'digit'"),
        ({"method": "fedavgg"}, "did you mean 'fedavg'"),
        ({"roundes": 3}, "did you mean 'rounds'"),
        ({"options": {"N": 1}}, "no fedmetanas option 'N'"),
        ({"test_images": IMAGES}, "belong together"),
        ({"labels": LABELS[:9]}, "there are 50 images, but 9 labels"),
        ({"labels": 5}, "images are to be"),
        ({"rounds": 0}, "config.rounds is 0; it must be at least 1"),
        ({"labels": LABELS / 2}, "train_labels is float64"),
    ],
)
def test_what_cannot_be_is_said_and_leaves_nothing(how, message, tmp_path):
    labels = how.pop("labels", LABELS)
    with pytest.raises((UsageError, sources.DataError), match=message):
        fm.search(IMAGES, labels, workdir=tmp_path / "run", **how)
    assert not (tmp_path / "run").exists()


def test_the_package_has_what_it_says_and_nothing_else():
    assert fm.load is fm.load
    assert fm.search is fm.search  # and not a module of that name
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        _ = fm.serach
