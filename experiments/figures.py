"""The paper's Figures 3 and 4 with our curves: server accuracy against time, of the runs of Tables 1 and 2.

    python experiments/figures.py --figure=4 --scale=minutes

Takes the flags of tables.py (but --table, and --figure=3, 4 or all), and runs what is not finished like it. Leaves
figure3.png and .svg in --out. FedNAS's search is dashed: the paper shows only its retraining. Exit status as there.
"""

import sys
from pathlib import Path

import command
import tables
from command import Flag
from main import failures
from study.paper import TABLES

from fedmetanas_jax.options import UsageError, nearest

FIGURES = {"3": 1, "4": 2}  # the table that has the same runs
FLAGS = {"figure": Flag(str, "all", "3, 4, or all")} | {
    name: flag for name, flag in tables.FLAGS.items() if name != "table"
}


def draw(asked: dict, requests: list) -> None:
    """Every figure as it stands."""
    from study import curves
    from study.worker import Study

    numbers = {table: figure for figure, table in FIGURES.items()}
    for request in requests:
        number = numbers[request.number]
        path = Path(asked["out"]) / f"figure{number}"
        title = f"Figure {number}. {TABLES[request.number].title} ({request.scale})"
        for cell in curves.draw(Study(asked["study"]), request, title, path):
            tables.say(f"no finished run with a server accuracy: {cell}")
        tables.say(f"wrote {path}.png and .svg")


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
        _, rest = command.take(argv, "figure")
        return tables.make(*tables.parse([*rest, f"--table={','.join(map(str, wanted))}"]), write=draw)

    return command.exit_status(answer, failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
