"""Random command lines end as they should; random_lines.py is the way to many of them."""

import random_lines


def test_random_command_lines_end_with_a_status_and_one_line():
    counts, wrong = random_lines.run(60, seed=7)
    assert not wrong, "\n".join(f"{line}\n    {what}" for line, what in wrong)
    assert {0, 1, 2} >= set(counts) >= {0, 2}  # and some of them are good


def test_what_ends_otherwise_is_seen_and_made_small(monkeypatch):
    def broken(line):
        if "--config.rounds=3" in line:
            raise ZeroDivisionError("so")
        return 0

    monkeypatch.setattr(random_lines.cli, "main", broken)
    line = ["main.py", "--config.width=4", "--config.rounds=3", "--list"]
    assert random_lines.outcome(line) == (None, "ZeroDivisionError: so")
    assert random_lines.smallest(line, "ZeroDivisionError: so") == ["main.py", "--config.rounds=3"]
    monkeypatch.setattr(random_lines.cli, "main", lambda line: 3)
    assert random_lines.outcome(line) == (None, "status 3, stderr ''")
