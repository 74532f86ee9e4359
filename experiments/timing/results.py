"""The record of what was timed: a JSON file that grows case by case, and what follows from its numbers."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
from pathlib import Path

from timing.cases import Case, Variant

ROOT = Path(__file__).parents[2]
SOURCES = ("fedmetanas_jax", "experiments/torch_bench", "experiments/timing")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")


class ResultsError(ValueError):
    """A results file that cannot be gone on with; the message is one line."""


def versions() -> dict[str, str]:
    """Of what decides a timing: packages, Python, and a digest of the source that is timed."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    found = {"python": platform.python_version(), "source": digest.hexdigest()[:16]}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def hardware(description: dict) -> str:
    """The machine's name, for people: of its accelerator, or of its CPU and how many cores this process has."""
    if description["platform"] != "cpu":
        return description["device"]
    info, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if info.exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        name = found.group(1).strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def slug(text: str) -> str:
    """Letters and digits with single hyphens, for a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def load(path: Path, machine: str) -> dict:
    """The record in `path`, or a fresh one. ResultsError if it is damaged or another machine's."""
    if not path.exists():
        return {"hardware": machine, "results": []}
    try:
        document = json.loads(path.read_text())
        found, _ = document["hardware"], document["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path} is not a record of timings, or a damaged one ({error!r})") from error
    if found != machine:
        raise ResultsError(f"{path} holds timings of '{found}', but this machine is '{machine}'; choose another --out")
    return document


def save(path: Path, document: dict) -> None:
    """Writes the record and its table beside it."""
    from timing.table import markdown

    write(path, document, markdown(document))


def write(path: Path, document: dict, page: str) -> None:
    """Writes a record and a page about it beside it, each whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, text in ((path, json.dumps(document, indent=1) + "\n"), (path.with_suffix(".md"), page)):
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        unfinished.write_text(text)
        os.replace(unfinished, target)


def same(entry: dict, case: Case, variant: Variant) -> bool:
    """Whether a result is of this work and this way of doing it."""
    return (entry["case"], entry["variant"]) == (_plain(case.work()), variant._asdict())


def open_variants(document: dict, case: Case, now: dict, seconds: float) -> tuple[Variant, ...]:
    """The variants that are still to be timed.

    One is settled when it is done or has failed with the versions of `now`; one that ran out of time is settled
    unless more than the `seconds` it had are left.
    """

    def known(variant: Variant) -> bool:
        for entry in document["results"]:
            if same(entry, case, variant) and entry["versions"] == now:
                return entry["status"] != "out of time" or seconds <= entry["allowed_seconds"] + 30
        return False

    return tuple(variant for variant in case.variants if not known(variant))


def put(document: dict, case: Case, variant: Variant, result: dict, facts: dict) -> None:
    """Adds a result with its `facts` (versions, command, seed, copy_bytes_per_second), in place of an older one."""
    document["results"] = [entry for entry in document["results"] if not same(entry, case, variant)]
    entry = {"case": _plain(case.work()), "variant": variant._asdict(), **facts, **result}
    document["results"].append(entry | (derived(case, entry) if result["status"] == "done" else {}))


def _plain(work: dict) -> dict:
    return json.loads(json.dumps(work))


def spread(seconds: list[float], factor: float = 1.0) -> dict[str, float]:
    """Median, minimum and quartiles of the seconds times `factor`."""
    times = [factor * s for s in seconds]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"median": middle, "min": min(times), "q1": low, "q3": high, "n": len(times)}


def derived(case: Case, entry: dict) -> dict:
    """What the seconds of a result mean: per round and step, images and bytes a second."""
    seconds = entry["seconds"]
    whole = case.round_tasks == case.tasks
    median = statistics.median(seconds)
    moved = entry.get("bytes_per_round")
    rate = None if moved is None else moved / median
    return {
        "round_seconds": spread(seconds, case.round_tasks / case.tasks),
        "round_is": "measured" if whole else f"extrapolated from {case.tasks} of {case.round_tasks} tasks",
        "step_seconds": spread(seconds, 1 / case.steps),
        "images_per_second": case.steps * case.batch / median,
        "bytes_per_second": rate,
        "share_of_copy_bandwidth": None if rate is None else rate / entry["copy_bytes_per_second"],
    }
