"""For faults.py: what is injected into a running federation, and what both sides are then to say."""

import contextlib
import os
import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import certs
from rogue import Rogue, Throttle
from trial import Trial, TrialError

DEADLINE, CLIENTS = 8.0, 6
PATIENCE = ("--quorum=2", f"--deadline={DEADLINE:g}")


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
    bench.trial.kill("server")
    before = bench.trial.records()
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
    folder = bench.trial.folder / "wrong"
    certs.make(folder, ["client-5"], [], 365.0)
    # With the federation's CA, so that it is the server who refuses.
    mine = folder / "clients/client-5"
    mine.joinpath("ca.pem").write_bytes((bench.trial.folder / "certs/ca.pem").read_bytes())
    told = Rogue(bench.trial.port, mine).hello()
    return f"TLS handshake refused: {told}", _joined_in_vain(bench, folder)


def expired_certificate(bench: Bench) -> tuple[str, str]:
    """A client whose certificate has expired; it knows better than to connect."""
    folder = _same_ca(bench, "expired")
    certs.make(folder, ["client-5"], [], -1.0)
    rogue = Rogue(bench.trial.port, folder / "clients/client-5", checks_date=False)
    told = rogue.hello()
    line = _joined_in_vain(bench, folder)
    return f"TLS handshake refused: {told}", line


def _same_ca(bench: Bench, name: str) -> Path:
    """A folder for certificates of the federation's own CA that its clients have none of."""
    folder = bench.trial.folder / name
    folder.mkdir(exist_ok=True)
    for file in ("ca.pem", "ca.key", "server.pem", "server.key"):
        (folder / file).write_bytes((bench.trial.folder / "certs" / file).read_bytes())
    return folder


def _joined_in_vain(bench: Bench, folder: Path) -> str:
    bench.trial.join(bench.evil, f"--certs={folder / 'clients/client-5'}")
    line = bench.said("client-5", "does not accept|expired")
    if bench.trial.running["client-5"].poll() is None:
        bench.trial.kill("client-5")
    return line


def not_registered(bench: Bench) -> tuple[str, str]:
    """A certificate of the right CA for a name that is not on the server's list."""
    folder = _same_ca(bench, "other")
    certs.make(folder, ["stranger"], [], 365.0)
    told = Rogue(bench.trial.port, folder / "clients/stranger").hello()
    return bench.said("server", "refused stranger: 'stranger' is not registered"), told


def disk_full(bench: Bench) -> tuple[str, str]:
    """A client that cannot keep its state: it has 45 kB, and no file can have more than 20."""
    bench.trial.kill("client-3")
    with _small_files():
        full = bench.trial.join(3, process="full")  # with a log of its own, which is small
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
    with Throttle(bench.trial.port, rate=4_000) as slow:
        bench.trial.join(4, port=slow.port)
        said = bench.said("server", "leaves out client-4: it did not answer within", 240)
        bench.go_on()
        bench.trial.kill("client-4")
    bench.heal(4)
    return said, bench.said("client-4", "joined as client-4")


def network_gone(bench: Bench) -> tuple[str, str]:
    """A network that swallows everything from one moment on, and says nothing; and that is there again later."""
    bench.trial.kill("client-4")
    with Throttle(bench.trial.port) as network:
        bench.trial.join(4, port=network.port)
        bench.said("client-4", ": taken", 240)
        network.gone = True
        said = bench.said("server", "leaves out client-4: it (is gone|did not answer within)")
        bench.go_on()
        line = bench.said("client-4", "trying again")  # HTTP/2 pings told it
        before = len(bench.since("client-4"))
        network.gone = False
        bench.trial.until(lambda: ": taken" in bench.since("client-4")[before:], 240, "further reply of client-4")
        bench.trial.kill("client-4")
    bench.heal(4)
    return said, line


def server_disk_full(bench: Bench) -> tuple[str, str]:
    """A server that cannot keep a round: no file can have more than 20 kB, and a checkpoint has more."""
    bench.trial.kill("server")
    before = bench.trial.records()
    with _small_files():
        full = bench.trial.serve(*PATIENCE, process="full")  # with a log of its own, which is small
    status = full.wait(240)
    said = bench.said("full", "error: ")
    if status != 1 or "Traceback" in bench.since("full"):
        raise TrialError(f"the server ended with {status}: {bench.since('full')[-500:]}")
    bench.trial.serve(*PATIENCE)
    kept = int(re.search(r"after round (\d+)", bench.said("server", "resuming after round"))[1])
    bench.go_on()
    if kept < len(before) - 1 or before[:kept] != bench.trial.records()[:kept]:
        raise TrialError(f"of {len(before)} rounds {kept} were kept, or their records are others")
    return said, bench.said("client-2", "trying again")


@contextlib.contextmanager
def _small_files():
    """Processes that are started meanwhile can write no file of more than 20 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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
    "disk full at the server": server_disk_full,
    "slow network (4 kB/s)": slow_network,
    "network gone without a word": network_gone,
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
