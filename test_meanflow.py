"""What meanflow.py claims, claim by claim; exact claims in float64."""

import contextlib
import copy
import csv
import functools
import itertools
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pytest
import torch
import torch.utils.checkpoint
from PIL import Image
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import meanflow
import train_cifar
import train_mnist
from meanflow import (
    UNet,
    expand,
    lambda_schedule,
    meanflow_loss,
    path,
    sample,
    sample_times,
    sg_lambda,
    total_derivative,
)

ROOT = Path(__file__).parent
torch.set_num_threads(1)  # the networks are tiny
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
meanflow.devices = lambda: DEVICES  # a training is on the CPU where its test asks for no other
assert_close = torch.testing.assert_close
TANGENTS = "conditional", "marginal"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # which meanflow.run changes


class Net(nn.Module):
    """A smooth u of vectors that depends on all its arguments, with a label if there is one."""

    def __init__(self, features=3, labels=5):
        super().__init__()
        self.inner = nn.Linear(features + 2, 16)
        self.label = nn.Embedding(1 + labels, 16)  # the first is -1, no label
        self.outer = nn.Linear(16, features)
        self.double()

    def forward(self, x, r, t, y=None):
        h = self.inner(torch.cat((x, r[:, None], t[:, None]), 1))
        return self.outer(torch.tanh(h if y is None else h + self.label(1 + y)))


def small_unet(**options):
    """A U-Net in float64 whose zero-initialised layers are not zero, as after training."""
    net = UNet(**{"channels": 1, "size": 8, "width": 8, "multipliers": (1, 2)} | options).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


def batch(n=12, shape=(3,), jumps=6):
    x0, x1 = torch.randn(2, n, *shape, dtype=torch.float64)
    r, t = sample_times(n, jumps, dtype=torch.float64)
    return x0, {"x1": x1, "r": r, "t": t}


def gradients(loss, net):
    grads = torch.autograd.grad(loss, [*net.parameters()], materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def readme_block(words):
    """Return the first block of Python in the README that holds the words."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(block for block in blocks if words in block)


# Gaussian data, where the average velocity has a closed form -------------------------------------

MEAN, STD = 0.7, 0.5


def gaussian_v(x, t):
    """The marginal velocity E[v | x_t = x] for x0 ~ N(MEAN, STD²)."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    return (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN) - MEAN


def gaussian_u(x, r, t):
    r, t = r[:, None], t[:, None]
    ratio = ((1 - r) ** 2 * STD**2 + r**2) / ((1 - t) ** 2 * STD**2 + t**2)
    x_r = (1 - r) * MEAN + ratio.sqrt() * (x - (1 - t) * MEAN)
    gap = torch.where(r < t, t - r, 1.0)
    return torch.where(r < t, (x - x_r) / gap, gaussian_v(x, t))


def test_closed_form_satisfies_the_identity_along_the_flow():
    x0, given = batch(n=1000, shape=(1,), jumps=1000)
    r, t = given["r"].clamp(0.01, 0.98), given["t"].clamp(0.02, 0.99)
    t = torch.maximum(t, r + 0.01)
    x_t, _ = path(x0, given["x1"], t)
    v = gaussian_v(x_t, t[:, None])
    u, dudt = total_derivative(gaussian_u, x_t, r, t, v)
    assert_close(u, gaussian_u(x_t, r, t))
    assert_close(u + (t - r)[:, None] * dudt, v)


def test_one_step_equals_eight_and_both_give_the_data():
    x1 = torch.randn(1000, 1, dtype=torch.float64)
    for steps in 1, 8:
        assert_close(sample(gaussian_u, x1, steps=steps), MEAN + STD * x1)


def test_the_grid_of_the_sampler_can_be_given():
    net, x1 = Net(), torch.randn(5, 3).double()
    assert torch.equal(sample(net, x1, times=[1, 0.5, 0]), sample(net, x1, steps=2))
    at = lambda time: torch.full((5,), time).double()
    x = x1 - 0.75 * net(x1, at(0.25), at(1.0))
    x = x - 0.25 * net(x, at(0.0), at(0.25))
    assert_close(sample(net, x1, times=torch.tensor([1, 0.25, 0])), x.detach())


def stationarity(lam, tangent):
    """Mean and standard error of the loss's gradient in (a, b, c) of (1 + a) u + b + c x at 0."""
    grads = []
    for _ in range(20):
        parameters = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        a, b, c = parameters
        model = lambda x, r, t: (1 + a) * gaussian_u(x, r, t) + b + c * x  # noqa: B023
        x0 = MEAN + STD * torch.randn(20_000, 1, dtype=torch.float64)
        r, t = sample_times(len(x0), len(x0), dtype=torch.float64)
        loss, _ = meanflow_loss(model, x0, lam, r=r, t=t, tangent=tangent, p=0)
        grads.append(torch.autograd.grad(loss, parameters)[0])
    grads = torch.stack(grads)
    return grads.mean(0), grads.std(0) / len(grads) ** 0.5


@pytest.mark.parametrize(
    "lam, tangent",
    [(0.0, "conditional"), (0.0, "marginal"), (1.0, "marginal")],
)
def test_true_u_is_stationary(lam, tangent):
    mean, error = stationarity(lam, tangent)
    assert (mean.abs() < 4 * error).all(), (mean, error)
    assert (error < 0.01).all(), error


def test_true_u_is_not_stationary_for_the_conditional_tangent_with_lambda_1():
    mean, error = stationarity(1.0, "conditional")
    assert mean[0] < -0.05 and mean[2] < -0.1, (mean, error)


# The mean of v over the images at hand ------------------------------------------------------------


def mean_over_images(x_t, t, y, images, labels):
    """E[v | x_t, images] of one sample, an image at a time."""
    total, weights = 0, 0
    for image, label in zip(images, labels, strict=True):
        x1 = (x_t - (1 - t) * image) / t
        weight = torch.exp(-x1.square().sum() / 2) if y in (-1, label) else 0
        total, weights = total + weight * (x1 - image), weights + weight
    return total / weights


def test_the_mean_velocity_is_that_over_the_images():
    x0, given = batch(n=6)
    more, t = torch.randn(4, 3).double(), torch.tensor([0, 0.01, 0.3, 0.7, 0.95, 1]).double()
    y, more_y = torch.tensor([0, 1, -1, 0, 1, -1]), torch.tensor([0, 1, 1, 0])
    images, labels = torch.cat((x0, more)), torch.cat((y, more_y))
    x_t, v = path(x0, given["x1"], t)
    mean = meanflow.mean_velocity(x_t, t, v, x0, y, (more, more_y))
    for i in range(1, 6):
        assert_close(mean[i], mean_over_images(x_t[i], t[i], y[i], images, labels))
    assert torch.equal(mean[:2], v[:2])  # near t = 0 only the sample's own image is possible
    assert ((mean - v).norm(dim=1)[3:] > 0.1).all()
    unlabelled = meanflow.mean_velocity(x_t, t, v, x0, None, (more, None))
    assert_close(unlabelled[[2, 5]], mean[[2, 5]])


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("t", [1e-4, 0.1, 0.5])
def test_the_mean_velocity_has_the_mean_of_v_and_less_variance(images, t):
    """Exactly, by going through all cases: x0 and the reference are drawn from three points."""
    x_t, points = 0.3, (torch.tensor([-1, -0.4, 1]) if t > 0.01 else 0.3 + torch.arange(3) * t)
    cases = list(itertools.product(points.double(), repeat=images))
    drawn = torch.tensor(cases).double()[..., None]  # (cases, images, 1), x0 first
    x1 = (x_t - (1 - t) * drawn[:, 0]) / t
    weight = (-(x1**2) / 2).softmax(0)  # of a case, given x_t
    v = x1 - drawn[:, 0]
    at, times = torch.full((1, 1), x_t).double(), torch.full((1,), t).double()
    results = [
        meanflow.mean_velocity(at, times, v[i : i + 1], x[:1], None, (x[1:], None))
        for i, x in enumerate(drawn)
    ]
    mean = torch.cat(results)
    assert_close((weight * mean).sum(), (weight * v).sum())
    variance = lambda z: (weight * z**2).sum() - (weight * z).sum() ** 2
    assert variance(mean) < 0.999 * variance(v) or images == 1 or t < 1e-3


@pytest.mark.parametrize("amp", [False, True])
def test_the_mean_velocity_is_not_rounded_to_float32_or_less(amp):
    images, t = 1 + 0.001 * torch.randn(40, 1, 28, 28), torch.linspace(0.01, 0.05, 8)
    x0, reference = images[:8], (images[8:], None)
    x_t, v = path(x0, torch.randn_like(x0), t)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        mean = meanflow.mean_velocity(x_t, t, v, x0, None, reference)
    for i in range(8):
        x = x_t[i].double(), t[i].double()
        exact = mean_over_images(*x, 0, images.double(), [0] * 40)
        assert (mean[i] - v[i]).norm() > 0.1
        # x_t and v themselves are float32
        assert_close(mean[i].double(), exact, rtol=1e-4, atol=1e-4)


# SG_λ and what it does to the loss ---------------------------------------------------------------


@pytest.mark.parametrize("lam", [0, 0.3, 1.0, torch.tensor(0.3)])
def test_sg_lambda_keeps_the_value_and_scales_the_gradient(lam):
    z = torch.randn(5, dtype=torch.float64, requires_grad=True)
    scaled = sg_lambda(z, lam)
    assert torch.equal(scaled, z)
    (gradient,) = torch.autograd.grad((scaled + 0 * z).sum(), z)
    assert_close(gradient, torch.full_like(z, float(lam)))


@pytest.mark.parametrize("tangent", TANGENTS)
def test_lambda_leaves_the_value_and_is_affine_in_the_gradient(tangent):
    net = small_unet()
    x0, given = batch(shape=(1, 8, 8))
    losses, grads = {}, {}
    for lam in 0.0, 0.3, 1.0:
        losses[lam], _ = meanflow_loss(net, x0, lam, **given, tangent=tangent)
        grads[lam] = gradients(losses[lam], net)
        as_tensor, _ = meanflow_loss(net, x0, torch.tensor(lam).double(), **given, tangent=tangent)
        assert_close(gradients(as_tensor, net), grads[lam])
    assert_close(losses[0.0], losses[0.3], rtol=1e-12, atol=0)
    assert_close(losses[0.0], losses[1.0], rtol=1e-12, atol=0)
    assert_close(grads[0.3], 0.7 * grads[0.0] + 0.3 * grads[1.0], rtol=1e-10, atol=1e-12)
    assert (grads[1.0] - grads[0.0]).norm() > 0.01 * grads[0.0].norm()


def written_out(
    net, x0, y, lam, x1, r, t, reference=None, tangent="conditional", guidance=1.0, p=0.75, c=1e-3
):
    """The loss as the papers write it, by another derivative and without a line of meanflow.py."""
    x_t, v = (1 - t)[:, None] * x0 + t[:, None] * x1, x1 - x0
    with torch.no_grad():
        if reference:
            images, labels = map(torch.cat, zip((x0, y), reference, strict=True))
            samples = zip(x_t, t, y, strict=True)
            v = torch.stack([mean_over_images(*of_one, images, labels) for of_one in samples])
        if guidance != 1:
            guided = guidance * v + (1 - guidance) * net(x_t, t, t)
            v = torch.where((y >= 0)[:, None], guided, v)
        direction = net(x_t, t, t, y) if tangent == "marginal" else v
    u, directions = net(x_t, r, t, y), (direction, torch.zeros_like(r), torch.ones_like(t))
    given_y = lambda x, r, t: net(x, r, t, y)
    _, dudt = torch.autograd.functional.jvp(given_y, (x_t, r, t), directions, create_graph=True)
    modulated = lam * dudt + (1 - lam) * dudt.detach()
    square = (u + (t - r)[:, None] * modulated - v).pow(2).sum(1)
    return (square / (square.detach() + c) ** p).mean(), square.detach() / 3


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"p": 0}, {"p": 1, "c": 0.01}, {"tangent": "marginal"}, {"guidance": 3.0},
     {"guidance": 3.0, "tangent": "marginal"}, {"guidance": 3.0, "reference": 5},
     {"tangent": "marginal", "reference": 5}],
)  # fmt: skip
def test_the_loss_is_the_formula_of_the_papers(lam, options):
    net, (x0, given), y = Net(), batch(), torch.tensor([0, 1, -1, 2, -1, 3] * 2)
    if "reference" in options:
        more = torch.randn(options["reference"], 3).double()
        options = options | {"reference": (more, torch.arange(len(more)))}
    loss, err = meanflow_loss(net, x0, lam, y, **given, **options)
    expected, expected_err = written_out(net, x0, y, lam, **given, **options)
    assert_close((loss, err), (expected, expected_err))
    assert_close(gradients(loss, net), gradients(expected, net))


def test_a_jump_to_one_point_has_no_error():
    """Which is why λ = 1 draws all samples together, if nothing keeps them apart."""
    x0, given = batch(jumps=12)
    point = torch.tensor([0.3, -0.2, 0.5]).double()
    _, err = meanflow_loss(lambda x, r, t: (x - point) / (t - r)[:, None], x0, 1.0, **given)
    assert err.max() < 1e-20


# The derivative ----------------------------------------------------------------------------------


def difference(u, x, r, t, v, *y, h=1e-6):
    """du/dt along (v, 0, 1) as a central difference."""
    return (u(x + h * v, r, t + h, *y) - u(x - h * v, r, t - h, *y)) / (2 * h)


def test_err_agrees_with_central_differences():
    def u(x, r, t):
        r, t = r[:, None, None], t[:, None, None]
        return torch.sin(2 * x + t) * (1 + r * t) + x.flip(1) * t**2

    x0, given = batch(shape=(2, 3))
    x1, r, t = given["x1"], given["r"], given["t"]
    x_t, v = path(x0, x1, t)
    e = u(x_t, r, t) + (t - r)[:, None, None] * difference(u, x_t, r, t, v) - v
    _, err = meanflow_loss(u, x0, 1.0, **given)
    assert_close(err, e.pow(2).mean((1, 2)), rtol=1e-8, atol=0)


def test_jvp_of_the_unet_agrees_with_finite_differences():
    net, y = small_unet(classes=3, patch=2, attention=2), torch.arange(4) % 3
    x, v = torch.randn(2, 4, 1, 8, 8, dtype=torch.float64)
    r, t = sample_times(4, 4, dtype=torch.float64)
    u, dudt = total_derivative(net, x, r, t, v, y)
    assert_close(u, net(x, r, t, y))
    assert_close(dudt, difference(net, x, r, t, v, y), rtol=1e-6, atol=1e-6)
    assert dudt.abs().mean() > 0.1 * u.abs().mean()


def test_only_samples_with_r_below_t_pass_through_the_jvp():
    seen = []

    def u(x, r, t):
        differentiated = forward_ad.unpack_dual(t).tangent is not None
        seen.append((len(x), bool((r == t).all()), differentiated))
        return x * t[:, None]

    for tangent, calls in ("conditional", []), ("marginal", [(4, True, False)]):
        meanflow_loss(u, batch(n=16)[0], 0.0, jump_share=0.25, tangent=tangent)
        assert sorted(seen) == [(4, False, True), *calls, (12, True, False)]
        seen.clear()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tangent", TANGENTS)
def test_what_is_drawn_gives_the_loss_of_the_same_given(share, tangent):
    net, (x0, _) = Net(), batch()
    times = {"t_logit": (0.3, 1.5), "r_logit": (-1.0, 1.0)}
    others = {"tangent": tangent, "guidance": 1.5, "p": 0.5, "c": 0.1}
    y = torch.arange(12) % 6 - 1
    torch.manual_seed(1)
    loss, err = meanflow.Objective(net, jump_share=share, **times, p=9)(x0, 0.7, y, **others)
    torch.manual_seed(1)
    x1 = torch.randn_like(x0)
    r, t = sample_times(12, round(12 * share), **times, dtype=torch.float64)
    expected, expected_err = meanflow_loss(net, x0, 0.7, y, x1=x1, r=r, t=t, **others)
    assert_close((loss, err), (expected, expected_err))
    assert_close(gradients(loss, net), gradients(expected, net))


# Times and schedules -----------------------------------------------------------------------------


@pytest.mark.parametrize("r_logit", [None, (-4.0, 1.6)])
@pytest.mark.parametrize("jumps", [0, 250, 1000])
def test_times_are_ordered_and_the_stated_number_jumps(r_logit, jumps):
    r, t = sample_times(1000, jumps, r_logit=r_logit, dtype=torch.float64)
    assert r.shape == t.shape == (1000,) and r.dtype == torch.float64
    assert ((r >= 0) & (r <= t) & (t <= 1)).all()
    assert torch.equal(r[jumps:], t[jumps:])
    if r_logit is None:
        assert (r[:jumps] < t[:jumps]).all()


@pytest.mark.parametrize("n, share", [(1, 0.25), (2, 0.9)])
def test_tiny_batches_jump_in_the_stated_share_on_average(n, share):
    jumps = []

    def u(x, r, t):
        if forward_ad.unpack_dual(t).tangent is not None:
            jumps[-1] += len(x)
        return x * expand(t, x)

    for _ in range(400):
        jumps.append(0)
        loss, err = meanflow_loss(u, torch.randn(n, 3), 0.0, jump_share=share)
        assert loss.isfinite() and err.shape == (n,)
    assert set(jumps) == {math.floor(n * share), math.ceil(n * share)}
    jumps = torch.tensor(jumps).double()
    assert abs(jumps.mean() / n - share) < 4 * jumps.std() / n / 400**0.5


def test_times_have_the_distributions_asked_for():
    n = 100_000
    _, t = sample_times(n, n // 2, t_logit=(-0.6, 1.6), r_logit=(-4.0, 0.5))
    r, _ = sample_times(n, n, t_logit=(9.0, 0.1), r_logit=(-4.0, 0.5))
    for times, mean, std in (t, -0.6, 1.6), (r, -4.0, 0.5):
        logit = times.double().logit()
        assert abs(logit.mean() - mean) < 5 * std / n**0.5 and abs(logit.std() / std - 1) < 0.02
    _, later = sample_times(n, 0, t_logit=(1.0, 2.0))  # of two draws, where r = t too
    assert abs(later.double().logit().mean() - (1.0 + 2.0 / math.pi**0.5)) < 0.05
    low, high = sample_times(n, n, t_logit=(1.0, 2.0))
    both = torch.cat((low, high)).double().logit()  # sorting a pair does not change their union
    assert abs(both.mean() - 1.0) < 0.05 and abs(both.std() - 2.0) < 0.05
    clipped, t = sample_times(n, n, t_logit=(0.0, 1.0), r_logit=(0.0, 1.0))
    assert abs((clipped == t).double().mean() - 0.5) < 0.02


def test_schedules_at_their_edges():
    for name in "constant", "linear", "cosine":
        lam = lambda_schedule(name, warmup=10, maximum=0.8)
        values = [lam(step) for step in range(15)]
        assert values == sorted(values) and values[10:] == [0.8] * 5
        assert values[0] == (0.8 if name == "constant" else 0.0)
        assert lambda_schedule(name, warmup=0)(0) == 1.0
    assert lambda_schedule("linear", warmup=10)(3) == 0.3
    falling = lambda_schedule("falling", warmup=10, maximum=0.5)
    assert [falling(step) for step in (0, 5, 10, 15)] == [0.5, 0.25, 0, 0]
    assert lambda_schedule("falling", warmup=0)(0) == 0.0
    assert lambda_schedule("cosine", warmup=10)(5) == pytest.approx(0.5)
    assert lambda_schedule("cosine", warmup=10)(1) < 0.03


# Anybody's network -------------------------------------------------------------------------------


class Through(nn.Module):
    """A u(x, r, t) of x (B, *shape) that depends on all of `layer`'s output, whatever its shape."""

    def __init__(self, layer, shape):
        super().__init__()
        self.layer = copy.deepcopy(layer)  # a test may change its own
        self.scale = nn.Parameter(1 + torch.rand(shape))

    def forward(self, x, r, t):
        h = self.layer(torch.sin(x * self.scale) + expand(t + r, x) * x)
        wave = torch.cos(torch.arange(h[0].numel(), device=h.device))
        h = (h * wave.view_as(h[0])).flatten(1).sum(1)
        return x + torch.tanh(x * self.scale) * expand(h, x)


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class NormOfWeights(nn.Module):
    """A layer norm whose input does not depend on x, but its weight does."""

    def __init__(self, features):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(features, features))

    def forward(self, x):
        return F.layer_norm(self.rows.tanh(), x.shape[1:], weight=x.sum(0))[: len(x)]


encoder = functools.partial(
    nn.TransformerEncoderLayer, 6, 2, 8, dropout=0.0, activation="gelu", batch_first=True
)
VECTOR, SEQUENCE, IMAGE, VOLUME = (6,), (5, 6), (6, 4, 4), (4, 3, 3, 3)
ONES = torch.ones(6)
torch.manual_seed(0)
LAYERS = {  # a layer or function and the shape of a sample
    "linear": (nn.Linear(6, 3), VECTOR),
    "weight norm": (nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), VECTOR),
    "conv 1d": (nn.Conv1d(5, 3, 3), SEQUENCE),
    "conv 2d, circular, groups": (
        nn.Conv2d(6, 4, 3, groups=2, padding=1, padding_mode="circular"), IMAGE),
    "conv 3d": (nn.Conv3d(4, 2, 2), VOLUME),
    "transposed conv": (nn.ConvTranspose2d(6, 2, 3, stride=2), IMAGE),
    "a kernel that depends on x": (
        lambda x: F.conv2d(x, x.reshape(-1, 6, 2, 2)[:3], x.flatten()[:3]), IMAGE),
    "a convolution of which only the bias depends on x": (
        lambda x: F.conv2d(x, ONES.to(x).view(1, 6, 1, 1), x.sin().flatten()[:1]), IMAGE),
    "group norm": (nn.GroupNorm(2, 6), IMAGE),
    "a group norm whose weight depends on x": (
        lambda x: F.group_norm(x, 2, x.mean((0, 2, 3)), x.sum((0, 2, 3))), IMAGE),
    "torch.group_norm": (lambda x: torch.group_norm(x, 3), IMAGE),
    "layer norm": (nn.LayerNorm(6), SEQUENCE),
    "layer norm of two dimensions": (nn.LayerNorm((5, 6), bias=False), SEQUENCE),
    "layer norm of channels": (lambda x: F.layer_norm(x.movedim(1, -1), (6,)), IMAGE),
    "torch.layer_norm by names": (
        lambda x: torch.layer_norm(input=x, normalized_shape=(6,), eps=1e-3), VECTOR),
    "a layer norm whose weight depends on x": (
        lambda x: F.layer_norm(x, (6,), x.mean(0), x.sin().sum(0)), VECTOR),
    "a layer norm of weights, whose own weight depends on x": (NormOfWeights(6), VECTOR),
    "a layer norm of nothing, as of an expert that no sample chose": (
        lambda x: x + F.layer_norm(x[x > 99].view(-1, 6), (6,)).sum(0), VECTOR),
    "a layer norm and work in place after it": (
        lambda x: F.layer_norm(x, (6,)).mul_(2).add_(x), VECTOR),
    "RMS norm": (nn.RMSNorm(6), VECTOR),
    "instance norm": (nn.InstanceNorm2d(6), IMAGE),
    "instance norm, affine": (nn.InstanceNorm1d(5, affine=True), SEQUENCE),
    "an instance norm with weights of each sample": (
        lambda x: F.instance_norm(
            x.reshape(1, -1, 4, 4), weight=x.mean((2, 3)).flatten(), bias=x[:, :, 1, 2].flatten()
        ).view_as(x), IMAGE),
    "instance norm in eval mode": (
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True).eval(), IMAGE),
    "torch.instance_norm": (
        lambda x: torch.instance_norm(
            x, None, None, running_mean=None, running_var=None, use_input_stats=True,
            momentum=0.1, eps=1e-5, cudnn_enabled=False), IMAGE),
    "batch norm in eval mode": (nn.BatchNorm2d(6).eval(), IMAGE),
    "torch.batch_norm, whose weight depends on x": (
        lambda x: torch.batch_norm(
            x, x.mean((0, 2, 3)), None, ONES.to(x), 2 * ONES.to(x), False, 0.1, 1e-5, False
        ), IMAGE),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x.flip(1), x), SEQUENCE),
    "multi-head attention": (SelfAttention(6, 2, batch_first=True), SEQUENCE),
    "transformer, norm after": (encoder(norm_first=False), SEQUENCE),
    "transformer, norm before": (encoder(norm_first=True), SEQUENCE),
    "transformer in eval mode": (encoder().eval(), SEQUENCE),
    "upsampling": (nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
}  # fmt: skip


def against_differences(u, parameters, shape):
    """Compare the gradient of the λ = 1 loss with central differences along a direction."""
    x0, given = batch(n=4, shape=shape, jumps=4)
    loss = lambda: meanflow_loss(u, x0, 1.0, **given, p=0)[0]
    grads = torch.autograd.grad(loss(), parameters, materialize_grads=True)
    directions, h = [torch.randn_like(p) for p in parameters], 1e-6
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))

    def moved(h):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=h)
            return loss()

    up, down, _ = moved(h), moved(-2 * h), moved(h)
    assert_close(slope, (up - down) / (2 * h), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LAYERS)
def test_derivatives_of_layers_and_their_gradients_agree_with_differences(name, device):
    if (name, device) == ("weight norm", "cuda"):
        pytest.skip("PyTorch 2.11's gradient of it is 2 % off there, without any derivative, too")
    layer, shape = LAYERS[name]
    net = Through(layer, shape).double().to(device)
    for parameter in net.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    with torch.device(device):
        x, v = torch.randn(2, 4, *shape, dtype=torch.float64)
        r, t = sample_times(4, 4, dtype=torch.float64)
        _, dudt = total_derivative(net, x, r, t, v)
        assert_close(dudt, difference(net, x, r, t, v), rtol=1e-6, atol=1e-6)
        against_differences(net, [*net.parameters()], shape)


def test_diffusers_unet_of_the_readme():
    diffusers = pytest.importorskip("diffusers")
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    small = {"down_block_types": down, "up_block_types": up, "norm_num_groups": 4}
    small |= {"block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 8}
    names = {"torch": torch, "expand": expand}
    names["UNet2DModel"] = functools.partial(diffusers.UNet2DModel, **small)
    exec(readme_block("UNet2DModel").split("# torch")[0], names)
    against_differences(names["model"], [*names["net"].double().parameters()], (3, 8, 8))
    names["net"].eval()
    with torch.no_grad():
        meanflow_loss(names["model"], torch.randn(4, 3, 8, 8).double(), 0.0)


@pytest.mark.parametrize("timm", [False, True])
def test_transformers_of_the_readme(timm):
    block, names = readme_block("TransformerEncoder"), {"torch": torch, "nn": nn}
    exec(block[block.index("# torch") :], names)
    if timm:
        module = pytest.importorskip("timm.models.vision_transformer")
        names["net"] = module.Block(128, 4)
    names["net"].eval()  # without dropout
    parts = nn.ModuleList([names["net"], names["times"]]).double()
    against_differences(names["model"], [*parts.parameters()], (5, 128))


class Everything(nn.Module):
    """Convolution, the norms, attention and labels, as small as can be: for the compiler."""

    def __init__(self):
        super().__init__()
        self.conv, self.group, self.layer = nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4), nn.LayerNorm(4)
        self.label, self.last = nn.Embedding(4, 4), nn.Linear(4, 2)

    def forward(self, x, r, t, y=None):
        h = F.group_norm(self.conv(x), 2, 1 + t[:1].sin().expand(4))  # a weight with a tangent
        h = self.group(h).flatten(2).mT  # (B, H W, 4)
        label = self.label(torch.zeros_like(r).long() if y is None else 1 + y)[:, None]
        h = self.layer(h + label + expand(t - r, h))
        h = F.scaled_dot_product_attention(h, h, h)
        return x * expand(t, x) + self.last(h).mT.reshape(x.shape)


TENSORS = torch.tensor(0.0), torch.tensor(0.5)
tiny_unet = functools.partial(UNet, 1, size=4, width=8, multipliers=(1,), classes=3)


@pytest.mark.parametrize(
    "make, tangent, guidance, lams, backend, amp",
    [
        (Everything, "conditional", 1.0, (0.0, 0.5, *TENSORS), "aot_eager", False),
        (Everything, "marginal", 2.0, (0.0, *TENSORS), "aot_eager", True),
        (tiny_unet, "marginal", 1.0, TENSORS[1:], "eager", False),  # which takes half the time
    ],
    ids=["conditional", "marginal, guidance, bf16", "U-Net"],
)
def test_the_whole_loss_compiles_into_one_graph(make, tangent, guidance, lams, backend, amp):
    net, y = make(), torch.tensor([0, 1, -1, 2])
    x0 = torch.randn(4, *((1, 4, 4) if isinstance(net, UNet) else (2, 3, 3)))
    objective = meanflow.Objective(net, jump_share=0.5, tangent=tangent, guidance=guidance)
    more = torch.randn(5, *x0.shape[1:]), torch.arange(5) % 3
    reference = more if tangent == "marginal" else None
    torch.compiler.reset()
    compiled = torch.compile(objective, fullgraph=True, backend=backend)
    for lam in lams:
        results = []
        for module in objective, compiled:
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss, err = module(x0, lam, y, reference=reference)
            results.append((loss, err, *torch.autograd.grad(loss, [*net.parameters()])))
        precision = {"rtol": 0.02, "atol": 0.02} if amp else {"rtol": 1e-4, "atol": 1e-5}
        assert_close(*results, **precision)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_layers_under_autocast_are_near_those_without(name, device):
    layer, shape = LAYERS[name]
    net = Through(layer, shape).float().to(device)
    for parameter in net.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    x0, grads = torch.randn(8, *shape, device=device), []
    for enabled in False, True:
        torch.manual_seed(1)
        with torch.device(device), torch.autocast(device, torch.bfloat16, enabled=enabled):
            loss, _ = meanflow_loss(net, x0, 1.0, jump_share=0.5, p=0)
        grads.append(gradients(loss, net))
    assert F.cosine_similarity(*grads, dim=0) > 0.999
    assert_close(grads[0].norm(), grads[1].norm(), rtol=0.05, atol=0)


def test_a_network_may_work_in_place_on_its_input():
    net, (x0, given) = Net(), batch(jumps=12)
    in_place = lambda x, r, t: net(x.mul_(2), r.add_(1), t.mul_(3))
    copies = lambda x, r, t: net(x * 2, r + 1, t * 3)
    before = {name: value.clone() for name, value in given.items()}
    for tangent in TANGENTS:
        results = [meanflow_loss(u, x0, 1.0, **given, tangent=tangent) for u in (in_place, copies)]
        assert_close(*results)
    assert_close(*(sample(u, given["x1"], steps=2) for u in (in_place, copies)))
    assert_close(given, before, rtol=0, atol=0)


def test_a_network_may_work_in_place_after_a_norm():
    nets = [nn.Sequential(nn.InstanceNorm1d(5), relu) for relu in (nn.ReLU(True), nn.ReLU())]
    nets = [Through(net, SEQUENCE).double() for net in nets]
    nets[1].load_state_dict(nets[0].state_dict())
    x0, given = batch(shape=SEQUENCE)
    losses = [meanflow_loss(net, x0, 0.0, **given)[0] for net in nets]
    assert_close(*(gradients(loss, net) for loss, net in zip(losses, nets, strict=True)))


def test_a_part_of_the_network_may_be_compiled():
    part = nn.Sequential(nn.Conv1d(5, 5, 3, padding=1), nn.GroupNorm(1, 5), nn.LayerNorm(6))
    net, (x0, given) = Through(part, SEQUENCE).double(), batch(shape=SEQUENCE)
    losses = [meanflow_loss(net, x0, 1.0, **given)[0]]
    expected = gradients(losses[0], net)
    torch.compiler.reset()
    net.layer = torch.compile(net.layer, backend="eager")
    losses.append(meanflow_loss(net, x0, 1.0, **given)[0])
    assert_close(*losses)
    assert_close(gradients(losses[1], net), expected)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.LayerNorm((8, 4, 4))])
def test_norms_of_half_precision_are_computed_in_float32(norm):
    """In half precision, x² of the values in here is infinite, and the derivative would be 0."""
    v, r = torch.randn(3, 8, 4, 4), torch.zeros(3)
    net = lambda x, r, t: norm(x * 300)
    exact = total_derivative(net, v.sin(), r, r, v)[1].detach()
    for gradients in False, True:
        low = total_derivative(net, v.sin().half(), r, r, v.half(), gradients=gradients)[1]
        assert_close(low.detach(), exact, rtol=0.02, atol=0.02)


def test_half_precision_data_do_not_overflow():
    x0 = torch.randn(2, 3, 256, 256, dtype=torch.float16)
    loss, err = meanflow_loss(lambda x, r, t: 0 * x, x0, 0.0)
    assert loss.isfinite() and loss.dtype == err.dtype == torch.float32
    assert_close(err.mean(), torch.tensor(2.0), rtol=0.05, atol=0)  # of x1 - x0


def test_a_derivative_that_needs_no_gradient_keeps_no_graph():
    net, (x0, given) = small_unet(), batch(n=2, shape=(1, 8, 8), jumps=2)
    r, t = given["r"], given["t"]

    def kept(function, *args, **options):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda z: sizes.append(z.numel()) or z, lambda z: z
        ):
            first, second = function(*args, **options)
        return sum(sizes), first.requires_grad, second.requires_grad

    less, *requires_grad = kept(total_derivative, net, x0, r, t, x0, gradients=False)
    assert requires_grad == [True, False]
    more, *requires_grad = kept(total_derivative, net, x0, r, t, x0, gradients=True)
    assert requires_grad == [True, True] and less < 0.7 * more
    less, *_ = kept(meanflow_loss, net, x0, 0.0, **given)
    more, *_ = kept(meanflow_loss, net, x0, torch.tensor(0.0).double(), **given)
    assert less < 0.7 * more


def test_what_a_derivative_keeps_is_the_affair_of_its_thread():
    """While one differentiates its derivative, the other, with λ = 0, drops its own. Forward mode
    itself is not made for several threads at a time: here they take turns."""
    net, (x0, given) = Through(nn.GroupNorm(1, 3), (3, 2)).double(), batch(shape=(3, 2))
    inside, waiting = threading.Event(), threading.Event()

    def slow(x, r, t):
        inside.set()
        waiting.wait(timeout=60)
        return net(x, r, t)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(meanflow_loss, slow, x0, 1.0, **given)
        inside.wait(timeout=60)
        meanflow_loss(net, x0, 0.0, **given)
        waiting.set()
    expected, _ = meanflow_loss(net, x0, 1.0, **given)
    assert_close(gradients(first.result()[0], net), gradients(expected, net))


def test_the_unet_can_be_built_on_the_meta_device():
    net, options = small_unet(classes=3), {"size": 8, "width": 8, "classes": 3}
    with torch.device("meta"):
        other = UNet(1, **options).double()
    other.to_empty(device="cpu").load_state_dict(net.state_dict())
    x1, y = torch.randn(3, 1, 8, 8).double(), torch.arange(3)
    assert torch.equal(sample(other, x1, y=y), sample(net, x1, y=y))


# The U-Net ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "channels, size, options",
    [(1, 28, {"patch": 2, "classes": 10}), (3, 32, {"multipliers": (1, 1, 2), "blocks": 2})],
)
def test_unet_shapes(channels, size, options):
    net = UNet(channels, size=size, width=8, **options)
    x, (r, t) = torch.randn(2, channels, size, size), sample_times(2, 1)
    y = torch.tensor([0, 9]) if net.classes else None
    assert torch.equal(net(x, r, t, y), torch.zeros_like(x))  # the last layer starts at zero
    loss, err = meanflow_loss(net, x, 1.0, y, jump_share=0.5)
    loss.backward()
    assert err.shape == (2,)


def test_the_unet_depends_on_r_and_on_t_and_on_their_order():
    net = small_unet()
    x = torch.randn(4, 1, 8, 8).double()
    r, t = sample_times(4, 4, dtype=torch.float64)
    for other in net(x, t, r), net(x, r / 2, t), net(x, r, (1 + t) / 2):
        assert (net(x, r, t) - other).abs().mean() > 0.001


def test_labels_matter_and_a_missing_one_is_the_null_class():
    net = small_unet(classes=3)
    x, (r, t) = torch.randn(4, 1, 8, 8).double(), sample_times(4, 1, dtype=torch.float64)
    out = [net(x, r, t, torch.full((4,), y)) for y in range(-1, 3)]
    assert torch.equal(net(x, r, t), out[0])
    assert all((out[i] - out[j]).abs().mean() > 1e-4 for i in range(4) for j in range(i))


def test_every_parameter_of_the_unet_learns():
    net, y = small_unet(classes=3, attention=2, blocks=2), torch.arange(6) % 3
    x0, given = batch(n=6, shape=(1, 8, 8))
    for lam in 0.0, 1.0:
        loss, _ = meanflow_loss(net, x0, lam, y, **given)
        assert all(g.any() for g in torch.autograd.grad(loss, [*net.parameters()]))


def test_dropout_only_in_training_mode_and_the_mode_comes_back():
    net = small_unet(dropout=0.5)
    x1 = torch.randn(3, 1, 8, 8).double()
    frozen = net.levels.inner.eval()
    assert torch.equal(sample(net, x1), sample(net, x1))
    assert net.training and net.norm.training and not frozen.training
    with pytest.raises(ValueError, match="x must be"):
        sample(net, x1[:, :, :4])
    assert net.training and not frozen.training


def test_derivative_and_value_share_the_dropout_mask():
    net = small_unet(dropout=0.5).train()
    x, v = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64)
    r, t = sample_times(3, 3, dtype=torch.float64)

    def masked(h):
        torch.manual_seed(1)
        return total_derivative(net, x + h * v, r, t + h, v)

    (up, _), (_, dudt), (down, _) = masked(1e-6), masked(0), masked(-1e-6)
    assert_close(dudt, (up - down) / 2e-6, rtol=1e-6, atol=1e-6)
    torch.manual_seed(2)
    assert (total_derivative(net, x, r, t, v)[1] - dudt).abs().mean() > 0.01  # another mask


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        meanflow_loss(Net(), batch()[0], 0.0, jump_share=1.0)


# Bad input ---------------------------------------------------------------------------------------

X0, LABELS = torch.zeros(4, 3), torch.zeros(4).long()
TIMES = {"r": torch.full((4,), 0.2), "t": torch.full((4,), 0.6)}
batch_norm = lambda x, r, t: F.batch_norm(x * t[:, None], None, None, training=True)
torch_batch_norm = lambda x, r, t: torch.batch_norm(
    x * t[:, None], None, None, None, None, True, 0.1, 1e-5, False
)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: meanflow_loss(Net(), [[0.0]], 0.0), "x0 must be"),
        (lambda: meanflow_loss(Net(), torch.zeros(4, 3, dtype=torch.uint8), 0.0), "x0 must be"),
        (lambda: meanflow_loss(Net(), torch.zeros(4), 0.0), r"x0 must be.*\(4,\)"),
        (lambda: meanflow_loss(Net(), X0, 0.0, torch.zeros(3)), "y must"),
        (lambda: meanflow_loss(Net(), X0, 1.5), "lam must be.*1.5"),
        (lambda: meanflow_loss(Net(), X0, -0.1), "lam must be.*-0.1"),
        (lambda: meanflow_loss(Net(), X0, float("nan")), "lam must be.*nan"),
        (lambda: meanflow_loss(Net(), X0, torch.ones(2)), "lam must be"),
        (lambda: meanflow_loss(Net(), X0, "linear"), "lam must be.*linear"),
        (lambda: meanflow_loss(Net(), X0, 0.0, tangent="true"), "tangent must be.*'true'"),
        (lambda: meanflow_loss(Net(), X0, torch.tensor(1.5)), "lam must be.*1.5"),
        (lambda: meanflow_loss(Net(), X0, 0.0, guidance=2.0), "guidance 2.0 needs labels"),
        (lambda: meanflow_loss(Net(), X0, 0.0, X0, guidance=2.0), r"labels y of shape \(B,\)"),
        (lambda: meanflow_loss(Net(), X0, 0.0, reference=X0), "reference must be.*images"),
        (lambda: meanflow_loss(Net(), X0, 0.0, reference=(3, None)), "of reference must.*got 3"),
        (
            lambda: meanflow_loss(Net(), X0, 0.0, reference=(X0[:, :2], None)),
            r"images of reference must be.*\(4, 3\).*\(4, 2\)",
        ),
        (lambda: meanflow_loss(Net(), X0, 0.0, reference=(X0, LABELS)), "labels, but y is missing"),
        (
            lambda: meanflow_loss(Net(), X0, 0.0, LABELS, reference=(X0, None)),
            "labels of reference must.*None",
        ),
        (
            lambda: meanflow_loss(Net(), X0, 0.0, LABELS, reference=(X0, LABELS[:3])),
            r"labels of reference must.*\(4,\).*\(3,\)",
        ),
        (lambda: meanflow_loss(Net(), X0, 0.0, X0, reference=(X0, X0)), "needs integer labels"),
        (
            lambda: meanflow_loss(Net(), X0, 0.0, X0[:, 0], reference=(X0, X0[:, 0])),
            "needs integer labels",
        ),
        (lambda: meanflow_loss(Net(), X0, 0.0, p=-1), "p must be.*-1"),
        (lambda: meanflow_loss(Net(), X0, 0.0, c=0), "c > 0.*c=0"),
        (lambda: meanflow_loss(Net(), X0, 0.0, x1=torch.zeros(4, 2)), r"x1 must be.*\(4, 2\)"),
        (lambda: meanflow_loss(Net(), X0, 0.0, x1=X0.double()), "x1 must be.*float64"),
        (lambda: meanflow_loss(Net(), X0, 0.0, x1=0.0), "x1 must be"),
        (lambda: meanflow_loss(Net(), X0, 0.0, r=TIMES["r"]), "r and t"),
        (lambda: meanflow_loss(Net(), X0, 0.0, r=TIMES["t"], t=TIMES["r"]), "r <= t"),
        (lambda: meanflow_loss(Net(), X0, 0.0, r=TIMES["r"], t=TIMES["t"] * 2), "t <= 1"),
        (lambda: meanflow_loss(Net(), X0, 0.0, r=-TIMES["r"], t=TIMES["t"]), "0 <= r.*r = -0.2"),
        (lambda: meanflow_loss(lambda x, r, t: x[:1], X0, 0.0, **TIMES), r"model must.*\(1, 3\)"),
        (lambda: sample(Net(), X0, steps=0), "steps must be.*0"),
        (lambda: sample(Net(), X0, steps=1.5), "steps must be.*1.5"),
        (lambda: sample(Net(), 4), "x1 must be.*4"),
        (lambda: sample_times(0, 0), "n must be.*0"),
        (lambda: sample_times(4, 5), "jumps must be.*from 0 to 4.*5"),
        (lambda: sample_times(4, -1), "jumps must be.*-1"),
        (lambda: sample_times(4, 0.25), "jumps must be.*0.25"),
        (lambda: sample_times(4, 1, t_logit=(0.0, -1.0)), "t_logit must.*-1"),
        (lambda: sample_times(4, 1, r_logit=(0.0, -1.0)), "r_logit must.*-1"),
        (lambda: sample_times(4, 1, t_logit=(float("nan"), 1.0)), "t_logit must.*nan"),
        (lambda: meanflow_loss(Net(), X0, 0.0, jump_share=1.1), "jump_share must be.*1.1"),
        (lambda: meanflow_loss(Net(), X0, 0.0, r_logit=()), r"r_logit must.*\(\)"),
        (lambda: sample(Net(), X0, steps=2, times=[1, 0]), "steps 2 and times"),
        (lambda: sample(Net(), X0, times=[1, 0.5, 0.5, 0]), "times must be.*decrease.*0.5"),
        (lambda: sample(Net(), X0, times=[0.9, 0]), "times must.*from 1 to 0.*0.9"),
        (lambda: sample(Net(), X0, times=[1, 0.5]), "times must.*from 1 to 0.*0.5"),
        (lambda: sample(Net(), X0, times=[]), "times must"),
        (lambda: sample(Net(), X0, y=[0, 1, 2, 3]), "y must.*list"),
        (lambda: meanflow_loss(lambda x, r, t: (x, t), X0, 0.0), "model must return.*tuple"),
        (lambda: meanflow_loss(batch_norm, X0, 0.0, **TIMES), "batch norm mixes"),
        (lambda: meanflow_loss(torch_batch_norm, X0, 0.0, **TIMES), "batch norm mixes"),
        (lambda: meanflow_loss(Net(), torch.zeros(4, 0), 0.0), r"x0 must be.*\(4, 0\)"),
        (lambda: meanflow_loss(Net(), X0, 0.0, c=float("inf")), "c > 0.*c=inf"),
        (lambda: meanflow_loss(Net(), X0, 0.0, guidance="2"), "guidance must.*'2'"),
        (lambda: sample(Net(), X0, times=[1, None, 0]), "times must.*None"),
        (lambda: UNet(1, size=8, patch=0), "sizes must be positive.*'patch': 0"),
        (lambda: UNet(1, size=8, multipliers=()), "sizes must be positive"),
        (lambda: UNet(1, size=8, classes=-1), "sizes must be positive.*'classes': -1"),
        (lambda: lambda_schedule("step", warmup=1), "name must be.*'step'"),
        (lambda: lambda_schedule("linear", warmup=-1), "warmup must be.*-1"),
        (lambda: lambda_schedule("linear", warmup=1, maximum=1.1), "maximum must be.*1.1"),
        (lambda: UNet(1, size=30, patch=2), "size must be a multiple of 4, got 30"),
        (lambda: UNet(1, size=28, width=12), "multiples of 8.*12"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "y",
    [[0, 1, 2, 0], torch.arange(3), torch.zeros(4, 1).long(), torch.zeros(4),
     torch.tensor([0, 1, 2, 3])],
    ids=["list", "too few", "(B, 1)", "float", "beyond"],
)  # fmt: skip
def test_labels_that_do_not_fit_are_named(y):
    net, x = UNet(1, size=8, width=8, classes=3), torch.randn(4, 1, 8, 8)
    r = t = torch.ones(4)
    for call in (
        lambda: meanflow_loss(net, x, 0.0, y), lambda: sample(net, x, y=y), lambda: net(x, r, t, y)
    ):  # fmt: skip
        with pytest.raises(ValueError, match="y must be"):
            call()
    with pytest.raises(ValueError, match="y must be left out"):
        UNet(1, size=8, width=8)(x, r, t, torch.arange(4))


def test_numbers_from_numpy_are_numbers():
    numpy, net, (x0, given) = pytest.importorskip("numpy"), Net(), batch()
    for lam in 0.0, 0.5:
        expected = gradients(meanflow_loss(net, x0, lam, **given)[0], net)
        for kind in numpy.float32, numpy.float64:
            loss, _ = meanflow_loss(net, x0, kind(lam), **given)
            assert torch.equal(gradients(loss, net), expected)
    x1 = given["x1"]
    assert torch.equal(sample(net, x1, steps=numpy.int64(2)), sample(net, x1, steps=2))
    assert torch.equal(sample(net, x1, times=numpy.array([1, 0.5, 0])), sample(net, x1, steps=2))


# It learns ---------------------------------------------------------------------------------------


def test_one_step_samples_of_a_learned_mixture_hit_its_modes():
    """Four narrow Gaussians on a square, a small network, one evaluation per sample."""
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    layers = [(nn.Linear(n, 128), nn.SiLU()) for n in (4, 128, 128)]
    net = nn.Sequential(*(layer for pair in layers for layer in pair), nn.Linear(128, 2))
    u = lambda x, r, t: net(torch.cat((x, r[:, None], t[:, None]), 1))
    optimizer = torch.optim.Adam(net.parameters(), 4e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for _ in range(800):
        x0 = corners[torch.randint(4, (256,))] + 0.1 * torch.randn(256, 2)
        r, t = sample_times(256, 128)
        loss, _ = meanflow_loss(u, x0, 0.0, r=r, t=t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    x = sample(u, torch.randn(4000, 2))
    distance, mode = torch.cdist(x, corners).min(1)
    assert (distance < 0.4).float().mean() > 0.85  # 0.03 at the start, 0.9997 for the data
    assert (mode.bincount(minlength=4) / len(x) > 0.18).all()


# Training: what it writes, and the sampler on its checkpoint -------------------------------------


def write_mnist(folder, n=64):
    """Write n random digits in the files that torchvision.datasets.MNIST reads."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = torch.randint(0, 256, (n, 28, 28), dtype=torch.uint8).numpy().tobytes()
    classes = bytes(i % 10 for i in range(n))
    for split in "train", "t10k":
        header = struct.pack(">IIII", 2051, n, 28, 28), struct.pack(">II", 2049, len(classes))
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header[0] + pixels)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(header[1] + classes)


# of the processes that tests start: output that knows nothing beyond ASCII, and no GPU
COMMAND = os.environ | {"PYTHONIOENCODING": "ascii", "CUDA_VISIBLE_DEVICES": ""}


def as_a_command(main, *flags):
    """Run a script's main as the command line does, in this process, and return its status."""
    try:
        meanflow.run(main, [*map(str, flags)])
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture
def call(capfd):
    """Return a function that runs a main as a command and returns its status and errors."""

    def call(main, *flags):
        capfd.readouterr()
        return as_a_command(main, *flags), capfd.readouterr().err

    return call


TRAINED = shlex.split("--steps 5 --batch-size 8 --lambda-schedule linear --lambda-warmup 2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data and a finished run of train_mnist.py in `run`."""
    folder = tmp_path_factory.mktemp("trained")
    write_mnist(folder / "data")
    place = "--data", folder / "data", "--out", folder / "run"
    assert as_a_command(train_mnist.main, *TRAINED, *place, "--log-every", 2) == 0
    return folder


def small(argv):
    """What train_mnist.py does, with images of 8x8 pixels and a tiny network."""
    args = meanflow.train_parser("", **train_mnist.RECIPE | {"reference": 0}).parse_args(argv)
    torch.manual_seed(args.seed)
    images = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8)
    labels = torch.arange(64) % 3 if args.class_cond else None
    classes = 3 if args.class_cond else 0
    net = UNet(1, size=8, width=8, multipliers=(1,), attention=0, classes=classes)
    meanflow.train(net, images, labels, args)


@pytest.fixture
def training(call, tmp_path):
    """Return a function that trains in tmp_path / "run" with flags, one a word or a number."""
    return lambda *flags, out="run": call(small, "--batch-size", 4, "--out", tmp_path / out, *flags)


def one_line(result):
    status, error = result
    assert status == 2 and error.count("\n") == 1 and "error" in error, result
    return error


def weights(out):
    checkpoint = meanflow.load_checkpoint(out / "checkpoint.pt")
    return [value for part in ("model", "ema") for value in checkpoint[part].values()]


def same(out, other):
    return all(map(torch.equal, weights(out), weights(other)))


def log(out):
    return list(csv.DictReader((out / "log.csv").open()))


def test_training_writes_log_pictures_and_a_checkpoint(trained, tmp_path):
    rows = log(trained / "run")
    assert [int(row["step"]) for row in rows] == [1, 2, 4, 5]
    assert [float(row["lambda"]) for row in rows] == [0.0, 0.0, 1.0, 1.0]
    assert rows[0].pop("err_jump") == "nan"  # flow matching comes first
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    names = {file.name for file in (trained / "run").iterdir()} - {".lock"}
    assert names == {
        "log.csv",
        "checkpoint.pt",
        "samples.png",
        "step-000001.png",
        "step-000005.png",
    }
    assert Image.open(trained / "run" / "samples.png").size == (10 * 30 + 2, 12 * 30 + 2)
    net = meanflow.load_model(trained / "run" / "checkpoint.pt")
    checkpoint = meanflow.load_checkpoint(trained / "run" / "checkpoint.pt")
    assert not torch.equal(net.last.weight, checkpoint["model"]["last.weight"])  # an average
    meanflow.save_images(meanflow.draw(net, 80), tmp_path / "again.png")
    assert Image.open(tmp_path / "again.png") == Image.open(trained / "run" / "step-000005.png")


def test_a_seed_repeats_a_training_and_another_does_not(tmp_path):
    images = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8)
    net = UNet(1, size=8, width=8)
    for out, seed in ("a", 3), ("b", 3), ("c", 4):
        args = meanflow.train_parser("", steps=2, seed=seed, out=tmp_path / out).parse_args([])
        meanflow.train(copy.deepcopy(net), images, None, args)
    assert same(tmp_path / "a", tmp_path / "b") and not same(tmp_path / "a", tmp_path / "c")


def test_a_short_training_draws_the_image_of_its_label(tmp_path):
    """Class 0 is black, class 1 is white."""
    images, labels = torch.zeros(50, 1, 8, 8, dtype=torch.uint8), torch.arange(50) % 2
    images[1::2] = 255
    recipe = train_mnist.RECIPE | {"steps": 150, "ema": 0.9, "out": tmp_path / "run"}
    args = meanflow.train_parser("", **recipe).parse_args([])
    net = UNet(1, size=8, width=8, multipliers=(1,), attention=0, classes=2)
    average = meanflow.train(net, images, labels, args)
    brightness = meanflow.draw(average, 20).mean((1, 2, 3))
    black, white = brightness[::2], brightness[1::2]
    assert black.max() < -0.6 and white.min() > 0.6, brightness


def test_the_average_is_that_of_the_weights_from_step_1_on(tmp_path, monkeypatch):
    seen, update = [], meanflow.update

    def recorded(loss, model, *rest):
        norm = update(loss, model, *rest)
        seen.append([parameter.detach().clone() for parameter in model.parameters()])
        return norm

    monkeypatch.setattr(meanflow, "update", recorded)
    args = meanflow.train_parser("", steps=4, ema=0.7, out=tmp_path / "run").parse_args([])
    images = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8)
    average = meanflow.train(UNet(1, size=8, width=8), images, None, args)
    expected, *later = seen
    for weights in later:
        expected = [0.7 * a + 0.3 * b for a, b in zip(expected, weights, strict=True)]
    assert len(later) == 3 and not average.training
    for parameter, value in zip(average.parameters(), expected, strict=True):
        assert_close(parameter.detach(), value)


@pytest.fixture
def seen(monkeypatch):
    """The options of each call of the loss, as training makes them."""
    seen, loss = [], meanflow.meanflow_loss
    monkeypatch.setattr(
        meanflow,
        "meanflow_loss",
        lambda *args, **options: seen.append(options) or loss(*args, **options),
    )
    return seen


def test_settings_reach_the_loss(training, seen):
    flags = "--jump-share 0.75 --t-logit 0.1 1.1 --r-logit -1 2 --guidance 1.5 --tangent marginal"
    assert training("--steps", 1, *flags.split())[0] == 0
    assert seen == [
        {
            "jump_share": 0.75,
            "t_logit": [0.1, 1.1],
            "r_logit": [-1.0, 2.0],
            "guidance": 1.5,
            "tangent": "marginal",
            "reference": None,
        }
    ]


def test_a_reference_is_drawn_as_a_batch_is(training, seen, monkeypatch):
    calls, drawn, draw_batch = [], [], meanflow.draw_batch

    def recorded(*args):
        calls.append(args)
        drawn.append(draw_batch(*args))
        return drawn[-1]

    monkeypatch.setattr(meanflow, "draw_batch", recorded)
    monkeypatch.setattr(meanflow, "train", functools.partial(meanflow.train, flip=True))
    assert training("--steps", 2, "--reference", 50, "--guidance", 2)[0] == 0
    assert [options["reference"] for options in seen] == drawn[1::2]
    assert [args[2:] for args in calls] == [(4, True, 2.0), (50, True)] * 2
    (x0, _), (more, more_y) = drawn[:2]
    assert not torch.equal(more[: len(x0)], x0) and len(more) == len(more_y) == 50
    assert more_y.min() >= 0  # guidance takes none of its labels


@pytest.mark.parametrize(
    "share, missing, given", [(0, "err_jump", "err_flow"), (1, "err_flow", "err_jump")]
)
def test_the_log_tells_the_errors_of_jumps_from_those_of_others(
    training, tmp_path, share, missing, given
):
    assert training("--steps", 1, "--jump-share", share)[0] == 0
    (row,) = log(tmp_path / "run")
    assert row[missing] == "nan" and math.isfinite(float(row[given]))


def test_flow_matching_comes_first_and_lambda_waits(training, tmp_path, seen):
    flags = "--flow-first 0.5 --jump-share 0.75 --lambda-schedule linear --lambda-warmup 2"
    every = "--log-every", 1, "--save-every", 3
    assert training("--steps", 8, *flags.split(), *every)[0] == 0
    assert [options["jump_share"] for options in seen] == [0] * 4 + [0.75] * 4
    rows = log(tmp_path / "run")
    assert [float(row["lambda"]) for row in rows] == [0] * 5 + [0.5, 1, 1]
    assert [row["err_jump"] == "nan" for row in rows] == [True] * 4 + [False] * 4
    assert training("--steps", 8, *flags.split(), "--log-every", 3, out="coarse")[0] == 0
    coarse = log(tmp_path / "coarse")  # its row of steps 4 to 6 has the mean of steps 5 and 6
    mean = sum(float(rows[i]["err_jump"]) for i in (4, 5)) / 2
    assert [row["step"] for row in coarse] == ["1", "3", "6", "8"]
    assert float(coarse[2]["err_jump"]) == pytest.approx(mean, rel=1e-4)


def test_a_training_that_begins_with_flow_matching_cannot_be_extended(training):
    """Its beginning is a share of all steps."""
    flags = "--no-lr-decay", "--lr-warmup", 1, "--flow-first"
    assert training("--steps", 2, *flags, 0.5)[0] == 0
    assert "steps was 2, not 4" in one_line(training("--steps", 4, *flags, 0.5, "--resume"))


def test_an_older_training_goes_on_without_what_is_newer(training, tmp_path):
    file = tmp_path / "run" / "checkpoint.pt"
    older = "--steps", 2, "--flow-first", 0
    assert training(*older)[0] == 0
    checkpoint = meanflow.load_checkpoint(file)
    del checkpoint["args"]["flow_first"], checkpoint["args"]["reference"]
    torch.save(checkpoint, file)
    for name, was, now in ("flow-first", 0.0, 0.25), ("reference", 0, 5):
        error = one_line(training(*older, f"--{name}", now, "--resume"))
        assert f"{name} was {was}, not {now}" in error
    assert training(*older, "--resume")[0] == 0


def test_the_sampler_draws_from_the_checkpoint(trained, call, tmp_path):
    checkpoint, drawn = trained / "run" / "checkpoint.pt", {}
    for name, flags in ("a", ()), ("b", ()), ("c", ("--seed", 1)), ("d", ("--steps", 2)), (
        "e", ("--label", 7)):  # fmt: skip
        out = tmp_path / f"{name}.png"
        assert call(meanflow.main, checkpoint, "--num", 20, *flags, "--out", out) == (0, "")
        drawn[name] = Image.open(out).tobytes()
    assert Image.open(tmp_path / "a.png").size == (10 * 30 + 2, 2 * 30 + 2)
    assert drawn["a"] == drawn["b"] and len(set(drawn.values())) == 4
    net, x1 = meanflow.load_model(checkpoint), meanflow.draw(UNet(1, size=28), 20)
    # x1 is the noise, as the last layer of a new UNet is zero
    assert torch.equal(meanflow.draw(net, 20, label=7), sample(net, x1, y=torch.full((20,), 7)))
    many = tmp_path / "new" / "many"
    assert call(meanflow.main, checkpoint, "--num", 3, "--out", many) == (0, "")
    assert sorted(file.name for file in many.iterdir()) == [f"{i:06}.png" for i in range(3)]
    assert Image.open(many / "000002.png").size == (28, 28)
    assert "holds files" in one_line(call(meanflow.main, checkpoint, "--num", 2, "--out", many))
    jpeg = call(meanflow.main, checkpoint, "--out", tmp_path / "x.jpg")
    assert "x.jpg must end in .png" in one_line(jpeg) and not (tmp_path / "x.jpg").exists()
    assert "10 classes" in one_line(call(meanflow.main, checkpoint, "--label", 10))


def test_many_images_are_drawn_from_one_noise_and_the_classes_in_turn():
    net = small_unet(classes=3).float()
    x1 = torch.randn(502, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    last = sample(net.eval(), x1[499:], y=torch.tensor([1, 2, 0]))
    assert_close(meanflow.draw(net, 502, seed=5)[499:], last)


def test_meanflow_py_works_alone(trained, tmp_path):
    shutil.copy(ROOT / "meanflow.py", tmp_path)
    checkpoint = trained / "run" / "checkpoint.pt"
    command = sys.executable, "meanflow.py", checkpoint, "--num", "20"
    result = subprocess.run(command, cwd=tmp_path, env=COMMAND, capture_output=True, timeout=300)
    assert result.returncode == 0 and not result.stderr
    meanflow.save_images(meanflow.draw(meanflow.load_model(checkpoint), 20), tmp_path / "same.png")
    assert Image.open(tmp_path / "samples.png") == Image.open(tmp_path / "same.png")


def test_the_file_can_be_cut_where_training_begins():
    names = {"__name__": "cut"}
    exec((ROOT / "meanflow.py").read_text().split("# Training. ")[0], names)
    x, net = torch.randn(4, 1, 8, 8), names["UNet"](1, size=8, width=8)
    loss, _ = names["meanflow_loss"](net, x, lam=0.5)
    assert loss > 0 and names["sample"](net, x).shape == x.shape and "argparse" not in names


def test_cifar_trains_and_draws(call, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    cifar = train_cifar.CIFAR10  # whose check of the files' content is taken off
    monkeypatch.setattr(cifar, "train_list", [[name, None] for name, _ in cifar.train_list])
    monkeypatch.setattr(cifar, "test_list", [[name, None] for name, _ in cifar.test_list])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": None})
    pixels = torch.randint(0, 256, (6, 20, 3072), dtype=torch.uint8)
    for (name, _), part in zip(cifar.train_list + cifar.test_list, pixels, strict=True):
        content = {"data": part.numpy(), "labels": [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(content))
    given, train = {}, train_cifar.train

    def recorded(model, images, labels, args, flip):
        given.update(images=images, labels=labels, flip=flip)
        return train(model, images, labels, args, flip=flip)

    monkeypatch.setattr(train_cifar, "train", recorded)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    flags = shlex.split("--preset tiny --steps 2 --batch-size 8 --lambda-schedule linear")
    place = "--data", tmp_path / "data", "--out", tmp_path / "run"
    assert call(train_cifar.main, *flags, *place, "--class-cond") == (0, "")
    assert torch.equal(given["images"], pixels[:5].reshape(100, 3, 32, 32)) and given["flip"]
    assert torch.equal(given["labels"], torch.arange(100) % 10)
    net = meanflow.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["unet"]
    assert (net["channels"], net["size"], net["classes"]) == (3, 32, 10)
    assert Image.open(tmp_path / "run" / "samples.png").size == (10 * 34 + 2, 12 * 34 + 2)


def test_batches_are_mirrored_and_lose_labels_as_asked():
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    images[..., 0], labels = 255, torch.tensor([2, 2])
    x0, y = meanflow.draw_batch(images, labels, 5000, flip=True, guidance=2.0)
    assert x0.min() == -1 and x0.max() == 1 and set(y.tolist()) == {-1, 2}
    left, right = x0[..., 0] == 1, x0[..., -1] == 1
    assert torch.equal(left, ~right) and abs(left[:, 0, 0].double().mean() - 0.5) < 0.04
    assert abs((y == -1).double().mean() - 0.1) < 0.02
    x0, y = meanflow.draw_batch(images, labels, 100, flip=False, guidance=1.0)
    assert (x0[..., 0] == 1).all() and (y == 2).all()
    assert meanflow.draw_batch(images, None, 3, flip=False, guidance=1.0)[1] is None


def test_every_step_and_every_process_draws_its_own_batch(tmp_path, monkeypatch):
    seen, draw_batch = [], meanflow.draw_batch

    def recorded(*args):
        seen.append((*draw_batch(*args), torch.randn(3)))
        return seen[-1][:2]

    monkeypatch.setattr(meanflow, "draw_batch", recorded)
    images = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8)
    for rank in "0", "1", "1":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "1")
        flags = ["--steps", "2", "--batch-size", "8", "--out", str(tmp_path / f"{len(seen)}")]
        args = meanflow.train_parser("").parse_args(flags)
        meanflow.train(UNet(1, size=8, width=8), images, None, args)
    for part in 0, 2:
        for (i, one), (j, other) in itertools.combinations(enumerate(seen), 2):
            assert torch.equal(one[part], other[part]) == ((i, j) in {(2, 4), (3, 5)})


@pytest.mark.parametrize(
    "flags, compiled, lams, tangents",
    [
        ("", True, [0, 0, 0], "ccc"),
        ("--lambda-schedule linear", False, [0, 0.5, 1], "mmm"),
        ("--lambda-schedule linear", True, [0, 0.5, 1], "mmm"),
        ("--lambda-schedule falling", True, [1, 0.5, 0], "mmc"),
        ("--lambda-schedule falling --tangent conditional", False, [1, 0.5, 0], "ccc"),
        ("--lambda-schedule constant --lambda-max 0", True, [0, 0, 0], "ccc"),
    ],
)
def test_lambda_and_tangent_of_a_step(flags, compiled, lams, tangents):
    """Compiled, a number would be a constant of the graph; λ = 0 has a cheaper graph of its own."""
    warmup = " --lambda-warmup 2" if flags else " --steps 9"
    args = meanflow.train_parser("").parse_args([*(flags + warmup).split(), "--device", "cpu"])
    args = meanflow.completed(args, world=1)
    args.compile = compiled
    seen = [meanflow.lambda_and_tangent(step, args) for step in range(3)]
    assert [float(lam) for lam, _ in seen] == lams
    assert "".join(tangent[0] for _, tangent in seen) == tangents
    for lam, _ in seen:
        assert torch.is_tensor(lam) == (compiled and (lam > 0 or "linear" in flags))


def test_the_learning_rate_rises_and_decays():
    args = meanflow.train_parser("", lr_warmup=2, steps=100, lr=2.0).parse_args([])
    assert [meanflow.learning_rate(step, args) for step in (0, 1, 2, 99)] == [1, 2, 2, 2]
    args.lr_decay = True
    rates = [meanflow.learning_rate(step, args) for step in range(1, 100)]
    assert rates == sorted(rates, reverse=True) and rates[49] == pytest.approx(1.0, abs=0.02)
    assert 0 < rates[-1] < 0.002


def test_muon_takes_the_inner_kernels_and_adam_the_rest():
    """Adam's first step is lr everywhere; Muon's largest singular value gives it that size, too."""
    net = small_unet(size=8).float()
    muon = meanflow.Muon(net)
    adam = torch.optim.Adam(net.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    loss, _ = meanflow_loss(net, torch.randn(8, 1, 8, 8), 0.0)
    grads = torch.autograd.grad(loss, net.parameters(), retain_graph=True)
    grads = dict(zip(before, grads, strict=True))
    assert meanflow.update(loss, net, adam, muon, scaler, lr=0.01) > 0
    inner = {name for name, p in net.named_parameters() if any(p is k for k in muon.kernels)}
    assert "levels.down.0.conv1.weight" in inner and not inner & {"first.weight", "last.weight"}
    for name, parameter in net.named_parameters():
        if name not in inner:
            step = parameter - before[name]
            assert_close(step.abs().max(), torch.tensor(0.01), rtol=0.01, atol=0)
            assert (step * grads[name]).sum() < 0
            continue
        lr = meanflow.MUON_RATE * 0.01
        step = (parameter - (1 - 0.1 * lr) * before[name]).detach().flatten(1)
        lengths = torch.linalg.svdvals(step) / (0.2 * lr * max(step.shape) ** 0.5)
        assert 0.6 < lengths.max() < 1.3, (name, lengths)
        left, _, right = torch.linalg.svd(grads[name].flatten(1), full_matrices=False)
        likeness = F.cosine_similarity(step.flatten(), -(left @ right).flatten(), dim=0)
        assert likeness > 0.5, (name, likeness)  # Muon leaves small singular values small


def test_the_gradient_is_clipped_and_its_norm_reported_as_it_was():
    net = small_unet().float()
    adam = torch.optim.Adam(net.parameters(), betas=(0.9, 0.999), fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = 1e4 * meanflow_loss(net, torch.randn(8, 1, 8, 8), 0.0)[0]
    grads = torch.autograd.grad(loss, net.parameters(), retain_graph=True)
    reported = meanflow.update(loss, net, adam, None, scaler, lr=0.01)
    norm = lambda tensors: torch.stack([z.norm() for z in tensors]).norm()
    assert_close(reported, norm(grads))
    used = norm(state["exp_avg"] / (1 - 0.9) for state in adam.state.values())
    assert reported > 100 * used
    assert_close(used, torch.tensor(20.0), rtol=1e-4, atol=0)


# Training that can be trusted: precision, processes, resuming, faults ---------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lam", [0.0, 1.0])
@pytest.mark.parametrize("tangent", TANGENTS)
def test_bf16_keeps_the_direction_of_every_gradient(lam, tangent, device):
    net = small_unet(classes=3, width=16).float().to(device)
    x0, given = batch(n=32, shape=(1, 8, 8))
    given = {name: value.float().to(device) for name, value in given.items()}
    y = torch.arange(32, device=device) % 3
    grads = []
    for enabled in False, True:
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            loss, err = meanflow_loss(net, x0.float().to(device), lam, y, **given, tangent=tangent)
        assert loss.dtype == err.dtype == torch.float32
        grads.append(torch.autograd.grad(loss, list(net.parameters())))
    for exact, low in zip(*grads, strict=True):
        assert low.dtype == torch.float32 and low.abs().sum() > 0
        assert torch.cosine_similarity(exact.flatten(), low.flatten(), 0) > 0.98


CASES = [*itertools.product((0.0, 0.3, 1.0), TANGENTS)]


def joined_gradient(rank, world, lam, tangent):
    """The gradient of a fixed batch, of which this rank sees its part, through DDP if world > 1."""
    torch.manual_seed(0)
    net, (x0, given) = small_unet(), batch(n=8, shape=(1, 8, 8))
    given = {name: value[rank::world] for name, value in given.items()}
    objective = meanflow.Objective(net, tangent=tangent)
    if world > 1:
        objective = nn.parallel.DistributedDataParallel(objective)
    objective(x0[rank::world], lam, **given)[0].backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def worker(folder):
    """One of the processes that torchrun starts: two trainings, then the gradients of CASES."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    flags = "--steps", "2", "--flow-first", "0.5", "--reference", "5", "--log-every", "1"
    flags += "--batch-size", "6", "--out"
    images, nets = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8), []
    nn.Module.compile = functools.partialmethod(nn.Module.compile, backend="eager")
    for out, more in (folder / "eager", []), (folder / "compiled", ["--compile"]):
        torch.manual_seed(rank)  # the processes need not start alike
        args = meanflow.train_parser("").parse_args([*flags, str(out), *more])
        net = UNet(1, size=4, width=8, multipliers=(1,), attention=0)
        meanflow.train(net, images, None, args)
        nets.append(net.state_dict())
        assert torch.distributed.is_initialized()  # a group can be joined only once
    grads = [joined_gradient(rank, world, *case) for case in CASES]
    torch.save((grads, nets), folder / f"{rank}.pt")


def test_two_processes_make_one_training(tmp_path):
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    command = [sys.executable, *torchrun, __file__, tmp_path]
    result = subprocess.run(command, timeout=300, env=COMMAND, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2/2") == 2  # one process reports
    (grads, nets), (other_grads, other_nets) = (torch.load(tmp_path / f"{i}.pt") for i in range(2))
    for case, one, two in zip(CASES, grads, other_grads, strict=True):
        assert torch.equal(one, two)
        assert_close(one, joined_gradient(0, 1, *case), rtol=1e-12, atol=1e-14)
    assert_close(nets, other_nets, rtol=0, atol=0)
    eager, compiled = nets
    assert_close(eager, compiled, rtol=0, atol=1e-4)
    checkpoint = meanflow.load_checkpoint(tmp_path / "eager" / "checkpoint.pt")
    assert_close({**checkpoint["model"]}, {**eager}, rtol=0, atol=0)
    assert [row["step"] for row in log(tmp_path / "eager")] == ["1", "2"]


def test_a_killed_training_resumes_to_the_same_bits(trained, call, tmp_path):
    place = "--data", trained / "data", "--out", tmp_path / "run"
    flags = *TRAINED, *place, "--save-every", 2, "--log-every", 1
    command = [sys.executable, ROOT / "train_mnist.py", *map(str, flags)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=COMMAND) as process:
        for line in process.stdout:
            if line.startswith(("3/5", "4/5")):
                process.kill()
    assert process.returncode == -signal.SIGKILL
    assert meanflow.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] in (2, 4)
    assert call(train_mnist.main, *flags, "--resume") == (0, "")
    assert same(tmp_path / "run", trained / "run")


@pytest.mark.parametrize("module, name", [(meanflow, "draw_batch"), (torch, "save")])
def test_a_first_step_that_fails_leaves_nothing_in_the_way(training, monkeypatch, module, name):
    def fail(*args):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(module, name, fail)
        training("--steps", 2)
    assert training("--steps", 2)[0] == 0


STEPS = shlex.split("--steps 14 --log-every 3 --save-every 5 --lambda-schedule linear")


@pytest.mark.parametrize(
    "number, status, optimizer", [(signal.SIGINT, 130, "adam"), (signal.SIGTERM, 143, "muon")]
)
def test_a_signal_saves_first(training, tmp_path, monkeypatch, number, status, optimizer):
    at_step(7, monkeypatch, lambda x0: os.kill(os.getpid(), number))
    before, flags = signal.getsignal(number), (*STEPS, "--optimizer", optimizer)
    assert training(*flags) == (status, "")
    assert signal.getsignal(number) == before
    assert meanflow.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 7
    assert training(*flags, "--resume")[0] == training(*flags, out="whole")[0] == 0
    assert same(tmp_path / "run", tmp_path / "whole")
    rows, expected = log(tmp_path / "run"), log(tmp_path / "whole")
    values = [(row["step"], row["lambda"]) for row in rows if row["step"] != "7"]
    assert values == [(row["step"], row["lambda"]) for row in expected]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(training, tmp_path, monkeypatch, first):
    signals = first, signal.SIGINT
    at_step(7, monkeypatch, lambda x0: [signal.raise_signal(number) for number in signals])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    try:
        assert training(*STEPS)[0] == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["step"] < 7


class ClosedPipe:
    """What stdout is when the program that read it has ended."""

    def write(self, text):
        raise BrokenPipeError

    def isatty(self):
        return False


def test_a_signal_saves_though_nobody_reads_the_output(training, tmp_path, monkeypatch):
    at_step(7, monkeypatch, lambda x0: os.kill(os.getpid(), signal.SIGINT))
    with contextlib.redirect_stdout(ClosedPipe()):  # as Ctrl-C ends `| tee`, too
        assert training(*STEPS) == (130, "")
    assert meanflow.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 7


def at_step(steps, monkeypatch, change):
    """Do change(x0) to the batch of a step, or of several, of the next training."""
    steps, draw_batch = [steps] if isinstance(steps, int) else steps, meanflow.draw_batch
    count = itertools.count(1)

    def changed(*args):
        x0, y = draw_batch(*args)
        if next(count) in steps:
            change(x0)
        return x0, y

    monkeypatch.setattr(meanflow, "draw_batch", changed)


def test_a_folder_serves_one_training(training, tmp_path):
    assert training("--steps", 2)[0] == 0
    before = {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    assert "--resume" in one_line(training("--steps", 2))
    # steps, as the learning rate's decay has them
    changes = {"lr": 0.5, "steps": 3, "guidance": 2, "flow-first": 0.5}
    for name, value in changes.items():
        flags = "--steps", 2, f"--{name}", value, "--resume"
        assert f"{name} was" in one_line(training(*flags))
    with filelock.FileLock(tmp_path / "run" / ".lock"):
        assert "another training" in one_line(training("--steps", 2, "--resume"))
    assert before == {file: file.read_bytes() for file in before}
    assert training("--steps", 2, "--resume")[0] == 0  # after the end it changes nothing
    after = tmp_path / "run" / "checkpoint.pt"
    assert after.read_bytes() == before[after]
    after.unlink()
    assert "log.csv" in one_line(training("--steps", 2, "--resume"))
    assert before[tmp_path / "run" / "log.csv"] == (tmp_path / "run" / "log.csv").read_bytes()


def test_resume_without_a_training_starts_one_and_a_spoilt_log_is_written_again(training, tmp_path):
    constant = "--no-lr-decay", "--flow-first", 0, "--lambda-schedule", "constant"
    constant += "--log-every", 1, "--resume"
    assert training("--steps", 2, *constant)[0] == 0
    (tmp_path / "run" / "log.csv").write_bytes(b"step;loss\n\n\xff;1\n3")
    assert training("--steps", 4, *constant)[0] == 0  # a longer training goes on
    assert "lr-warmup was 1, not 8" in one_line(training("--steps", 400, *constant))
    assert training("--steps", 4, *constant, out="whole")[0] == 0
    assert same(tmp_path / "run", tmp_path / "whole")
    assert [row["loss"] for row in log(tmp_path / "run")] == [
        row["loss"] for row in log(tmp_path / "whole")]  # fmt: skip


def test_resuming_asks_for_the_same_mirroring_and_number_of_processes(tmp_path, monkeypatch):
    settings = {"steps": 1, "batch_size": 8, "out": str(tmp_path), "resume": True}
    args = meanflow.train_parser("", **settings).parse_args([])
    images = torch.zeros(9, 1, 8, 8, dtype=torch.uint8)
    train = lambda **flip: meanflow.train(UNet(1, size=8, width=8), images, None, args, **flip)
    train()
    with pytest.raises(meanflow.UserError, match="flip was False, not True"):
        train(flip=True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(meanflow.UserError, match="world was 1, not 2"):
        train()
    monkeypatch.setenv("RANK", "")  # set but empty: this is no torchrun
    train()


def test_an_isolated_nan_skips_that_update(training, tmp_path, monkeypatch):
    at_step([2, 4], monkeypatch, lambda x0: x0.fill_(math.nan))
    flags = shlex.split("--steps 6 --log-every 3 --save-every 1 --optimizer muon --amp bf16")
    assert training(*flags)[0] == 0
    assert [int(row["skipped"]) for row in log(tmp_path / "run")] == [0, 1, 0, 1, 0, 0]
    assert all(value.isfinite().all() for value in weights(tmp_path / "run"))
    checkpoint = meanflow.load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert {int(parameter["step"]) for parameter in checkpoint["adam"]["state"].values()} == {4}
    momenta = [kernel["momentum_buffer"] for kernel in checkpoint["muon"]["state"].values()]
    assert len(momenta) == len(meanflow.Muon(UNet(**checkpoint["unet"])).kernels)
    assert all(momentum.isfinite().all() for momentum in momenta)


def test_lasting_nans_end_training_with_a_good_checkpoint(training, tmp_path, monkeypatch):
    at_step(range(4, 99), monkeypatch, lambda x0: x0.fill_(math.nan))
    error = one_line(training("--steps", 60, "--log-every", 10, "--save-every", 5))
    assert "in 22 steps to 25" in error
    assert [int(row["skipped"]) for row in log(tmp_path / "run")] == [0, 2, 5, 5, 5, 5]
    assert all(value.isfinite().all() for value in weights(tmp_path / "run"))


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    net, images = UNet(1, size=8, width=8), torch.zeros(9, 1, 8, 8, dtype=torch.uint8)
    parse = meanflow.train_parser("", steps=3, save_every=2, out=str(tmp_path / "run")).parse_args
    at_step(3, monkeypatch, lambda x0: net.last.bias.data.fill_(math.inf))
    with pytest.raises(meanflow.UserError, match="not finite after step 3"):
        meanflow.train(net, images, None, parse([]))
    assert meanflow.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 2


def test_a_full_disk_leaves_the_last_checkpoint(training, tmp_path):
    resource = pytest.importorskip("resource")
    flags = "--no-lr-decay", "--flow-first", 0, "--lr-warmup", 1
    assert training("--steps", 2, *flags)[0] == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, usual[1]))  # bytes in a file
    try:
        result = training("--steps", 4, *flags, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert "checkpoint.pt" in one_line(result)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert {file.name for file in (tmp_path / "run").glob(".*")} <= {".lock"}


# On a GPU, if there is one ------------------------------------------------------------------------

gpu = pytest.mark.skipif(DEVICES == ["cpu"], reason="needs a GPU")


@gpu
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("tangent", TANGENTS)
def test_the_loss_compiled_for_a_gpu_has_the_eager_gradient(tangent, amp):
    net, y = small_unet(classes=3, attention=2).float().cuda(), torch.arange(12).cuda() % 3
    x0, given = batch(shape=(1, 8, 8))
    given = {name: value.float().cuda() for name, value in given.items()}
    objective = meanflow.Objective(net, tangent=tangent)
    torch.compiler.reset()
    compiled = torch.compile(objective, fullgraph=True, dynamic=False)
    for lam in 0.0, torch.tensor(0.7).cuda():
        grads = []
        for module in objective, compiled:
            with torch.autocast("cuda", torch.bfloat16, enabled=amp):
                loss, _ = module(x0.float().cuda(), lam, y, **given)
            grads.append(gradients(loss, net))
        assert torch.cosine_similarity(*grads, dim=0) > (0.98 if amp else 0.9999)


@gpu
@pytest.mark.parametrize(
    "flags",
    ["", "--amp fp16 --no-compile", "--amp off --no-compile --optimizer adam --guidance 2"],
    ids=["bf16, compiled", "fp16", "float32"],
)
def test_a_training_on_a_gpu_resumes_to_the_same_bits(training, tmp_path, monkeypatch, flags):
    flags = *STEPS, *flags.split(), "--device", "cuda"
    assert training(*flags, out="whole")[0] == 0
    at_step(7, monkeypatch, lambda x0: os.kill(os.getpid(), signal.SIGINT))
    assert training(*flags)[0] == 130
    assert training(*flags, "--resume")[0] == 0
    assert same(tmp_path / "run", tmp_path / "whole")
    last = log(tmp_path / "run")[-1]  # before it, the scale of fp16 may still have to fall
    assert 0 < float(last["err_flow"]) < 10 and last["skipped"] == "0"


# A user's mistakes: one line, status 2, nothing half-written -------------------------------------


def change(file, **changes):
    torch.save(torch.load(file, weights_only=True) | changes, file)


NO_CHECKPOINTS = {
    "missing": lambda file: file.unlink(),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:10_000]),
    "text": lambda file: file.write_text("hello world\n"),
    "zip": lambda file: file.write_bytes(b"PK\x03\x04 damaged"),
    "foreign": lambda file: torch.save({"state_dict": {}}, file),
    "older": lambda file: change(file, format="meanflow 0"),
    "no weights": lambda file: change(file, ema={}, model={}),
    "odd network": lambda file: change(file, unet={"channels": "one", "size": None}),
}


def test_lack_of_memory_is_no_damage(trained, call, monkeypatch):
    def load(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "load", load)
    error = one_line(call(meanflow.main, trained / "run" / "checkpoint.pt"))
    assert "out of memory" in error and "damaged" not in error


@pytest.mark.parametrize("damage", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_named(trained, call, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    NO_CHECKPOINTS[damage](run / "checkpoint.pt")
    before = {file: file.read_bytes() for file in run.iterdir()}
    drawn = call(meanflow.main, run / "checkpoint.pt", "--out", tmp_path / "new.png")
    assert "checkpoint.pt" in one_line(drawn) and not (tmp_path / "new.png").exists()
    place = "--data", trained / "data", "--out", run
    resumed = call(train_mnist.main, *TRAINED, *place, "--resume")
    assert ("log.csv" if damage == "missing" else "checkpoint.pt") in one_line(resumed)
    assert before == {file: file.read_bytes() for file in run.iterdir()}


@pytest.mark.parametrize(
    "flags",
    """--steps 0; --steps 1.5; --steps 99999999999999999999; --lr 0; --lr nan; --ema 1
    --lambda-max 1.1; --guidance -1; --reference -1; --reference 1.5
    --lambda-schedule sine; --jump-share nan; --seed 9223372036854775808; --device gpu
    --amp fp16 --device cpu; --lambda-shedule linear; --lambda linear; --t-logit nan 1
    --t-logit 0 -1; --r-logit 0; --r-logit 0 inf; --flow-first 1.1
    --lambda-warmup 3 --steps 2 --lambda-schedule linear; --lr-warmup 3 --steps 2
    --no-class-cond --guidance 2; --data ''; --out ''""".replace("\n", ";").split(";"),
)
def test_a_wrong_flag_ends_with_one_line_and_nothing_written(training, tmp_path, flags):
    flags = shlex.split(flags)
    assert flags[0] in one_line(training(*flags)) or "--guidance" in flags
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, world, message",
    [
        (["--lambda-max", "1"], 1, "need a --lambda-schedule"),
        (["--lambda-warmup", "1"], 1, "need a --lambda-schedule"),
        (["--flow-first", "0.8", "--lambda-schedule", "linear"], 1, "only 20000 steps are left"),
        ([], 3, "--batch-size 64.*3 processes"),
        ([], 64, "--jump-share 0.25 of 1 images"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(flags, world, message):
    args = meanflow.train_parser("").parse_args(flags)
    with pytest.raises(meanflow.UserError, match=message):
        meanflow.completed(args, world)


@pytest.mark.parametrize("main", [train_mnist.main, train_cifar.main, meanflow.main])
def test_help_needs_no_unicode(main, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert out.isascii() and "--steps" in out


@pytest.mark.parametrize("fault", ["missing", "cut"])
def test_data_that_are_not_whole_are_named(call, tmp_path, monkeypatch, fault):
    for name in "http_proxy", "https_proxy":
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    if fault == "cut":
        write_mnist(tmp_path / "data")
        file = tmp_path / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte"
        file.write_bytes(file.read_bytes()[:-100])
    place = "--data", tmp_path / "data", "--out", tmp_path / "run"
    error = one_line(call(train_mnist.main, *place, "--steps", 1))
    assert str(tmp_path / "data") in error
    assert not (tmp_path / "run").exists()


def test_of_several_processes_one_downloads(tmp_path):
    def dataset(folder, download=False):
        if not (folder / "data").exists():
            if not download:
                raise RuntimeError("not found")
            (folder / "busy").touch(exist_ok=False)  # fails if another one is at it
            time.sleep(0.1)
            (folder / "data").touch()
        return "data"

    with ThreadPoolExecutor() as pool:
        loaded = pool.map(meanflow.load_dataset, [dataset] * 3, [tmp_path] * 3)
        assert [*loaded] == ["data"] * 3


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (torch.zeros(4, 1, 8, 8), torch.arange(3), "images must be uint8"),
        (torch.zeros(4, 3, 8, 8).byte(), torch.arange(3), r"images must be uint8.*\(4, 3, 8, 8\)"),
        (torch.zeros(0, 1, 8, 8).byte(), torch.arange(0), "images must be uint8"),
        (torch.zeros(3, 1, 8, 8).byte(), None, "need labels"),
        (torch.zeros(3, 1, 8, 8).byte(), torch.arange(4), r"labels must be int64 \(3,\)"),
        (torch.zeros(3, 1, 8, 8).byte(), torch.zeros(3), "labels must be int64"),
        (torch.zeros(3, 1, 8, 8).byte(), torch.eye(3).long(), "labels must be int64"),
        (torch.zeros(4, 1, 8, 8).byte(), torch.arange(4), "from 0 to 3"),
        (torch.zeros(2, 1, 8, 8).byte(), torch.tensor([0, -1]), "from -1 to 0"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_named(images, labels, message, tmp_path):
    args = meanflow.train_parser("").parse_args(["--out", str(tmp_path / "run")])
    with pytest.raises(meanflow.UserError, match=message):
        meanflow.train(UNet(1, size=8, width=8, classes=3), images, labels, args)
    assert not (tmp_path / "run").exists()


def test_an_unwritable_folder_is_named(training, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file") in one_line(training("--steps", 1, out="file"))


# The README -------------------------------------------------------------------------------------


def test_the_first_block_of_the_readme_runs():
    block = readme_block("")
    names = {"batches": [torch.randn(8, 1, 28, 28)] * 2}
    exec(block, names)
    assert names["images"].shape == (64, 1, 28, 28)


def test_the_training_of_the_readme_trains(tmp_path, monkeypatch):
    block = readme_block("train_parser").replace("64", "16")  # pixels, for speed
    flags = "--steps", "1", "--batch-size", "4", "--out", str(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["script", *flags])
    exec(block.replace("...", "torch.randint(0, 256, (9, 3, 16, 16)).byte()"), {"torch": torch})
    assert meanflow.load_model(tmp_path / "run" / "checkpoint.pt").shape == (3, 16, 16)


def test_the_rule_of_the_readme_is_used(monkeypatch):
    monkeypatch.setattr(meanflow, "RULES", dict(meanflow.RULES))
    exec(readme_block("RULES["), vars(meanflow) | {})
    rule, calls = meanflow.RULES[F.softplus], []
    meanflow.RULES[F.softplus] = lambda *args: calls.append(args) or rule(*args)
    (x, v), (r, t) = torch.randn(2, 5, 3).double(), torch.rand(2, 5).double()
    for layer in F.softplus, nn.Softplus(beta=3):
        u = lambda x, r, t, layer=layer: layer(x)
        _, dudt = total_derivative(u, x, r, t, v)
        assert_close(dudt, difference(u, x, r, t, v), rtol=1e-6, atol=1e-6)
    assert len(calls) == 2


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_activation_checkpointing_of_the_readme_gives_the_same_gradients(lam):
    names = {"checkpoint": torch.utils.checkpoint.checkpoint, **vars(meanflow)}
    exec(readme_block("def checkpointed"), names)
    part, runs = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double(), []

    def counted(x):
        runs.append(x)
        return part(x)

    plain = lambda x, r, t: part(part(x) + t[:, None])
    saving = lambda x, r, t: names["checkpointed"](counted, part(x) + t[:, None])
    grads, x0 = [], torch.randn(12, 3).double()
    for u in plain, saving:
        torch.manual_seed(1)
        grads.append(gradients(meanflow_loss(u, x0, lam)[0], part))
    assert_close(*grads)
    assert len(runs) == 4  # r < t and r = t, each again in the backward pass


def test_the_weights_that_come_along_draw_digits():
    """Of real digits, the mean image of their class is the nearest of the ten in four of five."""
    net, y = meanflow.load_model(ROOT / "assets" / "mnist.pt"), torch.arange(200) % 10
    images = meanflow.draw(net, 200).clamp(-1, 1)
    assert 0.05 < (images > 0).float().mean() < 0.3  # ink; 0.5 in noise, 0.13 in real digits
    own = torch.stack([images[:100][y[:100] == digit].mean(0) for digit in range(10)])
    nearest = torch.cdist(images[100:].flatten(1), own.flatten(1)).argmin(1)
    assert (nearest == y[100:]).float().mean() > 0.6  # each label has a look of its own
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "MNIST").exists():
        pytest.skip("no MNIST to compare with")
    mnist = train_mnist.MNIST(folder)
    real = mnist.data.float() / 127.5 - 1
    means = torch.stack([real[mnist.targets == digit].mean(0) for digit in range(10)])
    nearest = torch.cdist(images.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == y).float().mean() > 0.75


def test_the_readme_points_at_the_lines_that_it_names():
    links = re.findall(r"\[`(\w+)`\]\(meanflow\.py#L(\d+)\)", (ROOT / "README.md").read_text())
    lines = (ROOT / "meanflow.py").read_text().splitlines()
    assert len(links) > 5
    for name, line in links:
        assert re.match(rf"(def|class) {name}\b", lines[int(line) - 1]), (name, line)


if __name__ == "__main__":  # one of the processes that torchrun starts
    worker(Path(sys.argv[1]))
