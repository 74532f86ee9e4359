"""The paper's Tables 1 to 5: which methods and columns they have, what is measured, and the numbers as printed.

Huang and Gao, FedMetaNAS, arXiv 2504.06457. Accuracies in percent; the paper does not say what its +- is, probably the
spread over clients; hours are the paper's "Time". A column is DATASET:SPLIT, as in columns.py.
"""

from typing import NamedTuple

CIFAR10, CIFAR100, MNIST = "cifar10:dir0.1", "cifar100:dir0.1", "mnist:dir0.1"
LABELS = {
    "fedavg": "FedAvg", "fedprox": "FedProx", "scaffold": "SCAFFOLD", "ditto": "Ditto", "perfedavg": "per-FedAvg",
    "fedrep": "FedRep", "fedbabu": "FedBABU", "fednas": "FedNAS", "feddsnas": "FedDSNAS", "fedrlnas": "FedRLNAS",
    "fedmetanas": "FedMetaNAS", "fedpnas": "FedPNAS", "metafedpnas": "meta-FedPNAS", "perfedrlnas": "PerFedRLNAS",
    "metaperfedrlnas": "meta-PerFedRLNAS", "fedrandom": "random network",
}  # fmt: skip


def label(row: str) -> str:
    """A row of a table as a reader has it: "FedMetaNAS, M=0"."""
    method, *assignments = row.split("+")
    return ", ".join([LABELS.get(method, method), *assignments])


class Table(NamedTuple):
    """A table of the paper."""

    title: str
    methods: tuple[str, ...]
    columns: tuple[str, ...]
    figures: tuple[str, ...]  # of outcome.FIGURES: what it shows; the first is the table's accuracy
    paper: dict[str, dict[str, dict[str, float]]]  # {method: {column: {figure: printed; "std", "hours"}}}


def _cells(columns: tuple[str, ...], names: tuple[str, ...], rows: dict[str, tuple[float, ...]]) -> dict:
    """Rows as printed, the numbers of one column after those of the other -> Table.paper."""
    width = len(names)
    return {
        method: {
            column: dict(zip(names, numbers[width * place : width * (place + 1)], strict=True))
            for place, column in enumerate(columns)
        }
        for method, numbers in rows.items()
    }


CONVENTIONAL = ("fedavg", "perfedavg", "fedrep", "fedbabu", "fedmetanas")
SEARCHES = ("fednas", "feddsnas", "fedrlnas", "fedmetanas")
PERSONAL = ("fednas", "fedmetanas", "fedpnas", "metafedpnas", "perfedrlnas", "metaperfedrlnas")
BOTH, DATASETS = (CIFAR10, CIFAR100), (CIFAR10, MNIST, CIFAR100)
SPLITS = ("cifar10:dir0.3", CIFAR10, "cifar10:tau8", "cifar10:tau4")
TIMED = ("server", "std", "hours")
_FEDMETANAS = {"fedmetanas": (81.65, 5.72, 7.12, 64.75, 4.47, 7.35)}  # of Tables 1 and 2

TABLES = {
    1: Table(
        "Conventional federated methods: accuracy on the server's test images",
        CONVENTIONAL,
        BOTH,
        ("server",),
        _cells(BOTH, TIMED, {
            "fedavg": (70.93, 7.01, 6.81, 49.02, 6.21, 6.17),
            "perfedavg": (70.13, 8.24, 7.6, 50.31, 6.48, 7.69),
            "fedrep": (74.51, 6.14, 7.47, 51.23, 5.28, 7.33),
            "fedbabu": (73.67, 6.35, 7.07, 52.77, 5.64, 6.85),
        } | _FEDMETANAS),
    ),
    2: Table(
        "Federated architecture search: accuracy on the server's test images",
        SEARCHES,
        BOTH,
        ("server",),
        _cells(BOTH, TIMED, {
            "fednas": (79.31, 5.23, 19.47, 58.52, 4.86, 20.42),
            "feddsnas": (80.27, 6.16, 8.08, 64.13, 4.28, 8.19),
            "fedrlnas": (80.71, 5.48, 7.23, 63.89, 5.33, 7.51),
        } | _FEDMETANAS),
    ),
    3: Table(
        "Pruning: accuracy on the server's test images before and after",
        ("fednas", "fedmetanas"),
        DATASETS,
        ("before", "after", "prune_drop", "largest_drop", "cut_at_once", "server"),
        _cells(DATASETS, ("before", "after"), {
            "fednas": (79.31, 67.26, 98.60, 83.46, 58.52, 11.26),
            "fedmetanas": (81.65, 81.65, 98.67, 98.66, 64.75, 64.753),
        }),
    ),
    4: Table(
        "Splits: accuracy on the server's test images",
        SEARCHES,
        SPLITS,
        ("server",),
        _cells(SPLITS, ("server", "std"), {
            "fednas": (80.32, 5.64, 79.31, 5.23, 78.22, 5.86, 74.34, 6.94),
            "feddsnas": (81.44, 5.89, 80.27, 6.16, 79.19, 6.01, 77.86, 6.58),
            "fedrlnas": (81.25, 5.54, 80.71, 5.48, 80.48, 5.76, 78.59, 6.47),
            "fedmetanas": (82.43, 5.29, 81.65, 5.72, 81.08, 5.68, 78.73, 6.23),
        }),
    ),
    5: Table(
        "Personalisation: mean accuracy on the clients' own test images",
        PERSONAL,
        BOTH,
        ("own", "local", "majority"),
        # What the first two rows are of is open: an un-adapted network for everybody fits their numbers best.
        _cells(BOTH, ("local", "std", "hours"), {
            "fednas": (78.69, 5.76, 19.47, 58.11, 4.86, 20.42),
            "fedmetanas": (81.24, 5.42, 7.12, 64.45, 4.47, 7.35),
        }) | _cells(BOTH, ("own", "std", "hours"), {
            "fedpnas": (81.01, 5.79, 10.29, 63.65, 4.81, 10.02),
            "metafedpnas": (81.87, 5.57, 9.57, 64.98, 4.96, 9.66),
            "perfedrlnas": (81.72, 5.32, 7.29, 64.71, 4.74, 7.18),
            "metaperfedrlnas": (82.36, 5.50, 7.15, 65.16, 4.17, 6.97),
        }),
    ),
}  # fmt: skip
