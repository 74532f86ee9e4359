"""The PyTorch side of a timing: the same round, one client after another."""

import time
from collections.abc import Iterator
from functools import partial

import torch
from torch_bench.rounds import Batch, Task, federated_round, rates_at
from torch_bench.supernet import Alpha, Supernet, gumbel

from timing.cases import ROUND, ROUNDS, Case, Variant, images, plan_and_mask


class Side:
    """A network that is built (and compiled) once and trained as often as asked. warm: of no meaning here."""

    def __init__(self, case: Case, variant: Variant, seed: int, warm: bool):
        self.case = case
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(seed)
        plan, op, pair = plan_and_mask(case, seed)
        self.layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        size = {"width": case.width, "length": case.cells, "nodes": case.nodes}
        half = (0.5,) * case.image[2]
        net = Supernet(channels=case.image[2], classes=case.classes, mean=half, std=half, plan=plan, **size)
        self.net = net.to(self.device, memory_format=self.layout)
        self.mask = Alpha(*(torch.from_numpy(x).to(self.device) for x in (op, pair)))
        self.alpha = Alpha(*(1e-3 * torch.randn(x.shape, device=self.device) for x in self.mask))
        image, label = images(case, seed)
        self.image = torch.from_numpy(image).to(self.device).permute(0, 1, 4, 2, 3)
        self.label = torch.from_numpy(label).long().to(self.device)
        autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=case.dtype == "bfloat16")
        self.how = {"autocast": autocast, "forward": torch.compile(net) if variant.compiled else net}
        # One task of one client touches everything there is; with torch.compile it compiles.
        self.figures = {"first_run_seconds": self.run(clients=1, tasks=1)[0]}
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
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        self.alpha, loss = federated_round(self.net, self.alpha, self.mask, work, rates, **self.how)
        wait()
        return time.perf_counter() - start, loss.item()

    def report(self) -> dict:
        """Seconds of the first run, and the device's peak memory where PyTorch measures it."""
        on_gpu = self.device.type == "cuda"
        return self.figures | {
            "device_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
            "device_peak_reason": None if on_gpu else "PyTorch does not measure it on a CPU",
        }


def describe() -> dict:
    """Versions and threads of this side."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "cuda": torch.version.cuda}
