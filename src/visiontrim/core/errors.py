"""The one exception that users of this package are meant to catch."""


class TrimError(ValueError):
    """Input that the caller can mend: the message names the numbers and a way out. The command line exits with 2."""
