"""What register() changes in DeepSpeed, what it leaves alone, and what it refuses."""

import json
import pathlib
import subprocess
import sys

import pytest

from largebatch.engine import replacements
from largebatch.engine.internals import DeepSpeedFaultError, installed_version
from largebatch.engine.patches import PATCHES, listing
from support import engine_runs, registering

MESSAGE = "no error was raised"


def error_of(config_changes, *, algorithm="LAMB", stage=1, dtype="fp32", model=None, optimizer=None):
    """Runs inside a rank: the error of an engine, as text."""
    config = engine_runs.ds_config(algorithm, stage, dtype)
    for key, value in config_changes.items():
        node = config
        *sections, last = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    try:
        with engine_runs.engine_for(config, model=model, optimizer=optimizer):
            return MESSAGE
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def names_after_register():
    import deepspeed.runtime.config as config
    import deepspeed.runtime.engine as engine
    import deepspeed.runtime.zero.utils as utils

    import largebatch

    def snapshot():
        return (
            list(config.DEEPSPEED_OPTIMIZERS),
            list(utils.ZERO_SUPPORTED_OPTIMIZERS),
            engine.LAMB_OPTIMIZER,
            engine.DeepSpeedEngine._configure_optimizer,
        )

    before = snapshot()
    largebatch.register()
    return before == snapshot(), before[0].count("lars"), before[0].count("lamb")


def test_register_is_idempotent(rank_pool):
    assert rank_pool.run(1, names_after_register) == [(True, 1, 1)]


def class_built(json_type, params, stage):
    config = engine_runs.ds_config("LAMB", stage, extra={"optimizer": {"type": json_type, "params": params}})
    config["zero_allow_untested_optimizer"] = True
    with engine_runs.engine_for(config) as engine:
        return f"{type(engine.basic_optimizer).__module__}.{type(engine.basic_optimizer).__name__}"


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(
    "json_type, built",
    [
        ("LAMB", "largebatch.optim.lamb.LAMB"),
        ("Lamb", "largebatch.optim.lamb.LAMB"),
        ("lamb", "largebatch.optim.lamb.LAMB"),
        ("LaMb", "largebatch.optim.lamb.LAMB"),
        ("Lars", "largebatch.optim.lars.LARS"),
        ("NLAMB", "largebatch.optim.lamb.NLAMB"),
        ("nnLamb", "largebatch.optim.lamb.NNLAMB"),
        ("SGD", "torch.optim.sgd.SGD"),
        ("Adagrad", "largebatch.engine.baselines.Adagrad"),
    ],
)
def test_any_spelling_is_ours_and_other_optimizers_are_left_alone(rank_pool, json_type, built, stage):
    assert rank_pool.run(1, class_built, json_type, {"lr": 0.1}, stage) == [built]


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({"optimizer.params.betass": [0.9, 0.99]}, {}, "optimizer.params.betass is not known (did you mean 'betas'?)"),
        ({"optimizer.params.betas": [0.9, 2]}, {}, "optimizer.params: betas is (0.9, 2); expected [beta1, beta2]"),
        ({"optimizer.params.lr": "auto"}, {}, "lr is 'auto'; expected a number >= 0; 'auto' is filled in by launch/train.py"),
        ({"optimizer": {"type": "LARS"}}, {}, "optimizer.params.lr is missing; LARS has no default learning rate"),
        (
            {"optimizer.params.max_grad_norm": 1.0, "gradient_clipping": 1.0},
            {},
            'DeepSpeed clips at gradient_clipping=1.0, too. Under DeepSpeed the engine clips (the norm is the same): write "gradient_clipping": 1.0',
        ),
        ({"optimizer.params.preset": "apex"}, {}, '"max_grad_norm": null in optimizer.params'),
        (
            {"zero_optimization.offload_optimizer": {"device": "cpu", "ratio": 0.5}, "zero_optimization.stage": 3},
            {},
            "offload_optimizer.ratio is 0.5; DeepSpeed steps the rest of the parameters with an AdamW of its own",
        ),
        ({"optimizer.params.exclude_from_adaptation": ["embed"]}, {}, "'embed', which matches no parameter name"),
    ],
)  # fmt: skip
def test_refused(rank_pool, changes, options, message):
    (error,) = rank_pool.run(1, error_of, changes, **options)
    assert message in error


def unregistered_step():
    """A plain DeepSpeed process: our class as a client optimizer without register()."""
    import deepspeed.runtime.engine as engine_module

    hooked = engine_module.DeepSpeedEngine
    originals = {name: getattr(hooked, name) for name in ("_do_optimizer_sanity_check", "_configure_optimizer")}
    for name, method in originals.items():
        setattr(hooked, name, method.__wrapped__)
    try:
        import largebatch

        config = engine_runs.ds_config("LAMB", 1, extra={"zero_allow_untested_optimizer": True})
        del config["optimizer"]
        build = lambda model: largebatch.LAMB(model.parameters(), lr=0.1)  # noqa: E731
        with engine_runs.engine_for(config, optimizer=build) as engine:
            engine_runs.take_step(engine, 0)
            return MESSAGE
    except RuntimeError as error:
        return str(error)
    finally:
        for name, method in originals.items():
            setattr(hooked, name, method)


def test_without_register_a_sharded_step_is_an_error_not_a_wrong_norm(rank_pool):
    (error,) = rank_pool.run(1, unregistered_step)
    assert "call largebatch.register() before deepspeed.initialize()" in error


def client_optimizer_masters(num_steps):
    import largebatch

    config = engine_runs.ds_config("LAMB", 1)
    del config["optimizer"]
    build = lambda model: largebatch.LAMB(model.parameters(), **engine_runs.ALGORITHMS["LAMB"])  # noqa: E731
    with engine_runs.engine_for(config, optimizer=build, num_steps=num_steps) as engine:
        for step in range(num_steps):
            engine_runs.take_step(engine, step)
        return engine_runs.master_pieces(engine)


def test_a_client_optimizer_is_exact_too(rank_pool):
    from support.problems import relative_error

    found = engine_runs.assemble(rank_pool.run(2, client_optimizer_masters, 10))
    expected, _ = engine_runs.unsharded("LAMB", 10)
    assert relative_error(found, expected) < 3e-6


@pytest.fixture(scope="module")
def without_each_name():
    """Of a process in which register() was never called."""
    ended = subprocess.run(
        [sys.executable, "-m", "support.registering"],
        cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", registering.names_needed())
def test_without_a_name_nothing_is_registered_and_with_it_back_everything_is(without_each_name, name):
    error, is_unchanged, error_later, is_changed = without_each_name[name]
    assert f" lacks {name.replace(':', '.')}" in error and "Install a tested version" in error and "\n" not in error
    assert is_unchanged
    assert (error_later, is_changed) == ("", True)


def test_the_table_says_what_register_changes():
    shown = listing()
    assert len({patch.target for patch in PATCHES}) == len(PATCHES)
    for patch in PATCHES:
        assert patch.target.replace(":", ".") in shown
        assert all((patch.effect, patch.reason, patch.until, patch.scope))


def missing_attribute_of_a_wrapper():
    from largebatch.engine import wrappers

    class DeepSpeedZeroOptimizer:
        single_partition_of_fp32_groups = []

    class ZenFlowOptimizer:
        pass

    errors = []
    for wrapper in (DeepSpeedZeroOptimizer(), ZenFlowOptimizer()):
        try:
            wrappers.read_layout(wrapper)
        except RuntimeError as error:
            errors.append(str(error))
    return errors


def test_an_unknown_layout_names_attribute_and_version(rank_pool):
    ((missing, unknown),) = rank_pool.run(1, missing_attribute_of_a_wrapper)
    assert f"DeepSpeed {installed_version()}" in missing and "has no attribute 'round_robin_bit16_groups'" in missing
    assert "ZenFlowOptimizer" in unknown and "not known to be exact" in unknown


def wrong_map_is_noticed():
    """A reader that mixes up two layers must be caught by the comparison with the tensors."""
    from largebatch.engine import wrappers

    class Swapped(wrappers.ZeroStages1And2):
        def layout(self, wrapper):
            groups = wrapper.round_robin_bit16_groups
            mixed = [[group[2], *group[1:2], group[0], *group[3:]] for group in groups]
            offsets = [wrappers.cumulative_offsets(group) for group in mixed]
            return wrappers.read_slices(
                wrapper.single_partition_of_fp32_groups, mixed, offsets, wrapper.real_dp_process_group
            )

    original = wrappers.READERS["DeepSpeedZeroOptimizer"]
    wrappers.READERS["DeepSpeedZeroOptimizer"] = Swapped()
    try:
        return error_of({})
    finally:
        wrappers.READERS["DeepSpeedZeroOptimizer"] = original


def test_a_map_that_does_not_fit_the_tensors_is_refused_on_every_rank(rank_pool):
    errors = rank_pool.run(2, wrong_map_is_noticed)
    assert all("do not hold the layers that its attributes say" in error for error in errors)


class StandInEngine:
    """What of an engine is looked at; its wrapper is an object of a class of that name."""

    def __init__(self, wrapper, is_bf16=True, **attributes):
        self.optimizer = type(wrapper, (), attributes)()
        self.bfloat16_enabled = lambda: is_bf16


@pytest.mark.parametrize(
    "engine, version, words",
    [
        (StandInEngine("FP16_UnfusedOptimizer"), "0.18.4", "never clears the gradients"),
        (StandInEngine("FP16_UnfusedOptimizer", loss_scale_config=1), "0.18.6", None),
        (StandInEngine("FP16_UnfusedOptimizer", is_bf16=False), "0.18.4", None),
        (StandInEngine("BF16_Optimizer"), "0.18.9", "leaves the last micro-batch out"),
        (StandInEngine("BF16_Optimizer", immediate_grad_update=True, custom_loss_scaler=False), "0.18.9", None),
        (StandInEngine("BF16_Optimizer"), "0.19.0", None),
        (StandInEngine("DeepSpeedZeroOptimizer"), "0.18.9", None),
    ],
)
def test_bf16_that_a_release_trains_wrongly_is_refused(monkeypatch, engine, version, words):
    """What the classes are like in those releases was read in their sources; tests/sharding runs the refusals where one is installed."""
    monkeypatch.setattr(replacements, "installed_version", lambda: version)
    monkeypatch.setattr(replacements, "internal", lambda name: name)  # all of them have scale_if_loss
    if words is None:
        replacements.refuse_faulty_bf16(engine)
    else:
        with pytest.raises(DeepSpeedFaultError, match=f"DeepSpeed {version} {words}"):
            replacements.refuse_faulty_bf16(engine)
