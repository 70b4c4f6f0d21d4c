"""The autotuner: finds the fastest way to compute a meta-gradient here, within a memory budget."""
