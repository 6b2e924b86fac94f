"""The package's operations, each with three backends behind one function.

``reference`` is plain torch, which the others are tested against, ``cpu`` is C++, ``cuda`` is Triton. The tensors'
device decides; ``backend=`` overrides it. What a backend does not support is refused by name.
"""

from .gather_logps import gather_logps
from .row_scales import row_scales, sequence_logps
from .sample_nucleus import sample_nucleus
from .weighted_nll import weighted_nll

__all__ = ["gather_logps", "row_scales", "sample_nucleus", "sequence_logps", "weighted_nll"]
