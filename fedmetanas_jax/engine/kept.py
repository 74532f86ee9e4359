"""Compiled programs that outlive a run: those of a study differ in seed or split alone, and can share them."""


class Kept:
    """What runs that differ in seed or split alone compiled, for the next of them.

    Only what the last one used: programs of the networks that single runs find would pile up, and a process has room
    for the code of some fifteen supernets' (Linux's vm.max_map_count).
    """

    def __init__(self):
        self._before, self._now, self._alike = {}, {}, ""

    def get(self, name):
        """The program of this name, which is hashable and says all that it depends on; None: there is none."""
        if name not in self._now and name in self._before:
            self._now[name] = self._before[name]
        return self._now.get(name)

    def put(self, name, program) -> None:
        """Another program."""
        self._now[name] = program

    def next_run(self, alike: str) -> "Kept":
        """Another run begins; programs of runs for which `alike` was something else are none of its own."""
        self._before, self._now = self._now if alike == self._alike else {}, {}
        self._alike = alike
        return self
