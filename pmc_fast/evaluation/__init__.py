"""How well a model forgot, what leaks nevertheless, and what it kept."""

from .answers import greedy_answers
from .attacks import AttackResult, sampling_attack
from .evidence import (
    SideEffects,
    attack,
    check_attacks,
    leakage_settings,
    with_side_effects,
)
from .leakage import (
    LeakageSettings,
    known_forgotten,
    leakage,
    summarize,
)
from .likelihood import encode_candidates, mean_nlls
from .metrics import (
    degenerate_share,
    mean_words,
    unlearn_quality,
    utility,
)
from .questions import (
    EvalSet,
    check_sets,
    check_truths,
    evaluate,
    load_sets,
    truths_of,
    with_initial_answers,
)
from .side_effects import (
    TokenMass,
    answer_token_mass,
    answer_tokens,
    load_text,
    perplexity,
    shift,
    token_shift,
)
from .statistics import bootstrap_interval, leak_at_k, worst_of_k
from .tofu import (
    TofuRow,
    TofuSet,
    evaluate_tofu,
    load_tofu,
    read_retain_log,
    tofu_questions,
)

__all__ = [
    "AttackResult",
    "EvalSet",
    "LeakageSettings",
    "SideEffects",
    "TofuRow",
    "TofuSet",
    "TokenMass",
    "answer_token_mass",
    "answer_tokens",
    "attack",
    "bootstrap_interval",
    "check_attacks",
    "check_sets",
    "check_truths",
    "degenerate_share",
    "encode_candidates",
    "evaluate",
    "evaluate_tofu",
    "greedy_answers",
    "known_forgotten",
    "leak_at_k",
    "leakage",
    "leakage_settings",
    "load_sets",
    "load_text",
    "load_tofu",
    "mean_nlls",
    "mean_words",
    "perplexity",
    "read_retain_log",
    "sampling_attack",
    "shift",
    "summarize",
    "tofu_questions",
    "token_shift",
    "truths_of",
    "unlearn_quality",
    "utility",
    "with_initial_answers",
    "with_side_effects",
    "worst_of_k",
]
