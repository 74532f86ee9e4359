"""The two pictures of a run's numbers: how well it does (curves.png), and what its search does (search.png).

Accuracies in the records are fractions of 1.
"""

from pathlib import Path

from fedmetanas_jax.engine import panels
from fedmetanas_jax.engine.panels import Panel, Series

BLUE, RED, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7"  # Okabe and Ito

SERVER = Series("server", "server_accuracy", BLUE)
DISCRETE = Series("server, pruned to one operation", "server_accuracy_discrete", BLUE, ":")
ACCURACIES = (
    SERVER,
    DISCRETE,
    Series("local, before adaptation", "local_accuracy", RED, "--", "mean"),
    Series("local, after adaptation", "local_accuracy_adapted", RED, "-", "mean"),
    Series("local, adapted, worst tenth", "local_accuracy_adapted", ORANGE, ":", "worst_tenth"),
)
CURVES = (
    Panel("accuracy (%)", ACCURACIES, factor=100, height=2),
    Panel("loss", (Series("training loss", "loss", GREEN),), height=1.2),
)
ALIVE = (Series("operations", "ops_alive", BLUE), Series("pairs", "pairs_alive", PURPLE, "--"))
ALPHAS = (
    Series("largest probability: all edges", "alpha_max", BLUE, "--"),
    Series("largest probability: undecided", "alpha_max_undecided", BLUE),
    Series("entropy: undecided (1 = nothing known)", "alpha_entropy", RED),
)
COST = "event_cost_on_training_images"
COSTS = (
    Series("event", COST, "black", "", among="event", marker="o"),
    Series("event put off", COST, RED, "", among="event_put_off", marker="X"),
)
SEARCH = (
    Panel("accuracy (%)", (SERVER, DISCRETE), factor=100, height=2, arrows=True),
    Panel("alive", ALIVE, steps=True),
    Panel("alphas", ALPHAS, height=1.2),
    Panel("temperature", (Series("temperature", "temperature", RED),)),
    Panel("cost in training\naccuracy (points)", COSTS, factor=100),  # by which events are put off
)


def draw(records: list[dict], path: str | Path, title: str) -> None:
    """Writes accuracies and loss of `records` as a PNG. ValueError: they hold no number to draw."""
    panels.draw(CURVES, records, path, title)


def draw_search(records: list[dict], path: str | Path, title: str) -> None:
    """Writes as a PNG what is alive, how decided the alphas are, and what every event did to the accuracy, or would
    have done where it was put off. ValueError: `records` holds no number to draw."""
    panels.draw(SEARCH, with_events(records), path, title)


def with_events(records: list[dict]) -> list[dict]:
    """The records with the server's accuracy also in rounds where it was only measured because of an event."""
    return [{"server_accuracy": record.get("event_accuracy_before")} | record for record in records]
