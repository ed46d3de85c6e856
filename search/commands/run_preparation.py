"""The preparation of a sweep as jobs for its slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from search.method import Method
from search.space import Space
from search.trial.context import ContextPart
from search.trial.jobs import DENSE, Job
from search.trial.prepare import Step, steps_before, steps_of, steps_of_method


class Preparation:
    """The steps that a search needs: those that nobody was given yet, and what the others have measured."""

    def __init__(self, space: Space, known: Mapping[str, ContextPart]) -> None:
        """
        Args:
            known: parts that were measured before, by the ids of their steps.
        """
        self._space = space
        self.steps = {step.id: step for step in steps_of(space)}
        """All steps by id."""
        self._waiting = [step for step in self.steps.values() if step.id not in known]
        self._measured = set(known)
        self.known = ContextPart()
        """All that was measured so far."""
        for part in known.values():
            self.known = self.known.joined(part)

    @property
    def is_handed_out(self) -> bool:
        """True once no step waits for a slot."""
        return not self._waiting

    @property
    def is_done(self) -> bool:
        """True once all is measured."""
        return self._measured >= self.steps.keys()

    def next(self) -> Job | None:
        """Returns the job of the next step; None if no step waits."""
        return self._job(self._waiting[0]) if self._waiting else None

    def next_beside_look(self) -> Job | None:
        """Returns the job of a step that most trials need, to be done beside the look at the dense model.

        The others can wait until the first trials have a slot: those need none of them.
        """
        return self.next() if self._waiting and self._waiting[0].kind in ("sensitivity", "widths") else None

    def missing(self, needs: Sequence[str]) -> Job | None:
        """Returns the job of a step among these ids that nobody was given yet; None if there is none."""
        return next((self._job(step) for step in self._waiting if step.id in needs), None)

    def ready_methods(self) -> list[Method]:
        """Returns the methods all of whose candidates can run now."""
        return [
            name
            for name in self._space.method
            if self._measured >= {step.id for step in steps_of_method(name, self._space)}
        ]

    def measured(self, step_id: str, part: ContextPart) -> None:
        """Takes what a step has measured."""
        self._measured.add(step_id)
        self.known = self.known.joined(part)

    def _job(self, step: Step) -> Job:
        """Hands out a step, or one that it needs and nobody was given yet."""
        before = [one.id for one in steps_before(step, self._space)]
        earlier = self.missing(before)
        if earlier is not None:
            return earlier
        self._waiting.remove(step)
        return Job(id=step.id, kind="step", needs=(DENSE, *before), subject=step)
