"""Which way to compute a meta-gradient is the fastest here, within a memory budget."""
