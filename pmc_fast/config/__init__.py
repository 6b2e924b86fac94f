"""Settings: composed of parts for each command, with one help text and one range a field."""

from .columns import COLUMN_NAMES, parse_columns, written_columns
from .commands import PRESETS, QUICK, BenchConfig, EvaluateConfig, RequestConfig, UnlearnConfig, VerifyConfig
from .compare import SHARED, CompareConfig
from .filters import UPCORE, Filter
from .methods import OF_RETAIN, PARAMETERS, PMC_ALONE, MethodConfig, MethodName, require_without_pmc

from .parts import (  # isort: skip
    MAX_DEGENERATE, SHORTEST_CUT, AttackConfig, EvaluationConfig, PMCConfig, PromptConfig, PromptFormat, RewardName, SharedConfig,
)  # fmt: skip

__all__ = [
    "COLUMN_NAMES", "MAX_DEGENERATE", "OF_RETAIN", "PARAMETERS", "PMC_ALONE", "PRESETS", "QUICK", "SHARED", "SHORTEST_CUT", "UPCORE", "AttackConfig", "BenchConfig", "CompareConfig", "EvaluateConfig", "EvaluationConfig", "Filter",
    "MethodConfig", "MethodName", "PMCConfig", "PromptConfig", "PromptFormat", "RequestConfig", "RewardName", "SharedConfig",
    "UnlearnConfig", "VerifyConfig", "parse_columns", "require_without_pmc", "written_columns",
]  # fmt: skip
