#!/usr/bin/env bash
# All checks and measurements that need a GPU, in one call of under ten minutes.
#
#   bash benchmarks/gpu.sh [folder for the results]
#
# Needs: torch for CUDA with triton. In the folder wheels/, if there is one, or from PyPI: deepspeed and what it needs
# (hjson, py-cpuinfo, einops, msgpack, ninja, psutil, pydantic, tqdm), tensorboard, scikit-learn, pytest, hypothesis,
# timm, torch_optimizer, pytorch_optimizer, matplotlib. apex and DeepSpeed's FusedLamb are measured where they work.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/reports}"
mkdir -p "$out"

needed=(deepspeed tensorboard tqdm scikit-learn ninja pytest hypothesis timm torch_optimizer pytorch_optimizer matplotlib)
missing=()
for package in "${needed[@]}"; do python -m pip show -q "$package" >/dev/null 2>&1 || missing+=("$package"); done
if [ "${#missing[@]}" -gt 0 ]; then
    if [ -d wheels ]; then python -m pip install -q --no-index --find-links wheels "${missing[@]}"
    else python -m pip install -q "${missing[@]}"; fi
fi
python -m pip install -q --no-deps --no-build-isolation -e . || exit 1

nvidia-smi --query-gpu=name,memory.total,power.limit --format=csv | tee "$out/gpu.txt"
# runs the kernels' tests on the GPU first, and times nothing if one fails
DS_ACCELERATOR=cuda timeout 540 python benchmarks/kernels.py --device cuda --shapes resnet50,bert-large,tiny \
    --report "$out/kernels_cuda_$(date +%F).md" 2>&1 | tee "$out/gpu_benchmarks.txt" | tail -n 100
exit "${PIPESTATUS[0]}"
