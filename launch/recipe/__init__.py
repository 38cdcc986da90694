"""The recipe of a run: found, read, overridden, checked, and resolved into what will run."""
