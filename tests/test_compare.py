"""The script that puts methods side by side: what it refuses, what its table says."""

import json

import compare
import pytest
import toy_study
from study import worker


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out=NAME is needed"),
        (["--out=x", "--methods="], "--methods is empty"),
        (["--out=x", "--seeds=0,1"], "--tune_seed=0 is one of --seeds"),
        (["--out=x", "--rates=fast"], "rates: 'fast' is not a number"),
        (["--out=x", "--rate=0.1"], "no flag 'rate'; did you mean 'rates'"),
        (["--out=x", "--stop_after=1"], "no flag 'stop_after'"),
        (["--out=x", "--methods=fedavgg"], "did you mean 'fedavg'"),
        (["--out=x", "--config.rouns=3"], "did you mean 'rounds'"),
        (["--out=x", "--options=fedprox.mu"], "'fedprox.mu' is not METHOD.NAME=VALUE of one of --methods"),
        (["--out=x", "--options=fedprox.nu=1"], "did you mean 'mu'"),
        (["--out=x", "--equal=time"], "no choice 'time'"),
        (["--out=x", "--config=digits"], "did you mean 'digits_dir01'"),
        (["--out=x", "--config.final_adapt=false"], "leaves nothing to choose a rate by"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(arguments, message, capsys):
    assert compare.main(["compare.py", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_help_has_the_flags_of_both_scripts(capsys):
    assert compare.main(["compare.py", "--help"]) == 0
    printed = capsys.readouterr().out
    for text in ("--rates", "default 0.01,0.025,0.1", "--tune_seed", "default 0", "--data_dir", "--config.rounds="):
        assert text in printed


def result(server: float | None, local: float | None, own: float) -> dict:
    spread = {"std": 0.1, "worst_tenth": own - 0.2}
    depths = {"none": local, "step": own, "epoch": own, "epochs": own + 0.05}
    found = {
        "server_accuracy": server,
        "local_accuracy": spread | {"mean": local},
        "local_accuracy_adapted": spread | {"mean": own},
        "local_accuracy_by_depth": {name: spread | {"mean": mean} for name, mean in depths.items()},
        "majority_class_local_accuracy": 0.5,
        "seconds_in_rounds": 12.0,
        "macs": 3e9,
        "bytes_up": 10**6,
        "bytes_down": 2 * 10**6,
        "largest_drop": 0.011,
    }
    if server is None:  # of a method without a global network
        del found["server_accuracy"], found["local_accuracy"]
    return found


def table(*runs: dict) -> list[str]:
    return compare.markdown(
        {
            "command": "python experiments/compare.py",
            "equal": "image_gradients",
            "versions": [{"device": "cpu", "devices": 1, "cpus": 2, "jax": "0"}],
            "methods": [{"method": "fedrep", "lr": 0.1, "rounds": 30, "runs": dict(enumerate(runs))}],
        }
    ).splitlines()


def test_the_table_by_hand():
    lines = table(result(0.6, 0.7, 0.8), result(0.8, 0.9, 0.9))
    # Standard deviations over two seeds a and b are |a - b| / sqrt(2).
    accuracies = ["70.0 +- 14.1", "80.0 +- 14.1", "85.0 +- 7.1", "10.0", "65.0", "85.0 +- 7.1", "90.0 +- 7.1", "1.1"]
    assert lines[2] == f"| {' | '.join(['fedrep', '0.1', '30', *accuracies, '12', '3', '3'])} |"
    assert "most frequent class: 50.0 %" in lines[4]
    assert "Equal for all: image-gradients" in lines[4]


def test_a_figure_that_does_not_exist_is_a_dash():
    cells = table(result(None, None, 0.8))[2].split(" | ")
    assert cells[3:6] == ["-", "-", "80.0 +- 0.0"]


def test_differences_are_those_of_the_first_method_with_seeds_paired():
    def row(name: str, *runs: tuple) -> dict:
        return {"method": name, "lr": 0.1, "rounds": 30, "runs": {n: result(*run) for n, run in enumerate(runs)}}

    methods = [row("mine", (0.6, 0.5, 0.8), (0.7, 0.5, 0.9)), row("other", (0.5, 0.5, 0.8), (0.5, 0.5, 0.9))]
    methods.append(row("personal", (None, None, 0.7)))
    about = [{"device": device, "devices": 1, "cpus": 2, "jax": "0"} for device in ("cpu", "a GPU")]
    text = compare.markdown({"command": "python", "equal": "macs", "versions": about, "methods": methods})
    assert "cpu x 1, 2 CPUs, jax 0; a GPU x 1, 2 CPUs, jax 0." in text
    assert "`mine` less the others" in text
    # 60 - 50 and 70 - 50; resamples of two differences lie between them. One seed in common has no interval.
    assert "| other | +15.0 (+10.0 to +20.0), too few seeds | +0.0 (+0.0 to +0.0), too few seeds |" in text
    assert "| personal | - | +10.0, too few seeds |" in text
    assert "less the others" not in "\n".join(table(result(0.6, 0.7, 0.8)))


def test_runs_are_those_of_a_study(tmp_path, monkeypatch, capsys):
    ran = []

    def run(config, *, task, **how):
        ran.append((config.method, config.lr, config.seed))
        toy_study.run(config, task=task, **how)

    monkeypatch.setattr(worker.build, "run", run)
    line = ["compare.py", "--methods=fedavg,fedrep", "--equal=rounds", "--rates=0.1,0.2", "--seeds=1,2"]
    line += ["--config.rounds=3", f"--workdir={tmp_path / 'study'}", f"--out={tmp_path / 'out'}"]
    monkeypatch.setattr(compare, "markdown", lambda figures: "the table")
    assert compare.main(line) == 0
    # All grids, then all that is measured: processes share a stage. Both rates do equally well: the first is taken.
    grid, measured = ((0.1, 0), (0.2, 0)), ((0.1, 1), (0.1, 2))
    assert ran == [(name, *run) for runs in (grid, measured) for name in ("fedavg", "fedrep") for run in runs]
    rows = json.loads((tmp_path / "out.json").read_text())["methods"]
    assert [row["runs"]["2"]["server_accuracy"] for row in rows] == pytest.approx([0.523, 0.623])
    assert compare.main(line) == 0
    assert len(ran) == 8  # all were finished
    monkeypatch.setattr(worker.build, "run", lambda config, **how: 1 / 0)
    assert compare.main([*line, "--config.rounds=4"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
