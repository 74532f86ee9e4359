"""The variables that jax reads: one line that names variable and value where nothing can run, and float32 always."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from fedmetanas_jax import environment
from fedmetanas_jax.engine import claim
from fedmetanas_jax.engine.records import WorkdirError
from fedmetanas_jax.options import UsageError

MAIN = Path(__file__).parents[1] / "experiments/main.py"


def refusal() -> str:
    with pytest.raises(UsageError) as caught:
        environment.start_jax()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_jax_cannot_read_when_it_is_imported_is_one_line_and_status_2():
    variables = os.environ | {"JAX_ENABLE_X64": "maybe"}
    done = subprocess.run([sys.executable, str(MAIN), "--list"], capture_output=True, text=True, env=variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: JAX_ENABLE_X64 is 'maybe', which JAX cannot read (")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("variable", "complaint"),
    [
        ("JAX_DEFAULT_MATMUL_PRECISION", 'Invalid value "foo" for JAX flag jax_default_matmul_precision'),
        ("JAX_SOME_NUMBER", "could not convert string to float: 'foo'"),
    ],
)
def test_the_variable_is_named_by_its_name_or_its_value(monkeypatch, variable, complaint):
    monkeypatch.setenv(variable, "foo")
    with pytest.raises(ValueError, match=complaint), environment.jax_variables():  # jax is there: it is another's
        raise ValueError(complaint)
    monkeypatch.delitem(sys.modules, "jax")
    with pytest.raises(UsageError, match=f"^{variable} is 'foo', which JAX cannot read"), environment.jax_variables():
        raise ValueError(complaint)
    with pytest.raises(ValueError, match="^of something else$"), environment.jax_variables():
        raise ValueError("of something else")


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--no_such_flag=1", "Unknown flag in XLA_FLAGS: --no_such_flag=1"),
        ("--xla_cpu_enable_fast_math=maybe", "Couldn't interpret value maybe for flag xla_cpu_enable_fast_math"),
        ("xla_dump_to=x", 'Could not open file "xla_dump_to=x"'),
    ],
)
def test_flags_that_would_end_the_process_are_refused(monkeypatch, flags, why):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert refusal().startswith(f"XLA_FLAGS is '{flags}': {why}")


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (AssertionError(), "there is no such device, or no JAX for it"),
        (RuntimeError("no foo here. (set JAX_PLATFORMS='' to choose)"), "no foo here"),
    ],
)
def test_a_platform_that_is_not_here_is_refused(monkeypatch, error, why):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "foo")
    assert refusal() == f"JAX_PLATFORMS is 'foo': {why}; unset it: JAX finds what is there"
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.delenv("JAX_PLATFORM_NAME", raising=False)
    with pytest.raises(type(error)):  # no variable's doing
        environment.start_jax()


def test_a_run_needs_compiling_and_computes_in_float32(monkeypatch, caplog):
    environment.start_jax()
    assert caplog.text == ""
    with jax.disable_jit():
        monkeypatch.setenv("JAX_DISABLE_JIT", "1")
        assert refusal() == "JAX_DISABLE_JIT is '1', but a run is made of compiled programs; unset it"
    try:
        jax.config.update("jax_enable_x64", True)
        environment.start_jax()
        assert not jax.config.jax_enable_x64
    finally:
        jax.config.update("jax_enable_x64", False)
    assert "JAX_ENABLE_X64 is on; it is switched off" in caplog.text


def test_a_system_without_locks_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(claim, "fcntl", None)
    with pytest.raises(WorkdirError, match="^Linux and macOS only: this system has no fcntl"):
        claim.claim(tmp_path / "run", {}, print)
    assert list(tmp_path.iterdir()) == []
