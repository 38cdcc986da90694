"""The mathematics of one layer, in the order of the papers. No ranks, groups, kernels or dtype casts."""
