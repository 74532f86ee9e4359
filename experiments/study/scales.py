"""At which size the paper's tables are made: paper, gpu, cpu, minutes. Imports no jax."""

import dataclasses
from typing import Any, NamedTuple

from fedmetanas_jax.config import Config
from fedmetanas_jax.tasks import TASKS
from study.paper import TABLES


class Scale(NamedTuple):
    """The size of a study."""

    about: str  # what it shows, and what not
    seeds: tuple[int, ...]
    base: Config
    datasets: dict[str, dict[str, Any]]  # {dataset: fields that differ from base}
    methods: dict[str, dict[str, Any]]  # {method: fields and options of its own}
    stands_for: dict[str, str]  # {dataset of the paper: the one that takes its place}, {} where none does
    partitions: dict[str, str] = {}  # {partition of a column: the one that takes its place}

    def fields(self, dataset: str) -> dict[str, Any]:
        """What differs from `base` for a data set."""
        return self.datasets.get(dataset, {})

    def columns(self, table: int) -> tuple[str, ...]:
        """The columns of a table; one of a data set that this scale does not have is left out."""
        found = TABLES[table].columns
        if self.stands_for:
            pairs = (column.partition(":") for column in found)
            found = tuple(f"{self.stands_for[of]}:{split}" for of, _, split in pairs if of in self.stands_for)
        return found


# At the default of 8 the logits of searches this short decide little (nas/schedule.py); FedMetaNAS's default is 40.
TRAVEL = {method: {"travel": 60.0} for method in ("fednas", "fedpnas")}
FIXED = ("fedavg", "fedprox", "scaffold", "ditto", "perfedavg", "fedrep", "fedbabu")
# On CIFAR-10 it is FedAvg's best of 0.03, 0.1 and 0.3 by local accuracy, chosen on training images alone
# (docs/results.md); the other methods' were not chosen. Nor were the searches' of scale gpu: 0.05, which its recorded
# runs had.
RATES = {method: {"lr": 0.1} for method in FIXED}
# Of 0.1, scale cpu's own, and 0.2 these are better with the latter on CIFAR-10, seed 0, which is not measured
# (docs/results.md), by server accuracy or, of those whose clients have networks of their own, by the accuracy of these.
# FedPNAS's was not chosen.
AT_02 = ("fedmetanas", "fednas", "feddsnas", "fedrlnas", "metafedpnas", "perfedrlnas")
CIFAR10 = {method: TRAVEL.get(method, {}) | {"lr": 0.2} for method in AT_02} | {"fedpnas": TRAVEL["fedpnas"]}
# On digits the best on seed 0, which is not measured (docs/results.md). Conventional methods: of 0.1, 0.3 and 0.6 by
# mean local accuracy; fedprox, scaffold and ditto have FedAvg's. Searches: of 0.05, 0.1, 0.2 and, where 0.2 was best,
# 0.4, by server accuracy or, of those whose clients have networks of their own, by the accuracy of these.
DIGITS = {method: {"lr": 0.6 if method == "fedrep" else 0.3} for method in FIXED} | {
    "fedmetanas": {"lr": 0.2},
    "fednas": {"lr": 0.1} | TRAVEL["fednas"],
    "feddsnas": {"lr": 0.2},
    "fedrlnas": {"lr": 0.1},
    "fedpnas": {"lr": 0.1} | TRAVEL["fedpnas"],
    "metafedpnas": {"lr": 0.2},
    "perfedrlnas": {"lr": 0.2},
    "metaperfedrlnas": {"lr": 0.4},
}

# With a fifth of the paper's clients label skew would deal each five times as many images as Dirichlet does: columns of
# one table would differ in training as well, by a factor of four.
AS_MANY = {"label_skew": "label_skew_sized"}

SCALES = {
    "paper": Scale(
        about="As printed: 100 clients, 5 of them a round, 5 epochs, 1,000 rounds, 16 channels and 8 cells, "
        "MobileNetV3-Large; every method with the paper-sized tasks' rate of 0.025. Wants a GPU.",
        seeds=(1, 2, 3, 4, 5),
        base=Config(),
        datasets={"mnist": {"augment": ()}},
        methods={},
        stands_for={},
    ),
    "gpu": Scale(
        about="The paper's data and splits at four times the training of scale cpu, for a GPU: 20 clients, 6 of them a "
        "round, 2 epochs, 300 rounds, 12 channels and 3 cells of 2 nodes, the tiny MobileNetV3. It shows how methods "
        "compare on real images at equal rounds, and what pruning costs there. Networks are a fiftieth of the paper's "
        "or less, and trained for much less: accuracies are far below the paper's.",
        seeds=(1, 2, 3),
        base=dataclasses.replace(
            TASKS["cifar10_small"](), devices=1, epochs=2, rounds=300, lr=0.05, eval_batch=250, checkpoint_every=50
        ),
        datasets={"mnist": {"augment": ()}},
        methods=TRAVEL | RATES,
        stands_for={},
        partitions=AS_MANY,
    ),
    "cpu": Scale(
        about="The paper's data and splits at the size of cifar10_small: 20 clients, 6 of them a round, one epoch, 150 "
        "rounds, 12 channels and 3 cells of 2 nodes, the tiny MobileNetV3; the rates of 0.1 and 0.2. It shows "
        "how methods compare early in training on real images, and what pruning costs. Accuracies are far below the "
        "paper's: what they differ by says how far a small network gets, not whether a method was reproduced.",
        seeds=(1, 2, 3),
        base=dataclasses.replace(TASKS["cifar10_small"](), devices=1, rounds=150, lr=0.1),
        datasets={"mnist": {"augment": ()}},
        methods=CIFAR10 | RATES,
        stands_for={},
        partitions=AS_MANY,
    ),
    "minutes": Scale(
        about="The bundled digits (8 x 8, 10 classes) in place of CIFAR-10; CIFAR-100 and MNIST have no stand-in. 10 "
        "clients, 5 of them a round, 2 epochs, 40 rounds, 8 channels and 3 cells of 2 nodes, the tiny MobileNetV3. It "
        "shows that every method trains, and what pruning costs. One image is 0.28 points, seeds differ by several "
        "points, and networks drawn at random do as well as what is searched for: it does not rank searches.",
        seeds=(1, 2, 3, 4, 5),
        # No smaller programs: those of the supernet are the same for all seeds of a method, which share them.
        base=dataclasses.replace(TASKS["digits_dir01"](), rounds=40, epochs=2, devices=1, compile_ahead=40),
        datasets={},
        methods=DIGITS,
        stands_for={"cifar10": "digits"},
    ),
}
