"""The pre-flight check behind ``largebatch doctor``: what each node has, what lies between them, what would make a run fail."""
