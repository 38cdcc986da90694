"""The recipes as the tables they come from: one module a source, one line a row.

``python -m largebatch.ds_configs.tables`` writes the JSON files beside this folder; tests/unit/test_recipes.py compares
them, so that neither can change alone. The files of digits and MNIST are written by hand.
"""
