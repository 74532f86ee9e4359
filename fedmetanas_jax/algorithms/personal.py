"""A supernet cut in two: a base that all clients share, and a personal part that each adapts before it uses it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax

from fedmetanas_jax import tree
from fedmetanas_jax.core import Alpha, SearchSpace, Tree


class Part(NamedTuple):
    """The personal part: some names at the top of params and stats, and the logits of some cell types."""

    has: Callable  # a name at the top of params or stats -> bool
    rows: np.ndarray  # [its cell types] int

    def of(self, function: Callable, x: dict | Alpha, *more: dict | Alpha) -> dict | Alpha:
        """x, its personal part replaced by function(that part of x, of more ...); x are weights or logits."""
        if isinstance(x, Alpha):
            parts = [jax.tree.map(lambda leaf: leaf[self.rows], y) for y in (x, *more)]
            return jax.tree.map(lambda leaf, new: leaf.at[self.rows].set(new), x, function(*parts))
        names = tuple(name for name in x if self.has(name))
        return tree.split(x, names)[1] | function(*(tree.split(y, names)[0] for y in (x, *more)))

    def alone(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        """`optimizer` of {"params": w, "alpha": alpha} without its steps for the base; it is to take leaf by leaf."""

        def step(updates: Tree, _=None) -> Tree:
            return {name: self.of(lambda _, new: new, tree.zeros_like(x), x) for name, x in updates.items()}

        return optax.chain(optimizer, optax.stateless(step))


def base_of(space: SearchSpace, base_cells: int | None) -> int:
    """The cells of the base: as many as asked for; None = all but a quarter, and but one at least (D-19). ValueError
    for a number that cannot be."""
    if base_cells is None:
        return space.cells - max(1, round(space.cells / 4))
    if not 0 <= base_cells <= space.cells:
        raise ValueError(f"base_cells is {base_cells}; it must be none, or 0 to the {space.cells} cells of the network")
    return base_cells


def personal_part(space: SearchSpace, base: int) -> Part:
    """All from the cell `base` on, with the head unless every cell is of the base."""

    def has(name: str) -> bool:
        kind, _, number = name.rpartition("_")
        if base == 0:  # there is no base, and the stem would be of it
            return True
        if number.isdecimal():  # cell_3, halving_3
            return int(number) >= base
        return base < space.cells and kind in ("head", "last")

    starts = [name.rpartition("_")[2] for name in space.graph.cell_types]
    first = [int(start) if start.isdecimal() else 0 for start in starts]  # without parts all types are of one
    return Part(has, np.flatnonzero([start >= base for start in first]))
