"""A federation that is done harm to, over loopback with TLS: what is injected, and what happens.

    python experiments/faults.py --each=6          # results/deploy_faults.json and .md

Six clients of SCAFFOLD, three a round, a quorum of two and a deadline of DEADLINE seconds. A fault is injected while
rounds go on; it is over when two further rounds are done. The run is one and the same all through.
"""

import dataclasses
import os
import platform
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import certs
from rogue import Rogue, Throttle
from trial import Trial, TrialError

from fedmetanas_jax import command
from fedmetanas_jax.command import Flag
from fedmetanas_jax.files import write_json, write_text
from fedmetanas_jax.options import parse_path

DEADLINE, CLIENTS = 8.0, 6
FIELDS = {
    "method": "scaffold", "network": "mobilenetv3_tiny", "clients": CLIENTS, "cohort": 3, "train_size": 32,
    "test_size": 16, "rounds": 100_000, "epochs": 1, "eval_every": 0, "batch": 8, "at_once": 1, "bn_eval": "running",
}  # fmt: skip
PATIENCE = ("--quorum=2", f"--deadline={DEADLINE:g}")
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


class Bench:
    """The federation, with a place (the last one) for whoever does harm."""

    def __init__(self, trial: Trial):
        self.trial, self.evil = trial, CLIENTS - 1
        self.marks: dict[str, int] = {}

    def begin(self) -> None:
        """All but the last client join."""
        self.trial.make_shares()
        self.trial.serve(*PATIENCE)
        for client in range(self.evil):
            self.trial.join(client)
        self.trial.until_round(3, 600)

    def since(self, process: str) -> str:
        """What was said since the fault was injected."""
        return self.trial.log(process)[self.marks.get(process, 0) :]

    def mark(self) -> None:
        """From here on."""
        self.marks = {name: len(self.trial.log(name)) for name in ["server", "full", *self._clients()]}

    def said(self, process: str, pattern: str, seconds: float = 90) -> str:
        """The line that it says. TrialError where it does not."""
        self.trial.until(lambda: re.search(pattern, self.since(process)), seconds, f"{pattern!r} of {process}", ())
        return next(line for line in self.since(process).splitlines() if re.search(pattern, line))

    def go_on(self, rounds: int = 2) -> float:
        """Seconds until so many further rounds are done."""
        clock, done = time.monotonic(), len(self.trial.records())
        self.trial.until_round(done + rounds, 20 * DEADLINE)
        return time.monotonic() - clock

    def rogue(self, **how) -> Rogue:
        """Somebody who speaks the wire with the last client's certificate."""
        return Rogue(self.trial.port, self.trial.folder / "certs/clients" / f"client-{self.evil}", **how)

    def heal(self, client: int) -> None:
        """Starts a client anew, and waits until it is back at work."""
        name = f"client-{client}"
        if self.trial.running[name].poll() is None:
            self.trial.kill(name)
        before = len(self.trial.log(name))
        self.trial.join(client)
        self.trial.until(lambda: ": taken" in self.trial.log(name)[before:], 240, f"reply of {name}")

    def _clients(self) -> list[str]:
        return [f"client-{client}" for client in range(CLIENTS)]


def client_killed(bench: Bench) -> tuple[str, str]:
    """kill -9 of a client."""
    bench.trial.kill("client-0")
    said = bench.said("server", "client-0 is gone|leaves out client-0")
    bench.go_on()
    bench.heal(0)
    return said, bench.said("client-0", "joined as client-0")


def client_stalled(bench: Bench) -> tuple[str, str]:
    """A client that is stopped, and goes on after it was left out."""
    bench.trial.kill("client-1", signal.SIGSTOP)
    said = bench.said("server", "leaves out client-1")
    bench.go_on()
    bench.trial.kill("client-1", signal.SIGCONT)
    bench.said("server", "client-1 answered too late|client-1 joined")
    return said, bench.said("client-1", "did not take the reply|trying again|taken")


def server_killed(bench: Bench) -> tuple[str, str]:
    """kill -9 of the server."""
    before = bench.trial.records()
    bench.trial.kill("server")
    bench.trial.serve(*PATIENCE)
    said = bench.said("server", "resuming after round")
    line = bench.said("client-2", "trying again")
    bench.go_on()
    after = bench.trial.records()
    kept = int(re.search(r"after round (\d+)", said)[1])
    if kept < len(before) - 1 or before[:kept] != after[:kept]:
        raise TrialError(f"of {len(before)} rounds {kept} were kept, or their records are others")
    return said, line


def wrong_certificate(bench: Bench) -> tuple[str, str]:
    """A client whose certificate another CA made."""
    return _outside(bench, "wrong", 365.0)


def expired_certificate(bench: Bench) -> tuple[str, str]:
    """A client whose certificate has expired; it knows better than to connect."""
    folder = bench.trial.folder / "expired"
    for name in ("ca.pem", "ca.key", "server.pem", "server.key"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((bench.trial.folder / "certs" / name).read_bytes())
    certs.make(folder, ["client-5"], [], -1.0)
    rogue = Rogue(bench.trial.port, folder / "clients/client-5", checks_date=False)
    told = rogue.hello()
    line = _joined_in_vain(bench, folder)
    return f"TLS handshake refused: {told}", line


def _outside(bench: Bench, name: str, days: float) -> tuple[str, str]:
    folder = bench.trial.folder / name
    certs.make(folder, ["client-5"], [], days)
    # With the federation's CA, so that it is the server who refuses.
    mine = folder / "clients/client-5"
    mine.joinpath("ca.pem").write_bytes((bench.trial.folder / "certs/ca.pem").read_bytes())
    told = Rogue(bench.trial.port, mine).hello()
    return f"TLS handshake refused: {told}", _joined_in_vain(bench, folder)


def _joined_in_vain(bench: Bench, folder: Path) -> str:
    bench.trial.join(bench.evil, f"--certs={folder / 'clients/client-5'}")
    line = bench.said("client-5", "does not accept|expired")
    if bench.trial.running["client-5"].poll() is None:
        bench.trial.kill("client-5")
    return line


def not_registered(bench: Bench) -> tuple[str, str]:
    """A certificate of the right CA for a name that is not on the server's list."""
    folder = bench.trial.folder / "other"
    for name in ("ca.pem", "ca.key", "server.pem", "server.key"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((bench.trial.folder / "certs" / name).read_bytes())
    certs.make(folder, ["stranger"], [], 365.0)
    told = Rogue(bench.trial.port, folder / "clients/stranger").hello()
    return bench.said("server", "refused stranger: 'stranger' is not registered"), told


def disk_full(bench: Bench) -> tuple[str, str]:
    """A client that cannot keep its state: no file can have more than 20 kB, and the state has 45."""
    bench.trial.kill("client-3")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # children inherit it
    try:
        full = bench.trial.join(3, process="full")  # with a log of its own, which is small
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = bench.said("server", "leaves out client-3: it could not: (File too large|No space)", 240)
    line = bench.said("full", "no reply: ")
    bench.go_on()
    if full.poll() is not None:
        raise TrialError(f"the client ended: {bench.trial.log('full')[-500:]}")
    bench.trial.kill("full")
    bench.heal(3)
    return said, line


def slow_network(bench: Bench) -> tuple[str, str]:
    """A client behind 4 kB a second, far too little for the deadline."""
    bench.trial.kill("client-4")
    with Throttle(bench.trial.port, 4_000) as slow:
        bench.trial.join(4, port=slow.port)
        said = bench.said("server", "leaves out client-4: it did not answer within", 240)
        bench.go_on()
        bench.trial.kill("client-4")
    bench.heal(4)
    return said, bench.said("client-4", "joined as client-4")


def harmful(pattern: str, **how) -> Callable[[Bench], tuple[str, str]]:
    """A fault that somebody with a good certificate makes."""

    def inject(bench: Bench) -> tuple[str, str]:
        with bench.rogue(**how) as rogue:
            told = rogue.serve_until_refused(20 * DEADLINE)
        said = bench.said("server", f"(refused|leaves out) client-5.*({pattern})")
        if not re.search(pattern, told):
            raise TrialError(f"the client was told {told!r}")
        return said, told

    return inject


FAULTS: dict[str, Callable[[Bench], tuple[str, str]]] = {
    "client kill -9": client_killed,
    "client stopped (SIGSTOP)": client_stalled,
    "server kill -9": server_killed,
    "wrong certificate (another CA)": wrong_certificate,
    "expired certificate": expired_certificate,
    "name not registered": not_registered,
    "disk full at the client": disk_full,
    "slow network (4 kB/s)": slow_network,
    "old protocol": harmful("protocol 0", hello={"protocol": 0}),
    "other config": harmful("another run", hello={"run": "0" * 64}),
    "garbage bytes": harmful("no msgpack|no map", frames=[os.urandom(400)]),
    "a payload of 10 GB announced": harmful("announces 10000000000 bytes", announce=10_000_000_000),
    "NaN": harmful("not finite", value=float("nan")),
    "norm 1e6": harmful("the norm of its change", value=1e6),
    "weight 1e9": harmful("its weight is", weight=1e9),
    "reply of another round": harmful("it is of round", round=-1),
    "reply of another config": harmful("another run", run="0" * 64),
    "a bit flipped in the payload": harmful("SHA-256", flip=True),
}


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
                    server, client = (text.replace(f"{folder}/", "") for text in FAULTS[name](bench))
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
