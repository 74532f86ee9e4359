"""Checkpoints: every bit comes back, damage is found and survived, and so is a kill at any moment."""

import logging
import multiprocessing
import random
import resource
import shutil
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedmetanas_jax.engine import checkpoint
from fedmetanas_jax.engine.checkpoint import CheckpointError, Checkpoints, DamagedCheckpoint


class State(NamedTuple):
    round: jax.Array
    params: dict
    optimizer: tuple
    rest: dict


def make_state(step: int, size: int = 6) -> State:
    """Every kind of leaf and node a state may have, all functions of `step`."""
    weight = jnp.arange(size, dtype=jnp.float32).reshape(2, -1) / 3 + step
    params = {"w": weight, "b": jnp.full((3,), step / 7)}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3), optax.sgd(0.1, momentum=0.9))
    rest = {
        "half": jnp.array([1 / 3, -0.0, jnp.inf], jnp.bfloat16) * step,
        "flag": jnp.array([True, False, True]),
        "bytes": jnp.arange(5, dtype=jnp.uint8),
        "nan": jnp.array([jnp.nan, -jnp.inf]),
        "empty": jnp.zeros((4, 0)),
        "nothing": (),
        "none": None,
        "dict": {},
    }
    return State(jnp.int32(step), params, optimizer.init(params), rest)


def template(meta: dict) -> State:
    return jax.eval_shape(lambda: make_state(meta["step"]))


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert isinstance(x, jax.Array)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with checkpoints 2 and 3."""
    directory = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(directory)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), {"step": step, "plan": [1, {"a": None}]})
    checkpoints.close()
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def test_every_bit_comes_back(directory):
    step, meta, state = Checkpoints(directory).restore_newest(template, pytest.fail)
    assert (step, meta) == (3, {"step": 3, "plan": [1, {"a": None}]})
    assert_equal(state, make_state(3))


def test_what_is_held_on_the_host_comes_back_to_it(directory):
    like = template({"step": 3})
    like = like._replace(params=jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like.params))
    state = Checkpoints(directory).restore(3, like)
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(make_state(3).params), strict=True):
        assert isinstance(x, np.ndarray)
        np.testing.assert_array_equal(x, y)
        x[:] = 0  # its own memory
    assert isinstance(state.round, jax.Array)


def test_large_states_are_stored_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PIECE", 50)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})
    assert_equal(checkpoints.restore(1, make_state(1)), make_state(1))


def test_the_saved_buffers_may_be_donated(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = make_state(1)
    checkpoints.save(1, state, {})
    jax.block_until_ready(jax.jit(lambda x: jax.tree.map(jnp.zeros_like, x), donate_argnums=0)(state))
    assert_equal(checkpoints.restore(1, make_state(0)), make_state(1))


def test_only_the_newest_are_kept(directory):
    assert Checkpoints(directory).candidates() == [3, 2]


def test_no_checkpoint_is_no_error(tmp_path):
    assert Checkpoints(tmp_path / "new").restore_newest(template, pytest.fail) is None


def test_a_folder_of_the_users_own_stays(directory):
    for name in ("old", "damaged/3", "notes"):
        (directory / name).mkdir(parents=True)
        (directory / name / "mine").write_text("mine")
    checkpoints = Checkpoints(directory)
    checkpoints.save(4, make_state(4), {"step": 4})  # deletes checkpoint 2
    checkpoints.close()
    truncate(directory / "4")
    said = []
    assert Checkpoints(directory).restore_newest(template, said.append)[0] == 3
    assert Checkpoints(directory).candidates() == [3]
    Checkpoints(directory).save(4, make_state(4), {"step": 4})
    Checkpoints(directory).save(5, make_state(5), {"step": 5})
    truncate(directory / "5")
    assert Checkpoints(directory).restore_newest(template, said.append)[0] == 4
    for name in ("old", "damaged/3", "notes"):
        assert (directory / name / "mine").read_text() == "mine"


def test_a_disk_that_is_full_leaves_no_traceback_in_the_log(directory, caplog):
    checkpoints, state = Checkpoints(directory), {"x": np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # of any file
    try:
        with pytest.raises(CheckpointError, match="checkpoint 4 cannot be saved in .*once the folder can be written"):
            checkpoints.save(4, state, {"step": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [record for record in caplog.records if record.exc_info] == []
    assert checkpoints.candidates() == [3, 2]
    logging.getLogger("absl").error("of somebody else", exc_info=(ValueError, ValueError("x"), None))
    assert [record.message for record in caplog.records if record.exc_info] == ["of somebody else"]


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_the_older_ones_stay(directory, monkeypatch):
    checkpoints = Checkpoints(directory)

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED:\nNo space left on device")  # as storage says it, which is no OSError

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(CheckpointError, match="checkpoint 4 cannot be saved in .*No space left on device") as caught:
        checkpoints.save(4, make_state(4), {"step": 4})
    assert "\n" not in str(caught.value)
    assert Checkpoints(directory).restore_newest(template, pytest.fail)[0] == 3


def test_a_folder_that_was_removed_is_not_made_anew(directory):
    checkpoints = Checkpoints(directory)
    shutil.rmtree(directory)
    with pytest.raises(CheckpointError, match="checkpoints was removed while the run wrote in it"):
        checkpoints.save(4, make_state(4), {"step": 4})
    assert not directory.exists()


def test_keeping_fewer_than_two_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep = 1"):
        Checkpoints(tmp_path, keep=1)


def test_saving_a_step_again(directory):
    checkpoints = Checkpoints(directory)
    checkpoints.save(3, make_state(3), checkpoints.meta(3))
    with pytest.raises(ValueError, match="step 3"):
        checkpoints.save(3, make_state(4), checkpoints.meta(3))
    with pytest.raises(ValueError, match="step 1"):
        checkpoints.save(1, make_state(1), {})
    assert_equal(checkpoints.restore(3, make_state(0)), make_state(3))


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder):
    path = largest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(folder):
    """One bit in the middle of each of the state's data files, of which storage may read only some."""
    for path in (p for p in (folder / "state").rglob("d/*") if p.is_file()):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def remove_state(folder):
    shutil.rmtree(folder / "state")


def remove_meta(folder):
    shutil.rmtree(folder / "meta")


def remove_manifest(folder):
    (folder / "state" / "manifest.ocdbt").unlink()


def alter_meta(folder):
    path = folder / "meta" / "metadata"
    text = path.read_text()
    assert '"a": null' in text
    path.write_text(text.replace('"a": null', '"a": 1'))


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = [truncate, flip, remove_state, remove_meta, remove_manifest, alter_meta, empty]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_newest_falls_back_and_says_so(directory, damage):
    damage(directory / "3")
    said = []
    checkpoints = Checkpoints(directory)
    step, meta, state = checkpoints.restore_newest(template, said.append)
    assert (step, meta["step"]) == (2, 2)
    assert_equal(state, make_state(2))
    assert len(said) == 1
    assert said[0].startswith("checkpoint 3 is damaged (its ")
    assert "\n" not in said[0]
    assert (directory / "damaged" / "3").is_dir()

    checkpoints.save(3, make_state(3), {"step": 3})
    assert checkpoints.candidates() == [3, 2]
    checkpoints.close()
    assert_equal(Checkpoints(directory).restore_newest(template, pytest.fail)[2], make_state(3))


def test_numbers_of_another_checkpoint_are_damage(directory):
    """Files that are whole but not those that were saved: only the SHA-256 can tell."""
    shutil.rmtree(directory / "3" / "state")
    shutil.copytree(directory / "2" / "state", directory / "3" / "state")
    with pytest.raises(DamagedCheckpoint, match="SHA-256"):
        Checkpoints(directory).restore(3, make_state(0))


def test_a_renamed_checkpoint_is_damage(directory):
    (directory / "3").rename(directory / "9")
    with pytest.raises(DamagedCheckpoint, match="SHA-256"):
        Checkpoints(directory).meta(9)


def test_all_damaged_is_an_error_however_often_it_is_tried(directory):
    truncate(directory / "2")
    remove_meta(directory / "3")
    for _ in range(2):
        checkpoints = Checkpoints(directory)
        with pytest.raises(CheckpointError, match=r"every checkpoint .* is damaged \(3: .*; 2: ") as error:
            checkpoints.restore_newest(template, pytest.fail)
        assert "\n" not in str(error.value)
        assert checkpoints.candidates() == [3, 2]
        checkpoints.close()


def test_another_programs_state_is_an_error_not_damage(directory):
    checkpoints = Checkpoints(directory)
    with pytest.raises(CheckpointError, match=r"params\['w'\] float32\[2, 3\] where .* float32\[2, 4\]"):
        checkpoints.restore_newest(lambda meta: make_state(0, size=8), pytest.fail)
    with pytest.raises(CheckpointError, match="nothing more"):
        checkpoints.restore(3, {})
    assert checkpoints.candidates() == [3, 2]


def plain_state(step):
    """1.6 MB, made without a compiler, so that a process to be killed is soon at work."""
    return {"round": np.int32(step), "rows": np.random.default_rng(step).random((4, 100_000), np.float32)}


def save_for_ever(directory):
    """Resumes from the newest checkpoint and saves one step after another until killed."""
    checkpoints = Checkpoints(directory)
    newest = checkpoints.restore_newest(lambda meta: plain_state(0), pytest.fail)
    step = newest[0] if newest else 0
    while True:
        step += 1
        checkpoints.save(step, plain_state(step), {"step": step})


def steps(directory):
    return {int(p.name) for p in directory.iterdir() if p.name.isdecimal()}


def test_a_kill_at_any_moment_leaves_a_good_checkpoint(tmp_path):
    # forkserver: importing jax and orbax is paid once, and no child inherits a running backend.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jax", "optax", "orbax.checkpoint", "pytest"])
    moments, last, plain = random.Random(0), 0, plain_state(0)
    for _ in range(8):
        process = context.Process(target=save_for_ever, args=(tmp_path,))
        process.start()
        while process.is_alive() and max(steps(tmp_path), default=0) <= last:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        assert process.is_alive()
        process.kill()
        process.join()

        checkpoints = Checkpoints(tmp_path)
        step, meta, state = checkpoints.restore_newest(lambda meta: jax.eval_shape(lambda: plain), pytest.fail)
        assert step == meta["step"] > last
        assert_equal(state, plain_state(step))
        checkpoints.close()
        last = step
    Checkpoints(tmp_path).save(last + 1, plain_state(last + 1), {})
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [last, last + 1]
