"""Mean losses of given answers: the candidate answers to a question share the computation of its prompt."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from ..data import Encoded, Encoder, Question
from ..data.packing import num_targets, pack
from ..errors import NotFiniteError, PMCError
from ..models.context import eval_mode
from ..models.packed_forward import PackedPass


def encode_candidates(
    encoder: Encoder, source: str, candidates: Iterable[tuple[Question, Sequence[str]]]
) -> list[list[Encoded]]:
    """Encode questions with their candidate answers, as they would be trained on: tag and eos count.

    Raises
    ------
    PMCError
        An answer of which no token fits max_length; the error names `source` and the row, not the text.
    """
    groups = []
    for number, (question, answers) in enumerate(candidates, start=1):
        group = [encoder.pair(question, answer) for answer in answers]
        if not all(map(num_targets, group)):
            raise PMCError(
                f"{source}, row {number}: no token of an answer fits max_length {encoder.max_length}: raise "
                "--max-length or shorten it"
            )
        groups.append(group)
    return groups


@torch.no_grad()
def mean_nlls(
    packed: PackedPass,
    groups: Sequence[Sequence[Encoded]],
    *,
    max_tokens: int = 8192,
) -> list[list[float]]:
    """Return the mean negative log-likelihood, in nats, of each answer's tokens.

    Parameters
    ----------
    packed : PackedPass
        Of the model, which is switched to eval meanwhile.
    groups : sequence of sequences of Encoded
        The candidate answers to one question each, with at least one token that is predicted.
    max_tokens : int
        Of one forward pass. A longer group takes several, each with the prompt anew; a longer answer one of its own.

    Returns
    -------
    list of lists of float
        As `groups`.
    """
    device = packed.base.get_input_embeddings().weight.device
    parts = [part for group in groups for part in _bounded(group, max_tokens)]
    means: list[float] = [0.0] * sum(map(len, groups))
    with eval_mode(packed.base):
        for p in pack(parts, max_tokens):
            p = p.to(device)
            logps = packed(p, torch.zeros(len(p.targets), device=device))[1].double()
            ends = p.cu_targets
            sums = torch.segment_reduce(-logps, "sum", offsets=ends)
            for number, nll in zip(p.sequences, (sums / ends.diff()).tolist(), strict=True):
                means[number] = nll
    if not all(map(math.isfinite, means)):
        raise NotFiniteError("the model's log-probs are NaN or infinite: its weights are damaged, or it overflows")
    every = iter(means)
    return [[next(every) for _ in group] for group in groups]


def _bounded(group: Sequence[Encoded], max_tokens: int) -> Iterator[list[Encoded]]:
    """Split a group into parts that fit one pass, their prompt counted once."""
    part: list[Encoded] = []
    size = 0
    for s in group:
        own = num_targets(s)  # the tokens past the prompt; the first of a part brings the prompt along
        if part and size + own > max_tokens:
            yield part
            part = []
        size = size + own if part else len(s.input_ids)
        part.append(s)
    if part:
        yield part
