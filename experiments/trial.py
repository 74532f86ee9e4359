"""A federation of processes on this machine, for tests and measurements: a server and its clients over loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import certs

HERE = Path(__file__).parent


class TrialError(Exception):
    """Something did not come in time, or a process ended that was not to. The message holds the end of its log."""


class Trial:
    """`with Trial(folder, fields, clients) as trial:` ends every process that it started.

    fields: of the Config, by name; "options.NAME" are the method's own. Shares and certificates are made at once, in
    the folder; a client is known by its number.
    """

    def __init__(self, folder: Path, fields: dict, clients: int, insecure: bool = False):
        self.folder, self.clients, self.insecure = folder, clients, insecure
        self.fields = [f"--config.{name}={value}" for name, value in fields.items()]
        self.port = free_port()
        self.workdir = folder / "server"
        self.running: dict[str, subprocess.Popen] = {}
        self.env = dict(os.environ)
        names = [f"client-{number}" for number in range(clients)]
        if not insecure:
            certs.make(folder / "certs", names, [], 365.0)

    def __enter__(self) -> "Trial":
        return self

    def __exit__(self, *_) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.kill()
            process.wait()

    def script(self, name: str, *flags: str) -> list[str]:
        """A command line of one of the scripts here."""
        return [sys.executable, str(HERE / f"{name}.py"), *flags]

    def make_shares(self, *flags: str) -> None:
        """The clients' files."""
        self.finish("shares", *self.fields, f"--to={self.folder / 'shares'}", *flags)

    def finish(self, script: str, *flags: str, seconds: float = 600) -> str:
        """Runs a script to its end -> what it printed. TrialError unless it ended well."""
        done = subprocess.run(
            self.script(script, *flags), capture_output=True, text=True, timeout=seconds, env=self.env
        )
        if done.returncode:
            raise TrialError(f"{script} ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    def serve(self, *flags: str, process: str = "server") -> subprocess.Popen:
        """Starts the server, or starts it again; as `process`, if it is not to be its own."""
        how = ["--insecure"] if self.insecure else ["--host=127.0.0.1", f"--certs={self.folder / 'certs'}"]
        where = [f"--workdir={self.workdir}", f"--port={self.port}"]
        return self.start(process, "serve", *self.fields, *where, *how, *flags)

    def join(
        self, client: int, *flags: str, port: int | None = None, process: str = "", **env: str
    ) -> subprocess.Popen:
        """Starts a client, or starts it again; as `process`, if it is not to be its own. Later flags win."""
        name = f"client-{client}"
        how = ["--insecure", f"--name={name}"] if self.insecure else [f"--certs={self.folder / 'certs/clients' / name}"]
        data, workdir = self.folder / "shares" / f"{name}.npz", self.folder / name
        where = [f"--server=localhost:{port or self.port}", f"--data={data}", f"--workdir={workdir}"]
        return self.start(process or name, "join", *where, *how, *flags, **env)

    def start(self, process: str, script: str, *flags: str, **env: str) -> subprocess.Popen:
        """Starts a script as `process`, whose output is added to its log."""
        with open(self.folder / f"{process}.log", "ab") as log:
            self.running[process] = subprocess.Popen(
                self.script(script, *flags), stdout=log, stderr=subprocess.STDOUT, env=self.env | env
            )
        return self.running[process]

    def kill(self, process: str, number: int = signal.SIGKILL) -> None:
        """Sends it a signal; of SIGKILL, waits for its end."""
        self.running[process].send_signal(number)
        if number == signal.SIGKILL:
            self.running[process].wait()

    def log(self, process: str) -> str:
        """All that it printed so far, in all its lives."""
        path = self.folder / f"{process}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def records(self) -> list[dict]:
        """Of the rounds that are done."""
        path = self.workdir / "records.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def until(self, what: Callable[[], bool], seconds: float, about: str, alive: tuple[str, ...] = ("server",)) -> None:
        """Waits for it. TrialError where it does not come, or one of `alive` has ended."""
        end = time.monotonic() + seconds
        while not what():
            dead = [name for name in alive if self.running[name].poll() is not None]
            if (dead or time.monotonic() > end) and not what():
                name = (dead or ["server"])[0]
                raise TrialError(f"no {about} in {seconds:.0f} s, or {name} ended; its log: {self.log(name)[-3000:]}")
            time.sleep(0.02)

    def until_round(self, number: int, seconds: float = 300) -> None:
        """Waits for the record of that round."""
        self.until(lambda: len(self.records()) >= number, seconds, f"round {number}")

    def until_said(self, process: str, text: str, seconds: float = 120) -> None:
        """Waits for a text in a log."""
        self.until(lambda: text in self.log(process), seconds, f"{text!r} of {process}", ())

    def until_done(self, seconds: float = 300) -> None:
        """Waits for the end of the server and of those clients that live. TrialError unless all end well."""
        for name, process in self.running.items():
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                raise TrialError(f"{name} does not end; its log: {self.log(name)[-3000:]}") from None
            if status:
                raise TrialError(f"{name} ended with {status}; its log: {self.log(name)[-3000:]}")


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
