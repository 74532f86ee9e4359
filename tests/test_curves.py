"""Figures 3 and 4: what is averaged, and that they are drawn of whatever there is."""

import csv
import json

import figures
import numpy as np
import pytest
import toy_study
from study import worker
from study.curves import averaged


def curve(accuracies: dict[int, float | None], seconds: float, phases: int = 1) -> dict:
    rounds = list(accuracies)
    phase = [0 if phases == 1 else int(number > rounds[-1] / 2) for number in rounds]
    server = list(accuracies.values())
    return {"round": rounds, "phase": phase, "server": server, "seconds": [seconds * number for number in rounds]}


def test_the_mean_is_of_the_rounds_that_all_seeds_have():
    (found,) = averaged([curve({2: 0.2, 4: 0.4, 6: 0.6}, 1.0), curve({2: 0.4, 4: None, 6: 0.8, 8: 0.9}, 3.0)])
    assert found["round"].tolist() == [2, 6]
    np.testing.assert_allclose(found["mean"], [0.3, 0.7])
    np.testing.assert_allclose(found["std"], [0.02**0.5] * 2)
    np.testing.assert_allclose(found["seconds"], [4.0, 12.0])


def test_what_was_trained_anew_is_a_line_of_its_own_and_nothing_is_no_line():
    first, last = averaged([curve({1: 0.2, 2: 0.4, 3: 0.1, 4: 0.6}, 1.0, phases=2)])
    assert (first["round"].tolist(), last["round"].tolist()) == ([1, 2], [3, 4])
    assert last["std"].tolist() == [0.0, 0.0]
    assert averaged([]) == averaged([curve({1: None}, 1.0)]) == []


def test_the_command_draws_and_says_what_it_could_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(worker.build, "run", toy_study.run)
    line = ["figures.py", "--figure=3", "--methods=fedavg,perfedrlnas", "--seeds=1,2", "--config.rounds=4"]
    line += [f"--study={tmp_path / 'study'}", f"--out={tmp_path / 'out'}"]
    assert figures.main([*line, "--read"]) == 0  # nothing ran
    assert figures.main(line) == 0
    assert "no finished run with a server accuracy: perfedrlnas, digits:dir0.1" in capsys.readouterr().out
    for name in ("figure3.png", "figure3.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 5000
    rows = list(csv.DictReader((tmp_path / "out/figure3.csv").open()))
    assert {(row["split"], row["method"], row["seed"]) for row in rows} == {
        ("digits:dir0.1", "fedavg", seed) for seed in "12"
    }
    last = rows[-1]
    result = json.loads(next((tmp_path / "study/runs").glob("fedavg*seed2*/result.json")).read_text())
    assert (last["round"], float(last["server"])) == ("4", result["server_accuracy"])
    assert float(last["macs"]) == result["macs"]


def test_runs_that_are_not_finished_are_drawn_as_far_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(worker.build, "run", toy_study.run)
    line = ["figures.py", "--figure=3", "--methods=fedavg", "--seeds=1,2", "--config.rounds=4"]
    line += [f"--study={tmp_path / 'study'}", f"--out={tmp_path / 'out'}"]
    assert figures.main([*line, "--unfinished"]) == 2
    assert "--unfinished needs --read" in capsys.readouterr().err
    assert figures.main(line) == 0
    (stopped,) = (tmp_path / "study/runs").glob("fedavg*seed2*")
    lines = (stopped / "records.jsonl").read_text().splitlines(keepends=True)
    (stopped / "records.jsonl").write_text("".join(lines[:2]))
    (stopped / "result.json").unlink()
    for flags, reached in ((["--read"], {"1": 4}), (["--read", "--unfinished"], {"1": 4, "2": 2})):
        assert figures.main([*line, *flags]) == 0
        rows = list(csv.DictReader((tmp_path / "out/figure3.csv").open()))
        found = {seed: max(int(row["round"]) for row in rows if row["seed"] == seed) for seed in reached}
        assert found == reached
        assert {row["seed"] for row in rows} == set(reached)


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--figure=5"], "no figure '5'"), (["--table=1"], "no flag 'table'")]
)
def test_what_cannot_be_is_refused(arguments, message, capsys):
    assert figures.main(["figures.py", *arguments]) == 2
    assert message in capsys.readouterr().err
