"""Side effects of unlearning on unrelated text: its perplexity, and how probable the forgotten answers' words are."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import Encoded
from ..data.loading import read_text
from ..data.packing import Pack, pack
from ..errors import NotFiniteError, PMCError
from ..models.context import eval_mode
from ..models.packed_forward import PackedPass
from ..utils.labels import IGNORED
from .questions import EvalSet

WINDOW = 1024
PASS_TOKENS = 8192  # of one forward pass
PASS_TARGETS = 1 << 22  # log-probs that one pass returns: each row has one for every answer token
COMMON = 1e-3


@dataclass(frozen=True, slots=True)
class TokenMass:
    """One model's probabilities in a text, token by token: small enough to keep while another model is loaded."""

    logps: np.ndarray  # float64 [M]: of the text's own tokens, the first of each text left out
    mass: np.ndarray  # float64 [M]: the probability that the answers' tokens have together, in each place
    occurs: np.ndarray  # bool [M]: whether the text's own token is one of the answers'
    tokens: int  # number of the answers' tokens

    @property
    def perplexity(self) -> float:
        return float(np.exp(-self.logps.mean()))


def load_text(source: str | Path) -> str:
    """Read a text file, UTF-8 or UTF-16, as one text."""
    try:
        text = io.StringIO(read_text(Path(source)), newline=None).read()
    except (OSError, ValueError) as error:
        raise PMCError(f"text {source} can't be read: {error}") from error
    if not text.strip():
        raise PMCError(f"text {source} is empty: give a file of plain text")
    return text


def text_windows(
    tokenizer: Any, texts: Sequence[str], window: int = WINDOW, stride: int | None = None
) -> list[Encoded]:
    """Cut texts into overlapping windows that together predict every token of a text but its first, once.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer; if it puts a BOS before a text, that is what the first token is predicted from.
    texts : sequence of str
        Each is a context of its own.
    window : int
        Tokens of a forward pass's sequence.
    stride : int, optional
        How many tokens later the next window begins; half a window by default. A window predicts what the one before
        did not reach, so beyond a text's beginning each token is predicted from at least window - stride others.
        Longer strides cost less and predict from less context.
    """
    stride = window // 2 if stride is None else stride
    if not 1 <= stride < window:
        raise PMCError(f"window is {window} and stride {stride}: they must overlap, 1 <= stride < window")
    windows = []
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        reached = 1  # the first token is predicted by nothing
        for begin in range(0, len(ids), stride):
            end = min(begin + window, len(ids))
            if end > reached:
                windows.append(Encoded(ids[begin:end], [IGNORED] * (reached - begin) + ids[reached:end]))
                reached = end
    if not windows:
        raise PMCError(f"{len(texts)} texts hold no token to predict: give longer ones")
    return windows


def answer_tokens(
    tokenizer: Any, answers: Sequence[str], texts: Sequence[str], *, common: float = COMMON
) -> list[int]:
    """Return the tokens of the answers that are followed in the texts, ascending.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer.
    answers : sequence of str
        The forget answers. Each is encoded as it stands and after a space, as words stand inside a text.
    texts : sequence of str
        Those in which they will be followed.
    common : float
        Tokens with a larger share of the texts than this are left out, as are special tokens. "the" and "." are in
        every answer and hold most of the probability anywhere; they would hide a change of rare words, such as
        "carpenter" in the paper's example (arXiv 2507.04219: unlearning "John Doe is a carpenter" must not make
        carpenters rare elsewhere). The texts alone decide it, so models are compared on the same tokens. A token that
        occurs once is never common.
    """
    counts = Counter(token for text in texts for token in tokenizer(text, verbose=False)["input_ids"])
    limit = max(1.0, common * counts.total())
    special = set(tokenizer.all_special_ids)
    found: set[int] = set()
    for answer in answers:
        for text in (answer.strip(), " " + answer.strip()):
            found.update(tokenizer(text, add_special_tokens=False)["input_ids"])
    kept = sorted(t for t in found - special if counts[t] <= limit)
    if not kept:
        raise PMCError(f"no token of {len(answers)} answers has at most a share of {common:g} of the texts: raise it")
    return kept


def answer_token_mass(packed: PackedPass, windows: Sequence[Encoded], tokens: Sequence[int] = ()) -> TokenMass:
    """Return a model's log-prob of each token that the windows predict, and there the probability mass of `tokens`.

    Parameters
    ----------
    packed : PackedPass
        Of the model, after its `check`. One product with the head gives both numbers, without gradients; logits exist
        in bounded chunks only.
    windows : sequence of Encoded
        `text_windows`; the perplexity depends on their size and stride, so compare models on the same windows.
    tokens : sequence of int
        `answer_tokens`.

    Raises
    ------
    PMCError
        A window that is longer than the model's table of positions; log-probs that are NaN.
    """
    known = getattr(packed.base.config.get_text_config(), "max_position_embeddings", None)
    if known and (longest := max(len(w.input_ids) for w in windows)) > known:
        raise PMCError(f"a window has {longest} tokens but the model has {known} positions: cut shorter ones")
    device = packed.base.get_input_embeddings().weight.device
    followed = torch.tensor(sorted(set(tokens)), dtype=torch.int64)
    logps, mass, occurs = [], [], []
    size = min(PASS_TOKENS, max(1, PASS_TARGETS // (len(followed) + 1)))
    for p in pack([[w] for w in windows], size):
        with torch.no_grad(), eval_mode(packed.base):
            asked = _also(p, followed).to(device)
            found = packed(asked, torch.zeros(len(asked.targets), device=device))[1].double().cpu()
        if not found.isfinite().all():
            raise NotFiniteError(
                "the model's log-probs are NaN or infinite: its weights are damaged, or it overflows"
            )
        count = len(p.targets)
        logps.append(found[:count])
        mass.append(found[count:].view(count, len(followed)).exp().sum(1))
        occurs.append(torch.isin(p.targets, followed))
    return TokenMass(torch.cat(logps).numpy(), torch.cat(mass).numpy(), torch.cat(occurs).numpy(), len(followed))


def _also(p: Pack, tokens: torch.Tensor) -> Pack:
    """Return a pack that also predicts `tokens` in every row, after its own targets."""
    count = len(p.targets)
    return replace(
        p,
        targets=torch.cat([p.targets, tokens.repeat(count)]),
        rows=torch.cat([p.rows, p.rows.repeat_interleave(len(tokens))]),
    )


def shift(before: TokenMass, after: TokenMass) -> dict[str, Any]:
    """Compare two models' probabilities in the same texts.

    Returns
    -------
    dict
        Ready for JSON, without any text. ``positions`` and ``tokens`` that were looked at; ``mass_before``,
        ``mass_after`` and ``mass_ratio``: the mean mass of the answers' tokens over all places; ``occurrences``:
        places where the text itself has one, and there ``probability_before``, ``probability_after``,
        ``probability_shift`` (mean change), ``shift_quantiles`` (5, 50 and 95 %) and ``lowered`` (share of places
        where it fell), None without occurrences; ``perplexity_before``, ``perplexity_after``.

    Notes
    -----
    The shift where a token occurs is what arXiv 2507.04219 plots for unrelated text (side effects): methods that
    push answers down lower it almost everywhere, PMC should leave it centred on 0. The mass over all places needs no
    occurrence, so it also speaks about names that the text does not hold.
    """
    if before.tokens != after.tokens or not np.array_equal(before.occurs, after.occurs):
        raise PMCError(
            f"shift: {len(before.logps)} and {len(after.logps)} places, {before.tokens} and {after.tokens} tokens: "
            "both models must read the same texts with one tokenizer, window and set of tokens"
        )
    if not before.tokens:
        raise PMCError("shift: no tokens were followed: give answer_token_mass those of answer_tokens")
    old, new = np.exp(before.logps[before.occurs]), np.exp(after.logps[after.occurs])
    some, moved = len(old) > 0, new - old
    return {
        "positions": len(before.logps),
        "tokens": before.tokens,
        "mass_before": float(before.mass.mean()),
        "mass_after": float(after.mass.mean()),
        "mass_ratio": float(after.mass.mean() / before.mass.mean()),
        "occurrences": len(old),
        "probability_before": float(old.mean()) if some else None,
        "probability_after": float(new.mean()) if some else None,
        "probability_shift": float(moved.mean()) if some else None,
        "shift_quantiles": np.quantile(moved, [0.05, 0.5, 0.95]).tolist() if some else None,
        "lowered": float((moved < 0).mean()) if some else None,
        "perplexity_before": before.perplexity,
        "perplexity_after": after.perplexity,
    }


@dataclass(frozen=True, slots=True)
class UnrelatedText:
    """A text that has nothing to do with the forget set, cut into windows for one tokenizer."""

    tokenizer: Any
    text: str
    windows: list[Encoded]

    @classmethod
    def read(cls, source: str, tokenizer: Any, positions: int | None) -> "UnrelatedText":
        """Read a text file for a model with so many positions (None: any number)."""
        text = load_text(source)
        return cls(tokenizer, text, text_windows(tokenizer, [text], min(WINDOW, positions or WINDOW)))

    def answer_tokens(self, sets: Sequence[EvalSet]) -> list[int]:
        """Return the tokens of the forget sets' answers that are followed in the text."""
        answers = [row.answer for s in sets if s.role == "forget" for row in s.rows if row.answer]
        return answer_tokens(self.tokenizer, answers, [self.text])

    def require_same(self, other: "UnrelatedText") -> None:
        """Refuse to compare models whose tokenizers split the text differently."""
        if self.windows != other.windows:
            raise PMCError(
                "side_effects_text: --before and --model have different tokenizers, so their probabilities do not "
                "compare: leave --side-effects-text or --before out"
            )
