"""The variables that JAX reads: one line for a value with which nothing can run, in place of what JAX makes of it.

Imports no jax before it is asked for, because some values keep jax from being imported at all.
"""

import contextlib
import functools
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator

from fedmetanas_jax.options import UsageError, brief

# Reads XLA_FLAGS as a backend does that starts, and needs a sixth of a second.
READ_FLAGS = "from jaxlib import xla_client; xla_client.CompileOptions()"
XLA_COMPLAINT = r"^[EF]\d{4} .*?(?:command_line_flags|parse_flags_from_env)\S*\] (.*?)\.?$"

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def jax_variables() -> Iterator[None]:
    """For what imports jax for the first time: UsageError that names the variable whose value jax cannot read."""
    try:
        yield
    except ValueError as error:
        named = None if "jax" in sys.modules else _named(str(error))  # it stays out of them if importing it failed
        if named is None:
            raise
        raise UsageError(
            f"{named} is '{brief(os.environ[named])}', which JAX cannot read ({error}); unset it, or give another value"
        ) from None


def _named(text: str) -> str | None:
    """The variable that jax's complaint is about; it names either the variable or its value."""
    mine = {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
    by_name = [name for name in mine if re.search(rf"\b{name}\b", text, re.IGNORECASE)]
    by_value = [name for name, value in mine.items() if f"'{value}'" in text or f'"{value}"' in text]
    return next(iter(by_name + by_value), None)


def start_jax() -> None:
    """Starts jax's backend, for arithmetic in float32.

    UsageError for XLA_FLAGS that XLA would end the process for, for JAX_PLATFORMS that are not here, and without
    compiling.
    """
    import jax

    _check_xla_flags(os.environ.get("XLA_FLAGS", ""))
    if jax.config.jax_disable_jit:
        given = os.environ.get("JAX_DISABLE_JIT", "on")
        raise UsageError(f"JAX_DISABLE_JIT is '{given}', but a run is made of compiled programs; unset it")
    if jax.config.jax_enable_x64:
        _log.warning("JAX_ENABLE_X64 is on; it is switched off, as weights, alphas and checkpoints are float32")
        jax.config.update("jax_enable_x64", False)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        name = next((name for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME") if os.environ.get(name)), None)
        if name is None:
            raise
        why = str(error).partition(" (set JAX_PLATFORMS")[0].rstrip(".") or "there is no such device, or no JAX for it"
        raise UsageError(f"{name} is '{brief(os.environ[name])}': {why}; unset it: JAX finds what is there") from None


@functools.cache
def _check_xla_flags(flags: str) -> None:
    """UsageError for flags that XLA does not take.

    XLA answers them by ending the process, which nothing can catch; so another one is the first to read them.
    """
    if not flags or not sys.executable:
        return
    how = {"capture_output": True, "text": True, "errors": "replace", "env": os.environ | {"XLA_FLAGS": flags}}
    tried = subprocess.run([sys.executable, "-c", READ_FLAGS], **how)
    said = re.search(XLA_COMPLAINT, tried.stderr, re.MULTILINE)
    if tried.returncode and said:  # whatever else went wrong there is not the flags' doing
        raise UsageError(f"XLA_FLAGS is '{brief(flags)}': {brief(said[1], 200)}; correct it, or unset it")
