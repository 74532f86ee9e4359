"""Which runs a table is made of: a row, a column and a seed are a Config, and a Config is a run.

A row is METHOD or METHOD+NAME=VALUE+..., where NAME is an option of the method or a field of Config: fedmetanas+M=0,
fedavg+network=genotype.json, mine+lr=0.1. Two tables that ask for the same Config share its run.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fedmetanas_jax.config import MAY_CHANGE, Config, from_dict, to_dict, validate
from fedmetanas_jax.engine.identity import fixed
from fedmetanas_jax.files import to_json, write_json
from fedmetanas_jax.options import UsageError, default_options, nearest, option_types, parse_options, parse_value
from study import columns
from study.scales import Scale

FIELDS = {field.name: field.type for field in dataclasses.fields(Config)}
# What --methods, --seeds and --columns say.
TAKEN = ("method", "options", "seed", "dataset", "partition", "concentration", "tau")


class Run(NamedTuple):
    """One run of a study."""

    name: str  # of its folder
    row: str
    column: str
    config: Config


def run(scale: Scale, row: str, column: str, seed: int, overrides: dict) -> Run:
    """The run of a cell. overrides: fields of Config for all runs. UsageError names what cannot be."""
    from fedmetanas_jax.algorithms import ALGORITHMS

    method, *assignments = row.split("+")
    if method not in ALGORITHMS:
        raise UsageError(f"methods: {nearest('method', method, ALGORITHMS)}")
    factory = ALGORITHMS[method]
    known = option_types(factory)
    options = default_options(factory)
    fields = scale.fields(column.partition(":")[0]) | columns.fields(column)
    fields["partition"] = scale.partitions.get(fields["partition"], fields["partition"])
    given = scale.methods.get(method, {})
    fields |= {name: value for name, value in given.items() if name in FIELDS}
    options |= {name: value for name, value in given.items() if name not in FIELDS}
    fields |= overrides
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"methods: '{row}' is not METHOD+NAME=VALUE")
        try:
            if name in known:
                options |= parse_options(factory, {name: text})
            elif name in FIELDS and name not in TAKEN:
                fields[name] = parse_value(text, FIELDS[name])
            else:
                names = [*known, *(field for field in FIELDS if field not in TAKEN)]
                raise UsageError(nearest("option or field", name, names))
        except UsageError as error:
            raise UsageError(f"methods: {row}: {error}") from None
    config = dataclasses.replace(scale.base, **fields, method=method, options=options, seed=seed)
    validate(config)
    return Run(name_of(row, column, config), row, column, config)


def name_of(row: str, column: str, config: Config) -> str:
    """A folder's name that says what it is, and by eight hexadecimal digits of a hash that it is nothing else."""
    identity = to_json(fixed(to_dict(config), MAY_CHANGE))
    said = re.sub(r"[^A-Za-z0-9.=+]+", "-", f"{row}-{column}")[:80]
    return f"{said}-seed{config.seed}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def in_order(runs: Iterable[Run]) -> list[Run]:
    """Each once, searches first: with what compiles quickly a process that has no work left at the end of a study can
    help for next to nothing."""
    from fedmetanas_jax.algorithms import ALGORITHMS
    from fedmetanas_jax.architecture import searches

    once = {run.name: run for run in runs}.values()
    return sorted(once, key=lambda run: not searches(ALGORITHMS[run.config.method]))


def write(study: Path, runs: list[Run]) -> None:
    """Adds runs to a study: a file each, so that several processes can add at once."""
    for one in runs:
        path = study / "plan" / f"{one.name}.json"
        if not path.exists():
            write_json(path, {"row": one.row, "column": one.column, "config": to_dict(one.config)})


def read(study: Path) -> list[Run]:
    """All runs that were ever asked for in this study. UsageError where there is no study, or a file is damaged."""
    paths = sorted((study / "plan").glob("*.json"))
    if not paths:
        raise UsageError(f"{study} is no study: it has no plan/*.json")
    found = []
    for path in paths:
        try:
            plain = json.loads(path.read_text())
            found.append(Run(path.stem, plain["row"], plain["column"], from_dict(plain["config"])))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is damaged ({error}); without it the run is left out") from None
    return found
