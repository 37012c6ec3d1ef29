"""Proves of a layout that checkpoints keep the optimizer's state, without its machines.

`walk` is one process in the place of all ranks (`absent_ranks`), on tensors without memory whose
elements are followed (`provenance`); `proof` is what must hold. ``docs/checkpoint-walk.md`` has
what was walked.
"""
