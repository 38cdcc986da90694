"""Peak memory depends on the micro-batch, not on the global batch."""

import os
import subprocess
import sys

from largebatch.launch.supervise.launcher import free_port
from support import launching

MEASURED = """
import sys
from largebatch.launch.trainer.main import main
code = main(sys.argv[1:])
# not getrusage's ru_maxrss, which begins with the memory of the process that started this one
print("PEAK", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
sys.exit(code)
"""


def peak(folder, global_batch, micro_batch):
    """KiB of resident memory that a process has held at most, while it trained two steps."""
    arguments = [
        "--deepspeed_config", "ds_configs/lenet_digits_lars_480.json", "--steps", 2, "--output", folder,
        "--set", 'largebatch.data="synthetic"', "--set", f"train_batch_size={global_batch}",
        "--set", 'largebatch.data_options={"image_shape": [3, 64, 64], "num_test_samples": 32, "num_classes": 10}',
        "--set", f"train_micro_batch_size_per_gpu={micro_batch}", "--set", "largebatch.evaluate_every_epochs=1000",
        "--set", "tensorboard.enabled=false",
    ]  # fmt: skip
    env = launching.environment() | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(free_port()), "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, arguments)],
        cwd=launching.ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert os.path.exists(folder / "metrics.jsonl")
    return int(result.stdout.rpartition("PEAK ")[2])


def test_peak_memory_depends_on_the_micro_batch_alone(tmp_path):
    """32 times the batch in the same memory, within 2%; the same batch in one piece takes more."""
    small, large = peak(tmp_path / "16", 16, 16), peak(tmp_path / "512", 512, 16)
    assert abs(large - small) < 0.02 * small
    assert peak(tmp_path / "whole", 512, 512) > 1.1 * large
