"""Numbers and elements of the page, as HTML."""

from html import escape

ACCURACIES = {
    "server": "server accuracy",
    "local": "local accuracy, the network for everybody",
    "local_std": "its ± over clients",
    "own": "local accuracy, own network",
    "own_std": "its ± over clients",
    "majority": "a client's most frequent class",
    "before": "before pruning",
    "after": "after pruning",
    "prune_drop": "lost by all of pruning",
    "largest_drop": "largest loss at once",
    "cut_at_once": "control: lost by one cut of the whole supernet",
}
COSTS = {  # what it is called, and its unit
    "seconds": ("time in rounds", "s"),
    "seconds_compiling": ("compiling", "s"),
    "seconds_to_accuracy": ("time to accuracy", "s"),
    "image_gradients": ("image-gradients", ""),
    "macs": ("multiply-adds", ""),
    "bytes": ("sent, up and down", "B"),
    "parameters": ("weights of the network", ""),
}
PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
NOTHING = "-"  # what is shown where there is no number


def overridden(document: dict) -> str:
    """The fields of a table's runs that are not the scale's."""
    return ", ".join(f"{name}={value}" for name, value in document["overrides"].items())


def head(figure: str) -> str:
    """What a figure is called."""
    return ACCURACIES.get(figure) or COSTS.get(figure, (figure.replace("_", " "), ""))[0]


def number(figure: str, value: float | None) -> str:
    """A figure: accuracies in percent, without the sign; costs with a prefix and their unit."""
    if value is None:
        return NOTHING
    if figure in ACCURACIES:
        return f"{100 * value:.1f}".replace("-0.0", "0.0")
    return quantity(value, COSTS.get(figure, ("", ""))[1])


def quantity(value: float, unit: str = "") -> str:
    """78485760000 -> "78.5 G"; seconds stay seconds, with more of them in hours."""
    if unit == "s":
        return f"{value / 3600:.2f} h" if value >= 7200 else f"{value:.3g} s" if value < 100 else f"{value:.0f} s"
    factor, prefix = next(((factor, prefix) for factor, prefix in PREFIXES if abs(value) >= factor), (1, ""))
    return f"{value / factor:.3g} {prefix}{unit}".strip()


def signed(points: float, digits: int = 1) -> str:
    """+1.2 or −1.2, with a real minus sign."""
    return f"{points:+.{digits}f}".replace("-", "−")


def element(name: str, /, *inside: str, **attributes: str | bool | None) -> str:
    """An element of HTML. inside: HTML already. attributes: text, escaped here; class_ and data_x are written class and
    data-x; one that is None or False is left out, of one that is True there is the name alone."""
    said = ""
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is not None and value is not False:
            said += f" {key}" if value is True else f' {key}="{escape(str(value))}"'
    return f"<{name}{said}>" + "".join(inside) + (f"</{name}>" if name not in ("img", "meta", "link") else "")


def scrolling(label: str, *inside: str) -> str:
    """A box of its own scroll bar, that the keyboard reaches too: the page never scrolls sideways."""
    return element("div", *inside, class_="scroll", tabindex="0", role="region", aria_label=label)


def table(label: str, heads: list[str], rows: list[list[str]]) -> str:
    """A plain table in such a box. heads and rows: HTML; the first of a row is its head."""
    top = element("tr", *(element("th", one, scope="col") for one in heads))
    body = (element("tr", element("th", row[0], scope="row"), *(element("td", one) for one in row[1:])) for row in rows)
    return scrolling(label, element("table", element("thead", top), element("tbody", *body)))


def details(summary: str, *inside: str, **attributes) -> str:
    """What opens with a click. summary: HTML."""
    return element("details", element("summary", summary), *inside, **attributes)


def seeds(numbers: list) -> str:
    """ "seeds 1, 2, 3"."""
    return ("seed " if len(numbers) == 1 else "seeds ") + (", ".join(map(str, numbers)) or "none")
