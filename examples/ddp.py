"""LARS under plain PyTorch's DistributedDataParallel.

Run it: torchrun --nproc_per_node 2 examples/ddp.py
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
from digits_data import accuracy, build_model, digits, report
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import largebatch

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch", type=int, default=512, help="global batch, divided among the ranks")
parser.add_argument("--output", help="file for the trained weights")
arguments = parser.parse_args()

dist.init_process_group()  # nccl on GPUs, gloo on CPUs
device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")

train_set, test_set = digits()
sampler = DistributedSampler(train_set, seed=0)
loader = DataLoader(train_set, batch_size=arguments.batch // dist.get_world_size(), sampler=sampler)
model = DistributedDataParallel(build_model().to(device))

# every rank holds every layer whole after the all-reduce of the gradients: nothing else is needed
optimizer = largebatch.LARS(model.module.named_parameters(), lr=10.0, weight_decay=5e-4)
num_steps = arguments.epochs * len(loader)
scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=num_steps, power=2)

for epoch in range(arguments.epochs):
    sampler.set_epoch(epoch)
    for images, labels in loader:
        loss = cross_entropy(model(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

if dist.get_rank() == 0:
    report(optimizer)
    print(f"loss {loss.item():.4f}, test accuracy {accuracy(model.module, test_set):.4f}")
    if arguments.output:
        torch.save(model.module.state_dict(), arguments.output)
dist.destroy_process_group()
sys.stdout.flush()
# gloo's threads may abort an interpreter that ends by itself: "terminate called without an active exception"
os._exit(0)
