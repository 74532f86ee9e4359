"""What server and clients agree on: all that a client must know to make the server's programs for itself."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedmetanas_jax import build
from fedmetanas_jax.config import MAY_CHANGE, MOBILENETS, Config, from_dict, to_dict, validate
from fedmetanas_jax.core import Phase
from fedmetanas_jax.data import sources
from fedmetanas_jax.data.dataset import Dataset
from fedmetanas_jax.engine.identity import fixed
from fedmetanas_jax.files import to_json, write_text
from fedmetanas_jax.options import UsageError

MOST_SIDE, MOST_CLASSES, MOST_ROWS = 4096, 1 << 16, 1 << 24  # that a client believes a server


class Terms(NamedTuple):
    """They are sent in the welcome and hashed; nothing in them is of one client."""

    config: dict  # as `config.to_dict`, with compute decided
    image: list[int]  # [h, w, c]
    classes: int
    mean: list[float]  # of each channel, in 0 to 1
    std: list[float]
    genotype: str | None = None  # the text of the file that config.network names, if it names one


def of(config: Config, dataset: Dataset, compute: str) -> Terms:
    """What the server of a run tells. compute: the type that the run computes in, "auto" resolved."""
    mean, std = sources.mean_std(config.dataset, dataset)
    plain = json.loads(to_json(to_dict(config) | {"compute": compute}))
    named = None if config.network in MOBILENETS else Path(config.network).read_text(encoding="utf-8")
    shape = list(dataset.train_images.shape[1:])
    return Terms(plain, shape, len(dataset.label_names), list(mean), list(std), named)


def run_of(terms: Terms) -> str:
    """The name of the run: a hash of all that makes it this one. How a run is run has no part in it."""
    plain = terms._asdict() | {"config": fixed(terms.config, MAY_CHANGE)}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read(plain: dict) -> Terms:
    """The terms that a server sent. UsageError for what can be none."""
    try:
        terms = Terms(**plain)
        sides, numbers = list(terms.image), [*terms.mean, *terms.std]
        good = len(sides) == 3 and all(type(side) is int and 0 < side <= MOST_SIDE for side in sides)
        good &= type(terms.classes) is int and 0 < terms.classes <= MOST_CLASSES
        good &= all(type(x) is float and math.isfinite(x) for x in numbers) and len(numbers) == 2 * sides[2]
        good &= terms.genotype is None or type(terms.genotype) is str
    except (TypeError, IndexError):
        good = False
    if not good:
        raise UsageError("the server's terms are none that this version understands")
    config_of(terms)
    return terms


def config_of(terms: Terms) -> Config:
    """UsageError for a config that can be none."""
    config = from_dict(terms.config)
    validate(config)
    if config.train_size > MOST_ROWS or config.test_size > MOST_ROWS:
        raise UsageError(f"the server's config asks for more than {MOST_ROWS} images of a client")
    return config


def phases_of(terms: Terms, workdir: Path) -> list[Phase]:
    """The method's phases, as the server has them, without a look at any images. UsageError where they cannot be made
    here."""
    config = config_of(terms)
    if terms.genotype is not None:
        path = workdir / "genotype.json"
        write_text(path, terms.genotype)
        config = dataclasses.replace(config, network=str(path))
    nothing, labels = np.zeros((1, *terms.image), np.uint8), np.zeros(1, np.int32)
    names = tuple(str(label) for label in range(terms.classes))
    channels = tuple(terms.mean), tuple(terms.std)
    dataset = Dataset(nothing, labels, nothing, labels, names, channels=channels)
    return build.make_phases(config, dataset)[0]
