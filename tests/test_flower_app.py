"""The Flower app: what its parts refuse and survive, without Flower's processes.

With FEDMETANAS_FLOWER=1, which takes minutes, also a federation of SuperLink, ServerApp and SuperNodes on this machine:
it is the simulated run bit for bit, with the ServerApp and a client's worker killed on the way.
"""

import os
import signal
import subprocess
import sys
import threading
import tomllib

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs the extra: pip install 'fedmetanas_jax[flower]'")

from flower_trial import APP, FlowerTrial
from served_run import METHODS, assert_simulated, fields

sys.path.insert(0, str(APP))
from fedmetanas_flower import client_app, door, records, server_app
from fedmetanas_flower.letter import LOST, TROUBLE, Letter
from flwr.app import ConfigRecord, RecordDict

from fedmetanas_jax.config import Config
from fedmetanas_jax.deploy.wire import FROM_CLIENT, Reader
from fedmetanas_jax.engine.claim import LOCK
from fedmetanas_jax.options import UsageError

RUN = "0a" * 32


def test_letters_come_back_as_they_were_packed():
    for letter in (Letter(RUN, "a", []), Letter(RUN, "a", [b"", bytes(range(256))], "x" * records.MOST)):
        (name, record), = records.pack(letter).items()
        crossed = RecordDict({name: ConfigRecord.inflate(record.deflate())})
        assert records.unpack(crossed) == letter


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"frames": b"no list"}, "has not the fields run, talk, frames, trouble"),
        ({"frames": [1]}, "frames that are no bytes"),
        ({"more": 1}, "has not the fields"),
        ({"talk": "x" * 201}, "a text of more than 200 characters"),
        ({"run": "../../" + "0" * 58}, "a run that has no name"),
    ],
)
def test_what_is_no_letter_is_refused(changed, said):
    content = RecordDict({records.RECORD: ConfigRecord(Letter(RUN, "a", [b"x"])._asdict() | changed)})
    with pytest.raises(records.NoLetter, match=said):
        records.unpack(content)
    with pytest.raises(records.NoLetter, match="not the one record"):
        records.unpack(RecordDict({"other": ConfigRecord()}))


def run_config(**changed) -> dict:
    app = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    return app["config"] | changed


def test_the_run_config_is_the_command_line_of_a_run(tmp_path):
    overrides = "rounds=20 method=fedavg options.server=adam augment=shift,flip"
    asked, network = server_app.asked_for(run_config(overrides=overrides, workdir=str(tmp_path), deadline=5))
    config = asked.config
    assert (config.rounds, config.method, config.options["server"]) == (20, "fedavg", "adam")
    assert asked.workdir == tmp_path
    assert network == server_app.Network(None, False, max(1, -(-config.cohort // 2)), 5, 1800.0, 1000.0)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"config": "digits_dir02"}, "no task 'digits_dir02'; did you mean 'digits_dir01'"),
        ({"overrides": "rounds"}, "overrides has 'rounds'; it must be FIELD=VALUE"),
        ({"overrides": "--config.rounds=3"}, "it must be FIELD=VALUE"),
        ({"overrides": "rounds='3"}, "which cannot be read: No closing quotation"),
        ({"overrides": "roundz=3"}, "did you mean 'rounds'"),
        ({"deadline": "soon"}, "deadline is soon; it must be a number of at least 1"),
        ({"quorum": 1.5}, "quorum is 1.5; it must be a whole number of at least 0"),
        ({"max_norm": float("nan")}, "max_norm is nan; it must be a number of at least 0"),
        ({"names": "mine"}, "names is 'mine'; it must be node-config or node-id"),
    ],
)
def test_a_run_config_that_makes_no_sense_is_refused(changed, said):
    with pytest.raises(UsageError, match=said):
        server_app.asked_for(run_config(**changed))


def test_secure_sums_are_refused():
    server_app.check(Config())
    with pytest.raises(UsageError, match="secure sums need several exchanges a round, and over Flower"):
        server_app.check(Config(aggregate="clip:5,secure,mean"))


def test_a_refused_run_is_one_line_for_flower(capsys):
    with pytest.raises(server_app.Failed, match="^names is 'mine'; it must be"):
        server_app.run_or_fail(None, run_config(names="mine"))
    assert capsys.readouterr().out == "error: names is 'mine'; it must be node-config or node-id\n"


def test_a_client_app_imports_neither_jax_nor_the_methods():
    code = "import sys, fedmetanas_flower.client_app; print([x in sys.modules for x in ('jax', 'fedmetanas_jax')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=APP, capture_output=True, text=True)
    assert done.stdout == "[False, False]\n", done.stderr


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"workdir": "x"}, "the SuperNode has no 'data'"),
        ({"data": "x.npz", "workdir": 3}, "the SuperNode has no 'workdir'"),
        ({"data": "x.npz", "workdir": "x", "name": 7}, "the SuperNode's name is 7; it must be a text"),
    ],
)
def test_a_node_config_that_lacks_something_is_said_at_the_node_alone(config, said, capsys):
    answered = client_app.answer(records.pack(Letter(RUN, "a", [])), config, 5)
    assert answered == Letter(RUN, "a", [], TROUBLE)
    assert said in capsys.readouterr().out


@pytest.fixture
def node(tmp_path):
    """A node config; whatever worker it is given ends with the test."""
    np.savez(tmp_path / "mine.npz", train_images=np.zeros((3, 8, 8, 1), np.uint8), train_labels=np.arange(3))
    yield {"data": str(tmp_path / "mine.npz"), "workdir": str(tmp_path / "mine"), "name": "me"}
    if (pid := worker_of(tmp_path)) is not None:
        os.kill(pid, signal.SIGKILL)


def worker_of(tmp_path) -> int | None:
    lock = tmp_path / "mine" / RUN[:16] / LOCK
    pid = int(lock.read_text()) if lock.exists() else None
    return pid if pid is not None and client_of(pid) else None


def client_of(pid: int) -> bool:
    found = subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True).stdout
    return "fedmetanas_flower.worker" in found


def begin(node: dict, talk: str) -> Letter:
    return client_app.answer(records.pack(Letter(RUN, talk, [])), node, 5)


def test_a_worker_stays_from_message_to_message_and_is_started_again_when_it_died(node, tmp_path, capsys):
    found: list[Letter] = []
    both = [threading.Thread(target=lambda talk=talk: found.append(begin(node, talk))) for talk in ("a", "b")]
    for one in both:  # two messages at once have one worker
        one.start()
    for one in both:
        one.join()
    for answered in found:
        assert answered.trouble == ""
        hello = Reader(FROM_CLIENT).feed(answered.frames[0])
        assert (hello.kind, hello.fields["name"], hello.fields["run"]) == ("hello", "me", "")
    last = found[-1].talk
    first = worker_of(tmp_path)
    assert first is not None
    assert client_app.answer(records.pack(Letter(RUN, "never begun", [b"x"])), node, 5).trouble == LOST
    assert begin(node | {"data": "other.npz"}, "c").trouble == TROUBLE
    assert "worker was started with" in capsys.readouterr().out
    os.kill(first, signal.SIGKILL)  # its socket is still there
    assert client_app.answer(records.pack(Letter(RUN, last, [b"x"])), node, 5).trouble == LOST
    assert begin(node, "d").trouble == ""
    assert worker_of(tmp_path) not in (None, first)
    # A frame that is no message ends the worker, which says why here and not to the server.
    assert client_app.answer(records.pack(Letter(RUN, "d", [b"x"])), node, 5) == Letter(RUN, "d", [], TROUBLE)
    assert "error: the server sends what is no message of this version" in capsys.readouterr().out


def test_a_worker_that_cannot_start_says_why(node, capsys):
    assert begin(node | {"data": "/nowhere.npz"}, "a").trouble == TROUBLE
    assert "does not start: error: /nowhere.npz, this client's images, is no file" in capsys.readouterr().out


def test_the_folder_of_sockets_is_this_users_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(door.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / f"fedmetanas-{os.getuid()}").mkdir(mode=0o755)
    with pytest.raises(door.DoorError, match="is not a folder that only this user can enter"):
        door.ask(door.Node(tmp_path, tmp_path, "me"), Letter(RUN, "a", []))


@pytest.mark.skipif(os.environ.get("FEDMETANAS_FLOWER") != "1", reason="takes minutes: set FEDMETANAS_FLOWER=1")
@pytest.mark.parametrize("method", METHODS)
def test_over_flower_with_the_server_and_a_worker_killed_it_is_the_simulated_run(method, tmp_path):
    with FlowerTrial(tmp_path, fields(method, clients=3, cohort=2, rounds=8), 3) as trial:
        trial.finish("main", *trial.fields, f"--workdir={tmp_path / 'simulated'}")
        trial.make_shares()
        trial.link()
        for client in range(3):
            trial.node(client)
        trial.submit(deadline=600.0)
        trial.until_round(2, 600)
        trial.kill_holder(trial.workdir)
        trial.submit(deadline=600.0)
        trial.until_round(4, 600)
        (workers,) = (tmp_path / "client-1").iterdir()
        trial.kill_holder(workers)
        trial.until(lambda: (trial.workdir / "result.json").exists(), 600, "result")
        assert "resuming after round " in trial.log("app")
        assert "client-1 is gone" in trial.log("app")
        assert not any("left_out" in line for line in trial.records())
        assert_simulated(trial.workdir, tmp_path / "simulated")
