"""Recipes: TOML files that name an algorithm, a model and tasks, and say how to train and evaluate."""
