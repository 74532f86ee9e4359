"""Methods side by side: rates chosen on one seed, several seeds measured, equal work for all; a table.

    python experiments/compare.py --config=digits_dir01 --methods=fedavg,fedrep --seeds=1,2,3 --out=results/mine
    python experiments/compare.py --methods=fedmetanas,fednas,fedrlnas --equal=rounds --rates=0.05 --out=results/mine

Every method is first run with each of --rates as config.lr on --tune_seed; the rate whose clients fare best with
the network the method gives them (mean local accuracy) is then run on --seeds. A single rate is taken as it is.
What is equal is --equal. image_gradients: a method whose first round costs more of them than FedAvg's gets fewer
rounds, so that all methods compute the same number (methods section 12.3). rounds: all have those of the task. macs:
all have about the multiply-adds of the first of --methods, as a run of each on --tune_seed with the rounds of the task
counts them; schedules are shares of the rounds, so twice the rounds are about twice the work. The runs are a study like
that of tables.py in --workdir: what is finished is not run again, what was interrupted goes on, and the same command
may be started several times to share the work. Leaves OUT.json (every run's figures) and OUT.md (the table).

Flags of main.py (--config, --config.FIELD, --config.options.NAME, --data_dir) hold for all runs; exit status as there.
"""

import json
import shlex
import sys
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from fedmetanas_jax import command
from fedmetanas_jax.command import Flag
from fedmetanas_jax.config import Config, to_dict
from fedmetanas_jax.files import write_json, write_text
from fedmetanas_jax.main import FLAGS, Parsed, failures, help_or_list, parse
from fedmetanas_jax.options import UsageError

METHODS = ("fedavg", "fedprox", "scaffold", "ditto", "perfedavg", "fedrep", "fedbabu")
OWN = {
    "methods": Flag(tuple[str, ...], METHODS, "the methods, separated by commas"),
    "seeds": Flag(tuple[int, ...], (1, 2, 3, 4, 5), "the seeds that are measured"),
    "rates": Flag(tuple[float, ...], (0.01, 0.025, 0.1), "the values of config.lr to choose from"),
    "tune_seed": Flag(int, 0, "the seed that the rate is chosen on"),
    "options": Flag(tuple[str, ...], (), "knobs of single methods: METHOD.NAME=VALUE, separated by commas"),
    "equal": Flag(Literal["image_gradients", "rounds", "macs"], "image_gradients", "what all methods have alike"),
    "out": Flag(str, None, "what the table and the figures are called: OUT.md, OUT.json; required"),
    "workdir": Flag(str, "runs/compare", "the study, as of tables.py, that the runs are in"),
} | {name: flag for name, flag in FLAGS.items() if name not in ("workdir", "stop_after")}


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""

    def answer() -> None:
        asked = parse(argv, OWN)
        if asked.show == "run":
            compare(argv, asked)
        else:
            print(help_or_list(asked, __doc__, OWN))

    return command.exit_status(answer, failures)


def compare(argv: list[str], asked: Parsed) -> None:
    """All runs, then the two files; argv[0] is the program. UsageError where the request makes no sense."""
    from study.outcome import distinct

    names = ("methods", "seeds", "rates", "tune_seed", "equal", "out")
    methods, seeds, rates, tune_seed, equal, out = (asked.values[name] for name in names)
    if out is None:
        raise UsageError("--out=NAME is needed: where the table is written")
    for name in names[:3]:
        if not asked.values[name]:
            raise UsageError(f"--{name} is empty; it must name at least one")
    if tune_seed in seeds:
        raise UsageError(f"--tune_seed={tune_seed} is one of --seeds; a rate is chosen on a seed that is not measured")
    if len(rates) > 1 and not asked.config.final_adapt:
        raise UsageError("--config.final_adapt=false leaves nothing to choose a rate by; give a single one as --rates")
    # Every request is read before the first run, so that a mistyped name costs nothing.
    every = dict.fromkeys(("fedavg", *methods))
    argvs = {method: [*argv, f"--config.method={method}"] for method in every}
    for option in asked.values["options"]:
        method, dot, assignment = option.partition(".")
        if method not in argvs or not dot or "=" not in assignment:
            raise UsageError(f"--options: {option!r} is not METHOD.NAME=VALUE of one of --methods")
        argvs[method].append(f"--config.options.{assignment}")
    configs = {method: parse(line, OWN).config for method, line in argvs.items()}
    rounds = {method: configs[method].rounds for method in methods}
    row: dict[str, dict] = {method: {"method": method, "config": to_dict(configs[method])} for method in methods}
    ran = Runs(argvs, asked)
    if equal == "image_gradients":
        cost = {method: image_gradients(config, asked.data_dir) for method, config in configs.items()}
        rounds = {method: max(1, round(rounds[method] * cost["fedavg"] / cost[method])) for method in methods}
    elif equal == "macs":
        whole = {method: Ask(method, rates[0], tune_seed, rounds[method]) for method in methods}
        ran.work([*whole.values()])
        cost = {method: ran.result(ask)["macs"] for method, ask in whole.items()}
        for method in methods:
            rounds[method] = max(1, round(rounds[method] * cost[methods[0]] / cost[method]))
            row[method]["macs"] = cost[method]
    grids = {m: [Ask(m, rate, tune_seed, rounds[m]) for rate in rates if len(rates) > 1] for m in methods}
    ran.work([ask for grid in grids.values() for ask in grid])
    best = {}
    for method, grid in grids.items():
        tuning = {ask.lr: ran.result(ask)["local_accuracy_adapted"]["mean"] for ask in grid}
        best[method] = max(tuning, key=tuning.get, default=rates[0])
        row[method] |= {"lr": best[method], "rounds": rounds[method], "tuning": tuning}
    measured = {m: [Ask(m, best[m], seed, rounds[m]) for seed in seeds] for m in methods}
    ran.work([ask for asks in measured.values() for ask in asks])
    for method, asks in measured.items():
        row[method]["runs"] = {ask.seed: ran.result(ask) for ask in asks}
    command_line = shlex.join(["python", *argv])
    versions = distinct(run["versions"] for one in row.values() for run in one["runs"].values())
    figures = {"command": command_line, "versions": versions, "equal": equal, "methods": list(row.values())}
    write_json(f"{out}.json", figures)
    write_text(f"{out}.md", markdown(figures))
    print(markdown(figures))


class Ask(NamedTuple):
    """A run of a method."""

    method: str
    lr: float
    seed: int
    rounds: int


class Runs:
    """The runs of a comparison: those of a study, which other processes may work at, too."""

    def __init__(self, argvs: dict[str, list[str]], asked: Parsed):
        """`argvs`: {method: the command line of all its runs}."""
        from study.worker import Study

        self._argvs, self._data_dir, self._study = argvs, asked.data_dir, Study(asked.workdir)

    def work(self, wanted: list[Ask]) -> None:
        """Has them all finished: begun, resumed or left as they are. A run that fails does not stop the others;
        WorkdirError names the first, in the end."""
        from study import worker

        from fedmetanas_jax.engine.records import WorkdirError

        runs = [self._run(ask) for ask in wanted]
        for run in runs:
            self._study.forgive(run)
        worker.work(self._study, runs, self._data_dir, partial(print, flush=True))
        for run in runs:
            if failed := self._study.failure(run):
                raise WorkdirError(f"{run.name}: {failed['error']}")

    def result(self, ask: Ask) -> dict:
        """The result.json of a finished run, with its "largest_drop" if it pruned: the most server accuracy that
        this cost at any moment."""
        run = self._run(ask)
        drop = self._study.finished(run)["figures"]["largest_drop"]
        found = json.loads((self._study.workdir(run) / "result.json").read_text())
        return found | ({} if drop is None else {"largest_drop": drop})

    def _run(self, ask: Ask):
        from study import plan

        fields = {"lr": ask.lr, "seed": ask.seed, "rounds": ask.rounds}
        line = [*self._argvs[ask.method], *(f"--config.{name}={value}" for name, value in fields.items())]
        asked = parse(line, OWN)
        return plan.Run(plan.name_of(ask.method, asked.task, asked.config), ask.method, asked.task, asked.config)


def image_gradients(config: Config, data_dir: str | None) -> float:
    """Image-gradients of a round of the method's first phase, averaged over clients."""
    from study import expect

    from fedmetanas_jax import build

    return expect.image_gradients(config, *build.without_a_run(config, data_dir))


# Of a run's result: the column's head, the figure's place, and whether its spread over seeds is shown.
COLUMNS = (
    ("server", "server_accuracy", True),
    ("local, global network", "local_accuracy.mean", True),
    ("local, own network", "local_accuracy_adapted.mean", True),
    ("std over clients", "local_accuracy_adapted.std", False),
    ("worst tenth", "local_accuracy_adapted.worst_tenth", False),
    ("one step", "local_accuracy_by_depth.step.mean", True),
    ("E epochs", "local_accuracy_by_depth.epochs.mean", True),
    ("largest drop at pruning", "largest_drop", False),
)


def markdown(figures: dict) -> str:
    """The table: accuracies in percent, mean +- std over seeds; std over clients is the mean of the seeds'.

    "-" where a method has no such figure, as the server accuracy of one without a global network.
    """
    heads = ("method", "lr", "rounds", *(head for head, _, _ in COLUMNS), "seconds", "10^9 multiply-adds", "MB sent")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in figures["methods"]:
        runs = list(row["runs"].values())
        accuracies = [_percent(runs, place.split("."), spread) for _, place, spread in COLUMNS]
        seconds, macs, up, down = (
            np.mean([run[name] for run in runs]) for name in ("seconds_in_rounds", "macs", "bytes_up", "bytes_down")
        )
        work = [f"{seconds:.0f}", f"{macs / 1e9:.3g}", f"{(up + down) / 1e6:.3g}"]
        cells = [row["method"], f"{row['lr']:g}", str(row["rounds"]), *accuracies, *work]
        lines.append("| " + " | ".join(cells) + " |")
    runs = list(figures["methods"][0]["runs"].values())
    majority = np.mean([run["majority_class_local_accuracy"] for run in runs])
    facts = f"Always a client's most frequent class: {100 * majority:.1f} % local accuracy. "
    facts += f"Equal for all: {figures['equal'].replace('_', '-')}. Seconds are those in rounds, without compiling. "
    where = ("{device} x {devices}, {cpus} CPUs, jax {jax}".format_map(found) for found in figures["versions"])
    facts += f"{'; '.join(where)}."
    return "\n".join([*lines, "", facts, "", *_differences(figures), f"`{figures['command']}`", ""])


def _differences(figures: dict) -> list[str]:
    """What the first method has more than each other one, seeds paired (study.statistics); no line of a single one."""
    from study.statistics import paired

    first, *others = figures["methods"]
    if not others:
        return []
    lines = [f"`{first['method']}` less the others, in points, seeds paired; in brackets 95 % of bootstrap resamples:"]
    lines += ["", "| less | server | local, own network |", "|" + "---|" * 3]
    for other in others:
        cells = [other["method"]]
        for place in ("server_accuracy", "local_accuracy_adapted.mean"):
            mine, theirs = (_by_seed(row["runs"], place.split(".")) for row in (first, other))
            found = paired(mine, theirs)
            cells.append("-" if found is None else _said(found))
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _by_seed(runs: dict, place: list[str]) -> dict[int, float]:
    """{seed: percent}, of the runs that have the figure."""
    found = {}
    for seed, value in runs.items():
        for name in place:
            value = None if value is None else value.get(name)
        if value is not None:
            found[int(seed)] = 100 * value
    return found


def _said(found: dict) -> str:
    between = "" if found["low"] is None else f" ({found['low']:+.1f} to {found['high']:+.1f})"
    return f"{found['mean']:+.1f}{between}, {found['verdict']}"


def _percent(runs: list[dict], place: list[str], spread: bool) -> str:
    values = list(_by_seed(dict(enumerate(runs)), place).values())
    if len(values) < len(runs):
        return "-"
    std = np.std(values, ddof=1 if len(values) > 1 else 0)
    return f"{np.mean(values):.1f}" + (f" +- {std:.1f}" if spread else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
