"""The script that times methods' rounds in turn: what it refuses, what its table says, a small run."""

import json

import method_costs
import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out=NAME is needed"),
        (["--out=x", "--methods="], "--methods is empty"),
        (["--out=x", "--methods=fednass"], "did you mean 'fednas'"),
        (["--out=x", "--repeats=0"], "repeats: '0' is not a whole number of at least 1"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(arguments, message, capsys):
    assert method_costs.main(["method_costs.py", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_table_by_hand():
    def row(seconds, macs, programs=1):
        work = {"image_gradients": 600.0, "macs": macs, "bytes_up": 1_500_000, "bytes_down": 2_000_000}
        return {"seconds": seconds, "programs": programs} | work

    lines = method_costs.markdown(
        {
            "task": "digits_dir01",
            "at_once": 1,
            "versions": {"device": "cpu", "devices": 1, "cpus": 2, "jax": "0"},
            "command": "python experiments/method_costs.py",
            "methods": {"fedmetanas": row([2.0, 1.0, 3.0], 8e9), "feddsnas": row([1.0, 0.5, 1.5], 2e9)},
        }
    ).splitlines()
    assert lines[2] == "| `fedmetanas` | 2 (1 to 3) | 1.00 | 600 | 8 | 1.00 | 1.50 | 2.00 | 1 |"
    assert lines[3] == "| `feddsnas` | 1 (0.5 to 1.5) | 0.50 | 600 | 2 | 0.25 | 1.50 | 2.00 | 1 |"
    assert "clients one after another" in lines[5]


def test_every_method_is_compiled_once_and_timed_as_often_as_asked(tmp_path, capsys):
    small = ["--config.train_size=32", "--config.batch=8", "--config.epochs=1", "--config.cohort=2"]
    small += ["--config.network=mobilenetv3_tiny"]
    asked = ["--methods=fedavg,fedprox", "--repeats=2", f"--out={tmp_path / 'costs'}"]
    assert method_costs.main(["method_costs.py", "--config=digits_dir01", *small, *asked]) == 0
    figures = json.loads((tmp_path / "costs.json").read_text())
    for row in figures["methods"].values():
        assert len(row["seconds"]) == 2
        assert row["programs"] == 1
        assert row["image_gradients"] == 64
    assert (tmp_path / "costs.md").read_text() in capsys.readouterr().out
