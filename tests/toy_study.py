"""A study whose runs cost nothing: what `build.run` leaves, with numbers that follow from the config alone."""

import fcntl
import json
import time
from pathlib import Path

from study import plan
from study.scales import SCALES

from fedmetanas_jax.config import to_dict
from fedmetanas_jax.engine.records import InUseError, digest
from fedmetanas_jax.files import to_json, write_json

ACCURACY = {"fedavg": 0.5, "fedrep": 0.6, "fedmetanas": 0.7, "fednas": 0.65, "perfedrlnas": None}
COSTS = {"image_gradients": 8.0, "macs": 1e9, "bytes_up": 1, "bytes_down": 2}
VERSIONS = {"device": "toy", "devices": 1, "cpus": 2, "python": "3", "jax": "0"}


def runs(rows=("fedavg", "fedrep"), seeds=(1, 2, 3), rounds=4) -> list[plan.Run]:
    """Their runs on digits."""
    where = [(row, "digits:dir0.1", seed) for row in rows for seed in seeds]
    return [plan.run(SCALES["minutes"], *cell, {"rounds": rounds}) for cell in where]


def run(config, *, task: str, workdir: Path, data_dir, kept=None, pause: float = 0.0) -> None:
    """In place of `build.run`: begins or goes on, and, as that, writes a line a round and result.json at the end."""
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / ".lock", "w") as lock:  # as the real one has it, so that it ends with the process
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUseError("two processes are at one run") from None
        _run(config, workdir, pause)


def _run(config, workdir: Path, pause: float) -> None:
    write_json(workdir / "config.json", {"config": to_dict(config), "versions": VERSIONS})
    log = workdir / "records.jsonl"
    begun = log.read_bytes().count(b"\n") if log.exists() else 0
    server = ACCURACY[config.method]
    for number in range(begun + 1, config.rounds + 1):
        line = {"round": number, "seconds": 1.0} | COSTS
        if server is not None:
            line |= {"server_accuracy": server + config.seed / 100 + number / 1000, "local_accuracy": {"mean": 0.5}}
        with open(log, "ab") as file:
            file.write(to_json(line).encode() + b"\n")
        time.sleep(pause)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    sums = {name: sum(line[name] for line in lines) for name in COSTS}
    result = {"seconds_in_rounds": 4.0, "seconds_compiling": 1.0, "versions": VERSIONS, "records_sha256": digest(lines)}
    spread = {"mean": 0.8 + config.seed / 100, "std": 0.1}
    result |= {"local_accuracy_adapted": spread, "majority_class_local_accuracy": 0.5} | sums
    if server is not None:
        result |= {"server_accuracy": lines[-1]["server_accuracy"], "local_accuracy": {"mean": 0.5, "std": 0.2}}
    write_json(workdir / "result.json", result)


def until(condition) -> None:
    """Waits for it, a minute at most."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that in a minute")
