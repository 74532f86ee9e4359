"""The documents: links lead somewhere, what the code refers to is there, and the README stays short."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHODS, DECISIONS = ROOT / "docs/methods.md", ROOT / "docs/decisions.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = sorted(path for folder in ("fedmetanas_jax", "tests", "experiments") for path in (ROOT / folder).rglob("*.py"))
LONGEST_README = 9_000

LINK = re.compile(r"\]\(([^()\s]+)\)")
SECTION = re.compile(
    r"methods\s+(?:#\s*)?sections?\s+(?:#\s*)?(\d+(?:\.\d+)?(?:(?:\s*,\s*|\s+(?:and|to)\s+)\d+(?:\.\d+)?)*)"
)
DECISION = re.compile(r"\bD-(\d+)(?:\s+to\s+D-(\d+))?")


@cache
def prose(page: Path) -> str:
    """The page, without fenced blocks and code in backticks, each line where it was."""
    text = re.sub(r"^```.*?^```$", lambda block: "\n" * block[0].count("\n"), page.read_text(), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


@cache
def headings(page: Path) -> list[str]:
    fenceless = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    return re.findall(r"^#{1,6} (.+?)\s*$", fenceless, flags=re.M)


def anchors(titles: list[str]) -> set[str]:
    """What GitHub calls headings: lower case, punctuation dropped, spaces to hyphens; repetitions are numbered."""
    found, seen = set(), {}
    for title in titles:
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        count = seen[name] = seen.get(name, -1) + 1
        found.add(f"{name}-{count}" if count else name)
    return found


def mentions(pattern: re.Pattern, text: str):
    """(line, match) of every match."""
    return [(text.count("\n", 0, match.start()) + 1, match) for match in pattern.finditer(text)]


def broken_link(page: Path, target: str) -> bool:
    if re.match(r"[a-z]+:", target):  # https:, mailto:
        return False
    file, _, anchor = target.partition("#")
    path = (page.parent / file).resolve() if file else page
    return not path.exists() or bool(anchor and anchor not in anchors(headings(path)))


def numbers(match: re.Match) -> range:
    """The decisions of "D-7" or of "D-12 to D-14"."""
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def report(wrong: list) -> str:
    return "\n".join(f"{path.relative_to(ROOT)}:{line}: {what}" for path, line, what in wrong)


def test_links_and_anchors_of_the_pages_resolve():
    wrong = [
        (page, line, f"no {match[1]}")
        for page in PAGES
        for line, match in mentions(LINK, prose(page))
        if broken_link(page, match[1])
    ]
    assert not wrong, report(wrong)


def test_sections_of_the_methods_that_are_mentioned_exist():
    there = {title.split()[0].rstrip(".") for title in headings(METHODS)}
    wrong = [
        (path, line, f"docs/methods.md has no section {number}")
        for path in CODE + PAGES
        for line, match in mentions(SECTION, path.read_text())
        for number in re.findall(r"\d+(?:\.\d+)?", match[1])
        if number not in there
    ]
    assert not wrong, report(wrong)


def test_decisions_that_are_mentioned_exist():
    starts = [DECISION.match(title) for title in headings(DECISIONS)]
    there = {number for match in starts if match for number in numbers(match)}
    wrong = [
        (path, line, f"docs/decisions.md has no D-{number}")
        for path in CODE + PAGES
        for line, match in mentions(DECISION, path.read_text())
        for number in numbers(match)
        if number not in there
    ]
    assert not wrong, report(wrong)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= LONGEST_README


@pytest.mark.parametrize(
    ("title", "anchor"),
    [
        ("6.2 Pruning in FedMetaNAS", "62-pruning-in-fedmetanas"),
        ("D-34 `none` in the result", "d-34-none-in-the-result"),
        ("Equations: how they are read", "equations-how-they-are-read"),
    ],
)
def test_anchors_are_github_s(title, anchor):
    assert anchors([title, title]) == {anchor, f"{anchor}-1"}


def test_a_broken_link_and_a_mention_are_found():
    assert broken_link(METHODS, "no_such_page.md")
    assert broken_link(METHODS, "decisions.md#no-such-heading")
    assert not broken_link(METHODS, "decisions.md#d-7-tasks-of-an-epoch")
    assert [match[1] for _, match in mentions(SECTION, "methods sections 2 and 4; (methods\n# section 6.2)")] == [
        "2 and 4", "6.2",
    ]  # fmt: skip
    assert [list(numbers(match)) for _, match in mentions(DECISION, "D-7, D-12 to D-14")] == [[7], [12, 13, 14]]


def test_the_library_example_runs(tmp_path):
    readme = (ROOT / "README.md").read_text()
    example = re.search(r"<!-- library example -->\n```python\n(.*?)```", readme, flags=re.S)[1]
    assert len(example.splitlines()) <= 25
    # Without the local accuracies at the end, whose programs take as long to compile as all the rest.
    example = example.replace("workdir=", "final_adapt=False, workdir=", 1)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("accuracy ")]
    assert 0.3 < float(said[0].removeprefix("accuracy ")) <= 1  # chance is 0.1
