"""One step of each algorithm with numbers that a pencil can follow.

The layer is w = (3, 4), so ||w|| = 5, and g = (0, 2), so ||g|| = 2.
"""

import math

import pytest
import torch

import largebatch


def one_step(optimizer_class, **options):
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    weight.grad = torch.tensor([0.0, 2.0], dtype=torch.float64)
    optimizer = optimizer_class([weight], **options)
    optimizer.step()
    (figures,) = optimizer.layer_stats().values()
    return weight.tolist(), figures, optimizer.state[weight]


def test_lars():
    # lambda = 0.1 * 5 / (2 + 0.2 * 5) = 0.5 / 3 = 1/6
    # v = 0.6 * 1/6 * (0 + 0.2*3, 2 + 0.2*4) = 0.1 * (0.6, 2.8) = (0.06, 0.28);  w = (2.94, 3.72)
    weight, figures, state = one_step(largebatch.LARS, lr=0.6, weight_decay=0.2, trust_coefficient=0.1)
    assert figures["trust_ratio"] == pytest.approx(1 / 6, rel=1e-15)
    assert (figures["weight_norm"], figures["direction_norm"]) == (5.0, 2.0)
    assert state["momentum_buffer"].tolist() == pytest.approx([0.06, 0.28], rel=1e-15)
    assert weight == pytest.approx([2.94, 3.72], rel=1e-15)


def test_lars_second_step_keeps_the_old_learning_rate_in_the_momentum():
    # step 1 without decay, lr 4: lambda = 0.1*5/2 = 1/4, v = 4 * 1/4 * (0, 2) = (0, 2), w = (3, 2)
    # step 2 with lr 0: v = 0.5 * (0, 2) + 0 = (0, 1), w = (3, 1); an lr outside the momentum would leave w alone
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = largebatch.LARS([weight], lr=4.0, momentum=0.5, trust_coefficient=0.1)
    weight.grad = torch.tensor([0.0, 2.0], dtype=torch.float64)
    optimizer.step()
    assert weight.tolist() == [3.0, 2.0]
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert weight.tolist() == [3.0, 1.0]


def test_lars_2019():
    # m = 0.5 * (0, 2) = (0, 1);  phi(||x||)/||m|| = 5/1;  x = (3, 4) - 0.1 * 5 * (0, 1) = (3, 3.5)
    weight, figures, _ = one_step(largebatch.LARS, lr=0.1, momentum=0.5, formulation="2019")
    assert figures["trust_ratio"] == 5.0
    assert weight == [3.0, 3.5]


def test_lamb():
    # m^ = g, v^ = g^2, r = (0, 2/(2 + eps)) = (0, 1) for tiny eps; u = r + 0.25 w = (0.75, 2); ||u|| = sqrt(4.5625)
    # ratio = 5 / 2.136...; x = w - 0.1 * ratio * u
    weight, figures, state = one_step(largebatch.LAMB, lr=0.1, eps=1e-30, weight_decay=0.25)
    ratio = 5 / math.sqrt(0.75**2 + 2**2)
    assert figures["trust_ratio"] == pytest.approx(ratio, rel=1e-15)
    assert weight == pytest.approx([3 - 0.1 * ratio * 0.75, 4 - 0.1 * ratio * 2], rel=1e-15)
    assert state["exp_avg"].tolist() == pytest.approx([0.0, 0.2], rel=1e-15)
    assert state["exp_avg_sq"].tolist() == pytest.approx([0.0, 0.004], rel=1e-12)
    assert state["step"].item() == 1


def test_nlamb():
    # betas (1/2, 3/4), g2 = 2: m = 1, v = 1
    # m^ = 1/2 * 1 / (1 - 1/4) + 1/2 * 2 / (1 - 1/2) = 2/3 + 2 = 8/3;  v^ = 3/4 * 1 / (1 - 3/4) = 3
    # u = (0, 8/3 / sqrt(3));  ratio = 5 / (8 / (3 sqrt 3));  x2 = 4 - 0.1 * 5 = 3.5
    weight, figures, _ = one_step(largebatch.NLAMB, lr=0.1, betas=(0.5, 0.75), eps=1e-30)
    assert figures["direction_norm"] == pytest.approx(8 / (3 * math.sqrt(3)), rel=1e-15)
    assert weight == pytest.approx([3.0, 3.5], rel=1e-15)


def test_nnlamb():
    # as N-LAMB, but v^ = 3/4 * 1 / (1 - 9/16) + 1/4 * 4 / (1 - 3/4) = 12/7 + 4 = 40/7
    weight, figures, _ = one_step(largebatch.NNLAMB, lr=0.1, betas=(0.5, 0.75), eps=1e-30)
    assert figures["direction_norm"] == pytest.approx(8 / 3 / math.sqrt(40 / 7), rel=1e-15)
    assert weight == pytest.approx([3.0, 3.5], rel=1e-15)


def test_lans():
    # step 1, lr 0: g~ = (0, 1), m = (0, 0.1), v = (0, 0.001)
    # step 2: g = (2, 0), g~ = (1, 0), m = (0.1, 0.09), v = (0.001, 0.000999); m^ = m / 0.19, v^ = v / 0.001999
    # c = g~ / sqrt(v^) has one element: 5 / ||c|| c = (5, 0);  r = m^ / sqrt(v^);  x = w - 0.1 (0.9 * 5 / ||r|| r + 0.1 (5, 0))
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = largebatch.LANS([weight], lr=0.0, eps=1e-30)
    weight.grad = torch.tensor([0.0, 2.0], dtype=torch.float64)
    optimizer.step()
    assert weight.tolist() == [3.0, 4.0]
    weight.grad = torch.tensor([2.0, 0.0], dtype=torch.float64)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    r = [0.1 / 0.19 / math.sqrt(0.001 / 0.001999), 0.09 / 0.19 / math.sqrt(0.000999 / 0.001999)]
    size = math.hypot(*r)
    (figures,) = optimizer.layer_stats().values()
    assert (figures["weight_norm"], figures["grad_norm"]) == (5.0, 2.0)
    assert figures["trust_ratio"] == pytest.approx(5 / size, rel=1e-12)
    assert figures["gradient_trust_ratio"] == pytest.approx(5 * math.sqrt(0.001 / 0.001999), rel=1e-12)
    expected = [3 - 0.45 / size * r[0] * 1.0 - 0.05, 4 - 0.45 / size * r[1]]
    assert weight.tolist() == pytest.approx(expected, rel=1e-12)
