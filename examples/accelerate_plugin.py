"""Accelerate with its DeepSpeedPlugin, the optimizer from the ds_config or from the code; or with DDP or FSDP2.

Run it: deepspeed --num_accelerators 2 examples/accelerate_plugin.py
        deepspeed --num_accelerators 2 examples/accelerate_plugin.py --optimizer_from code
        torchrun --nproc_per_node 2 examples/accelerate_plugin.py --without_deepspeed ddp
        torchrun --nproc_per_node 2 examples/accelerate_plugin.py --without_deepspeed fsdp2
"""

import argparse
import json
import os
import pathlib
import sys

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DeepSpeedPlugin, DistributedType
from accelerate.utils import DummyOptim, DummyScheduler, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from digits_data import accuracy, build_model, digits, report
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import largebatch

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--config", default=pathlib.Path(__file__).with_suffix(".json"))
parser.add_argument("--optimizer_from", choices=["config", "code"], default="config")
parser.add_argument("--without_deepspeed", choices=["ddp", "fsdp2"], help="the wrapper; the optimizer from the code")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch", type=int, default=512, help="global batch, divided among the ranks")
parser.add_argument("--output", help="file for the trained weights")
parser.add_argument("--local_rank", help="set by the launcher")
arguments = parser.parse_args()

is_fsdp2 = arguments.without_deepspeed == "fsdp2"
# without DeepSpeed a batch is of all ranks together; else Accelerate would step the scheduler once for each rank in a step
is_split = arguments.without_deepspeed is not None
data_options = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0, split_batches=is_split)
options = {"dataloader_config": data_options}
if arguments.without_deepspeed:
    arguments.optimizer_from = "code"
    options["cpu"] = not torch.cuda.is_available()
    if is_fsdp2:
        fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        options["fsdp_plugin"] = None if options["cpu"] else fsdp_plugin
else:
    largebatch.register()  # anywhere before accelerator.prepare()
    config = json.loads(pathlib.Path(arguments.config).read_text())
    if arguments.optimizer_from == "code":
        del config["optimizer"], config["scheduler"]  # Accelerate refuses both in one run
    # without the backend's name Accelerate takes a CPU run under DeepSpeed for a single process
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    options["kwargs_handlers"] = [InitProcessGroupKwargs(backend=backend)]
    options["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=config)
accelerator = Accelerator(**options)
if is_fsdp2 and options["cpu"]:  # Accelerate takes FSDP for GPUs only unless its state says so
    accelerator.state.fsdp_plugin = fsdp_plugin
    accelerator.state._shared_state["distributed_type"] = DistributedType.FSDP
train_set, test_set = digits()
num_parts = 1 if is_split else accelerator.num_processes
loader = DataLoader(train_set, batch_size=arguments.batch // num_parts, shuffle=True)
num_batches = arguments.epochs * len(loader)
model = build_model()
if arguments.optimizer_from == "config":
    optimizer = DummyOptim(model.parameters(), lr=0.04, weight_decay=0.01)
    # Accelerate divides total_num_steps by the number of ranks, but not warmup_num_steps
    scheduler = DummyScheduler(optimizer, total_num_steps=num_batches, warmup_num_steps=6)
else:
    optimizer = largebatch.LAMB(
        model.parameters(), lr=0.04, weight_decay=0.01, exclude_from_adaptation=["bias", "norm"], model=model
    )
    scheduler = largebatch.WarmupPolyLR(optimizer, total_steps=num_batches // num_parts, warmup_steps=6, power=1)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

for _ in range(arguments.epochs):
    for images, labels in loader:
        loss = cross_entropy(model(images), labels)
        accelerator.backward(loss)  # DeepSpeed's step and its scheduler's are in here
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

trained = accelerator.unwrap_model(model)
test_accuracy = accuracy(trained, test_set)  # all ranks: under FSDP2 they gather the layers together
if is_fsdp2:
    weights = get_model_state_dict(trained, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
else:
    weights = trained.state_dict()
if accelerator.is_main_process:
    # the prepared model is DeepSpeed's engine; without it the prepared optimizer has ours inside
    report(optimizer.optimizer if arguments.without_deepspeed else model.basic_optimizer)
    print(f"loss {loss.item():.4f}, test accuracy {test_accuracy:.4f}")
    if arguments.output:
        torch.save(weights, arguments.output)
accelerator.end_training()
sys.stdout.flush()
if not torch.cuda.is_available():
    os._exit(
        0
    )  # gloo's threads may abort an interpreter that ends by itself: "terminate called without an active exception"
