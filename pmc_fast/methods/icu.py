"""ICU: gradient ascent beside answers like those to be forgotten, until an answer is forgotten."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from nltk.translate.bleu_score import sentence_bleu

from ..utils.words import unicode_units
from .method import Batch, Method


@dataclass(frozen=True)
class ICU(Method):
    """-CE(forget) + lambda CE(pairs) + beta KL(pairs) (Tang et al., arXiv 2407.20271, sections 3.3 and 3.4).

    KL is that of the untouched model from the trained one, a mean over tokens. The paper pairs each text to be forgotten with its
    nearest neighbour among others of its kind: here, give these as a step's retain pairs. Defaults are those of the published
    code's README.
    """

    linear: ClassVar[bool] = True
    retain_weight: float = 0.5
    beta: float = 1.0

    @property
    def divergences(self) -> tuple[float, float]:
        return 0.0, self.beta

    def objective(self, batch: Batch) -> torch.Tensor:
        return -batch.nll("forget")

    @staticmethod
    def left(answers: Sequence[str], said: Sequence[str], bleu: float = 0.01) -> list[int]:
        """Return which answers are not forgotten yet: those to go on with (section 3.5), numbered from 0.

        Parameters
        ----------
        answers : sequence of str
            The true ones.
        said : sequence of str
            What the model answers now, greedily.
        bleu : float
            An answer whose BLEU is below counts as forgotten; the default is that of the published code's README.

        Notes
        -----
        No run drops answers by itself. Up to 3 words have no 4-grams, and are compared in shorter ones.
        The paper drops those, too, whose BERTScore is below 0.3.
        """
        return [i for i, pair in enumerate(zip(answers, said, strict=True)) if _bleu(*pair) >= bleu]


def _bleu(answer: str, said: str) -> float:
    reference, hypothesis = unicode_units(answer), unicode_units(said)
    longest = min(4, len(reference), len(hypothesis))
    if not longest:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of n-grams that are not found
        return float(sentence_bleu([reference], hypothesis, weights=[1 / longest] * longest))
