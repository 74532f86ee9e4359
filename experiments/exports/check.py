"""What an export is worth: read back from its files, asked about the test images, and compared with the network."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from quality import tables

from fedmetanas_jax.network import Network

REPEATS, SECONDS = 200, 2.0  # of one image, for its latency: as often as this, but no longer


def answers(network: Network, images: np.ndarray) -> tuple[np.ndarray, dict]:
    """(logits of all images, the milliseconds that one image takes, from uint8 to its label, median and least)."""
    logits = network.logits(images)
    for _ in range(3):
        network.predict(images[0])
    seconds, begun = [], time.perf_counter()
    while not seconds or (len(seconds) < REPEATS and time.perf_counter() < begun + SECONDS):
        before = time.perf_counter()
        network.predict(images[0])
        seconds.append(time.perf_counter() - before)
    found = {"milliseconds_one_image": 1e3 * float(np.median(seconds)), "milliseconds_at_least": 1e3 * min(seconds)}
    return logits, found


def compare(network: Network, run: Callable, expected: np.ndarray, images: np.ndarray, files: list[Path]) -> dict:
    """The figures of one export; run: images -> logits is what was read back."""
    logits, latency = answers(network._replace(apply=run), images)
    return {
        "files": [path.name for path in files],
        "bytes": sum(path.stat().st_size for path in files),
        "images": len(images),
        "labels_equal": int(np.sum(logits.argmax(-1) == expected.argmax(-1))),
        "largest_logit_difference": float(np.max(np.abs(logits - expected), initial=0)),
    } | latency


def table(formats: dict[str, dict]) -> str:
    """The figures of all formats, for people."""
    head = ["format", "files", "bytes", "labels equal", "largest logit difference", "ms an image", "at least", "in"]
    rows = [
        [
            name, " ".join(one["files"]), f"{one['bytes']:,}", f"{one['labels_equal']} of {one['images']}",
            f"{one['largest_logit_difference']:.1e}", f"{one['milliseconds_one_image']:.2f}",
            f"{one['milliseconds_at_least']:.2f}", one["runtime"],
        ]
        for name, one in formats.items()
    ]  # fmt: skip
    return tables.table(head, rows)
