"""What is shown of a run: plain lines, the bar, and the picture of its learning curves."""

import io

import pytest

from fedmetanas_jax.engine.curves import draw
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


def test_the_bar_leaves_the_terminal_when_the_run_fails(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(2, 0, stream=stream, plain=False):
        raise KeyboardInterrupt
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


def size(png):
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_curves_have_a_panel_for_every_kind_of_number_there_is(tmp_path):
    loss = [{"round": n, "loss": 1 / n, "server_accuracy": None} for n in (1, 2, 3)]
    draw(loss, tmp_path / "loss.png", "loss alone")
    more = {"temperature": 1.0, "ops_alive": 9, "local_accuracy": {"mean": 0.5}}
    whole = [record | more for record in loss]
    whole[1] |= {"event": "prune", "event_accuracy_before": 0.5, "event_accuracy_after": 0.4}
    draw(whole, tmp_path / "whole.png", "all panels")
    assert size(tmp_path / "whole.png")[1] > 2 * size(tmp_path / "loss.png")[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "whole.png"]


def test_curves_of_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        draw([{"round": 1, "loss": None}], tmp_path / "x.png", "none")
