"""What a large batch costs before it is trained: micro-batch, learning rate, memory, communication and time.

Pure functions of numbers; only the probe (activations.py) runs a model. Printed by ``largebatch plan``.
"""
