"""Recipes: one DeepSpeed JSON each, named <model>_<data>_<optimizer>_<global batch>.json."""
