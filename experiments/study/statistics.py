"""Means over seeds, and differences between two methods with the seeds paired."""

import numpy as np
from scipy import stats

RESAMPLES, ENOUGH = 10_000, 5


def spread(values: dict[int, float | None]) -> dict | None:
    """{seed: value} -> {"mean", "std" (of a sample; None of a single one), "values"}, None where nothing is known."""
    known = {seed: float(value) for seed, value in values.items() if value is not None}
    if not known:
        return None
    x = np.array(list(known.values()))
    return {"mean": float(x.mean()), "std": float(x.std(ddof=1)) if len(x) > 1 else None, "values": known}


def paired(mine: dict[int, float], others: dict[int, float]) -> dict | None:
    """The mean of mine - others over the seeds that both have, and what it would be with other seeds: 95 % of 10,000
    bootstrap resamples lie from "low" to "high". None without a common seed.

    verdict: "better" or "worse" only where the interval excludes zero. With fewer than five seeds, "too few seeds": the
    interval is no wider than the differences themselves, and of three one time in four all lie on one side of zero by
    chance. Else "open".
    """
    common = sorted(mine.keys() & others.keys())
    if not common:
        return None
    differences = np.array([mine[seed] - others[seed] for seed in common])
    found = {"n": len(common), "mean": float(differences.mean()), "low": None, "high": None}
    if len(common) < 2:
        return found | {"verdict": "too few seeds"}
    if np.ptp(differences) == 0:  # resamples of one number
        low = high = float(differences[0])
    else:
        how = {"method": "percentile", "n_resamples": RESAMPLES, "rng": np.random.default_rng(0)}
        low, high = map(float, stats.bootstrap((differences,), np.mean, **how).confidence_interval)
    verdict = "better" if low > 0 else "worse" if high < 0 else "open"
    return found | {"low": low, "high": high, "verdict": verdict if len(common) >= ENOUGH else "too few seeds"}
