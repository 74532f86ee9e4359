"""A Flower federation of processes on this machine: SuperLink, SuperNodes and the app in experiments/flower_app."""

import contextlib
import fcntl
import os
import shutil
import signal
import sys
from pathlib import Path

from trial import Trial, free_port

from fedmetanas_jax.engine.claim import LOCK

APP = Path(__file__).parents[1] / "experiments" / "flower_app"
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


class FlowerTrial(Trial):
    """Trial, whose server and clients are of Flower: "server" is the SuperLink, "app" shows what the ServerApp says, a
    SuperNode is called as its client."""

    def __init__(self, folder: Path, fields: dict, clients: int):
        super().__init__(folder, fields, clients, insecure=True)
        home, programs = folder / "flwr", Path(sys.executable).parent
        home.mkdir()
        (home / "config.toml").write_text(f'[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n')
        self.env |= QUIET | {"FLWR_HOME": str(home), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
        shutil.copytree(APP, folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
        self.names = folder / "clients.txt"
        self.names.write_text("".join(f"client-{number}\n" for number in range(clients)))

    def __exit__(self, *_) -> None:
        super().__exit__(*_)
        for folder in self.folder.glob("client-*/*"):  # workers, which outlive their SuperNodes
            self.kill_holder(folder)

    def script(self, name: str, *flags: str) -> list[str]:
        """As Trial's; Flower's own commands by their names."""
        if not name.startswith("fl"):
            return super().script(name, *flags)
        return [str(Path(sys.executable).with_name(name)), *flags]

    def link(self) -> None:
        """Starts the SuperLink."""
        where = ["--insecure", "--host=127.0.0.1", f"--port={self.port}", "--disable-runtime-dependency-installation"]
        self.start("server", "flower-superlink", *where)
        self.until_said("server", "Application startup complete")

    def node(self, client: int) -> None:
        """Starts a SuperNode."""
        name = f"client-{client}"
        about = {"data": self.folder / "shares" / f"{name}.npz", "workdir": self.folder / name, "name": name}
        config = " ".join(f'{key}="{value}"' for key, value in about.items())
        where = ["--insecure", f"--superlink=127.0.0.1:{self.port}", f"--port={free_port()}"]
        self.start(name, "flower-supernode", *where, "--node-config", config)

    def submit(self, **config) -> None:
        """Has the ServerApp started, or started again."""
        fields = " ".join(field.removeprefix("--config.") for field in self.fields)
        given = {"overrides": fields, "workdir": str(self.workdir), "registered": str(self.names)} | config
        texts = [f'{name}="{x}"' if isinstance(x, str) else f"{name}={x}" for name, x in given.items()]
        where = [str(self.folder / "app"), "here", "--stream"]
        self.start("app", "flwr", "run", *where, "--run-config", " ".join(texts))

    def kill_holder(self, workdir: Path) -> bool:
        """Kills the process that has the claim to a workdir: the ServerApp, or a worker -> whether there was one."""
        with contextlib.suppress(FileNotFoundError), open(workdir / LOCK) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.kill(int(lock.read()), signal.SIGKILL)
                return True
        return False
