"""What keeps a run on many nodes going: the launcher, its ranks, restarts, the preflight."""
