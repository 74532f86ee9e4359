"""Config, the named tasks, and text from a command line as typed values."""

import dataclasses
import inspect
import json
import typing
from pathlib import Path
from typing import Literal

import pytest

from fedmetanas_jax.algorithms import ALGORITHMS
from fedmetanas_jax.config import LATER, MAY_CHANGE, Config, from_dict, may_change, to_dict, validate
from fedmetanas_jax.options import (
    UsageError,
    default_options,
    fits,
    nearest,
    option_types,
    parse_options,
    parse_path,
    parse_value,
)
from fedmetanas_jax.tasks import TASKS


def method(
    network,
    setting,
    *,
    M: int = 1,
    eta: float = 0.01,
    clip: float | None = 5.0,
    order: Literal[1, 2] = 1,
    warm=0.05,
    betas: tuple[float, float] = (0.5, 0.999),
    prune: bool = True,
    keep: int,
    loss: typing.Callable = max,
):
    """A factory with a knob of every kind, one argument without a default and one that is no text."""


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_valid_and_carries_its_lab_note(name):
    config = TASKS[name]()
    validate(config)
    note = inspect.getdoc(TASKS[name]).splitlines()
    assert note[0].endswith(".")
    assert f"python experiments/main.py --config={name}" in note


def test_the_papers_tasks_differ_only_where_the_paper_says():
    def difference(name):
        base, task = to_dict(Config()), to_dict(TASKS[name]())
        return {field: value for field, value in task.items() if value != base[field]}

    assert difference("cifar10_dir01") == {}
    assert difference("cifar10_dir03") == {"concentration": 0.3}
    assert difference("cifar10_tau8") == {"partition": "label_skew", "tau": 8}
    assert difference("cifar10_tau4") == {"partition": "label_skew"}
    assert difference("cifar100_dir01") == {"dataset": "cifar100"}
    assert difference("mnist_dir01") == {"dataset": "mnist", "augment": []}


def test_every_field_has_help_of_one_line():
    for field in dataclasses.fields(Config):
        assert field.metadata["help"]
        assert "\n" not in field.metadata["help"]


@pytest.mark.parametrize("name", TASKS)
def test_a_config_survives_json(name):
    config = dataclasses.replace(TASKS[name](), options={"M": 3, "betas": (0.5, 0.999), "clip": None})
    plain = json.loads(json.dumps(to_dict(config)))
    assert plain == to_dict(config)
    assert from_dict(plain) == config


def test_what_was_no_choice_once_is_noted_only_where_it_is_another():
    for method, options in LATER.items():
        assert options == {name: default_options(ALGORITHMS[method])[name] for name in options}
    old = {"travel": 60.0, "sampler": "free", "samples": 1}
    for given, noted in ((old, {"travel": 60.0}), (old | {"samples": 5}, {"travel": 60.0, "samples": 5})):
        config = Config(method="fedpnas", options=given)
        assert to_dict(config)["options"] == noted
        assert from_dict(to_dict(config)) == config


def test_a_record_of_another_version_is_named():
    plain = to_dict(Config())
    with pytest.raises(UsageError, match="no config field 'round'; did you mean 'rounds'"):
        from_dict(plain | {"round": 3})
    for other in ([], 3, plain | {"options": []}):
        with pytest.raises(UsageError, match="the config is no record of one"):
            from_dict(other)
    del plain["rounds"], plain["seed"]
    with pytest.raises(UsageError, match="the config lacks rounds, seed"):
        from_dict(plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cohort": 101}, "config.cohort is 101, but there are only 100 clients"),
        ({"rounds": 0}, "config.rounds is 0; it must be at least 1"),
        ({"eval_every": -1}, "config.eval_every is -1; it must be at least 0"),
        ({"at_once": -2}, "config.at_once is -2; it must be at least -1"),
        ({"concentration": 0.0}, "config.concentration is 0.0; it must be at least 1e-06, or rounding would"),
        ({"concentration": 5e-324}, "config.concentration is 5e-324; it must be at least 1e-06"),
        ({"lr": -0.1}, "config.lr is -0.1; it must be at least 0"),
        ({"finetune_lr": -0.1}, "config.finetune_lr is -0.1; it must be at least 0"),
        ({"momentum": 1.0}, "config.momentum is 1.0; it must be 0 or more and below 1"),
        ({"clip": -2.0}, "config.clip is -2.0; it must be 0 or more, or -1"),
        ({"seed": 2**32}, "config.seed is 4294967296; it must be at most 4294967295"),
        (
            {"clients": 200_000, "train_size": 10_740},
            "clients times config.train_size is 2148000000 images; .* 2147483647",
        ),
        ({"clients": 200_000, "test_size": 10_740}, "config.clients times config.test_size is 2148000000"),
        ({"epochs": 10**7}, "config.epochs times config.train_size is 6000000000"),
        ({"rounds": "3"}, "config.rounds is 3; it must be a whole number"),
        ({"rounds": True}, "config.rounds is True; it must be a whole number"),
        ({"rounds": 10**5000}, "config.rounds is a number of more than 80 digits; it must be at most"),
        ({"augment": "flip"}, "config.augment is flip; it must be"),
        ({"partition": "dirichlett"}, "no choice 'dirichlett'; did you mean 'dirichlet'"),
        ({"stem": 3}, "config.stem: no choice '3'; there are: 1, 2"),
        ({"augment": ("flip", "flip")}, "names an augmentation twice"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(change, message):
    with pytest.raises(UsageError, match=message) as caught:
        validate(dataclasses.replace(Config(), **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39, True, "1"])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Config) if field.type is float])
def test_a_real_number_is_finite_in_float32(name, value):
    with pytest.raises(UsageError, match=f"config.{name} is .*; it must be a finite number"):
        validate(dataclasses.replace(Config(), **{name: value}))


MOST = {"clients": 200_000, "batch": 2**16, "devices": 2**12, "width": 2**16, "cells": 1000, "nodes": 16}
MOST["seed"] = 2**32 - 1


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Config) if field.type is int])
def test_a_whole_number_is_one_that_jax_counts_to(name):
    most = MOST.get(name, 2**31 - 1)
    with pytest.raises(UsageError, match=f"config.{name} is {most + 1}; it must be at most {most}$"):
        validate(dataclasses.replace(Config(), **{name: most + 1}))
    alone = {"clients": 1, "cohort": 1, "train_size": 1, "test_size": 1, "epochs": 1}
    if name != "cohort":  # at most as many as there are clients
        validate(dataclasses.replace(Config(), **alone | {name: most}))


def test_label_skew_deals_out_what_there_is():
    validate(dataclasses.replace(Config(), clients=200_000, train_size=10_740, partition="label_skew"))


def test_the_bounds_themselves_are_allowed():
    validate(dataclasses.replace(Config(), clients=1, cohort=1, rounds=1, at_once=0, devices=0))
    validate(dataclasses.replace(Config(), seed=2**32 - 1))
    validate(dataclasses.replace(Config(), concentration=0.001, eval_every=0, adapt_every=0, augment=()))


def test_what_may_change_says_how_a_run_is_run():
    fields = {"at_once", "devices", "client_states", "compile_ahead", "block", "checkpoint_every"}
    assert MAY_CHANGE == fields | {"eval_every", "adapt_every", "final_adapt"} == may_change(Config())


def test_nearest_offers_what_was_probably_meant():
    assert nearest("task", "digits_1", TASKS).startswith("no task 'digits_1'; did you mean 'digits_dir01'")
    assert "'cifar10_dir01'" in nearest("task", "cifar10_dirO1", TASKS).split("there are")[0]
    assert nearest("option", "m", ["M", "eta"]) == "no option 'm'; did you mean 'M'? there are: M, eta"
    assert nearest("option", "xyz", ["M", "eta"]) == "no option 'xyz'; there are: M, eta"
    assert nearest("option", "M", []) == "no option 'M'; there are: none"


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("7", int, 7),
        ("-1", int, -1),
        ("1e-3", float, 0.001),
        ("True", bool, True),
        ("0", bool, False),
        ("a b", str, "a b"),
        ("2", Literal[1, 2], 2),
        ("none", int | None, None),
        ("none", str | None, None),
        ("4", int | None, 4),
        ("", tuple[str, ...], ()),
        ("crop, flip", tuple[str, ...], ("crop", "flip")),
        ("0.5,0.999", tuple[float, float], (0.5, 0.999)),
    ],
)
def test_text_becomes_the_value_it_names(text, kind, value):
    parsed = parse_value(text, kind)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "kind", "wanted"),
    [
        ("1.5", int, "'1.5' is not a whole number"),
        ("x", float, "'x' is not a number"),
        ("maybe", bool, "'maybe' is not true or false"),
        ("x", int | None, "'x' is not a whole number or none"),
        ("1", tuple[float, float], r"'1' is not \(a number, a number\)"),
        ("1,x", tuple[int, ...], "'x' is not a whole number"),
        ("3", Literal[1, 2], "no choice '3'; there are: 1, 2"),
        ("nan", float, "'nan' is not a finite number"),
        ("-inf", float, "'-inf' is not a finite number"),
        ("1e999", float, "'1e999' is not a finite number"),
        ("nan", float | None, "'nan' is not a number or none"),
        ("1,inf", tuple[float, float], "'inf' is not a finite number"),
        ("1" * 5000, int, "'1{80}...' is not a whole number$"),
    ],
)
def test_text_of_another_type_says_which_was_wanted(text, kind, wanted):
    with pytest.raises(UsageError, match=wanted):
        parse_value(text, kind)


def test_the_knobs_of_a_method_are_its_keyword_arguments_that_text_can_set():
    knobs = option_types(method)
    assert list(knobs) == ["M", "eta", "clip", "order", "warm", "betas", "prune"]
    assert knobs["M"] == (int, 1)
    assert knobs["warm"] == (float, 0.05)  # not annotated: the default's type


def test_options_are_typed_from_the_signature():
    texts = {"M": "3", "eta": "1", "clip": "none", "order": "2", "warm": "0", "betas": "0,1"}
    texts["prune"] = "false"
    values = parse_options(method, texts)
    assert values == {
        "M": 3, "eta": 1.0, "clip": None, "order": 2, "warm": 0.0, "betas": (0.0, 1.0), "prune": False,
    }  # fmt: skip
    assert isinstance(values["eta"], float)
    assert parse_options(method, {}) == {}


def test_a_wrong_option_is_answered_with_the_right_ones():
    with pytest.raises(UsageError, match="no method option 'm'; did you mean 'M'. there are: M, eta, clip"):
        parse_options(method, {"m": "3"})
    with pytest.raises(UsageError, match="config.options.M: '1.5' is not a whole number"):
        parse_options(method, {"M": "1.5"})
    for name, text in {"M": "2147483648", "eta": "1e39", "betas": "0,-1e39"}.items():
        with pytest.raises(UsageError, match=f"config.options.{name} is .*; it must be from -.* to "):
            parse_options(method, {name: text})
    assert parse_options(method, {"M": "2147483647", "prune": "1"}) == {"M": 2147483647, "prune": True}


def test_values_fit_the_types_of_text():
    right = [(1, float), (1.5, float), (None, int | None), ((1, 2.0), tuple[float, float]), (2, Literal[1, 2])]
    for value, kind in right:
        assert fits(value, kind)
    wrong = [(1.0, int), (True, int), (1, bool), ((1,), tuple[int, int]), ([1], tuple[int, ...]), (True, Literal[1, 2])]
    for value, kind in [*wrong, (None, int), (float("nan"), float | None), ("1", float), ({}, str)]:
        assert not fits(value, kind)


def test_a_path_that_cannot_be_is_named(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_path("workdir", "~/x") == Path("/home/me/x")
    with pytest.raises(UsageError, match="workdir is '~nosuchuser/x', but ~nosuchuser is no user's folder"):
        parse_path("workdir", "~nosuchuser/x")
    with pytest.raises(UsageError, match="data_dir is 'a/ä{78}...'; the names in a path can have at most 255 bytes"):
        parse_path("data_dir", "a/" + "ä" * 128)
    assert parse_path("data_dir", "ä" * 127)
