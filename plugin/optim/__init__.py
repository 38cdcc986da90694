"""torch.optim.Optimizer classes: param groups, state, step(). The formulas are in largebatch.rules."""
