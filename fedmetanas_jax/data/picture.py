"""A picture of a partition: who holds how much of what."""

from pathlib import Path

import numpy as np

from fedmetanas_jax.options import brief

LONGEST = 20  # characters of a name beside the axis; more would leave the picture no room


def draw(histogram: np.ndarray, label_names: tuple[str, ...], path: Path) -> None:
    """Writes `histogram` [clients, classes] as shares of each client's images, to a .png or .svg."""
    figure_of(histogram, label_names).savefig(path, dpi=120)


def figure_of(histogram: np.ndarray, label_names: tuple[str, ...]):
    """The picture as a matplotlib figure."""
    from matplotlib.figure import Figure  # slow to import; not pyplot: no window, no global state

    clients, classes = histogram.shape
    names = legible(label_names) if classes <= 30 else []  # more than that cannot be read side by side
    height = 2 + 0.12 * clients + 0.09 * max(0, max(map(len, names), default=0) - 8)
    figure = Figure(figsize=(min(3 + 0.35 * classes, 12), min(height, 12)), layout="constrained")
    axes = figure.subplots()
    share = histogram / histogram.sum(axis=1, keepdims=True)
    picture = axes.imshow(share, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="class", ylabel="client", title=f"{clients} clients, {classes} classes")
    if names:  # which are anybody's: a dollar in them begins no formula
        axes.set_xticks(range(classes), names, rotation=90, parse_math=False)
    figure.colorbar(picture, label="share of the client's images")
    return figure


def legible(label_names: tuple[str, ...]) -> list[str]:
    """The names, cut where they are long; 'label 3' in place of an empty one, and of one with a character that the font
    lacks, which would be drawn as a box."""
    from matplotlib import font_manager

    there = font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap()
    names = [brief(name, LONGEST) for name in label_names]
    return [
        name if name.strip() and all(ord(letter) in there for letter in name) else f"label {label}"
        for label, name in enumerate(names)
    ]
