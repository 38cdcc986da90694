"""Trains what a recipe says: from the command line to the last checkpoint."""
