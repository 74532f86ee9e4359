"""Which client holds which images (methods section 11; D-1).

A client's label distribution is p_k ~ Dirichlet(concentration): small values leave it few classes. Every
choice is a function of the seed and the client, so client 7 is the same whether there are 10 clients or 100.
"""

from typing import NamedTuple

import numpy as np

# Weights of labels as far apart as a smaller concentration makes them leave no digits for the random choice among
# images of one label, so all clients would get the same ones.
LEAST_CONCENTRATION = 1e-6
KINDS = ("dirichlet", "dirichlet_disjoint", "plato", "label_skew", "label_skew_sized", "iid")


class Partition(NamedTuple):
    """Rows of the data set, client by client, each client's in random order."""

    train: list[np.ndarray]  # one [n_k] int64 per client, rows of the training images
    test: list[np.ndarray]  # one [m_k] int64 per client, rows of the test images
    dealing: dict = {}  # what says how they were dealt, its "kind" among it: the "parameters" of partition.json


def partition(
    kind: str,
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    *,
    clients: int,
    train_size: int,
    test_size: int,
    concentration: float,
    tau: int,
    classes: int,
    seed: int,
) -> Partition:
    """Deals the images out to `clients` clients; labels are [n] and [m] integers below `classes`.

    - dirichlet: each client draws train_size distinct training and test_size distinct test images, an image
      with weight p_k[its label], without replacement and independently of the other clients, who may draw the
      same image. Where a class of training images runs out the draw goes on with the others. Where a class has too few
      test images for test_size in the shares of a client's training labels, the client has fewer in all: as many as
      there are in these shares (D-55).
    - dirichlet_disjoint: as dirichlet, but no training image goes to two clients; they take turns in random
      order, so that nobody is left with what nobody wanted. The test draw follows the classes a client got, with fewer
      images where one has too few.
    - plato: as dirichlet, but all clients draw along one order of the images, so those who want n and n'
      images of a class get the first n and n' of one list, and p_k comes from numpy's legacy generator seeded
      with seed * (client + 1): few distinct images in all (methods section 11.1). Where a class runs out, of test
      images too, the draw goes on with the others, as Plato's does.
    - label_skew: of the classes that have training and test images client c holds number c, from the start again after
      the last, and tau - 1 random others; every class is split evenly and disjointly over its holders, training and
      test images alike. The sizes follow from that: train_size and test_size are not used.
    - label_skew_sized: as label_skew, but a client keeps at most train_size and test_size of its images, at random.
    - iid: as dirichlet, with the same weight for every image.

    Raises ValueError for what cannot be dealt.
    """
    if kind not in KINDS:
        raise ValueError(f"no partition {kind!r}; there are {', '.join(KINDS)}")
    if clients < 1:
        raise ValueError(f"clients is {clients}; it must be at least 1")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more")
    if kind == "label_skew":
        return _label_skew(train_labels, test_labels, clients, tau, classes, seed)
    _check_size("train_size", train_size, len(train_labels))
    _check_size("test_size", test_size, len(test_labels))
    if kind == "label_skew_sized":
        whole = _label_skew(train_labels, test_labels, clients, tau, classes, seed)
        sides = (whole.train, train_size), (whole.test, test_size)
        return Partition(*([rows[:size] for rows in side] for side, size in sides))  # they are in random order
    if kind == "iid":
        log_p = np.zeros((clients, classes))
    elif not LEAST_CONCENTRATION <= concentration < np.inf:
        raise ValueError(f"concentration is {concentration}; it must be finite and at least {LEAST_CONCENTRATION}")
    elif kind == "plato" and not 0 < seed * clients < 2**32:
        most = (2**32 - 1) // clients
        raise ValueError(f"plato seeds a client with seed * client: seed is {seed}, not from 1 to {most}")
    else:
        log_p = np.stack([_log_p(kind, concentration, classes, seed, client) for client in range(clients)])
    shared = kind == "plato"
    if kind == "dirichlet_disjoint":
        _check_size("train_size of disjoint clients", train_size, len(train_labels) // clients)
        train = _deal(log_p, train_labels, train_size, seed)
        log_p = np.log(np.maximum(histogram(train, train_labels, classes), np.finfo(float).tiny))
    else:
        train = _draw(log_p, train_labels, train_size, seed, _TRAIN, shared)
    held = histogram(train, train_labels, classes) if kind.startswith("dirichlet") else None
    return Partition(train, _draw(log_p, test_labels, test_size, seed, _TEST, shared, held))


def histogram(rows: list[np.ndarray], labels: np.ndarray, classes: int) -> np.ndarray:
    """Images of every class at every client: [clients, classes] int64."""
    return np.stack([np.bincount(labels[own], minlength=classes) for own in rows])


def majority_accuracy(train_histogram: np.ndarray, test_histogram: np.ndarray) -> float:
    """Mean local accuracy, in [0, 1], of always answering the class a client has most training images of.

    Local accuracies are to be read against this number: about .67 for CIFAR-10 at concentration 0.1.
    """
    guess = np.argmax(train_histogram, axis=1)
    right = np.take_along_axis(test_histogram, guess[:, None], axis=1)[:, 0]
    return float(np.mean(right / test_histogram.sum(axis=1)))


def label_distance(train_histogram: np.ndarray, test_histogram: np.ndarray) -> np.ndarray:
    """[clients], from 0 to 1: the total variation distance of a client's training and test label shares.

    A client's accuracies are of what it learnt where this is about what drawing so few images leaves by chance.
    """
    train, test = (count / count.sum(axis=1, keepdims=True) for count in (train_histogram, test_histogram))
    return np.abs(train - test).sum(axis=1) / 2


_CLASSES, _TRAIN, _TEST, _SHARED = 1, 2, 3, 4  # what a stream of random numbers is for


def _rng(seed: int, purpose: int, client: int = 0) -> np.random.Generator:
    """One stream for each purpose, so that no draw depends on how many numbers another one took."""
    return np.random.default_rng([seed, purpose, client])


def _log_p(kind: str, concentration: float, classes: int, seed: int, client: int) -> np.ndarray:
    """log of p_k up to a constant, [classes], finite.

    Dirichlet weights are gamma variates; below about 0.01 most underflow to 0. The log of such a variate is,
    far down, an exponential of rate `concentration`, which has no memory: the missing tail is drawn anew.
    """
    if kind == "plato":
        rng = np.random.RandomState(seed * (client + 1))
    else:
        rng = _rng(seed, _CLASSES, client)
    gamma = rng.standard_gamma(concentration, classes)
    tiny = np.finfo(float).tiny
    tail = np.log(tiny) - rng.exponential(1 / concentration, classes)
    return np.where(gamma >= tiny, np.log(np.maximum(gamma, tiny)), tail)


def _draw(log_p: np.ndarray, labels: np.ndarray, size: int, seed: int, purpose: int, shared: bool, held=None) -> list:
    """`size` distinct rows per client, weighted by p[label], without replacement.

    The rows with the largest log weight + Gumbel noise are such a draw (the Gumbel-top-k trick), in one pass
    that ends whatever the weights. Sharing the noise among clients is Plato's shared generator state. Given training
    images `held` [clients, classes], fewer rows where `size` cannot be had in their shares.
    """
    common = _rng(seed, _SHARED + purpose).gumbel(size=len(labels)) if shared else None
    rows = []
    for client, weight in enumerate(log_p):
        rng = _rng(seed, purpose, client)
        noise = common if shared else rng.gumbel(size=len(labels))
        best = np.argpartition(weight[labels] + noise, len(labels) - size)[len(labels) - size :]
        if held is not None:
            best = _in_shares(best, held[client], labels, noise, client)
        rows.append(rng.permutation(np.sort(best)))
    return rows


def _in_shares(best: np.ndarray, held: np.ndarray, labels: np.ndarray, noise: np.ndarray, client: int) -> np.ndarray:
    """The rows `best`, if there are so many rows in the shares of `held` [classes]; else the most there are, rounded to
    whole ones. Of every class those drawn first, as in `best`. A class without any rows is left out of the shares.
    """
    there = np.bincount(labels, minlength=len(held))
    if np.all(len(best) * held <= there * held.sum()):
        return best
    held = np.where(there > 0, held, 0)
    if not held.any():
        raise ValueError(f"client {client} has training images of labels alone that no test image has")
    total, mine = held.sum(), held > 0
    size = min(len(best), np.min(there[mine] * total // held[mine]))
    count, rest = np.divmod(size * held, total)  # what has no rest is not rounded up, so it is there
    count[np.argsort(-rest, kind="stable")[: size - count.sum()]] += 1
    order = np.argsort(-noise)
    return np.concatenate([order[labels[order] == c][:n] for c, n in enumerate(count)])


def _deal(log_p: np.ndarray, labels: np.ndarray, size: int, seed: int) -> list:
    """`size` rows per client, no row twice: each turn takes a class by p_k among those with images left."""
    clients, classes = log_p.shape
    rng = _rng(seed, _TRAIN)
    decks = [rng.permutation(np.flatnonzero(labels == c)).tolist() for c in range(classes)]
    left = np.array([0.0 if deck else -np.inf for deck in decks])
    rows = [[] for _ in range(clients)]
    for client in rng.permutation(np.repeat(np.arange(clients), size)):
        chosen = int(np.argmax(log_p[client] + rng.gumbel(size=classes) + left))
        rows[client].append(decks[chosen].pop())
        if not decks[chosen]:
            left[chosen] = -np.inf
    return [rng.permutation(own) for own in rows]


def _label_skew(train_labels, test_labels, clients: int, tau: int, classes: int, seed: int) -> Partition:
    there = np.intersect1d(train_labels, test_labels)
    if not 1 <= tau <= len(there):
        some = "" if len(there) == classes else " that have training and test images"
        raise ValueError(f"tau is {tau}; with {len(there)} classes{some} it must be from 1 to {len(there)}")
    rng = _rng(seed, _CLASSES)
    holders = [[] for _ in range(classes)]
    for client in range(clients):
        first = client % len(there)
        others = np.delete(there, first)
        for c in (there[first], *rng.choice(others, tau - 1, replace=False)):
            holders[c].append(client)
    sides = []
    for labels, purpose in ((train_labels, _TRAIN), (test_labels, _TEST)):
        rng = _rng(seed, purpose)
        pieces = [[] for _ in range(clients)]
        for c in range(classes):
            images = rng.permutation(np.flatnonzero(labels == c))
            if purpose == _TRAIN and len(images) < len(holders[c]):
                raise ValueError(
                    f"label_skew gives label {c} to {len(holders[c])} clients, but it has {len(images)} training "
                    "images: take fewer clients, or a smaller tau"
                )
            shares = np.array_split(images, max(len(holders[c]), 1))
            for client, share in zip(rng.permutation(holders[c]), shares, strict=False):
                pieces[int(client)].append(share)
        rows = [rng.permutation(np.concatenate(own)) for own in pieces]
        sides.append(rows)
        empty = [client for client, own in enumerate(rows) if len(own) == 0]
        if empty:
            raise ValueError(f"label_skew leaves client {empty[0]} without test images: take fewer clients")
    return Partition(*sides)


def _check_size(name: str, size: int, most: int) -> None:
    if not 1 <= size <= most:
        raise ValueError(f"{name} is {size}; it must be at least 1, and the images allow at most {most}")
