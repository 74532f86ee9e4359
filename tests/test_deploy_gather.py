"""Whom the server asks and waits for, with clients that are played: no network and no jax programs."""

import io
import re
import urllib.request
from types import SimpleNamespace

import pytest

pytest.importorskip("grpc", reason="needs the extra: pip install 'fedmetanas_jax[deploy]'")

from trial import free_port

from fedmetanas_jax.deploy.board import Board, Metrics
from fedmetanas_jax.deploy.connection import Connection
from fedmetanas_jax.deploy.gather import Gather, Patience
from fedmetanas_jax.deploy.hub import Event, Hub
from fedmetanas_jax.deploy.roster import Roster
from fedmetanas_jax.deploy.terms import Terms
from fedmetanas_jax.engine.interrupt import Interrupt
from fedmetanas_jax.options import UsageError

PLAN = (0, "[]")


class Federation:
    """A hub with clients a, b, c, d at places 0 to 3; `play` says what each does when it is asked."""

    def __init__(self, tmp_path, clients=4, deadline=0.3, every=60.0):
        roster = Roster(clients, None, tmp_path / "places.json")
        for name in "abcd"[:clients]:
            roster.place(name)
        self.said: list[str] = []
        self.hub = Hub(Terms({"train_size": 9}, [8, 8, 1], 2, [0.5], [0.5]), "run", roster, self.said.append)
        self.interrupt = Interrupt()
        self.gather = Gather(self.hub, Patience(2, deadline, deadline, every), self.interrupt)
        self.gather.prepare(*PLAN)
        self.asked: list[int] = []
        self.play: dict[int, object] = {}

    def come(self, place: int, plan: str = "") -> Connection:
        """A client joins, and has its program ready, or another one."""
        connection = Connection(SimpleNamespace(cancel=lambda: None))
        connection.place, connection.name = place, "abcd"[place]
        self.put("joined", connection)
        self.put("ready", connection, plan or self.gather.plan)
        return connection

    def put(self, kind: str, connection: Connection, value=None) -> None:
        if kind in ("answer", "failed", "refused", "judged"):
            connection.owes = None
        self.hub.events.put(Event(kind, connection, value))

    def ask(self, round=1, size=3, quorum=2, order=(0, 1, 2, 3)):
        def send(place, connection):
            self.asked.append(place)
            connection.owes = round
            act = self.play.get(place, self.answer)
            act(round, connection)

        return self.gather.ask(round, order, size, quorum, send)

    def answer(self, round, connection):
        self.put("answer", connection, (round, f"{connection.name}{round}"))

    def silent(self, round, connection):
        pass

    def told(self, connection) -> list[tuple]:
        letters = []
        while not connection._out.empty():
            letters.append(connection._out.get())
        return [letter for letter in letters if letter is not None and letter[0] != "prepare"]


@pytest.fixture
def four(tmp_path) -> Federation:
    return Federation(tmp_path)


def test_those_at_the_front_of_the_order_are_asked_and_answers_keep_it(four):
    for place in range(4):
        four.come(place)
    found = four.ask(order=(2, 0, 3, 1))
    assert four.asked == [0, 2, 3]  # as they came
    assert list(found.answers.items()) == [(2, "c1"), (0, "a1"), (3, "d1")]
    assert found.left_out == {}


def test_who_dies_and_comes_back_is_asked_again_for_the_same_round(four):
    lives = iter([lambda round, connection: (four.put("gone", connection), four.come(1)), four.answer])
    for place in range(3):
        four.come(place)
    four.play[1] = lambda round, connection: next(lives)(round, connection)
    found = four.ask()
    assert list(found.answers) == [0, 1, 2]
    assert four.asked.count(1) == 2
    assert any("b is gone; round 1 waits" in line for line in four.said)


def test_who_is_late_is_left_out_named_and_not_asked_until_it_answers(four):
    connections = [four.come(place) for place in range(4)]
    four.play[1] = four.silent
    found = four.ask()
    assert list(found.answers) == [0, 2]
    assert found.left_out == {1: "it did not answer within 0.3 s"}
    assert four.gather.state_of(1) == "late"
    assert four.gather.members() == [0, 2, 3]
    assert list(four.ask(2).answers) == [0, 2, 3]
    four.answer(1, connections[1])
    assert list(four.ask(3).answers) == [0, 2, 3]  # the answer is met on the way
    assert [letter[2]["reason"] for letter in four.told(connections[1])] == [
        "it came too late: the server is at round 3"
    ]
    four.play[1] = four.answer
    assert list(four.ask(4).answers) == [0, 1, 2]


def test_an_answer_after_the_deadline_counts_while_the_round_is_still_open(tmp_path):
    three = Federation(tmp_path, clients=3)
    connections = [three.come(place) for place in range(2)]
    three.play[1] = three.silent

    def say(text):
        three.said.append(text)
        if text.startswith("round 1 leaves out c"):  # c never comes: below the quorum, b answers after all
            three.answer(1, connections[1])

    three.hub.say = say
    found = three.ask(quorum=2)
    assert list(found.answers) == [0, 1]
    assert list(found.left_out) == [2]


def test_below_the_quorum_others_are_asked(four):
    for place in range(4):
        four.come(place)
    four.play[1] = four.play[2] = four.silent
    found = four.ask(quorum=2)
    assert list(found.answers) == [0, 3]
    assert set(found.left_out) == {1, 2}


def test_no_more_replies_are_taken_than_a_cohort_has(four):
    connections = [four.come(place) for place in range(4)]
    four.play[0] = four.play[1] = four.silent

    def all_at_once(round, connection):  # 3 and 2 are asked in place of 0 and 1, and then all of them answer
        for one in (connections[0], connections[1], connection):
            four.answer(round, one)

    four.play[3] = all_at_once
    found = four.ask(size=2, quorum=2, order=(0, 1, 3, 2))
    assert list(found.answers) == [0, 1]
    assert found.left_out == dict.fromkeys((2, 3), "others had taken its place")
    assert four.told(connections[3])[-1][0] == "refused"


def test_below_the_quorum_it_waits_and_says_for_whom(tmp_path):
    few = Federation(tmp_path, deadline=0.15, every=0.2)
    few.come(0)

    def say(text):
        few.said.append(text)
        if len([line for line in few.said if "waits for" in line and "quorum" in line]) == 3:
            few.come(2)

    few.hub.say = say
    found = few.ask(size=3, quorum=2)
    assert list(found.answers) == [0, 2]
    waits = [line for line in few.said if "the quorum is 2" in line]
    assert len(waits) >= 3
    assert "b (it was not there for 0.15 s)" in waits[-1]


def test_a_refused_reply_is_left_out_told_and_noted(four):
    connections = [four.come(place) for place in range(3)]
    four.play[1] = lambda round, connection: four.put("refused", connection, (round, "its weight is 0"))
    found = four.ask()
    assert found.left_out == {1: "its weight is 0"}
    assert four.told(connections[1]) == [("refused", b"", {"round": 1, "reason": "its weight is 0"})]
    assert four.hub.noted() == {"refused": [{"client": "b", "reason": "round 1: its weight is 0"}]}
    assert four.hub.noted() == {}
    assert four.gather.members() == [0, 1, 2, 3]  # the next round asks it again


def test_a_newer_connection_takes_the_place_of_an_older_one(four):
    old = four.come(0)
    four.come(1)
    new = four.come(0)
    four.ask(size=2)
    assert four.hub.here[0] is new
    kind, _, fields = four.told(old)[0]
    assert kind == "closed"
    assert fields["final"]
    four.put("gone", old)
    assert list(four.ask(2, size=2).answers) == [0, 1]


def test_a_client_that_does_not_compile_in_time_is_left_out(four):
    four.come(0)
    four.come(1)
    four.come(2, plan="another plan")
    found = four.ask()
    assert found.left_out == {2: "it had no program ready within 0.3 s"}


def board(four, **how) -> tuple[Board, io.StringIO]:
    stream = io.StringIO()
    return Board(9, 0, gather=four.gather, taken=lambda: [4, 0, 0, 0], metrics=None, stream=stream, **how), stream


RECORD = {"round": 1, "seconds": 1.0, "loss": 0.5, "wire_up": 1, "wire_down": 1, "joined": ["a", "b", "c"]}


def test_plain_lines_say_who_is_where(four):
    for place in range(3):
        four.come(place)
    four.play[1] = four.silent
    four.ask()
    show, stream = board(four, plain=True)
    with show:
        show.round(RECORD)
    assert stream.getvalue().splitlines()[-1] == "4 clients: 2 ready, 1 late (b), 1 away (d)"


def test_a_terminal_has_a_table_of_the_clients(four):
    four.come(0)
    four.come(1)
    four.ask()
    show, stream = board(four, plain=False)
    with show:
        show.round(RECORD)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert re.search(r"client +state +last round taken", text)
    assert re.search(r"^a +ready +4 +0\.0 +0\.0", text, re.M)
    assert re.search(r"^d +away", text, re.M)


def test_metrics_are_served_on_loopback(four):
    pytest.importorskip("prometheus_client", reason="needs the extra: pip install 'fedmetanas_jax[deploy]'")
    four.come(0)
    four.come(1)
    four.ask()
    port = free_port()
    metrics = Metrics(port, four.gather)
    metrics.round(RECORD | {"server_accuracy": 0.75, "left_out": {"b": "late"}, "refused": [{}, {}]})
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert found['fedmetanas_clients{state="ready"}'] == "2.0"
    assert found['fedmetanas_clients{state="away"}'] == "2.0"
    assert found["fedmetanas_server_accuracy"] == "0.75"
    assert found["fedmetanas_left_out_total"] == "1.0"
    assert found["fedmetanas_refused_total"] == "2.0"
    with pytest.raises(UsageError, match=f"metrics_port is {port}"):
        Metrics(port, four.gather)


def test_a_signal_ends_the_waiting(four):
    four.interrupt.signal = 15
    with pytest.raises(KeyboardInterrupt):
        four.ask()
