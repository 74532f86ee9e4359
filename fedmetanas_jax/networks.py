"""Which network a config asks for: the supernet, a MobileNetV3, or the discrete network of a genotype."""

import typing
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from fedmetanas_jax.config import MOBILENETS, Config
from fedmetanas_jax.core import Model, SearchSpace
from fedmetanas_jax.data import sources
from fedmetanas_jax.models.cell import How
from fedmetanas_jax.models.darts import darts_space
from fedmetanas_jax.models.discrete import discrete_network
from fedmetanas_jax.models.mobilenetv3 import mobilenetv3
from fedmetanas_jax.nas import genotype as genotypes
from fedmetanas_jax.options import UsageError

# How a DARTS network is computed, by the name config.supernet has for it (results/formulations.md).
WAYS = {
    "auto": None,  # what suits the backend and the live operations
    "remat": How(),
    "stored": How(remat=False),
    "batched": How(remat=False, batched=True),
    "batched-remat": How(batched=True),
    "pallas": How(remat=False, batched=True, kernel="pallas"),
}


class Network(NamedTuple):
    """A network to hand to a method's factory, and what its file must say to make it again."""

    made: Model | SearchSpace
    kind: str  # "darts" or "mobilenetv3"
    arguments: dict  # of its maker, but for the type it computes in; JSON-able
    genotype: genotypes.Genotype | None = None  # of a discrete network


def searches(factory: Callable) -> bool:
    """Whether a method takes a search space, rather than one model, as its first argument."""
    return next(iter(typing.get_type_hints(factory).values())) is SearchSpace


def make_network(config: Config, dataset: sources.Dataset, factory: Callable, dtype) -> Network:
    """The network of `config` for a method. ValueError where the images do not suit it; UsageError where a
    genotype cannot be read."""
    mean, std = sources.mean_std(config.dataset, dataset)
    shape, classes = dataset.train_images.shape[1:], len(dataset.label_names)
    common = {"shape": shape, "classes": classes, "mean": mean, "std": std}
    how = WAYS[config.supernet]
    if config.supernet == "pallas" and jax.default_backend() != "gpu":
        raise UsageError(f"config.supernet=pallas needs a GPU; this is a {jax.default_backend()}")
    darts = common | {"width": config.width, "length": config.cells}
    if searches(factory):
        arguments = darts | {"nodes": config.nodes}
        return Network(darts_space(**arguments, how=how, dtype=dtype), "darts", arguments)
    if config.network in MOBILENETS:
        arguments = common | {"stem": config.stem, "variant": MOBILENETS[config.network]}
        return Network(mobilenetv3(**arguments, dtype=dtype), "mobilenetv3", arguments)
    genotype = read_genotype(config.network)
    nodes = len(genotype.normal)
    arguments, keep = darts | {"nodes": nodes}, genotypes.to_keep(genotype, nodes)
    mix = genotypes.to_mix(genotype, nodes)
    model = discrete_network(**arguments, how=how, keep=keep, mix=mix, dtype=dtype)
    return Network(model, "darts", arguments, genotype)


def read_genotype(path: str) -> genotypes.Genotype:
    """The architecture in a genotype.json that a search left."""
    try:
        return genotypes.from_json(Path(path).expanduser().read_text())
    except OSError as error:
        known = ", ".join(MOBILENETS)
        raise UsageError(
            f"config.network is {path!r}, neither one of {known} nor a genotype file to read ({error.strerror})"
        ) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UsageError(f"config.network is {path!r}, which holds no genotype: {error}") from None
