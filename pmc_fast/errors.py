"""The exceptions that mean: the input, not the program, is at fault; and the end that someone asked for."""


class PMCError(ValueError):
    """Bad input or a run that cannot go on; its text is one line that names the value and the remedy."""


class NotFiniteError(PMCError):
    """The model computes NaN or infinite numbers: its weights are damaged, or training has diverged."""


class DivergedError(NotFiniteError):
    """Training has diverged."""


class LostProcessError(PMCError):
    """Another process of a distributed run is gone."""


class Terminated(BaseException):
    """The process was asked to end by SIGTERM; like KeyboardInterrupt no error that code may swallow."""
