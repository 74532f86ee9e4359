"""Pictures of runs on the page: the cells that were found and how the data were split, made small."""

import base64
import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from study.page_text import details, element, escape

SEEDS = 3  # so many of a row and a column have their pictures on the page
WIDEST, COLOURS = 900, 64  # of a picture, in pixels and in its palette


class Pictures:
    """The pictures of a study, as many as there is room for: first all splits, then the cells of every line's first
    seed, then of its second. groups: {head of a column: {label of a line: its runs}}."""

    def __init__(self, groups: dict[str, dict[str, list[dict]]], room: int):
        self.left_out = 0  # for want of room
        self._room = room
        self.splits, self.cells = self._splits(groups), self._cells(groups)

    def _splits(self, groups: dict[str, dict[str, list[dict]]]) -> str:
        """How the data were split: the same for every method, so once for a column and a seed."""
        parts = []
        for column, lines in groups.items():
            found: dict[int, str] = {}
            for run in sorted((run for runs in lines.values() for run in runs), key=lambda run: run["seed"]):
                if run["seed"] not in found and len(found) < SEEDS:
                    alt = f"How many training images of each class each client has; {column}, seed {run['seed']}"
                    if image := self._image(Path(run["workdir"]) / "partition.png", alt):
                        found[run["seed"]] = details(f"seed {run['seed']}", image)
            parts.append(_group(column, [*found.values()]))
        return "".join(parts)

    def _cells(self, groups: dict[str, dict[str, list[dict]]]) -> str:
        """What the searches found."""
        found: dict[str, dict[tuple[str, int], str]] = {column: {} for column in groups}
        for place in range(SEEDS):
            for column, lines in groups.items():
                for label, runs in lines.items():
                    for run in runs[place : place + 1]:
                        words = _described(run["genotype"])
                        if image := self._image(Path(run["workdir"]) / "cells.png", words or "The cells"):
                            summary = escape(f"{label}, seed {run['seed']}")
                            one = details(summary, image, element("pre", escape(words)) if words else "")
                            found[column][label, place] = one
        order = {
            column: [(label, place) for label in lines for place in range(SEEDS)] for column, lines in groups.items()
        }
        return "".join(_group(column, [of[key] for key in order[column] if key in of]) for column, of in found.items())

    def _image(self, path: Path, alt: str) -> str | None:
        """A figure that carries its picture; None where there is none or no room for it. A damaged one counts as none:
        the numbers do not depend on it."""
        if self._room <= 0:
            self.left_out += path.exists()
            return None
        try:
            with Image.open(path) as found:
                data, (width, height) = _small(found)
        except (OSError, UnidentifiedImageError, SyntaxError):
            return None
        self._room -= len(data)
        source = f"data:image/png;base64,{data}"
        how = {"width": width, "height": height, "loading": "lazy", "decoding": "async"}
        return element("figure", element("img", src=source, alt=alt, **how))


def _group(column: str, pictures: list[str]) -> str:
    grid = element("div", *pictures, class_="pictures")
    return element("h3", escape(column)) + grid if pictures else ""


def _small(image: Image.Image) -> tuple[str, tuple[int, int]]:
    """As base64 of a PNG, and its size."""
    white = Image.new("RGB", image.size, "white")
    picture = image.convert("RGBA")
    white.paste(picture, mask=picture.getchannel("A"))
    if white.width > WIDEST:
        white = white.resize((WIDEST, round(white.height * WIDEST / white.width)), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    white.quantize(COLOURS).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode(), white.size


def _described(genotype: dict | None) -> str:
    """A genotype in words: each node with its operations and where they come from."""
    lines = []
    for cell, nodes in (genotype or {}).items():
        for place, edges in enumerate(nodes if isinstance(nodes, list) else ()):
            inputs = (f"{operation} of {_source(source)}" for operation, source in edges)
            lines.append(f"{cell}, node {place}: " + ", ".join(inputs))
    return "\n".join(lines)


def _source(place: int) -> str:
    return ("c_{k-2}", "c_{k-1}")[place] if place < 2 else f"node {place - 2}"
