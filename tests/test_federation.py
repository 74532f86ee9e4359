"""A federation that is brought along: clients named by the data set, and another run's partition.json."""

import dataclasses
import json

import numpy as np
import pytest

from fedmetanas_jax import build
from fedmetanas_jax.config import PARTITIONS, Config, may_change, to_dict, validate
from fedmetanas_jax.data import manifest, sources
from fedmetanas_jax.data.dataset import DataError, Dataset
from fedmetanas_jax.data.federated import lengths
from fedmetanas_jax.data.natural import natural
from fedmetanas_jax.data.partition import Partition
from fedmetanas_jax.engine import identity
from fedmetanas_jax.engine.checkpoint import CheckpointError
from fedmetanas_jax.options import UsageError

TRAIN_IDS = np.array([7, 3, 7, 3, 3, 9, 7, 7, 1])
TEST_IDS = np.array([3, 9, 7, 3, 5])
CONFIG = Config(dataset="mine", clients=3, cohort=2, batch=4, train_size=4, test_size=3, seed=5)


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    monkeypatch.setattr(build.picture, "draw", lambda *_: None)  # matplotlib takes longer than all the rest


def dataset(**changes):
    """60 + 30 tiny images of three classes."""
    rng = np.random.default_rng(0)
    arrays = [x for n in (60, 30) for x in (rng.integers(0, 256, (n, 2, 2, 1), np.uint8), np.arange(n) % 3)]
    return Dataset(*arrays, ("a", "b", "c"))._replace(**changes)


OWNED = dataset(train_client=np.arange(60) ** 2 % 5, test_client=np.arange(30) % 5)  # of whom 0, 1 and 4 have both


def config(**changes):
    return dataclasses.replace(CONFIG, **changes)


def dealt(data=OWNED, least_rows=1, **changes):
    return build.deal(config(**changes), data, least_rows)


def left(folder, data=OWNED, **changes):
    """partition.json of a run."""
    build.describe(config(**changes), data, dealt(data, **changes), folder)
    return folder / "partition.json"


def refusal(kind, **arguments):
    with pytest.raises(kind) as caught:
        dealt(**arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def equal(a, b):
    return all(
        len(one) == len(two) and all(map(np.array_equal, one, two)) for one, two in zip(a[:2], b[:2], strict=True)
    )


def test_everybody_has_its_own_rows(caplog):
    parts, names = natural(TRAIN_IDS, TEST_IDS, clients=3, seed=1)
    assert names == [3, 7, 9]
    assert [sorted(own) for own in parts.train] == [[1, 3, 4], [0, 2, 6, 7], [5]]
    assert [sorted(own) for own in parts.test] == [[0, 3], [2], [1]]
    assert "1 client without training images (5); 1 client without test images (1)" in caplog.text
    named, text = natural(TRAIN_IDS.astype(str), TEST_IDS.astype(str), clients=3, seed=1)
    assert text == ["3", "7", "9"]
    assert equal(named, parts)


def test_rows_are_in_random_order_by_the_seed():
    ids = np.repeat([0, 1], 50)
    first, again, other = (natural(ids, ids, clients=2, seed=seed)[0] for seed in (1, 1, 2))
    assert equal(first, again)
    assert not equal(first, other)
    assert np.any(np.diff(first.train[0]) < 0)


def test_fewer_clients_are_a_sample_with_the_same_rows():
    ids = np.arange(200) % 20
    everybody, _ = natural(ids, ids, clients=20, seed=1)
    some, names = natural(ids, ids, clients=6, seed=1)
    assert names == sorted(set(names))
    for side in (0, 1):
        for rows, name in zip(some[side], names, strict=True):
            assert np.array_equal(rows, everybody[side][name])
    assert names != natural(ids, ids, clients=6, seed=2)[1]


def test_more_clients_than_there_are_are_refused():
    with pytest.raises(ValueError, match="clients is 4, but 3 clients have training and test .*without test"):
        natural(TRAIN_IDS, TEST_IDS, clients=4, seed=1)
    with pytest.raises(ValueError, match="clients is 1, but 0 clients have"):
        natural(np.arange(3), np.arange(3, 5), clients=1, seed=1)
    said = refusal(UsageError, data=dataset(), partition="natural")
    assert said == "config.partition is natural, but mine has no train_client and test_client, so no clients"
    said = refusal(UsageError, partition="natural", least_rows=13)
    assert said.startswith("a client has 12 training images, but fedmetanas needs 13 of every client")


def test_splits_and_seeds_have_arrays_of_one_length():
    found = set()
    for partition, seed in (("dirichlet", 1), ("label_skew", 1), ("label_skew", 2), ("natural", 1)):
        how = {"partition": partition, "tau": 2, "seed": seed}
        data = build.federate(config(**how), OWNED, dealt(**how))
        found.add((data.train.shape, data.test.shape))
    assert found == {((3, 64), (3, 16))}  # 16 and 4 batches of 4


def test_where_clients_have_more_than_a_few_batches_lengths_are_what_was_asked_for_or_powers_of_two():
    train, test = ([np.arange(n) for n in sizes] for sizes in ((30, 70), (9, 19)))
    parts = Partition(train, test)
    assert lengths(parts, (70, 25), True, 4) == (70, 25)
    assert lengths(parts, (0, 0), True, 4) == (70, 19)
    assert lengths(parts, (0, 0), False, 4) == (128, 32)  # 18 batches, 5 batches
    assert lengths(parts, (0, 0), False, 1) == (128, 32)


def test_what_a_file_says_of_its_dealing_deals_nothing(tmp_path):
    path = left(tmp_path)
    record = json.loads(path.read_text())
    record["parameters"] |= {"train_size": 10**15, "test_size": "many"}  # which no hash covers
    path.write_text(json.dumps(record))
    how = config(partition=str(path))
    data = build.federate(how, OWNED, build.deal(how, OWNED, 1))
    assert (data.train.shape, data.test.shape) == ((3, 64), (3, 16))


def test_shares_name_the_server_the_largest_client_and_not_how_long_arrays_are(tmp_path, monkeypatch):
    from types import SimpleNamespace

    import shares

    monkeypatch.setattr(sources, "load", lambda *_: dataset())
    monkeypatch.setattr(build, "make_phases", lambda *_: ([], None))
    monkeypatch.setattr(build, "first_algorithm", lambda _: SimpleNamespace(least_rows=1))
    asked = SimpleNamespace(config=config(), data_dir=None)
    assert shares.write(asked, tmp_path) == ""
    asked.config = config(partition="label_skew", tau=2)
    sizes = [max(map(len, rows)) for rows in dealt(dataset(), partition="label_skew", tau=2)[:2]]
    assert shares.write(asked, tmp_path) == "--config.train_size={} --config.test_size={}".format(*sizes)
    with np.load(tmp_path / "client-0.npz") as file:
        assert len(file["train_images"]) <= sizes[0]


def test_a_natural_federation_is_padded_and_named(tmp_path):
    parts = dealt(partition="natural")
    data = build.federate(config(partition="natural"), OWNED, parts)
    assert data.train_size.tolist() == [12, 24, 24]
    assert data.train.shape == (3, 64)
    assert data.test.shape == (3, 16)
    for client, name in enumerate((0, 1, 4)):
        assert np.all(OWNED.train_client[np.asarray(data.train[client])] == name)
        assert np.all(OWNED.test_client[np.asarray(data.test[client]) - 60] == name)
    record = json.loads(left(tmp_path, partition="natural").read_text())
    assert record["parameters"]["client_names"] == [0, 1, 4]
    assert record["train"]["sizes"] == [12, 24, 24]


@pytest.mark.parametrize("kind", PARTITIONS)
def test_a_runs_partition_can_be_dealt_again(tmp_path, kind):
    path = left(tmp_path / "a", partition=kind, tau=2)
    parts = dealt(partition=kind, tau=2)
    how = {"seed": 9, "train_size": 30, "partition": str(path)}  # which have no say
    again = dealt(dataset() if kind != "natural" else OWNED, **how)
    assert equal(again, parts)
    assert left(tmp_path / "b", **how).read_text() == path.read_text()
    first = build.federate(config(partition=kind, tau=2), OWNED, parts)
    second = build.federate(config(**how), OWNED, again)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_of_other_rows_is_another_run(tmp_path):
    paths = [left(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    path, moved = tmp_path / "partition.json", tmp_path / "moved.json"
    found = []
    for source, file in ((paths[0], path), (paths[0], moved), (paths[1], path)):
        file.write_bytes(source.read_bytes())
        mine = config(partition=str(file))
        data = build.federate(mine, OWNED, build.deal(mine, OWNED, 1))
        found.append(identity.of(to_dict(mine), may_change(mine), data))
    identity.check(found[0], found[1], tmp_path)  # a file that has moved deals out the same rows
    with pytest.raises(CheckpointError, match="of another run: the rows of the clients are not the same"):
        identity.check(found[0], found[2], tmp_path)


def test_a_partition_that_does_not_fit_is_refused(tmp_path):
    path = left(tmp_path)
    about = {"partition": str(path)}
    assert "config.clients is 2, but" in refusal(UsageError, clients=2, **about)
    other = dataset(test_labels=np.arange(30)[::-1] % 3)
    assert "the test labels are not those of this data set" in refusal(DataError, data=other, **about)
    shorter = dataset(train_labels=np.arange(59) % 3)
    assert "the training labels are not those" in refusal(DataError, data=shorter, **about)
    assert "no file to read (No such file" in refusal(UsageError, partition=str(tmp_path / "none.json"))
    (tmp_path / "folder.json").mkdir()
    assert "no regular file" in refusal(DataError, partition=str(tmp_path / "folder.json"))
    assert "cannot be read" in refusal(DataError, partition="a\0.json")


def damaged(change):
    """A change of the record -> one of its text."""

    def changed(text):
        record = json.loads(text)
        change(record)
        return json.dumps(record)

    return changed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[:100], "no partition that a run could deal out again"),
        (lambda text: "[]", "no partition that a run could deal out again"),
        (lambda text: "[" * 100_000, "no partition that a run could deal out again"),
        (lambda text: text.replace("{", "{ä", 1).encode("latin-1"), "cannot be read"),
        (damaged(lambda d: d.pop("test")), "KeyError: 'test'"),
        (damaged(lambda d: [d[side].pop("labels_sha256") for side in ("train", "test")]), "older versions"),
        (damaged(lambda d: d["train"].pop("sha256")), "damaged: its training rows are not those that were dealt"),
        (damaged(lambda d: d["test"]["rows"].reverse()), "damaged: its test rows are not those that were dealt"),
        (damaged(lambda d: d["test"]["rows"].append("x")), "no partition that a run could deal out again"),
        (damaged(lambda d: d["test"]["rows"].append("9" * 50)), "no partition that a run could deal out again"),
        (damaged(lambda d: d["test"].update(rows=[[1]])), "no partition that a run could deal out again"),
        (damaged(lambda d: d.update(parameters=3)), "no partition that a run could deal out again"),
    ],
)
def test_a_damaged_partition_is_one_line(tmp_path, change, said):
    path = left(tmp_path)
    changed = change(path.read_text())
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    message = refusal(DataError, partition=str(path))
    assert said in message
    assert str(path)[:60] in message  # which may be cut


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        ([[0, 60]], [[1]], "client 0 has training rows that are not from 0 to 59"),
        ([[0, -1]], [[1]], "client 0 has training rows that are not from 0 to 59"),
        ([[0]], [[]], "client 0 has no test rows"),
        ([[0], [1]], [[1]], "2 clients have training rows, but 1 test rows"),
        ([], [], "it has no clients"),
    ],
)
def test_rows_that_no_run_deals_out_are_refused_whatever_their_hash(tmp_path, train, test, said):
    sides = [[np.array(own, np.int64) for own in side] for side in (train, test)]
    record = {"parameters": {}}
    for name, rows in zip(("train", "test"), sides, strict=True):
        labels = manifest._sha256([getattr(OWNED, f"{name}_labels")])
        text = [" ".join(map(str, own)) for own in rows]
        record[name] = {"rows": text, "sha256": manifest._sha256(rows), "labels_sha256": labels}
    path = tmp_path / "partition.json"
    path.write_text(json.dumps(record))
    assert said in refusal(DataError, partition=str(path))


def test_the_name_of_a_partition():
    for name in ("natural", "iid", "runs/a/partition.json", "mine.json"):
        validate(config(partition=name))
    with pytest.raises(UsageError, match="no choice 'natrual'; did you mean 'natural'.*or a run's partition.json"):
        validate(config(partition="natrual"))
    with pytest.raises(UsageError, match="config.partition is .*at most 255 bytes"):
        validate(config(partition="x" * 300 + ".json"))
    validate(config(partition="natural", clients=200_000, train_size=10_740))  # its sizes are what they are


def test_mnists_owners_are_cut_as_its_images_are(monkeypatch):
    monkeypatch.setattr(sources, "MNIST_TRAIN", 50)
    used = sources._as_used("mnist", OWNED)
    assert (len(used.train_labels), len(used.train_client), len(used.test_client)) == (50, 50, 30)
    assert sources._as_used("mnist", dataset()).train_client is None
    assert Partition([], []).dealing == {}
