"""Which network a config asks for: a supernet, a MobileNetV3, or the discrete network of a genotype."""

import math
import os
import stat
import typing
from collections.abc import Callable
from typing import NamedTuple

import jax

from fedmetanas_jax.config import MOBILENETS, MOST_NODES, Config
from fedmetanas_jax.core import Model, SearchSpace
from fedmetanas_jax.data import sources
from fedmetanas_jax.models.darts import darts_space
from fedmetanas_jax.models.mobilenetv3 import mobilenetv3
from fedmetanas_jax.models.nasbench201 import nasbench201_space
from fedmetanas_jax.models.space import parts_of
from fedmetanas_jax.nas import genotype as genotypes
from fedmetanas_jax.options import UsageError, brief, parse_path

MOST_GENOTYPE = 2**24  # bytes of a file; one with operations of their own for 1,000 cells of 64 nodes has a fifth


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
    genotype cannot be read or is not of config.space, and for weights that this machine's memory cannot hold."""
    mean, std = sources.mean_std(config.dataset, dataset)
    shape, classes = dataset.train_images.shape[1:], len(dataset.label_names)
    common = {"shape": shape, "classes": classes, "mean": mean, "std": std}
    if not searches(factory) and config.network in MOBILENETS:
        arguments = common | {"stem": config.stem, "variant": MOBILENETS[config.network]}
        return Architecture(mobilenetv3(**arguments, dtype=dtype), "mobilenetv3", arguments)
    genotype = None if searches(factory) else read_genotype(config.network)
    try:
        parts = () if genotype is None else parts_of(genotype)
    except ValueError as error:  # numbers of thousands of digits
        where = f"config.network is {brief(config.network)!r}"
        raise UsageError(f"{where}, which holds no genotype: {brief(error)}") from None
    arguments = common | {"width": config.width, "length": config.cells, "parts": parts}
    if config.space == "darts":
        # A genotype says itself how many nodes its cells have.
        arguments["nodes"] = config.nodes if genotype is None else len(next(iter(genotype.values())))
        if arguments["nodes"] > MOST_NODES:
            raise UsageError(
                f"config.network is {config.network!r}, whose cells have {arguments['nodes']} nodes; at most "
                f"{MOST_NODES} are allowed"
            )
        space = darts_space(**arguments, dtype=dtype, in_turn=config.at_once in (-1, 1))
    else:
        space = nasbench201_space(**arguments, dtype=dtype)
    if genotype is None:
        every = [[list(range(len(space.graph.ops)))] * len(space.graph.edges)] * len(space.graph.cell_types)
        _check_memory(config, space.make(every).init)
        return Architecture(space, config.space, arguments, space)
    try:
        plan = genotypes.to_plan(space.graph, genotype)
    except ValueError as error:
        where = f"config.network is {config.network!r}"
        raise UsageError(f"{where}, which is no network of config.space={config.space}: {error}") from None
    model = space.derive(plan)
    _check_memory(config, model.init)
    return Architecture(model, config.space, arguments, space, genotype)


def _check_memory(config: Config, init: Callable) -> None:
    """UsageError for weights larger than the machine's memory, before anything tries to allocate them."""
    params, _ = jax.eval_shape(init, jax.random.key(0))
    needed = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(params))  # float32
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UsageError(
            f"the network's weights take {needed / 1e9:,.0f} GB, but this machine has {there / 1e9:,.0f} GB of memory: "
            f"make config.width ({config.width}) or config.cells ({config.cells}) smaller"
        )


def read_genotype(path: str) -> genotypes.Genotype:
    """The architecture in a genotype.json that a search left. UsageError where there is none."""
    file = parse_path("config.network", path)
    try:
        about = file.stat()  # of what is no regular file, reading might never end
        if not stat.S_ISREG(about.st_mode) or about.st_size > MOST_GENOTYPE:
            raise ValueError("it is no regular file" if about.st_size <= MOST_GENOTYPE else "it is too large for one")
        return genotypes.from_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(MOBILENETS)
        raise UsageError(
            f"config.network is {brief(path)!r}, neither one of {known} nor a genotype file to read ({error.strerror})"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"config.network is {brief(path)!r}, which holds no genotype: {brief(error, 200)}") from None
