"""A picture of a partition: who holds how much of what."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # not pyplot: no window, no global state


def draw(histogram: np.ndarray, label_names: tuple[str, ...], path: Path) -> None:
    """Writes `histogram` [clients, classes] as shares of each client's images, to a .png or .svg."""
    clients, classes = histogram.shape
    figure = Figure(figsize=(min(3 + 0.35 * classes, 12), min(2 + 0.12 * clients, 12)), layout="constrained")
    axes = figure.subplots()
    share = histogram / histogram.sum(axis=1, keepdims=True)
    picture = axes.imshow(share, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="class", ylabel="client", title=f"{clients} clients, {classes} classes")
    if classes <= 30:  # more names than that cannot be read side by side
        axes.set_xticks(range(classes), label_names, rotation=90)
    figure.colorbar(picture, label="share of the client's images")
    figure.savefig(path, dpi=120)
