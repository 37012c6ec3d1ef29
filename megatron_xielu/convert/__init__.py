"""Checkpoints to and from Hugging Face: ``python -m megatron_xielu.convert``."""
