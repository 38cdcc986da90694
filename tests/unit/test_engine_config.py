"""The part of a ds_config that DeepSpeed reads: wrong entries and combinations are refused before DeepSpeed sees them."""

import copy
import json
import math

import pytest
from packaging.version import Version

from largebatch.engine import internals
from largebatch.engine.config_checks import check_engine_config
from largebatch.engine.config_checks.json_files import DEEPEST, read_json
from largebatch.engine.internals import installed_version
from largebatch.launch.recipe.reading import load_recipes

of_the_newest = pytest.mark.skipif(
    Version(installed_version()) < Version("0.19.8"),
    reason="a check that DeepSpeed itself makes in 0.19.8 and not in all before",
)

CONFIG = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 16,
    "optimizer": {"type": "LAMB", "params": {"lr": 0.01}},
    "scheduler": {"type": "WarmupPolyLR", "params": {"total_steps": 100}},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8, "stage3_param_persistence_threshold": 10},
    "bf16": {
        "enabled": "auto" if internals.internal("DeepSpeedBF16Config") else False
    },  # before 0.17 "auto" is no default
    "timers": {"throughput": {"enabled": False}},
    "comment": "DeepSpeed ignores it",
}


def changed(changes):
    config = copy.deepcopy(CONFIG)
    for path, value in changes.items():
        node = config
        *sections, last = path.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        if value is KeyError:
            del node[last]
        else:
            node[last] = value
    return config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"steps_per_print": math.inf},  # as Accelerate and Hugging Face's Trainer write it
        {"aio": {"thread_count": 1}},  # as Lightning does
        {"zero_optimization.legacy_stage1": False},
        {"tensor_parallel": {"autotp_size": 2}},
        {"data_parallel_size": 1, "sequence_parallel_size": 2},
        {"checkpoint": {"writer": {"type": "Fast", "data_parallel": None}, "parallel_write": {"pipeline_stage": True}}},
    ],
)
def test_what_is_right(changes):
    check_engine_config(changed(changes), world_size=2, num_ranks=2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"zero_optimisation": {"stage": 2}}, "'zero_optimisation' is not a key of a ds_config (did you mean 'zero_optimization'?)"),
        pytest.param({"amp": {"enabled": True}}, "amp is no longer a key of DeepSpeed's", marks=of_the_newest),
        pytest.param({"zero_optimization.mics_shard_size": 2}, "zero_optimization.mics_shard_size is no longer a key of DeepSpeed's", marks=of_the_newest),
        pytest.param({"zero_optimization": {"stage": 3, "compute_grad_norm": False}}, "zero_optimization is {'stage': 3, 'compute_grad_norm': False}; compute_grad_norm=false", marks=of_the_newest),
        ({"weight_quantization": {"x": 1}}, "weight_quantization.x is not known"),
        ({"zero_optimization": True}, "zero_optimization is True; expected a section"),
        ({"zero_optimization.stage": 4}, "zero_optimization.stage is 4; expected one of 0, 1, 2, 3"),
        ({"zero_optimization.stage": "2"}, "zero_optimization.stage is '2'; expected one of 0"),
        ({"zero_optimization.stagee": 2}, "zero_optimization.stagee is not known (did you mean 'stage'?)"),
        ({"zero_optimization.overlap_comm": "no"}, "zero_optimization.overlap_comm is 'no'; expected true or false"),
        ({"zero_optimization.reduce_bucket_size": 1.5}, "zero_optimization.reduce_bucket_size is 1.5; expected a whole number"),
        pytest.param({"zero_optimization.reduce_bucket_size": 0}, "zero_optimization.reduce_bucket_size is 0; expected greater than 0", marks=of_the_newest),
        ({"zero_optimization.reduce_bucket_size": 10**30}, "expected a whole number of at most 64 bits"),
        ({"zero_optimization.offload_optimizer": "cpu"}, "zero_optimization.offload_optimizer is 'cpu'; expected a section"),
        ({"zero_optimization.offload_optimizer": {"device": "gpu"}}, "zero_optimization.offload_optimizer.device is 'gpu'; expected"),
        ({"zero_optimization.offload_optimizer": {"devise": "cpu"}}, "zero_optimization.offload_optimizer.devise is not known (did you mean 'device'?)"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "with zero_optimization.stage 0; expected a stage >= 1"),
        ({"zero_optimization.offload_param": {"device": "cpu"}}, "offload_param.device is 'cpu' with zero_optimization.stage 1; expected a stage >= 3"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.nvme_path is None; expected a folder"),
        ({"train_batch_size": 60}, "train_batch_size is 60, train_micro_batch_size_per_gpu 16 and gradient_accumulation_steps None on 2 ranks"),
        ({"gradient_accumulation_steps": 3}, "expected train_batch_size = micro-batch x accumulation steps x ranks, here 96"),
        ({"train_batch_size": "auto"}, "train_batch_size is 'auto'; expected an integer >= 1; 'auto' is filled in"),
        ({"train_batch_size": True}, "train_batch_size is True; expected an integer >= 1"),
        ({"train_batch_size": KeyError, "train_micro_batch_size_per_gpu": KeyError}, "neither train_batch_size nor"),
        ({"gradient_clipping": math.nan}, "gradient_clipping is nan; expected a number >= 0"),
        ({"gradient_clipping": 10**400}, "; expected a number >= 0"),
        ({"gradient_clipping": 10**30}, "torch takes no integer beyond 64 bits"),
        ({"zero_optimization.stage": 2, "prescale_gradients": True}, "prescale_gradients is True with zero_optimization.stage 2"),
        ({"zero_optimization.stage": 3, "gradient_predivide_factor": 2.0}, "gradient_predivide_factor is 2.0 with zero_optimization.stage 3"),
        ({"zero_optimization.reduce_bucket_size": 2 * 10**18}, "zero_optimization.reduce_bucket_size is 2000000000000000000; expected at most"),
        ({"zero_optimization.legacy_stage1": True}, "zero_optimization.legacy_stage1 is true; expected false"),
        ({"communication_data_type": "fp8"}, "communication_data_type is 'fp8'; expected one of 'fp32'"),
        ({"data_types": {"grad_accum_dtype": "double"}}, "data_types.grad_accum_dtype is 'double'; expected one of"),
        ({"data_types": {"grad_accum_dtype": "fp32"}, "bf16.enabled": True, "zero_optimization": {}}, "DeepSpeed accumulates in the compute type"),
        ({"bf16": True}, "bf16 is True; expected a section"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "fp16.enabled and bf16.enabled are both true"),
        pytest.param({"fp16": {"enabled": True, "loss_scale_window": 0}}, "fp16.loss_scale_window must be > 0", marks=of_the_newest),
        ({"fp16": {"initial_scale_power": 10**6}}, "fp16.initial_scale_power is 1000000"),
        ({"tensorboard": {"enabled": True, "output_path": "a\0b"}}, "tensorboard.output_path is 'a\\x00b'; expected a text"),
        ({"comet": {"enabled": True}}, "the package comet_ml is not installed"),
        ({"timers": {"throughput": 3}}, "timers.throughput is 3; expected a section"),
        ({"flops_profiler": {"enabeld": True}}, "flops_profiler.enabeld is not known (did you mean 'enabled'?)"),
        ({"checkpoint": {"tag_validation": 3}}, "checkpoint.tag_validation is 3; expected one of"),
        ({"checkpoint": {"writer": {"type": "none"}}}, "checkpoint.writer.type is 'none'; expected one of 'mock', 'python', 'fast'"),
        ({"checkpoint": {"writer": {"typ": "fast"}}}, "checkpoint.writer.typ is not known (did you mean 'type'?)"),
        ({"checkpoint": {"parallel_write": {"pipeline_stage": 1}}}, "checkpoint.parallel_write.pipeline_stage is 1; expected true or false"),
        ({"tensor_parallel": {"autotp_size": 4}}, "tensor_parallel.autotp_size is 4; expected a divisor of the number of ranks, 2"),
        ({"tensor_parallel": {"autotp_size": -1}}, "tensor_parallel.autotp_size is -1; expected an integer >= 0"),
        ({"data_parallel_size": 4, "sequence_parallel_size": 2}, "data_parallel_size is 4 and sequence_parallel_size 2 on 2 ranks"),
        ({"scheduler": {"type": "WarmupPoly", "params": {}}}, "scheduler.type is 'WarmupPoly'; expected WarmupPolyLR"),
        ({"scheduler": {"type": "WarmupPolyLR"}}, "scheduler.params is missing"),
        ({"scheduler": {"type": "WarmupPolyLR", "parms": {}}}, "scheduler.parms is not known (did you mean 'params'?)"),
        ({"scheduler.params.totl_steps": 3}, "scheduler.params.totl_steps is not known (did you mean 'total_steps'?)"),
        ({"scheduler.params.power": math.inf}, "scheduler.params.power is inf; expected finite numbers"),
        ({"scheduler": {"type": "StepLR", "params": {"step_size": 3}}}, "scheduler.type is 'StepLR', torch's own, which takes none"),
        ({"scheduler": {"type": "math", "params": {}}}, "scheduler.type is 'math'; expected"),
        ({"optimizer.parms": {}}, "optimizer.parms is not known (did you mean 'params'?)"),
        ({"optimizer.params": [1]}, "optimizer.params is [1]; expected a section"),
    ],
)  # fmt: skip
def test_what_is_wrong(changes, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        check_engine_config(changed(changes), world_size=2, num_ranks=2)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_trainer_takes_no_unknown_keys():
    with pytest.raises(
        ValueError,
        match=r"'comment' is not a key of a ds_config \(did you mean 'comet'\?\); known: activation_checkpointing, ",
    ):
        check_engine_config(CONFIG, world_size=2, is_closed=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sequence_parallel_size": 2}, "sequence_parallel_size is 2; expected 1"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size is 2; expected 0 or 1"),
    ],
)
def test_a_trainer_cuts_neither_sequences_nor_models(changes, message):
    config = {key: value for key, value in changed(changes).items() if key != "comment"}
    with pytest.raises(ValueError, match=message):
        check_engine_config(config, world_size=2, is_closed=True)


def test_the_batch_is_not_compared_with_an_unknown_number_of_ranks():
    check_engine_config(changed({"gradient_accumulation_steps": 3}), world_size=None)


VALUES = {
    "gradient_allreduce_op": "sum",
    "expert_parallel": {},
    "datastates_ckpt": {},
    "torch_autocast": {},
    "checkpoint.writer": None,
    "data_types.param_dtype": "fp32",
    "data_types.buffer_dtype": "fp32",
}


@pytest.mark.parametrize("entry", internals.NEWER_ENTRIES)
def test_an_entry_that_this_deepspeed_does_not_know_is_refused(monkeypatch, entry):
    config = changed({entry: VALUES.get(entry, True)})
    place = internals.NEWER_ENTRIES[entry]
    if internals.at(place).find() is not internals.MISSING:
        assert internals.at(place).find() == entry.rpartition(".")[2]
        check_engine_config(config, world_size=2)
        monkeypatch.delattr(*internals.owner_of(f"deepspeed.{place}"))
    with pytest.raises(
        ValueError, match=f"^{entry} is not known to DeepSpeed {internals.installed_version()}, which would"
    ):
        check_engine_config(config, world_size=2)


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "is empty; expected a JSON object"),
        (b"\xff\xfe{", "cannot be read: 'utf-8' codec"),
        (b'{"a": 1,}', "is not JSON: "),
        (b'{"a": {"b": 1, "b": 2}}', "is not JSON: the key 'b' stands twice in one section"),
        (b"[1]", "holds a list; expected a JSON object"),
        (b'{"a":' * 100_000, "is nested too deeply"),
        (
            b'{"a":' * (DEEPEST + 1) + b"1" + b"}" * (DEEPEST + 1),
            f"is nested {DEEPEST + 1} levels deep; expected at most {DEEPEST}",
        ),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
    ],
)
def test_files_that_are_no_ds_config(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(ValueError) as caught:
        read_json(str(path), "the ds_config 'config.json'")
    assert str(caught.value).startswith(f"the ds_config 'config.json' {message}")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="the folder cannot be read"):
        read_json(str(tmp_path), "the folder")


def test_the_recipes_are_read_as_they_are(tmp_path):
    for name, recipe in load_recipes().items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(recipe))
        assert read_json(str(path), name) == recipe


def test_a_file_without_an_end():
    with pytest.raises(ValueError, match="config has more than 16,777,216 characters"):
        read_json("/dev/zero", "config")
