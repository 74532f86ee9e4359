"""The paper's tables with our numbers: makes the runs they need, and writes them.

    python experiments/tables.py --table=all --scale=minutes --processes=2   # all five tables on the bundled digits
    python experiments/tables.py --table=2,3 --scale=cpu                     # real data, reduced networks
    python experiments/tables.py --table=2 --scale=paper --plan   # what it would take: runs, image-gradients, hours
    python experiments/tables.py --table=2 --methods=mine,fedmetanas,fedmetanas+M=0 --columns=cifar10:dir0.1,mine:tau4

The runs are in --study, one folder each, and shared by the tables. --processes share them out, each on its part of this
machine's cores. Start the same command on other machines that share the folder, too: a process takes runs that nobody
has. It may be stopped at any time and goes on. A run that fails is reported and does not stop the rest. Leaves
table2.md, .csv and .json in --out. Cells without a finished run are "-".

A method is METHOD or METHOD+NAME=VALUE+...: an option of it, or a field of a task (lr, network=genotype.json). A column
is DATASET:SPLIT, with a split like dir0.1, tau4, iid or natural, and a data set of its own from DATA_DIR/NAME.npz.

Exit status: 0 done, 1 a run failed, 2 the request made no sense, 130 after Ctrl-C, 143 after SIGTERM.
"""

import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from study.paper import TABLES
from study.scales import SCALES

from fedmetanas_jax import command
from fedmetanas_jax.command import Flag
from fedmetanas_jax.files import write_json, write_text
from fedmetanas_jax.main import failures
from fedmetanas_jax.options import UsageError, nearest, parse_path, parse_value

FLAGS = {
    "table": Flag(str, None, "1 to 5, several with commas, or all; required"),
    "scale": Flag(str, "minutes", f"the size: {', '.join(SCALES)}"),
    "methods": Flag(tuple[str, ...], (), "rows, with commas; empty: the paper's"),
    "columns": Flag(tuple[str, ...], (), "columns, with commas; empty: the paper's"),
    "seeds": Flag(tuple[int, ...], (), "seeds, with commas; empty: the scale's"),
    "study": Flag(str, None, "the folder of the runs; default runs/study-SCALE"),
    "out": Flag(str, None, "the folder that the tables are written to; default docs/results/SCALE"),
    "plan": Flag(bool, False, "only say what it would take"),
    "status": Flag(bool, False, "only say what is done, running, failed and left, and when it should end"),
    "read": Flag(bool, False, "only write the tables of what is finished"),
    "retry": Flag(bool, False, "run again what failed"),
    "processes": Flag(int, 1, "processes that share the runs out, each with its part of this machine's cores", least=1),
    "wait": Flag(bool, True, "wait for runs that other processes have; --nowait ends when nothing is left to take"),
    "data_dir": Flag(str, None, "where NAME.npz are; else $FEDMETANAS_DATA, else ~/.cache/fedmetanas_jax/data"),
    "help": command.HELP,
}
MOST_PROCESSES = 1_024  # of one machine; nobody has use for more
READS = ("read", "nowait", "retry")  # flags that change nothing of what a table has
say = partial(print, flush=True)


def parse(argv: list[str]) -> tuple[dict, list]:
    """argv -> the flags, and a study.tables.Request for each table. UsageError for what makes no sense."""
    fields, rest = command.take(argv, "config.")
    asked = command.read(rest, FLAGS)
    if asked["help"]:
        return asked, []
    from study.plan import FIELDS as KNOWN
    from study.plan import TAKEN
    from study.tables import Request

    if asked["table"] is None:
        raise UsageError("--table=1 to 5, or all, is needed")
    texts = map(str, TABLES) if asked["table"] == "all" else asked["table"].split(",")
    numbers = list(dict.fromkeys(texts))
    if wrong := [text for text in numbers if text not in map(str, TABLES)]:
        raise UsageError(nearest("table", wrong[0], [*TABLES, "all"]))
    if asked["scale"] not in SCALES:
        raise UsageError(nearest("scale", asked["scale"], SCALES))
    overrides = {}
    for name, text in fields.items():
        if name in TAKEN or name.startswith("options."):
            raise UsageError(f"config.{name} differs between runs: --methods, --columns and --seeds choose it")
        if name not in KNOWN:
            raise UsageError(nearest("config field", name, [field for field in KNOWN if field not in TAKEN]))
        try:
            overrides[name] = parse_value(text, KNOWN[name])
        except UsageError as error:
            raise UsageError(f"config.{name}: {error}") from None
    for name in ("methods", "columns", "seeds"):
        if len(set(asked[name])) < len(asked[name]):
            raise UsageError(f"--{name} names something twice: {command.written(asked[name])}")
    if asked["processes"] > MOST_PROCESSES:
        raise UsageError(f"processes: {asked['processes']}; there can be at most {MOST_PROCESSES}")
    scale = SCALES[asked["scale"]]
    makes = [text for text in argv[1:] if text.lstrip("-") not in READS]  # what a table says that it was made by
    line = shlex.join(["python", "experiments/tables.py", *makes])
    asked["study"] = parse_path("study", asked["study"] or f"runs/study-{asked['scale']}")
    asked["out"] = parse_path("out", asked["out"] or f"docs/results/{asked['scale']}")
    requests = []
    for number in map(int, numbers):
        rows, columns = asked["methods"] or TABLES[number].methods, asked["columns"] or scale.columns(number)
        seeds = asked["seeds"] or scale.seeds
        requests.append(Request(number, asked["scale"], rows, columns, seeds, overrides, line))
    return asked, requests


def write(asked: dict, requests: list) -> None:
    """Every table as it stands, as three files."""
    from study.tables import document
    from study.worker import Study
    from study.written import markdown, text_csv

    for request in requests:
        made, path = document(Study(asked["study"]), request), Path(asked["out"]) / f"table{request.number}"
        write_text(f"{path}.md", markdown(made))
        write_text(f"{path}.csv", text_csv(made))
        write_json(f"{path}.json", made)
        say(f"wrote {path}.md, .csv and .json")


def make(asked: dict, requests: list, write: Callable[[dict, list], None] = write) -> int:
    """Works on the runs, then writes what is made of them -> the exit status."""
    from study import expect, plan, worker
    from study.tables import keep

    lost = 0  # processes that did not end well
    runs = plan.in_order(run for request in requests for run in request.runs().values())
    study = worker.Study(asked["study"])
    if asked["plan"]:
        say(expect.planned(study, runs, asked["data_dir"]))
        return 0
    if asked["status"]:
        say(expect.status(study, runs))
        return 0
    if not asked["read"]:
        plan.write(study.path, runs)
        for request in requests:
            keep(study.path, request)
        for run in runs if asked["retry"] else []:
            study.forgive(run)
        try:
            lost = _work(study, runs, asked)
        except KeyboardInterrupt:
            say("stopped; the same command goes on")
            raise
    write(asked, requests)
    failed = [run for run in runs if study.failure(run)]
    for run in failed:
        say(f"failed: {run.name}: {study.failure(run)['error']}")
    left = [run for run in runs if run not in failed and not study.finished(run)] if lost else []
    if left:
        say(f"{len(left)} of {len(runs)} runs are left; the same command goes on")
    return 1 if failed or left else 0


def _work(study, runs: list, asked: dict) -> int:
    """Works on the runs -> how many processes did not end well."""
    from study import several, worker

    given = {"data_dir": asked["data_dir"], "say": say, "wait": asked["wait"]}
    if asked["processes"] > 1:
        return several.work(study.path, runs, count=asked["processes"], **given)
    worker.work(study, runs, **given)
    return 0


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""

    def answer() -> int | None:
        asked, requests = parse(argv)
        if not asked["help"]:
            return make(asked, requests)
        from study.written import title

        say(command.help_text(__doc__, FLAGS))
        say("  --config.FIELD=VALUE  a field of all runs, as main.py has it")
        say("\n".join(["", "Tables:", *(f"  {title(number)}" for number in TABLES), "", "Scales:"]))
        say("\n".join(f"  {name:<8} {scale.about}" for name, scale in SCALES.items()))

    return command.exit_status(answer, failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
