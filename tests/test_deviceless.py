"""The script that compiles for a GPU that is not there: here the CPU stands for it."""

import json

import deviceless
import jax
import pytest
from jax.experimental import topologies

TINY = ["deviceless.py", "--cells=1", "--nodes=1", "--width=4", "--clients=2", "--at_once=2", "--plans=terminal"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--ways=quick", "--ways holds 'quick'; there are remat,"),
        ("--ways=auto", "--ways holds 'auto'"),
        ("--plans=half", "--plans holds 'half'; there are full, terminal"),
        ("--at_once=2", "--clients=5 is no multiple of --at_once=2"),
        ("--at_once=0", "--at_once=0 must be at least 1"),
        ("--cells=-1", "--cells=-1 must be at least 1"),
        ("--gpu=a100", "invalid choice: 'a100'"),
        ("--fast", "unrecognized arguments: --fast"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(argument, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        deviceless.main(["deviceless.py", argument])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_without_a_compiler_for_cuda(monkeypatch, tmp_path, capsys):
    def absent(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", absent)
    assert deviceless.main([*TINY, f"--out={tmp_path}/x.json"]) == 1
    assert "pip install '.[deviceless]'" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_what_a_program_is_like_is_written_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(deviceless, "described", lambda gpu: jax.devices("cpu")[0])
    command = [*TINY, "--ways=batched,remat", "--dtype=float32", f"--out={tmp_path}/x.json"]
    assert deviceless.main(command) == 0
    batched, remat = json.loads((tmp_path / "x.json").read_text())["results"]
    assert batched["conditionals"] < remat["conditionals"]
    for found in (batched, remat):
        assert found["kernels"] > 100
        # 45 tasks of two steps make a round.
        assert found["bytes_a_round"] == pytest.approx(90 * found["bytes"])
        assert found["bytes"] > 2 * 32 * 32 * 32 * 3  # both clients' images at least
    table = (tmp_path / "x.md").read_text()
    assert f"| terminal | batched | 2 | {batched['kernels']:.0f} |" in table
    capsys.readouterr()
    assert deviceless.main(command) == 0
    assert capsys.readouterr().out == "terminal batched: already there\nterminal remat: already there\n"
