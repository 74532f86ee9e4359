"""What a comparison of searches with networks drawn at random says: ranks, spreads, correlations.

That a search is to be judged by where it stands among such networks: Yu, Sciuto, Jaggi, Musat, Salzmann, Evaluating the
Search Phase of Neural Architecture Search, ICLR 2020.
"""

import numpy as np

PERCENT = 100


def spread(values: list[float]) -> dict | None:
    """Mean, standard deviation (None of a single one), least, median and largest; None of nothing."""
    if not values:
        return None
    x = np.array(values, float)
    found = {"mean": x.mean(), "std": x.std(ddof=1) if len(x) > 1 else None}
    found |= {"min": x.min(), "median": np.median(x), "max": x.max()}
    return {name: None if value is None else float(value) for name, value in found.items()}


def standing(value: float, others: list[float]) -> dict | None:
    """Where a value stands among others: "rank", 1 if none is larger, "of" so many; "percentile", the share of the
    others that are smaller, in percent, half of those that are equal counted. None where there are no others."""
    if not others:
        return None
    x = np.array(others)
    below = np.mean(x < value) + np.mean(x == value) / 2
    return {"rank": 1 + int(np.sum(x > value)), "of": len(x) + 1, "percentile": PERCENT * float(below)}


def correlation(x: list[float], y: list[float]) -> dict | None:
    """Pearson's and Spearman's; None where either is constant or there are fewer than three."""
    if len(x) < 3 or len({*x}) == 1 or len({*y}) == 1:
        return None
    return {"pearson": float(np.corrcoef(x, y)[0, 1]), "spearman": float(np.corrcoef(ranks(x), ranks(y))[0, 1])}


def ranks(values: list[float]) -> np.ndarray:
    """[n]: the place of each value in ascending order, equal ones at the mean of their places."""
    x = np.array(values)
    return np.array([np.sum(x < value) + (np.sum(x == value) - 1) / 2 for value in x])


def compared(search: dict, networks: dict[str, dict]) -> dict:
    """The statistics of one search: of its own network, {"server_accuracy": ...}, and of `networks`, those finished by
    name, of which "found" is what it found, trained from scratch, and the others were drawn."""
    drawn = [figures for name, figures in networks.items() if name != "found"]
    accuracies, found = [figures["server_accuracy"] for figures in drawn], networks.get("found")
    return {
        "random": spread(accuracies),
        "searched": standing(search["server_accuracy"], accuracies),
        "retrained": found and standing(found["server_accuracy"], accuracies),
        "accuracy_and_macs": correlation(accuracies, [figures["macs_of_an_image"] for figures in drawn]),
    }


def over_searches(runs: list[dict]) -> dict:
    """Mean percentiles of the searches' own networks and of the retrained ones, None where there are none; with the
    standard deviation that the mean has where searches are draws like the others, so that every rank is as likely."""
    said: dict = {"searched": None, "retrained": None}
    for name in said:
        known = [run["compared"][name] for run in runs if run["compared"][name] is not None]
        if known:
            drawn = known[0]["of"] - 1
            chance = PERCENT * ((drawn + 2) / (12 * drawn * len(known))) ** 0.5
            mean = float(np.mean([standing["percentile"] for standing in known]))
            said[name] = {"searches": len(known), "mean": mean, "chance_std": chance}
    return said


def events(records: list[dict]) -> dict:
    """What the prune events of a run cost: their number, the mean and the largest drop of server accuracy, None where
    there were none; those that were put off."""
    entered = [line for line in records if "event" in line]
    sides = [(line["event_accuracy_before"], line["event_accuracy_after"]) for line in entered]
    drops = [before - after for before, after in sides if None not in (before, after)]
    put_off = sum("event_put_off" in line for line in records)
    mean, largest = (float(np.mean(drops)), max(drops)) if drops else (None, None)
    return {"events": len(sides), "put_off": put_off, "mean_drop": mean, "largest_drop": largest}
