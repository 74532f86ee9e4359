"""A federation that is done harm to, over loopback with TLS: what is injected, and what happens.

    python experiments/faults.py --each=6          # results/deploy_faults.json and .md

Six clients of SCAFFOLD, three a round, a quorum of two and a deadline of DEADLINE seconds. A fault is injected while
rounds go on; it is over when two further rounds are done. The run is one and the same all through.
"""

import dataclasses
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from harm import CLIENTS, DEADLINE, FAULTS, Bench
from trial import Trial, TrialError

from fedmetanas_jax import command
from fedmetanas_jax.command import Flag
from fedmetanas_jax.files import write_json, write_text
from fedmetanas_jax.options import parse_path

FIELDS = {
    "method": "scaffold", "network": "mobilenetv3_tiny", "clients": CLIENTS, "cohort": 3, "train_size": 32,
    "test_size": 16, "rounds": 100_000, "epochs": 1, "eval_every": 0, "batch": 8, "at_once": 1, "bn_eval": "running",
    "lr": 0.01, "momentum": 0.0,  # or so many rounds of 32 images diverge
}  # fmt: skip
FLAGS = {
    "each": Flag(int, 8, "how often every fault is injected", least=1),
    "only": Flag(tuple[str, ...], (), "faults whose names begin so; default: all"),
    "to": Flag(str, "results/deploy_faults", "the table's name, without .md and .json"),
    "help": command.HELP,
}


@dataclasses.dataclass
class Seen:
    """One injected fault, and what came of it."""

    fault: str
    seconds: float  # until two further rounds were done
    server: str  # what the server said of it
    client: str  # what the client said of it
    good: bool  # whether both said what they should, and in time


def measure(folder: Path, each: int, only: tuple[str, ...], keep: Callable[[list[Seen]], None]) -> list[Seen]:
    """Injects all of them, each once a turn; what was found so far is handed to `keep` after every turn."""
    names = [name for name in FAULTS if not only or name.startswith(only)]
    found: list[Seen] = []
    with Trial(folder, FIELDS, CLIENTS) as trial:
        bench = Bench(trial)
        bench.begin()
        for turn in range(each):
            for name in names:
                bench.mark()
                clock = time.monotonic()
                try:
                    server, client = (_anywhere(text, folder) for text in FAULTS[name](bench))
                    went_on = bench.go_on()
                    found.append(Seen(name, went_on, server, client, True))
                except TrialError as error:
                    found.append(Seen(name, time.monotonic() - clock, str(error)[-600:], "", False))
                one = found[-1]
                took = time.monotonic() - clock
                well = "good" if one.good else "NOT GOOD"
                print(f"{turn + 1}/{each} {name}: {well} in {took:.1f} s: {one.server}", flush=True)
                if trial.running["server"].poll() is not None:
                    raise TrialError(f"the server ended: {trial.log('server')[-2000:]}")
            keep(found)
        lines = trial.records()
        if [line["round"] for line in lines] != list(range(1, len(lines) + 1)):
            raise TrialError("rounds are missing in the records")
        if "Traceback" in trial.log("server"):
            raise TrialError("the server printed a traceback")
    return found


def _anywhere(text: str, folder: Path) -> str:
    """What was said, without the paths of this machine."""
    script = f"{sys.executable} {Path(__file__).parent}/"
    return text.replace(f"{folder}/", "").replace(script, "python experiments/")


def table(found: list[Seen], rounds: str) -> str:
    """The Markdown."""
    lines = [
        "# Faults injected into a running federation",
        "",
        f"{rounds} `python experiments/faults.py --each={sum(x.fault == found[0].fault for x in found)}`",
        "",
        f"Six clients of SCAFFOLD over loopback with TLS, three a round, quorum 2, deadline {DEADLINE:g} s. A fault "
        "counts as good where both sides said what was wrong (of a TLS handshake only the client can), and two further "
        "rounds were done after it. Seconds: of these two rounds, the largest of all injections; the machine was "
        "shared.",
        "",
        "| fault | injected | good | s | the server said | the client said or was told |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(x.fault for x in found):
        mine = [x for x in found if x.fault == name]
        shown = next((x for x in mine if x.good), mine[0])
        good, slowest = sum(x.good for x in mine), max(x.seconds for x in mine)
        said = " | ".join(" ".join(text.split()).replace("|", "/")[:220] for text in (shown.server, shown.client))
        lines.append(f"| {name} | {len(mine)} | {good} | {slowest:.1f} | {said} |")
    return "\n".join(lines) + "\n"


def act(values: dict, argv: list[str]) -> int:
    """Injects, and writes the table -> 1 where something was not good."""
    del argv
    target = parse_path("to", values["to"])

    def keep(found: list[Seen]) -> None:
        about = {"machine": platform.platform(), "cpus": os.cpu_count(), "load": os.getloadavg()}
        content = {"about": about, "deadline": DEADLINE, "faults": [dataclasses.asdict(x) for x in found]}
        write_json(target.with_suffix(".json"), content)
        text = f"{len(found)} faults, {sum(x.good for x in found)} of them as they should:"
        write_text(target.with_suffix(".md"), table(found, text))
        print(f"{text} {target}.md", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), values["each"], values["only"], keep)
    return int(not all(x.good for x in found))


def parse(argv: list[str]) -> dict:
    """argv[0] is the program. UsageError for what makes no sense."""
    return command.read(argv, FLAGS)


if __name__ == "__main__":
    sys.exit(command.run(sys.argv, parse, act, __doc__, FLAGS, lambda: (OSError, TrialError)))
