"""Each forget question's best answer so far and its score, kept between visits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import PMCError


@dataclass(slots=True)
class _Entry:
    answer: Any
    score: float
    visits: int
    unused: bool = False  # visited, and since then in no step
    uses: int = 0  # steps that it was in


class BestStore:
    """Best-so-far answers, one slot a question (arXiv 2507.04219, published code's ``sampled_data``).

    Parameters
    ----------
    num_questions : int
        Questions are the indices 0 to num_questions - 1.

    Notes
    -----
    PMC stores an answer as text; trainers without strings store token ids. The store treats both alike.
    """

    def __init__(self, num_questions: int) -> None:
        if num_questions < 1:
            raise PMCError(f"num_questions is {num_questions}: a store needs at least 1")
        self._entries: list[_Entry | None] = [None] * num_questions

    def __len__(self) -> int:
        return len(self._entries)

    def pending(self, indices: Sequence[int], above: float = 0.0) -> list[int]:
        """Return those of `indices` to sample again: without an entry, or with a score above `above`."""
        return [i for i in indices if (entry := self._at(i)) is None or entry.score > above]

    def due(self, indices: Sequence[int], above: float = 0.0) -> list[int]:
        """Return those of `indices` that are pending, but for questions visited since they were last in a step."""
        return [i for i in self.pending(indices, above) if (entry := self._at(i)) is None or not entry.unused]

    def use(self, index: int) -> Any:
        """Return the stored answer for a step; KeyError if the question was never offered one."""
        entry = self._filled(index)
        entry.unused = False
        entry.uses += 1
        return entry.answer

    def offer(self, index: int, answer: Any, score: float) -> bool:
        """Store `answer` unless the stored one scores lower; a tie replaces. Return whether it was stored."""
        if not 0 <= score <= 1:  # NaN fails this too
            raise PMCError(f"score of question {index} is {score}: a reward must stay within 0 and 1")
        entry = self._at(index)
        if entry is None:
            self._entries[index] = _Entry(answer, float(score), 1, True)
            return True
        entry.visits += 1
        entry.unused = True
        if score > entry.score:
            return False
        entry.answer, entry.score = answer, float(score)
        return True

    def answer(self, index: int) -> Any:
        """Return the stored answer; KeyError if the question was never offered one."""
        return self._filled(index).answer

    def score(self, index: int) -> float:
        """Return the stored answer's score; KeyError if the question was never offered one."""
        return self._filled(index).score

    def uses(self, index: int) -> int:
        """Return how many steps the question was in."""
        return self._filled(index).uses

    def visits(self, index: int) -> int:
        """Return how often the question was offered an answer."""
        entry = self._at(index)
        return 0 if entry is None else entry.visits

    def state_dict(self) -> dict[str, Any]:
        """Return a JSON-ready copy. It holds generated answers: keep it as private as the data."""
        entries = [None if e is None else [e.answer, e.score, e.visits, e.unused, e.uses] for e in self._entries]
        return {"entries": entries}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; a state of another size is refused."""
        entries = state["entries"]
        if len(entries) != len(self._entries):
            raise PMCError(f"store of {len(entries)} questions does not fit a run of {len(self._entries)}")
        # those of earlier versions have no fourth, and then each visited question was in a step; nor a fifth
        self._entries = [None if e is None else _Entry(e[0], float(e[1]), int(e[2]), *e[3:]) for e in entries]

    def _at(self, index: int) -> _Entry | None:
        if not 0 <= index < len(self._entries):
            raise IndexError(f"question {index} is not in a store of {len(self._entries)}")
        return self._entries[index]

    def _filled(self, index: int) -> _Entry:
        entry = self._at(index)
        if entry is None:
            raise KeyError(f"question {index} has no answer yet")
        return entry
