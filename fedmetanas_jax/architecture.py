"""Which network a config asks for: a supernet, a MobileNetV3, or the discrete network of a genotype."""

import typing
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fedmetanas_jax.config import MOBILENETS, Config
from fedmetanas_jax.core import Model, SearchSpace
from fedmetanas_jax.data import sources
from fedmetanas_jax.models.darts import darts_space
from fedmetanas_jax.models.mobilenetv3 import mobilenetv3
from fedmetanas_jax.models.nasbench201 import nasbench201_space
from fedmetanas_jax.models.space import parts_of
from fedmetanas_jax.nas import genotype as genotypes
from fedmetanas_jax.options import UsageError


class Architecture(NamedTuple):
    """A network to hand to a method's factory, and what its file must say to make it again."""

    made: Model | SearchSpace
    kind: str  # as network.MAKERS has it
    arguments: dict  # of its maker, but for the type it computes in; JSON-able
    space: SearchSpace | None = None  # that it is of, if it is of one
    genotype: genotypes.Genotype | None = None  # of a discrete network


def searches(factory: Callable) -> bool:
    """Whether a method takes a search space, rather than one model, as its first argument."""
    return next(iter(typing.get_type_hints(factory).values())) is SearchSpace


def make_architecture(config: Config, dataset: sources.Dataset, factory: Callable, dtype) -> Architecture:
    """The network of `config` for a method. ValueError where the images do not suit it; UsageError where a
    genotype cannot be read or is not of config.space."""
    mean, std = sources.mean_std(config.dataset, dataset)
    shape, classes = dataset.train_images.shape[1:], len(dataset.label_names)
    common = {"shape": shape, "classes": classes, "mean": mean, "std": std}
    if not searches(factory) and config.network in MOBILENETS:
        arguments = common | {"stem": config.stem, "variant": MOBILENETS[config.network]}
        return Architecture(mobilenetv3(**arguments, dtype=dtype), "mobilenetv3", arguments)
    genotype = None if searches(factory) else read_genotype(config.network)
    parts = () if genotype is None else parts_of(genotype)
    arguments = common | {"width": config.width, "length": config.cells, "parts": parts}
    if config.space == "darts":
        # A genotype says itself how many nodes its cells have.
        arguments["nodes"] = config.nodes if genotype is None else len(next(iter(genotype.values())))
        space = darts_space(**arguments, dtype=dtype)
    else:
        space = nasbench201_space(**arguments, dtype=dtype)
    if genotype is None:
        return Architecture(space, config.space, arguments, space)
    try:
        plan = genotypes.to_plan(space.graph, genotype)
    except ValueError as error:
        where = f"config.network is {config.network!r}"
        raise UsageError(f"{where}, which is no network of config.space={config.space}: {error}") from None
    return Architecture(space.derive(plan), config.space, arguments, space, genotype)


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
