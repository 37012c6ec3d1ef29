"""What the report says instead of being written."""


class NoReport(ValueError):
    """One line that names the folder, what is wrong with it, and where there is one the fix."""
