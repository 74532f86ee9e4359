"""What all tests share: four virtual CPU devices, quick compiling, and a compilation cache.

Test time is compile time. LLVM's optimisations cost more here than they save, so they are off; that changes
no law that is tested. JAX 0.10 has simpler kernels for fusions than those of its default, which compile in half the
time. With these a computation may be rounded differently in another program; the files in EXACT, whose laws are about
that, have the kernels that users have. The cache outlives the run (JAX_COMPILATION_CACHE_DIR says where), so a second
run is several times faster than the first.
"""

import gc
import os
from importlib import metadata
from pathlib import Path

import pytest

gc.set_threshold(100_000, 20, 20)  # a third of the time of tracing a network is Python's looking for garbage otherwise

FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path("~/.cache/fedmetanas_jax/tests").expanduser()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # a run's process makes ninety small programs

# Of few tests but long: begun last, one process would wait for the other.
LONG = (
    "test_interruption.py", "test_hosts.py", "test_stopping.py", "test_search_quality.py", "test_contract.py",
    "test_fednas.py",
)  # fmt: skip

# Bits of different programs are compared: of a reply alone and in a round, of other devices, processes or places.
EXACT = (
    "test_architecture.py", "test_contract.py", "test_deploy.py", "test_deploy_secure.py", "test_fedrlnas.py",
    "test_flower_app.py", "test_hosts.py", "test_round.py",
)  # fmt: skip
EMITTERS = "xla_cpu_use_fusion_emitters"  # jaxlib 0.11 has them alone, and refuses the flag
HAS_A_CHOICE = tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11)


@pytest.fixture(scope="module", autouse=HAS_A_CHOICE)
def kernels(request):
    """Which kernels a file's programs have: those compiled in this process, and those of its children."""
    from jax._src import compiler  # there is no public way to compile all programs so and, later, otherwise

    exact, options = request.path.name in EXACT, compiler.get_compile_options

    def chosen(*given, env_options_overrides=None, **more):
        return options(*given, env_options_overrides={EMITTERS: exact} | (env_options_overrides or {}), **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --{EMITTERS}={str(exact).lower()}")
        patch.setattr(compiler, "get_compile_options", chosen)
        yield


def pytest_collection_modifyitems(items):
    """Files that take long come first."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
