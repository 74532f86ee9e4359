"""A small federation that every method can be run on: six clients of separable 8 x 8 images."""

import jax.numpy as jnp
import numpy as np
from toy_model import toy_model
from toy_space import toy_space

from fedmetanas_jax.algorithms import ALGORITHMS
from fedmetanas_jax.architecture import searches
from fedmetanas_jax.build import first_algorithm as first_of
from fedmetanas_jax.build import one_phase
from fedmetanas_jax.core import Algorithm, FederatedData, Phase, Setting
from fedmetanas_jax.models.darts import darts_space
from fedmetanas_jax.models.mobilenetv3 import mobilenetv3

CLIENTS, COHORT, CLASSES = 6, 3, 4
SETTING = Setting(
    rounds=60, epochs=3, batch=4, augment=lambda key, image: image, share=COHORT / CLIENTS, clients=CLIENTS
)
SHAPE = {"shape": (8, 8, 1), "classes": CLASSES, "mean": (0.5,), "std": (0.25,)}
NAMES = sorted(ALGORITHMS)
# Gradients of the toy space are so large that FedPNAS at its own rate of 0.01 diverges within 15 rounds for some seeds
# (3 and 6 of 3 to 8): its correction grows with their third power.
CALM = {"fedpnas": {"task_lr": 0.001}}


def federation(seed: int = 0) -> FederatedData:
    """A class lights up its own quarter of the image; clients hold 17 to 26 of 100 training images."""
    rng = np.random.default_rng(seed)
    label = np.arange(130) % CLASSES
    image = rng.integers(0, 100, (130, 8, 8, 1))
    for n, quarter in enumerate(label):
        row, column = 4 * (quarter // 2), 4 * (quarter % 2)
        image[n, row : row + 4, column : column + 4] += 120
    size = np.array([17, 26, 20, 24, 18, 25])
    train = np.stack([np.resize(rng.permutation(100)[:n], 26) for n in size])
    test = np.stack([100 + rng.permutation(30)[:8] for _ in size])
    return FederatedData(
        image=jnp.asarray(image, jnp.uint8),
        label=jnp.asarray(label, jnp.int32),
        train=jnp.asarray(train, jnp.int32),
        train_size=jnp.asarray(size, jnp.int32),
        test=jnp.asarray(test, jnp.int32),
        test_size=jnp.full(CLIENTS, 8, jnp.int32),
        central=jnp.arange(100, 130, dtype=jnp.int32),
    )


def phases(
    name: str, setting: Setting = SETTING, nodes: int = 2, real: bool | None = None, in_turn: bool = False, **options
) -> list[Phase]:
    """The method's phases over a small network; 2 nodes are the fewest that have pairs to choose from.

    FedAvg stands for all that train a fixed network on a real one, a MobileNetV3; the others, which differ from it in
    what they do with gradients and parts, have small dense networks, which compile ten times faster. `real`: whether a
    method that searches does it on a supernet of the DARTS space, `in_turn` for clients one after another; None: only
    FedMetaNAS.
    """
    factory, options = ALGORITHMS[name], CALM.get(name, {}) | options
    if searches(factory) and not (name == "fedmetanas" if real is None else real):
        network, setting = toy_space(classes=CLASSES), setting._replace(clip=5.0)
    elif searches(factory):
        network = darts_space(**SHAPE, width=4, length=1, nodes=nodes, in_turn=in_turn)
        setting = setting._replace(clip=5.0)
    elif name == "fedavg":
        network = mobilenetv3(**SHAPE, variant="tiny")
    else:
        network = toy_model(classes=CLASSES, hidden=8, centred=True)
    made = factory(network, setting, **options)
    return one_phase(made) if isinstance(made, Algorithm) else made


def first_algorithm(name: str, setting: Setting = SETTING, **options) -> Algorithm:
    """The algorithm of the method's first rounds."""
    return first_of(phases(name, setting, **options))
