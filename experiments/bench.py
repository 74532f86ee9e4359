"""Times this project's round and the same round in PyTorch, in turn, and writes a table.

    python experiments/bench.py --quick     # two CPU cores, within 5 minutes
    python experiments/bench.py --gpu       # one GPU, within 9 minutes; the same command again goes on
    python experiments/bench.py --list      # what each sweep holds

Leaves results/bench-<hardware>.json and .md, added to after every case. What is already there with the same
versions of everything is not timed again, so a variant that ran out of time is later timed without the others. What
fails is recorded with its reason. Exit status as of main.py; 0 also where time ran out before the last case, 1 where a
case failed in all its variants.
"""

import re
import shlex
import sys
import time
from functools import partial
from pathlib import Path

from timing import results
from timing.cases import SWEEPS
from timing.workers import Worker, WorkerError, measure

from fedmetanas_jax import command
from fedmetanas_jax.command import Flag
from fedmetanas_jax.options import UsageError

MINUTES = {"quick": 5.0, "gpu": 9.0, "tiny": 5.0}
ENDING = 15  # seconds kept back for the last report and writing
FLAGS = {
    "quick": Flag(bool, False, "a step of the paper's supernet and a small round: for a CPU"),
    "gpu": Flag(bool, False, "the full sweep, for a GPU"),
    "tiny": Flag(bool, False, "seconds: shows that everything works, and times nothing worth knowing"),
    "list": Flag(bool, False, "show the cases of every sweep"),
    "only": Flag(str, None, "cases whose name holds this text alone"),
    "minutes": Flag(float, None, "to end within; default 5, with --gpu 9"),
    "together": Flag(bool, False, "build all variants of all cases at the same time, for machines with many cores"),
    "seed": Flag(int, 1, "of weights, images, batches and noise", least=0),
    "repeats": Flag(int, None, "timings of each variant", least=1),
    "out": Flag(str, None, "the JSON file; default results/bench-<hardware>.json"),
    "help": command.HELP,
}
say = partial(print, flush=True)


def parse(argv: list[str]) -> dict:
    """FLAGS as values, with "cases" and the "command"; argv[0] is the program. UsageError for what makes no sense."""
    asked = command.read(argv, FLAGS) | {"command": shlex.join(["python", "experiments/bench.py", *argv[1:]])}
    if asked["help"] or asked["list"]:
        return asked
    chosen = [name for name in SWEEPS if asked[name]]
    if len(chosen) != 1:
        raise UsageError("choose one of --quick, --gpu and --tiny")
    every = SWEEPS[chosen[0]]()
    asked["cases"] = [case for case in every if (asked["only"] or "") in case.name]
    if not asked["cases"]:
        names = ", ".join(case.name for case in every)
        raise UsageError(f"no case of --{chosen[0]} has '{asked['only']}' in its name; there are: {names}")
    if asked["minutes"] is None:
        asked["minutes"] = MINUTES[chosen[0]]
    if not 0 < asked["minutes"] < float("inf"):
        raise UsageError(f"minutes is {asked['minutes']:g}; it must be positive")
    if asked["out"] is not None and not asked["out"].endswith(".json"):
        raise UsageError(f"out is '{asked['out']}'; its name must end in .json")
    return asked


def run(asked: dict, start=Worker) -> None:
    """Times what is asked for and not yet known. WorkerError where all variants of a case fail."""
    end = time.monotonic() + 60 * asked["minutes"] - ENDING

    def left() -> float:
        return end - time.monotonic()

    versions = {"source": results.digest()}
    for side in ("ours", "torch"):
        with start(side) as worker:
            versions |= worker.ask(left(), "describe")
    if asked["gpu"] and versions["backend"] == "cpu":
        raise UsageError("--gpu wants an accelerator, but JAX has found the CPU alone; see --quick")
    machine = results.hardware(versions)
    slug = re.sub("[^a-z0-9]+", "-", machine.lower()).strip("-")
    path = Path(asked["out"] or f"results/bench-{slug}.json")
    document = results.load(path, machine)
    facts = {"versions": versions, "command": asked["command"], "seed": asked["seed"]}
    say(machine)
    failed, unfinished, due = [], [], []
    for case in asked["cases"]:
        variants = results.open_variants(document, case, versions, left())
        if variants:
            due.append(case._replace(repeats=asked["repeats"] or case.repeats, variants=variants))
        else:
            say(f"{case.name}: already there")
    for cases in [due] if asked["together"] and due else [[case] for case in due]:
        names = ", ".join(case.name for case in cases)
        if left() < 20:
            unfinished.append(names)
            continue
        say(f"{names}: {left():.0f} s left")
        every = measure(cases, asked["seed"], left, say, start, asked["together"])
        for case, found in zip(cases, every, strict=True):
            for variant, result in zip(case.variants, found, strict=True):
                results.put(document, case, variant, result, facts)
                if result["status"] != "done":
                    say(f"  {variant.label}: {result['status']}: {result['reason']}")
            failed += [case.name] if all(result["status"] == "failed" for result in found) else []
            unfinished += [case.name] if any(result["status"] == "out of time" for result in found) else []
        results.save(path, document)
    if path.exists():
        say(f"{path} and {path.with_suffix('.md')}")
    if unfinished:
        say(f"left for another call of the same command: {', '.join(unfinished)}")
    if failed:
        raise WorkerError(f"no variant could be timed of: {', '.join(failed)}")


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""

    def answer() -> None:
        asked = parse(argv)
        if asked["help"]:
            say(command.help_text(__doc__, FLAGS))
        elif asked["list"]:
            for name, cases in SWEEPS.items():
                say(f"--{name}, {MINUTES[name]:.0f} minutes:")
                for case in cases():
                    say(f"  {case.name}: {'; '.join(variant.label for variant in case.variants)}")
        else:
            run(asked)

    return command.exit_status(answer, lambda: (WorkerError, OSError))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
