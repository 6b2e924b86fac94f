"""UPCORE: which forget questions to leave out, because forgetting them would cost the most elsewhere."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..config import PromptConfig
from ..data import Encoder, Row
from ..errors import PMCError
from ..models.context import eval_mode


def upcore(
    model: Any, tokenizer: Any, config: PromptConfig, forget: Sequence[Row], *, pruned: float = 0.1, seed: int = 42
) -> list[int]:
    """Return the numbers, from 0, of the forget questions to keep: all but the outliers (Patil et al., arXiv 2502.15082, section 3).

    An isolation forest finds the outliers among the questions' hidden states (`last_states`), whose spread goes with what
    forgetting them damages. Of the pruned questions the paper finds that they are mostly forgotten with the others; no one who
    asked for them to be forgotten has been promised that.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        Untouched.
    tokenizer : transformers.PreTrainedTokenizerBase
    config : PromptConfig
    forget : sequence of Row
    pruned : float
        Share to leave out, above 0 and below 1; the published code's default. At least one question is kept.
    seed : int
        Of the forest; the published code's.

    Raises
    ------
    PMCError
        scikit-learn is missing; fewer than 2 questions; a share out of range; hidden states that are not finite.
    """
    check_upcore(len(forget))
    if not 0 < pruned < 1:
        raise PMCError(f"pruned is {pruned}: it must be above 0 and below 1")
    states = last_states(model, tokenizer, config, forget)
    if broken := [i for i, finite in enumerate(states.isfinite().all(1).tolist(), start=1) if not finite]:
        raise PMCError(f"forget, row {broken[0]}: its hidden state is not finite: the model's weights are damaged")
    # its `contamination` is this percentile, but at most a half; the largest score is never below one
    scores = _isolation_forest()(random_state=seed).fit(states.numpy()).score_samples(states.numpy())
    return np.flatnonzero(scores >= np.percentile(scores, 100 * pruned)).tolist()


def check_upcore(questions: int, name: str = "forget") -> None:
    """Refuse what `upcore` can't do, before a model is loaded: so few questions, of a source `name`; no scikit-learn."""
    _isolation_forest()
    if questions < 2:
        raise PMCError(f"{name} has {questions} questions: outliers need at least 2")


@torch.no_grad()
def last_states(model: Any, tokenizer: Any, config: PromptConfig, rows: Sequence[Row]) -> torch.Tensor:
    """Return the last but one of the layers' hidden states at the end of each prompt, [N, D] in float32 on the CPU.

    The published code takes the bare question's; here it is the prompt's, as the model is asked. One pass a question.
    """
    encoder = Encoder(tokenizer, config, model.generation_config)
    device = model.get_input_embeddings().weight.device
    states = []
    with eval_mode(model):
        for number, row in enumerate(rows, start=1):
            ids = torch.tensor([encoder.prompt(row.question, where=f"forget, row {number}")], device=device)
            out = model(input_ids=ids, output_hidden_states=True, use_cache=False, logits_to_keep=1)
            states.append(out.hidden_states[-2][0, -1].float().cpu())
    return torch.stack(states)


def _isolation_forest() -> Any:
    try:
        from sklearn.ensemble import IsolationForest
    except ImportError as error:
        raise PMCError("upcore needs scikit-learn: pip install 'pmc_fast[filters]'") from error
    return IsolationForest
