"""The named tasks: a Config each, what it reaches, how long it takes and the command. Imports no jax."""

from collections.abc import Callable

from fedmetanas_jax.config import Config


def cifar10_dir01() -> Config:
    """CIFAR-10, 100 clients, Dirichlet 0.1: the paper's hardest CIFAR-10 split by Dirichlet.

    A search of 75 rounds in a run of 150 was made on one NVIDIA H200, at 3.4 s a round, and two rounds of one local
    epoch on two CPU cores (docs/results.md); the whole was never run.
    python experiments/main.py --config=cifar10_dir01
    """
    return Config()


def cifar10_dir03() -> Config:
    """CIFAR-10, 100 clients, Dirichlet 0.3: the paper's milder Dirichlet split.

    Not run to the end yet: what it reaches and how long it takes is not known.
    python experiments/main.py --config=cifar10_dir03
    """
    return Config(concentration=0.3)


def cifar10_tau8() -> Config:
    """CIFAR-10, 100 clients with 8 of the 10 labels each: the paper's milder label skew.

    Not run to the end yet: what it reaches and how long it takes is not known.
    python experiments/main.py --config=cifar10_tau8
    """
    return Config(partition="label_skew", tau=8)


def cifar10_tau4() -> Config:
    """CIFAR-10, 100 clients with 4 of the 10 labels each: the paper's harder label skew.

    Not run to the end yet: what it reaches and how long it takes is not known.
    python experiments/main.py --config=cifar10_tau4
    """
    return Config(partition="label_skew", tau=4)


def cifar100_dir01() -> Config:
    """CIFAR-100, 100 clients, Dirichlet 0.1: the paper's setting.

    Not run to the end yet: what it reaches and how long it takes is not known.
    python experiments/main.py --config=cifar100_dir01
    """
    return Config(dataset="cifar100")


def mnist_dir01() -> Config:
    """MNIST, 100 clients, Dirichlet 0.1, no augmentation: the paper's setting.

    Not run to the end yet: what it reaches and how long it takes is not known.
    python experiments/main.py --config=mnist_dir01
    """
    return Config(dataset="mnist", augment=())


def cifar10_small() -> Config:
    """CIFAR-10 for a CPU: the real images with 20 clients, a reduced supernet and fewer rounds.

    Reached 48.5 % server accuracy, the same after pruning, in 55 minutes on two CPU cores; docs/results.md.
    python experiments/main.py --config=cifar10_small
    """
    return Config(
        clients=20,
        cohort=6,
        rounds=240,
        epochs=1,
        batch=16,
        lr=0.2,
        width=12,
        cells=3,
        nodes=2,
        network="mobilenetv3_tiny",
        devices=-1,
        bn_eval="recalibrated",
        eval_batch=50,  # a CPU takes less time for it than for large ones
        eval_every=10,
    )


def digits_dir01() -> Config:
    """The bundled 8x8 handwritten digits, 10 clients, Dirichlet 0.1: the whole search in minutes on a CPU.

    Reached 90.0 % server accuracy in 3 min 2 s on two CPU cores, compiling included; docs/results.md.
    python experiments/main.py --config=digits_dir01
    """
    return Config(
        dataset="digits",
        clients=10,
        train_size=120,
        test_size=60,
        rounds=90,
        batch=16,
        augment=(),
        lr=0.05,
        width=8,
        cells=3,
        nodes=2,
        network="mobilenetv3_tiny",
        devices=-1,
        eval_every=5,
        bn_eval="recalibrated",
    )


TASKS: dict[str, Callable[[], Config]] = {
    task.__name__: task
    for task in (
        digits_dir01,
        cifar10_small,
        cifar10_dir01,
        cifar10_dir03,
        cifar10_tau8,
        cifar10_tau4,
        cifar100_dir01,
        mnist_dir01,
    )
}
