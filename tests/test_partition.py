"""Laws of who holds which images; the numbers are those of methods section 11.1."""

import json

import numpy as np
import pytest

from fedmetanas_jax import config
from fedmetanas_jax.data import partition as module
from fedmetanas_jax.data.manifest import record as manifest
from fedmetanas_jax.data.partition import KINDS, histogram, label_distance, majority_accuracy, partition
from fedmetanas_jax.data.picture import draw


def labels(classes, each, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), each))


TRAIN, TEST = labels(10, 500), labels(10, 100, 1)
SIZES = {"clients": 20, "train_size": 100, "test_size": 90}
ASKED = SIZES | {"concentration": 0.1, "tau": 4, "classes": 10, "seed": 1}


def deal(kind="dirichlet", train=TRAIN, test=TEST, **changes):
    return partition(kind, train, test, **(ASKED | changes))


def variation(a, b):
    """Mean total variation between rows of two histograms."""
    return float(label_distance(a, b).mean())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("label_skew")])
def test_every_client_has_its_distinct_images(kind):
    parts = deal(kind)
    for rows, size, total in ((parts.train, 100, len(TRAIN)), (parts.test, 90, len(TEST))):
        assert len(rows) == 20
        for own in rows:
            assert len(np.unique(own)) == len(own) == size
            assert 0 <= own.min() <= own.max() < total


@pytest.mark.parametrize("kind", KINDS)
def test_a_partition_is_a_function_of_its_seed(kind):
    a, b, c = (manifest(deal(kind, seed=seed), TRAIN, TEST, 10, {}) for seed in (1, 1, 2))
    assert a == b
    assert a["train"]["sha256"] != c["train"]["sha256"]
    assert a["test"]["sha256"] != c["test"]["sha256"]


@pytest.mark.parametrize("kind", ["dirichlet", "plato", "iid"])
def test_a_client_does_not_depend_on_how_many_there_are(kind):
    many, few = deal(kind), deal(kind, clients=3)
    for a, b in zip(many.train[:3] + many.test[:3], few.train + few.test, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["dirichlet", "dirichlet_disjoint", "plato"])
def test_training_and_test_images_follow_the_same_distribution(kind):
    parts = deal(kind, labels(10, 5000), labels(10, 1000), train_size=600, test_size=600)
    train, test = histogram(parts.train, labels(10, 5000), 10), histogram(parts.test, labels(10, 1000), 10)
    assert variation(train, test) < 0.06  # .04 to .05 expected: 600 draws, and test classes that run out
    assert variation(train, np.roll(test, 1, axis=0)) > 0.5  # of another client


@pytest.mark.parametrize("kind", ["dirichlet", "dirichlet_disjoint"])
def test_a_class_of_too_few_test_images_makes_a_client_have_fewer_in_all(kind):
    """As in the digits: 36 test images a class, of which many a client would want more."""
    train, test = labels(10, 144), labels(10, 36, 1)
    how = {"clients": 10, "train_size": 120, "concentration": 0.1}
    parts, roomy = (deal(kind, train, test, test_size=size, **how) for size in (60, 30))
    count, held = histogram(parts.train, train, 10), histogram(parts.test, test, 10)
    short = (60 * count > 36 * 120).any(1)
    assert 0 < short.sum() < 10
    sizes = [len(np.unique(own)) for own in parts.test]
    assert sizes == held.sum(1).tolist() == np.minimum(60, 36 * 120 // count.max(1)).tolist()
    exact = np.array(sizes)[:, None] * count / 120
    assert np.abs(held - exact)[short].max() < 1  # the shares, rounded to whole images
    assert [len(own) for own in roomy.test] == [30] * 10
    for a, b in zip(parts.train, roomy.train, strict=True):
        np.testing.assert_array_equal(a, b)


def test_labels_without_test_images_are_not_tested():
    train, test = np.repeat([0, 1, 2], 50), np.repeat([1, 2], 20)
    how = {"clients": 4, "train_size": 30, "test_size": 10, "classes": 3}
    parts = deal(train=train, test=test, **how, concentration=100.0)
    count = histogram(parts.train, train, 3) * [0, 1, 1]
    assert label_distance(count, histogram(parts.test, test, 3)).max() < 0.06
    with pytest.raises(ValueError, match="client 0 has training images of labels alone that no test image has"):
        deal(train=train[:50], test=test, **how)


def test_rows_are_in_random_order():
    parts = deal(train_size=1000, concentration=0.5)  # more than some classes have
    first = histogram([own[:500] for own in parts.train], TRAIN, 10)
    last = histogram([own[500:] for own in parts.train], TRAIN, 10)
    assert variation(first, last) < 0.08


def test_concentration_sets_the_skew():
    train = labels(10, 5000)
    largest = {}
    for concentration in (0.1, 0.3, 1000.0):
        parts = deal(train=train, clients=100, train_size=600, concentration=concentration)
        count = histogram(parts.train, train, 10)
        largest[concentration] = float((count.max(1) / 600).mean())
        if concentration == 0.1:
            assert (count > 0).sum(1).mean() == pytest.approx(4.8, abs=0.5)
    assert largest[0.1] == pytest.approx(0.67, abs=0.04)
    assert largest[0.3] == pytest.approx(0.47, abs=0.04)
    assert largest[1000.0] == pytest.approx(0.12, abs=0.02)


@pytest.mark.parametrize(
    ("kind", "concentration", "train_union", "test_union"),
    [("plato", 0.1, 5_637, 5_485), ("plato", 0.3, 3_964, 3_758), ("dirichlet", 0.1, 35_340, 9_990)],
)
def test_distinct_images_in_all(kind, concentration, train_union, test_union):
    train, test = labels(10, 5000), labels(10, 1000)
    parts = deal(kind, train, test, clients=100, train_size=600, test_size=600, concentration=concentration)
    assert len(np.unique(np.concatenate(parts.train))) == pytest.approx(train_union, rel=0.02)
    assert len(np.unique(np.concatenate(parts.test))) == pytest.approx(test_union, rel=0.02)


def test_plato_clients_take_the_first_of_one_list():
    parts = deal("plato")
    for c in range(10):
        held = [set(own[TRAIN[own] == c]) for own in parts.train]
        held.sort(key=len)
        assert all(small <= large for small, large in zip(held, held[1:], strict=False))


def test_disjoint_clients_share_no_training_image():
    train = labels(10, 500)
    parts = deal("dirichlet_disjoint", train, train_size=250)  # every image of the set
    assert np.array_equal(np.sort(np.concatenate(parts.train)), np.arange(5000))
    roomy = histogram(deal("dirichlet_disjoint", train_size=40).train, TRAIN, 10)
    free = histogram(deal("dirichlet", train_size=40).train, TRAIN, 10)
    assert variation(roomy, free) < 0.15  # the same p_k, as far as the images go


@pytest.mark.parametrize("kind", ["dirichlet", "plato"])
@pytest.mark.parametrize("classes", [10, 500])
def test_tiny_concentration_ends_and_takes_one_class_first(kind, classes):
    train, test = labels(classes, 5000 // classes), labels(classes, 1000 // classes)
    parts = deal(kind, train, test, concentration=0.001, classes=classes)
    count = histogram(parts.train, train, classes)
    assert (count.sum(1) == 100).all()
    full = count.max(1) == min(100, 5000 // classes)  # all of it, or the whole class before another
    assert full.mean() > 0.9
    assert len(np.unique(count.argmax(1))) > 5


def test_a_client_may_take_every_image():
    parts = deal(train_size=len(TRAIN), test_size=len(TEST), clients=2, concentration=0.001)
    for own in parts.train:
        assert np.array_equal(np.sort(own), np.arange(len(TRAIN)))


@pytest.mark.parametrize("tau", [1, 4, 8, 10])
def test_label_skew(tau):
    train, test = labels(10, 5000), labels(10, 1000)
    parts = deal("label_skew", train, test, clients=100, tau=tau)
    for rows, of in ((parts.train, train), (parts.test, test)):
        count = histogram(rows, of, 10)
        assert ((count > 0).sum(1) == tau).all()
        assert (count[np.arange(100), np.arange(100) % 10] > 0).all()
        assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(len(of)))  # all, and none twice
        for c in range(10):
            shares = count[count[:, c] > 0, c]
            assert shares.max() - shares.min() <= 1
        assert count.sum(1).mean() == len(of) / 100
    held = [histogram(rows, of, 10) > 0 for rows, of in ((parts.train, train), (parts.test, test))]
    assert np.array_equal(*held)


@pytest.mark.parametrize("tau", [1, 4])
def test_label_skew_of_a_size_is_a_part_of_the_whole(tau):
    whole, part = (deal(kind, tau=tau, test_size=49) for kind in ("label_skew", "label_skew_sized"))
    sizes = [len(own) for own in whole.train]
    assert min(sizes) > 100
    assert [len(own) for own in part.train] == [100] * 20
    assert [len(own) for own in part.test] == [min(49, len(own)) for own in whole.test]
    for side, of, images in ((part.train, whole.train, TRAIN), (part.test, whole.test, TEST)):
        assert all(set(mine) <= set(all_of_them) for mine, all_of_them in zip(side, of, strict=True))
        assert len(np.unique(np.concatenate(side))) == sum(map(len, side))
        # Whichever they are: a client's labels as often, but for chance, as in the whole.
        assert variation(histogram(side, images, 10), histogram(of, images, 10)) < 0.1


def test_label_skew_deals_out_only_labels_that_there_are():
    train, test = np.tile([1, 2, 4, 5], 30), np.tile([1, 2, 4], 10)
    parts = deal("label_skew", train, test, clients=5, tau=2, classes=7)
    counts = [histogram(*side, 7) for side in ((parts.train, train), (parts.test, test))]
    for count in counts:
        assert ((count > 0).sum(1) == 2).all()
        assert (count[np.arange(5), [1, 2, 4, 1, 2]] > 0).all()
    assert np.array_equal(counts[0] > 0, counts[1] > 0)


def test_label_skew_with_fewer_clients_than_classes_leaves_images_out():
    parts = deal("label_skew", clients=3, tau=1)
    count = histogram(parts.train, TRAIN, 10)
    assert np.array_equal(count, 500 * np.eye(3, 10, dtype=int))


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("dirichelt", {}, "no partition 'dirichelt'; there are dirichlet, dirichlet_disjoint"),
        ("dirichlet", {"clients": 0}, "clients is 0"),
        ("dirichlet", {"seed": -1}, "seed is -1"),
        ("dirichlet", {"train_size": 0}, "train_size is 0"),
        ("dirichlet", {"train_size": 5001}, "train_size is 5001; .* at most 5000"),
        ("iid", {"test_size": 1001}, "test_size is 1001; .* at most 1000"),
        ("dirichlet", {"concentration": 0.0}, "concentration is 0.0"),
        ("plato", {"concentration": -1.0}, "concentration is -1.0"),
        ("dirichlet", {"concentration": float("nan")}, "concentration is nan"),
        ("dirichlet", {"concentration": float("inf")}, "concentration is inf"),
        ("plato", {"seed": 0}, "seed is 0"),
        ("dirichlet_disjoint", {"train_size": 251}, "is 251; .* at most 250"),
        ("label_skew", {"tau": 0}, "tau is 0"),
        ("label_skew", {"tau": 11}, "tau is 11; with 10 classes it must be from 1 to 10"),
        ("label_skew", {"classes": 12, "tau": 11}, "with 10 classes that have training and test images"),
        ("label_skew", {"train": TRAIN[:60], "clients": 60}, "label 0 to .* clients, but it has . training images"),
        ("label_skew", {"clients": 2000, "tau": 1}, "without test images"),
    ],
)
def test_the_impossible_is_refused(kind, changes, said):
    with pytest.raises(ValueError, match=said) as caught:
        deal(kind, **changes)
    assert "\n" not in str(caught.value)


def test_histogram_and_majority_by_hand():
    train, test = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 2])
    rows = [np.array([0, 1, 2]), np.array([2, 3, 4])]
    count = histogram(rows, train, 3)
    assert count.tolist() == [[2, 1, 0], [0, 2, 1]]
    held = histogram([np.array([0, 1]), np.array([1, 2, 3])], test, 3)
    assert held.tolist() == [[1, 1, 0], [0, 2, 1]]
    assert majority_accuracy(count, held) == pytest.approx((1 / 2 + 2 / 3) / 2)
    np.testing.assert_allclose(label_distance(count, held), [1 / 6, 0], atol=1e-12)


def test_manifest_is_json_and_its_hash_is_of_the_rows():
    parts = deal()
    record = manifest(parts, TRAIN, TEST, 10, {"kind": "dirichlet", "seed": 1})
    assert json.loads(json.dumps(record)) == record
    assert record["parameters"] == {"kind": "dirichlet", "seed": 1}
    assert record["train"]["sizes"] == [100] * 20
    assert np.sum(record["test"]["histogram"]) == 20 * 90
    distance = record["label_distance"]
    assert len(distance["of_clients"]) == 20
    assert distance["mean"] == pytest.approx(np.mean(distance["of_clients"]))
    # The same images in other hands, or in another order, are another partition.
    first, second, *others = parts.train
    moved = parts._replace(train=[np.append(first, second[0]), second[1:], *others])
    turned = parts._replace(train=[first[::-1], second, *others])
    for other in (moved, turned):
        found = manifest(other, TRAIN, TEST, 10, {})
        assert found["train"]["sha256"] != record["train"]["sha256"]
        assert found["test"]["sha256"] == record["test"]["sha256"]


@pytest.mark.parametrize("classes", [3, 100])
def test_picture_is_written(tmp_path, classes):
    draw(np.ones((7, classes), int), tuple(f"class {c}" for c in range(classes)), tmp_path / "partition.png")
    assert (tmp_path / "partition.png").read_bytes().startswith(b"\x89PNG")


def test_config_and_partition_agree_on_the_least_concentration():
    assert config.LEAST_CONCENTRATION == module.LEAST_CONCENTRATION


def test_config_has_every_partition_and_knows_whose_sizes_are_given():
    assert config.PARTITIONS == (*KINDS, "natural")
    assert set(KINDS) - set(config.SIZED) == {"label_skew"}


# The first 16 digits of the SHA-256 of what deal() deals out. Whoever changes them changes every run there was.
DEALT = {
    "dirichlet": ("3f116f412d1eb2f7", "574f38453fc770ab"),
    "dirichlet_disjoint": ("45d2541b87393155", "41a87c7948f0bb90"),
    "plato": ("5df59e4771ede7f5", "476e39e94eb717fd"),
    "label_skew": ("6b54ff0ec20c8b38", "626b63f385bd0971"),
    "label_skew_sized": ("feafa8ee910b37d1", "626b63f385bd0971"),
    "iid": ("625b399ff0bdafc3", "19b3cf748b2f1761"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_partitions_are_those_of_earlier_versions(kind):
    record = manifest(deal(kind), TRAIN, TEST, 10, {})
    assert tuple(record[side]["sha256"][:16] for side in ("train", "test")) == DEALT[kind]
