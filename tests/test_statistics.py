"""Statistics over seeds, by numbers a person can recompute."""

import pytest
from study.outcome import curve, pruning, seconds_to_accuracy
from study.statistics import paired, spread


def test_spread_is_the_mean_and_the_deviation_of_a_sample():
    assert spread({1: 0.2, 2: 0.4, 3: None}) == {
        "mean": pytest.approx(0.3), "std": pytest.approx(0.02**0.5), "values": {1: 0.2, 2: 0.4}
    }  # fmt: skip
    assert spread({1: 0.5}) == {"mean": 0.5, "std": None, "values": {1: 0.5}}
    assert spread({1: None}) is None


def test_differences_are_of_the_seeds_that_both_have():
    found = paired({1: 0.5, 2: 0.7, 9: 1.0}, {1: 0.4, 2: 0.5, 8: 0.0})
    assert (found["n"], found["mean"]) == (2, pytest.approx(0.15))
    assert found["low"] == pytest.approx(0.1)  # of two numbers every fourth resample is twice the smaller
    assert found["high"] == pytest.approx(0.2)
    assert found["verdict"] == "too few seeds"
    assert paired({1: 0.5}, {2: 0.5}) is None
    assert paired({1: 0.5}, {1: 0.4})["low"] is None


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.1, 0.2, 0.3, 0.2, 0.1], "better"),
        ([-0.1, -0.2, -0.3, -0.2, -0.1], "worse"),
        ([0.1, -0.1, 0.1, -0.1, 0.05], "open"),
        ([0.0] * 5, "open"),
        ([0.1] * 5, "better"),
        ([0.1] * 4, "too few seeds"),
    ],
)
def test_better_is_said_only_where_the_interval_excludes_zero(differences, verdict):
    found = paired(dict(enumerate(differences)), dict.fromkeys(range(5), 0.0))
    assert found["verdict"] == verdict
    assert found["low"] <= found["mean"] <= found["high"]


def test_the_interval_of_five_is_that_of_all_resamples():
    # Of 5^5 resamples of 1, 0, 0, 0, 0 the mean is k / 5 with binomial chances: P(k = 0) = 0.33, P(k <= 2) = 0.942,
    # P(k <= 3) = 0.993. So 2.5 % lie at 0 and 97.5 % at 3 / 5.
    found = paired({1: 1.0, 2: 0.0, 3: 0.0, 4: 0.0, 5: 0.0}, dict.fromkeys(range(1, 6), 0.0))
    assert (found["low"], found["high"]) == (0.0, pytest.approx(0.6))


def lines(accuracies: dict[int, float], rounds: int, **more) -> list[dict]:
    one = {"seconds": 2.0, "image_gradients": 10.0, "macs": 100.0, "bytes_up": 3, "bytes_down": 4}
    found = [{"round": number} | one for number in range(1, rounds + 1)]
    for number, accuracy in accuracies.items():
        found[number - 1] |= {"server_accuracy": accuracy, "local_accuracy": {"mean": accuracy / 2}}
    for name, rows in more.items():
        for number, value in rows.items():
            found[number - 1][name] = value
    return found


def test_a_curve_has_what_the_rounds_up_to_an_evaluation_had_cost():
    found = curve(lines({2: 0.5, 4: 0.8}, 4, ended={2: "search"}))
    assert found["round"] == [2, 4]
    assert found["phase"] == [0, 1]
    assert (found["server"], found["local"]) == ([0.5, 0.8], [0.25, 0.4])
    assert (found["seconds"], found["image_gradients"]) == ([4.0, 8.0], [20.0, 40.0])
    assert (found["macs"], found["bytes"]) == ([200.0, 400.0], [14.0, 28.0])


def test_time_to_accuracy_is_when_the_mean_of_twenty_rounds_is_half_a_point_from_its_end():
    # Means of the last 20 rounds' evaluations: 0.1, 0.35, 0.6, 0.798, 0.8.
    accuracies = {10: 0.1, 20: 0.6, 30: 0.6, 40: 0.996, 50: 0.604}
    assert seconds_to_accuracy(curve(lines(accuracies, 50))) == 80.0  # round 40
    assert seconds_to_accuracy(curve(lines({}, 5))) is None
    assert seconds_to_accuracy(curve(lines(accuracies, 50)), target=0.3) == 40.0
    assert seconds_to_accuracy(curve(lines(accuracies, 50)), target=0.9) is None
    again = curve(lines(accuracies, 50, ended={20: "search"}))
    assert seconds_to_accuracy(again) == 80.0  # of the last training alone


def test_pruning_is_told_by_its_events_and_by_what_one_cut_would_have_cost():
    before = {5: 0.6, 6: 0.7, 7: 0.8}
    after = {5: 0.6, 6: 0.65, 7: 0.79}
    events = {number: "prune" for number in before}
    found = lines({4: 0.5, 6: 0.7}, 8, event=events, event_accuracy_before=before, event_accuracy_after=after)
    found[3]["server_accuracy_discrete"], found[5]["server_accuracy_discrete"] = 0.2, 0.1
    assert pruning({}, found) == {
        "before": 0.8, "after": 0.79, "prune_drop": pytest.approx(0.06), "largest_drop": pytest.approx(0.05),
        "cut_at_once": pytest.approx(0.3),
    }  # fmt: skip
    assert pruning({}, lines({4: 0.5}, 4)) == {}
    fednas = pruning({"search": {"server_accuracy": 0.9, "server_accuracy_discrete": 0.25}}, [])
    assert (fednas["before"], fednas["after"], fednas["prune_drop"]) == (0.9, 0.25, pytest.approx(0.65))
