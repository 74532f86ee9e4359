"""The record of timings as a Markdown page."""

from timing.cases import Variant

HEAD = (
    "case", "variant", "s/round (median, quartiles; min)", "round is", "ms/step", "images/s",
    "compile s (cold / warm)", "peak device / host GB", "GB/s (of copy)", "kernels/step",
)  # fmt: skip

LEGEND = """\
A step is one batch of one client, forward and backward, with its share of the optimizers and of the averaging; a round
is all clients' tasks. Variants of a case ran in turn, each in its own process. Compile seconds of "ours" are XLA's,
after tracing, without and with a filled compilation cache; those of PyTorch are its first run's. Peak host memory is
that of the whole process, compiling included. GB/s are the bytes of operands and results in the optimized HLO (loop
bodies times their trip counts) over the measured seconds: an estimate, which caches can exceed. "-" is not measured;
the JSON file beside this one says why. Images are random and not augmented. Losses are in the JSON file too.
"""


def markdown(document: dict) -> str:
    """A page: what machine, what is timed with which versions, one row for each result."""
    lines = [f"# Timings on {document['hardware']}", ""]
    for key, title in (("versions", "Versions"), ("seed", "Seed"), ("command", "Command")):
        for value in dict.fromkeys(_text(entry[key]) for entry in document["results"]):
            lines.append(f"- {title}: {value}")
    for value in dict.fromkeys(f"{entry['copy_bytes_per_second'] / 1e9:.1f}" for entry in document["results"]):
        lines.append(f"- Copy bandwidth: {value} GB/s (read and write, measured)")
    lines += ["", LEGEND, _row(HEAD), _row(["---"] * len(HEAD))]
    lines += [_row(_cells(entry)) for entry in document["results"]]
    return "\n".join(lines) + "\n"


def _text(value) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else f"`{value}`"


def _row(cells) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _cells(entry: dict) -> list[str]:
    case, variant = entry["case"], Variant(**entry["variant"])
    size = f"C={case['width']}, {case['cells']} cells, {case['nodes']} nodes"
    work = f"K={case['clients']}, M={case['M']}, batch {case['batch']}, {case['dtype']}, {case['plan']} plan"
    name = f"{case['name']}: {size}, {work}"
    if entry["status"] != "done":
        return [name, variant.label, f"{entry['status']}: {entry['reason']}", *["-"] * (len(HEAD) - 3)]
    a_round, step = entry["round_seconds"], entry["step_seconds"]
    cold, warm = entry.get("compile_seconds_cold"), entry.get("compile_seconds_warm")
    if variant.side == "torch":
        cold = entry.get("first_run_seconds")
    share = entry["share_of_copy_bandwidth"]
    moved = "-" if share is None else f"{entry['bytes_per_second'] / 1e9:.1f} ({100 * share:.0f} %)"
    return [
        name,
        variant.label,
        f"{a_round['median']:.3g} ({a_round['q1']:.3g} to {a_round['q3']:.3g}; {a_round['min']:.3g}), n={a_round['n']}",
        entry["round_is"],
        f"{1000 * step['median']:.3g}",
        f"{entry['images_per_second']:.3g}",
        f"{_number(cold, '.1f')} / {_number(warm, '.1f')}",
        f"{_giga(entry.get('device_peak_bytes'))} / {_giga(entry.get('host_peak_bytes'))}",
        moved,
        _number(entry.get("kernels_per_step"), ".0f"),
    ]


def _number(value, form: str) -> str:
    return "-" if value is None else format(value, form)


def _giga(value) -> str:
    return "-" if value is None else f"{value / 1e9:.2f}"
