"""The server's exchanges of a secure sum, with clients that are played: no network, but all that would cross it."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("grpc", reason="needs the extra: pip install 'fedmetanas_jax[deploy]'")
pytest.importorskip("Crypto", reason="needs the extra: pip install 'fedmetanas_jax[deploy]'")

from secure_trial import FORM, MESSAGE, PLAN, ROW, RUN, ca, pair, plain_sum, summand

from fedmetanas_jax.core import Phase, Secure
from fedmetanas_jax.deploy import turn, vector, wire
from fedmetanas_jax.deploy.connection import Connection
from fedmetanas_jax.deploy.exchanges import Exchanges
from fedmetanas_jax.deploy.gather import Gather, Patience
from fedmetanas_jax.deploy.hub import Event, Hub
from fedmetanas_jax.deploy.roster import Roster
from fedmetanas_jax.deploy.secure_course import SecureCourse
from fedmetanas_jax.deploy.signatures import Authority
from fedmetanas_jax.deploy.terms import Terms
from fedmetanas_jax.deploy.work import Ready, WorkError
from fedmetanas_jax.engine.interrupt import Interrupt
from fedmetanas_jax.engine.secure import Summand
from fedmetanas_jax.options import UsageError


class Played(Connection):
    """A client that answers at once, as turn.Turns does, unless the test has it do something else."""

    def __init__(self, federation: "Federation", place: int):
        super().__init__(SimpleNamespace(cancel=lambda: None))
        self.place, self.name, self.plan = place, f"client-{place}", federation.gather.plan
        self.federation, self.told = federation, []

    def send(self, kind, payload=b"", **fields):
        self.told.append((kind, fields))

    def ask(self, wanted, room, kind, payload, **fields):
        super().ask(wanted, room, kind, payload, **fields)
        act = self.federation.play.get((self.place, kind, fields["attempt"]), Federation.answer)
        act(self.federation, self, kind, payload, fields)


class Federation:
    """Clients 0 to n - 1, all there; `play` says what one does when it is asked for something in an attempt."""

    def __init__(self, folder, clients: int, quorum: int = 1, deadline: float = 0.3):
        self.said: list[str] = []
        roster = Roster(clients, None, folder / "places.json")
        for place in range(clients):
            roster.place(f"client-{place}")
        self.hub = Hub(Terms({"train_size": 9}, [8, 8, 1], 2, [0.5], [0.5]), RUN, roster, self.said.append)
        self.gather = Gather(self.hub, Patience(quorum, deadline, deadline, 60.0), Interrupt())
        self.gather.prepare(0, "[]")
        self.exchanges = Exchanges(self.gather, Authority(ca()), clients)
        self.clients = clients
        self.turns = [
            turn.Turns(pair(f"client-{k}"), folder / str(k), RUN, k, clients, []) for k in range(clients)
        ]
        self.play: dict = {}
        self.connections = [self.come(place) for place in range(clients)]

    def come(self, place: int) -> Played:
        connection = Played(self, place)
        self.hub.events.put(Event("joined", connection))
        self.hub.events.put(Event("ready", connection, self.gather.plan))
        return connection

    def sum(self, round: int = 1, good=lambda total, heard: ""):
        def ask(place, connection, owes, attempt):
            connection.ask(owes, 0, "train_to_sum", ROW, round=round, attempt=attempt)

        return self.exchanges.sum(round, range(self.clients), FORM, MESSAGE, ask, good)

    def answer(self, connection, kind, payload, fields, damage=lambda letter: letter):
        """What the client sends, through all that the server's side of a connection looks at."""
        turns = self.turns[connection.place]
        try:
            if kind == "train_to_sum":
                about = {"run": RUN, "round": fields["round"], "own": 0, "layout": FORM.digest()}
                letter = turns.begin(Ready(about, FORM, summand(connection.place)), **fields, plan=PLAN, row=payload)
            else:
                letter = turns.answer(kind, **fields, payload=payload)
        except WorkError as error:
            letter = turn.Letter("failed", b"", {"round": fields["round"], "reason": str(error)})
        kind, payload, fields = damage(letter)
        for frame in wire.frames(kind, payload, **fields):
            message = connection.reader.feed(frame)
        self.hub.events.put(self.hub._event(connection, message))

    def gone(self, connection, kind, payload, fields):
        self.hub.events.put(Event("gone", connection))

    def back_at_once(self, connection, kind, payload, fields):
        self.gone(connection, kind, payload, fields)
        self.connections[connection.place] = self.come(connection.place)

    def silent(self, connection, kind, payload, fields):
        pass


def same(one, other) -> None:
    np.testing.assert_array_equal(one.narrow, other.narrow)
    assert one.wide == other.wide


def damaged(change):
    return lambda federation, *asked: federation.answer(*asked, damage=change)


def test_a_sum_of_all(tmp_path):
    four = Federation(tmp_path, 4)
    found = four.sum()
    same(found.total, plain_sum(range(4)))
    assert list(found.answers) == [0, 1, 2, 3]
    assert (found.left_out, found.failed) == ({}, [])


@pytest.mark.parametrize("kind", ["share", "mask"])
def test_who_dies_before_its_summand_came_is_left_out_by_name(tmp_path, kind):
    four = Federation(tmp_path, 4)
    four.play[2, kind, 1] = Federation.gone
    found = four.sum()
    same(found.total, plain_sum([0, 1, 3]))
    assert found.left_out == {2: f"its connection was lost meanwhile (after '{kind}')"}
    assert any("round 1 leaves out client-2" in line for line in four.said)


@pytest.mark.parametrize("kind", ["sign", "open"])
def test_who_dies_after_its_summand_came_is_summed(tmp_path, kind):
    four = Federation(tmp_path, 4)
    four.play[2, kind, 1] = Federation.back_at_once
    found = four.sum()
    same(found.total, plain_sum(range(4)))
    assert list(found.answers) == [0, 1, 2, 3]
    assert found.left_out == {}


def test_who_dies_in_training_is_asked_again(tmp_path):
    three = Federation(tmp_path, 3)
    lives = iter([Federation.back_at_once, Federation.answer])
    three.play[1, "train_to_sum", 1] = lambda *given: next(lives)(*given)
    same(three.sum().total, plain_sum(range(3)))


@pytest.mark.parametrize("kind", ["share", "mask", "sign", "open"])
def test_with_too_few_it_is_asked_again_with_fresh_keys(tmp_path, kind):
    """All of three are needed; the one that died is back for the second attempt."""
    three = Federation(tmp_path, 3)
    three.play[1, kind, 1] = Federation.back_at_once
    keys = []

    def noted(letter):
        keys.append(letter.fields["mask_key"])
        return letter

    for attempt in (1, 2):
        three.play[0, "train_to_sum", attempt] = damaged(noted)
    found = three.sum()
    same(found.total, plain_sum(range(3)))
    assert found.left_out == {}
    (why,) = found.failed
    assert "came of 2 clients, and a sum takes 3 (client-1: its connection was lost meanwhile" in why
    assert len(set(keys)) == 2
    (told,) = (fields["reason"] for kind, fields in three.connections[0].told if kind == "refused")
    assert "no sum came of it" in told


def test_who_is_late_is_left_out_and_its_late_summand_is_not_added(tmp_path):
    four, late = Federation(tmp_path, 4), []
    four.play[3, "mask", 1] = lambda federation, *asked: late.append(asked)
    same(four.sum().total, plain_sum([0, 1, 2]))
    assert four.gather.state_of(3) == "late"
    four.play.clear()
    four.answer(*late[0])
    same(four.sum(2).total, plain_sum([0, 1, 2]))
    assert "it came too late: the server is at round 2" in str(four.connections[3].told)
    same(four.sum(3).total, plain_sum(range(4)))


def test_a_quorum_above_the_threshold_is_kept(tmp_path):
    four = Federation(tmp_path, 4, quorum=4)
    four.play[3, "mask", 1] = Federation.back_at_once
    found = four.sum()
    same(found.total, plain_sum(range(4)))
    assert "3 summands came; the quorum is 4" in found.failed[0]


def test_a_sum_that_cannot_be_is_not_taken(tmp_path):
    three, told = Federation(tmp_path, 3), iter(["the norm is too large", ""])
    found = three.sum(good=lambda total, heard: next(told))
    assert found.failed == ["the norm is too large"]


def test_a_client_that_the_server_deceives_says_so_and_stays_out(tmp_path):
    four = Federation(tmp_path, 4)
    honest = Federation.answer

    def lied_to(federation, connection, kind, payload, fields):
        honest(federation, connection, kind, payload[:-1] + bytes([payload[-1] ^ 1]), fields)

    four.play[1, "share", 1] = lied_to
    found = four.sum()
    same(found.total, plain_sum([0, 2, 3]))
    assert "it could not: the keys that are said to be client-3's are not" in found.left_out[1]
    four.play = {(2, "train_to_sum", 1): lied_to}  # another model to train
    found = four.sum(2)
    same(found.total, plain_sum([0, 1, 3]))
    assert "its keys are not taken: did not sign this" in found.left_out[2]


def other(**changed):
    return damaged(lambda letter: letter._replace(fields=letter.fields | changed))


@pytest.mark.parametrize(
    ("kind", "act", "said"),
    [
        ("train_to_sum", other(run="cd" * 32), "of another run"),
        ("train_to_sum", other(layout="x"), "another layout"),
        ("train_to_sum", other(own=1), "goes on from round 1"),
        ("train_to_sum", other(attempt=9), "it is of round 1, attempt 9; round 1, attempt 1 was asked for"),
        ("train_to_sum", other(mask_key=bytes(32)), "its keys are not taken: did not sign this"),
        ("train_to_sum", other(mask_key=bytes(31)), "its keys are not taken: a list with a column of another type"),
        ("train_to_sum", other(certificate=b"x"), "its keys are not taken: is no certificate"),
        ("share", damaged(lambda letter: letter._replace(payload=b"\x90")), "has not made a share for each"),
        ("share", damaged(lambda letter: letter._replace(payload=b"\xc1")), "a list that is no msgpack"),
        ("mask", damaged(lambda letter: letter._replace(payload=letter.payload[:-4])), "bytes where a client adds"),
        ("mask", other(layout="x"), "another layout"),
        ("sign", other(signature=b"x"), "its signature under who is in the sum does not hold"),
        ("open", damaged(lambda letter: letter._replace(payload=letter.payload[:-1])), "63 bytes of shares where"),
    ],
)
def test_replies_that_are_off_are_refused_by_name_on_both_sides(tmp_path, kind, act, said):
    four = Federation(tmp_path, 4)
    four.play[1, kind, 1] = act
    found = four.sum()
    after = kind in ("sign", "open")
    same(found.total, plain_sum(range(4) if after else [0, 2, 3]))
    (refusal,) = four.hub.noted()["refused"]
    assert refusal["client"] == "client-1"
    assert said in refusal["reason"]
    assert any(kind == "refused" and said in fields["reason"] for kind, fields in four.connections[1].told)


def test_a_client_cannot_use_another_ones_certificate(tmp_path):
    four = Federation(tmp_path, 4)
    four.turns[1] = turn.Turns(pair("client-2"), tmp_path / "1", RUN, 1, 4, [])
    same(four.sum().total, plain_sum([0, 2, 3]))
    assert "another client's certificate" in str(four.hub.noted())


def test_what_was_not_asked_for_and_what_is_too_large_ends_the_connection(tmp_path):
    four = Federation(tmp_path, 4)
    found = []

    def unasked(federation, connection, kind, payload, fields):
        for frames in (wire.frames("opened", b"x", **fields), wire.frames("masked", bytes(10**6), layout="", **fields)):
            with pytest.raises(wire.Damaged) as caught:
                list(map(wire.Reader(wire.FROM_CLIENT).feed, frames))
            found.append(str(caught.value))
        with pytest.raises(wire.Damaged) as caught:
            list(map(connection.reader.feed, wire.frames("masked", bytes(FORM.size() + 1), layout="", **fields)))
        found.append(str(caught.value))
        federation.gone(connection, kind, payload, fields)

    four.play[0, "mask", 1] = unasked
    same(four.sum().total, plain_sum([1, 2, 3]))
    assert found[0].endswith("announces 1 bytes where 0 may come")
    assert found[2].endswith(f"announces {FORM.size() + 1} bytes where {FORM.size()} may come")


def test_lists_of_a_whole_cohort_have_room_at_the_client(tmp_path):
    """The largest that an honest server sends to a client, and no list that is much larger."""
    ten = Federation(tmp_path, 10)
    room, seen = ten.turns[0].room(5), {}

    def noted(federation, connection, kind, payload, fields):
        seen[kind] = len(payload)
        federation.answer(connection, kind, payload, fields)

    for kind in wire.OF_SUMS:
        ten.play[0, kind, 1] = noted
    same(ten.sum().total, plain_sum(range(10)))
    assert room["train_to_sum"] == 5
    for kind, size in seen.items():
        assert 0 < size <= room[kind] < 100_000


def course() -> SecureCourse:
    """As much of one as its checks need."""
    one = SecureCourse.__new__(SecureCourse)
    one.gather, one.conduct, one._most_rows = SimpleNamespace(plan=PLAN), SimpleNamespace(cohort=3), 9.0
    one._same, one._adds, one._how = MESSAGE, FORM, Secure(1.0, 1.0, None, 9.0)
    return one


def test_all_clients_are_sent_the_same_message():
    course()._sends(ROW)
    with pytest.raises(UsageError, match="this method .* sends them different ones"):
        course()._sends(ROW + b"x")


def test_sums_that_so_many_clients_cannot_come_to_are_told():
    def wrong(rows: float, number: int = 0, weight: int = 2**29) -> str:
        change = {"params": np.full((40, 5), number, np.int32), "alpha": np.zeros(6, np.int32)}
        numbers = vector.figures(FORM.names, rows, {"loss": 1.0}, 0.0, 1)
        return course()._wrong(FORM.of(Summand(change, np.int32(weight)), numbers), 3)

    assert wrong(27.0) == ""
    assert "the clients say that they have 28 images; they can have 27" in wrong(28.0)
    assert "the clients say that they have -1 images" in wrong(-1.0)
    assert "the norm of the sum of their params is" in wrong(27.0, 2**26)
    assert "their weights come to" in wrong(27.0, weight=0)


def test_what_can_be_no_secure_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="rests on clients' certificates"):
        turn.check(5, False, [])
    with pytest.raises(UsageError, match=r"config.cohort is 2; with secure in config.aggregate it must be at least 3"):
        turn.check(2, True, [])
    with pytest.raises(UsageError, match="rests on clients' certificates"):
        turn.Turns(None, tmp_path, RUN, 0, 3, [])
    careful = [Phase(0, None, None), Phase(5, None, None, tolerance=0.01)]
    with pytest.raises(UsageError, match="prune_tolerance has clients say one by one"):
        turn.check(5, True, careful)
