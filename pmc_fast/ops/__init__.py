"""The package's operations, each with three implementations behind one front.

``reference`` is plain torch and the oracle, ``cpu`` is C++, ``cuda`` is Triton. The tensor's device
chooses; ``backend=`` overrides it. What an implementation does not support it refuses by name.
"""

from .gather_logps import gather_logps
from .row_scales import row_scales, sequence_logps
from .sample_nucleus import sample_nucleus
from .weighted_nll import weighted_nll

__all__ = ["gather_logps", "row_scales", "sample_nucleus", "sequence_logps", "weighted_nll"]
