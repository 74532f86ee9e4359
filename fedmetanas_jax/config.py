"""What a run is made of: `Config`.

Imports no jax, so that a mistyped name is answered at once. A method's own knobs are not fields: they are
the keyword-only arguments of its factory and travel in `Config.options`.
"""

import dataclasses
import json
import typing
from typing import Any, Literal

from fedmetanas_jax.options import LARGEST_INT, UsageError, brief, fits, nearest, parse_path, wanted

# Far above what anybody needs, and below what takes minutes of silence or all memory before the first message.
MOST_CLIENTS, MOST_BATCH, MOST_DEVICES = 200_000, 65_536, 4_096
MOST_WIDTH, MOST_CELLS, MOST_NODES = 65_536, 1_000, 16
LEAST_CONCENTRATION = 1e-6  # as data/partition.py, which says why
PARTITIONS = ("dirichlet", "dirichlet_disjoint", "plato", "label_skew", "label_skew_sized", "iid", "natural")
SIZED = tuple(name for name in PARTITIONS if name not in ("label_skew", "natural"))  # with at most as many as asked for
FILE = ".json"  # what the name of a partition's file ends with


def _field(default, text: str, least: float | None = None, how: bool = False, most: float | None = None):
    return dataclasses.field(default=default, metadata={"help": text, "least": least, "how": how, "most": most})


@dataclasses.dataclass(frozen=True)
class Config:
    """The conditions of a run; the defaults are the paper's CIFAR-10, Dirichlet 0.1. Two equal Configs are
    the same run. Where the paper is silent the value is the decision of methods section 14.

    Fields of the last block say how a run is run and measured, not what it is: they may change when it is resumed.
    """

    method: str = _field("fedmetanas", "the federated method; --list shows them")
    options: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata={"help": "the method's own knobs: --config.options.NAME=VALUE"}
    )
    dataset: str = _field("cifar10", "cifar10, cifar100, mnist, digits, or NAME for DATA_DIR/NAME.npz")

    partition: str = _field(
        "dirichlet",
        "how the images are dealt to the clients (D-1): dirichlet, dirichlet_disjoint, plato, label_skew, "
        "label_skew_sized, iid, natural (to the clients the data set names), or as in another run, by the "
        "partition.json that it left",
    )
    concentration: float = _field(
        0.1, "of the Dirichlet partitions: smaller = fewer labels a client", least=LEAST_CONCENTRATION
    )
    tau: int = _field(4, "labels a client has under label_skew", least=1)
    clients: int = _field(100, "clients in all, K", least=1, most=MOST_CLIENTS)
    cohort: int = _field(5, "clients that train in one round, S", least=1)
    train_size: int = _field(600, "training images of a client; label_skew and natural deal out all there are", least=1)
    test_size: int = _field(600, "test images of a client; fewer where its labels have no more (D-55)", least=1)

    rounds: int = _field(1000, "rounds, R; every schedule is measured against it", least=1)
    epochs: int = _field(5, "local epochs a round, E", least=1)
    batch: int = _field(32, "images in a training batch, B", least=1, most=MOST_BATCH)
    augment: tuple[str, ...] = _field(
        ("crop", "flip"), "of training images, in this order: crop, flip, cutout; empty for none"
    )
    seed: int = _field(1, "of everything random: partition, weights, cohorts, batches, noise", least=0, most=2**32 - 1)

    lr: float = _field(
        0.025, "of local SGD in the first round (D-23); the meta optimizer's of methods with one", least=0
    )
    lr_end: float = _field(0.001, "of local SGD in the last round, half a cosine away (D-31)", least=0)
    momentum: float = _field(0.9, "of local SGD; scaffold has none", least=0)
    weight_decay: float = _field(3e-4, "of local SGD", least=0)
    clip: float = _field(
        -1.0, "largest norm of a gradient of local SGD; 0: any; -1: 5 for methods that search (as DARTS), else any"
    )
    finetune_lr: float = _field(0.01, "of the plain SGD by which a client personalises a fixed network (D-27)", least=0)
    aggregate: str = _field(
        "mean",
        "how clients' changes become one: mean, median or trimmed:SHARE; before it, with commas between, finite:N "
        "(leave out replies that are not finite, up to N in the run) and clip:C[:C_ALPHA[:C_STATS]] (largest norms of "
        "a client's change); or clip:C[:C_ALPHA[:C_STATS]],gaussian:Z[:DELTA] (differential privacy, multiplier Z), or "
        "clip:C[:C_ALPHA[:C_STATS]],secure (the mean by sums of which a networked server sees no summand)",
    )

    space: Literal["darts", "nasbench201"] = _field("darts", "the search space of methods that search")
    width: int = _field(16, "channels of the supernet's first cells, C", least=1, most=MOST_WIDTH)
    cells: int = _field(
        8,
        "cells of the supernet, L; a multiple of 3 in nasbench201; 1 or 2 in darts are reduction cells only",
        least=1,
        most=MOST_CELLS,
    )
    nodes: int = _field(4, "intermediate nodes of a DARTS cell", least=1, most=MOST_NODES)
    network: str = _field(
        "mobilenetv3_large",
        "of methods that search nothing: mobilenetv3_large, mobilenetv3_tiny (for tests and demonstrations), or "
        "the genotype.json a search of this space left, for that architecture at this width and number of cells",
    )
    stem: Literal[1, 2] = _field(1, "stride of the MobileNetV3's first convolution (D-26)")
    bn_eval: Literal["running", "batch", "recalibrated"] = _field(
        "running", "batch-norm statistics used to evaluate (D-10)"
    )
    compute: Literal["auto", "float32", "bfloat16"] = _field(
        "auto", "type of the networks' arithmetic; auto: bfloat16 on accelerators, float32 on CPU"
    )
    eval_batch: int = _field(250, "images in an evaluation batch", least=1)

    at_once: int = _field(
        -1,
        "clients computed together; 0: all; -1: one on CPU, else as many as the device's memory allows",
        least=-1,
        how=True,
    )
    devices: int = _field(
        1,
        "devices a round's clients are spread over; 0: all there are; -1: 2 parts of a CPU, else 1",
        least=-1,
        how=True,
        most=MOST_DEVICES,
    )
    client_states: Literal["auto", "device", "host"] = _field(
        "auto", "where what clients keep between rounds is held; auto: the device, if it has room", how=True
    )
    compile_ahead: int = _field(
        -1,
        "rounds between a prune event and its smaller program, which is compiled meanwhile; as many as are left: there "
        "is none; 0: the run waits for it; -1: 20, on CPU 0 or, where it is not worth compiling for the last rounds, "
        "at the end",
        least=-1,
        how=True,
    )
    block: int = _field(
        0,
        "most rounds in one dispatch to the device; 0: one on CPU, else all to the next checkpoint",
        least=0,
        how=True,
    )
    eval_every: int = _field(
        10,
        "rounds between server and un-adapted local accuracy, which the first round has too; 0: only at the end",
        least=0,
        how=True,
    )
    adapt_every: int = _field(
        0, "rounds between local accuracies of personalised networks; 0: as final_adapt says", least=0, how=True
    )
    final_adapt: bool = _field(True, "local accuracy of personalised networks at the end of the run", how=True)
    checkpoint_every: int = _field(10, "rounds between checkpoints", least=1, how=True)


MAY_CHANGE = frozenset(field.name for field in dataclasses.fields(Config) if field.metadata.get("how"))


# Options that are newer than recorded runs of their method, with what was done before there was a choice. A config with
# these values is noted without them, so that such a run is still found and gone on with.
LATER = {"fedpnas": {"sampler": "free", "samples": 1}}


def may_change(config: Config) -> frozenset[str]:
    """The fields that say how this run is run, and not what it is.

    Where a file deals out the images, its path is one of them: checkpoints have a hash of the rows it dealt.
    """
    return MAY_CHANGE | ({"partition"} if config.partition.endswith(FILE) else set())


MOBILENETS = {"mobilenetv3_large": "large", "mobilenetv3_tiny": "tiny"}  # by the name config.network has for them


def validate(config: Config) -> None:
    """UsageError naming the field, its value and what is allowed, unless the fields make sense together.

    What depends on the images (labels for tau, halvings of their size) is checked where they are known.
    """
    for field in dataclasses.fields(Config):
        _check(field, getattr(config, field.name))
    if config.momentum >= 1:
        raise UsageError(f"config.momentum is {config.momentum}; it must be 0 or more and below 1")
    if config.clip < 0 and config.clip != -1:
        raise UsageError(f"config.clip is {config.clip}; it must be 0 or more, or -1 for what suits the method")
    if config.cohort > config.clients:
        raise UsageError(
            f"config.cohort is {config.cohort}, but there are only {config.clients} clients (config.clients)"
        )
    if config.client_states == "host" and config.block > 1:
        raise UsageError(f"config.block is {config.block}; with config.client_states=host it must be 1")
    if len(set(config.augment)) < len(config.augment):
        raise UsageError(f"config.augment names an augmentation twice: {','.join(config.augment)}")
    check_partition(config.partition)
    factors = [("epochs", "train_size")]
    if config.partition in SIZED:  # the others deal out what there is
        factors += [("clients", "train_size"), ("clients", "test_size")]
    for one, other in factors:
        if (product := getattr(config, one) * getattr(config, other)) > LARGEST_INT:
            raise UsageError(
                f"config.{one} times config.{other} is {product} images; they must be at most {LARGEST_INT}"
            )


def check_partition(name: str) -> None:
    """UsageError unless it is one of PARTITIONS or could be a file's path; the file is read with the images."""
    if name.endswith(FILE):
        parse_path("config.partition", name)
    elif name not in PARTITIONS:
        raise UsageError(f"config.partition: {nearest('choice', name, PARTITIONS)}, or a run's partition{FILE}")


def _check(field: dataclasses.Field, value) -> None:
    """UsageError unless the value is one that the field can have, whatever the others are."""
    where, least, most = f"config.{field.name}", field.metadata.get("least"), field.metadata.get("most")
    if typing.get_origin(field.type) is Literal and value not in typing.get_args(field.type):
        raise UsageError(f"{where}: {nearest('choice', value, typing.get_args(field.type))}")
    if field.name != "options" and not fits(value, field.type):
        kind = "a finite number" if field.type is float else wanted(field.type)
        raise UsageError(f"{where} is {brief(value)}; it must be {kind}")
    if least is not None and value < least:
        raise UsageError(f"{where} is {brief(value)}; it must be at least {least}{_why(field.name)}")
    if field.type is int and value > (most := most or LARGEST_INT):
        raise UsageError(f"{where} is {brief(value)}; it must be at most {most}")


def _why(name: str) -> str:
    return ", or rounding would choose the images, the same for all clients" if name == "concentration" else ""


def to_dict(config: Config) -> dict:
    """The config as JSON can hold it; tuples become lists, and options of LATER are left out at their old values."""
    plain, later = dataclasses.asdict(config), LATER.get(config.method, {}).items()
    plain["options"] = {name: _listed(value) for name, value in config.options.items() if (name, value) not in later}
    return {name: _listed(value) for name, value in plain.items()}


def alike(config: Config) -> str:
    """The same for configs that differ in their seed alone, which compile the same, and in their split, which do where
    arrays have the same shapes."""
    return json.dumps(to_dict(config) | dict.fromkeys(("seed", "partition", "concentration", "tau")))


def from_dict(plain: dict) -> Config:
    """The inverse of `to_dict`. UsageError for a field too many or too few: it is then another version's."""
    names = [field.name for field in dataclasses.fields(Config)]
    if not isinstance(plain, dict) or not isinstance(plain.get("options", {}), dict):
        raise UsageError("the config is no record of one: it and its options must be JSON objects")
    for name in plain:
        if name not in names:
            raise UsageError(nearest("config field", name, names))
    if missing := [name for name in names if name not in plain]:
        raise UsageError(f"the config lacks {', '.join(missing)}")
    options = LATER.get(str(plain["method"]), {}) | {name: _tupled(value) for name, value in plain["options"].items()}
    return Config(**{name: _tupled(value) for name, value in plain.items()} | {"options": options})


def _listed(value):
    return list(value) if isinstance(value, tuple) else value


def _tupled(value):
    return tuple(value) if isinstance(value, list) else value
