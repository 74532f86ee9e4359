"""A study: which runs a table needs, how they are worked through, what the table says."""

import csv
import dataclasses
import io
import json
import os
import signal
import time
from pathlib import Path

import pytest
import tables
import toy_study
from study import claims, columns, plan, several, worker
from study.outcome import FIGURES
from study.paper import TABLES
from study.scales import SCALES
from study.tables import Request, document, keep, requests
from study.written import markdown, text_csv

from fedmetanas_jax.algorithms import ALGORITHMS
from fedmetanas_jax.config import from_dict
from fedmetanas_jax.engine.interrupt import interruptible
from fedmetanas_jax.engine.records import WorkdirError
from fedmetanas_jax.options import UsageError, default_options

RECORDED = sorted((Path(__file__).parents[1] / "results/cifar10_methods/runs").iterdir())


@pytest.mark.parametrize("folder", RECORDED, ids=lambda folder: folder.name)
def test_recorded_runs_are_found_by_todays_names(folder):
    """A new option of a method would give them others, and the study would begin anew: config.LATER has those."""
    config = from_dict(json.loads((folder / "config.json").read_text())["config"])
    options = default_options(ALGORITHMS[config.method]) | config.options
    name = plan.name_of("row", "column", dataclasses.replace(config, options=options))
    assert name.rpartition("-")[2] == folder.name.rpartition("-")[2]


@pytest.fixture
def fake(monkeypatch):
    """Runs that cost nothing; the list is of what was run."""
    ran = []

    def run(config, *, task, **how):
        ran.append(task)
        toy_study.run(config, task=task, **how)

    monkeypatch.setattr(worker.build, "run", run)
    return ran


def request(number=1, rows=("fedavg", "fedrep", "perfedrlnas"), seeds=(1, 2), **overrides) -> Request:
    return Request(number, "minutes", rows, ("digits:dir0.1",), seeds, {"rounds": 4} | overrides, "the command")


@pytest.mark.parametrize(
    ("column", "fields", "head"),
    [
        ("a:dir0.1", {"dataset": "a", "partition": "dirichlet", "concentration": 0.1}, "a, Dirichlet 0.1"),
        ("mine:tau4", {"dataset": "mine", "partition": "label_skew", "tau": 4}, "mine, 4 labels a client"),
        ("mnist:iid", {"dataset": "mnist", "partition": "iid"}, "MNIST, IID"),
        ("mine:natural", {"dataset": "mine", "partition": "natural"}, "mine, everybody's own"),
        ("a:plato1e-3", {"dataset": "a", "partition": "plato", "concentration": 1e-3}, "a, Dirichlet, Plato's, 1e-3"),
    ],
)  # fmt: skip
def test_a_column_is_a_data_set_and_a_split(column, fields, head):
    assert columns.fields(column) == fields
    assert columns.head(column) == head


@pytest.mark.parametrize("column", ["mnist", ":dir0.1", "a:dir", "a:dir0.1.2", "a:tau", "a:tau4.5", "a:skew", "a:iid1"])
def test_what_is_no_column_is_refused(column):
    with pytest.raises(UsageError, match="is not DATASET:SPLIT"):
        columns.fields(column)


def test_a_row_is_a_method_with_options_and_fields():
    run = plan.run(SCALES["minutes"], "fedmetanas+M=0+lr=0.2", "digits:tau4", 3, {"rounds": 7})
    assert (run.config.method, run.config.seed, run.config.rounds, run.config.tau) == ("fedmetanas", 3, 7, 4)
    assert (run.config.options["M"], run.config.lr) == (0, 0.2)
    assert plan.run(SCALES["minutes"], "fednas+lr=0.2", "digits:tau4", 3, {}).config.options["travel"] == 60.0
    assert run.name.startswith("fedmetanas+M=0+lr=0.2-digits-tau4-seed3-")


def test_label_skew_deals_a_small_federation_no_more_images_than_dirichlet_does():
    asked = {
        scale: [plan.run(SCALES[scale], "fedavg", f"cifar10:{split}", 1, {}).config for split in ("tau4", "dir0.1")]
        for scale in ("paper", "gpu", "cpu")
    }
    assert {scale: [config.partition for config in both] for scale, both in asked.items()} == {
        "paper": ["label_skew", "dirichlet"],  # 500 images a client, by the 100 there are
        "gpu": ["label_skew_sized", "dirichlet"],
        "cpu": ["label_skew_sized", "dirichlet"],
    }
    assert len({config.train_size for both in asked.values() for config in both}) == 1


def test_runs_with_the_same_name_are_the_same_run():
    scale, cell = SCALES["minutes"], ("fedavg", "digits:dir0.1", 1)
    name = plan.run(scale, *cell, {}).name
    assert plan.run(scale, *cell, {"eval_every": 1}).name == name  # how it is run, not what it is
    for other in (plan.run(scale, *cell, {"rounds": 5}), plan.run(scale, "fedavg", "digits:dir0.1", 2, {})):
        assert other.name != name


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("fedavgg", "did you mean 'fedavg'"),
        ("fedprox+mu", r"'fedprox\+mu' is not METHOD\+NAME=VALUE"),
        ("fedprox+mu=x", "'x' is not a number"),
        ("fedprox+nu=1", "no option or field 'nu'; did you mean 'mu'"),
        ("fedprox+seed=1", "no option or field 'seed'"),
    ],
)
def test_what_is_no_row_is_refused(row, message):
    with pytest.raises(UsageError, match=message):
        plan.run(SCALES["minutes"], row, "digits:dir0.1", 1, {})


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("number", TABLES)
def test_every_table_of_every_scale_can_be_asked_for(number, scale):
    asked = Request(number, scale, TABLES[number].methods, SCALES[scale].columns(number), (1,), {}, "")
    assert asked.columns
    assert len(asked.runs()) == len(asked.rows) * len(asked.columns)
    assert set(TABLES[number].figures) < set(FIGURES)


def test_the_paper_says_the_same_number_in_two_tables():
    server = [TABLES[number].paper["fedmetanas"]["cifar10:dir0.1"]["server"] for number in (1, 2, 4)]
    assert server == [81.65] * 3
    for method in ("fednas", "feddsnas", "fedrlnas"):
        two, four = (TABLES[number].paper[method]["cifar10:dir0.1"] for number in (2, 4))
        assert (two["server"], two["std"]) == (four["server"], four["std"])


def test_work_does_every_run_once_and_again_only_what_is_missing(fake, tmp_path):
    study, runs = worker.Study(tmp_path), toy_study.runs()
    done = worker.work(study, runs, None, lambda text: None)
    assert sorted(fake) == sorted(done.finished) == sorted(run.name for run in runs)
    assert worker.work(study, runs, None, lambda text: None) == ([], [])
    (study.workdir(runs[2]) / "result.json").unlink()
    assert worker.work(study, runs, None, lambda text: None).finished == [runs[2].name]
    assert study.claims.held() == {}


def test_a_process_stays_with_a_method_and_searches_come_first(fake, tmp_path):
    study, runs = worker.Study(tmp_path), toy_study.runs(("fedavg", "fednas", "fedrep", "fedmetanas"), (1, 2))
    runs = plan.in_order([*runs, *runs])
    with study.claims.take(runs[0].name):  # what another process has programs for comes after all others
        worker.work(study, runs, None, lambda text: None, wait=False)
    methods = [name.partition("-")[0] for name in fake]
    assert methods == ["fedmetanas"] * 2 + ["fedavg"] * 2 + ["fedrep"] * 2 + ["fednas"]


def test_a_run_that_fails_does_not_stop_the_rest(fake, tmp_path, monkeypatch):
    study, runs, said = worker.Study(tmp_path), toy_study.runs(), []
    sound = worker.build.run

    def run(config, **how):
        if config.method == "fedavg" and config.seed == 2:
            raise WorkdirError("is no place to be") if config.rounds == 4 else ZeroDivisionError
        sound(config, **how)

    monkeypatch.setattr(worker.build, "run", run)
    done = worker.work(study, runs, None, said.append)
    assert (len(done.finished), done.failed) == (5, [runs[1].name])
    assert study.failure(runs[1])["error"] == "WorkdirError: is no place to be"
    assert any("failed: WorkdirError" in text for text in said)
    assert worker.work(study, runs, None, said.append) == ([], [])  # not again by itself
    monkeypatch.setattr(worker.build, "run", sound)
    study.forgive(runs[1])
    assert worker.work(study, runs, None, said.append).finished == [runs[1].name]


def test_a_reader_who_has_had_enough_makes_no_run_fail(fake, tmp_path, monkeypatch):
    study, runs, sound = worker.Study(tmp_path), toy_study.runs(), worker.build.run

    def run(config, **how):
        raise BrokenPipeError  # as a line of progress does that nobody reads

    monkeypatch.setattr(worker.build, "run", run)
    with pytest.raises(BrokenPipeError):
        worker.work(study, runs, None, lambda text: None)
    assert not any(study.failure(run) for run in runs)
    assert study.claims.held() == {}
    monkeypatch.setattr(worker.build, "run", sound)
    assert len(worker.work(study, runs, None, lambda text: None).finished) == len(runs)


def test_damaged_files_are_set_aside_and_the_run_begins_anew(fake, tmp_path, monkeypatch):
    study, runs, said = worker.Study(tmp_path), toy_study.runs(), []
    worker.work(study, runs, None, said.append)
    whole = (study.workdir(runs[0]) / "result.json").read_text()
    records = study.workdir(runs[0]) / "records.jsonl"
    read = records.read_text()
    records.write_text(read.replace('"server_accuracy": 0.5', '"server_accuracy": 0.9', 1))
    assert records.read_text() != read
    assert study.finished(runs[0]) is None  # every line is one, and they say something else
    records.write_text(read.replace('"round": 2', '"round": 3'))
    sound = worker.build.run

    def run(config, *, workdir, **how):  # as the real one refuses records that do not fit
        if (workdir / "result.json").exists():
            raise WorkdirError("records.jsonl, line 2, is of round 3")
        sound(config, workdir=workdir, **how)

    monkeypatch.setattr(worker.build, "run", run)
    assert study.finished(runs[0]) is None
    assert worker.work(study, runs, None, said.append).finished == [runs[0].name]
    assert (study.workdir(runs[0]) / "result.json").read_text() == whole
    aside = tmp_path / "set_aside" / f"{runs[0].name}.1"
    assert '"round": 3' in (aside / "records.jsonl").read_text()
    assert any(str(aside) in text for text in said)


def test_a_run_that_processes_die_on_counts_as_failed(fake, tmp_path):
    study, runs = worker.Study(tmp_path), toy_study.runs(seeds=(1,))
    gone = json.dumps({"here": "elsewhere", "pid": 1, "started": ""})
    (tmp_path / "claims").mkdir()
    for number in range(1, worker.DEATHS + 1):
        path = tmp_path / "claims" / f"{runs[0].name}.{number}"
        path.write_text(gone)
        os.utime(path, (0, 0))
    done = worker.work(study, runs, None, lambda text: None)
    assert (done.failed, done.finished) == ([runs[0].name], [runs[1].name])
    assert "5 processes died on it" in study.failure(runs[0])["error"]


def test_a_signal_that_comes_when_a_run_ends_stops_before_the_next(fake, tmp_path, monkeypatch):
    study, runs = worker.Study(tmp_path), toy_study.runs()
    sound = worker.build.run

    def run(config, **how):
        sound(config, **how)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(worker.build, "run", run)
    with pytest.raises(KeyboardInterrupt) as stopped:
        worker.work(study, runs, None, lambda text: None)
    assert stopped.value.args == (signal.SIGTERM,)
    assert fake == [runs[0].name]
    assert study.claims.held() == {}


def test_a_run_that_was_taken_over_is_left_and_the_rest_goes_on(fake, tmp_path, monkeypatch):
    study, runs, said = worker.Study(tmp_path), toy_study.runs(seeds=(1, 2)), []
    monkeypatch.setattr(claims, "BEAT", 0.01)
    sound = worker.build.run

    def run(config, *, task, **how):
        if task == runs[0].name and not fake:
            fake.append("asleep")
            (tmp_path / "claims" / f"{task}.2").write_text(json.dumps({"here": "elsewhere"}))  # while it slept
            with interruptible() as interrupt:
                while interrupt.signal is None:
                    time.sleep(0.01)
                for number in (1, 2):  # the other process is done with it
                    (tmp_path / "claims" / f"{task}.{number}").unlink()
                interrupt.obey()
        sound(config, task=task, **how)

    monkeypatch.setattr(worker.build, "run", run)
    done = worker.work(study, runs, None, said.append)
    assert sorted(done.finished) == sorted(run.name for run in runs)
    assert f"{runs[0].name} was taken over by another process while this one slept" in said


def test_a_table_says_what_ran_and_what_did_not(fake, tmp_path):
    study, asked = worker.Study(tmp_path), request()
    runs = asked.runs()
    worker.work(study, [run for (row, _, seed), run in runs.items() if (row, seed) != ("fedrep", 2)], None, str)
    made = document(study, asked)
    cells = {cell["row"]: cell for cell in made["cells"]}
    # As toy_study has it: 0.5 + seed / 100 + 4 rounds / 1000.
    assert cells["fedavg"]["figures"]["server"] == {
        "mean": pytest.approx(0.519), "std": pytest.approx(0.005 * 2**0.5), "values": {1: 0.514, 2: 0.524}
    }  # fmt: skip
    assert (cells["fedrep"]["seeds"], cells["fedrep"]["missing"]) == ([1], [2])
    assert cells["perfedrlnas"]["figures"]["server"] is None
    assert cells["perfedrlnas"]["figures"]["own"]["mean"] == pytest.approx(0.815)
    (pair,) = made["pairs"]
    assert (pair["row"], pair["against"], pair["n"]) == ("fedavg", "fedrep", 1)
    assert pair["mean"] == pytest.approx(-0.1)
    # The weakest ends at 51.9 on average, which the mean of one seed's last rounds stays below.
    assert made["columns"][0]["target"] == pytest.approx(0.519)
    assert cells["fedavg"]["figures"]["seconds_to_target"] is None
    assert cells["fedrep"]["figures"]["seconds_to_target"]["values"] == {1: 1.0}
    text = markdown(made)
    assert "| FedAvg | 2 of 2 | 51.9 ± 0.7 | 20.0 | 4 | 1 | 1 | - | 32 | 4 |" in text
    assert "| FedRep | 1 of 2 | 61.4 |" in text
    assert "| PerFedRLNAS | 2 of 2 | - |" in text
    assert "rounds=4" in text
    lines = list(csv.DictReader(io.StringIO(text_csv(made))))
    assert [line["value"] for line in lines if line["method"] == "fedavg" and line["figure"] == "server"] == [
        "0.514", "0.524"
    ]  # fmt: skip


def test_the_paper_stands_beside_its_own_setting_alone(fake, tmp_path):
    cell = {"table": 1, "scale": "cpu", "rows": ("fedavg",), "seeds": (1,), "overrides": {"rounds": 4}, "command": ""}
    printed = {}
    for column in ("cifar10:dir0.1", "digits:dir0.1"):
        asked = Request(cell["table"], cell["scale"], cell["rows"], (column,), cell["seeds"], cell["overrides"], "")
        worker.work(worker.Study(tmp_path), list(asked.runs().values()), None, str)
        printed[column] = document(worker.Study(tmp_path), asked)["cells"][0]
    assert printed["cifar10:dir0.1"]["paper"] == {"server": 70.93, "std": 7.01, "hours": 6.81}
    assert printed["cifar10:dir0.1"]["difference"] == {"server": pytest.approx(51.4 - 70.93)}
    assert (printed["digits:dir0.1"]["paper"], printed["digits:dir0.1"]["difference"]) == (None, None)


def test_a_study_knows_what_was_asked_for(tmp_path):
    asked = request(augment=("crop",))
    keep(tmp_path, asked)
    plan.write(tmp_path, list(asked.runs().values()))
    assert requests(tmp_path) == [asked]
    assert {run.name for run in plan.read(tmp_path)} == {run.name for run in asked.runs().values()}
    assert sorted(plan.read(tmp_path)) == sorted(asked.runs().values())
    (tmp_path / "tables" / "1.json").write_text("{")
    with pytest.raises(UsageError, match="is damaged"):
        requests(tmp_path)
    with pytest.raises(UsageError, match="is no study"):
        plan.read(tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--table=1 to 5, or all, is needed"),
        (["--table=6"], "no table '6'"),
        (["--table=1", "--scale=minute"], "did you mean 'minutes'"),
        (["--table=1", "--seeds=1,1"], "--seeds names something twice"),
        (["--table=1", "--seeds=x"], "seeds"),
        (["--table=1", "--processes=2000"], "processes: 2000; there can be at most 1024"),
        (["--table=1", "--processes=0"], "processes: '0' is not a whole number of at least 1"),
        (["--table=1", "--config.rouns=3"], "did you mean 'rounds'"),
        (["--table=1", "--config.rounds=x"], "config.rounds: 'x' is not a whole number"),
        (["--table=1", "--config.seed=3"], "config.seed differs between runs"),
        (["--table=1", "--config.options.M=3"], "config.options.M differs between runs"),
        (["--table=1", "--methods=fedavgg", "--read"], "did you mean 'fedavg'"),
        (["--table=1", "--columns=digits", "--read"], "is not DATASET:SPLIT"),
        (["--table=1", "--config.cohort=99", "--read"], "there are only 10 clients"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(arguments, message, capsys, tmp_path):
    assert tables.main(["tables.py", *arguments, f"--study={tmp_path / 'study'}", f"--out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "study" / "plan").exists()


def test_the_command_runs_writes_and_reports_failures(fake, tmp_path, capsys, monkeypatch):
    line = ["tables.py", "--table=1", "--methods=fedavg,fedrep", "--seeds=1,2", "--config.rounds=4"]
    line += [f"--study={tmp_path / 'study'}", f"--out={tmp_path / 'out'}"]
    assert tables.main([*line, "--read"]) == 0
    empty = (tmp_path / "out" / "table1.md").read_text()
    assert "| FedAvg | 0 of 2 | - |" in empty
    assert "--read" not in empty
    assert fake == []
    assert tables.main(line) == 0
    assert len(fake) == 4
    assert "| FedAvg | 2 of 2 | 51.9 ± 0.7 |" in (tmp_path / "out" / "table1.md").read_text()
    assert tables.main([*line, "--status"]) == 0
    assert "4 done, 0 running, 0 failed, 0 left" in capsys.readouterr().out

    def run(config, **how):
        raise WorkdirError("no")

    monkeypatch.setattr(worker.build, "run", run)
    assert tables.main([*line, "--columns=digits:iid"]) == 1
    assert "failed: fedavg-digits-iid-seed1-" in capsys.readouterr().out


def test_what_processes_left_when_they_died_is_said(fake, tmp_path, capsys, monkeypatch):
    line = ["tables.py", "--table=1", "--methods=fedavg", "--seeds=1,2", "--config.rounds=4", "--processes=3"]
    line += [f"--study={tmp_path / 'study'}", f"--out={tmp_path / 'out'}"]

    def work(path, runs, data_dir, say, *, count, wait):
        assert (count, wait) == (3, True)
        worker.work(worker.Study(path), runs[:done], data_dir, say)
        return 1

    monkeypatch.setattr(several, "work", work)
    done = 1
    assert tables.main(line) == 1
    assert "1 of 2 runs are left; the same command goes on" in capsys.readouterr().out
    assert "| FedAvg | 1 of 2 |" in (tmp_path / "out" / "table1.md").read_text()
    done = 2
    assert tables.main(line) == 0
    assert "goes on" not in capsys.readouterr().out
