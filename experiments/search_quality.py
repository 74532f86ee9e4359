"""Is it a search? What finished searches found, against networks drawn at random from the same space.

    python experiments/search_quality.py --runs=runs/digits_dir01-fedmetanas --out=results/mine
    python experiments/main.py --config.options.gumbel=false --workdir=runs/softmax  # and, to have it in a table:
    python experiments/search_quality.py --runs=runs/seed1,runs/seed2 --also=softmax:runs/softmax --out=results/mine

Each run is a workdir that main.py has finished with a method that searches. The network it found, and --networks drawn
ones (a pair of inputs a node, an operation an edge, `none` included), are trained from scratch by FedAvg in the run's
own federation: its partition, seed, cohorts, batches, epochs, rates, augmentation and evaluation. Each gets as many
rounds as make its multiply-adds those of the whole search, times --budget, with the learning rate falling over them.
The draws are the same for all runs: number i, from 1, is the network that main.py trains with the run's config and
--config.method=fedrandom --config.options.architecture_seed=i.

What is finished is kept in WORKDIR/quality and not trained again. Leaves OUT.json and OUT.md. Exit status as main.py's.
"""

import json
import math
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fedmetanas_jax import command
from fedmetanas_jax.command import Flag
from fedmetanas_jax.config import Config, from_dict
from fedmetanas_jax.files import write_json, write_text
from fedmetanas_jax.main import failures
from fedmetanas_jax.options import UsageError

FLAGS = {
    "runs": Flag(tuple[str, ...], (), "workdirs of finished searches, separated by commas"),
    "out": Flag(str, None, "what the table and the figures are called: OUT.md, OUT.json; required"),
    "networks": Flag(int, 20, "networks drawn", least=1),
    "budget": Flag(float, 1.0, "share of a search's multiply-adds that each network is trained with"),
    "at_once": Flag(
        int, -1, "networks trained side by side, by one program of all their operations; 1: one after another, each by "
        "a program of its own; 0: all; -1: 1 on CPU, else all", least=-1,
    ),
    "also": Flag(tuple[str, ...], (), "further finished runs for the last table, as NAME:WORKDIR, separated by commas"),
    "data_dir": Flag(str, None, "where NAME.npz are; else $FEDMETANAS_DATA, else ~/.cache/fedmetanas_jax/data"),
    "help": command.HELP,
}  # fmt: skip
say = partial(print, flush=True)


class Run(NamedTuple):
    """A finished run of main.py."""

    workdir: Path
    config: Config
    result: dict
    records: list[dict]

    def row(self, name: str) -> dict:
        """What the last table says of it."""
        from quality.figures import events

        figures = {n: self.result[n] for n in ("macs", "seconds_in_rounds", "seconds_compiling")}
        local = self.result.get("local_accuracy", {}).get("mean")
        figures |= {"server_accuracy": self.result.get("server_accuracy"), "local_accuracy": local}
        about = {"name": name, "workdir": str(self.workdir), "method": self.config.method, "seed": self.config.seed}
        return about | {"options": self.config.options} | figures | events(self.records)


def read_run(workdir: str) -> Run:
    """UsageError where there is no finished run, or another version's."""
    from fedmetanas_jax.engine import records

    path = Path(workdir).expanduser()
    try:
        found = {name: json.loads((path / f"{name}.json").read_text()) for name in ("config", "result")}
        return Run(path, from_dict(found["config"]["config"]), found["result"], records.read(path / "records.jsonl"))
    except FileNotFoundError as error:
        raise UsageError(f"{path} holds no finished run: there is no {Path(error.filename).name}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read as a finished run: {error}") from None


def read_search(workdir: str) -> tuple[Run, dict]:
    """A run and the genotype it found. UsageError where it searched nothing."""
    from fedmetanas_jax.algorithms import ALGORITHMS
    from fedmetanas_jax.architecture import read_genotype, searches

    run = read_run(workdir)
    if not searches(ALGORITHMS[run.config.method]) or "server_accuracy_discrete" not in run.result:
        raise UsageError(f"{run.workdir} is a run of {run.config.method}, which searches no network for everybody")
    return run, read_genotype(str(run.workdir / "genotype.json"))


def parse(argv: list[str]) -> dict:
    """FLAGS as values; argv[0] is the program. UsageError for what makes no sense."""
    asked = command.read(argv, FLAGS)
    if asked["help"]:
        return asked
    if not asked["runs"]:
        raise UsageError("--runs=WORKDIR,... is needed: the finished searches")
    if len({*asked["runs"]}) < len(asked["runs"]):
        raise UsageError("--runs names a workdir twice")
    if asked["out"] is None:
        raise UsageError("--out=NAME is needed: where the table is written")
    if not 0 < asked["budget"] < math.inf:
        raise UsageError(f"budget is {asked['budget']:g}; it must be positive")
    pairs = [text.partition(":") for text in asked["also"]]
    if wrong := [name + colon for name, colon, workdir in pairs if not (name and workdir)]:
        raise UsageError(f"--also has '{wrong[0]}', which is not NAME:WORKDIR")
    return asked | {"also": {name: workdir for name, _, workdir in pairs}}


def compare(asked: dict, argv: list[str]) -> None:
    """Everything that is not finished yet, then the two files. UsageError and what `build.run` raises."""
    from quality.study import Study

    searches = [read_search(workdir) for workdir in asked["runs"]]
    also = {name: read_run(workdir) for name, workdir in asked["also"].items()}
    study = Study(searches, networks=asked["networks"], budget=asked["budget"], data_dir=asked["data_dir"])
    rows = [run.row(str(run.workdir)) for run, _ in searches] + [run.row(name) for name, run in also.items()]
    line = shlex.join(["python", "experiments/search_quality.py", *argv[1:]])

    def write() -> str:
        document, text = study.report(line, rows)
        write_json(f"{asked['out']}.json", document)
        write_text(f"{asked['out']}.md", text)
        return text

    for said in study.train(asked["at_once"]):
        say(said)
        write()
    say(write())


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""
    return command.run(argv, parse, compare, __doc__, FLAGS, failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
