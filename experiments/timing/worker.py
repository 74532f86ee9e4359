"""One side of a comparison in a process of its own: `python -m timing.worker ours|torch`.

Answers one JSON line on stdout for each JSON line on stdin, so that a parent can let two sides run in turn while
each keeps what it compiled, and each one's peak memory is its own:

    {"do": "describe"}                                  -> facts about the machine and the side
    {"do": "build", "case": ..., "variant": ..., "seed": ...} -> {"first_run_seconds": ...}
    {"do": "run"}                                       -> {"seconds": ..., "loss": ...}
    {"do": "report"}                                    -> compile seconds, memory, traffic

What fails answers {"error": "Type: message"} and leaves the worker alive. Everything else that is printed goes to
stderr.
"""

import json
import os
import sys

from timing.cases import Case, Variant


def serve(side, requests, answer) -> None:
    """Answers every line of `requests` (JSON) by calling `answer` with a dict. side: a class such as Ours."""
    built = None
    for line in requests:
        request = json.loads(line)
        try:
            match request["do"]:
                case "describe":
                    reply = sys.modules[side.__module__].describe()
                case "build":
                    built = None  # its memory is free before the next one's is taken
                    built = side(case_of(request["case"]), Variant(**request["variant"]), request["seed"])
                    reply = {"first_run_seconds": built.figures["first_run_seconds"]}
                case "run":
                    seconds, loss = built.run()
                    reply = {"seconds": seconds, "loss": loss}
                case "report":
                    reply = built.report()
                case other:
                    raise ValueError(f"no request {other!r}")
        except Exception as error:  # whatever it is, the parent records it
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        answer(reply)


def case_of(plain: dict) -> Case:
    """A case as JSON holds it, without its variants."""
    return Case(**plain | {"image": tuple(plain["image"]), "variants": ()})


def main() -> None:
    """Serves the side named on the command line."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that prints must not break the protocol
    if sys.argv[1] == "ours":
        from timing.ours import Ours as side
    else:
        from timing.rival import Rival as side

    def answer(reply: dict) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    serve(side, sys.stdin, answer)


if __name__ == "__main__":
    main()
