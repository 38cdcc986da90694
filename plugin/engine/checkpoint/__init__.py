"""Checkpoints that go anywhere: any world size, ZeRO stage, precision, offload and number of param groups; plain PyTorch; the
optimizer state of other packages.

Under DeepSpeed nothing has to be called: after :func:`largebatch.register`, ``engine.save_checkpoint`` writes down where the layers
lie, and ``engine.load_checkpoint`` loads a checkpoint at whatever layout the engine has. The rest is for going between forms:

    consolidated = checkpoint.read_deepspeed("checkpoints/step100")
    checkpoint.write_pytorch(checkpoint.convert(consolidated, "apex.FusedLAMB"), "apex.pt")
    consolidated = checkpoint.from_state_dicts(model.state_dict(), optimizer.state_dict(), "timm.Lars")
    checkpoint.write_deepspeed(checkpoint.convert(consolidated, "LARS"), "checkpoints/step100", "timm.Lars")
"""

from largebatch.engine.checkpoint.consolidated import (
    ConsolidatedState,
    read_deepspeed,
    torch_state_dict,
    write_deepspeed,
)
from largebatch.engine.checkpoint.peers import KINDS, changed_options, convert
from largebatch.engine.checkpoint.plain import from_state_dicts, names_in_optimizer, read_pytorch, write_pytorch

__all__ = [
    "KINDS",
    "ConsolidatedState",
    "changed_options",
    "convert",
    "from_state_dicts",
    "names_in_optimizer",
    "read_deepspeed",
    "read_pytorch",
    "torch_state_dict",
    "write_deepspeed",
    "write_pytorch",
]
