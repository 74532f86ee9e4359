"""A column of a table: a data set and how it is split, as DATASET:SPLIT.

SPLIT is dir0.1 (Dirichlet of that concentration), disjoint0.1 or plato0.1 (its two variants), tau4 (so many labels a
client), iid, or natural (to the clients that the data set names).
"""

import re

from fedmetanas_jax.options import UsageError

SPLITS = {"dir": "dirichlet", "disjoint": "dirichlet_disjoint", "plato": "plato"}
WHOLE = {"iid": "IID", "natural": "everybody's own"}
NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "mnist": "MNIST"}


def fields(column: str) -> dict:
    """The Config fields it stands for. UsageError where it is none."""
    dataset, colon, split = column.partition(":")
    found = re.fullmatch(r"(dir|disjoint|plato)([0-9.]+(?:e-?[0-9]+)?)|tau([0-9]{1,9})|(iid|natural)", split)
    try:
        if dataset and colon and found:
            kind, concentration, tau, whole = found.groups()
            if kind:
                return {"dataset": dataset, "partition": SPLITS[kind], "concentration": float(concentration)}
            if tau:
                return {"dataset": dataset, "partition": "label_skew", "tau": int(tau)}
            return {"dataset": dataset, "partition": whole}
    except ValueError:  # dir0.1.2
        pass
    raise UsageError(f"columns: '{column}' is not DATASET:SPLIT with a SPLIT like dir0.1, tau4, iid or natural")


def head(column: str) -> str:
    """As a reader has it: "CIFAR-10, Dirichlet 0.1"."""
    dataset, _, split = column.partition(":")
    words = {"dir": "Dirichlet ", "disjoint": "Dirichlet, disjoint, ", "plato": "Dirichlet, Plato's, "}
    kind = next((kind for kind in words if split.startswith(kind)), None)
    if kind:
        said = words[kind] + split.removeprefix(kind)
    else:
        said = f"{split.removeprefix('tau')} labels a client" if split.startswith("tau") else WHOLE.get(split, split)
    return f"{NAMES.get(dataset, dataset)}, {said}"
