"""What goes over the network in a training step, and how long that takes.

Which collectives DeepSpeed 0.19.8 calls was read in its code and counted on running engines (tests/engine/
test_plan_memory.py). Stage 1 reduces once a step; stages 2 and 3 reduce at every micro-step, stage 2 with whole all-reduces.

Time: the alpha-beta model, with rings as NCCL and Horovod use them (Patarasu and Yuan, 2009): on p ranks an all-reduce of n
bytes takes 2 (p - 1) (alpha + n beta / p), a reduce-scatter or an all-gather half of that. Over nodes it is hierarchical:
reduce-scatter inside the node, all-reduce of the pieces between nodes, all-gather inside the node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from largebatch.config import nearest_hint
from largebatch.planning.memory import OFFLOADS, Layout

SUMS_OF_SQUARES = dict.fromkeys(("lars", "lamb", "nlamb", "nnlamb"), (2,)) | {"lans": (1, 3)}
"""Optimizer -> in each of our own all-reduces of a step, how many fp64 sums for each layer."""

PREFETCH_ELEMENTS = 50_000_000
"""DeepSpeed's stage3_prefetch_bucket_size."""

PERSISTENCE_THRESHOLD = 100_000
"""DeepSpeed's stage3_param_persistence_threshold: smaller parameters stay whole on every rank."""


@dataclass(frozen=True)
class Network:
    """Attributes: alpha: seconds a message; beta: seconds a byte, of a node (between nodes) or of a GPU (inside one)."""

    name: str
    alpha: float
    beta: float

    def __post_init__(self):
        if not (self.alpha >= 0 and self.beta > 0):
            raise ValueError(
                f"network {self.name!r} has alpha {self.alpha!r} s and beta {self.beta!r} s/byte; expected alpha >= 0 and beta > 0"
            )


def of_rate(name: str, gigabits_per_second: float, alpha: float) -> Network:
    return Network(name, alpha, 8e-9 / gigabits_per_second)


NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        of_rate("1gbe", 1, 50e-6),
        of_rate("10gbe", 10, 7.2e-6),
        of_rate("25gbe", 25, 5e-6),
        of_rate("50gbe", 50, 5e-6),
        of_rate("100gbe", 100, 5e-6),
        of_rate("qdr-infiniband", 32, 1.2e-6),
        of_rate("fdr-infiniband", 54.5, 0.7e-6),
        of_rate("2x-fdr-infiniband", 109, 0.7e-6),
        of_rate("edr-infiniband", 100, 0.7e-6),
        of_rate("hdr-infiniband", 200, 0.7e-6),
        of_rate("ndr-infiniband", 400, 0.7e-6),
        of_rate("8x-ndr-infiniband", 3200, 0.7e-6),
        of_rate("omni-path", 100, 1e-6),
        of_rate("pcie3", 8 * 12, 5e-6),
        of_rate("pcie4", 8 * 24, 5e-6),
        of_rate("pcie5", 8 * 48, 5e-6),
        of_rate("nvlink1", 8 * 80, 5e-6),
        of_rate("nvlink2", 8 * 150, 5e-6),
        of_rate("nvlink3", 8 * 300, 5e-6),
        of_rate("nvlink4", 8 * 450, 5e-6),
        of_rate("tpu-v3", 8 * 83, 1e-6),
    )
}
"""Line rates in one direction; "pcie" with what its packets leave. TPU v3: all-reduce bandwidth of a pod, 340 TB/s / 1,024 chips
/ 4 links (cloud.google.com/tpu/docs/v3). Latencies are round figures of the kind of link, not measurements: give your own as
"alpha,beta" in seconds and seconds a byte."""


def parse_network(text: str) -> Network:
    """A name of NETWORKS, or "alpha,beta" in seconds and seconds a byte.

    Raises:
        ValueError: neither.
    """
    if text in NETWORKS:
        return NETWORKS[text]
    parts = text.split(",")
    try:
        alpha, beta = map(float, parts)
    except ValueError:
        raise ValueError(
            f'the network is {text!r}; expected one of {", ".join(NETWORKS)}, or "alpha,beta" in seconds and seconds a '
            f"byte, e.g. 5e-6,8e-11{nearest_hint(text, list(NETWORKS))}"
        ) from None
    return Network(text, alpha, beta)


@dataclass(frozen=True)
class Cluster:
    """Attributes: inside: network between the GPUs of a node; between: of a node, shared by its GPUs; None if there is one."""

    num_nodes: int
    gpus_per_node: int
    inside: Network
    between: Network | None = None

    def __post_init__(self):
        if self.num_nodes < 1 or self.gpus_per_node < 1:
            raise ValueError(f"{self.num_nodes} nodes of {self.gpus_per_node} GPUs; expected at least 1 each")
        if self.num_nodes > 1 and self.between is None:
            raise ValueError(f"{self.num_nodes} nodes need the network between them")

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.gpus_per_node


@dataclass(frozen=True)
class Traffic:
    """One kind of collective in an optimizer step.

    Attributes:
        collective: "all_reduce", "reduce_scatter" or "all_gather".
        what: that travels.
        num_bytes: of the whole vector, over all calls of a step.
        num_calls: in a step.
    """

    collective: str
    what: str
    num_bytes: int
    num_calls: int


def traffic(layers: Sequence[int], layout: Layout, *, optimizer: str, accumulation_steps: int) -> list[Traffic]:
    """Collectives of an optimizer step, the largest first in time; scalars such as the gradients' norm are left out.

    Args:
        layers: elements of each trainable parameter, in the model's order.
        optimizer: lower case; a layer-wise one adds 16 bytes a layer.
        accumulation_steps: micro-steps of a step.

    In stages 2 and 3 the number of calls is a lower bound where a layer does not fit into what is left of a bucket.
    """
    num_parameters = sum(layers)
    width = layout.bytes_per_weight
    buckets = -(-num_parameters // layout.bucket_elements)
    found = []
    if layout.stage == 0:
        calls = -(-num_parameters // 500_000_000)
        found.append(Traffic("all_reduce", "gradients", width * num_parameters, calls))
    elif layout.stage == 1:
        calls = 1 if layout.wrapper == "BF16_Optimizer" else buckets
        found.append(Traffic("all_reduce", "gradients", 4 * num_parameters, calls))
    elif layout.stage == 2:
        num_bytes = 4 * num_parameters * accumulation_steps
        found.append(Traffic("all_reduce", "gradients", num_bytes, buckets * accumulation_steps))
    else:
        num_bytes = 4 * num_parameters * accumulation_steps
        found.append(Traffic("reduce_scatter", "gradients", num_bytes, buckets * accumulation_steps))
    if layout.stage in (1, 2):
        found.append(Traffic("all_gather", "weights", width * num_parameters, -(-num_parameters // 500_000_000)))
    if layout.stage == 3:
        # whole parameters stay alive from forward to backward up to 1e9 elements, beyond which they are gathered twice
        passes = 1 if num_parameters <= 1_000_000_000 else 2
        persistent = [size for size in layers if size < PERSISTENCE_THRESHOLD and layout.offload != OFFLOADS[2]]
        gathered = num_parameters - sum(persistent)
        calls = -(-gathered // PREFETCH_ELEMENTS) * passes * accumulation_steps
        found.append(Traffic("all_gather", "weights", width * gathered * passes * accumulation_steps, calls))
        if persistent:
            found.append(Traffic("all_gather", "small weights", width * sum(persistent), len(persistent)))
    if optimizer in SUMS_OF_SQUARES and layout.stage > 0:
        sums = SUMS_OF_SQUARES[optimizer]
        found.append(Traffic("all_reduce", "sums of squares", 8 * sum(sums) * len(layers), len(sums)))
    return found


def ring_seconds(collective: str, num_bytes: float, num_ranks: int, network: Network, num_calls: int = 1) -> float:
    """Seconds of ``num_calls`` collectives that move ``num_bytes`` together, on a ring."""
    rounds = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}[collective] * (num_ranks - 1)
    return rounds * (network.alpha * num_calls + num_bytes * network.beta / num_ranks)


def collective_seconds(collective: str, num_bytes: float, cluster: Cluster, num_calls: int = 1) -> float:
    """Seconds of a collective over all GPUs, hierarchical where there are several nodes."""
    gpus, nodes = cluster.gpus_per_node, cluster.num_nodes
    seconds = ring_seconds(collective, num_bytes, gpus, cluster.inside, num_calls)
    if nodes > 1:
        # each GPU has its piece of 1/gpus on the wire, and all share the node's link
        seconds += ring_seconds(collective, num_bytes, nodes, cluster.between, num_calls)
    return seconds


def communication_seconds(step_traffic: Sequence[Traffic], cluster: Cluster) -> float:
    """Seconds of all collectives of a step, one after another."""
    return sum(collective_seconds(t.collective, t.num_bytes, cluster, t.num_calls) for t in step_traffic)
