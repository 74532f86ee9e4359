"""Median seconds a round and bytes on the wire, of client processes on this machine and of the simulation.

    python experiments/deploy_rounds.py            # results/deploy_rounds.json and .md, in less than 8 minutes
    python experiments/deploy_rounds.py --secure   # results/deploy_rounds_secure.json and .md, with secure sums

A toy training (wide.py: one pass over 32 images) and messages of 8 MB; every client takes part in every round; over
loopback with TLS. The network is loopback's, and clients share this machine's cores: the figures are what the server,
the wire and the processes cost, and say nothing of a real network or of real training.
"""

import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

from trial import Trial, TrialError

from fedmetanas_jax import command
from fedmetanas_jax.command import Flag
from fedmetanas_jax.files import write_json, write_text
from fedmetanas_jax.options import parse_path

SECURE = "clip:5,secure"
FIRST = 2  # rounds that do not count: programs are compiled, and clients come
TO = "results/deploy_rounds"
FLAGS = {
    "clients": Flag(tuple[int, ...], (3, 10, 30), "numbers of client processes"),
    "rounds": Flag(int, 8, f"rounds; the first {FIRST} do not count", least=FIRST + 1),
    "secure": Flag(bool, False, "whether changes are clipped and summed so that the server sees none of them"),
    "to": Flag(str, None, f"the table's name, without .md and .json; default: {TO}, with _secure behind it for those"),
    "help": command.HELP,
}


@dataclasses.dataclass
class Measured:
    """Of one number of clients."""

    clients: int
    seconds: float  # a round, the median
    fastest: float
    slowest: float
    simulated: float  # seconds of a simulated round, the median
    wire_up: int  # bytes a round, all clients together, as gRPC was given them
    wire_down: int
    server_cpu: float  # seconds of the server process a round, its evaluation and checkpoint included
    joined: float  # seconds until all processes had joined and compiled


def fields(clients: int, rounds: int, aggregate: str) -> dict:
    """Of the Config."""
    return {
        "aggregate": aggregate,
        "method": "wide", "network": "mobilenetv3_tiny", "clients": clients, "cohort": clients, "train_size": 32,
        "test_size": 16, "partition": "iid", "rounds": rounds, "epochs": 1, "eval_every": 0, "batch": 32, "at_once": 1,
        "bn_eval": "running", "final_adapt": "false",
    }  # fmt: skip


class Wide(Trial):
    """A Trial of wide.py's scripts."""

    def script(self, name: str, *flags: str) -> list[str]:
        return [sys.executable, str(Path(__file__).parent / "wide.py"), name, *flags]


def measure(folder: Path, clients: int, rounds: int, aggregate: str) -> Measured:
    """One simulated run and one of processes."""
    with Wide(folder, fields(clients, rounds, aggregate), clients) as trial:
        trial.make_shares()
        trial.finish("main", *trial.fields, f"--workdir={folder / 'simulated'}")
        text = (folder / "simulated/records.jsonl").read_text().splitlines()
        simulated = [json.loads(line)["seconds"] for line in text][FIRST:]
        clock = time.monotonic()
        server = trial.serve(f"--quorum={clients}", "--deadline=300")
        for client in range(clients):
            trial.join(client)
        trial.until_round(1, 400)
        joined = time.monotonic() - clock
        trial.until_round(FIRST, 300)
        before = _cpu_seconds(server.pid)
        trial.until_round(rounds - 1, 300)
        after, counted = _cpu_seconds(server.pid), len(trial.records()) - FIRST
        trial.until_done()
        lines = trial.records()[FIRST:]
    taken = [line["seconds"] for line in lines]
    return Measured(
        clients, statistics.median(taken), min(taken), max(taken), statistics.median(simulated),
        lines[-1]["wire_up"], lines[-1]["wire_down"], (after - before) / counted, joined,
    )  # fmt: skip


def _cpu_seconds(pid: int) -> float:
    """Of a process so far; Linux alone says it."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def table(found: list[Measured], about: dict, aggregate: str) -> str:
    """The Markdown."""
    secure = aggregate == SECURE
    lines = [
        "# Seconds a round of client processes",
        "",
        f"`python experiments/deploy_rounds.py{' --secure' if secure else ''}`",
        "",
        f"{about['cpus']} cores, load {about['load'][0]:.1f} at the start and {about['load_after'][0]:.1f} at the end. "
        "Over loopback with TLS, a toy training, messages of 8 MB each way, every client in every round"
        f"{', secure sums' if secure else ''}. All processes "
        "share the machine; where it is shared with other work, too, as a load above the number of client processes "
        "shows, the times are upper bounds.",
        "",
        "| clients | s a round (least to most) | simulated, s | MB up | MB down | server's CPU s | joined after |",
        "|---|---|---|---|---|---|---|",
    ]
    for x in found:
        spread = f"{x.seconds:.2f} ({x.fastest:.2f} to {x.slowest:.2f})"
        wire = f"{x.wire_up / 1e6:.2f} | {x.wire_down / 1e6:.2f}"
        lines.append(f"| {x.clients} | {spread} | {x.simulated:.3f} | {wire} | {x.server_cpu:.2f} | {x.joined:.0f} s |")
    return "\n".join(lines) + "\n"


def act(values: dict, argv: list[str]) -> None:
    """Measures, and writes the table."""
    del argv
    aggregate = SECURE if values["secure"] else "mean"
    target, found = parse_path("to", values["to"] or TO + ("_secure" if values["secure"] else "")), []
    about = {"machine": platform.platform(), "cpus": os.cpu_count(), "load": os.getloadavg()}
    for clients in values["clients"]:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(Path(folder), clients, values["rounds"], aggregate))
        print(found[-1], flush=True)
    about["load_after"] = os.getloadavg()
    write_json(target.with_suffix(".json"), {"about": about, "measured": [dataclasses.asdict(x) for x in found]})
    write_text(target.with_suffix(".md"), table(found, about, aggregate))


def parse(argv: list[str]) -> dict:
    """argv[0] is the program. UsageError for what makes no sense."""
    return command.read(argv, FLAGS)


if __name__ == "__main__":
    sys.exit(command.run(sys.argv, parse, act, __doc__, FLAGS, lambda: (OSError, TrialError)))
