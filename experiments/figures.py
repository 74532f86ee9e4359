"""The paper's Figures 3 and 4 with our curves: server accuracy against time, of the runs of Tables 1 and 2.

    python experiments/figures.py --figure=4 --scale=minutes

Takes the flags of tables.py (but --table, and --figure=3, 4 or all), and runs what is not finished like it. Leaves
figure3.png, .svg and .csv in --out. With --read --unfinished runs are drawn as far as they are, each seed by itself.
FedNAS's search is dashed: the paper shows only its retraining. Exit status as there.
"""

import sys
from functools import partial
from pathlib import Path

import tables
from study.paper import TABLES

from fedmetanas_jax import command
from fedmetanas_jax.command import Flag
from fedmetanas_jax.main import failures
from fedmetanas_jax.options import UsageError, nearest

FIGURES = {"3": 1, "4": 2}  # the table that has the same runs
FLAGS = {
    "figure": Flag(str, "all", "3, 4, or all"),
    "unfinished": Flag(bool, False, "with --read: also of runs that are not finished, each as far as it is"),
} | {
    name: flag for name, flag in tables.FLAGS.items() if name != "table"
}


def draw(asked: dict, requests: list, unfinished: bool = False) -> None:
    """Every figure as it stands."""
    from study import curves
    from study.worker import Study

    numbers = {table: figure for figure, table in FIGURES.items()}
    for request in requests:
        number = numbers[request.number]
        path = Path(asked["out"]) / f"figure{number}"
        title = f"Figure {number}. {TABLES[request.number].title} ({request.scale})"
        for cell in curves.draw(Study(asked["study"]), request, title, path, unfinished):
            tables.say(f"no {'run' if unfinished else 'finished run'} with a server accuracy: {cell}")
        tables.say(f"wrote {path}.png, .svg and .csv")


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""

    def answer() -> int | None:
        asked = command.read(command.take(argv, "config.")[1], FLAGS)
        if asked["help"]:
            tables.say(command.help_text(__doc__, FLAGS))
            return None
        if asked["figure"] not in (*FIGURES, "all"):
            raise UsageError(nearest("figure", asked["figure"], [*FIGURES, "all"]))
        wanted = FIGURES.values() if asked["figure"] == "all" else [FIGURES[asked["figure"]]]
        if asked["unfinished"] and not asked["read"]:
            raise UsageError("--unfinished needs --read: without it the command finishes every run before it draws")
        _, rest = command.take(argv, "figure")
        rest = [text for text in rest if text.lstrip("-").partition("=")[0] not in ("unfinished", "nounfinished")]
        write = partial(draw, unfinished=asked["unfinished"])
        return tables.make(*tables.parse([*rest, f"--table={','.join(map(str, wanted))}"]), write=write)

    return command.exit_status(answer, failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
