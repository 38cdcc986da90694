#!/usr/bin/env bash
# Sets up .venv if needed, then trains LeNet on scikit-learn's digits with LARS, SGD and LAMB at one large batch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh ""

num_gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
if [ "$num_gpus" -gt 0 ]; then
  # 480 images a step divide evenly among 1, 2, 4 or 8 devices
  num_ranks=1
  while [ $((num_ranks * 2)) -le "$num_gpus" ] && [ "$num_ranks" -lt 8 ]; do num_ranks=$((num_ranks * 2)); done
else
  export DS_ACCELERATOR=cpu
  num_ranks=2
fi

folder="runs/quickstart-$(date +%Y%m%d-%H%M%S)"
for optimizer in lars sgd lamb; do
  echo
  echo "== $optimizer"
  deepspeed --num_accelerators "$num_ranks" --log_level error --master_port "$(python -m largebatch.launch.supervise.launcher)" \
    launch/train.py \
    --deepspeed_config "ds_configs/lenet_digits_${optimizer}_480.json" --output "$folder/$optimizer"
done

echo
python -m largebatch.launch.study.results_table "$folder/lars" "$folder/sgd" "$folder/lamb"
echo
echo "TensorBoard: $PWD/$folder (tensorboard --logdir $folder)"
echo "metrics:     $PWD/$folder/lars/metrics.jsonl"
echo "checkpoint:  $PWD/$folder/lars/checkpoints/$(cat "$folder/lars/checkpoints/latest")"
