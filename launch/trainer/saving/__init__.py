"""Checkpoints in DeepSpeed's format, written whole or not at all, and read only if whole."""
