"""What a folder holds must be this run's, all of it and fit together, or the run is refused in one line."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import toy

from fedmetanas_jax.build import one_phase
from fedmetanas_jax.engine import identity
from fedmetanas_jax.engine.checkpoint import CheckpointError, Checkpoints
from fedmetanas_jax.engine.records import WorkdirError
from fedmetanas_jax.engine.report import NonFiniteError

DATA = toy.make_data()
CONFIG = {"seed": 3, "lr": 0.1, "block": 1, "options": {"M": 1}}


def of(config=CONFIG, data=DATA):
    return identity.of(config, {"block"}, data)


def run(workdir, said=None, mine=None, algorithm=toy.ALGORITHM, **changed):
    said = [] if said is None else said
    return toy.run(one_phase(algorithm), DATA, workdir, said, identity=mine or of(), **changed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of which 3 of 4 rounds are done."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    run(workdir, stop_after=3)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def records(workdir):
    return [json.loads(line)["round"] for line in (workdir / "records.jsonl").read_text().splitlines()]


def test_the_same_run_goes_on(workdir):
    said = []
    assert run(workdir, said, of(CONFIG | {"block": 4})).summary["rounds"] == 4  # which is only how it is run
    assert "resuming after round 3 of 4" in said
    assert records(workdir) == [1, 2, 3, 4]


OTHERS = {
    "seed was 3, is 4": of(CONFIG | {"seed": 4}),
    "lr was 0.1, is 0.2; options.M was 1, is 2": of(CONFIG | {"lr": 0.2, "options": {"M": 2}}),
    "another run: the images are not the same": of(data=DATA._replace(image=DATA.image.at[0, 0, 0].add(1))),
    "another run: the labels are not the same": of(data=DATA._replace(label=DATA.label[::-1])),
    "another run: the rows of the clients are not the same": of(data=DATA._replace(test=DATA.test[::-1])),
    "seed was 3, is 5; the labels are not the same": of(
        CONFIG | {"seed": 5}, DATA._replace(label=jnp.roll(DATA.label, 1))
    ),
}


@pytest.mark.parametrize("differs", OTHERS)
def test_another_runs_checkpoints_are_refused_before_anything_is_written(workdir, differs):
    before = (workdir / "records.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=differs) as caught:
        run(workdir, mine=OTHERS[differs], accepted=pytest.fail)
    assert "\n" not in str(caught.value)
    assert (workdir / "records.jsonl").read_bytes() == before
    assert run(workdir).summary["rounds"] == 4


def test_a_checkpoint_that_does_not_know_its_run_is_refused(workdir):
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(4, {"w": np.zeros(1)}, {"phase": 0, "plan": None})
    checkpoints.close()
    with pytest.raises(CheckpointError, match="of an older version, .*; start over in another workdir"):
        run(workdir)


def test_records_that_were_emptied_are_refused(workdir):
    (workdir / "records.jsonl").write_text("")
    with pytest.raises(WorkdirError, match="ends after line 0, but the checkpoint is of round 3"):
        run(workdir, accepted=pytest.fail)


def test_records_that_were_altered_are_refused(workdir):
    log = workdir / "records.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(line | {"loss": 0.0}) + "\n" for line in lines))
    with pytest.raises(WorkdirError, match="records.jsonl was altered: rounds 1 to 3 are not as they were written"):
        run(workdir)
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(workdir).summary["records_sha256"]


def test_records_that_go_missing_on_the_way_are_no_wrong_sums(workdir):
    with pytest.raises(WorkdirError, match="records.jsonl was removed while the run wrote it; put the file back"):
        run(workdir, accepted=(workdir / "records.jsonl").unlink)
    assert not (workdir / "records.jsonl").exists()


def test_lost_checkpoints_are_said_and_the_records_kept(workdir):
    shutil.rmtree(workdir / "checkpoints")
    said = []
    assert run(workdir, said).summary["rounds"] == 4
    assert [text for text in said if "no checkpoint" in text] == [
        f"there are records but no checkpoint: starting at round 0; moved the records to {workdir}/records.jsonl.1"
    ]
    assert len((workdir / "records.jsonl.1").read_text().splitlines()) == 3
    assert records(workdir) == [1, 2, 3, 4]


def spoilt(after: int):
    """A server whose statistics are no numbers after that many rounds, while what clients measure stays finite."""

    def server_update(server, merged):
        server = toy.server_update(server, merged)
        mean = jnp.where(server.round >= after, jnp.nan, server.stats["mean"])
        return server._replace(stats={"mean": mean})

    return toy.ALGORITHM._replace(server_update=server_update)


@pytest.mark.parametrize(
    ("after", "kept", "left"),
    [(4, "the checkpoint of round 3 is kept", [3, 2]), (1, "there is no checkpoint yet", [])],
)
def test_a_server_that_is_not_finite_is_neither_saved_nor_delivered(tmp_path, after, kept, left):
    with pytest.raises(NonFiniteError) as caught:
        run(tmp_path / "run", algorithm=spoilt(after))
    assert f"round {after}, the server: its state.stats['mean'] is not finite; {kept}" in str(caught.value)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.candidates() == left
    checkpoints.close()
    assert run(tmp_path / "run").summary["rounds"] == 4  # by a program that was put right


def test_a_folder_that_is_gone_is_one_of_the_failures_that_are_known(tmp_path):
    from fedmetanas_jax import build

    workdir = tmp_path / "run"
    with pytest.raises(build.FAILURES) as caught:
        run(workdir, accepted=lambda: shutil.rmtree(workdir))
    assert str(workdir) in str(caught.value)


@pytest.mark.parametrize("field", DATA._fields)
def test_all_of_the_data_is_hashed(field):
    shorter = DATA._replace(**{field: getattr(DATA, field)[:-1]})
    assert of(data=shorter)["data"] != of()["data"]
