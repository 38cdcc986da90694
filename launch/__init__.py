"""The trainer: what `deepspeed launch/train.py` runs."""
