"""LAMB under PyTorch's FSDP2: ``fully_shard`` cuts the layers, and the norms are still those of whole layers.

Run it: torchrun --nproc_per_node 2 examples/fsdp2.py
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
from digits_data import accuracy, build_model, digits, report
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

import largebatch

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch", type=int, default=512, help="global batch, divided among the ranks")
parser.add_argument("--output", help="file for the trained weights")
arguments = parser.parse_args()

dist.init_process_group()  # nccl on GPUs, gloo on CPUs
device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
mesh = init_device_mesh(device.type, (dist.get_world_size(),))

train_set, test_set = digits()
sampler = DistributedSampler(train_set, seed=0)
loader = DataLoader(train_set, batch_size=arguments.batch // dist.get_world_size(), sampler=sampler)

model = build_model().to(device)
for layer in model:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)

# after fully_shard: the optimizer must see the DTensor parameters
optimizer = largebatch.LAMB(
    model.parameters(), lr=0.04, weight_decay=0.01, exclude_from_adaptation=["bias", "norm"], model=model
)
num_steps = arguments.epochs * len(loader)
scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=num_steps, power=1)

for epoch in range(arguments.epochs):
    sampler.set_epoch(epoch)
    for images, labels in loader:
        loss = cross_entropy(model(images.to(device)), labels.to(device))
        loss.backward()
        # clip here, not with max_grad_norm: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

test_accuracy = accuracy(model, test_set)  # all ranks: they gather the layers together
weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if dist.get_rank() == 0:
    report(optimizer)
    print(f"loss {loss.item():.4f}, test accuracy {test_accuracy:.4f}")
    if arguments.output:
        torch.save(weights, arguments.output)
dist.destroy_process_group()
sys.stdout.flush()
# gloo's threads may abort an interpreter that ends by itself: "terminate called without an active exception"
os._exit(0)
