"""One file, one flag: what training with the activations can do besides."""
