"""Elementwise passes and segment sums on local memory: one interface, one reference, several backends."""
