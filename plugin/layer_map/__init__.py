"""Which elements of which layer this rank owns, and how sums over a layer's elements become sums over all ranks."""
