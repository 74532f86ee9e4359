"""The script that asks whether a search is one: what it refuses, what it computes, and that it goes on."""

import dataclasses
import json
from functools import cache

import jax
import numpy as np
import pytest
import search_quality
from quality import figures, study, tables, training

from fedmetanas_jax.config import Config, to_dict
from fedmetanas_jax.engine.round import cohort
from fedmetanas_jax.files import write_json, write_text

CONFIG = Config(
    dataset="digits", clients=4, cohort=2, train_size=24, test_size=16, rounds=3, epochs=1, batch=8, augment=(),
    width=2, cells=1, nodes=1, seed=5, lr=0.1, lr_end=0.01,
)  # fmt: skip
GENOTYPE = {
    "normal": [[["max_pool_3x3", 0], ["skip_connect", 1]]], "reduce": [[["dil_conv_3x3", 0], ["none", 1]]]
}  # fmt: skip
RECORDS = [
    {"round": 1},
    {"round": 2, "event": "prune", "event_accuracy_before": 0.75, "event_accuracy_after": 0.5},
    {
        "round": 3,
        "event": "prune",
        "event_accuracy_before": 0.5,
        "event_accuracy_after": 0.75,
        "event_put_off": "prune",
    },
]
RESULT = {
    "server_accuracy": 0.4, "server_accuracy_discrete": 0.35, "local_accuracy": {"mean": 0.6}, "macs": 2e7,
    "seconds_in_rounds": 12.0, "seconds_compiling": 34.0,
}  # fmt: skip


@cache
def federation(seed: int) -> training.Federation:
    return training.federation(dataclasses.replace(CONFIG, seed=seed), None)


@pytest.fixture(autouse=True)
def _federations_are_made_once(monkeypatch):
    monkeypatch.setattr(study, "federation", lambda config, data_dir: federation(config.seed))


def finished_search(workdir, **changed):
    """The files of a finished run that are read."""
    config = dataclasses.replace(CONFIG, **changed)
    write_json(workdir / "config.json", {"config": to_dict(config), "versions": {}})
    write_json(workdir / "result.json", RESULT)
    write_json(workdir / "genotype.json", GENOTYPE)
    write_text(workdir / "records.jsonl", "".join(json.dumps(line) + "\n" for line in RECORDS))
    return workdir


@pytest.fixture
def search(tmp_path):
    return finished_search(tmp_path / "search")


def refused(arguments: list[str], capsys) -> str:
    assert search_quality.main(["search_quality.py", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--runs=WORKDIR,... is needed"),
        (["--runs=a"], "--out=NAME is needed"),
        (["--runs=a,a", "--out=x"], "names a workdir twice"),
        (["--runs=a", "--out=x", "--networks=0"], "at least 1"),
        (["--runs=a", "--out=x", "--budget=0"], "budget is 0; it must be positive"),
        (["--runs=a", "--out=x", "--budget=nan"], "budget: 'nan' is not a finite number"),
        (["--runs=a", "--out=x", "--at_once=-2"], "at least -1"),
        (["--runs=a", "--out=x", "--also=b"], "'b', which is not NAME:WORKDIR"),
        (["--runs=a", "--out=x", "--rounds=3"], "no flag 'rounds'"),
        (["--runs=/nowhere", "--out=x"], "/nowhere holds no finished run: there is no config.json"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(arguments, message, capsys):
    assert message in refused(arguments, capsys)


def test_a_run_that_found_nothing_or_is_damaged_is_refused(search, tmp_path, capsys):
    flags = [f"--runs={search}", f"--out={tmp_path / 'out'}"]
    finished_search(search, method="fedavg")
    assert "is a run of fedavg, which searches no network" in refused(flags, capsys)
    finished_search(search)
    write_json(search / "genotype.json", GENOTYPE | {"reduce": [[["conv_9x9", 0], ["none", 1]]]})
    assert "no operation 'conv_9x9'" in refused(flags, capsys)
    write_text(search / "result.json", "{")
    assert "cannot be read as a finished run" in refused(flags, capsys)


def test_help_names_every_flag(capsys):
    assert search_quality.main(["search_quality.py", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--{name}" in printed for name in search_quality.FLAGS)


# --- The statistics, by hand ----------------------------------------------------------------------------------


def test_ranks_and_percentiles_by_hand():
    others = [0.5, 0.7, 0.7, 0.9]
    assert figures.standing(0.8, others) == {"rank": 2, "of": 5, "percentile": 75.0}
    assert figures.standing(0.7, others) == {"rank": 2, "of": 5, "percentile": 50.0}  # one below, two equal
    assert figures.standing(0.95, others) == {"rank": 1, "of": 5, "percentile": 100.0}
    assert figures.standing(0.1, others) == {"rank": 5, "of": 5, "percentile": 0.0}
    assert figures.standing(0.1, []) is None


def test_spread_and_correlation_by_hand():
    spread = figures.spread([0.25, 0.5, 0.5, 0.75])
    assert spread == {"mean": 0.5, "std": pytest.approx(0.2041, abs=1e-4), "min": 0.25, "median": 0.5, "max": 0.75}
    assert figures.spread([0.5])["std"] is None
    assert figures.spread([]) is None
    # Deviations (-1, 0, 1) and (-3, -2, 5): 8 / sqrt(2 * 38).
    related = figures.correlation([1, 2, 3], [1, 2, 9])
    assert related == {"pearson": pytest.approx(8 / 76**0.5), "spearman": pytest.approx(1)}
    assert figures.correlation([1, 2, 3, 4], [1, 3, 2, 4])["spearman"] == pytest.approx(0.8)
    assert figures.correlation([1, 1, 1], [1, 2, 3]) is None


def test_events_by_hand():
    assert figures.events(RECORDS) == {"events": 2, "put_off": 1, "mean_drop": 0.0, "largest_drop": 0.25}
    assert figures.events([{"round": 1}])["mean_drop"] is None


def known(accuracy: float, macs: int = 10**6, lost: int = 0) -> dict:
    return {"server_accuracy": accuracy, "macs_of_an_image": macs, "rounds": 7, "replies_not_finite": lost}


def test_the_tables_by_hand():
    runs = []
    for seed, found in ((1, 0.8), (2, 0.5)):
        networks = {"found": known(found), "random-1": known(0.6, 2 * 10**6), "random-2": known(0.7, lost=seed - 1)}
        search = {"server_accuracy": 0.65, "macs": 1e9}
        about = {"workdir": f"w{seed}", "seed": seed, "test_images": 360, "search": search, "networks": networks}
        runs.append(about | {"compared": figures.compared(search, networks)})
    over = figures.over_searches(runs)
    # Of 2 draws the percentile is 0, 50 or 100, whose variance is 5000 / 3; of the mean of two, half of that.
    assert over["retrained"] == {"searches": 2, "mean": 50.0, "chance_std": pytest.approx((2500 / 3) ** 0.5)}
    document = {
        "runs": runs,
        "over_searches": over,
        "budget": 0.5,
        "networks": 2,
        "also": [],
        "unfinished": 3,
        "other_versions": [],
    }
    document |= {"hardware": "a machine", "versions": {"python": "3", "jax": "0"}, "command": "the command"}
    text = tables.markdown(document)
    cells = [
        "w1",
        "1",
        "65.0",
        "50",
        "2 of 3",
        "80.0",
        "100",
        "1 of 3",
        "2",
        "65.0 +- 7.1",
        "60.0",
        "65.0",
        "70.0",
        "-",
    ]
    for line in (
        f"| {' | '.join(cells)} |",
        "| random-1 | 2.000 | 7 | 60.0 | 60.0 | 60.0 |",
        "| random-2 | 1.000 | 7 | 70.0 | 70.0 (1 replies not finite) | 70.0 |",
        "0.5 of those of its search",
        "3 networks are not trained yet",
        "`the command`",
    ):
        assert line in text


# --- The federation and the budget ----------------------------------------------------------------------------


def test_a_network_is_trained_for_the_searchs_multiply_adds_within_half_a_round():
    where, plan = federation(5), [[[1], [3]], [[6], [0]]]
    sizes = np.array([24, 5, 17, 9], np.int32)
    where = where._replace(data=where.data._replace(train_size=sizes))
    each = training.PASSES * where.space.make(plan).macs
    spent = each * np.cumsum([sizes[np.asarray(cohort(5, r, 4, 2))].sum() for r in range(150)])
    for budget in (1.0, 20 * each, 1000 * each, 1001 * each, spent[140]):
        rounds = training.rounds_within(where, plan, float(budget))
        assert 1 <= rounds < 150
        assert abs(spent[rounds - 1] - budget) == min(abs(spent - budget))
    cheap = [[[0], [0]], [[0], [0]]]
    assert training.rounds_within(where, cheap, 1000 * each) > training.rounds_within(where, plan, 1000 * each)


# --- Training -------------------------------------------------------------------------------------------------

PLANS, ROUNDS = [[[[1], [3]], [[3], [1]]], [[[4], [0]], [[6], [0]]]], [3, 2]


@cache
def side_by_side():
    """(program, states, what was measured) of PLANS together."""
    program = training.Program(federation(5), training.together(PLANS), 2)
    return program, *program.run(federation(5), PLANS, ROUNDS)


def test_a_program_has_the_operations_of_all_its_networks():
    assert training.together(PLANS) == [[[1, 4], [0, 3]], [[3, 6], [0, 1]]]


def test_side_by_side_is_one_after_another():
    where, (program, states, measured) = federation(5), side_by_side()
    assert states.round.tolist() == ROUNDS
    for n, limit in enumerate(ROUNDS):  # the cohorts are those of the search
        asked = np.concatenate([np.asarray(cohort(5, r, 4, 2)) for r in range(limit)])
        assert measured[n]["image_gradients"] == np.asarray(where.data.train_size)[asked].sum()
    alone, measured = training.Program(where, PLANS[0], 1).run(where, PLANS[:1], ROUNDS[:1])
    for part in ("params", "stats"):
        mine = jax.tree.map(lambda x: x[:1], getattr(states.server, part))
        mine = where.space.carry_over(jax.tree.map(lambda x: x[0], mine), program.plan, PLANS[0])
        wanted = jax.tree.map(lambda x: x[0], getattr(alone.server, part))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), mine, wanted)


@pytest.mark.parametrize("part", ["params", "stats"])
@pytest.mark.parametrize("n", [0, 1])
def test_what_a_network_does_not_have_keeps_its_bits(n, part):
    program, states, _ = side_by_side()
    start, here = program.begin(federation(5), PLANS[n])
    before, after = (jax.tree.leaves(getattr(state.server, part)) for state in (start, states))
    absent = changed = 0
    for keep, x, y in zip(jax.tree.leaves(here[part]), before, after, strict=True):
        keep, x, y = np.broadcast_to(keep, x.shape), np.asarray(x), np.asarray(y)[n]
        np.testing.assert_array_equal(x[~keep], y[~keep])
        absent, changed = absent + np.sum(~keep), changed + np.sum(x[keep] != y[keep])
    assert absent > 0
    assert changed > 30


class Counting:
    """Stands for training.Program: trains nothing, and breaks off where it is told to."""

    trained: list = []
    limit = 99

    def __init__(self, where, plan, count):
        self.plan, self.count = plan, count

    def train(self, where, plans, rounds):
        assert len(plans) == self.count
        if len(self.trained) + len(plans) > self.limit:
            raise KeyboardInterrupt
        self.trained.extend(plans)
        spent = {"seconds": 1.0, "seconds_compiling": 0.0}
        return [known(0.01 * r) | {"rounds": r} | spent for r in rounds]


def test_what_is_finished_is_not_trained_again(search, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "Program", Counting)
    monkeypatch.setattr(Counting, "trained", [])
    monkeypatch.setattr(Counting, "limit", 2)
    out = tmp_path / "out"
    arguments = ["search_quality.py", f"--runs={search}", "--networks=3", f"--out={out}", f"--also=twin:{search}"]
    assert search_quality.main([*arguments, "--at_once=1"]) == 130
    half = json.loads(out.with_suffix(".json").read_text())
    assert list(half["runs"][0]["networks"]) == ["found", "random-1"]
    assert half["unfinished"] == 2
    monkeypatch.setattr(Counting, "limit", 99)
    assert search_quality.main([*arguments, "--at_once=0"]) == 0  # the other two, together
    assert len(Counting.trained) == 4
    monkeypatch.setattr(study, "Program", None)  # there is nothing to train
    assert search_quality.main(arguments) == 0
    whole = json.loads(out.with_suffix(".json").read_text())
    assert whole["unfinished"] == 0
    assert list(whole["runs"][0]["networks"]) == ["found", "random-1", "random-2", "random-3"]
    assert whole["runs"][0]["networks"]["found"] == half["runs"][0]["networks"]["found"]
    assert whole["runs"][0]["compared"]["searched"]["of"] == 4
    twin = whole["also"][1]
    assert (twin["name"], twin["largest_drop"], twin["macs"], twin["local_accuracy"]) == ("twin", 0.25, 2e7, 0.6)
    # Another budget is another study; the old one is kept.
    monkeypatch.setattr(study, "Program", Counting)
    assert search_quality.main([*arguments, "--budget=0.5"]) == 0
    assert len(Counting.trained) == 8
    assert sorted(path.name for path in (search / "quality").iterdir()) == ["budget-0.5", "budget-1"]
    write_text(search / "quality" / "budget-1" / "found.json", "{")
    assert "found.json is damaged" in refused(arguments[1:], capsys)


def test_runs_of_several_seeds_share_a_program(tmp_path, monkeypatch):
    made = []

    class Made(Counting):
        def __init__(self, where, plan, count):
            made.append(plan)
            super().__init__(where, plan, count)

    monkeypatch.setattr(study, "Program", Made)
    monkeypatch.setattr(Counting, "trained", [])
    workdirs = [finished_search(tmp_path / f"seed{seed}", seed=seed) for seed in (5, 6)]
    flags = [f"--runs={','.join(map(str, workdirs))}", "--networks=2", f"--out={tmp_path / 'out'}", "--at_once=1"]
    assert search_quality.main(["search_quality.py", *flags]) == 0
    assert (len(made), len(Counting.trained)) == (3, 6)
