"""The server's connections over Flower, with a grid and nodes that are played: no processes and no jax programs."""

import itertools
import sys
import threading
import time

import pytest

pytest.importorskip("flwr", reason="needs the extra: pip install 'fedmetanas_jax[flower]'")

from flower_trial import APP

sys.path.insert(0, str(APP))
from fedmetanas_flower import hub, records
from fedmetanas_flower.letter import LOST, TROUBLE, Letter
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedmetanas_jax.deploy.gather import Gather, Patience
from fedmetanas_jax.deploy.roster import Roster
from fedmetanas_jax.deploy.terms import Terms
from fedmetanas_jax.deploy.wire import FROM_SERVER, PROTOCOL, Reader, frames
from fedmetanas_jax.deploy.work import plan_digest
from fedmetanas_jax.engine.interrupt import Interrupt
from fedmetanas_jax.engine.records import versions

RUN = "0a" * 32


class Node:
    """A client that is played. once: what it answers next, in place of what a worker would."""

    def __init__(self, name: str):
        self.name, self.once = name, []
        self.heard: list[list[str]] = []

    def hear(self, letter: Letter):
        if letter.frames and self.once:
            return self.once.pop()
        if not letter.frames:
            self.reader = Reader(FROM_SERVER)
            self.reader.room = {"judge": 100}
            about = versions()
            mine = {"version": about["fedmetanas_jax"], "jax": about["jax"], "run": "", "name": self.name}
            return letter._replace(frames=list(frames("hello", protocol=PROTOCOL, **mine)))
        messages = [message for frame in letter.frames if (message := self.reader.feed(frame)) is not None]
        self.heard.append([message.kind for message in messages])
        return letter._replace(frames=[frame for message in messages for frame in self.answer(*message[:2])])

    def answer(self, kind: str, fields: dict):
        if kind == "prepare":
            yield from frames("ready", phase=0, plan=plan_digest(fields["phase"], fields["plan"]))
        if kind == "judge":
            yield from frames("judged", round=fields["round"], before=1, after=1, count=1)


class Grid:
    """Nodes by id, whose answers are there at once."""

    def __init__(self):
        self.nodes: dict[int, Node] = {}
        self.broken: Exception | None = None
        self._replies: dict[str, Message] = {}
        self._owed: dict[int, Message] = {}  # by node: what it has not answered
        self._numbers = itertools.count(1)

    def get_node_ids(self):
        if self.broken is not None:
            raise self.broken
        return list(self.nodes)

    def push_messages(self, messages):
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str | None:
        node = self.nodes.get(message.metadata.dst_node_id)
        if node is None:  # it went since the list of nodes was asked for; Flower takes no message then
            return None
        number = message.metadata.__dict__["_message_id"] = str(next(self._numbers))
        answered = node.hear(records.unpack(message.content))
        if isinstance(answered, Letter):
            answered = records.pack(answered)
        if answered is None:
            self._owed[message.metadata.dst_node_id] = message
        else:
            self._replies[number] = Message(answered, reply_to=message)
        return number

    def answer_late(self, node: int, letter: Letter) -> None:
        message = self._owed.pop(node)
        self._replies[message.metadata.message_id] = Message(records.pack(letter), reply_to=message)

    def pull_messages(self, numbers):
        return [self._replies.pop(number) for number in numbers if number in self._replies]


class Federation:
    """A run of clients a and b, at places 0 and 1."""

    def __init__(self, folder, by_node=False):
        self.grid, self.said = Grid(), []
        roster = Roster(2, None, folder / "places.json")
        if not by_node:
            for name in "ab":
                roster.place(name)
        agreed = Terms({"train_size": 9}, [8, 8, 1], 2, [0.5], [0.5])
        self.hub = hub.FlowerHub(agreed, RUN, roster, self.said.append, grid=self.grid, by_node=by_node)
        self.gather = Gather(self.hub, Patience(1, 0.5, 5.0, 60.0), Interrupt())
        self.gather.prepare(0, "[]")
        self.hub.listen("", 0, 2, None)

    def come(self, number: int, name: str) -> Node:
        self.grid.nodes[number] = Node(name)
        return self.grid.nodes[number]

    def ask(self, round=1, quorum=2):
        def send(place, connection):
            connection.ask(round, 0, "judge", b"networks", round=round, plan=self.gather.plan, layout="")

        return self.gather.ask(round, [0, 1], 2, quorum, send, "judged")

    def until(self, text: str) -> None:
        end = time.monotonic() + 10
        while not any(text in line for line in self.said):
            assert time.monotonic() < end, self.said
            time.sleep(0.005)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in {"PULL": 0.002, "LOOK": 0.004, "SOON": 0.01, "AGAIN": 0.02}.items():
        monkeypatch.setattr(hub, name, seconds)
    for name in ("_run_id", "_node_id", "_task_id"):  # which Flower sets in its own processes
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def two(tmp_path):
    federation = Federation(tmp_path)
    yield federation
    federation.hub.close("closed")


def test_a_round_costs_a_client_one_message(two):
    nodes = two.come(7, "a"), two.come(8, "b")
    assert list(two.ask(1).answers) == [0, 1]
    for connection in two.hub.here.values():
        connection.send("taken", round=1)
    time.sleep(0.05)  # in which nothing is sent
    assert list(two.ask(2).answers) == [0, 1]
    for node in nodes:
        assert node.heard == [["welcome", "prepare"], ["judge"], ["taken", "judge"]]
    assert [two.hub.here[place].name for place in (0, 1)] == ["a", "b"]
    assert all(c.sent > 0 and c.reader.seen > 0 for c in two.hub.here.values())
    two.hub.close("done", rounds=2)
    assert [node.heard[-1] for node in nodes] == [["done"], ["done"]]


def test_who_answers_while_the_run_ends_is_told_so_too(two):
    node, _ = two.come(7, "a"), two.come(8, "b")
    two.ask(1)
    node.once = [None]
    two.gather.patience = two.gather.patience._replace(compiling=0.3)
    two.ask(2, quorum=1)  # without a, which owes an answer
    late = Letter(RUN, two.hub.here[0].talk, list(frames("judged", round=2, before=1, after=1, count=1)))
    threading.Timer(0.2, two.grid.answer_late, (7, late)).start()
    two.hub.close("done", rounds=2)
    assert node.heard[-1] == ["done"]


@pytest.mark.parametrize(
    ("once", "said"),
    [
        (Letter(RUN, "x", [], LOST), f"a: {LOST}"),
        (Letter(RUN, "x", [], TROUBLE), f"a: {TROUBLE}"),
        (Letter(RUN, "x", [b"y"]), "a: it answered nothing"),
        (Error(5, "it is\ngone"), "a: Flower has no answer of it: it is gone"),
    ],
)
def test_whose_worker_or_node_failed_begins_a_new_talk_in_the_same_round(two, once, said):
    node, _ = two.come(7, "a"), two.come(8, "b")
    two.ask(1)
    node.once = [once]
    two.gather.patience = two.gather.patience._replace(deadline=10.0)
    found = two.ask(2)
    assert list(found.answers) == [0, 1]
    assert found.left_out == {}
    assert said in two.said
    assert any("a is gone; round 2 waits" in line for line in two.said)
    assert two.hub.noted() == {}  # nobody was refused


@pytest.mark.parametrize(
    ("once", "reason"),
    [
        ([b"\xc1"], "no msgpack"),
        (list(frames("judged", round=3, before=1, after=1, count=1)), "it is of round 3; round 2 was asked for"),
        (list(frames("judged", round=2, before=1, after=10, count=10)), "it can have 1 to 9"),
        (list(frames("ready", phase=0, plan="")), "'ready' was not asked for"),
        (RecordDict({"fedmetanas": ConfigRecord({"frames": [1]})}), "has not the fields"),
    ],
)
def test_what_is_wrong_is_refused_by_name(two, once, reason):
    node, _ = two.come(7, "a"), two.come(8, "b")
    two.ask(1)
    letter = once if isinstance(once, RecordDict) else Letter(RUN, two.hub.here[0].talk, once)
    node.once = [letter]
    two.ask(2, quorum=1)
    noted = two.hub.noted()["refused"]
    assert [line["client"] for line in noted] == ["a"]
    assert reason in noted[0]["reason"]
    assert list(two.ask(3).answers) == [0, 1]  # and is asked again


def test_nobody_takes_the_name_of_a_client_that_is_there(two):
    first, second = two.come(7, "a"), two.come(9, "a")
    two.come(8, "b")
    two.ask(1)
    two.until("which is there")
    holder = two.hub.here[0].node
    assert holder in (7, 9)
    assert (first if holder == 7 else second).heard[-1] == ["judge"]
    del two.grid.nodes[holder]
    two.gather.patience = two.gather.patience._replace(deadline=10.0)
    assert list(two.ask(2).answers) == [0, 1]
    assert two.hub.here[0].node == 16 - holder


def test_a_node_that_goes_while_it_is_written_to_is_lost_and_the_run_goes_on(two, monkeypatch):
    two.come(7, "a"), two.come(8, "b")
    two.ask(1)
    monkeypatch.setattr(two.grid, "get_node_ids", lambda: [7, 8])  # the list is a moment old
    del two.grid.nodes[7]
    assert list(two.ask(2, quorum=1).answers) == [1]
    two.until("a: Flower took no message for it")


def test_clients_may_be_called_by_their_nodes(tmp_path):
    federation = Federation(tmp_path, by_node=True)
    federation.come(7, "a"), federation.come(8, "a")
    federation.ask(1)
    assert sorted(c.name for c in federation.hub.here.values()) == ["node-7", "node-8"]
    federation.hub.close("closed")


def test_a_node_that_goes_away_or_says_nothing_is_left_out_and_named(two):
    node, _ = two.come(7, "a"), two.come(8, "b")
    two.ask(1)
    node.once = [None]
    two.gather.patience = two.gather.patience._replace(compiling=0.5)
    found = two.ask(2, quorum=1)
    assert found.left_out == {0: "it did not answer within 0.5 s"}
    del two.grid.nodes[7]
    two.until("a: its node is no longer there")
    assert list(two.ask(3, quorum=1).answers) == [1]


def test_a_grid_that_breaks_ends_the_run_with_a_line(two):
    two.come(7, "a"), two.come(8, "b")
    two.ask(1)
    two.grid.broken = ConnectionError("the SuperLink\nis gone")
    two.hub._thread.join(10)
    with pytest.raises(hub.GridError, match=r"carries no more messages \(ConnectionError: the SuperLink is gone\)"):
        two.ask(2)
