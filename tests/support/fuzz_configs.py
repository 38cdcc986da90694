"""Mutated ds_configs: what people mistype, and what nobody would write. A function of the random numbers given."""

import copy
import json
import math
import string
from dataclasses import dataclass, field

from largebatch.launch.recipe.reading import load_recipes

README_CONFIG = {
    "train_batch_size": 48,
    "optimizer": {
        "type": "LAMB",
        "params": {
            "lr": 0.01,
            "weight_decay": 0.01,
            "exclude_from_adaptation": ["bias", "norm"],
            "exclude_from_weight_decay": ["bias", "norm"],
        },
    },
    "scheduler": {"type": "WarmupPolyLR", "params": {"total_steps": 1000, "warmup_steps": 100, "power": 1}},
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
}
"""The JSON of "Use it in your DeepSpeed script" in the README."""


@dataclass
class Mutant:
    """A mutated input.

    Attributes:
        text: of the JSON file.
        arguments: of the command line, beside the file and the output folder.
        kinds: of the mutations, in their order.
        words: of which a clear error has to hold at least one; empty if the file's name has to do.
    """

    text: bytes
    arguments: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)


BUCKET = 100_000
"""Elements; DeepSpeed's default takes 2 GB of address space an engine."""


def toy_recipes():
    """Name -> recipe of the package, on the small MLP and the digits, a few steps long, in batches of 48."""
    return {name: toy(recipe) for name, recipe in load_recipes().items()}


def toy(recipe):
    recipe = copy.deepcopy(recipe)
    shrink(recipe)
    recipe["largebatch"] |= {"model": "mlp", "data": "digits"}
    recipe.setdefault("zero_optimization", {})["reduce_bucket_size"] = BUCKET
    for phase in recipe["largebatch"].get("phases") or []:
        shrink(phase)
    return recipe


def shrink(part):
    section = part.setdefault("largebatch", {})
    for name in ("model_options", "data_options", "augmentation", "batch_norm", "epochs", "no_weight_decay"):
        section.pop(name, None)
    if not section.get("phases"):
        section["steps"] = 3
    if part.get("train_batch_size"):
        part["train_batch_size"] = 48
    if isinstance(part.get("train_micro_batch_size_per_gpu"), int):
        part["train_micro_batch_size_per_gpu"] = 12


def script_configs():
    """Name -> ds_config of a script of one's own."""
    plain = {name: value for name, value in README_CONFIG.items()}
    lars = {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "LARS", "params": {"lr": 1.0, "momentum": 0.9, "weight_decay": 5e-4, "preset": "mlperf"}},
        "scheduler": {"type": "WarmupCosineDecayLR", "params": {"total_steps": 60, "warmup_steps": 6}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1e5},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    nlamb = {
        "train_batch_size": 32,
        "optimizer": {"type": "NLAMB", "params": {"lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-6}},
        "scheduler": {"type": "WarmupStepLR", "params": {"milestone_steps": [30, 60], "gamma": 0.1, "warmup_steps": 5}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 10000},
    }
    plain["zero_optimization"] = {"stage": 1, "reduce_bucket_size": BUCKET}
    nlamb["zero_optimization"]["reduce_bucket_size"] = BUCKET
    return {"readme": plain, "lars": lars, "nlamb": nlamb}


def paths(node, path=()):
    """Paths of all entries below a node."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from paths(value, (*path, key))


def at(node, path):
    for key in path:
        node = node[key]
    return node


def put(config, path, value):
    at(config, path[:-1])[path[-1]] = value


def words_of(path):
    return [str(key) for key in path if isinstance(key, str)]


def any_path(rng, config, is_wanted=lambda value: True):
    found = [path for path in paths(config) if is_wanted(at(config, path))]
    return rng.choice(found) if found else None


def drop_key(rng, config):
    path = any_path(rng, config)
    del at(config, path[:-1])[path[-1]]
    return words_of(path)


def misspell(rng, config):
    path = any_path(rng, config, lambda value: True)
    while not isinstance(path[-1], str):
        path = path[:-1]
    section = at(config, path[:-1])
    wrong = misspelt(rng, path[-1])
    items = [(wrong if key == path[-1] else key, value) for key, value in section.items()]
    section.clear()
    section.update(items)
    return [*words_of(path), wrong]


def misspelt(rng, word):
    position = rng.randrange(len(word)) if word else 0
    way = rng.choice(["drop", "double", "swap", "other", "case", "space", "dash", "plural"])
    if way == "drop" and len(word) > 1:
        return word[:position] + word[position + 1 :]
    if way == "double":
        return word[:position] + word[position : position + 1] * 2 + word[position + 1 :]
    if way == "swap" and len(word) > 1:
        position = min(position, len(word) - 2)
        return word[:position] + word[position + 1] + word[position] + word[position + 2 :]
    if way == "other":
        return word[:position] + rng.choice(string.ascii_lowercase) + word[position + 1 :]
    return {"case": word.upper(), "space": f" {word}", "dash": word.replace("_", "-"), "plural": f"{word}s"}.get(
        way, f"{word}x"
    )


VALUES = [
    True,
    False,
    "text",
    "",
    "12",
    "1e-3",
    "auto",
    "true",
    "null",
    3,
    0.5,
    [],
    {},
    [1, 2],
    [None],
    {"a": 1},
    ["a"],
    [[]],
]


def wrong_type(rng, config):
    path = any_path(rng, config)
    old = at(config, path)
    put(config, path, copy.deepcopy(rng.choice([v for v in VALUES if type(v) is not type(old)])))
    return words_of(path)


def null(rng, config):
    path = any_path(rng, config)
    put(config, path, None)
    return words_of(path)


NUMBERS = [
    -1, 0, 1, 2, 3, 7, -0.0, 0.5, 1.5, -3.5, 1e-320, 1e-8, 1e8, 5e8, 1e18, 2**31, 2**63, 2**64, 10**30, 10**400, 1e308, -1e308,
    -(10**30), math.nan, math.inf, -math.inf, 1e-300, 999_999_999_937,
]  # fmt: skip


def number(rng, config):
    path = any_path(rng, config, lambda v: isinstance(v, (int, float)) or v == "auto")
    put(config, path, rng.choice(NUMBERS))
    return words_of(path)


def container(rng, config):
    path = any_path(rng, config)
    old = at(config, path)
    new = [
        [old], {"value": old}, [old, old], [[[[old]]]], list(old) if isinstance(old, dict) else {"0": old}, [], {},
        nested(rng.choice([20, 300]), old), {str(path[-1]): old}, [None, old],
    ]  # fmt: skip
    put(config, path, copy.deepcopy(rng.choice(new)) if not isinstance(old, (dict, list)) else rng.choice(new))
    return words_of(path)


def nested(depth, value):
    for _ in range(depth):
        value = [value]
    return value


BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def batches(rng, config):
    for key in BATCH_KEYS:
        if rng.random() < 0.7:
            config[key] = rng.choice([1, 2, 3, 5, 7, 16, 48, 64, 100, 4096, "auto", 0, -4, 2.0, 10**9, 10**15])
        elif rng.random() < 0.3:
            config.pop(key, None)
    return [*BATCH_KEYS, "micro-batch"]


NAMES = {
    ("optimizer", "type"): [
        "LARZ", "lam", "Lamb", "NNLAMB", "nlamb", "LARS ", "", "Adma", "SGD", "Adam", "AdamW", "adagrad", "RMSprop", "LBFGS",
        "SparseAdam", "Optimizer", "lr_scheduler", "__doc__", "Muon", "Lion", "MuAdam", "OneBitAdam", "ZeroOneAdam", "Adafactor",
    ],
    ("optimizer", "params", "preset"): ["paper", "apex", "mlprf", "timm", "deepspeed", "author", "Paper", "", "nvidia"],
    ("optimizer", "params", "kernels"): ["auto", "reference", "triton", "cuda", "apex", "CPP", ""],
    ("optimizer", "params", "state_dtype"): ["bf16", "fp16", "float32", "BF16"],
    ("optimizer", "params", "formulation"): ["2017", "2019", "2018", 2017],
    ("scheduler", "type"): [
        "WarmupPoly", "warmuppolylr", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest", "StepLR",
        "ReduceLROnPlateau", "LambdaLR", "WarmupStepLR", "WarmupCosineDecayLR", "LRScheduler", "logger", "math", "",
    ],
    ("largebatch", "model"): ["mpl", "LeNet", "bert", "torchvision:", "torchvision:resnet9999", "../mlp", "", "lenet", "torchvision:vgg"],
    ("largebatch", "data"): ["digit", "imagenet", "cifar10", "mnist", "text", "synthetic", "/etc", ""],
    ("largebatch", "augmentation"): ["davidnet", "minimal", "None", "all"],
    ("largebatch", "lr_scaling"): [{"rule": "linaer", "base_lr": 1, "base_batch": 2}, {"rule": "sqrt"}, {"base_lr": 0.1}, "linear"],
    ("largebatch", "no_weight_decay"): [["bias"], ["["], ["nothing"], "bias", [3], ["norm", "bias"]],
    ("communication_data_type",): ["fp32", "bf16", "float", "fp8", "FP32", ""],
    ("data_types", "grad_accum_dtype"): ["fp32", "bf16", "fp16", "float64", "int8", ""],
    ("optimizer", "params", "exclude_from_adaptation"): [["bais"], ["("], ["norm"], "norm", [".*"]],
}  # fmt: skip


def unknown_name(rng, config):
    path = rng.choice(list(NAMES))
    make_sections(config, path[:-1])
    put(config, path, copy.deepcopy(rng.choice(NAMES[path])))
    return words_of(path)


def make_sections(config, path):
    for key in path:
        if not isinstance(config.get(key), dict):
            config[key] = {}
        config = config[key]


PRECISIONS = [
    {"fp16": {"enabled": True}}, {"fp16": {"enabled": True}, "bf16": {"enabled": True}}, {"bf16": {"enabled": True}},
    {"fp16": {"enabled": True, "loss_scale": -1}}, {"bf16": {"enabled": "yes"}}, {"fp16": True}, {"bf16": []},
    {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}}, {"bfloat16": {"enabled": True}},
    {"fp16": {"enabled": False, "loss_scale_window": 0}}, {"bf16": {"enabled": True, "loss_scale": 0}}, {},
    {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    {"bf16": {"enabled": True}, "communication_data_type": "fp16"}, {"fp16": {"enabled": True, "initial_scale_power": 10**6}},
]  # fmt: skip

ZERO_OPTIONS = {
    "offload_optimizer": [
        {"device": "cpu"}, {"device": "cpu", "pin_memory": True}, {"device": "cpu", "ratio": 0.3}, {"device": "gpu"}, {},
        {"device": "nvme"}, {"device": "nvme", "nvme_path": "/nonexistent"}, "cpu", None, {"device": "none"}, {"device": "cpu", "ratio": 2},
    ],
    "offload_param": [{"device": "cpu"}, {"device": "nvme"}, {"device": "nvme", "nvme_path": "/nonexistent"}, {"dev": "cpu"}, True],
    "round_robin_gradients": [True, "yes", 1],
    "contiguous_gradients": [False, 0],
    "reduce_scatter": [False],
    "overlap_comm": [True, False, None],
    "allgather_partitions": [False],
    "reduce_bucket_size": [1, 100, 5e8, 1.5, 0, "auto", "5e8", -1],
    "allgather_bucket_size": [1, 0, 1000, -5],
    "sub_group_size": [0, 1, 1000, 1e9, -1],
    "stage3_param_persistence_threshold": [0, 10, 1e5, -1],
    "stage3_max_live_parameters": [0, 1, 1e9],
    "stage3_prefetch_bucket_size": [0, 1, "auto"],
    "zero_hpz_partition_size": [1, 2, 0, -1],
    "zenflow": [{"topk_ratio": 0.1}, {}, None, True],
    "cpu_offload": [True, False],
    "ignore_unused_parameters": [False],
    "parameter_alignment": [True],
    "compute_grad_norm": [False],
    "legacy_stage1": [True],
    "load_from_fp32_weights": [False],
    "mics_shard_size": [2],
    "leaf_module": [{}, {"classes": ["Linear"]}, 3],
    "elastic_checkpoint": [True],
    "gather_16bit_weights_on_model_save": [True],
}  # fmt: skip


def combination(rng, config):
    """A ZeRO stage with options, a precision, and offloading, whether or not they go together."""
    touched = ["zero_optimization", "stage"]
    zero = {"stage": rng.choice([0, 0, 1, 1, 2, 2, 3, 3, 4, -1, "2", 1.0, 1.5, None]), "reduce_bucket_size": BUCKET}
    for name in rng.sample(list(ZERO_OPTIONS), rng.randint(0, 3)):
        zero[name] = copy.deepcopy(rng.choice(ZERO_OPTIONS[name]))
        touched.append(name.removeprefix("stage3_"))
    config["zero_optimization"] = zero
    precision = copy.deepcopy(rng.choice(PRECISIONS))
    for name in ("fp16", "bf16"):
        config.pop(name, None)
    config.update(precision)
    return [*touched, *precision, "fp16", "bf16", "gradient_clipping"]


EXTRA = {
    "amp": [{"enabled": True}], "elasticity": [{"enabled": True}], "sparse_gradients": [True],
    "wandb": [{"enabled": True}, {"enabled": False}, 3], "comet": [{"enabled": True}], "csv_monitor": [{"enabled": True, "output_path": "csv"}, "yes"],
    "tensorboard": [{"enabled": False}, {"enabled": True, "output_path": "tb"}, {"enabled": 1}, [], {"path": "x"}, {"output_path": "a\0b"}],
    "flops_profiler": [{"enabled": True, "profile_step": 1}, {"enabled": False}, {"enabeld": True}, True],
    "comms_logger": [{"enabled": True, "verbose": False}, {"prof_ops": 3}, None], "steps_per_print": [1, 0, None, "10", -1],
    "activation_checkpointing": [{"partition_activations": True}, {"partition": 1}, 5, None], "autotuning": [{"enabled": False}, 1],
    "data_efficiency": [{"enabled": True}, {"enabled": False}, None, 7], "compile": [{"deepcompile": False}, {"deepcompile": True}, None],
    "torch_autocast": [{"enabled": False}, {"dtype": "fp99"}, 1], "pipeline": [{"stages": 2}, 3], "hybrid_engine": [{"enabled": True}, 3],
    "tensor_parallel": [{"autotp_size": 2}, {"autotp_size": -1}, None, "x"], "aio": [{"block_size": 1}, {"use_gds": True}, 5],
    "checkpoint": [{"tag_validation": "Warn"}, {"tag_validation": 3}, {"load_universal": True}, {"writer": {"type": "none"}}, None, 7],
    "timers": [{"throughput": {"enabled": True}}, {"throughput": 3}, 3, None], "dump_state": [True, "yes"], "memory_breakdown": [True, 5],
    "wall_clock_breakdown": [True, "no", None], "seed": [3], "log_level": ["debug", 5], "prescale_gradients": [True, "x"],
    "gradient_predivide_factor": [0, 2.0, -1, "x"], "gradient_allreduce_op": ["sum", "max"], "zero_allow_untested_optimizer": [True, "yes"],
    "zero_force_ds_cpu_optimizer": [False, 2], "gradient_clipping": [0, 1, -1, "auto", None, math.nan, math.inf, [1]],
    "expert_parallel": [{"enabled": True}, 3], "weight_quantization": [{}, {"x": 1}], "sequence_parallel_size": [2, 0], "data_parallel_size": [4],
    "comment": ["mine"], "zzz": [1], "train_batch": [64], "": [1], "optimiser": [{"type": "LARS"}], "zero": [{"stage": 2}],
    "dataloader_drop_last": [True, "x"], "disable_allgather": [True], "curriculum_learning": [{}], "nebula": [{}], "dtype": ["bf16"],
}  # fmt: skip


def extra_key(rng, config):
    key = rng.choice(list(EXTRA))
    config[key] = copy.deepcopy(rng.choice(EXTRA[key]))
    return [key or "''"]


MUTATIONS = {
    "dropped key": drop_key,
    "misspelt key": misspell,
    "wrong type": wrong_type,
    "null": null,
    "number": number,
    "container": container,
    "batches": batches,
    "name": unknown_name,
    "combination": combination,
    "added key": extra_key,
}


def duplicate(rng, config):
    """The text of a JSON in which one key stands twice."""
    path = any_path(rng, config, lambda value: True)
    while not isinstance(path[-1], str):
        path = path[:-1]
    marked = copy.deepcopy(config)
    at(marked, path[:-1])[f"{path[-1]}\0"] = rng.choice([1, None, "x", at(config, path)])
    return json.dumps(marked).replace('\\u0000"', '"').encode(), words_of(path)


def break_syntax(rng, text):
    """Bytes that are no JSON any more, or another."""
    way = rng.choice(
        [
            "cut",
            "flip",
            "insert",
            "empty",
            "space",
            "quotes",
            "comma",
            "bom",
            "utf-16",
            "twice",
            "zero",
            "latin",
            "list",
            "word",
            "comment",
        ]
    )
    position = rng.randrange(len(text))
    if way == "flip":
        changed = bytearray(text)
        changed[position] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if way == "insert":
        return (
            text[:position]
            + bytes(rng.choice(b'{}[],:"\\0e-.x\xff\x00') for _ in range(rng.randint(1, 4)))
            + text[position:]
        )
    return {
        "cut": text[:position],
        "empty": b"",
        "space": b" \n\t",
        "quotes": text.replace(b'"', b"'"),
        "comma": text.replace(b"}", b",}"),
        "bom": b"\xef\xbb\xbf" + text,
        "utf-16": text.decode().encode("utf-16"),
        "twice": text + text,
        "zero": b"\0" * len(text),
        "latin": text[:position] + "ä".encode("latin-1") + text[position:],
        "list": b"[" + text + b"]",
        "word": rng.choice([b"null", b"3", b'"LARS"', b"true", b"NaN", b"[" * 100_000, b'{"a":' * 100_000]),
        "comment": b"// a comment\n" + text,
    }[way]


SETTINGS = [
    "optimizer.params.lr=2.5", "optimizer.params.lr", "=3", "optimizer.params.lr=", "optimizer=", "optimizer.type=LARZ", "largebatch=5",
    "largebatch.seed=-1", "largebatch.seed=1000000000000000000000", "largebatch.steps=1e999", "largebatch.epochs=0.0001",
    "optimizer.params.lr.x=1", "zero_optimization=3", "zero_optimization.stage=2", "a.b.c.d=1", ".=1", "..a=1", "largebatch.schedule_stretch=1e300",
    "largebatch.phases=[]", "largebatch.phases=[{}]", 'largebatch.phases=[{"largebatch":null}]', "largebatch.mixup=0.2", "largebatch.mixup=nan",
    "largebatch.save_every_epochs=1e-12", "largebatch.evaluate_every_epochs=1e-9", "largebatch.model=lenet", "largebatch.data=synthetic",
    'largebatch.data_options={"num_samples":0}', "largebatch.model_options={\"dropout\":7}", "largebatch.label_smoothing=1", "scheduler=null",
    "scheduler.params=null", "scheduler.params.total_steps=0", "scheduler.params.warmup_steps=-1", "scheduler.params.power=1e9", "optimizer.params=null",
    "optimizer.params.weight_decay=[1]", "tensorboard.output_path=/proc/nothing", "tensorboard=null", "largebatch.batch_norm=7",
    'largebatch.batch_norm={"ghost_batch_size":3}', "largebatch.expected=3", "largebatch.layer_stats_every_steps=0", "steps_per_print=0",
    "train_micro_batch_size_per_gpu=auto", "train_batch_size=1e3", "train_batch_size=999999999999999999", "largebatch.steps=999999999999999999999",
]  # fmt: skip

FLAGS = [
    ["--steps", "-1"], ["--steps", "0"], ["--steps", "x"], ["--epochs", "nan"], ["--epochs", "inf"], ["--epochs", "0"], ["--epochs", "1e300"],
    ["--zero-stage", "9"], ["--zero-stage", "-1"], ["--zero-stage", "3"], ["--precision", "fp8"], ["--precision", "fp16"], ["--precision", "bf16"],
    ["--seed", "-5"], ["--seed", "99999999999999999999999"], ["--seed", "4294967296"], ["--resume"], ["--data", "/nonexistent"], ["--data", ""],
    ["--bogus"], ["extra"], ["--local_rank", "x"], ["--output", ""], ["--output", "/proc/x"], ["--output", "/dev/null/x"], ["--set"],
]  # fmt: skip


def mutate_arguments(rng, mutant):
    if rng.random() < 0.6:
        setting = rng.choice(SETTINGS)
        mutant.arguments += ["--set", setting]
        mutant.words += ["--set", *setting.partition("=")[0].replace(".", " ").split()]
    else:
        flag = rng.choice(FLAGS)
        mutant.arguments += flag
        name = flag[0].lstrip("-")
        mutant.words += [
            name,
            *{"precision": ["fp16", "bf16"], "zero-stage": ["stage"], "output": ["run", flag[-1]]}.get(name, []),
        ]


def mutant_of(rng, config, *, has_arguments):
    """One to three mutations of a config; at most one of its text or of the arguments, as the last."""
    mutant, config = Mutant(b""), copy.deepcopy(config)
    last = rng.choices(["config", "duplicate key", "syntax", "arguments"], [70, 6, 10, 14 if has_arguments else 0])[0]
    for _ in range(rng.choices([1, 2, 3], [70, 20, 10])[0] if last == "config" else rng.choices([0, 1], [80, 20])[0]):
        kind = rng.choice(list(MUTATIONS))
        if config:
            mutant.words += MUTATIONS[kind](rng, config) if any_path(rng, config) else []
            mutant.kinds.append(kind)
    if last == "duplicate key" and config:
        mutant.text, words = duplicate(rng, config)
        mutant.words += words
    else:
        mutant.text = json.dumps(config, indent=1 if rng.random() < 0.5 else None).encode()
    if last == "syntax":
        mutant.text = break_syntax(rng, mutant.text)
        mutant.words = [
            word for path in paths(config) for word in words_of(path)
        ]  # a changed letter may be in any of them
    elif last == "arguments":
        mutate_arguments(rng, mutant)
    if last != "config":
        mutant.kinds.append(last)
    return mutant
