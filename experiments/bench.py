"""Times this project's round and the same round in PyTorch, in turn, and writes a table.

    python experiments/bench.py --quick     # two CPU cores, within 5 minutes
    python experiments/bench.py --gpu       # one GPU, within 9 minutes; the same command again goes on
    python experiments/bench.py --list      # what each sweep holds

Leaves results/bench-<hardware>.json and .md, added to after every case. What is already there with the same
versions of everything is not timed again, so a variant that ran out of time is later timed without the others. What
fails is recorded with its reason.

Exit status: 0 done, also if time ran out before the last case, 1 a case failed in all its variants or the run could
not go on, 2 the request made no sense, 130 interrupted.
"""

import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

from absl import flags
from timing import alternate, results
from timing.cases import SWEEPS

MINUTES = {"quick": 5.0, "gpu": 9.0, "tiny": 5.0}
ENDING = 15  # seconds kept back for the last report and writing


class UsageError(ValueError):
    """A request that makes no sense; the message is one line."""


class Parsed(NamedTuple):
    """What a command line asks for."""

    show: str  # "run", "list" or "help"
    sweep: str
    only: str
    minutes: float
    seed: int
    out: Path | None
    repeats: int | None
    command: str


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    for name, text in (
        ("quick", "a step of the paper's supernet and a small round: for a CPU"),
        ("gpu", "the full sweep, for a GPU"),
        ("tiny", "seconds: shows that everything works, and times nothing worth knowing"),
        ("list", "show the cases of every sweep"),
        ("help", "show this"),
    ):
        flags.DEFINE_bool(name, False, text, flag_values=values)
    flags.DEFINE_string("only", "", "cases whose name holds this text alone", flag_values=values)
    flags.DEFINE_float("minutes", None, "to end within; default 5, with --gpu 9", flag_values=values)
    flags.DEFINE_integer("seed", 1, "of weights, images, batches and noise", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("repeats", None, "timings of each variant", lower_bound=1, flag_values=values)
    flags.DEFINE_string("out", None, "the JSON file; default results/bench-<hardware>.json", flag_values=values)
    return values


def parse(argv: list[str]) -> Parsed:
    """The command line as values; argv[0] is the program. UsageError if it asks for what is not there."""
    values = _flags()
    try:
        positional = values(argv)[1:]
    except flags.Error as error:
        raise UsageError(" ".join(str(error).split())) from None
    if positional:
        raise UsageError(f"unexpected argument '{positional[0]}'; every argument is a --flag=value")
    show = "help" if values.help else "list" if values.list else "run"
    chosen = [name for name in SWEEPS if values[name].value]
    if show == "run" and len(chosen) != 1:
        raise UsageError("choose one of --quick, --gpu and --tiny")
    sweep = chosen[0] if chosen else "quick"
    minutes = MINUTES[sweep] if values.minutes is None else values.minutes
    if not 0 < minutes < float("inf"):
        raise UsageError(f"minutes is {minutes}; it must be positive")
    if show == "run" and not any(values.only in case.name for case in SWEEPS[sweep]()):
        names = ", ".join(case.name for case in SWEEPS[sweep]())
        raise UsageError(f"no case of --{sweep} has '{values.only}' in its name; there are: {names}")
    out = None if values.out is None else Path(values.out)
    if out is not None and out.suffix != ".json":
        raise UsageError(f"out is '{out}'; its name must end in .json")
    command = shlex.join(["python", "experiments/bench.py", *argv[1:]])
    return Parsed(show, sweep, values.only, minutes, values.seed, out, values.repeats, command)


def run(asked: Parsed, start=alternate.Worker) -> int:
    """Times what is asked for and not yet known -> the exit status."""
    end = time.monotonic() + 60 * asked.minutes - ENDING

    def left() -> float:
        return end - time.monotonic()

    def say(text: str) -> None:
        print(text, flush=True)

    descriptions = {}
    for side in ("ours", "torch"):
        with start(side) as worker:
            descriptions[side] = worker.ask({"do": "describe"}, left())
    ours = descriptions["ours"]
    if asked.sweep == "gpu" and ours["platform"] == "cpu":
        raise UsageError("--gpu wants an accelerator, but JAX has found the CPU alone; see --quick")
    machine = results.hardware(ours)
    path = asked.out or Path("results") / f"bench-{results.slug(machine)}.json"
    document = results.load(path, machine)
    now = results.versions()
    facts = {
        "versions": now,
        "command": asked.command,
        "seed": asked.seed,
        "copy_bytes_per_second": ours["copy_bytes_per_second"],
        "described": descriptions,
    }
    say(f"{machine}: copies at {ours['copy_bytes_per_second'] / 1e9:.1f} GB/s")
    failed, unfinished = [], []
    for case in SWEEPS[asked.sweep]():
        if asked.only not in case.name:
            continue
        case = case if asked.repeats is None else case._replace(repeats=asked.repeats)
        case = case._replace(variants=results.open_variants(document, case, now, left()))
        if not case.variants:
            say(f"{case.name}: already there")
            continue
        if left() < 20:
            unfinished.append(case.name)
            continue
        say(f"{case.name}: {left():.0f} s left")
        found = alternate.measure(case, asked.seed, left, say, start)
        for variant, result in zip(case.variants, found, strict=True):
            results.put(document, case, variant, result, facts)
            if result["status"] != "done":
                say(f"  {variant.label}: {result['status']}: {result['reason']}")
        results.save(path, document)
        failed += [case.name] if all(result["status"] == "failed" for result in found) else []
        unfinished += [case.name] if any(result["status"] == "out of time" for result in found) else []
    if path.exists():
        say(f"{path} and {path.with_suffix('.md')}")
    if unfinished:
        say(f"left for another call of the same command: {', '.join(unfinished)}")
    if failed:
        raise alternate.WorkerError(f"no variant could be timed of: {', '.join(failed)}")
    return 0


def list_text() -> str:
    """The sweeps with their cases and variants."""
    lines = []
    for name, cases in SWEEPS.items():
        lines.append(f"--{name}, {MINUTES[name]:.0f} minutes:")
        for case in cases():
            lines.append(f"  {case.name}: {'; '.join(variant.label for variant in case.variants)}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status; nothing a user can cause ends in a traceback."""
    try:
        asked = parse(argv)
        if asked.show == "help":
            values = _flags()
            print(__doc__.strip(), *(f"  --{name:<8} {values[name].help}" for name in values), sep="\n")
        elif asked.show == "list":
            print(list_text())
        else:
            return run(asked)
    except UsageError as error:
        return _fail(error, 2)
    except (alternate.WorkerError, results.ResultsError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130
    return 0


def _fail(error: Exception, status: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv))
