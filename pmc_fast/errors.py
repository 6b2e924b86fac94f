"""The one exception that means: the input, not the program, is at fault."""


class PMCError(ValueError):
    """Bad input or a run that cannot go on; its text is one line that names the value and the remedy."""
