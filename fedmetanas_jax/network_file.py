"""What a network's file holds: reading it, and finding out whether it is one, before anything is compiled.

Somebody else's file may hold anything. Whatever is wrong with it is said here, in one line, so that a network that
was loaded computes. Bytes are not read before their number is known, and nothing is built of numbers out of bounds.
"""

import inspect
import io
import json
import math
import os
import stat
import typing
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedmetanas_jax.config import MOST_CELLS, MOST_NODES, MOST_WIDTH
from fedmetanas_jax.core import Graph
from fedmetanas_jax.options import brief, fits, wanted

MOST_BYTES = 2**32  # of a file, and of what it unpacks to: a thousand million numbers
MOST_HEADER = 2**24  # bytes
MOST = {"shape": 2**14, "classes": 2**20, "width": MOST_WIDTH, "length": MOST_CELLS, "nodes": MOST_NODES}


class NetworkError(ValueError):
    """A file that holds no network, or images it cannot take; the message is one line."""


def read(path: str | Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(header, arrays by name) of the file. NetworkError where it is none or damaged; what they say is not checked."""
    try:
        # A pipe or a device has no end, and opening a pipe waits for somebody to write into it.
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):
            raise NetworkError(f"{path} is no network file, since it is no regular file")
        with zipfile.ZipFile(path) as file:
            size = max(about.st_size, sum(info.file_size for info in file.infolist()))
            if size > MOST_BYTES:
                raise NetworkError(f"{path} has {size} bytes; a network file has at most {MOST_BYTES}")
            # ZipFile.read verifies the checksum of every array.
            arrays = {name.removesuffix(".npy"): _array(file.read(name)) for name in file.namelist()}
        header = arrays.pop("header")
        if header.ndim or header.dtype.kind != "U" or header.nbytes > MOST_HEADER:
            raise ValueError(f"its header is {header.dtype} {header.shape}, no text")
        header = json.loads(str(header))
    except NetworkError:
        raise
    except FileNotFoundError:
        raise NetworkError(f"there is no network file {path}") from None
    except Exception as error:  # damage shows as nearly any exception of zipfile, zlib, numpy, json and the system
        said = " ".join(brief(error, 200).split())
        raise NetworkError(f"{path} is no network file, or a damaged one ({type(error).__name__}: {said})") from error
    if not isinstance(header, dict):
        raise NetworkError(f"{path} is no network file: its header is {brief(header)}")
    return header, arrays


def _array(data: bytes) -> np.ndarray:
    """The array of an .npy file's bytes. ValueError unless they are as many as its head says, so that nothing is
    allocated for numbers that are not there."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    head = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran, dtype = head(file)
    if dtype.hasobject or len(data) - file.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{dtype} {shape} is not what the file holds")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")


def check_arguments(maker: Callable, arguments) -> dict:
    """The arguments of a header as those of the maker: lists as tuples. NetworkError for one that the maker has not,
    lacks, or that has another type or is out of bounds."""
    if not isinstance(arguments, dict):
        raise NetworkError(f"arguments is {brief(arguments)}, not names with values")
    taken, kinds = inspect.signature(maker).parameters, typing.get_type_hints(maker)
    for name in arguments:
        if name not in taken or name not in kinds:  # what has no annotation is no number or text
            raise NetworkError(f"the network has no argument {brief(name)!r}")
    if lacking := [name for name, one in taken.items() if one.default is one.empty and name not in arguments]:
        raise NetworkError(f"arguments lacks {', '.join(lacking)}")
    values = {name: tuple(x) if isinstance(x, list) else x for name, x in arguments.items()}
    for name, value in values.items():
        if not fits(value, kinds[name]):
            raise NetworkError(f"argument {name} is {brief(value)}, not {wanted(kinds[name])}")
        if name in MOST and not all(1 <= x <= MOST[name] for x in (value if isinstance(value, tuple) else (value,))):
            raise NetworkError(f"argument {name} is {brief(value)}; it must be from 1 to {MOST[name]}")
    for name in ("mean", "std"):
        if len(values[name]) != values["shape"][2]:
            raise NetworkError(f"argument {name} has {len(values[name])} numbers for {values['shape'][2]} channels")
    if min(values["std"]) < 1e-30:  # float32 may take less for 0, and images are divided by it
        raise NetworkError(f"argument std is {brief(values['std'])}; it must be at least 1e-30")
    return values


def check_plan(graph: Graph, plan) -> None:
    """NetworkError unless `plan` is one of the graph: [cell types][edges] -> ascending operations."""
    if not isinstance(plan, list) or len(plan) != len(graph.cell_types):
        raise NetworkError(f"the plan is {brief(plan)}, not a list of {len(graph.cell_types)} cells")
    for cell in plan:
        if not isinstance(cell, list) or len(cell) != len(graph.edges):
            raise NetworkError(f"a cell of the plan is {brief(cell)}, not a list of {len(graph.edges)} edges")
        for ops in cell:
            sound = isinstance(ops, list) and all(type(k) is int and 0 <= k < len(graph.ops) for k in ops)
            if not sound or ops != sorted({*ops}):
                most = len(graph.ops) - 1
                raise NetworkError(f"an edge of the plan is {brief(ops)}, not ascending operations from 0 to {most}")


def check_names(names, classes: int) -> None:
    """NetworkError unless there is one name per class."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise NetworkError(f"label_names is {brief(names)}, not a list of texts")
    if len(names) != classes:
        raise NetworkError(f"there are {len(names)} label_names for {classes} classes")


def check_arrays(arrays: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> None:
    """NetworkError unless the arrays have these names and shapes, and are finite float32; variances not negative."""
    for name in sorted({*arrays} ^ {*shapes}):
        said = f"lacks the array {name}" if name in shapes else f"has an array too many, {brief(name)}"
        raise NetworkError(f"it {said}")
    for name, x in arrays.items():
        if x.dtype != np.float32 or x.shape != shapes[name]:
            raise NetworkError(f"{name} is {x.dtype} {x.shape}; the network has float32 {shapes[name]}")
        if not np.isfinite(x).all():
            raise NetworkError(f"{name} holds numbers that are not finite")
        if name.startswith("stats/") and name.endswith("/var") and x.min(initial=0) < 0:
            raise NetworkError(f"{name} holds negative variances")
