"""Recipes: TOML files that say which algorithm, model and tasks, and how to train and to judge."""
