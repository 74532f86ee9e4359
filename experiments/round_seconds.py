"""Seconds a round of several methods, taken in turn in one process, relative to the first of them.

    python experiments/round_seconds.py --config=digits_dir01 --methods=fedavg,scaffold,ditto --repeats=5

Every method's round is compiled and run once; then all methods run a round each, over and over, so that what
else the machine does falls on all of them. Prints a Markdown table of medians, and how many programs each
method's rounds were compiled to. Flags of experiments/main.py (--config, --config.FIELD) hold for all.
"""

import sys
import time

import numpy as np
from absl import flags
from main import exit_status, own_flags, parse

from fedmetanas_jax.options import UsageError, parse_value

OWN = flags.FlagValues()
for _name, _default, _text in (
    ("methods", "fedavg,fedprox,scaffold,ditto,perfedavg,fedrep,fedbabu", "the methods, separated by commas"),
    ("repeats", "5", "timed rounds of each"),
):
    flags.DEFINE_string(_name, _default, _text, flag_values=OWN)


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""
    return exit_status(lambda: measure(own_flags(OWN, argv)))


def measure(rest: list[str]) -> None:
    """Compiles, times and prints."""
    import jax
    import jax.numpy as jnp

    from fedmetanas_jax import build
    from fedmetanas_jax.engine.round import init_state, make_round

    methods, repeats = parse_value(OWN.methods, tuple[str, ...]), parse_value(OWN.repeats, int)
    if not methods or repeats < 1:
        raise UsageError(f"--methods={OWN.methods} --repeats={repeats}: at least one of each is needed")
    rounds = {}
    for method in methods:
        asked = parse(["", *rest, f"--config.method={method}"])
        config = asked.config
        algorithm, data = build.without_a_run(config, asked.data_dir)
        at_once = max(build.clients_at_once(config), 0)
        step = make_round(algorithm, cohort_size=config.cohort, at_once=at_once)
        state = init_state(algorithm, config.seed, config.clients)

        def run(state, step=step, data=data):
            start = time.perf_counter()
            state, metrics = step(state, data, state.round + 1)
            jax.block_until_ready((state, metrics))
            return state, time.perf_counter() - start, float(jnp.sum(metrics["image_gradients"]))

        state, compiling, gradients = run(state)
        rounds[method] = {"run": run, "step": step, "state": state, "first": compiling, "gradients": gradients}
        rounds[method]["seconds"] = []
    for _ in range(repeats):
        for row in rounds.values():
            row["state"], seconds, _ = row["run"](row["state"])
            row["seconds"].append(seconds)

    first = next(iter(rounds.values()))
    heads = ("method", f"seconds a round (median of {repeats})", f"of {methods[0]}'s", "image-gradients", "programs")
    print("| " + " | ".join((*heads, "first round, compiling")) + " |")
    print("|---|---|---|---|---|---|")
    for method, row in rounds.items():
        median = float(np.median(row["seconds"]))
        # Medians of the ratios in each turn, whose two rounds ran next to each other.
        ratio = float(np.median(np.array(row["seconds"]) / np.array(first["seconds"])))
        programs, gradients = row["step"]._cache_size(), row["gradients"]
        print(f"| {method} | {median:.3g} | {ratio:.2f} | {gradients:.0f} | {programs} | {row['first']:.1f} s |")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
