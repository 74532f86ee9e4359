"""The ServerApp: a run as serve.py's, whose clients are nodes of a Flower federation (docs/deployment.md)."""

import shlex
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmetanas_jax import main as run_script
from fedmetanas_jax.config import Config
from fedmetanas_jax.options import UsageError, brief, parse_path

FLAGS = {name: run_script.FLAGS[name] for name in ("config", "workdir", "data_dir", "list", "help")}
SINGLE = "secure"  # the aggregate whose clients say more than one thing a round

app = ServerApp()


class Failed(Exception):
    """What ended a run, in one line; Flower shows it with its own traceback."""


class Network(NamedTuple):
    """What is not of the run itself."""

    registered: Path | None  # the file of the names of those that may join
    by_node: bool
    quorum: int
    deadline: float
    compile_deadline: float
    max_norm: float


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Flower's entry."""
    run_or_fail(grid, context.run_config)


def run_or_fail(grid: Grid, run_config: dict) -> None:
    """Failed, which is also said, where the run cannot begin or go on."""
    failures: tuple[type[Exception], ...] = (UsageError,)
    try:
        asked, network = asked_for(run_config)
        from fedmetanas_flower.hub import GridError

        failures = (*run_script.failures(), GridError)
        run(grid, asked, network)
    except failures as error:
        line = " ".join(str(error).split())
        print(f"error: {line}", flush=True)
        raise Failed(line) from None


def asked_for(run_config: dict) -> tuple[run_script.Parsed, Network]:
    """The run config as values. UsageError for what makes no sense."""
    text = _value(run_config, "overrides", str)
    try:
        overrides = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"overrides is '{brief(text)}', which cannot be read: {error}") from None
    if wrong := [one for one in overrides if "=" not in one or one.startswith("-")]:
        raise UsageError(f"overrides has '{brief(wrong[0])}'; it must be FIELD=VALUE, as in 'rounds=20 options.M=3'")
    given = {name: _value(run_config, name, str) for name in ("config", "workdir", "data_dir")}
    flags = [f"--{name}={value}" for name, value in given.items() if value]
    asked = run_script.parse(["flwr", *flags, *(f"--config.{one}" for one in overrides)], FLAGS)
    check(asked.config)
    names, registered = (_value(run_config, name, str) for name in ("names", "registered"))
    if names not in ("node-config", "node-id"):
        raise UsageError(f"names is '{brief(names)}'; it must be node-config or node-id")
    numbers = {name: _value(run_config, name, float, 1) for name in ("deadline", "compile_deadline")}
    quorum = int(_value(run_config, "quorum", int, 0)) or max(1, -(-asked.config.cohort // 2))
    file = parse_path("registered", registered) if registered else None
    network = Network(file, names == "node-id", quorum, **numbers, max_norm=_value(run_config, "max_norm", float, 0))
    return asked, network


def check(config: Config) -> None:
    """UsageError for what one message a round cannot do."""
    if any(stage.partition(":")[0].strip() == SINGLE for stage in config.aggregate.split(",")):
        raise UsageError(
            f"config.aggregate is '{brief(config.aggregate)}': {SINGLE} sums need several exchanges a round, and over "
            "Flower a client has one; use serve.py and join.py"
        )


def run(grid: Grid, asked: run_script.Parsed, network: Network) -> None:
    """The run, begun or resumed. Raises as `build.run`; GridError."""
    from fedmetanas_flower.hub import FlowerHub
    from fedmetanas_jax.deploy.gather import Patience
    from fedmetanas_jax.deploy.roster import Roster
    from fedmetanas_jax.deploy.serve import PLACES, Listening, serve

    roster = Roster(asked.config.clients, network.registered, asked.workdir / PLACES)

    def make_hub(terms, name, _, say) -> FlowerHub:
        return FlowerHub(terms, name, roster, say, grid=grid, by_node=network.by_node)

    patience = Patience(network.quorum, network.deadline, network.compile_deadline)
    # Nothing listens but Flower's SuperLink, whose business host, port and certificates are.
    listening = Listening("localhost", 0, None, patience, network.max_norm, None)
    print(f"{asked.task} with {asked.config.method} in {asked.workdir.absolute()}", flush=True)
    how = {"task": asked.task, "workdir": asked.workdir, "data_dir": asked.data_dir}
    serve(asked.config, listening, **how, command="flwr run with the same run config", make_hub=make_hub)


def _value(run_config: dict, name: str, kind: type, least: float | None = None) -> Any:
    value = run_config.get(name)
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (least is not None and not value >= least):
        what = {str: "a text", int: "a whole number", float: "a number"}[kind]
        low = "" if least is None else f" of at least {least}"
        raise UsageError(f"{name} is {brief(value)}; it must be {what}{low}")
    return value
