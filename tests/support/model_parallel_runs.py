"""A script for the deepspeed launcher: trains a few steps with AutoTP, a pipeline or experts, and writes what each rank saw.

deepspeed model_parallel_runs.py {autotp,pipeline,experts} STAGE OUTPUT_FOLDER
"""

import itertools
import json
import os
import sys

import torch
from torch import nn

import largebatch

NUM_STEPS = 4
OPTIONS = {"lr": 0.02, "weight_decay": 0.01}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )


def tokens():
    return torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))


class Embedding(nn.Module):
    """Ten words; in the last stage of the pipeline the same weight, transposed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(11, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, words):
        return self.weight[words]

    def logits(self, hidden):
        return hidden @ self.weight.T


class Hidden(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        nn.init.normal_(self.linear.weight, std=0.3, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden):
        return torch.tanh(self.linear(hidden))


def words(step, data_rank):
    """[2 micro-batches, 4] of a step."""
    return torch.randint(0, 11, (2, 4), generator=torch.Generator().manual_seed(100 + 10 * step + data_rank))


def word_loss(logits, following):
    return nn.functional.cross_entropy(logits.float(), following)


class ExpertNetwork(nn.Module):
    def __init__(self):
        from deepspeed.moe.layer import MoE

        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(8, 8)
        # room for every token in every expert, so that none is dropped at random
        self.experts = MoE(8, nn.Linear(8, 8), num_experts=4, ep_size=2, k=1, capacity_factor=4.0, min_capacity=8)
        self.last = nn.Linear(8, 5)

    def forward(self, x, y):
        hidden, _, _ = self.experts(torch.tanh(self.first(x)))
        return nn.functional.cross_entropy(self.last(hidden), y)


def ratios_of(optimizer):
    return {name: figures["trust_ratio"] for name, figures in optimizer.layer_stats().items()}


def config_for(stage, micro_batch, accumulation=1):
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "LAMB", "params": OPTIONS},
        "zero_optimization": {"stage": stage},
    }


def train_autotp(stage):
    import deepspeed

    model = llama()
    config = config_for(stage, 2) | {"tensor_parallel": {"autotp_size": 2}}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    steps = []
    for _ in range(NUM_STEPS):
        loss = engine(input_ids=tokens(), labels=tokens()).loss
        engine.backward(loss)
        engine.step()
        steps.append((loss.item(), ratios_of(engine.basic_optimizer)))
    return steps


def train_pipeline(stage):
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    layers = [
        TiedLayerSpec("words", Embedding, tied_weight_attr="weight"),
        *[LayerSpec(Hidden, seed) for seed in (1, 2, 3)],
        TiedLayerSpec("words", Embedding, forward_fn=Embedding.logits, tied_weight_attr="weight"),
    ]
    model = PipelineModule(layers, num_stages=2, loss_fn=word_loss, partition_method="uniform")
    config = config_for(stage, 4, accumulation=2)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    data_rank = engine.grid.get_data_parallel_rank()
    batches = ((w, (w + 1) % 11) for step in itertools.count() for w in words(step, data_rank))
    return [(engine.train_batch(data_iter=batches).item(), ratios_of(engine.basic_optimizer)) for _ in range(NUM_STEPS)]


def train_experts(stage):
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    model = ExpertNetwork()
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config_for(stage, 8))
    generator = torch.Generator().manual_seed(50 + torch.distributed.get_rank())
    x, y = torch.randn(8, 8, generator=generator), torch.randint(0, 5, (8,), generator=generator)
    steps = []
    for _ in range(NUM_STEPS):
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        steps.append((loss.item(), ratios_of(engine.basic_optimizer)))
    return steps


def main():
    import deepspeed

    kind, stage, folder = [a for a in sys.argv[1:] if not a.startswith("--")]
    largebatch.register()
    # the shared-memory all-reduce would have to be compiled, and leaves files behind
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    steps = {"autotp": train_autotp, "pipeline": train_pipeline, "experts": train_experts}[kind](int(stage))
    with open(os.path.join(folder, f"{kind}_{stage}_rank{torch.distributed.get_rank()}.json"), "w") as file:
        json.dump(steps, file)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
