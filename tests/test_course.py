"""A whole search whose next program is compiled while the last one still runs."""

import dataclasses
import json

import numpy as np
import pytest

from fedmetanas_jax import build
from fedmetanas_jax.config import Config
from fedmetanas_jax.engine import programs, worth
from fedmetanas_jax.engine.kept import Kept

TINY = Config(
    dataset="digits", width=2, cells=1, nodes=1, clients=4, cohort=2, train_size=32, test_size=16, rounds=8, epochs=1,
    batch=8, augment=(), at_once=1, block=2, eval_every=4, checkpoint_every=2, final_adapt=False, compile_ahead=2,
    bn_eval="recalibrated",
    options={"prune_from": 0.25, "prune_until": 0.25, "prune_events": 1, "prune_tolerance": None},
)  # fmt: skip


KEPT = Kept()  # what a run compiles, for those of the same config


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    build.run(TINY, task="t", workdir=workdir, data_dir=workdir, kept=KEPT)
    return workdir


def records(workdir):
    return [json.loads(line) for line in (workdir / "records.jsonl").read_text().splitlines()]


def timeless(workdir):
    clock = ("seconds", "compile_seconds", "compile_seconds_ahead", "event_stall_seconds")
    return [{name: x for name, x in line.items() if name not in clock} for line in records(workdir)]


def test_the_mask_is_pruned_first_and_the_program_two_rounds_later(unbroken):
    """Between the two the program skips what is pruned, as its clients are computed one after another."""
    lines = records(unbroken)
    assert [(line["round"], line["event"]) for line in lines if "event" in line] == [(2, "prune")]
    assert [line["round"] for line in lines if "compile_seconds_ahead" in line] == [4]
    pruned, smaller = lines[1], lines[3]
    assert pruned["event_ops_alive"] == lines[2]["ops_alive"] == 4  # of 32: one a live edge, both cell types
    assert lines[1]["macs"] > lines[2]["macs"] == lines[3]["macs"] == lines[4]["macs"]
    assert lines[1]["bytes_up"] > lines[2]["bytes_up"] == lines[3]["bytes_up"] == lines[4]["bytes_up"]
    assert smaller["compile_seconds_ahead"] > 0
    # Nothing was left to be compiled when the first round of the smaller program came.
    assert sum(line.get("compile_seconds", 0) for line in lines[4:6]) == 0


def test_weights_are_recorded_where_the_network_is_evaluated_or_pruned(unbroken):
    lines = {line["round"]: np.array(line["mix"]) for line in records(unbroken) if "mix" in line}
    assert [(number, mix.shape) for number, mix in lines.items()] == [(n, (2, 2, 8)) for n in (1, 2, 4, 8)]
    assert np.all((lines.pop(1) > 0) & (lines[2] < 2))  # everything is alive after the first round
    for mix in lines.values():  # the event is before the first of them; a single operation an edge is left
        assert sorted(mix.ravel())[-5:] == [0, 1, 1, 1, 1]


def test_a_pause_between_the_two_changes_no_bit(unbroken, tmp_path):
    workdir = tmp_path / "run"
    for stop_after in (3, None):
        build.run(TINY, task="t", workdir=workdir, data_dir=tmp_path, stop_after=stop_after, kept=KEPT)
    assert timeless(unbroken) == timeless(workdir)
    with np.load(unbroken / "network.npz") as one, np.load(workdir / "network.npz") as other:
        for name in one.files:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("how", [{"compile_ahead": 0}, {"at_once": 2}])
def test_how_it_is_computed_makes_no_other_search(unbroken, tmp_path, how):
    """Waiting for the program, or computing what is pruned until it is there, changes no function: the same network, to
    rounding."""
    config = dataclasses.replace(TINY, **how)
    build.run(config, task="t", workdir=tmp_path / "run", data_dir=tmp_path)
    if "at_once" in how:
        macs = [line["macs"] for line in records(tmp_path / "run")]
        assert macs[0] == macs[3] > macs[4]
    for one, other in zip(records(unbroken), records(tmp_path / "run"), strict=True):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=2e-3)
    assert (unbroken / "genotype.json").read_text() == (tmp_path / "run" / "genotype.json").read_text()


def test_where_it_does_not_pay_the_smaller_program_comes_at_the_end(unbroken, tmp_path, monkeypatch):
    """The rounds after the last event are left to the supernet's, which skips what is pruned; a run that is broken off
    among them does the same."""
    config, how = dataclasses.replace(TINY, compile_ahead=-1, final_adapt=True), {"data_dir": tmp_path, "kept": Kept()}
    for name, stops in (("whole", (None,)), ("broken off", (5, None))):
        for stop_after in stops:
            build.run(config, task="t", workdir=tmp_path / name, stop_after=stop_after, **how)
    whole, broken = (timeless(tmp_path / name) for name in ("whole", "broken off"))
    assert whole == broken
    lines = records(tmp_path / "whole")
    assert [line["round"] for line in lines if "compile_seconds_ahead" in line] == [8]
    assert lines[7]["compile_seconds_ahead"] > 0
    assert "local_accuracy_adapted" in lines[7]
    for one, other in zip(records(unbroken), lines, strict=True):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=2e-3)
        assert (one["macs"], one["bytes_up"]) == (other["macs"], other["bytes_up"])
    with np.load(unbroken / "network.npz") as one, np.load(tmp_path / "whole" / "network.npz") as other:
        assert {name: one[name].shape for name in one.files} == {name: other[name].shape for name in other.files}
    # Where compiling costs next to nothing the run moves at once.
    monkeypatch.setitem(worth.COMPILING, "cpu", 1.0)
    quick = dataclasses.replace(config, final_adapt=False)
    build.run(quick, task="t", workdir=tmp_path / "quick", data_dir=tmp_path, stop_after=3)
    assert [line["round"] for line in records(tmp_path / "quick") if "compile_seconds_ahead" in line] == [2]


def test_seeds_share_programs(unbroken, tmp_path, monkeypatch):
    """A run is given what one of another seed compiled, and compiles nothing; its numbers are its own."""
    made, lowered = [], programs._lowered
    monkeypatch.setattr(programs, "_lowered", lambda *given: made.append(given) or lowered(*given))
    kept = Kept()
    for seed in (TINY.seed + 1, TINY.seed):
        config = dataclasses.replace(TINY, seed=seed, compile_ahead=8)
        build.run(config, task="t", workdir=tmp_path / str(seed), data_dir=tmp_path, kept=kept, stop_after=4)
        assert len(made) == 2  # a round and an evaluation
    found = [timeless(path) for path in (tmp_path / str(TINY.seed), unbroken, tmp_path / str(TINY.seed + 1))]
    assert found[0] == found[1][:4]
    assert found[0] != found[2]
