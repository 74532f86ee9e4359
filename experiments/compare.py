"""Methods side by side: rates chosen on one seed, several seeds measured, equal work for all; a table.

    python experiments/compare.py --config=digits_dir01 --methods=fedavg,fedrep --seeds=1,2,3 --out=results/mine

Every method is first run with each of --rates as config.lr on --tune_seed; the rate whose clients fare best with
the network the method gives them (mean local accuracy) is then run on --seeds. A single rate is taken as it is.
A method whose round costs more image-gradients than FedAvg's gets fewer rounds, so that all methods compute the
same number in total (methods section 12.3). Each run has a workdir of its own below --workdir: what is finished
is not run again, and what was interrupted goes on. Leaves OUT.json (every run's figures) and OUT.md (the table).

Flags of main.py (--config, --config.FIELD, --config.options.NAME, --data_dir) hold for all runs; exit status as there.
"""

import json
import shlex
import sys

import command
import numpy as np
from command import Flag
from main import FLAGS, Parsed, failures, help_text, list_text, parse

from fedmetanas_jax.config import Config, to_dict
from fedmetanas_jax.files import write_json, write_text
from fedmetanas_jax.options import UsageError

METHODS = ("fedavg", "fedprox", "scaffold", "ditto", "perfedavg", "fedrep", "fedbabu")
OWN = {
    "methods": Flag(tuple[str, ...], METHODS, "the methods, separated by commas"),
    "seeds": Flag(tuple[int, ...], (1, 2, 3, 4, 5), "the seeds that are measured"),
    "rates": Flag(tuple[float, ...], (0.01, 0.025, 0.1), "the values of config.lr to choose from"),
    "tune_seed": Flag(int, 0, "the seed that the rate is chosen on"),
    "out": Flag(str, None, "what the table and the figures are called: OUT.md, OUT.json; required"),
    "workdir": Flag(str, "runs/compare", "where the runs are kept"),
} | {name: flag for name, flag in FLAGS.items() if name not in ("workdir", "stop_after")}


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""

    def answer() -> None:
        asked = parse(argv, OWN)
        if asked.show == "run":
            compare(argv, asked)
        else:
            print(help_text(asked, __doc__, OWN) if asked.show == "help" else list_text())

    return command.exit_status(answer, failures)


def compare(argv: list[str], asked: Parsed) -> None:
    """All runs, then the two files; argv[0] is the program. UsageError where the request makes no sense."""
    from fedmetanas_jax.engine.records import versions

    names = ("methods", "seeds", "rates", "tune_seed", "out")
    methods, seeds, rates, tune_seed, out = (asked.values[name] for name in names)
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
    configs = {method: parse([*argv, f"--config.method={method}"], OWN).config for method in every}
    per_round = {method: image_gradients(config, asked.data_dir) for method, config in configs.items()}
    table = []
    for method in methods:
        rounds = max(1, round(configs[method].rounds * per_round["fedavg"] / per_round[method]))

        def result(rate: float, seed: int, method=method, rounds=rounds) -> dict:
            return one_run(argv, {"method": method, "lr": rate, "seed": seed, "rounds": rounds})

        tuning = {rate: result(rate, tune_seed)["local_accuracy_adapted"]["mean"] for rate in rates if len(rates) > 1}
        best = max(tuning, key=tuning.get, default=rates[0])
        row = {"method": method, "config": to_dict(configs[method]), "lr": best, "rounds": rounds, "tuning": tuning}
        table.append(row | {"runs": {seed: result(best, seed) for seed in seeds}})
        figures = {"command": shlex.join(["python", *argv]), "versions": versions(), "methods": table}
        write_json(f"{out}.json", figures)
        write_text(f"{out}.md", markdown(figures))
    print(markdown(figures))


def image_gradients(config: Config, data_dir: str | None) -> float:
    """Image-gradients of a round of the method, averaged over clients."""
    import jax
    import jax.numpy as jnp

    from fedmetanas_jax import build
    from fedmetanas_jax.engine.round import state_shapes, train_examples

    algorithm, data = build.without_a_run(config, data_dir)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state_shapes(algorithm, 1))
    own, key = jax.tree.map(lambda x: x[0], state.owns), jax.random.key(0)

    @jax.jit
    def count(client):  # no training is left in this program: the number depends on the rows alone
        message = algorithm.send(state.server, client, key)
        reply = algorithm.client_update(message, own, train_examples(data, client), key)
        return reply.metrics["image_gradients"]

    return config.cohort * float(np.mean([count(client) for client in range(config.clients)]))


def one_run(argv: list[str], fields: dict) -> dict:
    """The result.json of the run with these fields, which is begun, resumed or, if it is finished, read."""
    import jax

    from fedmetanas_jax import build

    asked = parse([*argv, *(f"--config.{name}={value}" for name, value in fields.items())], OWN)
    workdir = asked.workdir / f"{asked.task}-{fields['method']}-lr{fields['lr']:g}-seed{fields['seed']}"
    result, config = workdir / "result.json", json.loads(json.dumps(to_dict(asked.config)))
    if result.exists() and json.loads((workdir / "config.json").read_text())["config"] == config:
        return json.loads(result.read_text())
    print(f"--- {', '.join(f'{name} {value}' for name, value in fields.items())}", flush=True)
    build.run(asked.config, task=asked.task, workdir=workdir, data_dir=asked.data_dir)
    jax.clear_caches()
    return json.loads(result.read_text())


# Of a run's result: the column's head, the figure's place, and whether its spread over seeds is shown.
COLUMNS = (
    ("server", "server_accuracy", True),
    ("local, global network", "local_accuracy.mean", True),
    ("local, own network", "local_accuracy_adapted.mean", True),
    ("std over clients", "local_accuracy_adapted.std", False),
    ("worst tenth", "local_accuracy_adapted.worst_tenth", False),
    ("one step", "local_accuracy_by_depth.step.mean", True),
    ("E epochs", "local_accuracy_by_depth.epochs.mean", True),
)


def markdown(figures: dict) -> str:
    """The table: accuracies in percent, mean +- std over seeds; std over clients is the mean of the seeds'.

    "-" where a method has no such figure, as the server accuracy of one without a global network.
    """
    heads = ("method", "lr", "rounds", *(head for head, _, _ in COLUMNS), "seconds")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in figures["methods"]:
        runs = list(row["runs"].values())
        accuracies = [_percent(runs, place.split("."), spread) for _, place, spread in COLUMNS]
        seconds = np.mean([run["seconds_in_rounds"] for run in runs])
        cells = [row["method"], f"{row['lr']:g}", str(row["rounds"]), *accuracies, f"{seconds:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    runs = list(figures["methods"][0]["runs"].values())
    majority, work = (np.mean([run[n] for run in runs]) for n in ("majority_class_local_accuracy", "image_gradients"))
    facts = f"Always a client's most frequent class: {100 * majority:.1f} % local accuracy. "
    facts += f"Image-gradients a run: {work:.3g}. "
    facts += "{device} x {devices}, {cpus} CPUs, jax {jax}.".format_map(figures["versions"])
    return "\n".join([*lines, "", facts, "", f"`{figures['command']}`", ""])


def _percent(runs: list[dict], place: list[str], spread: bool) -> str:
    values = list(runs)
    for name in place:
        values = [None if value is None else value.get(name) for value in values]
    if None in values:
        return "-"
    std = 100 * np.std(values, ddof=1 if len(values) > 1 else 0)
    return f"{100 * np.mean(values):.1f}" + (f" +- {std:.1f}" if spread else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
