"""The PyTorch side of a timing: the same round, one client after another."""

import time
from collections.abc import Iterator
from functools import partial

import torch
from torch_bench.client import Batch, Task, rates_at
from torch_bench.relaxation import Alpha, gumbel
from torch_bench.server import federated_round
from torch_bench.supernet import Supernet

from timing import memory
from timing.cases import ROUND, ROUNDS, Case, Variant, images, plan_and_mask


class Rival:
    """A network that is built (and compiled) once and trained as often as asked."""

    def __init__(self, case: Case, variant: Variant, seed: int):
        self.case = case
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(seed)
        start = time.perf_counter()
        plan, op, pair = plan_and_mask(case, seed)
        self.layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        size = {"width": case.width, "length": case.cells, "nodes": case.nodes}
        one = (0.5,) * case.image[2]
        net = Supernet(channels=case.image[2], classes=case.classes, mean=one, std=one, plan=plan, **size)
        self.net = net.to(self.device, memory_format=self.layout)
        self.mask = Alpha(*(torch.from_numpy(x).to(self.device) for x in (op, pair)))
        self.alpha = Alpha(*(1e-3 * torch.randn(x.shape, device=self.device) for x in self.mask))
        image, label = images(case, seed)
        self.image = torch.from_numpy(image).to(self.device).permute(0, 1, 4, 2, 3)
        self.label = torch.from_numpy(label).long().to(self.device)
        autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=case.dtype == "bfloat16")
        self.how = {"autocast": autocast, "forward": torch.compile(net) if variant.compiled else net}
        self.figures = {"build_seconds": time.perf_counter() - start}
        # One task of one client touches everything there is; with torch.compile it compiles.
        self.figures["first_run_seconds"] = self.run(clients=1, tasks=1)[0]
        self.forgotten = memory.forget_peak()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def tasks(self, client: int, count: int) -> Iterator[Task]:
        """`count` tasks of shuffled rows with fresh noise, each made when it is asked for."""
        batch = self.case.batch
        order = torch.randperm(self.image.shape[1], device=self.device)
        for rows in order.split(2 * batch)[:count]:
            seen = self.image[client, rows].contiguous(memory_format=self.layout)
            label = self.label[client, rows]
            halves = (Batch(seen[half], label[half]) for half in (slice(0, batch), slice(batch, None)))
            draws = [Alpha(*(gumbel(x.shape, device=self.device) for x in self.alpha)) for _ in range(self.case.M + 1)]
            yield Task(*halves, draws)

    def run(self, clients: int | None = None, tasks: int | None = None) -> tuple[float, float]:
        """One round, or a part of it -> (seconds, mean query loss)."""
        work = [self.tasks(k, tasks or self.case.tasks) for k in range(clients or self.case.clients)]
        rates = rates_at(ROUND, ROUNDS, self.case.M)
        self.wait()
        start = time.perf_counter()
        self.alpha, loss = federated_round(self.net, self.alpha, self.mask, work, rates, **self.how)
        self.wait()
        return time.perf_counter() - start, loss.item()

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def report(self) -> dict:
        """Memory, and on a GPU the kernels of a step."""
        on_gpu = self.device.type == "cuda"
        return self.figures | {
            "device_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
            "device_peak_reason": None if on_gpu else "PyTorch does not measure it on a CPU",
            "host_peak_bytes": memory.host_peak(),
            "host_peak_running_bytes": memory.peak_since_forgotten() if self.forgotten else None,
            "bytes_per_round": None,
            "bytes_source": "PyTorch has no cost analysis",
            "kernels_per_step": self.kernels() if on_gpu else None,
            "kernels_reason": "counted by torch.profiler over one task" if on_gpu else "a CPU launches no kernels",
            "threads": torch.get_num_threads(),
        }

    def kernels(self) -> float:
        """Kernels of one gradient step, copies included, optimizers and averaging in proportion."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.run(clients=1, tasks=1)
        on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return len(on_device) / (self.case.M + 1)


def describe() -> dict:
    """Versions and threads of this side."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "cuda": torch.version.cuda}
