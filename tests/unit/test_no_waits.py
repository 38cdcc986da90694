"""The trainer and benchmarks/trainer.py's loop on a pretended GPU: neither stands still in a micro-step or a step."""

import contextlib
import importlib.util
import pathlib
import types
from concurrent.futures import Future

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

from largebatch.launch.data.data_set import Images
from largebatch.launch.data.in_memory import with_statistics
from largebatch.launch.data.transfers import Download, uploaded
from largebatch.launch.recipe.resolved_run import make_phases, resolve
from largebatch.launch.trainer import classification
from largebatch.launch.trainer.engines import set_ghost_batches
from largebatch.launch.trainer.loop import TrainingLoop
from largebatch.launch.trainer.reporting import Reporter
from largebatch.launch.trainer.task import build_task
from largebatch.models.batch_norm import apply_ghost_batches
from largebatch.models.catalogue import build_model
from support.pretend_gpu import WaitsForTheDeviceError, backward, pretend_gpu

ROOT = pathlib.Path(__file__).resolve().parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MICRO_BATCH, NUM_IMAGES, NUM_TEST_IMAGES = 8, 100, 20

DAVIDNET = {"model": "davidnet", "model_options": {"width": 4}, "data": "cifar10"}
LENET = {"model": "lenet", "data": "cifar10"}
SYNTHETIC = {"data": "synthetic", "data_options": {"image_shape": [3, 32, 32], "num_test_samples": NUM_TEST_IMAGES}}
FILES = {"data": "imagenet", "data_options": {"image_size": 32, "workers": 0}, "augmentation": "maximal"}
BERT = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "max_positions": 32}
TEXT = {"model": "bert", "model_options": BERT, "data": "text"}
PADDED = {"sequence_length": 24, "vocab_size": 60, "short_sequence_probability": 1.0}
FULL = {"sequence_length": 8, "vocab_size": 60, "short_sequence_probability": 0.0}

SECTIONS = {
    "in memory": LENET | {"augmentation": "none"},
    "augmented": DAVIDNET | {"augmentation": "davidnet"},
    "mixed": DAVIDNET | {"augmentation": "davidnet", "mixup": 0.2, "label_smoothing": 0.1},
    "smoothed": LENET | {"augmentation": "none", "label_smoothing": 0.1},
    "made up": LENET | SYNTHETIC,
    "ghost batches": DAVIDNET | {"augmentation": "none", "batch_norm": {"ghost_batch_size": 4}},
    "files": DAVIDNET | FILES,
    "text with padding": TEXT | {"data_options": PADDED},
    "text without padding": TEXT | {"data_options": FULL},
}


def images():
    """In the place of CIFAR-10."""
    random = torch.Generator().manual_seed(0)
    parts = [
        Images(
            torch.randint(256, (num, 3, 32, 32), generator=random, dtype=torch.uint8),
            torch.arange(num) % 10,
        )
        for num in (NUM_IMAGES, NUM_TEST_IMAGES)
    ]
    return with_statistics("made up", *parts)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name of a data set: --data}."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, num in (("train", 16), ("val", NUM_TEST_IMAGES // 2)):
        for name in ("ant", "bee"):
            (folder / part / name).mkdir(parents=True)
            for i in range(num):
                Image.fromarray(random.integers(256, size=(40, 50, 3), dtype=np.uint8)).save(
                    folder / part / name / f"{i}.png"
                )
    text, digits = tmp_path_factory.mktemp("text") / "a.txt", "zero one two three four five six seven".split()
    text.write_text("\n".join(" ".join(random.choice(digits, 7)) + "." for _ in range(400)) + "\n", encoding="utf-8")
    return {"imagenet": str(folder), "text": str(text)}


class Engine:
    """In the place of DeepSpeed's, which reads norms and overflows of its own: one rank, SGD in fp32."""

    checkpoint_engine = types.SimpleNamespace(is_decoupled=lambda: False)

    def __init__(self, module, device, accumulation_steps):
        self.module, self.device, self.accumulation_steps = module.to(device), device, accumulation_steps
        self.basic_optimizer = self.optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        self.num_micro_steps = self.num_steps = 0

    def __call__(self, *inputs):
        return self.module(*inputs)

    def train(self):
        self.module.train()

    def backward(self, loss):
        (loss / self.accumulation_steps).backward()

    def step(self):
        self.num_micro_steps += 1
        if self.num_micro_steps % self.accumulation_steps == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.num_steps += 1

    def get_lr(self):
        return [0.1]

    def was_step_applied(self):
        return True

    def fp16_enabled(self):
        return False

    def zero_optimization_stage(self):
        return 0


class InThisThread(contextlib.AbstractContextManager):
    """In the place of a ThreadPoolExecutor, whose threads the pretended GPU does not see."""

    def __init__(self, **_):
        pass

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        done = Future()
        done.set_result(function(*arguments))
        return done


@pytest.fixture
def gpu(monkeypatch):
    from largebatch.launch.data import augmentation, data_set

    def forget_device():
        for module in (augmentation, data_set):
            for function in vars(module).values():
                if hasattr(function, "cache_clear"):
                    function.cache_clear()

    monkeypatch.setattr(classification, "load_data", own_images(classification.load_data))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # a DataLoader pins only then
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
    forget_device()
    with pretend_gpu(monkeypatch) as gpu:
        yield gpu
    forget_device()


def own_images(load_data):
    return lambda name, *rest: images() if name == "cifar10" else load_data(name, *rest)


def see_bert_as_on_a_gpu(monkeypatch):
    """transformers takes tensors without values for those of a compiler, and does not read them."""
    from transformers.utils import import_utils

    from largebatch.launch.trainer import pretraining

    monkeypatch.setattr(import_utils, "is_fake_tensor", lambda _: False)
    monkeypatch.setattr(pretraining, "ThreadPoolExecutor", InThisThread)


@contextlib.contextmanager
def training(section, folders, tmp_path, accumulation_steps=1, world_size=1, device=GPU):
    """A TrainingLoop on an Engine, and its micro-batches."""
    recipe = {
        "largebatch": section | {"steps": 100, "layer_stats_every_steps": 100},
        "train_batch_size": MICRO_BATCH * accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    draft = resolve(recipe, num_samples=1, world_size=world_size, output=str(tmp_path))
    task = build_task(draft.section, folders.get(section["data"]))
    plan = resolve(recipe, num_samples=task.num_samples, world_size=world_size, output=str(tmp_path))
    model = task.build_model()
    set_ghost_batches(model, plan, plan.micro_batch, world_size)
    monitor = types.SimpleNamespace(write_events=lambda events: None)
    reporter = Reporter(str(tmp_path / "metrics.jsonl"), monitor, rank=0, num_samples=10**6, samples_done=0)
    engine = Engine(model, device, accumulation_steps)
    loop = TrainingLoop(
        engine, make_phases([plan])[0], task, reporter, folder=str(tmp_path), rank=0, world_size=world_size
    )
    loop.speed = types.SimpleNamespace(count=lambda num_samples: 0.1, restart=lambda: None)
    with contextlib.closing(reporter), contextlib.closing(loop._batches(0)) as batches:
        yield loop, batches


def counted_apart(gpu, owner, name):
    """What waits inside of one method is allowed; returns a list to which each call adds its waits."""
    method, calls = getattr(owner, name), []

    def counting(*arguments):
        with gpu.may_wait() as waits:
            result = method(*arguments)
        calls.append(waits)
        return result

    setattr(owner, name, counting)
    return calls


def waits_only_for_events(waits):
    return all(wait.startswith("torch.cuda.Event.synchronize") for wait in waits)


def test_on_the_cpu_nothing_is_copied():
    values = torch.arange(3)
    assert uploaded(values, CPU) is values and Download(values).values() is values


def test_a_download_waits_when_it_is_read(gpu):
    values = torch.ones(3, device=GPU)
    with gpu.no_waits():
        download = Download(values)
        assert uploaded(values, GPU) is values
        with gpu.may_wait() as waits:
            assert not download.values().is_cuda
    assert len(waits) == 1 and waits_only_for_events(waits)


def test_the_pretended_backward_is_autograds():
    torch.manual_seed(0)
    model = build_model("davidnet", image_shape=(3, 8, 8), num_classes=10, options={"width": 2})
    apply_ghost_batches(model, ghost_batch_size=2, micro_batch=4, accumulation_steps=1, world_size=1)
    gradients = []
    for way in (torch.Tensor.backward, backward):
        for _ in range(2):  # the second adds to the first
            way(F.cross_entropy(model(torch.arange(768.0).view(4, 3, 8, 8)), torch.arange(4)))
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("accumulation_steps", [1, 4])
@pytest.mark.parametrize("name", SECTIONS)
def test_no_micro_step_and_no_step_waits(name, accumulation_steps, folders, tmp_path, monkeypatch, request):
    """The first step moves the data set. The report waits for the step before, and for nothing that was queued since."""
    section = SECTIONS[name]
    if section["data"] == "text":
        pytest.importorskip("transformers", reason="optional: pip install 'largebatch[bert]'")
        see_bert_as_on_a_gpu(monkeypatch)
    gpu = request.getfixturevalue("gpu")
    with training(section, folders, tmp_path, accumulation_steps) as (loop, batches):
        gpu.waits.clear()
        reports = counted_apart(gpu, loop, "_report_taken")
        with gpu.may_wait() as moves:
            assert loop._train_one_step(0, batches)
        assert len(moves) <= 2, "pixels and labels of a data set, or what synthetic images are made of"
        with gpu.no_waits():
            for step in (1, 2):
                num_queued = len(gpu.queued)
                assert loop._train_one_step(step, batches)
                assert len(gpu.queued) - num_queued >= 1 + accumulation_steps, (
                    "every batch brings something, and the step"
                )
        assert gpu.waits == [] and loop.engine.num_steps == 3
        assert [len(waits) for waits in reports] == [0, 1, 1] and all(map(waits_only_for_events, reports))
        assert gpu.changed_copies() == []


def test_several_ranks_ask_each_other_without_waiting(gpu, folders, tmp_path, monkeypatch):
    """Statistics over both ranks; in a long step a request to stop is looked for on the way."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    section = DAVIDNET | {"augmentation": "davidnet", "batch_norm": {"ghost_batch_size": "global"}}
    with training(section, folders, tmp_path, 4, world_size=2) as (loop, batches):
        gpu.waits.clear()
        reports = counted_apart(gpu, loop, "_report_taken")
        with gpu.may_wait():
            assert loop._train_one_step(0, batches)
        polls = counted_apart(gpu, loop, "_is_interrupted")
        with gpu.no_waits():
            assert loop._train_one_step(1, batches)
            assert loop._train_one_step(2, batches)
        assert [len(waits) for waits in reports] == [0, 1, 1] and all(map(waits_only_for_events, reports))
        assert [len(waits) for waits in polls] == [0, 1, 1, 1] * 2 and all(map(waits_only_for_events, polls))
        assert gpu.waits == [] and gpu.changed_copies() == []


def test_a_poll_looks_at_the_answer_of_the_one_before(gpu, folders, tmp_path, monkeypatch):
    answers = []

    class Answer:
        def __init__(self, flag):
            self.number = len(answers)
            answers.append(self)

        def values(self):
            return torch.tensor(float(self.number == 1))

    from largebatch.launch.trainer import loop as training_loop

    monkeypatch.setattr(training_loop, "Download", Answer)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: None)
    with training(SECTIONS["in memory"], folders, tmp_path, 4, world_size=2) as (loop, _):
        assert [loop._is_interrupted(micro_step) for micro_step in range(4)] == [False, False, True, False]
        assert len(answers) == 4
        loop.device = CPU  # there the answer is there at once
        assert [loop._is_interrupted(micro_step) for micro_step in range(2)] == [False, False]
        answers.clear()
        assert [loop._is_interrupted(micro_step) for micro_step in range(4)] == [False, True, False, False]


@pytest.mark.parametrize("name", ["in memory", "made up", "files", "text with padding", "text without padding"])
def test_an_evaluation_waits_at_its_end_alone(name, folders, tmp_path, monkeypatch, request):
    section = SECTIONS[name]
    if section["data"] == "text":
        pytest.importorskip("transformers", reason="optional: pip install 'largebatch[bert]'")
        see_bert_as_on_a_gpu(monkeypatch)
    gpu = request.getfixturevalue("gpu")
    with training(section, folders, tmp_path) as (loop, _):
        if section["data"] in ("cifar10", "synthetic"):
            loop.task.loader._on(GPU, loop.task.loader.data.test)
        gpu.waits.clear()
        num_forwards = []
        loop.engine.module.register_forward_hook(lambda *_: num_forwards.append(1))
        monkeypatch.setattr("largebatch.launch.trainer.classification.EVALUATION_BATCH", 8)
        monkeypatch.setattr("largebatch.launch.trainer.pretraining.EVALUATION_BATCH", 8)
        num_samples = len(loop.task.test if section["data"] == "text" else loop.task.loader.data.test)
        with gpu.no_waits(), pytest.raises(WaitsForTheDeviceError, match=r"reads values .*tolist\(\)"):
            loop._evaluate(1)
        assert len(num_forwards) == -(-num_samples // 8) >= 1 and len(gpu.waits) == 1
        assert gpu.changed_copies() == []


@pytest.mark.parametrize("name, accumulation_steps", [("in memory", 1), ("mixed", 4), ("made up", 4)])
def test_the_bare_loop_of_the_benchmark_does_not_wait_either(
    name, accumulation_steps, gpu, folders, tmp_path, monkeypatch
):
    num_steps = 2 * NUM_IMAGES // (MICRO_BATCH * accumulation_steps)  # over the end of an epoch
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("benchmark_of_the_trainer", ROOT / "benchmarks" / "trainer.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    arguments = types.SimpleNamespace(micro_batch=MICRO_BATCH, accumulation_steps=accumulation_steps)
    with training(SECTIONS[name], folders, tmp_path) as (loop, _):
        call = benchmark.bare_steps(loop, num_steps, arguments)
        gpu.waits.clear()
        with gpu.no_waits():
            call()
        assert gpu.waits == [] and gpu.changed_copies() == []
