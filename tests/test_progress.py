"""What is shown of a run while it works: plain lines, and the bar."""

import io
import re

import pytest

from fedmetanas_jax.engine.progress import Progress


class Clock:
    """A clock that stands still until it is moved."""

    now = 0.0

    def __call__(self):
        return self.now


def lines(total, rounds, *, start=0, tick=0.0):
    """The plain lines of a run whose rounds are `tick` seconds apart."""
    stream, clock = io.StringIO(), Clock()
    with Progress(total, start, stream=stream, clock=clock) as progress:
        for record in rounds:
            clock.now += tick
            progress.round(record)
    return stream.getvalue().splitlines()


def numbers(shown):
    return [int(line.split()[1].split("/")[0]) for line in shown]


def test_a_stream_that_is_no_terminal_gets_plain_lines():
    shown = lines(
        200,
        [
            {
                "round": 50,
                "event": "prune",
                "seconds": 2.0,
                "loss": 1.23456,
                "server_accuracy": 0.7125,
                "local_accuracy": {"mean": 0.4, "std": 0.1, "worst_tenth": 0.2},
                "local_accuracy_adapted": {"mean": 0.66, "std": 0.1, "worst_tenth": 0.5},
                "ops_alive": 224,
            }
        ],
    )
    want = "round 50/200  prune  acc 71.2%  local 40.0>66.0%  loss 1.235  ops 224  2s/round  5:00 left"
    assert shown == [want]


def test_a_record_with_nothing_but_its_round_is_a_line():
    empty = {"loss": None, "server_accuracy": None, "local_accuracy": None, "event": None}
    assert lines(2, [{"round": 1} | empty]) == ["round 1/2"]


def test_slow_rounds_have_a_line_each():
    assert numbers(lines(4, [{"round": n} for n in (1, 2, 3, 4)], tick=60)) == [1, 2, 3, 4]


def test_fast_rounds_have_a_line_every_few_seconds_and_none_is_lost_that_tells_something():
    rounds = [{"round": n} for n in range(1, 101)]
    rounds[29]["server_accuracy"] = 0.5
    rounds[30]["event"] = "prune"
    rounds[31]["local_accuracy"] = {"mean": 0.5}
    # 0.5 s a round: ten rounds fill the 5 s of quiet after a line.
    want = [1, 11, 21, 30, 31, 32, 42, 52, 62, 72, 82, 92, 100]
    assert numbers(lines(100, rounds, tick=0.5)) == want


def test_the_time_left_follows_recent_rounds_and_knows_no_compile_time():
    rounds = [{"round": n, "seconds": 100.0} for n in range(1, 11)]
    rounds += [{"round": n, "seconds": 1.0, "compile_seconds": 500.0} for n in range(11, 41)]
    assert lines(3700, rounds, tick=10)[-1] == "round 40/3700  1s/round  1:01:00 left"


def test_messages_stand_between_the_lines():
    stream = io.StringIO()
    with Progress(2, 0, stream=stream) as progress:
        progress.say("compiling")
        progress.round({"round": 2})
    assert stream.getvalue() == "compiling\nround 2/2\n"


def test_a_terminal_gets_a_bar_and_whole_messages(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    message = "checkpoint [3] is damaged (" + "why " * 40 + ")"
    with Progress(200, 10, stream=stream, plain=False) as progress:
        progress.say(message)
        progress.round({"round": 11, "server_accuracy": 0.5, "seconds": 1.0})
        progress.round({"round": 12, "loss": 2.0, "seconds": 1.0, "ops_alive": 224})
    shown = stream.getvalue()
    assert message in shown
    assert "12/200" in shown
    assert "acc 50.0%  loss 2.000  ops 224  1s/round  3:08 left" in shown


def bar(monkeypatch, rounds, columns, *, total=1000, past=()):
    """What the bar says after the last of `rounds`, spaces between its columns made one."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    with Progress(total, len(past), past, stream=stream, plain=False) as progress:
        for record in rounds:
            progress.round(record)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    last = re.split(r"[\r\n]+", plain.strip())[-1].rstrip()
    assert len(last) <= columns
    return re.sub(r"[━╺╸ ]*[━╺╸][━╺╸ ]*", " ", last)


SLOW = {"loss": 2.0, "ops_alive": 224, "seconds": 9.5, "server_accuracy": 0.5}


def test_the_bar_names_the_last_event_and_goes_without_other_numbers_where_it_is_narrow(monkeypatch):
    rounds = [{"round": 300, "event": "prune"} | SLOW, {"round": 301} | SLOW]
    known = "301/1000 acc 50.0%  loss 2.000  ops 224  "
    assert bar(monkeypatch, rounds, 120) == known + "9.5s/round  prune 300  1:50:40 left"
    assert bar(monkeypatch, rounds, 80) == known + "prune 300  1:50:40 left"
    rounds[1]["event_put_off"] = "prune"
    assert bar(monkeypatch, rounds, 120) == known + "9.5s/round  prune 301 put off  1:50:40 left"
    assert bar(monkeypatch, rounds, 80) == "301/1000 acc 50.0%  ops 224  prune 301 put off  1:50:40 left"


def test_the_bar_of_a_resumed_run_knows_what_happened_before(monkeypatch):
    past = [{"round": 1, "event": "prune"} | SLOW, {"round": 2, "loss": 1.0}]
    assert (
        bar(monkeypatch, [{"round": 3, "loss": 0.5}], 80, total=90, past=past) == "3/90 acc 50.0%  loss 0.500  prune 1"
    )


def test_an_event_that_was_put_off_has_a_plain_line():
    rounds = [{"round": 1}, {"round": 2, "event_put_off": "prune"}, {"round": 3}]
    assert lines(9, rounds) == ["round 1/9", "round 2/9  prune put off"]


def test_the_bar_leaves_the_terminal_when_the_run_fails(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(2, 0, stream=stream, plain=False):
        raise KeyboardInterrupt
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is shown again
