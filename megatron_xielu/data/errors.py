"""What ends a data preparation with one line instead of a traceback."""

from megatron_xielu.common.text import without_secrets


class DataError(Exception):
    """A flag or an environment that cannot work; the message names it and what would."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class BadInputError(DataError):
    """Input that cannot be used; the message names the file and the row."""
