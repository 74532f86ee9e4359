"""When a smaller program is worth compiling.

As one who rents skis until the rent has come to their price (Karlin, Manasse, Rudolph, Sleator, Competitive Snoopy
Caching, Algorithmica 1988): a smaller program is compiled once the present one has done as much in vain as compiling
costs, for nobody knows how soon the next prune event asks for a smaller one still. Everything is counted in
multiply-adds and not in seconds, so that a resumed run decides as an unbroken one.
"""

import jax

# Multiply-adds that are done in the time that compiling a smaller program takes: 43 s, its evaluation included, at 15 G
# a second on two CPU cores (cifar10_small); 106 s, of the whole supernet's, at 3.8 T a second on an H200.
COMPILING = {"cpu": 6e11}
COMPILING_ELSEWHERE = 4e14
# What a program that leaves out what is pruned takes beside one of what is alive alone, as a share of that one's time:
# 5.1 and 4.0 s a round of cifar10_small, 42 and 39 ms a step (docs/formulations.md).
LEAVING_OUT = 0.3


class Worth:
    """What the present program costs, and what of it the smallest one would have spared."""

    def __init__(self):
        self.macs_a_round = 0.0  # of the last round
        self.macs_an_image = 0.0  # of a forward pass in it, without what the program skipped
        self.spent = 0.0  # since the last event
        self.in_vain = 0.0  # before it, since the present program was entered
        self.stays = False  # whether the rounds after the last event are left to the present program

    def add(self, lines: list[dict]) -> None:
        """Rounds were made; their records."""
        self.macs_a_round, gradients = lines[-1]["macs"], lines[-1]["image_gradients"]
        if gradients:  # else all replies were left out
            self.macs_an_image = self.macs_a_round / (3 * gradients)  # a backward pass costs about two forward passes
        self.spent += sum(line["macs"] for line in lines)

    def settle(self, spared: float) -> None:
        """An event ends a stretch of rounds, of which the smallest program would have spared this share."""
        self.in_vain += spared * self.spent
        self.spent = 0.0

    def pays(self, spared: float, rounds: int) -> bool:
        """Whether to compile a program that spares this share of the multiply-adds in so many rounds to come: if as
        much was done in vain already, and would be again."""
        price = COMPILING.get(jax.default_backend(), COMPILING_ELSEWHERE)
        return self.in_vain >= price and spared * self.macs_a_round * rounds >= price

    def pays_at_last(self, spared: float, rounds: int) -> bool:
        """Whether to compile a program for the last `rounds`, if the present one leaves out what is pruned."""
        price = COMPILING.get(jax.default_backend(), COMPILING_ELSEWHERE)
        return LEAVING_OUT * (1 - spared) * self.macs_a_round * rounds >= price

    def begin(self) -> None:
        """Another program is entered."""
        self.in_vain = 0.0

    def saved(self) -> dict[str, float | bool]:
        """For a checkpoint."""
        return dict(vars(self))

    def restore(self, meta: dict) -> None:
        """From a checkpoint; older ones know the last round's cost alone, and the rest counts from 0."""
        for name in vars(self):
            setattr(self, name, meta.get(name, 0.0))
