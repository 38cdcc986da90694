"""The recipe of a larger batch, from one that is known: what ``largebatch plan`` works out, and how it says so."""
