"""A study as one HTML page: tables with the paper's numbers beside, learning curves, prune events, cells and runs.

    python experiments/report.py runs/study-minutes                      # writes runs/study-minutes/report.html
    python experiments/report.py runs/study-minutes --out=minutes.html

STUDY, or --study=STUDY, is the folder of runs that tables.py works through; it may be working on it still. The page is
one file that loads nothing from anywhere: it can be mailed, and opened without a network. Exit status as main.py's.
"""

import datetime
import shlex
import sys
from functools import partial

from fedmetanas_jax import command
from fedmetanas_jax.command import Flag
from fedmetanas_jax.files import write_text
from fedmetanas_jax.main import failures
from fedmetanas_jax.options import UsageError, parse_path

FLAGS = {
    "study": Flag(str, None, "the folder of the runs; may also be the first argument, without --study="),
    "out": Flag(str, None, "the file that is written; default STUDY/report.html"),
    "title": Flag(str, None, "of the page; default the name of the folder"),
    "help": command.HELP,
}
say = partial(print, flush=True)


def parse(argv: list[str]) -> dict:
    """FLAGS as values; argv[0] is the program. UsageError for what makes no sense."""
    asked = command.read(command.named(argv, "study"), FLAGS)
    if asked["help"]:
        return asked
    if asked["study"] is None:
        raise UsageError("which study? report.py STUDY, the folder of its runs")
    study = parse_path("study", asked["study"])
    out = parse_path("out", asked["out"]) if asked["out"] else study / "report.html"
    return asked | {"study": study, "out": out, "title": asked["title"] or f"Study {study.resolve().name}"}


def report(asked: dict, argv: list[str]) -> None:
    """Reads the study and writes the page. UsageError where there is no study, or its tables or plan are damaged."""
    from study import page, plan
    from study.tables import documents
    from study.worker import Study

    from fedmetanas_jax.engine.records import versions

    study = Study(asked["study"])
    runs, failed = [], 0
    planned = plan.read(study.path)
    for run in planned:
        found = study.finished(run)
        if found is not None:
            runs.append(found | {"workdir": str(study.workdir(run))})
        elif study.failure(run):
            failed += 1
    facts = {
        "command": shlex.join(["python", "experiments/report.py", *argv[1:]]),
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": versions(),
        "counts": {"done": len(runs), "failed": failed, "left": len(planned) - len(runs) - failed},
    }
    write_text(asked["out"], page.html(asked["title"], documents(study.path), runs, facts))
    say(f"wrote {asked['out']}: {len(runs)} of {len(planned)} runs")


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""
    return command.run(argv, parse, report, __doc__, FLAGS, failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
