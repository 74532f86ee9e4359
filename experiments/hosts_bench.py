"""One run by 1, 2 and 4 processes of this machine: whether it is the same run, and what a round takes.

    python experiments/hosts_bench.py              # a few minutes on two idle CPU cores
    python experiments/hosts_bench.py --only=scaffold

SCAFFOLD, whose clients keep something, and FedMetaNAS through a prune event, on the bundled digits; each process has
one CPU device and talks to the others by gloo on 127.0.0.1. The same run by one process with as many devices is what
the bits are compared with: the records without their clocks, the whole state in the last checkpoint, and the network's
file. Every run compiles anew. Leaves OUT.json and OUT.md. Exit status as of main.py, and 1 where a bit differs.
"""

import hashlib
import json
import os
import platform
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fedmetanas_jax import command
from fedmetanas_jax.command import Flag
from fedmetanas_jax.files import write_json, write_text
from fedmetanas_jax.options import UsageError, nearest

MAIN = Path(__file__).with_name("main.py")
FLAGS = {
    "only": Flag(str, None, "scaffold or fedmetanas alone"),
    "out": Flag(str, "results/hosts", "what the table and the figures are called: OUT.md, OUT.json"),
    "help": command.HELP,
}
COMMON = {
    "clients": 8, "cohort": 4, "train_size": 96, "test_size": 40, "rounds": 8, "epochs": 2, "batch": 16, "at_once": 1,
    "eval_every": 4, "checkpoint_every": 4,
}  # fmt: skip
PRUNING = {"prune_from": 0.5, "prune_until": 0.5, "prune_events": 1, "prune_tolerance": "none"}
RUNS = {
    "scaffold": {"method": "scaffold", "final_adapt": "false"},
    "fedmetanas": {"method": "fedmetanas", "width": 8, "cells": 1, "nodes": 2, "final_adapt": "false"}
    | {f"options.{name}": value for name, value in PRUNING.items()},
}
PLACES = ((1, 1), (1, 2), (2, 1), (1, 4), (4, 1))  # processes, and devices of each
CLOCK = ("seconds", "compile_seconds", "compile_seconds_ahead", "event_stall_seconds")


class BenchError(RuntimeError):
    """A run failed."""


def parse(argv: list[str]) -> dict:
    """FLAGS as values; argv[0] is the program. UsageError for what makes no sense."""
    asked = command.read(argv, FLAGS)
    if asked["only"] not in (None, *RUNS):
        raise UsageError(nearest("run", asked["only"], RUNS))
    return asked


def bench(asked: dict, argv: list[str]) -> int:
    """Does all runs, each alone on the machine, and writes the two files -> 1 where a bit differs."""
    begun, found = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in [asked["only"]] if asked["only"] else RUNS:
            for processes, devices in PLACES:
                place = f"{processes} x {devices}"
                found.setdefault(name, {})[place] = run(name, processes, devices, Path(scratch) / f"{name} {place}")
                print(f"{name}, {place}: {found[name][place]['wall_seconds']:.0f} s in all", flush=True)
    for rows in found.values():
        for row in rows.values():
            row["same_as"] = [place for place, other in rows.items() if other["bits"] == row["bits"]]
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "processor": processor()}
    load = os.getloadavg()[0]
    figures = {"command": shlex.join(["python", *argv]), "machine": machine, "load_at_the_end": load, "runs": found}
    figures["minutes"] = (time.monotonic() - begun) / 60
    write_json(f"{asked['out']}.json", figures)
    write_text(f"{asked['out']}.md", markdown(figures))
    print(markdown(figures))
    return int(any(f"1 x {n}" not in rows[f"{n} x 1"]["same_as"] for rows in found.values() for n in (2, 4)))


def run(name: str, processes: int, devices: int, folder: Path) -> dict:
    """One run, by so many processes of so many devices each. BenchError where one of them fails."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    fields = COMMON | RUNS[name] | {"devices": devices if processes == 1 else 0}
    line = [sys.executable, str(MAIN), *(f"--config.{field}={value}" for field, value in fields.items())]
    if processes > 1:
        line += [f"--coordinator={address}", f"--processes={processes}", "--heartbeat=600"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "xla")}
    env["JAX_COORDINATOR_BIND_ADDRESS"] = address
    begun, started = time.monotonic(), []
    try:
        for process in range(processes):
            mine = [f"--process={process}"] if processes > 1 else []
            with open(folder / f"{process}.log", "w") as log:
                how = {"env": env, "stdout": log, "stderr": subprocess.STDOUT}
                started.append(subprocess.Popen([*line, *mine, f"--workdir={folder / f'run{process}'}"], **how))
        failed = [process for process in range(processes) if started[process].wait()]
    finally:
        for process in started:  # of an interrupted bench
            process.kill()
    if failed:
        said = (folder / f"{failed[0]}.log").read_text().splitlines()
        raise BenchError(f"{name} by {processes} processes failed in process {failed[0]}: {said[-1] if said else ''}")
    return measured(folder / "run0") | {"wall_seconds": time.monotonic() - begun}


def measured(workdir: Path) -> dict:
    """What a run took and what it came to."""
    from fedmetanas_jax.engine.checkpoint import Checkpoints

    lines = [json.loads(line) for line in (workdir / "records.jsonl").read_text().splitlines()]
    checkpoints = Checkpoints(workdir / "checkpoints")
    state = checkpoints.digest(checkpoints.candidates()[0])
    checkpoints.close()
    records = [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]
    network = (workdir / "network.npz").read_bytes()
    event = next((line["round"] for line in lines if "event" in line), len(lines))
    return {
        "seconds": [line["seconds"] for line in lines[1:event]],  # the first round sets things up
        "seconds_pruned": [line["seconds"] for line in lines[event + 1 :]],
        "seconds_compiling": sum(line["compile_seconds"] for line in lines),
        "bits": [digest(json.dumps(records).encode()), state, digest(network)],
    }


def digest(data: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def processor() -> str:
    """What the processor calls itself."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")


def markdown(figures: dict) -> str:
    """A table a run: medians with their range, and what has the same bits."""
    machine, parts = figures["machine"], []
    for name, rows in figures["runs"].items():
        table = [
            f"**{name}**\n",
            "| processes x devices of each | seconds a round | after pruning | compiling, s | all, s | same bits as |",
            "|---|---|---|---|---|---|",
        ]
        for place, row in rows.items():
            others = ", ".join(other for other in row["same_as"] if other != place) or "none"
            times = [spread(row[key]) for key in ("seconds", "seconds_pruned")]
            numbers = [f"{row[key]:.0f}" for key in ("seconds_compiling", "wall_seconds")]
            table.append("| " + " | ".join([place, *times, *numbers, others]) + " |")
        parts.append("\n".join(table))
    facts = (
        f"{machine['cpus']} CPUs ({machine['processor']}), shared by all processes of a run: that the bits are the "
        f"same is shown, and what an exchange costs; what several hosts gain is not. Load average at the end "
        f"{figures['load_at_the_end']:.1f}; {figures['minutes']:.1f} minutes in all."
    )
    return "\n\n".join([*parts, facts, f"`{figures['command']}`\n"])


def spread(seconds: list[float]) -> str:
    """The median, and from what to what."""
    if not seconds:
        return ""
    return f"{statistics.median(seconds):.3g} ({min(seconds):.3g} to {max(seconds):.3g})"


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""
    return command.run(argv, parse, bench, __doc__, FLAGS, lambda: (BenchError, OSError))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
