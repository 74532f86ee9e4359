"""What all tests share: four virtual CPU devices, quick compiling, and a compilation cache.

Test time is compile time. LLVM's optimisations cost more here than they save, so they are off; that changes
no law that is tested. The cache outlives the run (JAX_COMPILATION_CACHE_DIR says where), so a second run is
several times faster than the first.
"""

import gc
import os
from pathlib import Path

gc.set_threshold(100_000, 20, 20)  # a third of the time of tracing a network is Python's looking for garbage otherwise

FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path("~/.cache/fedmetanas_jax/tests").expanduser()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# Of few tests but long: begun last, one process would wait for the other.
LONG = (
    "test_interruption.py", "test_hosts.py", "test_stopping.py", "test_search_quality.py", "test_contract.py",
    "test_fednas.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Files that take long come first."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
