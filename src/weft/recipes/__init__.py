"""Recipes: what a YAML file says, as records; nothing of it is looked up on a disk here."""
