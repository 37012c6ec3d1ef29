"""What every room may use: the standard library alone."""
