"""Checks before a run on many nodes: ``python -m megatron_xielu.cluster.preflight``."""
