"""Record files survive torn lines, and a workdir belongs to one config and one process at a time."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from fedmetanas_jax.engine import records
from fedmetanas_jax.engine.claim import claim
from fedmetanas_jax.engine.records import WorkdirError

CONFIG = {"seed": 0, "dims": (8, 9), "options": {"M": 1, "xi": 0.1}}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "records.jsonl"
    for number in (1, 2, 3):
        records.append(path, {"round": number, "loss": 1 / number})
    return path


def begin(workdir, config=CONFIG, say=pytest.fail, *, saved=True):
    """What a run of this config does first, and its first checkpoint."""
    with claim(workdir, config, say) as claimed:
        claimed.write()
        if saved:
            (workdir / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)


def tear(path):
    with open(path, "ab") as file:
        file.write(b'{"round": 4, "lo')


def test_records_come_back_in_order(path):
    assert records.read(path) == [{"round": n, "loss": 1 / n} for n in (1, 2, 3)]
    assert path.read_text().count("\n") == 3


def test_records_that_say_something_else_than_was_written_are_refused(path):
    written = records.digest(records.read(path))
    path.write_text(path.read_text().replace(", ", " ,  ") + "\n")  # spaces say nothing
    assert records.resume(path, 3, written) == [{"round": n, "loss": 1 / n} for n in (1, 2, 3)]
    path.write_text(path.read_text().replace("0.5", "0.25"))
    with pytest.raises(WorkdirError, match="was altered: rounds 1 to 3 are not as they were written"):
        records.resume(path, 3, written)
    assert "0.25" in path.read_text()  # and stay as they are
    assert len(records.resume(path, 1, records.digest([{"round": 1, "loss": 1.0}]))) == 1


def test_no_file_is_no_records(tmp_path):
    assert records.read(tmp_path / "none") == []
    assert records.resume(tmp_path / "none", 0) == []


def test_array_numbers_are_plain_and_what_is_no_number_is_null(tmp_path):
    record = {
        "round": np.int64(1),
        "loss": jnp.float32(0.5),
        "each": jnp.array([1.0, jnp.nan]),
        "nested": {"a": [float("inf"), (True, None, "x")]},
    }
    records.append(tmp_path / "r", record)
    want = {"round": 1, "loss": 0.5, "each": [1.0, None], "nested": {"a": [None, [True, None, "x"]]}}
    assert records.read(tmp_path / "r") == [want]


def test_a_value_json_does_not_know_is_refused_and_leaves_the_file_whole(path):
    with pytest.raises(TypeError):
        records.append(path, {"round": 4, "what": {1, 2}})
    assert len(records.read(path)) == 3


def test_a_torn_last_line_is_left_out(path):
    tear(path)
    assert [r["round"] for r in records.read(path)] == [1, 2, 3]


def test_an_altered_earlier_line_is_named(path):
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:7], lines[2]]) + "\n")
    with pytest.raises(WorkdirError, match="line 2"):
        records.read(path)


def test_resuming_keeps_the_first_rounds_and_mends_the_file(path):
    tear(path)
    kept = records.resume(path, 2)
    assert [r["round"] for r in kept] == [1, 2]
    records.append(path, {"round": 3})
    assert [r["round"] for r in records.read(path)] == [1, 2, 3]


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        records.resume(path, 1)
    assert path.read_bytes() == before
    assert [left.name for left in path.parent.iterdir()] == ["records.jsonl"]


ONE, TWO, THREE = (f'{{"round": {number}}}' for number in (1, 2, 3))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "ends after line 0, but the checkpoint is of round 3"),
        ([ONE, TWO], "ends after line 2, but the checkpoint is of round 3"),
        ([ONE, TWO, THREE[:7]], "ends after line 2, but the checkpoint is of round 3"),
        ([ONE, THREE], "line 2, is of round 3, where round 2 belongs"),
        ([ONE, ONE, TWO, THREE], "line 2, is of round 1, where round 2 belongs"),
        ([ONE, "{}", THREE], "line 2, names no round, where round 2 belongs"),
        ([ONE, "tw", THREE], "line 2, is not a JSON object"),
        ([ONE, "", TWO, THREE], "line 2, is not a JSON object"),
    ],
)
def test_records_that_do_not_fit_the_checkpoint_are_refused_and_left_alone(tmp_path, lines, message):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    before = path.read_bytes()
    with pytest.raises(WorkdirError, match=message) as caught:
        records.resume(path, 3)
    assert "put the file back from a copy, or start over in another workdir" in str(caught.value)
    assert path.read_bytes() == before


def test_records_without_a_checkpoint_are_set_aside_however_often(path):
    said = []
    for number in (1, 2):
        records.set_aside(path, said.append)
        assert not path.exists()
        assert said.pop().endswith(f"records.jsonl.{number}")
        records.append(path, {"round": 1})
    assert len(records.read(f"{path}.1")) == 3
    records.set_aside(path.with_name("none"), pytest.fail)


def test_versions_name_what_numbers_depend_on():
    versions = records.versions()
    for name in ("python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "fedmetanas_jax"):
        assert isinstance(versions[name], str)
    assert versions["devices"] >= 1
    assert json.loads(json.dumps(versions)) == versions


def test_an_equal_config_resumes(tmp_path):
    begin(tmp_path / "a" / "b")
    begin(tmp_path / "a" / "b")
    content = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert content["config"] == {"seed": 0, "dims": [8, 9], "options": {"M": 1, "xi": 0.1}}
    assert content["versions"] == records.versions()


def test_a_claim_that_comes_to_nothing_binds_nobody(tmp_path):
    claim(tmp_path, CONFIG, pytest.fail).close()
    assert not (tmp_path / "config.json").exists()
    begin(tmp_path, CONFIG | {"seed": 1}, saved=False)  # and one that came to no checkpoint
    said = []
    begin(tmp_path, CONFIG, said.append)
    assert said == [
        "nothing was saved of the run of another config that was begun here: seed was 1, is 0; beginning anew"
    ]
    assert json.loads((tmp_path / "config.json").read_text())["config"]["seed"] == 0


def test_records_that_are_set_aside_keep_their_config(tmp_path):
    begin(tmp_path, CONFIG | {"seed": 1}, saved=False)
    records.append(tmp_path / "records.jsonl", {"round": 1})
    begin(tmp_path, CONFIG, lambda text: None, saved=False)
    seeds = [json.loads((tmp_path / name).read_text())["config"]["seed"] for name in ("config.json", "config.json.1")]
    assert seeds == [0, 1]


@pytest.mark.parametrize("name", ["records.jsonl", "result.json", "network.npz", "partition.json"])
def test_files_of_no_run_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(WorkdirError, match=f"holds {name} but no config.json.*; move them away, or use another"):
        begin(tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(("seed", "message"), [(0, "finished, but its checkpoints are gone"), (1, "another config")])
def test_a_finished_run_without_checkpoints_is_not_done_again(tmp_path, seed, message):
    begin(tmp_path, saved=False)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(WorkdirError, match=message):
        begin(tmp_path, CONFIG | {"seed": seed})


def test_another_config_is_refused_with_the_fields_and_both_values(tmp_path):
    begin(tmp_path)
    other = {"seed": 1, "dims": (8, 9), "options": {"M": 2, "tau": 5.0}}
    with pytest.raises(WorkdirError) as error:
        claim(tmp_path, other, pytest.fail)
    line = str(error.value)
    assert "seed was 0, is 1; options.M was 1, is 2; options.xi was 0.1, is absent; " in line
    assert "options.tau was absent, is 5.0" in line
    assert "dims" not in line
    assert "\n" not in line
    claim(tmp_path, CONFIG, pytest.fail).close()


def test_what_says_how_a_run_is_run_may_change_and_is_said(tmp_path):
    begin(tmp_path, CONFIG | {"block": 1})
    said = []
    claim(tmp_path, CONFIG | {"block": 4}, said.append, frozenset({"block"})).close()
    assert said == ["goes on in another way than the run was begun: block was 1, is 4"]
    with pytest.raises(WorkdirError, match="another config: seed was 0, is 1; go on"):
        claim(tmp_path, CONFIG | {"seed": 1, "block": 4}, pytest.fail, frozenset({"block"}))


def test_other_versions_are_said(tmp_path):
    begin(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["versions"]["jax"] = "0.0.1"
    path.write_text(json.dumps(content))
    said = []
    claim(tmp_path, CONFIG, said.append).close()
    assert len(said) == 1
    assert 'jax was "0.0.1", is "' in said[0]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config": 1, "versions": {}}'])
def test_a_damaged_config_file_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(WorkdirError, match=r"config\.json is damaged"):
        claim(tmp_path, CONFIG, pytest.fail)


def test_a_workdir_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="file is a file"):
        claim(tmp_path / "file", CONFIG, pytest.fail)
    with pytest.raises(WorkdirError, match="cannot write in workdir .*: Not a directory"):
        claim(tmp_path / "file" / "below", CONFIG, pytest.fail)


def test_a_workdir_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    # Not by file modes, which the superuser of a container does not feel.
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(WorkdirError, match="cannot write in workdir .*: Permission denied"):
        claim(tmp_path, CONFIG, pytest.fail)


def test_a_second_claim_is_refused_until_the_first_is_closed(tmp_path):
    with claim(tmp_path, CONFIG, pytest.fail):
        with pytest.raises(WorkdirError, match=f"in use by another run .process {os.getpid()}"):
            claim(tmp_path, CONFIG, pytest.fail)
    claim(tmp_path, CONFIG, pytest.fail).close()


def test_a_killed_process_loses_its_claim(tmp_path):
    holder = (
        "import sys, time; from fedmetanas_jax.engine.claim import claim\n"
        "lock = claim(sys.argv[1], {}, print); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", holder, str(tmp_path)]
    root = Path(__file__).parents[1]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(WorkdirError, match=f"process {process.pid}"):
        claim(tmp_path, {}, pytest.fail)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    claim(tmp_path, {}, pytest.fail).close()
