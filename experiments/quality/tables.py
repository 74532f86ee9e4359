"""The tables of a comparison of searches with networks drawn at random, in Markdown; accuracies in percent."""

import numpy as np

from quality.figures import PERCENT


def markdown(document: dict) -> str:
    """OUT.md of what OUT.json holds."""
    parts = _about(document) + _searches(document) + _networks(document["runs"]) + _runs(document["also"])
    return "\n\n".join(parts + _facts(document)) + "\n"


def _about(document: dict) -> list[str]:
    share = document["budget"]
    spent = "those of its whole search" if share == 1 else f"{share:g} of those of its search"
    images = " and ".join(sorted({str(run["test_images"]) for run in document["runs"]}))
    return [
        "# Is it a search?",
        f"What each search found, against {document['networks']} networks drawn uniformly from its space, the same for "
        "every search. All are trained from scratch by FedAvg in the search's own federation, for as many rounds as "
        f"make their multiply-adds {spent}. Accuracies are of the server's {images} test images, in percent.",
    ]  # fmt: skip


def _searches(document: dict) -> list[str]:
    head = [
        "search", "seed", "its own network", "percentile", "rank", "retrained", "percentile", "rank", "networks drawn",
        "mean +- std", "least", "median", "largest", "correlation of accuracy and multiply-adds",
    ]  # fmt: skip
    rows = []
    for run in document["runs"]:
        said, found = run["compared"], run["networks"].get("found")
        random, related, drawn = said["random"] or {}, said["accuracy_and_macs"], {*run["networks"]} - {"found"}
        rows.append([
            run["workdir"], str(run["seed"]),
            percent(run["search"]["server_accuracy"]), *_standing(said["searched"]),
            percent(found and found["server_accuracy"]), *_standing(said["retrained"]),
            str(len(drawn)), f"{percent(random.get('mean'))} +- {percent(random.get('std'))}",
            *(percent(random.get(name)) for name in ("min", "median", "max")),
            "-" if related is None else f"{related['pearson']:+.2f}, of ranks {related['spearman']:+.2f}",
        ])  # fmt: skip
    parts = [table(head, rows)]
    for name, what in (("searched", "The searches' own networks"), ("retrained", "What they found, retrained")):
        over = document["over_searches"][name]
        if over is not None:
            parts.append(
                f"{what}: mean percentile {over['mean']:.0f} over {over['searches']}. Were each search such a draw "
                f"itself, 50 would be expected, with a standard deviation of about {over['chance_std']:.0f}."
            )  # fmt: skip
    return parts


def _networks(runs: list[dict]) -> list[str]:
    names = dict.fromkeys(name for run in runs for name in run["networks"])
    head = ["network", "multiply-adds an image, millions", "rounds", *(f"seed {run['seed']}" for run in runs), "mean"]
    rows = []
    for name in names:
        found = [run["networks"].get(name) for run in runs]
        there = [figures for figures in found if figures is not None]
        macs = sorted({f"{figures['macs_of_an_image'] / 1e6:.3f}" for figures in there})
        rounds = sorted({figures["rounds"] for figures in there})
        mean = float(np.mean([figures["server_accuracy"] for figures in there]))
        of = [_through(macs), _through(list(map(str, rounds)))]
        rows.append([name, *of, *map(_accuracy, found), percent(mean)])
    return [table(head, rows)] if rows else []


def _runs(rows: list[dict]) -> list[str]:
    head = [
        "run", "method", "seed", "accuracy", "local accuracy", "events", "put off", "mean drop", "largest drop",
        "multiply-adds", "seconds in rounds", "seconds compiling",
    ]  # fmt: skip
    cells = [
        [
            row["name"], row["method"], str(row["seed"]),
            percent(row["server_accuracy"]), percent(row["local_accuracy"]),
            str(row["events"]), str(row["put_off"]), percent(row["mean_drop"], 2), percent(row["largest_drop"]),
            f"{row['macs']:.3g}", f"{row['seconds_in_rounds']:.0f}", f"{row['seconds_compiling']:.0f}",
        ]
        for row in rows
    ]  # fmt: skip
    return ["The searches' runs, and others; drops of accuracy at prune events in points:", table(head, cells)]


def _facts(document: dict) -> list[str]:
    versions, left = document["versions"], document["unfinished"]
    said = f"{document['hardware']}; Python {versions['python']}, jax {versions['jax']}."
    if document["other_versions"]:
        said += " Some networks were trained elsewhere or with other versions: other_versions in the figures."
    if left:
        said += f" {left} networks are not trained yet; the same command goes on."
    return [said, f"`{document['command']}`"]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def percent(value: float | None, digits: int = 1) -> str:
    """0.5 -> "50.0"; "-" of None."""
    return "-" if value is None else f"{PERCENT * value:.{digits}f}"


def _standing(standing: dict | None) -> tuple[str, str]:
    if standing is None:
        return "-", "-"
    return f"{standing['percentile']:.0f}", f"{standing['rank']} of {standing['of']}"


def _through(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"


def _accuracy(figures: dict | None) -> str:
    if figures is None:
        return "-"
    lost = figures["replies_not_finite"]
    return percent(figures["server_accuracy"]) + (f" ({lost} replies not finite)" if lost else "")
