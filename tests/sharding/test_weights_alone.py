"""Weights without the optimizer (load_module_only), into a model that is not quite the one that was saved, as for fine-tuning."""

import logging

import pytest
import torch
from torch import nn

from support import engine_runs

ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}}
EXTRA = {"zero_allow_untested_optimizer": True}
LAYOUTS = [
    ((1, 0), (1, 0)), ((2, 1), (2, 1)), ((2, 2), (2, 2)), ((2, 3), (2, 3)),
    ((2, 1), (1, 0)), ((1, 0), (2, 2)), ((2, 2), (3, 1)), ((2, 3), (2, 1)), ((1, 1), (2, 3)), ((2, 3), (3, 3)),
]  # fmt: skip
each_layout = pytest.mark.parametrize(
    "pair", LAYOUTS, ids=lambda p: f"{p[0][0]}ranks{p[0][1]}-to-{p[1][0]}ranks{p[1][1]}"
)


class Classifier(engine_runs.LinearLoss):
    """A body and a head; the head's name says how many classes there are."""

    def __init__(self, num_classes, fill, is_body_frozen=False):
        nn.Module.__init__(self)
        self.body = nn.Parameter(torch.full((7, 5), fill), requires_grad=not is_body_frozen)
        self.scale = nn.Parameter(torch.full((5,), 2 * fill), requires_grad=not is_body_frozen)
        setattr(self, f"head{num_classes}", nn.Parameter(torch.full((num_classes, 5), 3 * fill)))

    @property
    def layers(self):
        return [p for p in self.parameters() if p.requires_grad]


def config(stage, optimizer):
    return engine_runs.ds_config("LAMB", stage, extra=EXTRA | (ADAMW if optimizer == "AdamW" else {}))


def save(stage, optimizer, folder, *model):
    with engine_runs.engine_for(config(stage, optimizer), model=Classifier(*model)) as engine:
        engine.save_checkpoint(folder, tag="saved")


def load(stage, optimizer, folder, *model, loads_by_hand=False, **options):
    """{parameter: its only value, or None if it has several}; what the next step's masters have; warnings."""
    import deepspeed

    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("largebatch")
    logger.addHandler(handler)
    if loads_by_hand:
        options["custom_load_fn"] = lambda src, dst: dst.load_state_dict(src, strict=False)
    try:
        with engine_runs.engine_for(config(stage, optimizer), model=Classifier(*model)) as engine:
            engine.load_checkpoint(folder, tag="saved", load_module_only=True, **options)
            found = {}
            for name, parameter in engine.module.named_parameters():
                with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                    values = parameter.detach().unique().tolist()
                    found[name] = values[0] if len(values) == 1 else None
            if optimizer == "LAMB":
                masters = {name: v.unique().tolist() for name, _, v in engine_runs.master_pieces(engine) if len(v)}
                assert all(values == [found[name]] for name, values in masters.items()), (masters, found)
            return found, [r for r in records if "does not hold" in r]
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("optimizer", ["LAMB", "AdamW"])
@each_layout
def test_a_new_head(rank_pool, tmp_path, pair, optimizer):
    """What is in both is taken, what is not stays; where largebatch cuts the layers anew, that is named."""
    (save_ranks, save_stage), (ranks, stage) = pair
    rank_pool.run(save_ranks, save, save_stage, optimizer, str(tmp_path), 3, 4.0)
    outcomes = rank_pool.run(ranks, load, stage, optimizer, str(tmp_path), 10, 1.0, load_module_strict=False)
    for found, _ in outcomes:
        assert found == {"body": 4.0, "scale": 8.0, "head10": 3.0}
    if optimizer == "LAMB":
        told = " ".join(line for _, lines in outcomes for line in lines)
        assert "does not hold head10; they stay as they are" in told


@pytest.mark.parametrize("is_frozen_there", [True, False], ids=["frozen there", "frozen here"])
@each_layout
def test_a_body_that_was_or_is_frozen(rank_pool, tmp_path, pair, is_frozen_there):
    (save_ranks, save_stage), (ranks, stage) = pair
    rank_pool.run(save_ranks, save, save_stage, "LAMB", str(tmp_path), 3, 4.0, is_frozen_there)
    outcomes = rank_pool.run(ranks, load, stage, "LAMB", str(tmp_path), 3, 1.0, not is_frozen_there)
    for found, told in outcomes:
        assert found == {"body": 4.0, "scale": 8.0, "head3": 12.0} and told == []


@pytest.mark.parametrize("pair", [p for p in LAYOUTS if 3 not in (p[0][1], p[1][1])], ids=str)
def test_a_function_of_the_callers_own(rank_pool, tmp_path, pair):
    (save_ranks, save_stage), (ranks, stage) = pair
    rank_pool.run(save_ranks, save, save_stage, "LAMB", str(tmp_path), 3, 4.0)
    for found, _ in rank_pool.run(ranks, load, stage, "LAMB", str(tmp_path), 10, 1.0, loads_by_hand=True):
        assert found == {"body": 4.0, "scale": 8.0, "head10": 3.0}


def test_a_strict_load_of_other_layers_says_how_to_load_them(rank_pool, tmp_path):
    rank_pool.run(2, save, 3, "LAMB", str(tmp_path), 3, 4.0)
    with pytest.raises(
        AssertionError, match="head10 is not in the checkpoint.*load_module_strict=False takes the layers"
    ):
        rank_pool.run(2, load, 1, "LAMB", str(tmp_path), 10, 1.0)


def whole_weights(engine):
    import deepspeed

    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().clone()
    return found


def resume_with_a_frozen_body(stages, optimizer, folder):
    """[{name: weight} of the run that went on, of the one resumed at the other stage], frozen layers given to the engine too."""
    import deepspeed
    import torch

    ends = []
    for stage, resumes in zip(stages, (False, True), strict=True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3))
        model[0].requires_grad_(False)
        if resumes:
            with torch.no_grad():
                model[0].weight.add_(1.0)
        config = {
            "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0, "zero_optimization": {"stage": stage},
            "optimizer": {"type": optimizer, "params": {"lr": 0.1}},
        }  # fmt: skip
        engine = deepspeed.initialize(model=model, config=config)[0]

        def steps(numbers, engine=engine):
            for number in numbers:
                x = torch.randn(2, 4, generator=torch.Generator().manual_seed(number))
                engine.backward(engine(x).square().mean())
                engine.step()

        if resumes:
            engine.load_checkpoint(folder, tag="frozen")
        else:
            steps(range(3))
            engine.save_checkpoint(folder, tag="frozen")
        steps(range(3, 6))
        ends.append(whole_weights(engine))
        engine.destroy()
    return ends


@pytest.mark.parametrize("optimizer", ["LAMB", "LARS"])
@pytest.mark.parametrize("stages", [(0, 0), (0, 1), (1, 0), (2, 0), (0, 3), (3, 0)], ids=str)
def test_a_resume_with_frozen_layers_that_the_engine_was_given(rank_pool, tmp_path, stages, optimizer):
    """Without ZeRO they are among the optimizer's layers, with it they lie beside it."""
    for went_on, resumed in rank_pool.run(2, resume_with_a_frozen_body, stages, optimizer, str(tmp_path)):
        assert went_on.keys() == resumed.keys()
        for name, weight in went_on.items():
            assert (resumed[name] - weight).abs().max() <= 1e-6, name
