"""Choosing between designs: comparing methods."""
