"""The scripts that put methods side by side: what they refuse, what their table says."""

import compare
import pytest
import round_seconds


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (compare, [], "--out=NAME is needed"),
        (compare, ["--out=x", "--methods="], "--methods is empty"),
        (compare, ["--out=x", "--seeds=0,1"], "--tune_seed=0 is one of --seeds"),
        (compare, ["--out=x", "--rates=fast"], "'fast' is not"),
        (compare, ["--out=x", "--methods=fedavgg"], "did you mean 'fedavg'"),
        (compare, ["--out=x", "--config.rouns=3"], "did you mean 'rounds'"),
        (round_seconds, ["--methods="], "at least one of each is needed"),
        (round_seconds, ["--repeats=0"], "at least one of each is needed"),
        (round_seconds, ["--config=digits"], "did you mean 'digits_dir01'"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(script, arguments, message, capsys):
    script.OWN.unparse_flags()
    for name in script.OWN:
        script.OWN[name].unparse()  # the script reads its flags once; a test reads them many times
    assert script.main(["script.py", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def result(server: float, local: float, own: float) -> dict:
    spread = {"std": 0.1, "worst_tenth": own - 0.2}
    depths = {"none": local, "step": own, "epoch": own, "epochs": own + 0.05}
    return {
        "server_accuracy": server,
        "local_accuracy": spread | {"mean": local},
        "local_accuracy_adapted": spread | {"mean": own},
        "local_accuracy_by_depth": {name: spread | {"mean": mean} for name, mean in depths.items()},
        "majority_class_local_accuracy": 0.5,
        "image_gradients": 90000.0,
        "seconds_in_rounds": 12.0,
    }


def test_the_table_by_hand():
    runs = {1: result(0.6, 0.7, 0.8), 2: result(0.8, 0.9, 0.9)}
    figures = {
        "command": "python experiments/compare.py",
        "versions": {"device": "cpu", "devices": 1, "cpus": 2, "jax": "0"},
        "methods": [{"method": "fedrep", "lr": 0.1, "rounds": 30, "runs": runs}],
    }
    lines = compare.markdown(figures).splitlines()
    # Standard deviations over two seeds a and b are |a - b| / sqrt(2).
    accuracies = ["70.0 +- 14.1", "80.0 +- 14.1", "85.0 +- 7.1", "10.0", "65.0", "85.0 +- 7.1", "90.0 +- 7.1"]
    assert lines[2] == f"| {' | '.join(['fedrep', '0.1', '30', *accuracies, '12'])} |"
    assert "most frequent class: 50.0 %" in lines[4]
    assert "Image-gradients a run: 9e+04" in lines[4]
