"""One file for each command of ``largebatch``: its flags, and what it prints."""
