"""What ends a data preparation with one line instead of a traceback."""


class DataError(Exception):
    """A flag or an environment that cannot work; the message names it and what would."""


class BadInputError(DataError):
    """Input that cannot be used; the message names the file and the row."""
