"""A federation's server: a run as main.py's, whose clients are processes elsewhere (docs/deployment.md).

    python experiments/certs.py --to=certs --clients=10
    python experiments/serve.py --config=digits_dir01 --certs=certs --workdir=runs/served
    python experiments/join.py --server=localhost:8433 --certs=certs/clients/client-0 --data=mine.npz --workdir=mine

Whatever ends it, the same command goes on with the round that was under way; clients come back by themselves. Exit
status as main.py's.
"""

import sys
from typing import Any

from fedmetanas_jax import command
from fedmetanas_jax import main as run_script
from fedmetanas_jax.command import Flag
from fedmetanas_jax.config import to_dict
from fedmetanas_jax.engine.interrupt import interruptible
from fedmetanas_jax.engine.sink_kinds import Run
from fedmetanas_jax.engine.sinks import Sinks
from fedmetanas_jax.options import UsageError, parse_path

NEEDS = "a server and clients need the extra: pip install 'fedmetanas_jax[deploy]'"
FLAGS = {name: flag for name, flag in run_script.FLAGS.items() if name != "stop_after"} | {
    "sinks": run_script.OWN["sinks"],
    "certs": Flag(str, None, "folder of ca.pem, server.pem, server.key and clients.txt, as certs.py makes it"),
    "insecure": Flag(bool, False, "without TLS, for a trial on this machine alone"),
    "host": Flag(str, None, "the address to listen on; default: all of this machine, or 127.0.0.1 with --insecure"),
    "port": Flag(int, 8433, "the port to listen on; 0: any that is free", least=0),
    "quorum": Flag(int, None, "replies without which no round ends; default: half of config.cohort", least=1),
    "deadline": Flag(float, 120.0, "seconds for a client's reply, and for one that is gone to come back", least=1),
    "compile_deadline": Flag(float, 1800.0, "seconds for a client to compile a program", least=1),
    "max_norm": Flag(float, 1000.0, "largest norm of a client's change; a larger one is refused", least=0),
    "metrics_port": Flag(int, None, "of Prometheus metrics, on 127.0.0.1 alone", least=1),
}


def listening(asked: run_script.Parsed, values: dict[str, Any]):
    """The flags of the network as the server takes them. UsageError for what makes no sense."""
    from fedmetanas_jax.deploy.gather import Patience
    from fedmetanas_jax.deploy.serve import Listening

    if (values["certs"] is None) != values["insecure"]:
        raise UsageError("give --certs=FOLDER, as certs.py makes it; or --insecure for a trial on this machine")
    host = values["host"] or ("127.0.0.1" if values["insecure"] else "0.0.0.0")
    certs = None if values["certs"] is None else parse_path("certs", values["certs"])
    for name in ("port", "metrics_port"):
        if (values[name] or 0) > 65535:
            raise UsageError(f"{name} is {values[name]}; it must be at most 65535")
    quorum = values["quorum"] or max(1, -(-asked.config.cohort // 2))
    patience = Patience(quorum, values["deadline"], values["compile_deadline"])
    return Listening(host, values["port"], certs, patience, values["max_norm"], values["metrics_port"])


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""

    def answer() -> None:
        asked = run_script.parse(argv, FLAGS)
        if asked.show != "run":
            return command.show(run_script.help_or_list(asked, __doc__, FLAGS))
        try:
            where = listening(asked, asked.values)
        except ModuleNotFoundError as error:
            raise UsageError(f"{NEEDS} ({error})") from None
        from fedmetanas_jax.deploy.serve import serve

        if asked.values["insecure"]:
            print("without TLS: anybody on this machine can join, read and forge", file=sys.stderr, flush=True)
        config = asked.config
        shown = Run(f"{asked.task}-{config.method}-{config.seed}", to_dict(config), asked.workdir)
        with Sinks(asked.values["sinks"], shown) as sinks:
            how = {"task": asked.task, "workdir": asked.workdir, "data_dir": asked.data_dir, "command": asked.command}
            serve(config, where, **how, sinks=sinks)

    with interruptible():
        return command.exit_status(answer, run_script.failures)


if __name__ == "__main__":
    command.leave(main(sys.argv))
