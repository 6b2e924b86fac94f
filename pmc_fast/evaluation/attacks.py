"""One leak attack: does the forgotten come back when a model is asked often, or helped into the answer?

The largest recall of 100 samples, with and without the prefill "The answer is: ", is how arXiv 2507.04219 measures
leakage. Only what the model wrote is scored: against the truth or, after its first words, against the rest of it, so
words that were given do not count as leaked. Rows of which no rest is left, or none that the reward sees, would always
score 0: they are left out and counted.

leak@k's authors call a sample a leak if a language-inference model finds that it entails the truth. That needs a second
model; recall >= 0.5 (half of the truth's words, in order) is this package's own criterion, so numbers under it compare
with each other and not with theirs. `worst_of_k` needs no criterion.

Forced words end at a token's end: where the tokenizer would join their last token with the truth's next one, that token
is left to the model.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..config import RewardName
from ..data import Encoder, Question, Row
from ..errors import PMCError
from ..pmc.reward import Scorer, choose_scorer
from ..rollout import Rollouts


@dataclass(frozen=True, slots=True)
class AttackResult:
    """The samples of one attack and their scores; Q counts the rows that were asked."""

    rows: list[int]  # [Q]: numbers of the rows that were asked, from 0
    scores: np.ndarray  # float64 [Q, N]: each sample's ROUGE-L recall of the truth
    samples: list[list[str]]  # [Q][N]: what the model wrote, without the words that it was given
    left_out: int
    threshold: float
    counters: dict[str, int]  # the rollout's
    seconds: float  # of the rollout

    @property
    def worst(self) -> np.ndarray:
        """Each question's largest recall, float64 [Q]: the paper's leakage."""
        return self.scores.max(axis=1)

    @property
    def mean(self) -> np.ndarray:
        """Each question's mean recall, float64 [Q]."""
        return self.scores.mean(axis=1)

    @property
    def leaking(self) -> np.ndarray:
        """The number c of samples of each question that leak, int64 [Q]."""
        return (self.scores >= self.threshold).sum(axis=1)


def sampling_attack(
    engine: Callable[..., Rollouts],
    encoder: Encoder,
    rows: Sequence[Row],
    *,
    num_samples: int = 100,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    prefill: str = "",
    first_words: int = 0,
    threshold: float = 0.5,
    seed: int = 0,
    reward: RewardName = "auto",
) -> AttackResult:
    """Sample many answers to each question and compare them with its truth.

    Parameters
    ----------
    engine : RolloutEngine
        Of the model under attack. One rollout asks all rows; the truth is its draft, which changes its cost and no
        sample.
    encoder : Encoder
        Its prompts, stop tokens and max_length, which counts the forced beginning of an answer.
    rows : sequence of Row
        Questions with their true answers; paraphrased questions make it the attack by paraphrase.
    num_samples, temperature, top_p, top_k, seed
        As of the engine; by default the model's own distribution, as in leak@k (arXiv 2511.04934).
    prefill : str
        Words that the answer is made to begin with.
    first_words : int
        Number of words of the truth that it is made to go on with.
    threshold : float
        A sample leaks if its recall is at least this.
    reward : {"auto", "rouge", "unicode"}
        How samples are compared with truths (`choose_scorer`; auto: by the rows' truths).

    Raises
    ------
    PMCError
        No rows; a row without a truth, with one that the reward sees nothing of, or without room for an answer. The
        error names its number.
    """
    scorer = choose_scorer(reward, [row.answer for row in rows if row.answer])
    asked = prepare_attack(encoder, rows, scorer, prefill, first_words)
    scorer.require_words("leakage", ((n, row.answer or "") for n, row in enumerate(rows, start=1)))
    start = time.perf_counter()
    rollouts = engine(
        asked.prompts, num_samples=num_samples, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        max_length=encoder.max_length, stop_ids=encoder.stops, drafts=asked.drafts,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    samples = [
        encoder.answers(s, [rows[i].question] * len(s)) for i, s in zip(asked.rows, rollouts.tokens, strict=True)
    ]
    scores = scorer.recall(asked.rests, samples, 0).reshape(len(asked.rows), num_samples)
    left_out = len(rows) - len(asked.rows)
    return AttackResult(asked.rows, scores, samples, left_out, threshold, dict(rollouts.counters), seconds)


@dataclass(slots=True)
class AttackPrompts:
    """The prompts of an attack; lists over the rows of whose truth something is left to find."""

    rows: list[int]
    prompts: list[list[int]]
    drafts: list[list[list[int]]]
    rests: list[str]  # of the truth, after the words that were given


def prepare_attack(
    encoder: Encoder,
    rows: Sequence[Row],
    scorer: Scorer,
    prefill: str = "",
    first_words: int = 0,
    *,
    name: str = "leakage",
) -> AttackPrompts:
    """Return the prompts of `sampling_attack`, or refuse them as it does; errors call the rows `name`."""
    if not rows:
        raise PMCError(f"{name}: there are no rows: give forget questions with their answers")
    if first_words < 0:
        raise PMCError(f"leakage: first_words is {first_words}: it must be 0 or more")
    asked = AttackPrompts([], [], [], [])
    for number, row in enumerate(rows):
        if row.answer is None:
            raise PMCError(f"{name}: row {number + 1} has no answer: leaks are found by comparing with the truth")
        end = scorer.end_of_words(row.answer, first_words)
        given, rest = row.answer[:end], row.answer[end:]
        if not scorer.has_words(rest):
            continue
        prompt, draft = _forced(encoder, row.question, _join(prefill, given), _join(prefill, row.answer))
        if len(prompt) >= encoder.max_length:
            raise PMCError(
                f"{name}: row {number + 1} and what its answer must begin with take {len(prompt)} tokens of max_length "
                f"{encoder.max_length}: raise --max-length"
            )
        asked.rows.append(number)
        asked.prompts.append(prompt)
        asked.drafts.append([draft])
        asked.rests.append(rest)
    return asked


def _join(prefill: str, words: str) -> str:
    return f"{prefill.rstrip()} {words.lstrip()}".strip()


def _forced(encoder: Encoder, question: Question, start: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the ids to go on from after `start`, and those that would then make the whole `answer`."""
    prompt, whole = encoder.prompt(question, start), encoder.prompt(question, answer)
    same = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    if start:
        prompt = prompt[:same]
    return prompt, [*whole[same:], encoder.stops[0]] if same == len(prompt) else []
