"""The page of a study: whole HTML that loads nothing, says what was measured, and is drawn right.

One test looks at it in a browser: Chromium or Chrome from PATH, or the executable that FEDMETANAS_CHROMIUM names.
"""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report
from PIL import Image
from study import page, page_curves, page_pictures

from fedmetanas_jax.options import UsageError

HOSTILE = "</script><b onmouseover=\"alert('1')\">&evil"
FACTS = {
    "command": "python experiments/report.py s", "made": "2026-01-01", "versions": {"python": "3.11"},
    "counts": {"done": 2, "failed": 1, "left": 3},
}  # fmt: skip
VOID = {"meta", "link", "img", "line", "circle"}


def run(seed=1, row="fednas", *, rounds=(1, 2, 3, 4), column="digits:dir0.1", server=True, **config):
    """A finished run: server accuracy (seed + round) / 10; what comes after round 2 is trained anew."""
    curve = {name: [10.0 * number for number in rounds] for name in ("seconds", "macs", "bytes", "image_gradients")}
    curve |= {"round": [*rounds], "phase": [int(number > 2) for number in rounds]}
    curve |= {"server": [(seed + number) / 10 if server else None for number in rounds], "local": [0.5] * len(rounds)}
    events = [
        {"round": 1, "before": 0.5, "after": 0.4, "ops_alive": 8.0, "put_off": False},
        {"round": 2, "ops_alive": None, "put_off": True},
    ]
    return {
        "name": f"{row}-{seed}", "row": row, "column": column, "seed": seed, "curve": curve, "events": events,
        "figures": {"server": 0.5, "local": None, "seconds": 40.0}, "workdir": f"runs/{seed}", "versions": {"jax": "1"},
        "genotype": {"normal": [[["skip_connect", 0], ["none", 2]]]},
        "config": {"method": row, "rounds": 4, "seed": seed, "options": {"M": 3}} | config,
    }  # fmt: skip


def document(row="fednas", label="FedNAS", values=None):
    """A table of one cell: a seed of three, unless `values` says other."""
    values = {1: 0.8} if values is None else values
    measured = {"mean": 0.8, "std": 0.01 if len(values) > 1 else None, "values": values} if values else None
    missing = [seed for seed in (1, 2, 3) if seed not in map(int, values)]
    cell = {"row": row, "column": "digits:dir0.1", "seeds": [*values], "missing": missing}
    cell |= {"figures": {"server": measured, "seconds": None}, "paper": {"server": 79.31, "std": 5.23, "hours": 19.47}}
    pair = {"column": "digits:dir0.1", "figure": "server", "row": row, "against": row, "n": 5, "mean": 0.02}
    return {
        "table": 2, "title": "Searches", "scale": "minutes", "about": "Small.", "command": "python tables.py",
        "overrides": {},
        "columns": [{"key": "digits:dir0.1", "head": "digits, Dirichlet 0.1"}], "figures": ["server"], "versions": [],
        "rows": [{"row": row, "label": label}], "cells": [cell | {"difference": {"server": 0.69} if values else None}],
        "pairs": [
            pair | {"low": 0.01, "high": 0.03, "verdict": "better"},
            pair | {"n": 1, "low": None, "high": None, "verdict": "too few seeds"},
        ] if values else [],
    }  # fmt: skip


class Read(HTMLParser):
    """A page's elements and text; fails where an element is not closed in its turn."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts, self.scripts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        (self.scripts if inside in ("script", "style") else self.texts).append(data)

    def data(self) -> dict:
        return next(json.loads(text) for text in self.scripts if text.startswith("{"))


def test_it_is_whole_and_loads_nothing():
    read = Read(page.html("A study", [document()], [run(1), run(2)], FACTS))
    for _, attributes in read.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert not any("url(" in text or "@import" in text for text in read.scripts)
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    links = [attributes["href"][1:] for tag, attributes in read.elements if tag == "a"]
    assert len(set(ids)) == len(ids)
    assert {*links} <= {*ids}
    assert {"tables", "curves", "events", "runs", "versions"} <= {*links}
    assert "Runs: 2 done, 1 failed, 3 left" in read.text


def test_a_cell_has_its_seeds_and_the_papers_numbers():
    read = Read(page.html("A study", [document()], [run()], FACTS))
    assert "1 of 3 80.0 paper 79.31 ± 5.23 ours +0.7; paper 19.47 h" in read.text
    titles = [attributes["title"] for _, attributes in read.elements if "title" in attributes]
    assert titles[:2] == ["seed 1; missing: 2, 3", "seed 1: 80.0"]
    assert "1 +2.0 - · too few seeds" in read.text
    assert "5 +2.0 +1.0 to +3.0 ▲ better" in read.text
    more = Read(page.html("A study", [document(values={"1": 0.81, "2": 0.79, "3": 0.8})], [], FACTS))
    assert "80.0 ± 1.0 paper" in more.text


def test_what_a_study_calls_its_things_is_text():
    one = run(row=HOSTILE, column=HOSTILE) | {"workdir": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    known = document(label=f"{HOSTILE} too") | {"title": HOSTILE, "about": HOSTILE, "command": HOSTILE}
    facts = FACTS | {"command": HOSTILE, "versions": {"python": HOSTILE}}
    text = page.html(HOSTILE, [known], [one, run()], facts)
    read = Read(text)
    assert "b" not in {tag for tag, _ in read.elements}
    assert not any(name.startswith("on") for _, attributes in read.elements for name in attributes)
    assert text.count("</script>") == 2
    assert {*read.data()["lines"]} == {HOSTILE, f"{HOSTILE} too"}


def test_an_empty_study_says_so():
    read = Read(page.html("Empty", [document(values={})], [], FACTS))
    assert page.EMPTY in read.text
    assert "0 of 3 - paper 79.31" in read.text
    assert read.data() == {"lines": [], "charts": [], "events": []}
    assert page.EMPTY in Read(page.html("Empty", [], [], FACTS)).text


def test_curves_are_means_over_the_rounds_of_all_seeds():
    first, second = page_curves.segments([run(1), run(3, rounds=(1, 2, 4))], "server")
    assert (first["phase"], second["phase"]) == (0, 1)
    assert first["seeds"] == [1, 3]
    assert [point[0] for point in first["points"] + second["points"]] == [1, 2, 4]
    assert first["points"][0] == [1, 10, 10, 10, 10, 0.3, 0.14142]


def test_curves_of_one_seed_of_one_point_and_of_none():
    (one,) = page_curves.segments([run(1, rounds=(2,))], "server")
    assert one == {"seeds": [1], "phase": 0, "points": [[2, 20, 20, 20, 20, 0.3, None]]}
    assert page_curves.segments([run(server=False), run(rounds=())], "server") == []
    apart = page_curves.segments([run(1, rounds=(1,)), run(2, rounds=(2,))], "server")
    assert [one["seeds"] for one in apart] == [[1], [2]]


def test_a_row_of_two_configs_has_two_lines():
    runs = [run(1), run(2, rounds=(1, 2)), run(2, options={"M": 0}), run(3, compute="bfloat16"), run(4, at_once=2)]
    found = page_curves.lines(runs, {"fednas": "FedNAS"})
    assert {name: [one["seed"] for one in of] for name, of in found.items()} == {
        "FedNAS": [1, 2, 4],  # how a run is run makes no other line of it
        "FedNAS, options.M=0": [2],
        "FedNAS, compute=bfloat16": [3],
    }


def test_pictures_are_small_and_of_three_seeds(tmp_path):
    runs = [run(seed) | {"workdir": str(tmp_path / str(seed))} for seed in (1, 2, 3, 4)]
    for one in runs:
        Path(one["workdir"]).mkdir()
        Image.new("RGBA", (1800, 20)).save(Path(one["workdir"]) / "cells.png")
    (tmp_path / "2" / "cells.png").write_bytes(b"damaged")
    read = Read(page.html("A study", [], runs, FACTS))
    images = [attributes for tag, attributes in read.elements if tag == "img"]
    assert [(image["width"], image["height"]) for image in images] == [("900", "10")] * 2
    assert images[0]["alt"] == "normal, node 0: skip_connect of c_{k-2}, none of node 0"
    full = page_pictures.Pictures({"digits": {"FedNAS": runs}, "mnist": {"FedNAS": runs}}, room=1)
    assert full.cells.count("<img") == 1
    assert full.left_out == 5


def test_the_study_may_be_the_first_argument(tmp_path):
    for arguments in ([f"{tmp_path}/s", "--title=T"], ["--title=T", f"--study={tmp_path}/s"]):
        asked = report.parse(["report.py", *arguments])
        assert (asked["study"], asked["out"]) == (tmp_path / "s", tmp_path / "s" / "report.html")
    assert report.parse(["report.py", "s"])["title"] == "Study s"
    with pytest.raises(UsageError, match="which study"):
        report.parse(["report.py"])
    with pytest.raises(UsageError, match="unexpected argument 'b'"):
        report.parse(["report.py", "a", "b"])


CHROMIUMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
# Opens what is closed, points at the end of a curve, hides all methods; leaves in the page what came of it.
TOUCH = """<script>
for (const one of document.querySelectorAll("details")) one.open = true;
setTimeout(() => {
  const box = document.querySelector(".chart svg"), curve = box.querySelector(".curve").getBoundingClientRect();
  box.dispatchEvent(new PointerEvent("pointermove", { clientX: curve.right, clientY: curve.top }));
  const found = document.documentElement.dataset;
  found.tip = document.getElementById("tip").textContent;
  found.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  for (const key of document.querySelectorAll(".key")) key.click();
  found.hidden = document.querySelector(".chart svg").textContent;
}, 50);
</script>"""


def test_a_browser_draws_it(tmp_path):
    browser = os.environ.get("FEDMETANAS_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome in PATH; FEDMETANAS_CHROMIUM may name one")
    alone = run(1, "perfedrlnas", server=False)
    runs = [run(1), run(2), alone, run(1, HOSTILE, rounds=(4,)), run(1, column="mnist:tau4", rounds=())]
    path = tmp_path / "page.html"
    path.write_text(page.html("A study", [document()], runs, FACTS) + TOUCH)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=1000"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=390,844"]

    def browse(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run([browser, *options, *more, path.as_uri()], capture_output=True, text=True, timeout=60)

    done = browse("--dump-dom")
    assert "CONSOLE" not in done.stderr
    found = dict(re.findall(r' data-(tip|overflow|hidden)="([^"]*)"', done.stdout))
    assert found["overflow"] == "0"
    assert found["tip"].split("\n") == ["FedNAS", "round 2", "server accuracy 35.0 % ± 7.1", "seeds 1, 2", "training 1"]
    assert "All methods are hidden." in found["hidden"]
    assert "Prune events" in done.stdout
    assert done.stdout.count('class="events"') == len(runs)
    picture = tmp_path / "page.png"
    browse(f"--screenshot={picture}")
    with Image.open(picture) as image:
        assert image.width == 390
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50  # there is something on it
