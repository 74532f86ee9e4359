"""What a round of each method costs, timed in turn in one process: seconds, multiply-adds, bytes.

    python experiments/method_costs.py --config=digits_dir01 --out=results/digits_method_costs

The first phase of every method of --methods is compiled; then all are timed one round each, --repeats times over, so
that what else the machine does falls on all alike. Of methods that draw networks every round is another draw: the table
says how often a round was compiled, which is to be once. Leaves OUT.json and OUT.md.

--config.at_once=1 computes clients one after another, where a CPU skips what was not drawn; in one vmap it does not.
Flags of main.py hold for all methods; exit status as there.
"""

import shlex
import sys
import time

import numpy as np

from fedmetanas_jax import command
from fedmetanas_jax.command import Flag
from fedmetanas_jax.config import Config
from fedmetanas_jax.files import write_json, write_text
from fedmetanas_jax.main import FLAGS, failures, help_or_list, parse
from fedmetanas_jax.options import UsageError

SEARCHES = (
    "fedmetanas", "fednas", "feddsnas", "fedrlnas", "fedpnas", "metafedpnas", "perfedrlnas", "metaperfedrlnas",
)  # fmt: skip
OWN = {
    "methods": Flag(tuple[str, ...], SEARCHES, "the methods, separated by commas; the first one is what 1 is"),
    "repeats": Flag(int, 5, "rounds of each method that are timed", least=1),
    "out": Flag(str, None, "what the table and the figures are called: OUT.md, OUT.json; required"),
}


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""

    def answer() -> None:
        asked = parse(argv, FLAGS | OWN)
        if asked.show != "run":
            print(help_or_list(asked, __doc__, FLAGS | OWN))
            return
        if asked.values["out"] is None:
            raise UsageError("--out=NAME is needed: where the table is written")
        if not asked.values["methods"]:
            raise UsageError("--methods is empty; it must name at least one")
        costs(argv, asked)

    return command.exit_status(answer, failures)


def costs(argv: list[str], asked) -> None:
    """Compiles and times every method's round, then writes the two files; argv[0] is the program."""
    from fedmetanas_jax.engine.records import versions

    names, repeats, out = (asked.values[name] for name in ("methods", "repeats", "out"))
    configs = {name: parse([*argv, f"--config.method={name}"], FLAGS | OWN).config for name in names}
    rounds = {}
    for name, config in configs.items():  # the first one compiles
        rounds[name] = Rounds(config, asked.data_dir)
        print(f"{name}: compiled in {rounds[name].one():.0f} s", flush=True)
    seconds = {name: [] for name in names}
    for number in range(repeats):
        for name in names:
            seconds[name].append(rounds[name].one())
        print(f"timed round {number + 1} of {repeats} of every method", flush=True)
    rows = {name: {"seconds": seconds[name]} | rounds[name].work() for name in names}
    common = {"task": asked.task, "at_once": rounds[names[0]].at_once, "versions": versions()}
    figures = common | {"command": shlex.join(["python", *argv]), "methods": rows}
    write_json(f"{out}.json", figures)
    write_text(f"{out}.md", markdown(figures))
    print(markdown(figures))


class Rounds:
    """The rounds of a method's first phase, on one device."""

    def __init__(self, config: Config, data_dir: str | None):
        from fedmetanas_jax import build
        from fedmetanas_jax.engine.round import init_state, make_round

        self._algorithm, self._data = build.without_a_run(config, data_dir)
        self.at_once = max(build.make_conduct(config).at_once, 0)
        self._step = make_round(self._algorithm, cohort_size=config.cohort, at_once=self.at_once)
        self._state = init_state(self._algorithm, config.seed, config.clients)

    def one(self) -> float:
        """The seconds that the next round takes."""
        import jax

        start = time.perf_counter()
        self._state, self._metrics = jax.block_until_ready(self._step(self._state, self._data, self._state.round + 1))
        return time.perf_counter() - start

    def work(self) -> dict:
        """What the last round computed and sent, and how many programs all of them took."""
        from fedmetanas_jax.engine import report

        metrics = {name: np.asarray(x) for name, x in self._metrics.items()}
        line = report.lines(metrics, 0, 1, 0.0, 0, self._algorithm)[0]
        named = {name: line[name] for name in ("image_gradients", "macs", "bytes_up", "bytes_down")}
        return named | {"programs": self._step._cache_size()}


def markdown(figures: dict) -> str:
    """The table: medians, and the range of the seconds."""
    rows = figures["methods"]
    first = next(iter(rows.values()))
    lines = [
        "| method | seconds a round | relative | image-gradients | 10^9 multiply-adds | relative | MB up | MB down | "
        "programs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        median, low, high = (f(row["seconds"]) for f in (np.median, min, max))
        cells = [f"`{name}`", f"{median:.3g} ({low:.3g} to {high:.3g})", f"{median / np.median(first['seconds']):.2f}"]
        cells += [f"{row['image_gradients']:.0f}", f"{row['macs'] / 1e9:.3g}", f"{row['macs'] / first['macs']:.2f}"]
        cells += [f"{row['bytes_up'] / 1e6:.2f}", f"{row['bytes_down'] / 1e6:.2f}", str(row["programs"])]
        lines.append("| " + " | ".join(cells) + " |")
    clients = {0: "all at once", 1: "one after another"}.get(figures["at_once"], f"{figures['at_once']} at once")
    facts = f"A round of the search of {figures['task']}, clients {clients}. "
    facts += "{device} x {devices}, {cpus} CPUs, jax {jax}.".format_map(figures["versions"])
    return "\n".join([*lines, "", facts, "", f"`{figures['command']}`", ""])


if __name__ == "__main__":
    sys.exit(main(sys.argv))
