"""The only reader and writer of a save folder."""
