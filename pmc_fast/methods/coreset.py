"""UPCORE: which forget questions to leave out, because forgetting them would cost the most elsewhere."""

from collections.abc import Sequence
from typing import Any

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
        Share to leave out, up to 0.5; the published code's default.
    seed : int
        Of the forest; the published code's.

    Raises
    ------
    PMCError
        scikit-learn is missing; fewer than 2 questions; a share out of range; hidden states that are not finite.
    """
    forest_type = _isolation_forest()
    if not 0 < pruned <= 0.5:
        raise PMCError(f"pruned is {pruned}: it must be above 0 and at most 0.5")
    if len(forget) < 2:
        raise PMCError(f"forget has {len(forget)} questions: outliers need at least 2")
    states = last_states(model, tokenizer, config, forget)
    if broken := [i for i, finite in enumerate(states.isfinite().all(1).tolist(), start=1) if not finite]:
        raise PMCError(f"forget, row {broken[0]}: its hidden state is not finite: the model's weights are damaged")
    forest = forest_type(contamination=pruned, random_state=seed)
    inside = forest.fit_predict(states.numpy()) > 0
    return [i for i, kept in enumerate(inside.tolist()) if kept]


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
