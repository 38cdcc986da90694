"""A DeepSpeed script that knows nothing of largebatch.

Run it: deepspeed --num_accelerators 2 --module largebatch examples/deepspeed_script.py \
            --deepspeed_config examples/deepspeed_script.json
"""

import argparse

import deepspeed
import torch
from digits_data import accuracy, build_model, digits
from torch.nn.functional import cross_entropy

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--output", help="file for the trained weights")
parser.add_argument("--local_rank", type=int, help="set by the launcher")
parser = deepspeed.add_config_arguments(parser)
arguments = parser.parse_args()

train_set, test_set = digits()
model = build_model()
engine, optimizer, loader, scheduler = deepspeed.initialize(
    args=arguments, model=model, model_parameters=model.parameters(), training_data=train_set
)

for epoch in range(arguments.epochs):
    loader.data_sampler.set_epoch(epoch)
    for images, labels in loader:
        loss = cross_entropy(engine(images.to(engine.device)), labels.to(engine.device))
        engine.backward(loss)
        engine.step()

if engine.global_rank == 0:
    built = type(engine.basic_optimizer)
    print(f"stepped by {built.__module__}.{built.__name__} under {type(optimizer).__name__}")
    print(f"loss {loss.item():.4f}, test accuracy {accuracy(engine.module, test_set):.4f}")
    if arguments.output:
        torch.save(engine.module.state_dict(), arguments.output)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
