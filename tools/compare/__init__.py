"""What ``tools/compare_activations.py`` is made of."""
