"""What bad clients and what privacy cost: accuracy under each aggregate and attack, and under noise with its epsilon.

    python experiments/attacks.py --config=digits_dir01 --config.rounds=40 --config.lr=0.3 --out=results/mine

Bad clients: all clients train in every round, and the first --attackers of them send something else than they learnt:
flip, their change with the other sign; scale, a million times it; random, Gaussian numbers of ten times its norm. All
parts of a change are replaced. Each of --attacks meets each of --aggregates on each of --partitions.

Privacy: each of --noise is the multiplier of Gaussian noise on changes clipped to --noise_clip, among the clients of
the task and among --many (clients,cohort), who are dealt as many images in all, iid. 0 is clipping without noise, so
without privacy. Batch-norm statistics stay with the clients; those of the images themselves serve to evaluate.

Runs are kept in --workdir: what is finished is not run again, what was interrupted goes on. A run that stops since a
number is not finite has no accuracy, and the table says when. Leaves OUT.json and OUT.md. Flags of main.py hold for all
runs; exit status as there.
"""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedmetanas_jax import command
from fedmetanas_jax.command import Flag
from fedmetanas_jax.config import Config, to_dict, validate
from fedmetanas_jax.files import write_json, write_text
from fedmetanas_jax.main import FLAGS, Parsed, failures, help_or_list, parse
from fedmetanas_jax.options import UsageError

AGGREGATES, ATTACKS = ("mean", "clip", "median", "trimmed"), ("none", "flip", "scale", "random")
OWN = {
    "methods": Flag(tuple[str, ...], ("fedavg",), "the methods; noise is added to the first one's changes"),
    "partitions": Flag(tuple[str, ...], ("dirichlet", "iid"), "how the images are dealt under attack"),
    "aggregates": Flag(tuple[str, ...], AGGREGATES, "clip is --clip and then the mean; empty: no attacks"),
    "attacks": Flag(tuple[str, ...], ATTACKS, "what bad clients send; none is the control"),
    "attackers": Flag(int, 2, "clients that are bad; trimmed trims as many on either side", least=1),
    "clip": Flag(str, "3:1:3", "the norms of clip, as in config.aggregate"),
    "noise": Flag(tuple[float, ...], (0.0, 0.5, 1.0), "noise multipliers; empty: no noise"),
    "noise_clip": Flag(float, 1.0, "the norm that changes of the weights are clipped to under noise"),
    "many": Flag(tuple[int, ...], (100, 50), "clients and cohort of the second federation under noise"),
    "seeds": Flag(tuple[int, ...], (1,), "the seeds"),
    "out": Flag(str, None, "what the table and the figures are called: OUT.md, OUT.json; required"),
    "workdir": Flag(str, "runs/attacks", "where the runs are"),
} | {name: flag for name, flag in FLAGS.items() if name not in ("workdir", "stop_after")}
FIGURES = ("server_accuracy", "epsilon", "delta", "rounds", "seconds_in_rounds")


class Cell(NamedTuple):
    """A place in a table, and what its runs have that is not the command's."""

    table: str
    row: str
    column: str
    of: str  # the method that it is of
    fields: dict[str, Any]


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""

    def answer() -> None:
        asked = parse(argv, OWN)
        if asked.show == "run":
            attacks(argv, asked)
        else:
            print(help_or_list(asked, __doc__, OWN))

    return command.exit_status(answer, failures)


def attacks(argv: list[str], asked: Parsed) -> None:
    """All runs, then the two files; argv[0] is the program. UsageError where the request makes no sense."""
    given = asked.values
    check(asked)
    from attackers import register

    from fedmetanas_jax.engine.records import versions

    # Every request is read before the first run, so that a mistyped name costs nothing.
    plain = {name: parse([*argv, f"--config.method={name}"], OWN).config for name in given["methods"]}
    cells = [*under_attack(asked), *under_noise(asked)]
    seeds = given["seeds"]
    wanted = [[dataclasses.replace(plain[cell.of], seed=n, **cell.fields) for n in seeds] for cell in cells]
    for config in (config for configs in wanted for config in configs):
        validate(config)
    register(given["methods"], given["attackers"])
    figures: dict[str, Any] = {"command": shlex.join(["python", *argv]), "versions": versions(), "cells": []}
    figures |= {"attackers": given["attackers"], "config": {name: to_dict(config) for name, config in plain.items()}}
    for cell, configs in zip(cells, wanted, strict=True):
        runs = {config.seed: one_run(asked, cell, config) for config in configs}
        figures["cells"].append(cell._asdict() | {"runs": runs})
        write_json(f"{given['out']}.json", figures)
        write_text(f"{given['out']}.md", markdown(figures))
    print(markdown(figures))


def check(asked: Parsed) -> None:
    """UsageError for flags that make no sense together."""
    given, clients = asked.values, asked.config.clients
    if given["out"] is None:
        raise UsageError("--out=NAME is needed: where the table is written")
    for name in ("methods", "seeds"):
        if not given[name]:
            raise UsageError(f"--{name} is empty; it must name at least one")
    for name, known in (("aggregates", AGGREGATES), ("attacks", ATTACKS)):
        if wrong := [x for x in given[name] if x not in known]:
            raise UsageError(f"--{name}: {wrong[0]} is none of {', '.join(known)}")
    if given["aggregates"] and not 2 * given["attackers"] < clients:
        raise UsageError(f"--attackers is {given['attackers']}; it must be less than half of the {clients} clients")
    if len(given["many"]) != 2 or min(given["many"]) < 1:
        raise UsageError("--many must be two numbers of at least 1: clients,cohort")


def under_attack(asked: Parsed) -> list[Cell]:
    """Every aggregate under every attack."""
    given, clients = asked.values, asked.config.clients
    share = given["attackers"] / clients
    stages = {"mean": "mean", "clip": f"clip:{given['clip']},mean", "median": "median", "trimmed": f"trimmed:{share:g}"}
    return [
        Cell(
            f"{method}, {dealt}",
            stages[name],
            attack,
            method,
            _fields(f"{method}+{attack}", stages[name], dealt, cohort=clients),
        )
        for method in given["methods"]
        for dealt in given["partitions"]
        for name in given["aggregates"]
        for attack in given["attacks"]
    ]


def under_noise(asked: Parsed) -> list[Cell]:
    """Every noise multiplier in both federations, which hold the same number of images."""
    config, (clients, cohort) = asked.config, asked.values["many"]
    sizes = {
        name: max(1, getattr(config, name) * config.clients // clients) for name in ("train_size", "test_size")
    }
    few = {"clients": config.clients, "cohort": config.cohort, "dealt": config.partition}
    federations = (few, {"clients": clients, "cohort": cohort, "dealt": "iid"} | sizes)
    method, norm = asked.values["methods"][0], asked.values["noise_clip"]
    return [
        Cell(
            f"{method}, noise",
            "{clients} clients, {cohort} a round, {dealt}".format_map(federation),
            f"{multiplier:g}",
            method,
            _fields(method, f"clip:{norm:g},gaussian:{multiplier:g}", bn_eval="batch", **federation),
        )
        for federation in federations
        for multiplier in asked.values["noise"]
    ]


def _fields(method: str, aggregate: str, dealt: str, **more) -> dict[str, Any]:
    return {"method": method, "aggregate": aggregate, "partition": dealt, "final_adapt": False} | more


def one_run(asked: Parsed, cell: Cell, config: Config) -> dict[str, Any]:
    """FIGURES of the run, or "stopped": why it had to. It is begun, resumed or, if it is finished, read."""
    from fedmetanas_jax import build
    from fedmetanas_jax.engine.report import NonFiniteError

    name = "-".join((cell.table, cell.row, cell.column, str(config.seed)))
    workdir = Path(asked.values["workdir"]) / "".join(x if x.isalnum() or x in "-.+" else "_" for x in name)
    path = workdir / "outcome.json"
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["config"] != json.loads(json.dumps(to_dict(config))) or kept["attackers"] != asked.values["attackers"]:
            raise UsageError(f"{workdir} is of another config; use another --workdir")
        return kept["figures"]
    command.show(f"{cell.table}; {cell.row}; {cell.column}; seed {config.seed}")
    try:
        build.run(config, task=asked.task, workdir=workdir, data_dir=asked.data_dir)
        result = json.loads((workdir / "result.json").read_text())
        figures = {name: result[name] for name in FIGURES if name in result}
    except NonFiniteError as error:
        figures = {"stopped": str(error)}
    write_json(path, {"figures": figures, "config": to_dict(config), "attackers": asked.values["attackers"]})
    return figures


def markdown(figures: dict[str, Any]) -> str:
    """A table for every method and partition: server accuracies in percent, mean +- std over seeds."""
    lines: list[str] = []
    for table in dict.fromkeys(cell["table"] for cell in figures["cells"]):
        cells = {(cell["row"], cell["column"]): cell["runs"] for cell in figures["cells"] if cell["table"] == table}
        rows, columns = (list(dict.fromkeys(place[n] for place in cells)) for n in (0, 1))
        lines += [f"| {table} | {' | '.join(columns)} |", "|" + "---|" * (1 + len(columns))]
        for row in rows:
            told = [_told(list(cells[row, column].values())) if (row, column) in cells else "" for column in columns]
            lines.append(f"| {row} | {' | '.join(told)} |")
        lines.append("")
    facts = "Server accuracy in percent. Attacked runs: all clients train in every round, "
    facts += f"the first {figures['attackers']} are bad. "
    facts += "{device} x {devices}, {cpus} CPUs, jax {jax}.".format_map(figures["versions"])
    return "\n".join([*lines, facts, "", f"`{figures['command']}`", ""])


def _told(runs: list[dict]) -> str:
    if stopped := [run["stopped"] for run in runs if "stopped" in run]:
        return f"stopped in {stopped[0].partition(',')[0]}" + (f" ({len(stopped)} of {len(runs)})" if runs[1:] else "")
    accuracy = 100 * np.array([run["server_accuracy"] for run in runs])
    text = f"{accuracy.mean():.1f}" + (f" +- {accuracy.std(ddof=1):.1f}" if len(runs) > 1 else "")
    if "delta" not in runs[0]:
        return text
    epsilon = runs[0]["epsilon"]  # a function of the rounds, whatever the seed
    return f"{text}, epsilon " + ("infinite" if epsilon is None else f"{epsilon:.3g} at delta {runs[0]['delta']:.2g}")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
