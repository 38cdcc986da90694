"""The planner's arithmetic: hand-worked figures, and what must hold for any model and layout."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from largebatch.planning.choice import Demand, choose, gigabytes, nearest_batches, parse_bytes
from largebatch.planning.communication import (
    NETWORKS,
    Cluster,
    Network,
    collective_seconds,
    communication_seconds,
    parse_network,
    ring_seconds,
    traffic,
)
from largebatch.planning.memory import OFFLOADS, PARTS, STATE_BYTES, Layout, largest_owned, memory
from largebatch.planning.scaling_rules import LARS_TABLE, lars_table_rates, scaled_rates
from largebatch.planning.training_time import duration, num_steps, step_time

LAYERS = st.lists(st.integers(1, 10**7), min_size=1, max_size=8)
OPTIMIZERS = st.sampled_from(sorted(STATE_BYTES))
STATES = ("weights", "masters", "optimizer_state")


@st.composite
def layouts(draw):
    stage = draw(st.integers(0, 3))
    offload = draw(st.sampled_from(OFFLOADS[: (1, 2, 2, 3)[stage]]))
    precision, bucket = draw(st.sampled_from(("fp32", "bf16", "fp16"))), draw(st.integers(1, 10**8))
    return Layout(stage, precision, draw(st.integers(1, 64)), offload, bucket)


def test_memory_of_resnet50_by_hand():
    """25,557,032 parameters, LAMB, bf16, ZeRO 1 on 4 ranks: 2 + 4/4 + 8/4 + 2 + 4 = 11 bytes a parameter."""
    found = memory([25_557_032], Layout(1, "bf16", 4), optimizer="lamb", activations=10**9)
    expected = {"weights": 51_114_064, "masters": 25_557_032, "optimizer_state": 51_114_064, "gradients": 51_114_064}
    assert {part: found.device[part] for part in expected} == expected
    assert found.device["accumulation_buffer"] == 102_228_128
    assert found.device["activations"] == 10**9 and found.moment == "backward" and found.host == {}
    assert found.total == 1_000_000_000 + 11 * 25_557_032


def test_bucket_of_deepspeeds_default_is_two_gigabytes():
    found = memory([1000], Layout(3, "bf16", 2), optimizer="lars", activations=0)
    assert found.device["bucket"] == 2_000_000_000


def test_a_bucket_that_fills_during_backward_by_hand():
    """fp32, ZeRO 2: the bucket flattened, the rank's sums, and the gradient's copy beside the one among the activations."""
    found = memory([1000, 1000], Layout(2, "fp32", 2, "none", 1000), optimizer="lamb", activations=10**6)
    assert found.moment == "reduction" and found.device["activations"] == 10**6
    assert found.device["workspace"] == 4 * 1000 + 4 * 1000 + 4 * 1000


@given(LAYERS, layouts(), OPTIMIZERS, st.integers(0, 10**10))
def test_parts_add_up(layers, layout, optimizer, activations):
    found = memory(layers, layout, optimizer=optimizer, activations=activations)
    assert set(found.device) == set(PARTS) and min(found.device.values()) >= 0
    assert found.total == sum(found.device.values()) and found.host_total == sum(found.host.values())
    assert bool(found.host) == (layout.offload != "none")


@given(LAYERS, st.integers(1, 64), st.sampled_from(("fp32", "bf16")), OPTIMIZERS)
def test_states_do_not_grow_with_the_stage(layers, world_size, precision, optimizer):
    """Weights, masters and optimizer state; buckets and copies do grow. fp32 pays a master copy from stage 1 on."""
    totals = []
    for stage in (0, 1, 2, 3):
        found = memory(layers, Layout(stage, precision, world_size), optimizer=optimizer, activations=0)
        totals.append(sum(found.device[part] for part in STATES))
    first = 0 if precision == "bf16" else 1
    assert totals[first:] == sorted(totals[first:], reverse=True)


@given(LAYERS, layouts(), OPTIMIZERS, st.integers(0, 10**9), st.integers(0, 10**9))
def test_more_activations_never_need_less(layers, layout, optimizer, activations, more):
    totals = [
        memory(layers, layout, optimizer=optimizer, activations=n).total for n in (activations, activations + more)
    ]
    assert totals[0] <= totals[1] <= totals[0] + more


@given(LAYERS, st.integers(1, 64))
def test_a_rank_owns_its_partition_and_no_more_than_everything(layers, world_size):
    assert math.ceil(sum(layers) / world_size) <= largest_owned(layers, world_size) <= sum(layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((4, "fp32", 1), "stage is 4; expected 0, 1, 2 or 3"),
        ((1, "fp8", 1), "precision is 'fp8'; expected one of fp32, bf16, fp16"),
        ((1, "bf16", 0), "0 ranks"),
        ((0, "bf16", 1, "optimizer"), "no offload 'optimizer' at stage 0"),
        ((2, "bf16", 1, "optimizer+parameters"), "that of the parameters at stage 3"),
    ],
)
def test_layouts_that_deepspeed_lacks(options, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        Layout(*options)


def test_ring_by_hand():
    """4 ranks, 1 GB at 10 GB/s and 1 us: an all-reduce moves 2 * 3/4 GB in 6 messages."""
    network = Network("test", 1e-6, 1e-10)
    assert ring_seconds("all_reduce", 10**9, 4, network) == pytest.approx(0.150006, rel=1e-12)
    assert ring_seconds("all_gather", 10**9, 4, network) == pytest.approx(0.075003, rel=1e-12)
    assert ring_seconds("all_reduce", 10**9, 1, network) == 0


def test_hierarchy_by_hand():
    """2 nodes of 4 GPUs: inside as above; between, the node's link carries 2 * 1/2 GB at 1 GB/s in 2 messages of 10 us."""
    cluster = Cluster(2, 4, Network("inside", 1e-6, 1e-10), Network("between", 1e-5, 1e-9))
    assert collective_seconds("all_reduce", 10**9, cluster) == pytest.approx(0.150006 + 1.00002, rel=1e-12)


@given(st.integers(1, 512), st.integers(1, 10**9), st.integers(1, 100))
def test_all_reduce_is_reduce_scatter_and_all_gather(num_ranks, num_bytes, calls):
    network = NETWORKS["100gbe"]
    halves = (ring_seconds(c, num_bytes, num_ranks, network, calls) for c in ("reduce_scatter", "all_gather"))
    assert ring_seconds("all_reduce", num_bytes, num_ranks, network, calls) == pytest.approx(sum(halves))


def sent(stage, accumulation_steps, **options):
    layout = Layout(stage, "bf16", 4, bucket_elements=options.pop("bucket", 600))
    found = traffic(
        [1000, 200], layout, optimizer=options.pop("optimizer", "lamb"), accumulation_steps=accumulation_steps
    )
    return {(t.collective, t.what): (t.num_bytes, t.num_calls) for t in found}


def test_traffic_by_hand():
    """1,200 parameters in 2 layers, bf16 with fp32 reduction, buckets of 600."""
    assert sent(0, 1) == {("all_reduce", "gradients"): (2400, 1)}
    norms = {("all_reduce", "sums of squares"): (32, 1)}
    assert sent(1, 64) == norms | {("all_reduce", "gradients"): (4800, 1), ("all_gather", "weights"): (2400, 1)}
    assert sent(2, 64) == norms | {("all_reduce", "gradients"): (4800 * 64, 128), ("all_gather", "weights"): (2400, 1)}
    # both layers are below stage 3's persistence threshold
    assert sent(3, 64)[("reduce_scatter", "gradients")] == (4800 * 64, 128)
    assert sent(3, 64)[("all_gather", "small weights")] == (2400, 2)
    assert ("all_reduce", "sums of squares") not in sent(1, 64, optimizer="adamw")


@given(LAYERS, st.integers(1, 512))
def test_accumulation_is_free_in_stage_1_and_costs_in_2(layers, steps):
    network = Cluster(1, 8, NETWORKS["pcie4"])
    seconds = [
        communication_seconds(
            traffic(layers, Layout(stage, "bf16", 8), optimizer="lars", accumulation_steps=n), network
        )
        for stage in (1, 2)
        for n in (1, steps)
    ]
    assert seconds[0] == seconds[1] and seconds[2] <= seconds[3]


def test_networks():
    assert parse_network("10gbe").beta == pytest.approx(0.8e-9)
    assert parse_network("5e-6,8e-11") == Network("5e-6,8e-11", 5e-6, 8e-11)
    for text in ("10gb", "1,2,3", "a,b"):
        with pytest.raises(ValueError, match="expected one of 1gbe"):
            parse_network(text)
    with pytest.raises(ValueError, match="expected alpha >= 0 and beta > 0"):
        parse_network("1e-6,0")
    with pytest.raises(ValueError, match="2 nodes need the network between them"):
        Cluster(2, 4, NETWORKS["pcie4"])


def test_step_time_by_hand():
    """32,768 samples on 8 ranks at 512/s: 8 s; 1 s of communication, of which a half pass of 2/3 * 8 s / 64 is hidden."""
    found = step_time(global_batch=32768, world_size=8, samples_per_second=512, communication=1.0, overlap=0.5,
                      accumulation_steps=64)  # fmt: skip
    assert found.compute == 8 and found.hidden == pytest.approx(8 / 3 / 64)
    assert found.total == pytest.approx(9 - 8 / 192) and found.efficiency == pytest.approx(8 / (9 - 8 / 192))
    with pytest.raises(ValueError, match="overlap is 2; expected 0 to 1"):
        step_time(global_batch=1, world_size=1, samples_per_second=1, communication=0, overlap=2)
    with pytest.raises(ValueError, match="samples/s is 0; expected > 0"):
        step_time(global_batch=1, world_size=1, samples_per_second=0, communication=0)


def test_steps_and_durations():
    assert num_steps(1_281_167, 32768, 90) == 3519  # as the LAMB authors' run.sh
    assert num_steps(60000, 60000, 35) == 35
    assert [duration(s) for s in (0.0421, 31, 852, 7500, 273_600)] == [
        "42.1 ms",
        "31 s",
        "14.2 min",
        "2 h 05 min",
        "3 d 4 h",
    ]


def test_sqrt_rule_is_the_lamb_papers_table():
    """arXiv:1904.00962, ResNet-50: from 0.04 and 20 epochs at 32K down to 0.04 / 2^3 and 0.3125 at 512."""
    rates = scaled_rates("sqrt", global_batch=512, base_lr=0.04, base_batch=32768, base_warmup_epochs=20)
    assert rates.lr == pytest.approx(0.04 / 2**3) and rates.warmup_epochs == pytest.approx(0.3125)


def test_linear_rule_is_goyals():
    """arXiv:1706.02677: 0.1 at 256 makes 3.2 at 8,192, warmed up over 5 epochs from 0.1."""
    rates = scaled_rates("linear", global_batch=8192, base_lr=0.1, base_batch=256, base_warmup_epochs=0)
    assert (rates.lr, rates.warmup_epochs) == (pytest.approx(3.2), 5)
    assert rates.lr * rates.warmup_start_factor == pytest.approx(0.1)


def test_lars_table():
    assert [(b, lars_table_rates("alexnet_bn", b).lr) for b in LARS_TABLE["alexnet_bn"]] == [
        (512, 2), (4096, 10), (8192, 14), (16384, 23), (32768, 22)
    ]  # fmt: skip
    between = lars_table_rates("resnet50", 2048)  # a third of the way from 1,024 to 8,192 in log2
    assert between.lr == pytest.approx(9 + 21 / 3) and between.warmup_epochs == 5
    with pytest.raises(ValueError, match="outside the table of resnet50"):
        lars_table_rates("resnet50", 65536)
    with pytest.raises(ValueError, match="no table for 'lenet'.*--rule sqrt"):
        lars_table_rates("lenet", 8192)
    with pytest.raises(ValueError, match="expected linear, sqrt or none"):
        scaled_rates("table", global_batch=1, base_lr=1, base_batch=1, base_warmup_epochs=0)


def demand(activations_per_sample=10**8, **options):
    given = {
        "layers": (20_000_000, 5_000_000),
        "optimizer": "lamb",
        "precision": "bf16",
        "global_batch": 32768,
        "world_size": 4,
    }
    return Demand(activations=lambda n: n * activations_per_sample, **given | options)


POWERS = [2**n for n in range(14)]


def test_choice_takes_the_largest_micro_batch_that_fits():
    chosen = choose(demand(), POWERS, gpu_memory=16 * 10**9)
    assert (chosen.layout.stage, chosen.layout.offload, chosen.micro_batch) == (1, "none", 128)
    assert chosen.memory.total <= 16 * 10**9 * 0.92 < demand().memory(chosen.layout, 256).total


@given(st.integers(10**8, 10**11), st.integers(10**5, 10**9), st.sampled_from(("fp32", "bf16")))
def test_whatever_is_chosen_fits(gpu_memory, activations, precision):
    wanted = demand(activations, precision=precision)
    try:
        chosen = choose(wanted, POWERS, gpu_memory=gpu_memory)
    except ValueError as error:
        assert "is too little" in str(error)
        smallest = [wanted.memory(wanted.layout(s, "none"), 1).total for s in (1, 2, 3)]
        assert min(smallest) > gpu_memory * 0.92
        return
    assert chosen.memory.total <= gpu_memory * 0.92
    accumulation_steps = wanted.accumulation_steps(chosen.micro_batch)
    assert chosen.micro_batch * accumulation_steps * wanted.world_size == wanted.global_batch


def test_a_higher_stage_before_a_tiny_micro_batch():
    """1.5e9 parameters with LAMB on 8 ranks: stage 1 takes 14.25 of the 14.72 GB, 4 samples fit beside; stage 2 has room."""
    wanted = demand(layers=(3 * 10**7,) * 50, world_size=8)
    assert choose(wanted, POWERS, gpu_memory=16 * 10**9, stage=1, offload="none").micro_batch == 4
    chosen = choose(wanted, POWERS, gpu_memory=16 * 10**9)
    assert chosen.layout.stage > 1 and chosen.micro_batch >= 8


def test_what_does_not_fit_is_named_with_remedies():
    with pytest.raises(ValueError) as error:
        choose(demand(), POWERS, gpu_memory=2 * 10**9, stage=1, offload="none", micro_batch=64)
    text = str(error.value)
    assert (
        "2 GB a GPU, 8% of it in reserve, is too little: micro-batch 64, ZeRO stage 1, offload none needs 6.67 GB"
        in text
    )
    assert "most of it activations, 6.4 GB" in text and "These fit: --micro-batch 8" in text
    with pytest.raises(
        ValueError, match="Even micro-batch 1 with everything offloaded needs .*: use GPUs with more memory"
    ):
        choose(demand(10**10), POWERS, gpu_memory=2 * 10**9)
    with pytest.raises(ValueError, match="most of it accumulation buffer.*These fit: --zero-stage 2"):
        choose(
            demand(10**6, layers=(10**7,) * 20, world_size=64), POWERS, gpu_memory=16 * 10**8, stage=1, offload="none"
        )


def test_stage_0_cannot_accumulate_in_16_bits():
    with pytest.raises(ValueError, match="cannot accumulate in 16 bits"):
        choose(demand(), POWERS, gpu_memory=None, stage=0)
    assert choose(demand(global_batch=1024), POWERS[:9], gpu_memory=None, stage=0).layout.stage == 0


@given(st.integers(1, 10**6), st.integers(1, 10**4))
def test_nearest_batches(batch, unit):
    below, above = nearest_batches(batch, unit)
    assert below % unit == above % unit == 0 and 0 < below < above + (below == unit) and above > batch
    assert below <= batch or below == unit


def test_sizes():
    assert [parse_bytes(t) for t in ("24GB", "24 GiB", "800MB", "1e9")] == [24 * 10**9, 24 * 2**30, 8 * 10**8, 10**9]
    for text in ("", "24 giga", "-1GB", "GB", "nan"):
        with pytest.raises(ValueError, match="expected a size such as 24GB"):
            parse_bytes(text)
    assert [gigabytes(n) for n in (1.25e9, 3.1e8, 4000, 12)] == ["1.25 GB", "310 MB", "4 kB", "12 B"]
