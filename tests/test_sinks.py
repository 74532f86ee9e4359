"""Where a run can be watched: what is sent, once each, and that no sink can hurt the run."""

import json
import sys
import threading
import types
from functools import partial

import pytest

from fedmetanas_jax import main as cli
from fedmetanas_jax.engine import sink_kinds, sinks
from fedmetanas_jax.engine.sink_kinds import KINDS, Run, Sink, SinkError, numbers
from fedmetanas_jax.engine.sinks import Sinks

LINES = [{"round": n, "loss": 1 / n, "local_accuracy": {"mean": n / 10}, "cohort": [1, 2]} for n in range(1, 7)]
SUMMARY = {"rounds": 6, "server_accuracy": 0.5, "versions": {"jax": "1"}}


@pytest.fixture
def sent(monkeypatch):
    """What a sink called "toy" was told; its `hinder` is called before every round."""
    told = types.SimpleNamespace(calls=[], rounds=[], hinder=lambda number: None)

    def record(number, found):
        told.hinder(number)
        told.rounds.append(number)
        told.calls.append((number, found))

    def begin(known, start):
        told.calls.append(("begin", known, start))
        return known or f"id{len(told.calls)}", "there"

    monkeypatch.setitem(KINDS, "toy", lambda run: Sink(begin, record, lambda summary: told.calls.append(summary)))
    return told


def run(workdir, past, lines, summary=None, names=("toy",)):
    """A run of these records -> what it said."""
    said = []
    with Sinks(names, Run("t-m-1", {"seed": 1, "options": {"M": 2}}, workdir)) as to:
        to.begin(past, said.append)
        for line in lines:
            to.record(line)
        if summary is not None:
            to.end(summary)
    return said


def test_numbers_are_those_that_can_be_drawn():
    record = {"a": 1, "b": {"c": 0.5, "d": {"e": 2}}, "f": None, "g": "x", "h": [1], "i": True, "j": float("nan")}
    assert numbers(record) == {"a": 1.0, "b/c": 0.5, "b/d/e": 2.0}


def test_a_record_is_sent_once_whatever_was_broken_off(tmp_path, sent):
    assert run(tmp_path, [], LINES[:4]) == ["toy: there"]
    rounds = [(n, {"loss": 1 / n, "local_accuracy/mean": n / 10}) for n in range(1, 5)]
    assert sent.calls == [("begin", None, 1), *rounds, None]
    sent.calls.clear()
    run(tmp_path, LINES[:2], LINES[2:], SUMMARY)  # the last checkpoint was of round 2
    assert sent.calls[0] == ("begin", "id1", 5)
    assert sent.rounds == [1, 2, 3, 4, 5, 6]
    assert sent.calls[-1] == SUMMARY
    sent.calls.clear()
    assert run(tmp_path, LINES, [], SUMMARY) == []  # a finished run that is asked for again
    assert sent.calls == []


def test_what_a_sink_lacks_is_made_up_for(tmp_path, sent):
    run(tmp_path, LINES[:3], LINES[3:], SUMMARY)  # a run that was begun without it
    assert sent.rounds == [1, 2, 3, 4, 5, 6]


def test_a_run_that_starts_anew_is_another_one(tmp_path, sent):
    run(tmp_path, [], LINES[:4])
    sent.rounds.clear()
    run(tmp_path, [], LINES[:2])
    assert sent.rounds == [1, 2]
    assert [call for call in sent.calls if call and call[0] == "begin"] == [("begin", None, 1)] * 2


def test_a_sink_that_fails_is_said_once_and_sent_the_rest_next_time(tmp_path, sent):
    def hinder(number):
        if number == 3:
            raise OSError("the server\n is gone")

    sent.hinder = hinder
    said = run(tmp_path, [], LINES, SUMMARY)
    assert said[1:] == ["toy failed and lacks what comes after round 2 (OSError: the server is gone); the run goes on"]
    assert sent.rounds == [1, 2]
    sent.hinder = lambda number: None
    run(tmp_path, LINES, [], SUMMARY)
    assert sent.rounds == [1, 2, 3, 4, 5, 6]
    assert sent.calls[-1] == SUMMARY


def test_a_sink_that_hangs_is_left(tmp_path, sent, monkeypatch):
    monkeypatch.setattr(sinks, "WAIT", 0.2)
    freed = threading.Event()
    sent.hinder = lambda number: freed.wait(60)
    assert run(tmp_path, [], LINES, SUMMARY)[-1] == "toy does not answer and lacks what comes after round 0"
    freed.set()


def test_the_engine_sends_every_round_and_nothing_hurts_it(tmp_path, sent, monkeypatch):
    import toy

    from fedmetanas_jax.core import Phase

    engine = toy.engine.run
    phases = [Phase(0, lambda server, plan, key: (None, server), lambda plan: toy.ALGORITHM)]

    def hinder(number):
        if number == 4:
            raise RuntimeError("no")

    sent.hinder = hinder
    for stop_after in (2, None):
        with Sinks(("toy",), Run("t", {}, tmp_path)) as to:
            monkeypatch.setattr(toy.engine, "run", partial(engine, sinks=to))
            outcome = toy.run(phases, toy.make_data(), tmp_path, [], stop_after=stop_after)
    assert outcome.summary["rounds"] == 4
    assert sent.rounds == [1, 2, 3]
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [call[1]["loss"] for call in sent.calls if call and call[0] in (1, 2, 3)] == [x["loss"] for x in records[:3]]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_package_that_is_missing_is_one_line_before_the_workdir_is_claimed(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["main.py", f"--sinks={name}", f"--workdir={tmp_path / 'run'}"]) == 1
    error = f"error: --sinks={name} needs the package {name}: pip install 'fedmetanas_jax[{name}]'\n"
    assert capsys.readouterr().err == error
    assert not (tmp_path / "run").exists()


def test_a_package_that_is_broken_is_one_line(tmp_path, monkeypatch):
    def broken(module):
        raise TypeError("Descriptors cannot be\ncreated directly")

    monkeypatch.setattr(sink_kinds.importlib, "import_module", broken)
    with pytest.raises(SinkError, match="the package wandb cannot be imported .Descriptors cannot be created"):
        Sinks(("wandb",), Run("t", {}, tmp_path))


def test_a_sink_that_does_not_exist_is_status_2(capsys):
    assert cli.main(["main.py", "--sinks=tensorbord,mlflow"]) == 2
    assert capsys.readouterr().err.startswith("error: no sink 'tensorbord'; did you mean 'tensorboard'?")


def test_wandb_without_a_key_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(api=types.SimpleNamespace(api_key=None)))
    with pytest.raises(SinkError, match="there is no key for W&B: run `wandb login`, or set WANDB_API_KEY"):
        Sinks(("wandb",), Run("t", {}, tmp_path))


def test_wandb_is_resumed_by_the_id_in_the_workdir(tmp_path, monkeypatch):
    made = []

    class Logged:
        url = "https://there"

        def __init__(self, **given):
            self.given, self.logged, self.summary = given, [], {}
            made.append(self)

        def log(self, found, step):
            self.logged.append(step)

        def finish(self, exit_code):
            self.exit_code = exit_code

    fake = types.SimpleNamespace(init=Logged, Settings=dict, api=types.SimpleNamespace(api_key="k"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    assert run(tmp_path, [], LINES[:4], names=["wandb"]) == ["wandb: https://there"]
    run(tmp_path, LINES[:2], LINES[2:], SUMMARY, names=["wandb"])
    first, second = made
    assert first.given["id"] == second.given["id"]
    assert {"project": "fedmetanas_jax", "resume": "allow", "name": "t-m-1"}.items() <= first.given.items()
    assert first.logged + second.logged == [1, 2, 3, 4, 5, 6]
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert second.summary == {"rounds": 6.0, "server_accuracy": 0.5}


def test_mlflow_goes_on_with_the_run_that_the_workdir_names(tmp_path, monkeypatch):
    calls = []

    class Client:
        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return "7"

        def create_run(self, experiment, run_name):
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"{experiment}/{run_name}"))

        def update_run(self, *given, **named):
            calls.append(("update", *given, *named.values()))

        def log_batch(self, run_id, metrics=(), params=()):
            calls.append((run_id, [(m[0], m[3]) for m in metrics], dict(params)))

        def set_terminated(self, run_id, status):
            calls.append((run_id, status))

    entities = types.ModuleType("mlflow.entities")
    entities.Metric, entities.Param = (lambda *given: given), (lambda *given: given)
    fake = types.SimpleNamespace(MlflowClient=Client, entities=entities, get_tracking_uri=lambda: "file:/there")
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    assert run(tmp_path, [], LINES[:1], names=["mlflow"]) == ["mlflow: run 7/t-m-1 in file:/there"]
    run(tmp_path, LINES[:1], [], SUMMARY, names=["mlflow"])
    me = "7/t-m-1"
    assert calls == [
        (me, [], {"seed": "1", "options.M": "2"}),
        (me, [("loss", 1), ("local_accuracy/mean", 1)], {}),
        (me, "KILLED"),
        ("update", me, "RUNNING"),
        (me, [("result/rounds", 6), ("result/server_accuracy", 6)], {}),
        (me, "FINISHED"),
    ]


def test_tensorboard_reads_back_what_was_written(tmp_path):
    pytest.importorskip("tensorboard", reason="event files need TensorBoard: pip install '.[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, [], LINES[:4], names=["tensorboard"])
    run(tmp_path, LINES[:2], LINES[2:], SUMMARY, names=["tensorboard"])
    seen = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert seen.Tags()["scalars"] == ["loss", "local_accuracy/mean"]
    assert [(x.step, x.value) for x in seen.Scalars("loss")] == [(n, pytest.approx(1 / n)) for n in range(1, 7)]
    assert {"config", "result"} <= set(seen.Tags()["tensors"])
    assert b'"server_accuracy": 0.5' in seen.Tensors("result")[0].tensor_proto.string_val[0]
    run(tmp_path, [], LINES[:2], names=["tensorboard"])  # anew: what was seen before is gone
    assert [x.step for x in EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")] == [1, 2]
