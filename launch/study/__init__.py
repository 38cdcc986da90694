"""Grids of training runs: which runs (grid), doing them (runner), what came out (results), and pictures (plots)."""
