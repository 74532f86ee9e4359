"""The ClientApp: hands a message to this client's worker, and hands its answer back.

Flower starts a process for every message. This one imports neither jax nor the methods, and sees no images.
"""

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedmetanas_flower import door, records
from fedmetanas_flower.letter import TROUBLE, Letter

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Flower's entry: every message of a run is of this type."""
    answered = answer(message.content, context.node_config, context.node_id)
    return Message(records.pack(answered), reply_to=message)


def answer(content: RecordDict, node_config: dict, node_id: int) -> Letter:
    """What the server is to be told. Why there is no answer is said here, and not to the server."""
    letter = Letter("0" * 64, "", [])
    try:
        letter = records.unpack(content)
        return door.ask(door.Node.of(node_config, node_id, letter.run), letter)
    except (records.NoLetter, door.DoorError, OSError) as error:
        print(f"error: {error}", flush=True)
        return letter._replace(frames=[], trouble=TROUBLE)
