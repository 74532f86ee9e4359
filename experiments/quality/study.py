"""Which networks are to be trained in which federations, what is finished of them, and what is trained together."""

import json
from collections.abc import Iterator
from itertools import groupby

import jax
from timing.results import hardware

from fedmetanas_jax.algorithms.fedrandom import draw
from fedmetanas_jax.config import to_dict
from fedmetanas_jax.core import Plan
from fedmetanas_jax.engine.records import versions
from fedmetanas_jax.files import to_json, write_json
from fedmetanas_jax.nas import genotype as genotypes
from fedmetanas_jax.options import UsageError
from quality import figures
from quality.tables import markdown
from quality.training import Federation, Program, federation, rounds_within, together


class Job:
    """A network to train in the federation of a search."""

    def __init__(self, run, where: Federation, number: int, plan: Plan, budget: float):
        """number: 0 for what the run found, from 1 for a draw. budget: share of the run's multiply-adds."""
        self.workdir, self.where, self.number, self.plan = run.workdir, where, number, plan
        self.name = f"random-{number}" if number else "found"
        self.rounds = rounds_within(where, plan, budget * run.result["macs"])
        self.path = run.workdir / "quality" / f"budget-{budget:g}" / f"{self.name}.json"
        self.request = {"plan": plan, "rounds": self.rounds}
        fields = to_dict(run.config)
        # Runs that are alike in these share programs.
        self.alike = to_json({name: fields[name] for name in fields if name not in ("method", "options", "seed")})

    def kept(self) -> dict | None:
        """Its "figures", and the "versions" they were found with, once it is finished. UsageError where they are
        damaged."""
        if not self.path.exists():
            return None
        try:
            kept = json.loads(self.path.read_text())
            _, _, request = kept["figures"], kept["versions"], kept["request"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self.path} is damaged ({error!r}); without it the network is trained again") from None
        return kept if request == self.request else None

    def finish(self, found: dict) -> None:
        """Keeps its figures."""
        write_json(self.path, {"request": self.request, "figures": found, "versions": versions()})


class Study:
    """Searches, [(Run, Genotype)], and the same drawn networks for all of them. Raises as `build.run`."""

    def __init__(self, searches: list, *, networks: int, budget: float, data_dir: str | None):
        self.runs, self.networks, self.budget, self.jobs = [run for run, _ in searches], networks, budget, []
        for run, genotype in searches:
            where = federation(run.config, data_dir)
            graph = where.space.graph
            try:
                plans = [genotypes.to_plan(graph, genotype)]
            except ValueError as error:
                raise UsageError(f"{run.workdir / 'genotype.json'} is no network of its space: {error}") from None
            plans += [draw(graph, jax.random.key(number)) for number in range(1, networks + 1)]
            self.jobs += [Job(run, where, number, plan, budget) for number, plan in enumerate(plans)]

    def train(self, at_once: int) -> Iterator[str]:
        """Trains what is not finished, `at_once` networks side by side (search_quality.FLAGS); what is to be said after
        each of these groups."""
        if at_once < 0:
            at_once = 1 if jax.default_backend() == "cpu" else 0
        left = [job for job in self.jobs if job.kept() is None]
        program, made = None, None
        for group, plan in self._alone(left) if at_once == 1 else self._side_by_side(left, at_once):
            wanted = group[0].alike, to_json(plan), len(group)
            if wanted != made:
                program, made = Program(group[0].where, plan, len(group)), wanted
            found = program.train(group[0].where, [job.plan for job in group], [job.rounds for job in group])
            for job, known in zip(group, found, strict=True):
                job.finish(known)
            yield "\n".join(map(_said, group, found))

    def _alone(self, jobs: list[Job]) -> Iterator:
        """([a job], the plan of its program), a draw for all runs before the next one."""
        for job in sorted(jobs, key=lambda job: job.number):
            yield [job], job.plan

    def _side_by_side(self, jobs: list[Job], at_once: int) -> Iterator:
        """(jobs of one run, the plan of a program for all networks of runs alike); who takes as long goes together."""
        for _, here in groupby(jobs, key=lambda job: job.workdir):
            here = sorted(here, key=lambda job: job.rounds)
            plan = together([job.plan for job in self.jobs if job.alike == here[0].alike])
            size = at_once or len(here)
            for start in range(0, len(here), size):
                group = here[start : start + size]
                yield group, plan if len(group) > 1 else group[0].plan

    def report(self, line: str, also: list[dict]) -> tuple[dict, str]:
        """What is known by now, for OUT.json and OUT.md; `also` are rows as Run.row makes them, `line` the command."""
        now, runs, others = versions(), [], set()
        for run in self.runs:
            jobs = [job for job in self.jobs if job.workdir == run.workdir]
            kept = {job.name: found for job in jobs if (found := job.kept()) is not None}
            known = {name: found["figures"] for name, found in kept.items()}
            others |= {to_json(found["versions"]) for found in kept.values() if found["versions"] != now}
            search = {"server_accuracy": run.result["server_accuracy_discrete"], "macs": run.result["macs"]}
            about = {"workdir": str(run.workdir), "seed": run.config.seed, "config": to_dict(run.config)}
            about |= {"test_images": len(jobs[0].where.data.central), "search": search}
            runs.append(about | {"compared": figures.compared(search, known), "networks": known})
        finished = sum(len(run["networks"]) for run in runs)
        document = {"command": line, "versions": now, "other_versions": [json.loads(text) for text in sorted(others)]}
        document |= {"hardware": hardware(now), "budget": self.budget, "networks": self.networks}
        document |= {"unfinished": len(self.jobs) - finished, "over_searches": figures.over_searches(runs)}
        document |= {"runs": runs, "also": also}
        return document, markdown(document)


def _said(job: Job, found: dict) -> str:
    accuracy, seconds = found["server_accuracy"], found["seconds"] + found["seconds_compiling"]
    return f"{job.workdir} {job.name}: {accuracy:.4f} after {found['rounds']} rounds, {seconds:.0f} s"
