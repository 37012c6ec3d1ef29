"""``python -m megatron_xielu.evaluate``: loss, perplexity and bits per byte of a checkpoint."""
