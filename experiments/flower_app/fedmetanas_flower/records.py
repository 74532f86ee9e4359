"""Letters as the content of Flower's messages: frames of the project's own wire, as bytes.

None of Flower's arrays and metrics are used, and nothing is pickled.
"""

import re

from flwr.app import ConfigRecord, RecordDict

from fedmetanas_flower.letter import Letter

RECORD = "fedmetanas"
FIELDS = {"run": str, "talk": str, "frames": list, "trouble": str}
MOST = 200  # characters of a text


class NoLetter(Exception):
    """A message's content is none of this app. One line."""


def pack(letter: Letter) -> RecordDict:
    """A message's content."""
    return RecordDict({RECORD: ConfigRecord(letter._asdict())})


def unpack(content: RecordDict) -> Letter:
    """The letter in a message's content. NoLetter: there is none."""
    record = content.get(RECORD)
    if list(content) != [RECORD] or not isinstance(record, ConfigRecord):
        raise NoLetter(f"a message that is not the one record '{RECORD}'")
    if record.keys() != FIELDS.keys() or any(type(record[name]) is not kind for name, kind in FIELDS.items()):
        raise NoLetter(f"a record '{RECORD}' that has not the fields {', '.join(FIELDS)}")
    letter = Letter(**record)
    if not all(type(frame) is bytes for frame in letter.frames):
        raise NoLetter("frames that are no bytes")
    if not re.fullmatch("[0-9a-f]{64}", letter.run):  # a client makes a folder's name of it
        raise NoLetter("a run that has no name")
    if max(len(letter.talk), len(letter.trouble)) > MOST:
        raise NoLetter(f"a text of more than {MOST} characters")
    return letter
