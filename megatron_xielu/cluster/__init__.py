"""What keeps a run on many nodes going: preflight, checkpoints, restarts, events."""
