"""What is said of an option that cannot be."""


def check(**options: tuple) -> None:
    """ValueError with the name of the first option, of name = (value, whether it is good, what is allowed), that is
    not good."""
    for name, (value, good, allowed) in options.items():
        if not good:
            raise ValueError(f"{name} is {value}; it must be {allowed}")
