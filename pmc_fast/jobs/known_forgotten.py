"""Which forget questions need no unlearning: the untouched model's own samples never say what is to be forgotten."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import UnlearnConfig
from ..data import (
    Encoder,
    Question,
    Row,
    load_rows,
)
from ..errors import PMCError
from ..evaluation import (
    degenerate_share,
    encode_candidates,
    greedy_answers,
    known_forgotten,
    mean_nlls,
    sampling_attack,
)
from ..models.packed_forward import PackedPass
from ..pmc.reward import choose_scorer
from ..rollout import Rollouts
from ..utils.files import digest, one_error, write_file

FILE = "known_forgotten.json"


@dataclass(slots=True)
class KnownForgotten:
    """What was found out about a forget set; row numbers, no text."""

    rows: list[int]  # from 1: to be left out
    questions: int
    unjudged: int  # neither truth nor paraphrase to compare with: never left out
    samples: int  # of a question
    criterion: str
    degenerate: float | None  # share of the left out questions' samples under 3 words: no answer is no evidence
    seconds: float = 0.0  # of the rollout

    @property
    def kept(self) -> list[int]:
        """The questions to be unlearned, from 0."""
        out = set(self.rows)
        return [i for i in range(self.questions) if i + 1 not in out]


def read_paraphrases(config: UnlearnConfig, forget: Sequence[Row]) -> list[Question | None]:
    """Return each forget question in other words, where a truth is missing and the run has paraphrases.

    Raises
    ------
    PMCError
        Paraphrases of another number of questions; no row has anything to be judged by.
    """
    if all(row.answer for row in forget):
        return [None] * len(forget)
    rows = load_rows(config.paraphrased, paraphrased=True) if config.paraphrased else []
    if rows and len(rows) != len(forget):
        raise PMCError(
            f"skip_known_forgotten: {config.forget} has {len(forget)} rows and {config.paraphrased} {len(rows)}: "
            "where answers are missing, row by row the same questions in other words are needed"
        )
    if not rows and not any(row.answer for row in forget):
        raise PMCError(
            f"skip_known_forgotten: {config.forget} has no answers to compare samples with: give answers or "
            "--paraphrased, or leave it out"
        )
    if not rows:
        return [None] * len(forget)
    return [r.question if r.question != row.question else None for r, row in zip(rows, forget, strict=True)]


def judge(
    engine: Callable[..., Rollouts],
    encoder: Encoder,
    config: UnlearnConfig,
    forget: Sequence[Row],
    paraphrases: Sequence[Question | None],
    packed: PackedPass,
    autocast_dtype: Any = None,
    *,
    truths: Sequence[str] = (),
) -> KnownForgotten:
    """Sample every question once, as the run would, and find those that need no unlearning.

    Parameters
    ----------
    engine : callable
        A RolloutEngine, or a SharedEngine, of the untouched model.
    encoder, config
        The run's: num_samples, temperature, top_k, top_p and seed are its own.
    forget : sequence of Row
    paraphrases : sequence of Question or None
        `read_paraphrases`.
    packed : PackedPass
        Of the same model.
    autocast_dtype : torch.dtype, optional
        What it computes in under torch.autocast, if it does.
    truths : sequence of str, optional
        All that the run compares answers with, for the choice of its reward.

    Notes
    -----
    With a truth: no sample's ROUGE-L recall of it is above ``skip_threshold``. Without: the model's greedy answer is
    not more likely (mean log-prob of its tokens) than under the paraphrase, and no sample repeats it to
    ``leak_threshold``. The second half is this package's: a model that knows a fact well finds it as likely under
    any wording, and would be let off by the first alone; but it also says it again and again.
    """
    c = config
    without = [i for i, row in enumerate(forget) if not row.answer]
    said = greedy_answers(engine, encoder, [forget[i].question for i in without]) if without else []
    initial = dict(zip(without, said, strict=True))
    rows = [Row(row.question, row.answer or initial[i]) for i, row in enumerate(forget)]
    reward = choose_scorer(c.reward, [*truths, *(row.answer or "" for row in rows)]).name
    how: dict[str, Any] = {"temperature": c.temperature, "top_k": c.top_k, "top_p": c.top_p, "seed": c.seed}
    how["reward"] = reward
    result = sampling_attack(engine, encoder, rows, num_samples=c.num_samples, **how)
    scores = np.full((len(rows), c.num_samples), np.nan)
    scores[result.rows] = result.scores
    of_truth = scores.copy()
    of_truth[without] = np.nan
    skipped = known_forgotten(of_truth, c.skip_threshold)
    candidates = [
        i
        for i in without
        if paraphrases[i] is not None and (scores[i] < c.leak_threshold).all()  # NaN never is
    ]
    if candidates:
        asked = [(q or "", [initial[i]]) for i in candidates for q in (forget[i].question, paraphrases[i])]
        packed.check(autocast_dtype)
        groups = encode_candidates(encoder, c.forget, asked)
        nlls = np.array(mean_nlls(packed, groups, max_tokens=c.max_tokens, autocast_dtype=autocast_dtype))
        own, other = nlls.reshape(-1, 2).T
        skipped = sorted([*skipped, *(i for i, no in zip(candidates, own >= other, strict=True) if no)])
    texts = dict(zip(result.rows, result.samples, strict=True))
    return KnownForgotten(
        rows=[i + 1 for i in skipped],
        questions=len(forget),
        unjudged=sum(
            bool(np.isnan(scores[i]).any() or (i in initial and paraphrases[i] is None)) for i in range(len(rows))
        ),
        samples=c.num_samples,
        criterion=_criterion(c, reward, len(without), len(forget)),
        degenerate=degenerate_share([text for i in skipped for text in texts[i]], reward) if skipped else None,
        seconds=result.seconds,
    )


def _criterion(config: UnlearnConfig, reward: str, without: int, count: int) -> str:
    lines = []
    if without < count:
        lines.append(f"every sample's recall of the truth ({reward}) is at most {config.skip_threshold:g}")
    if without:
        lines.append(
            f"without a truth: the greedy answer is not more likely than under the paraphrase, and every sample's "
            f"recall of it is below {config.leak_threshold:g}"
        )
    return "; ".join(lines)


def remembered(
    directory: Path,
    weights: str,
    config: UnlearnConfig,
    forget: Sequence[Row],
    paraphrases: Sequence[Question | None],
) -> KnownForgotten | None:
    """Return what an earlier start of the same run found, on a model of these weights (their hash): a resumed run must leave out the same questions."""
    try:
        content = json.loads((directory / FILE).read_text(encoding="utf-8"))
        if content["of"] != _digest(weights, config, forget, paraphrases):
            return None
        return KnownForgotten(**content["found"])
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged: found out again
        return None


def remember(
    directory: Path,
    found: KnownForgotten,
    weights: str,
    config: UnlearnConfig,
    forget: Sequence[Row],
    paraphrases: Sequence[Question | None],
) -> None:
    """Keep what was found beside the run's checkpoints: row numbers and a hash."""
    content = {"of": _digest(weights, config, forget, paraphrases), "found": asdict(found)}
    with one_error(str(directory / FILE)):
        directory.mkdir(parents=True, exist_ok=True)
    write_file(directory / FILE, json.dumps(content), private=True)


def _digest(
    weights: str, config: UnlearnConfig, forget: Sequence[Row], paraphrases: Sequence[Question | None]
) -> str:
    rows = [[row.question, row.answer, other] for row, other in zip(forget, paraphrases, strict=True)]
    return digest([rows, config.algorithm(), config.skip_threshold, config.leak_threshold, weights])
