"""What training leaves behind: a φ that can be adapted, evaluated and trained further, and the directory that holds it."""

from metaoptim.runs.run import Run, load

__all__ = ["Run", "load"]
