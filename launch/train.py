"""Trains the model and data set of a recipe: deepspeed launch/train.py --deepspeed_config ds_configs/<recipe>.json"""

import sys

from largebatch.launch.trainer.main import main

if __name__ == "__main__":
    sys.exit(main())
