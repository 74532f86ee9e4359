"""A federation's client: takes part in the run of a server with its own images, which stay here (docs/deployment.md).

    python experiments/join.py --server=host:8433 --certs=certs/clients/client-0 --data=mine.npz --workdir=mine

mine.npz has train_images uint8 [n, h, w, c] and train_labels, integers [n]. The client's own state is in the workdir.
It stays until the run is done, and comes back by itself whenever the server or the network was gone. Exit status as
main.py's; 1 also where the server refuses it.
"""

import sys
from functools import partial

from fedmetanas_jax import command
from fedmetanas_jax.command import Flag
from fedmetanas_jax.environment import jax_variables
from fedmetanas_jax.options import UsageError, parse_path

FLAGS = {
    "server": Flag(str, None, "HOST:PORT"),
    "data": Flag(str, None, "this client's images, an .npz file"),
    "workdir": Flag(str, None, "where its own state is kept; one folder for one run"),
    "certs": Flag(str, None, "folder of ca.pem, client.pem and client.key, as certs.py makes it"),
    "insecure": Flag(bool, False, "without TLS, for a trial on this machine alone; needs --name"),
    "name": Flag(str, "", "of this client, where no certificate says it"),
    "give_up": Flag(float, 3600.0, "seconds without a server after which it ends, with status 1", least=0),
    "only_secure": Flag(bool, False, "take no part in a run whose server would see this client's changes one by one"),
    "help": command.HELP,
}


def parse(argv: list[str]) -> dict:
    """argv[0] is the program. UsageError for what makes no sense."""
    values = command.read(argv, FLAGS)
    if values["help"]:
        return values
    for name in ("server", "data", "workdir"):
        if not values[name]:
            raise UsageError(f"--{name} is missing: {FLAGS[name].help}")
    if (values["certs"] is None) != values["insecure"]:
        raise UsageError("give --certs=FOLDER, as certs.py makes it; or --insecure for a trial on this machine")
    if values["insecure"] != bool(values["name"]):
        raise UsageError("--insecure and --name belong together: with certificates they say who somebody is")
    host, _, port = values["server"].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"server is '{values['server']}'; it must be HOST:PORT")
    for name in ("data", "workdir", "certs"):
        values[name] = None if values[name] is None else parse_path(name, values[name])
    return values


def act(values: dict, argv: list[str]) -> None:
    """Takes part."""
    del argv
    try:
        with jax_variables():
            from fedmetanas_jax.deploy.client import Asked, join
    except ModuleNotFoundError as error:
        from serve import NEEDS

        raise UsageError(f"{NEEDS} ({error})") from None
    say = partial(print, flush=True)
    names = ("server", "data", "workdir", "certs", "name", "give_up", "only_secure")
    join(Asked(*(values[name] for name in names)), say)


def failures() -> tuple:
    """What a client can fail of; loads jax."""
    from fedmetanas_jax.deploy.client import FAILURES

    return FAILURES


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""
    return command.run(argv, parse, act, __doc__, FLAGS, failures)


if __name__ == "__main__":
    command.leave(main(sys.argv))
