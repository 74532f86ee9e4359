"""The record of what was timed: a JSON file that grows case by case, a table, and what follows from its numbers."""

import hashlib
import json
import platform
import re
import statistics
from pathlib import Path

from fedmetanas_jax.files import write_json, write_text
from fedmetanas_jax.options import UsageError
from timing.cases import Case, Variant

ROOT = Path(__file__).parents[2]
SOURCES = ("fedmetanas_jax", "experiments/torch_bench", "experiments/timing")


def digest() -> str:
    """Of the source that is timed."""
    found = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


def hardware(described: dict) -> str:
    """The machine's name, for people: of its accelerator, or of its CPU and how many cores it has."""
    if described["backend"] != "cpu":
        return described["device"]
    info, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if info.exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        name = found.group(1).strip()
    return f"{name}, {described['cpus']} cores"


def load(path: Path, machine: str) -> dict:
    """The record in `path`, or a fresh one. UsageError if it is damaged or another machine's."""
    if not path.exists():
        return {"hardware": machine, "results": []}
    try:
        document = json.loads(path.read_text())
        found, _ = document["hardware"], document["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a record of timings, or a damaged one ({error!r})") from error
    if found != machine:
        raise UsageError(f"{path} holds timings of '{found}', but this machine is '{machine}'; choose another --out")
    return document


def save(path: Path, document: dict) -> None:
    """Writes the record and its table beside it."""
    write_json(path, document, indent=1)
    write_text(path.with_suffix(".md"), markdown(document))


def find(document: dict, case: Case, variant: Variant) -> dict | None:
    """The result of this work and this way of doing it, whenever it was taken."""
    wanted = json.loads(json.dumps(case.work())), variant._asdict()
    return next((entry for entry in document["results"] if (entry["case"], entry["variant"]) == wanted), None)


def open_variants(document: dict, case: Case, now: dict, seconds: float) -> tuple[Variant, ...]:
    """The variants that are still to be timed.

    One is settled when it is done or has failed with the versions of `now`; one that ran out of time is settled
    unless more than the `seconds` it had are left.
    """

    def settled(variant: Variant) -> bool:
        entry = find(document, case, variant)
        if entry is None or entry["versions"] != now:
            return False
        return entry["status"] != "out of time" or seconds <= entry["allowed_seconds"] + 30

    return tuple(variant for variant in case.variants if not settled(variant))


def put(document: dict, case: Case, variant: Variant, result: dict, facts: dict) -> None:
    """Adds a result with its `facts` (versions, command, seed), in place of an older one."""
    if old := find(document, case, variant):
        document["results"].remove(old)
    entry = {"case": json.loads(json.dumps(case.work())), "variant": variant._asdict(), **facts, **result}
    document["results"].append(entry | (derived(case, result["seconds"]) if result["status"] == "done" else {}))


def derived(case: Case, seconds: list[float]) -> dict:
    """What the seconds of a result mean: per round and step, and images a second."""
    whole, median = case.round_tasks == case.tasks, statistics.median(seconds)
    rounds = case.tasks / case.round_tasks
    return {
        "round_seconds": {"median": median / rounds, "min": min(seconds) / rounds, "n": len(seconds)},
        "round_is": "measured" if whole else f"extrapolated from {case.tasks} of {case.round_tasks} tasks",
        "step_seconds": median / case.steps,
        "images_per_second": case.steps * case.batch / median,
    }


HEAD = ("case", "variant", "s/round (median; min)", "round is", "ms/step", "images/s")
HEAD += ("compile s (cold / warm)", "peak device / host GB")
LEGEND = """\
A step is one batch of one client, forward and backward, with its share of the optimizers and of the averaging; a round
is all clients' tasks. Variants of a case ran in turn, each in its own process, n times. Compile seconds of "ours" are
XLA's alone, without and with a filled compilation cache: tracing comes before them and is not included (the JSON file
has it). Those of PyTorch are its first run's, all included. Peak host memory is that of the whole process, compiling
included. "-" is not measured; the JSON file beside this one says why, and has the losses too. Images are random and
not augmented.
"""


def markdown(document: dict) -> str:
    """A page: what machine, what is timed with which versions, one row for each result."""
    lines = [f"# Timings on {document['hardware']}", ""]
    for key in ("versions", "seed", "command"):
        for value in dict.fromkeys(_text(entry[key]) for entry in document["results"]):
            lines.append(f"- {key.capitalize()}: {value}")
    rows = [HEAD, ["---"] * len(HEAD), *map(_cells, document["results"])]
    escaped = ([str(cell).replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join([*lines, "", LEGEND, *(f"| {' | '.join(row)} |" for row in escaped), ""])


def _text(value) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else f"`{value}`"


def _cells(entry: dict) -> list[str]:
    case, variant = entry["case"], Variant(**entry["variant"])
    size = f"C={case['width']}, {case['cells']} cells, {case['nodes']} nodes"
    work = f"K={case['clients']}, M={case['M']}, batch {case['batch']}, {case['dtype']}, {case['plan']} plan"
    name = f"{case['name']}: {size}, {work}"
    if entry["status"] != "done":
        return [name, variant.label, f"{entry['status']}: {entry['reason']}", *["-"] * (len(HEAD) - 3)]

    def number(key: str, unit: float, form: str) -> str:
        return "-" if entry.get(key) is None else format(entry[key] / unit, form)

    cold = "first_run_seconds" if variant.side == "torch" else "compile_seconds_cold"
    return [
        name,
        variant.label,
        "{median:.3g} ({min:.3g}), n={n}".format_map(entry["round_seconds"]),
        entry["round_is"],
        number("step_seconds", 1e-3, ".3g"),
        number("images_per_second", 1, ".3g"),
        f"{number(cold, 1, '.1f')} / {number('compile_seconds_warm', 1, '.1f')}",
        f"{number('device_peak_bytes', 1e9, '.2f')} / {number('host_peak_bytes', 1e9, '.2f')}",
    ]
