"""Methods side by side: rates chosen on one seed, several seeds measured, equal work for all; a table.

    python experiments/compare.py --config=digits_dir01 --methods=fedavg,fedrep --seeds=1,2,3 --out=results/mine

Every method is first run with each of --rates on --tune_seed; the rate whose clients fare best with the
network the method gives them (mean local accuracy) is then run on --seeds. A single rate is taken as it is.
A method whose round costs more image-gradients than FedAvg's gets fewer rounds, so that all methods compute the
same number in total (methods section 12.3). Each run has a workdir of its own below --workdir: what is finished
is not run again, and what was interrupted goes on. Leaves OUT.json (every run's figures) and OUT.md (the table).

Flags of experiments/main.py (--config, --config.FIELD, --config.options.NAME, --data_dir) hold for all runs.
Exit status as of main.py.
"""

import json
import shlex
import sys
from pathlib import Path

import numpy as np
from absl import flags
from main import exit_status, own_flags, parse

from fedmetanas_jax.config import to_dict
from fedmetanas_jax.options import UsageError, parse_value

OWN = flags.FlagValues()
for _name, _default, _text in (
    ("methods", "fedavg,fedprox,scaffold,ditto,perfedavg,fedrep,fedbabu", "the methods, separated by commas"),
    ("seeds", "1,2,3,4,5", "the seeds that are measured"),
    ("rates", "0.01,0.025,0.1", "the values of options.lr to choose from"),
    ("tune_seed", "0", "the seed that the rate is chosen on"),
    ("out", None, "what the table and the figures are called: OUT.md, OUT.json; required"),
    ("workdir", "runs/compare", "where the runs are kept"),
):
    flags.DEFINE_string(_name, _default, _text, flag_values=OWN)


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""
    return exit_status(lambda: compare(own_flags(OWN, argv), shlex.join(["python", *argv])))


def compare(rest: list[str], command: str) -> None:
    """All runs, then the two files."""
    from fedmetanas_jax.engine.records import versions, write_json, write_text

    if OWN.out is None:
        raise UsageError("--out=NAME is needed: where the table is written")
    methods = parse_value(OWN.methods, tuple[str, ...])
    seeds, rates = parse_value(OWN.seeds, tuple[int, ...]), parse_value(OWN.rates, tuple[float, ...])
    tune_seed = parse_value(OWN.tune_seed, int)
    for name, values in (("methods", methods), ("seeds", seeds), ("rates", rates)):
        if not values:
            raise UsageError(f"--{name} is empty; it must name at least one")
    if tune_seed in seeds:
        raise UsageError(f"--tune_seed={tune_seed} is one of --seeds; a rate is chosen on a seed that is not measured")
    # Every request is read before the first run, so that a mistyped name costs nothing.
    asked = {method: parse(["", *rest, f"--config.method={method}"]) for method in ("fedavg", *methods)}
    configs = {method: one.config for method, one in asked.items()}
    per_round = {method: image_gradients(one.config, one.data_dir) for method, one in asked.items()}
    table = []
    for method in methods:
        rounds = max(1, round(configs[method].rounds * per_round["fedavg"] / per_round[method]))
        tuned = {rate: one_run(rest, method, rate, tune_seed, rounds) for rate in rates if len(rates) > 1}
        best = max(tuned or rates, key=lambda rate: tuned[rate]["local_accuracy_adapted"]["mean"] if tuned else rate)
        runs = {seed: one_run(rest, method, best, seed, rounds) for seed in seeds}
        chosen = {rate: run["local_accuracy_adapted"]["mean"] for rate, run in tuned.items()}
        row = {"method": method, "config": to_dict(configs[method]), "lr": best, "rounds": rounds}
        table.append(row | {"tuning": chosen, "runs": runs})
        figures = {"command": command, "versions": versions(), "methods": table}
        write_json(f"{OWN.out}.json", figures)
        write_text(f"{OWN.out}.md", markdown(figures))
    print(markdown(figures))


def image_gradients(config, data_dir: str | None) -> float:
    """Image-gradients of a round of the method, averaged over clients."""
    import jax
    import jax.numpy as jnp

    from fedmetanas_jax import build
    from fedmetanas_jax.engine.round import state_shapes, train_examples

    algorithm, data = build.without_a_run(config, data_dir)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state_shapes(algorithm, 1))
    client_state = jax.tree.map(lambda x: x[0], state.client_states)

    @jax.jit
    def count(client):  # no training is left in this program: the number depends on the rows alone
        own = train_examples(data, client)
        update = algorithm.client_update(state.server_state, client_state, own, jax.random.key(0))
        return update.metrics["image_gradients"]

    return config.cohort * float(np.mean([count(client) for client in range(config.clients)]))


def one_run(rest: list[str], method: str, rate: float, seed: int, rounds: int) -> dict:
    """The result.json of a run, which is begun, resumed or, if it is finished, read."""
    import jax

    from fedmetanas_jax import build

    own = {"method": method, "options.lr": rate, "seed": seed, "rounds": rounds}
    asked = parse(["", *rest, *(f"--config.{name}={value}" for name, value in own.items())])
    workdir = Path(OWN.workdir) / f"{asked.task}-{method}-lr{rate:g}-seed{seed}"
    result, config = workdir / "result.json", json.loads(json.dumps(to_dict(asked.config)))
    if result.exists() and json.loads((workdir / "config.json").read_text())["config"] == config:
        return json.loads(result.read_text())
    print(f"--- {method}, lr {rate:g}, seed {seed}, {rounds} rounds", flush=True)
    build.run(asked.config, task=asked.task, workdir=workdir, data_dir=asked.data_dir)
    jax.clear_caches()
    return json.loads(result.read_text())


def markdown(figures: dict) -> str:
    """The table: accuracies in percent, mean +- std over seeds; std over clients is the mean of the seeds'."""
    heads = (
        "method", "lr", "rounds", "server", "local, global network", "local, own network", "std over clients",
        "worst tenth", "one step", "E epochs", "seconds",
    )  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in figures["methods"]:
        runs = list(row["runs"].values())

        def spread(get, runs=runs) -> str:
            values = [100 * get(run) for run in runs]
            return f"{np.mean(values):.1f} +- {np.std(values, ddof=1 if len(values) > 1 else 0):.1f}"

        def mean(get, runs=runs) -> float:
            return float(np.mean([get(run) for run in runs]))

        cells = [
            row["method"], f"{row['lr']:g}", str(row["rounds"]),
            spread(lambda run: run["server_accuracy"]),
            spread(lambda run: run["local_accuracy"]["mean"]),
            spread(lambda run: run["local_accuracy_adapted"]["mean"]),
            f"{100 * mean(lambda run: run['local_accuracy_adapted']['std']):.1f}",
            f"{100 * mean(lambda run: run['local_accuracy_adapted']['worst_tenth']):.1f}",
            spread(lambda run: run["local_accuracy_by_depth"]["step"]["mean"]),
            spread(lambda run: run["local_accuracy_by_depth"]["epochs"]["mean"]),
            f"{mean(lambda run: run['seconds_in_rounds']):.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    runs = list(figures["methods"][0]["runs"].values())
    majority = np.mean([run["majority_class_local_accuracy"] for run in runs])
    versions, work = figures["versions"], np.mean([run["image_gradients"] for run in runs])
    lines += [
        "",
        f"Always a client's most frequent class: {100 * majority:.1f} % local accuracy. "
        f"Image-gradients a run: {work:.3g}. "
        f"{versions['device']} x {versions['devices']}, {versions['cpus']} CPUs, jax {versions['jax']}.",
        "",
        f"`{figures['command']}`",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
