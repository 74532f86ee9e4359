"""Compiles a round for a GPU that is not there, and counts what XLA made of it. Nothing is run: no seconds a round.

    pip install '.[deviceless]'                 # the CUDA compiler of JAX; no GPU, no driver
    python experiments/deviceless.py            # FedMetaNAS at full size for an H200, three formulations
    python experiments/deviceless.py --kernels  # the Pallas kernels alone, at the sizes of its cells

XLA compiles for a described GPU as it would for one at hand, but for choosing among matrix-product kernels by
timing them. So kernels, conditionals (for which a GPU may have to ask the host), bytes and memory are those of the
real program but for those products, its compile time is that of this machine, and "memory time" is a bound: unless
caches serve it, a round cannot take less than its bytes over the bandwidth of the data sheet.

Leaves results/deviceless-<gpu>.json and .md, written after every program; what is there with the same versions is not
compiled again. Exit status: 0 done, 1 a program did not compile, 2 the request made no sense.
"""

import argparse
import json
import os
import sys
import time
from itertools import product
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # what little is computed, such as initial weights

import jax
import jax.numpy as jnp
from timing import hlo, results
from timing.cases import FULL_ROUND, Case, Variant
from timing.ours import make_round

from fedmetanas_jax.models import fused
from fedmetanas_jax.networks import WAYS

# What XLA asks of a GPU when it starts, as text of its GpuTargetConfigProto; figures of the data sheets.
DESCRIPTION = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  clock_rate_ghz: 1.98 l2_cache_size: 52428800
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
}}
platform_name: "CUDA" device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 }}
"""
GPUS = {
    "h200": {"name": "NVIDIA H200", "bandwidth": 4_800_000_000_000, "memory": 150_121_545_728},
    "h100": {"name": "NVIDIA H100 80GB HBM3", "bandwidth": 3_352_320_000_000, "memory": 84_929_347_584},
}
FORMULATIONS = [name for name in WAYS if name != "auto"]  # which would be what suits the CPU that compiles
HEAD = (
    "plan", "formulation", "clients at once", "kernels a step", "conditionals a step", "GB a step",
    "memory time, s a round", "temporaries, GB", "trace + compile, s",
)  # fmt: skip


def described(gpu: str):
    """The GPU as a device to compile for. RuntimeError where JAX has no CUDA compiler."""
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology="1x1x1", target_config=DESCRIPTION.format(**GPUS[gpu])
        )
    except (NotImplementedError, RuntimeError) as error:
        raise RuntimeError(f"JAX cannot compile for CUDA ({error}); pip install '.[deviceless]'") from None
    return found.devices[0]


def compiled(device, case: Case, variant: Variant) -> dict:
    """What the program of a round is like: counts of one step of all clients at once, bytes and seconds."""
    step, *given = make_round(case, variant, seed=1)
    where = jax.sharding.SingleDeviceSharding(device)
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), (given[0], *given[1]))
    start = time.perf_counter()
    lowered = step.lower(*given)
    traced = time.perf_counter()
    program = lowered.compile()
    seconds = {"trace_seconds": traced - start, "compile_seconds": time.perf_counter() - traced}
    found = hlo.traffic(program.as_text())
    steps = case.tasks * (case.M + 1) * (case.clients // variant.at_once)
    if found.unknown_loops:
        raise RuntimeError(f"{found.unknown_loops} loops run for a number of times that the compiler does not know")
    return seconds | {
        "kernels": found.kernels / steps,
        "conditionals": found.conditionals / steps,
        "bytes": found.bytes / steps,
        "bytes_a_round": found.bytes * case.round_tasks / case.tasks,
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    }


def kernels(device) -> None:
    """Compiles the Pallas kernels of every kind of layer to machine code; prints for how long."""
    where = jax.sharding.SingleDeviceSharding(device)

    def value(*given):
        return fused.relu_depthwise_pointwise(*given)[0].astype(jnp.float32).sum()

    for (channels, image), k in product(((16, 32), (32, 16), (64, 8)), (3, 5)):
        shapes = ((channels, image, image, 32), jnp.bfloat16), ((channels, k, k), "f4"), ((channels,) * 2, "f4")
        given = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in shapes]
        for name, function in (("value", value), ("gradients", jax.grad(value, (0, 1, 2)))):
            lowered, start = jax.jit(function).lower(*given), time.perf_counter()
            lowered.compile()
            seconds = time.perf_counter() - start
            print(f"C = {channels}, {image} x {image}, {k} x {k}, {name}: {seconds:.1f} s", flush=True)


def page(document: dict) -> str:
    """The record as Markdown."""
    bandwidth = next(gpu["bandwidth"] for gpu in GPUS.values() if gpu["name"] == document["hardware"])
    lines = [f"# Rounds compiled for one {document['hardware']}, not run", ""]
    lines += [
        "A step is one batch of each client that is computed at once, forward and backward, with its share of the "
        "optimizers and of the averaging. For conditionals a GPU may have to ask the host. Bytes are "
        f"operands and results in the optimized HLO; memory time is those of a round over {bandwidth / 1e12:.1f} "
        "TB/s, which no round can be faster than unless caches serve it. Compiled on a CPU: matrix "
        "products were not tuned.",
        "",
    ]
    for size in dict.fromkeys(json.dumps(entry["size"]) for entry in document["results"]):
        here = [entry for entry in document["results"] if json.dumps(entry["size"]) == size]
        lines.append("- " + ", ".join(f"{k} {v}" for k, v in json.loads(size).items()))
        versions = dict.fromkeys(json.dumps(entry["versions"]) for entry in here)
        lines += ["- " + ", ".join(f"{k} {v}" for k, v in json.loads(text).items()) for text in versions]
        lines += [f"- `{command}`" for command in dict.fromkeys(entry["command"] for entry in here)]
        lines += ["", _row(HEAD), _row(["---"] * len(HEAD))]
        for e in here:
            lines.append(
                _row([
                    e["plan"], e["way"], e["at_once"], f"{e['kernels']:.0f}", f"{e['conditionals']:.0f}",
                    f"{e['bytes'] / 1e9:.1f}", f"{e['bytes_a_round'] / bandwidth:.2f}",
                    f"{e['temporary_bytes'] / 1e9:.2f}", f"{e['trace_seconds']:.0f} + {e['compile_seconds']:.0f}",
                ])
            )  # fmt: skip
        lines.append("")
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message):
        self.exit(2, f"error: {message}\n")


def _row(cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line as values; argv[0] is the program. Ends the process with 2 where it makes no sense."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--plans", default="full,terminal")
    parser.add_argument("--ways", default="batched,batched-remat,remat", help="of: " + ", ".join(FORMULATIONS))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    for name, value in (("clients", 5), ("at_once", 5), ("cells", 8), ("width", 16), ("nodes", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--kernels", action="store_true", help="compile the Pallas kernels alone, and only say so")
    parser.add_argument("--out", type=Path, help="default results/deviceless-<gpu>.json")
    asked = parser.parse_args(argv[1:])
    for name in ("clients", "at_once", "cells", "width", "nodes"):
        if getattr(asked, name) < 1:
            parser.error(f"--{name}={getattr(asked, name)} must be at least 1")
    if asked.clients % asked.at_once:
        parser.error(f"--clients={asked.clients} is no multiple of --at_once={asked.at_once}")
    asked.ways, asked.plans = asked.ways.split(","), asked.plans.split(",")
    for name, allowed in (("ways", FORMULATIONS), ("plans", ["full", "terminal"])):
        for value in getattr(asked, name):
            if value not in allowed:
                parser.error(f"--{name} holds '{value}'; there are {', '.join(allowed)}")
    return asked


def run(asked: argparse.Namespace, command: str) -> int:
    """Compiles what is asked for and not yet there -> the exit status."""
    device = described(asked.gpu)
    if asked.kernels:
        kernels(device)
        return 0
    path = asked.out or Path("results") / f"deviceless-{asked.gpu}.json"
    document = results.load(path, GPUS[asked.gpu]["name"])
    network = {"width": asked.width, "cells": asked.cells, "nodes": asked.nodes, "dtype": asked.dtype}
    size, failed = network | {"clients": asked.clients, "batch": 32}, 0
    for plan, way in product(asked.plans, asked.ways):
        work = {"plan": plan, "way": way, "at_once": asked.at_once, "size": size}
        entry = work | {"versions": results.versions()}
        if any(all(known[k] == entry[k] for k in entry) for known in document["results"]):
            print(f"{plan} {way}: already there")
            continue
        case = Case("deviceless", asked.clients, 9, FULL_ROUND, (), plan=plan, **network)
        try:
            found = compiled(device, case, Variant("ours", asked.at_once, way=way))
        except RuntimeError as error:
            print(f"error: {plan} {way}: {' '.join(str(error).split())[:500]}", file=sys.stderr)
            failed = 1
            continue
        document["results"] = [known for known in document["results"] if any(known[k] != work[k] for k in work)]
        document["results"].append(entry | {"command": command} | found)
        results.write(path, document, page(document))
        print(
            f"{plan} {way}: {found['kernels']:.0f} kernels, {found['conditionals']:.0f} conditionals and "
            f"{found['bytes'] / 1e9:.1f} GB a step, {found['temporary_bytes'] / 1e9:.2f} GB of temporaries, compiled "
            f"in {found['compile_seconds']:.0f} s",
            flush=True,
        )
    return failed


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""
    asked = parse(argv)
    try:
        return run(asked, " ".join(["python experiments/deviceless.py", *argv[1:]]))
    except (RuntimeError, results.ResultsError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
