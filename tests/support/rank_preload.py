"""Loaded once by the fork server of the rank pool."""

import logging
import os
import warnings

warnings.filterwarnings("ignore")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402
import deepspeed.utils  # noqa: E402

import largebatch  # noqa: E402

deepspeed.utils.logger.setLevel(logging.ERROR)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("largebatch").addHandler(logging.NullHandler())
largebatch.register()
