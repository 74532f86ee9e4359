"""The wire: what is damaged is refused in one line, by a server that keeps its sizes, its model and its calm.

FEDMETANAS_FUZZ=10000 feeds it so many damaged messages in place of 300.
"""

import os
import re
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("grpc", reason="needs the extra: pip install 'fedmetanas_jax[deploy]'")
pytest.importorskip("hypothesis", reason="needs the extra: pip install 'fedmetanas_jax[test]'")

import hypothesis
import msgpack
from hypothesis import strategies as st

from fedmetanas_jax.deploy import checks, layout, wire
from fedmetanas_jax.deploy.connection import Connection
from fedmetanas_jax.deploy.hub import Hub
from fedmetanas_jax.deploy.roster import NotRegistered, Roster
from fedmetanas_jax.deploy.terms import Terms
from fedmetanas_jax.engine.records import versions

COUNT = int(os.environ.get("FEDMETANAS_FUZZ", "300"))
RUN = "ab" * 32
CHANGE = {"params": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, "alpha": np.ones(2, np.float32)}
REPORT = {"child": np.array([1, 2], np.int8), "good": np.array([True, False])}
PARTS = layout.of_reply(CHANGE, REPORT, None)
WANTED = checks.Wanted(RUN, 5, CHANGE, REPORT, None, layout.digest(PARTS), frozenset({"loss"}), 10.0, 100.0)
UPDATE = {"run": RUN, "round": 5, "weight": 4.0, "metrics": {"loss": 0.5}, "own": 3, "layout": WANTED.layout}
TERMS = Terms({"train_size": 10}, [8, 8, 1], 10, [0.5], [0.5])


def update(row: bytes | None = None, **changed) -> list[bytes]:
    return list(wire.frames("update", layout.pack(PARTS) if row is None else row, **UPDATE | changed))


def hello(**changed) -> bytes:
    about = versions()
    mine = {"protocol": wire.PROTOCOL, "version": about["fedmetanas_jax"], "jax": about["jax"], "run": "", "name": "a"}
    return next(wire.frames("hello", **mine | changed))


class Context:
    """As much of gRPC's as a connection without TLS needs."""

    def auth_context(self):
        return {}

    def add_callback(self, function):
        return True

    def cancel(self):
        pass


@pytest.fixture
def hub(tmp_path) -> Hub:
    said: list[str] = []
    made = Hub(TERMS, RUN, Roster(3, None, tmp_path / "places.json"), said.append)
    made.said = said
    return made


def received(hub: Hub, frames: list[bytes], owes=WANTED) -> tuple[list, Connection]:
    """The events of a connection that greets, is asked, and then sends these frames."""
    connection = Connection(Context())

    def raw():
        yield hello()
        connection.owes, connection.reader.room = owes, {"update": layout.size(PARTS)}
        yield from frames

    hub._receive(connection, raw())
    return list(iter(lambda: hub.poll(0), None)), connection


def kinds(events: list) -> list[str]:
    return [event.kind for event in events]


def reason(hub: Hub) -> str:
    (refusal,) = hub.noted()["refused"]
    return refusal["reason"]


def test_a_sound_reply_arrives(hub):
    events, _ = received(hub, update())
    assert kinds(events) == ["joined", "answer", "gone"]
    round, answer = events[1].value
    assert (round, answer.weight, answer.own, answer.metrics) == (5, 4.0, 3, {"loss": 0.5})
    np.testing.assert_array_equal(answer.change["params"]["w"], CHANGE["params"]["w"])
    np.testing.assert_array_equal(answer.report["good"], REPORT["good"])


def test_a_payload_comes_in_chunks():
    row = np.random.default_rng(0).bytes(2 * wire.CHUNK + 7)
    reader = wire.Reader(wire.FROM_SERVER)
    reader.room = {"judge": len(row)}
    header, *chunks = wire.frames("judge", row, round=1, plan="p", layout="l")
    assert [len(chunk) for chunk in chunks] == [wire.CHUNK, wire.CHUNK, 7]
    assert [reader.feed(frame) for frame in (header, *chunks[:2])] == [None] * 3
    assert reader.feed(chunks[2]) == wire.Message("judge", {"round": 1, "plan": "p", "layout": "l"}, row)


def row_of(**changed) -> bytes:
    return layout.pack(layout.of_reply(CHANGE | changed, REPORT, None))


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (update(run="other"), "of another run"),
        (update(round=4), "it is of round 4; round 5 was asked for"),
        (update(layout="other"), "another layout"),
        (update(layout.pack(PARTS)[:-1]), "31 bytes where the layout has 36"),
        (update(row_of(alpha=np.array([np.nan, 0], np.float32))), "change.*alpha.*not finite"),
        (update(row_of(alpha=np.array([np.inf, 0], np.float32))), "not finite"),
        (update(row_of(alpha=np.array([1e6, 0], np.float32))), "norm of its change is 1e.06; at most 100"),
        (update(layout.pack(PARTS)[:-1] + b"\2"), "a bool that is neither 0 nor 1"),
        (update(weight=0.0), "its weight is 0; it must be above 0 and at most 10"),
        (update(weight=10.1), "its weight is 10.1"),
        (update(weight=float("nan")), "its weight is no finite number"),
        (update(weight=1e39), "its weight is no finite number"),
        (update(own=5), "goes on from round 5"),
        (update(metrics={}), "its metrics are not loss"),
        (update(metrics={"loss": "low"}), "its loss is no finite number"),
        (update(metrics={"loss": float("inf")}), "its loss is no finite number"),
    ],
)
def test_a_reply_that_is_off_is_refused_and_the_connection_stays(hub, frames, said):
    events, connection = received(hub, frames)
    if said.startswith("31 bytes"):
        said = f"{layout.size(PARTS) - 1} bytes where the layout has {layout.size(PARTS)}"
    assert kinds(events) == ["joined", "refused", "gone"]
    round, why = events[1].value
    assert round == 5
    assert re.search(said, why)
    assert connection.owes is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"round": 4}, "it is of round 4; round 5 was asked for"),
        ({"count": 0, "before": 0, "after": 0}, "right of 0 images"),
        ({"count": 11}, "right of 11 images; it can have 1 to 10"),
        ({"after": 9}, "counts 3 and 9 right of 8 images"),
        ({"before": -1}, "counts -1 and 4 right"),
    ],
)
def test_counts_that_cannot_be_are_refused(hub, changed, said):
    counts = {"round": 5, "before": 3, "after": 4, "count": 8} | changed
    events, _ = received(hub, list(wire.frames("judged", **counts)), owes=5)
    if not said:
        assert events[1].kind == "judged"
        assert events[1].value == counts
        return
    assert events[1].kind == "refused"
    assert said in events[1].value[1]


def damaged_sha() -> list[bytes]:
    header, row = update()
    return [header, row[:-1] + bytes([row[-1] ^ 1])]


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        ([b"\xff\x00garbage"], "no msgpack|no map"),
        ([b""], "no msgpack"),
        ([msgpack.packb([1, 2])], "no map with a 'kind'"),
        ([msgpack.packb({"kind": "own"})], "no message is called 'own'"),
        ([msgpack.packb({"kind": "ready", "phase": 1})], "'ready' has not the fields"),
        ([msgpack.packb({"kind": "ready", "phase": True, "plan": ""})], "phase is no int"),
        ([b"\x81" * 5000], "no msgpack"),
        ([bytes(wire.HEADER + 1)], "a map of 262145 bytes"),
        ([update(bytes(1000))[0]], "announces 1000 bytes where"),
        ([update(b"")[0]], "announces 0 bytes"),
        ([update()[0], bytes(layout.size(PARTS) + 1)], "a chunk of"),
        ([update()[0], b""], "a chunk of 0 bytes"),
        (damaged_sha(), "SHA-256"),
        ([hello()], "'hello' is not what comes now"),
        ([next(wire.frames("ready", phase=0, plan="p"))], "'ready' was not asked for"),
        ([next(wire.frames("judged", round=5, before=1, after=1, count=1))], "'judged' was not asked for"),
        ([*update(), *update()], "announces"),
        ([next(wire.frames("failed", round=5, reason="x" * 2001))], "a text of more than 2000"),
    ],
)
def test_what_is_no_message_ends_the_connection_with_a_reason(hub, frames, said):
    events, connection = received(hub, frames)
    assert set(kinds(events)) <= {"joined", "answer", "gone"}
    assert re.search(said, reason(hub))
    assert len(hub.said) == 1
    sent = [wire.Reader(wire.FROM_SERVER).feed(frame) for frame in connection.outgoing()]
    assert sent[-1].kind == "closed"
    assert sent[-1].fields["final"]
    assert re.search(said, sent[-1].fields["reason"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"protocol": 0}, f"it speaks protocol 0, this server {wire.PROTOCOL}"),
        ({"version": "0.0.1"}, "it has version 0.0.1"),
        ({"run": "cd" * 32}, "of another run"),
        ({"name": ""}, "it has no name"),
    ],
)
def test_who_may_not_join_is_told_why(hub, changed, said):
    connection = Connection(Context())
    hub._receive(connection, iter([hello(**changed), *update()]))
    assert hub.poll(0) is None
    assert said in reason(hub)


def test_places_are_kept_and_end(tmp_path):
    listed = tmp_path / "clients.txt"
    listed.write_text("a\nb\n")
    roster = Roster(3, listed, tmp_path / "places.json")
    assert roster.places() == [0, 1]
    with pytest.raises(NotRegistered, match="'c' is not registered"):
        roster.place("c")
    listed.write_text("a\nb\nc\nd\n")
    assert roster.place("c") == 2
    with pytest.raises(NotRegistered, match="'d' is client number 4; the run has 3"):
        roster.place("d")
    first = Roster(2, None, tmp_path / "places.json")
    assert [first.place(name) for name in ("x", "y", "x")] == [0, 1, 0]
    again = Roster(2, None, tmp_path / "places.json")
    assert again.place("y") == 1
    with pytest.raises(NotRegistered, match="all 2 places"):
        again.place("z")


def test_what_is_not_given_does_not_travel():
    given = {"w": np.array([[True], [False]])}
    parts = [layout.Part({"w": CHANGE["params"]["w"]}, given)]
    row = layout.pack(parts)
    assert len(row) == layout.size(parts) == 12
    (back,) = layout.unpack(row, parts)
    np.testing.assert_array_equal(back["w"], [[0, 1, 2], [0, 0, 0]])


SOUND = [*update(), next(wire.frames("failed", round=5, reason="disk")), msgpack.packb({"kind": "update"}), hello()]


@st.composite
def damaged(draw) -> list[bytes]:
    """Sound frames with bytes flipped, cut, doubled, swapped or replaced."""
    frames = draw(st.lists(st.sampled_from(SOUND) | st.binary(max_size=80), min_size=1, max_size=4))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(frames) - 1))
        frame = bytearray(frames[place])
        if not frame:
            continue
        at = draw(st.integers(0, len(frame) - 1))
        how = draw(st.sampled_from(("flip", "cut", "insert", "double", "value")))
        if how == "flip":
            frame[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del frame[at:]
        elif how == "insert":
            frame[at:at] = draw(st.binary(max_size=20))
        elif how == "double":
            frames.insert(place, bytes(frame))
        else:
            values = st.none() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=9)
            key = draw(st.sampled_from(["kind", "bytes", *UPDATE]))
            frame = bytearray(msgpack.packb({**msgpack.unpackb(update()[0]), key: draw(values.filter(small))}))
        frames[place] = bytes(frame)
    return frames


def small(value) -> bool:
    return not isinstance(value, int) or abs(value) < 2**63


def test_damaged_messages_change_nothing(tmp_path):
    seen = SimpleNamespace(count=0, answers=0)

    @hypothesis.settings(max_examples=COUNT, deadline=None, database=None, derandomize=True)
    @hypothesis.given(frames=damaged())
    def fed(frames):
        made = Hub(TERMS, RUN, Roster(3, None, tmp_path / "places.json"), lambda text: None)
        events, connection = received(made, frames)  # whatever is raised in it fails the test
        assert kinds(events)[0] == "joined"
        assert kinds(events)[-1] == "gone"
        assert set(kinds(events)) <= {"joined", "answer", "refused", "failed", "gone"}
        assert len(connection.reader._payload) <= layout.size(PARTS)
        for refusal in made.noted().get("refused", ()):
            assert len(refusal["reason"]) < 500
            assert not re.match(r"\w*(Error|Exception|Warning): ", refusal["reason"])  # an error of the server's own
        for event in events:
            if event.kind == "answer":
                round, answer = event.value
                assert round == 5
                assert layout.pack(layout.of_reply(answer.change, answer.report, None)) == layout.pack(PARTS)
                assert 0 < answer.weight <= 10
                seen.answers += 1
        seen.count += 1

    fed()
    assert seen.count >= COUNT
    assert seen.answers < seen.count
