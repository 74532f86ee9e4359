"""What server and client tell each other in one message; how Flower or a socket carries it is not this file's."""

from typing import NamedTuple

LOST = "it knows nothing of this talk: its worker began anew"
RUN = 16  # characters of a run's name that are shown, and that its folder at a client has
TROUBLE = "it could not answer; its own log says why"  # which may name files of its own


class Letter(NamedTuple):
    """Either way."""

    run: str  # the name of the run, as terms.run_of has it
    talk: str  # the name of a connection of server and client that lasts from message to message
    frames: list[bytes]  # of the project's own wire; to a client: none have it begin the talk
    trouble: str = ""  # a client's: why it has no answer
