"""What meanflow.py claims, claim by claim; exact claims in float64."""

import copy
import csv
import functools
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import filelock
import pytest
import torch
import torch.utils.checkpoint
from PIL import Image
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.transforms.functional import pil_to_tensor

import meanflow
import train_cifar
import train_mnist
from meanflow import (
    Objective,
    UNet,
    expand,
    guided_velocity,
    lambda_schedule,
    marginal_velocity,
    mean_velocity,
    meanflow_loss,
    path,
    sample,
    sample_times,
    total_derivative,
)

ROOT = Path(__file__).parent
torch.set_num_threads(1)  # the networks are tiny
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
DEVICES = meanflow.DEVICES[::-1]
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


def batch(n=12, shape=(3,), jumps=6, **options):
    """x_t, v, r and t, which `meanflow_loss` is called with, and x0."""
    x0, x1 = torch.randn(2, n, *shape, dtype=torch.float64)
    r, t = sample_times(n, jumps, dtype=torch.float64, **options)
    return (*path(x0, x1, t), r, t), x0


def gradients(loss, net):
    grads = torch.autograd.grad(loss, [*net.parameters()], materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def readme_block(words):
    """Return the first block of Python in the README, or that of benchmarks, with the words."""
    pages = (ROOT / "README.md").read_text() + (ROOT / "benchmarks" / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", pages, re.DOTALL)
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
    (x_t, _, r, t), _ = batch(n=1000, shape=(1,), jumps=1000)
    r, t = r.clamp(0.01, 0.98), t.clamp(0.02, 0.99)
    t = torch.maximum(t, r + 0.01)
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


def test_many_steps_in_half_precision_do_not_round_away():
    velocity = lambda x, r, t: gaussian_v(x, t[:, None]).to(x.dtype)
    x = sample(velocity, torch.randn(20_000, 1).bfloat16(), steps=256)
    assert x.dtype == torch.bfloat16
    assert abs(x.double().std() - STD) < 0.02  # 0.59 if x itself is rounded in each step


def stationarity(lam, tangent):
    """Mean and standard error of the loss's gradient in (a, b, c) of (1 + a) u + b + c x at 0."""
    grads = []
    for _ in range(20):
        parameters = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        a, b, c = parameters
        model = lambda x, r, t: (1 + a) * gaussian_u(x, r, t) + b + c * x  # noqa: B023
        x0 = MEAN + STD * torch.randn(20_000, 1, dtype=torch.float64)
        times = {"t_logit": (-0.4, 1.0), "r_logit": None, "jump_share": 1.0}
        loss, _ = Objective(model, tangent=tangent, p=0, **times)(x0, lam)
        grads.append(torch.autograd.grad(loss, parameters)[0])
    grads = torch.stack(grads)
    return grads.mean(0), grads.std(0) / len(grads) ** 0.5


@pytest.mark.parametrize(
    "lam, tangent", [(0.0, "conditional"), (0.0, "marginal"), (1.0, "marginal")]
)
def test_true_u_is_stationary(lam, tangent):
    mean, error = stationarity(lam, tangent)
    assert (mean.abs() < 4 * error).all(), (mean, error)
    assert (error < 0.01).all(), error


def test_true_u_is_not_stationary_for_the_conditional_tangent_with_lambda_1():
    mean, error = stationarity(1.0, "conditional")
    assert mean[0] < -0.05 and mean[2] < -0.1, (mean, error)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_lambda_pulls_together_where_jumps_end_along_the_conditional_tangent(lam):
    """Its gradient is that along the mean of v, plus λ times that of E||J (v - mean)||²."""
    net, x_t = Net(), torch.randn(1, 3).double().repeat(5, 1)
    v, (r, t) = torch.randn(5, 3).double(), torch.tensor([[0.2], [0.7]]).double().repeat(1, 5)
    mean = v.mean(0).repeat(5, 1)

    def along(direction):
        loss, _ = meanflow_loss(net, x_t, v, r, t, lam, direction=direction, p=0)
        return gradients(loss, net)

    jump = lambda x: x - 0.5 * net(x, r, t)
    _, apart = torch.func.jvp(jump, (x_t,), (v - mean,))  # J (v - mean)
    pull = gradients(apart.square().sum(1).mean(), net)
    assert_close(along(v), along(mean) + lam * pull)
    assert pull.norm() > 0.1


def test_jumps_to_one_point_beat_the_truth_along_the_conditional_tangent_only():
    x0, x1 = MEAN + STD * torch.randn(1000, 1).double(), torch.randn(1000, 1).double()
    r, t = 0.4 * torch.rand(1000).double(), 0.5 + 0.5 * torch.rand(1000).double()
    x_t, v = path(x0, x1, t)
    collapsed = lambda x, r, t: (x - 0.3) / expand(t - r, x)

    def error(model, along):
        return meanflow_loss(model, x_t, v, r, t, 1.0, direction=along)[1]

    mean_v = gaussian_v(x_t, t[:, None])
    assert error(collapsed, v).max() < 1e-20 and error(gaussian_u, v).mean() > 0.1
    assert_close(error(collapsed, mean_v), error(gaussian_u, mean_v))


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
    x0, x1 = torch.randn(2, 6, 3).double()
    more, t = torch.randn(4, 3).double(), torch.tensor([0, 0.01, 0.3, 0.7, 0.95, 1]).double()
    y, more_y = torch.tensor([0, 1, -1, 0, 1, -1]), torch.tensor([0, 1, 1, 0])
    images, labels = torch.cat((x0, more)), torch.cat((y, more_y))
    x_t, v = path(x0, x1, t)
    mean = mean_velocity(x_t, t, v, x0, y, (more, more_y))
    for i in range(1, 6):
        assert_close(mean[i], mean_over_images(x_t[i], t[i], y[i], images, labels))
    assert torch.equal(mean[:2], v[:2])  # near t = 0 only the sample's own image is possible
    assert ((mean - v).norm(dim=1)[3:] > 0.1).all()
    unlabelled = mean_velocity(x_t, t, v, x0, None, (more, None))
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
        mean_velocity(at, times, v[i : i + 1], x[:1], None, (x[1:], None))
        for i, x in enumerate(drawn)
    ]
    mean = torch.cat(results)
    assert_close((weight * mean).sum(), (weight * v).sum())
    variance = lambda z: (weight * z**2).sum() - (weight * z).sum() ** 2
    assert variance(mean) < 0.999 * variance(v) or images == 1 or t < 1e-3


def test_the_mean_velocity_is_not_rounded_to_float32_or_less():
    images, t = 1 + 0.001 * torch.randn(40, 1, 28, 28), torch.linspace(0.01, 0.05, 8)
    x0, reference = images[:8], (images[8:], None)
    x_t, v = path(x0, torch.randn_like(x0), t)
    with torch.autocast("cpu", torch.bfloat16):
        mean = mean_velocity(x_t, t, v, x0, None, reference)
    for i in range(8):
        exact = mean_over_images(x_t[i].double(), t[i].double(), 0, images.double(), [0] * 40)
        assert (mean[i] - v[i]).norm() > 0.1
        # x_t and v themselves are float32
        assert_close(mean[i].double(), exact, rtol=1e-4, atol=1e-4)


# SG_λ and what it does to the loss ---------------------------------------------------------------


def test_lambda_leaves_the_value_and_is_affine_in_the_gradient():
    net, (given, _) = small_unet(), batch(shape=(1, 8, 8))
    losses, grads = {}, {}
    for lam in 0.0, 0.3, 1.0:
        losses[lam], _ = meanflow_loss(net, *given, lam, jumps=6)
        grads[lam] = gradients(losses[lam], net)
        as_tensor, _ = meanflow_loss(net, *given, torch.tensor(lam).double(), jumps=6)
        assert_close(gradients(as_tensor, net), grads[lam])
    assert_close(losses[0.0], losses[0.3], rtol=1e-12, atol=0)
    assert_close(losses[0.0], losses[1.0], rtol=1e-12, atol=0)
    assert_close(grads[0.3], 0.7 * grads[0.0] + 0.3 * grads[1.0], rtol=1e-10, atol=1e-12)
    assert (grads[1.0] - grads[0.0]).norm() > 0.01 * grads[0.0].norm()


def written_out(
    net, x0, x1, r, t, y, lam, *, reference=None, tangent="conditional", guidance=1.0, p=0.75,
    c=1e-3,
):  # fmt: skip
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


OPTIONS = [
    {}, {"p": 0}, {"p": 1, "c": 0.01}, {"tangent": "marginal"}, {"guidance": 3.0},
    {"guidance": 3.0, "tangent": "marginal"}, {"guidance": 3.0, "reference": 5},
    {"tangent": "marginal", "reference": 5},
]  # fmt: skip


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_is_the_formula_of_the_papers(lam, options, share):
    """And so is its composition of functions, with which the README explains it."""
    net, x0, y = Net(), torch.randn(12, 3).double(), torch.tensor([0, 1, -1, 2, -1, 3] * 2)
    times, reference = {"t_logit": (0.3, 1.5), "r_logit": (-1.0, 1.0)}, None
    if "reference" in options:
        more = torch.randn(options["reference"], 3).double()
        reference = more, torch.arange(len(more))
    others = {name: z for name, z in options.items() if name != "reference"}
    torch.manual_seed(1)
    objective = Objective(net, jump_share=0.9, **times, **others)
    loss, err = objective(x0, lam, y, reference=reference, jump_share=share)
    torch.manual_seed(1)
    x1, k = torch.randn_like(x0), round(12 * share)
    r, t = sample_times(12, k, **times, dtype=torch.float64)
    expected = written_out(net, x0, x1, r, t, y, lam, **others, reference=reference)
    assert_close((loss, err), expected)
    assert_close(gradients(loss, net), gradients(expected[0], net))

    x_t, v = path(x0, x1, t)
    v = mean_velocity(x_t, t, v, x0, y, reference) if reference else v
    v = guided_velocity(net, x_t, t, v, y, others.pop("guidance", 1.0))
    if others.pop("tangent", None):
        others["direction"] = marginal_velocity(net, x_t, t, y)
    assert_close(meanflow_loss(net, x_t, v, r, t, lam, y, **others), expected)


# The derivative ----------------------------------------------------------------------------------


def difference(u, x, r, t, v, *y, h=1e-6):
    """du/dt along (v, 0, 1) as a central difference."""
    return (u(x + h * v, r, t + h, *y) - u(x - h * v, r, t - h, *y)) / (2 * h)


def test_only_samples_with_r_below_t_pass_through_the_jvp():
    seen = []

    def u(x, r, t):
        differentiated = forward_ad.unpack_dual(t).tangent is not None
        seen.append((len(x), bool((r == t).all()), differentiated))
        return x * t[:, None]

    for tangent, calls in ("conditional", []), ("marginal", [(4, True, False)]):
        Objective(u, jump_share=0.25, tangent=tangent)(torch.randn(16, 3), 0.0)
        assert sorted(seen) == [(4, False, True), *calls, (12, True, False)]
        seen.clear()


# Times and schedules -----------------------------------------------------------------------------


def test_times_have_the_distributions_asked_for():
    n = 100_000
    r, t = sample_times(n, n // 2, dtype=torch.float64)
    assert ((r >= 0) & (r <= t) & (t <= 1)).all() and r.dtype == t.dtype == torch.float64
    assert torch.equal(r[n // 2 :], t[n // 2 :])
    _, t = sample_times(n, n // 2, t_logit=(-0.6, 1.6), r_logit=(-4.0, 0.5))
    r, _ = sample_times(n, n, t_logit=(9.0, 0.1), r_logit=(-4.0, 0.5))
    for times, mean, std in (t, -0.6, 1.6), (r, -4.0, 0.5):
        logit = times.double().logit()
        assert abs(logit.mean() - mean) < 5 * std / n**0.5 and abs(logit.std() / std - 1) < 0.02
    _, later = sample_times(n, 0, t_logit=(1.0, 2.0), r_logit=None)  # of two, where r = t, too
    assert abs(later.double().logit().mean() - (1.0 + 2.0 / math.pi**0.5)) < 0.05
    low, high = sample_times(n, n, t_logit=(1.0, 2.0), r_logit=None)
    both = torch.cat((low, high)).double().logit()  # sorting a pair does not change their union
    assert abs(both.mean() - 1.0) < 0.05 and abs(both.std() - 2.0) < 0.05


def test_schedules_at_their_edges():
    for name in "constant", "linear", "cosine":
        lam = lambda_schedule(name, warmup=10, maximum=0.8)
        values = [lam(step) for step in range(-2, 15)]
        assert values == sorted(values) and values[12:] == [0.8] * 5
        assert values[:3] == [0.8 if name == "constant" else 0.0] * 3
        assert lambda_schedule(name, warmup=0)(0) == 1.0
    assert lambda_schedule("linear", warmup=10)(3) == 0.3
    assert lambda_schedule("cosine", warmup=10)(5) == pytest.approx(0.5)
    assert lambda_schedule("cosine", warmup=10)(1) < 0.03
    assert lambda_schedule("none", warmup=10)(20) == 0.0


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


class ChoosesItsKernel(nn.Module):
    """Attention of a network that allows any backend around the call."""

    def forward(self, x):
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(x, x.flip(1), x)


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
    "conv 2d, circular, groups": (
        nn.Conv2d(6, 4, 3, groups=2, padding=1, padding_mode="circular"), IMAGE),
    "conv 3d": (nn.Conv3d(4, 2, 2), VOLUME),
    "a kernel that depends on x": (
        lambda x: F.conv2d(x, x.reshape(-1, 6, 2, 2)[:3], x.flatten()[:3]), IMAGE),
    "a convolution of which only the bias depends on x": (
        lambda x: F.conv2d(x, ONES.to(x).view(1, 6, 1, 1), x.sin().flatten()[:1]), IMAGE),
    "SiLU": (nn.SiLU(), VECTOR),
    "SiLU in place": (lambda x: x * F.silu(x, inplace=True), VECTOR),
    "group norm": (nn.GroupNorm(2, 6), IMAGE),
    "a group norm whose weight depends on x": (
        lambda x: F.group_norm(x, 2, x.mean((0, 2, 3)), x.sum((0, 2, 3))), IMAGE),
    "layer norm of two dimensions": (nn.LayerNorm((5, 6), bias=False), SEQUENCE),
    "layer norm of channels, by names": (
        lambda x: F.layer_norm(input=x.movedim(1, -1), normalized_shape=(6,), eps=0.1), IMAGE),
    "a layer norm whose weight depends on x": (
        lambda x: F.layer_norm(x, (6,), x.mean(0), x.sin().sum(0)), VECTOR),
    "a layer norm of weights, whose own weight depends on x": (NormOfWeights(6), VECTOR),
    "a layer norm of nothing, as of an expert that no sample chose": (
        lambda x: x + F.layer_norm(x[x > 99].view(-1, 6), (6,)).sum(0), VECTOR),
    "a layer norm and work in place after it": (
        lambda x: F.layer_norm(x, (6,)).mul_(2).add_(x), VECTOR),
    "instance norm, affine": (nn.InstanceNorm1d(5, affine=True), SEQUENCE),
    "an instance norm with weights of each sample": (
        lambda x: F.instance_norm(
            x.reshape(1, -1, 4, 4), weight=x.mean((2, 3)).flatten(), bias=x[:, :, 1, 2].flatten()
        ).view_as(x), IMAGE),
    "batch norm in eval mode": (nn.BatchNorm2d(6).eval(), IMAGE),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x.flip(1), x), SEQUENCE),
    "attention that chooses its kernel": (ChoosesItsKernel(), SEQUENCE),
    "multi-head attention": (SelfAttention(6, 2, batch_first=True), SEQUENCE),
    "transformer, norm after": (encoder(norm_first=False), SEQUENCE),
    "transformer, norm before, in eval mode": (encoder(norm_first=True).eval(), SEQUENCE),
}  # fmt: skip


def against_differences(u, parameters, shape):
    """Compare the gradient of the λ = 1 loss with central differences along a direction."""
    given, _ = batch(n=4, shape=shape, jumps=4)
    loss = lambda: meanflow_loss(u, *given, 1.0, p=0)[0]
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
    layer, shape = LAYERS[name]
    net = Through(layer, shape).double().to(device)
    for parameter in net.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    with torch.device(device):
        (x, v, r, t), _ = batch(n=4, shape=shape, jumps=4)
        _, dudt = total_derivative(net, x, r, t, v)
        assert_close(dudt, difference(net, x, r, t, v), rtol=1e-6, atol=1e-6)
        against_differences(net, [*net.parameters()], shape)


@torch.library.custom_op("tests::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


square.register_autograd(lambda context, grad: grad, setup_context=lambda *args, **named: None)


def test_operators_that_would_lose_the_tangent_are_refused():
    (x, v, r, t), _ = batch()
    for keep in True, False:
        with pytest.raises(NotImplementedError, match=r"tests\.square"):
            total_derivative(lambda x, r, t: x * square(x), x, r, t, v, gradients=keep)
    constant = lambda z, r, t: z * square(x)
    assert_close(total_derivative(constant, x, r, t, v)[1], v * x**2)


def test_an_ensemble_is_trained_by_vmap():
    nets, (given, _) = [Net(), Net()], batch()
    weights, _ = torch.func.stack_module_state(nets)

    def loss(weights):
        model = lambda *inputs: torch.func.functional_call(nets[0], weights, inputs)
        return meanflow_loss(model, *given, 0.0, jumps=6)[0]

    one_by_one = [meanflow_loss(net, *given, 0.0, jumps=6)[0] for net in nets]
    assert_close(torch.vmap(loss)(weights), torch.stack(one_by_one))


def test_diffusers_unet_of_the_readme():
    pytest.importorskip("diffusers")
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    small = {"down_block_types": down, "up_block_types": up, "norm_num_groups": 4}
    small |= {"block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 8}
    block = readme_block("UNet2DModel").replace("sample_size=32", "**small")
    exec(block, names := {"small": small | {"sample_size": 8}})
    net = names["model"].double()
    against_differences(net, [*net.parameters()], (3, 8, 8))
    net.eval()
    with torch.no_grad():
        Objective(net)(torch.randn(4, 3, 8, 8).double(), 0.0)


class TimestepEmbedder(nn.Linear):
    def __init__(self, hidden_size):
        super().__init__(1, hidden_size)

    def forward(self, t):
        return super().forward(t[:, None])


class DiT(nn.Module):
    """What the README's network takes from facebookresearch/DiT, as small as can be."""

    def __init__(self, num_classes, hidden_size, learn_sigma, class_dropout_prob, **sizes):
        super().__init__()
        assert (learn_sigma, class_dropout_prob) == (False, 0)
        self.x_embedder, self.pos_embed = nn.Linear(3, hidden_size), 0.1
        self.t_embedder, self.labels = (
            TimestepEmbedder(hidden_size),
            nn.Embedding(num_classes, hidden_size),
        )
        self.y_embedder = lambda y, train: self.labels(y)
        self.blocks = nn.ModuleList([Modulated(hidden_size), Modulated(hidden_size)])
        self.last, self.unpatchify = nn.Linear(hidden_size, 3), lambda x: x
        self.final_layer = lambda x, c: self.last(x + c[:, None])


class Modulated(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm, self.modulate = nn.LayerNorm(size), nn.Linear(size, size)
        self.attention = SelfAttention(size, 2, batch_first=True)

    def forward(self, x, c):
        return x + self.attention(self.norm(x) * self.modulate(c)[:, None])


def test_the_dit_of_the_readme(monkeypatch):
    models = types.SimpleNamespace(DiT=DiT, TimestepEmbedder=TimestepEmbedder)
    monkeypatch.setitem(sys.modules, "models", models)
    exec(readme_block("TwoTimeDiT"), names := {})
    net, y = names["TwoTimeDiT"](5, hidden_size=8).double(), torch.tensor([0, 4, -1, 2])
    against_differences(lambda x, r, t: net(x, r, t, y), [*net.parameters()], (6, 3))
    (x, _, r, t), _ = batch(n=4, shape=(6, 3), jumps=4)
    with_label, without = net(x, r, t, y), net(x, r, t)
    assert torch.equal((with_label == without).flatten(1).all(1), y < 0)
    assert (net(x, r / 2, t) != without).any() and (net(x, r, (1 + t) / 2) != without).any()


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
def test_a_whole_step_compiles_into_one_graph(make, tangent, guidance, lams, backend, amp):
    net, y = make(), torch.tensor([0, 1, -1, 2])
    x0 = torch.randn(4, *((1, 4, 4) if isinstance(net, UNet) else (2, 3, 3)))
    objective = Objective(net, tangent=tangent, guidance=guidance)
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
    given, _ = batch(n=8, shape=shape, jumps=4)
    given, grads = [z.float().to(device) for z in given], []
    for enabled in False, True:
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            loss, _ = meanflow_loss(net, *given, 1.0, jumps=4, p=0)
        grads.append(gradients(loss, net))
    assert F.cosine_similarity(*grads, dim=0) > 0.999
    assert_close(grads[0].norm(), grads[1].norm(), rtol=0.05, atol=0)


def test_a_network_may_work_in_place_on_its_input():
    net, (given, _) = Net(), batch(jumps=12)
    in_place = lambda x, r, t: net(x.mul_(2), r.add_(1), t.mul_(3))
    copies = lambda x, r, t: net(x * 2, r + 1, t * 3)
    before = [z.clone() for z in given]
    assert_close(*(meanflow_loss(u, *given, 1.0) for u in (in_place, copies)))
    assert_close(*(sample(u, given[0], steps=2) for u in (in_place, copies)))
    assert_close([*given], before, rtol=0, atol=0)


def test_a_network_may_work_in_place_after_a_norm():
    nets = [nn.Sequential(nn.InstanceNorm1d(5), relu) for relu in (nn.ReLU(True), nn.ReLU())]
    nets = [Through(net, SEQUENCE).double() for net in nets]
    nets[1].load_state_dict(nets[0].state_dict())
    given, _ = batch(shape=SEQUENCE)
    losses = [meanflow_loss(net, *given, 0.0, jumps=6)[0] for net in nets]
    assert_close(*(gradients(loss, net) for loss, net in zip(losses, nets, strict=True)))


def test_a_part_of_the_network_may_be_compiled():
    part = nn.Sequential(nn.Conv1d(5, 5, 3, padding=1), nn.GroupNorm(1, 5), nn.LayerNorm(6))
    net, (given, _) = Through(part, SEQUENCE).double(), batch(shape=SEQUENCE)
    losses = [meanflow_loss(net, *given, 1.0, jumps=6)[0]]
    expected = gradients(losses[0], net)
    torch.compiler.reset()
    net.layer = torch.compile(net.layer, backend="eager")
    losses.append(meanflow_loss(net, *given, 1.0, jumps=6)[0])
    assert_close(*losses)
    assert_close(gradients(losses[1], net), expected)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.LayerNorm((8, 4, 4))])
@pytest.mark.parametrize("keep", [False, True])
def test_derivatives_of_norms_in_half_precision_are_rounded_once_at_the_end(norm, keep):
    norm, (x, v) = copy.deepcopy(norm).bfloat16(), torch.randn(2, 30, 8, 4, 4).bfloat16()
    for weight in norm.parameters():
        nn.init.normal_(weight)
    exact_norm, r = copy.deepcopy(norm).double(), torch.zeros(30)
    _, low = total_derivative(lambda x, r, t: norm(x), x, r, r, v, gradients=keep)
    x, r, v = x.double(), r.double(), v.double()
    _, exact = total_derivative(lambda x, r, t: exact_norm(x), x, r, r, v)
    assert_close(low.double(), exact, rtol=2**-8, atol=1e-5)  # a last bit is 2**-7


def test_half_precision_data_do_not_overflow():
    x0 = torch.randn(2, 3, 256, 256, dtype=torch.float16)
    loss, err = Objective(lambda x, r, t: 0 * x)(x0, 0.0)
    assert loss.isfinite() and loss.dtype == err.dtype == torch.float32
    assert_close(err.mean(), torch.tensor(2.0), rtol=0.05, atol=0)  # of x1 - x0


def test_a_derivative_that_needs_no_gradient_keeps_no_graph():
    net, (given, _) = small_unet(), batch(n=2, shape=(1, 8, 8), jumps=2)
    x_t, v, r, t = given

    def kept(function, *args, **options):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda z: sizes.append(z.numel()) or z, lambda z: z
        ):
            first, second = function(*args, **options)
        return sum(sizes), first.requires_grad, second.requires_grad

    less, *requires_grad = kept(total_derivative, net, x_t, r, t, v, gradients=False)
    assert requires_grad == [True, False]
    more, *requires_grad = kept(total_derivative, net, x_t, r, t, v, gradients=True)
    assert requires_grad == [True, True] and less < 0.7 * more
    plain, *_ = kept(lambda: 2 * (net(x_t, r, t),))
    assert less < 1.5 * plain  # nearly what a pass without a derivative keeps
    less, *_ = kept(meanflow_loss, net, *given, 0.0)
    more, *_ = kept(meanflow_loss, net, *given, torch.tensor(0.0).double())
    assert less < 0.7 * more


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
    loss, err = Objective(net)(x, 1.0, y)
    loss.backward()
    assert err.shape == (2,)


def test_the_unet_depends_on_r_and_on_t_and_on_their_order():
    times = {"jumps": 4, "r_logit": None}
    net, ((x, _, r, t), _) = small_unet(), batch(n=4, shape=(1, 8, 8), **times)
    for other in net(x, t, r), net(x, r / 2, t), net(x, r, (1 + t) / 2):
        assert (net(x, r, t) - other).abs().mean() > 0.001


def test_the_second_time_of_the_embedding_is_the_gap():
    embedding, y = meanflow.Embedding(8, 0).double(), torch.full((4,), -1)
    embedding.time.weight.data.view(8, 2, 2, 5)[:, :, 0] = 0  # of the cosines and sines of t
    r, t = sample_times(4, 4, r_logit=None, dtype=torch.float64)
    assert_close(embedding(r, t, y), embedding(r + 0.1, t + 0.1, y))
    assert (embedding(r, t, y) - embedding(r, t + 0.1, y)).abs().max() > 1e-4


def test_each_block_up_gets_what_its_block_down_found():
    net, ((x, _, r, t), _) = small_unet(blocks=2), batch(n=2, shape=(1, 8, 8), jumps=2)
    for level in net.levels, net.levels.inner:
        found, got = [], []
        for block in level.down:
            block.register_forward_hook(lambda block, args, out, found=found: found.append(out))
        for block in level.up:
            block.register_forward_hook(lambda block, args, out, got=got: got.append(args[0]))
        net(x, r, t)
        for out, joined in zip(found[::-1], got, strict=True):
            assert torch.equal(joined[:, out.shape[1] :], out)


def test_labels_matter_and_a_missing_one_is_the_null_class():
    net, ((x, _, r, t), _) = small_unet(classes=3), batch(n=4, shape=(1, 8, 8))
    out = [net(x, r, t, torch.full((4,), y)) for y in range(-1, 3)]
    assert torch.equal(net(x, r, t), out[0])
    assert all((out[i] - out[j]).abs().mean() > 1e-4 for i in range(4) for j in range(i))


def test_every_parameter_of_the_unet_learns():
    net, y = small_unet(classes=3, attention=2, blocks=2), torch.arange(6) % 3
    given, _ = batch(n=6, shape=(1, 8, 8), jumps=3)
    for lam in 0.0, 1.0:
        loss, _ = meanflow_loss(net, *given, lam, y, jumps=3)
        assert all(g.any() for g in torch.autograd.grad(loss, [*net.parameters()]))


def test_dropout_only_in_training_mode_and_the_mode_comes_back():
    net = small_unet(dropout=0.5)
    x1 = torch.randn(3, 1, 8, 8).double()
    assert torch.equal(sample(net, x1), sample(net, x1))
    assert net.training and net.norm.training
    with pytest.raises(RuntimeError):
        sample(net, x1[:, :, :3])
    assert net.training and not sample(net.eval(), x1).requires_grad and not net.training


def test_derivative_and_value_share_the_dropout_mask():
    net, ((x, v, r, t), _) = small_unet(dropout=0.5).train(), batch(n=3, shape=(1, 8, 8), jumps=3)

    def masked(h):
        torch.manual_seed(1)
        return total_derivative(net, x + h * v, r, t + h, v)

    (up, _), (_, dudt), (down, _) = masked(1e-6), masked(0), masked(-1e-6)
    assert_close(dudt, (up - down) / 2e-6, rtol=1e-6, atol=1e-6)
    torch.manual_seed(2)
    assert (total_derivative(net, x, r, t, v)[1] - dudt).abs().mean() > 0.01  # another mask


# Bad input that would pass in silence ------------------------------------------------------------

X, R, T = torch.zeros(4, 3), torch.full((4,), 0.2), torch.full((4,), 0.6)
LABELS, FLOATS = torch.zeros(4).long(), torch.zeros(4)
u = lambda x, r, t, y=None: x
loss_of = lambda model=u, r=R, t=T, lam=0.0, **options: meanflow_loss(
    model, X, X, r, t, lam, **options
)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: path(X.byte(), X, T), "x0 must be.*uint8"),
        (lambda: loss_of(lam=1.5), "lam must be.*1.5"),
        (lambda: loss_of(lam=float("nan")), "lam must be.*nan"),
        (lambda: loss_of(lam=torch.tensor(-0.1)), "lam must be.*-0.1"),
        (lambda: loss_of(r=T, t=R), "r <= t.*0.6.*0.2"),
        (lambda: loss_of(t=T * 2), "t <= 1"),
        (lambda: loss_of(r=-R), "0 <= r"),
        (lambda: loss_of(jumps=2), "r = t from sample 2 on"),
        (lambda: loss_of(r=R[:1], t=T[:1]), r"r, t \(B,\), got.*\(1,\)"),
        (lambda: loss_of(r=R[:, None], t=T[:, None]), r"r, t \(B,\), got.*\(4, 1\)"),
        (lambda: meanflow_loss(u, X, X[:1], R, T, 0.0), r"v must be.*\(1, 3\)"),
        (lambda: mean_velocity(X, T, X, X, None, (X.byte(), None)), "reference.*uint8"),
        (lambda: loss_of(lambda x, r, t: x[:1]), r"model must.*\(4, 3\).*\(1, 3\)"),
        (lambda: loss_of(lambda x, r, t: (x, t)), "model must return.*tuple"),
        (lambda: Objective(u, tangent="true"), "tangent.*'true'"),
        (lambda: Objective(u, jump_share=1.1)(X, 0.0), "jump_share=1.1"),
        (lambda: Objective(u, jump_share=0.1)(X, 0.0), "jump_share=0.1 lets 0 of 4"),
        (lambda: Objective(u)(X[:1], 0.0), "jump_share=0.5 lets 0 of 1"),
        (lambda: Objective(u, guidance=2.0)(X, 0.0), "y must.*None"),
        (lambda: Objective(u, guidance=2.0)(X, 0.0, FLOATS), "y must.*float32"),
        (lambda: Objective(u)(X, 0.0, FLOATS, reference=(X, FLOATS)), "integer labels"),
        (lambda: lambda_schedule("step", warmup=1), "name must be.*'step'"),
        (lambda: sample(u, X, steps=0), "times must"),
        (lambda: sample(u, X, times=[1, 0.5, 0.5, 0]), "times must.*decrease.*0.5"),
        (lambda: sample(u, X, times=[0.9, 0]), "times must.*from 1 to 0.*0.9"),
        (lambda: sample(u, X, times=[]), "times must"),
        (lambda: UNet(3, size=(32, 64)), r"size must be an integer, got \(32, 64\)"),
        (lambda: UNet(3, size=32, classes=None), "classes must be.*None"),
        (lambda: UNet(3, size=32, width=32.0), "width must be.*32.0"),
        (
            lambda: UNet(1, size=8, classes=3)(torch.zeros(4, 1, 8, 8), R, T, LABELS[:1]),
            r"y must.*\(4,\).*\(1,\)",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# It learns ---------------------------------------------------------------------------------------


def test_one_step_samples_of_a_learned_mixture_hit_its_modes():
    """Four narrow Gaussians on a square, a small network, one evaluation per sample."""
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    layers = [(nn.Linear(n, 128), nn.SiLU()) for n in (4, 128, 128)]
    net = nn.Sequential(*(layer for pair in layers for layer in pair), nn.Linear(128, 2))
    u = lambda x, r, t: net(torch.cat((x, r[:, None], t[:, None]), 1))
    objective, optimizer = Objective(u), torch.optim.Adam(net.parameters(), 4e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for _ in range(800):
        x0 = corners[torch.randint(4, (256,))] + 0.1 * torch.randn(256, 2)
        loss, _ = objective(x0, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    x = sample(u, torch.randn(4000, 2))
    distance, mode = torch.cdist(x, corners).min(1)
    assert (distance < 0.4).float().mean() > 0.85  # 0.03 at the start, 0.9997 for the data
    assert (mode.bincount(minlength=4) / len(x) > 0.18).all()


# Training: what it writes, and the sampler on its checkpoint -------------------------------------

# of the processes that tests start: output that knows nothing beyond ASCII, and no GPU
COMMAND = os.environ | {"PYTHONIOENCODING": "ascii", "CUDA_VISIBLE_DEVICES": ""}
COMMAND["PYTHONPATH"] = str(ROOT)


@pytest.fixture
def call(capfd):
    """Return a function that runs a main as a command does: its status, output and errors."""

    def call(main, *flags):
        capfd.readouterr()
        status = 0
        try:
            meanflow.run(main, [*map(str, flags)])
        except SystemExit as end:
            status = end.code
        return status, *capfd.readouterr()

    return call


def small(argv):
    """What train_mnist.py does, with random images of 8x8 pixels and a tiny network."""
    recipe = train_mnist.RECIPE | {"reference": 5, "batch_size": 4, "device": "cpu"}
    parser = meanflow.train_parser("", **recipe)
    parser.add_argument("--class-cond", action="store_true")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    images = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8)
    labels, classes = (torch.arange(64) % 3, 3) if args.class_cond else (None, 0)
    net = UNet(1, size=8, width=8, multipliers=(1,), attention=0, classes=classes)
    meanflow.train(net, images, labels, args)


@pytest.fixture
def training(call, tmp_path):
    """Return a function that trains in tmp_path / "run" with flags, one a word or a number."""
    return lambda *flags, out="run": call(small, "--out", tmp_path / out, *flags)


def one_line(result):
    status, _, error = result
    assert status == 2 and error.count("\n") == 1 and "error" in error, result
    return error


def checkpoint_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def weights(out):
    return [z for part in ("model", "ema") for z in checkpoint_of(out)[part].values()]


def same(out, other):
    return all(map(torch.equal, weights(out), weights(other)))


def log(out):
    return list(csv.DictReader((out / "log.csv").open()))


def without_speed(rows):
    return [{k: z for k, z in row.items() if "second" not in k} for row in rows]


def at_step(steps, monkeypatch, change):
    """Do change(x0) to the batch of a step, or of several, of the next training."""
    steps, draw_batch = [steps] if isinstance(steps, int) else steps, meanflow.draw_batch
    count = itertools.count(1)

    def changed(images, labels, n, *rest):
        x0, y = draw_batch(images, labels, n, *rest)
        if rest[1:] and next(count) in steps:  # it is a batch, no reference
            change(x0)
        return x0, y

    monkeypatch.setattr(meanflow, "draw_batch", changed)


def test_training_writes_log_pictures_and_a_checkpoint(training, tmp_path):
    flags = "--steps 8 --flow-first 0.25 --log-every 2 --lambda-schedule linear --class-cond"
    status, out, _ = training(*flags.split())
    assert status == 0 and str(tmp_path / "run" / "samples.png") in out.splitlines()[-1]
    rows = log(tmp_path / "run")
    assert [int(row["step"]) for row in rows] == [1, 2, 4, 6, 8]
    assert [float(row["lambda"]) for row in rows] == [0, 0, 0.5, 1, 1]
    assert [row.pop("err_jump") == "nan" for row in rows] == [True] * 2 + [False] * 3
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    names = {file.name for file in (tmp_path / "run").iterdir()} - {".lock"}
    pictures = {"samples.png", "step-000001.png", "step-000008.png"}
    assert names == {"log.csv", "checkpoint.pt"} | pictures
    assert Image.open(tmp_path / "run" / "samples.png").size == (10 * 10 + 2, 12 * 10 + 2)
    net = meanflow.load_model(tmp_path / "run" / "checkpoint.pt")
    checkpoint = checkpoint_of(tmp_path / "run")
    assert not torch.equal(net.last.weight, checkpoint["model"]["last.weight"])  # an average
    meanflow.save_images(meanflow.draw(net, 80), tmp_path / "again.png")
    again, last = (Image.open(tmp_path / z) for z in ("again.png", "run/step-000008.png"))
    assert again == last


def test_a_short_training_draws_the_image_of_its_label(tmp_path):
    """Class 0 is black, class 1 is white."""
    images, labels = torch.zeros(50, 1, 8, 8, dtype=torch.uint8), torch.arange(50) % 2
    images[1::2] = 255
    recipe = {"steps": 150, "ema": 0.9, "out": tmp_path / "run", "optimizer": "muon", "lr": 3e-3}
    args = meanflow.train_parser("", **recipe, log_every=50).parse_args([])
    net = UNet(1, size=8, width=8, multipliers=(1,), attention=0, classes=2)
    average = meanflow.train(net, images, labels, args)
    brightness = meanflow.draw(average, 20).mean((1, 2, 3))
    black, white = brightness[::2], brightness[1::2]
    assert black.max() < -0.6 and white.min() > 0.6, brightness


def test_the_average_is_short_at_first_and_as_long_as_asked_for_later(
    training, tmp_path, monkeypatch
):
    seen, update = [], meanflow.update

    def recorded(loss, model, *rest):
        norm = update(loss, model, *rest)
        seen.append([parameter.detach().clone() for parameter in model.parameters()])
        return norm

    monkeypatch.setattr(meanflow, "update", recorded)
    assert training("--steps", 4, "--ema", 0.2)[0] == 0
    expected, *later = seen  # after the first step
    for decay, weights in zip((1 / 10, 2 / 11, 0.2), later, strict=True):
        pairs = zip(expected, weights, strict=True)
        expected = [decay * a + (1 - decay) * b for a, b in pairs]
    average = meanflow.load_model(tmp_path / "run" / "checkpoint.pt")
    assert not average.training
    for parameter, value in zip(average.parameters(), expected, strict=True):
        assert_close(parameter.detach(), value)


def test_flow_matching_comes_first_and_lambda_waits(training, tmp_path):
    flags = "--steps 8 --flow-first 0.5 --lambda-schedule linear --lambda-warmup 0.25"
    assert training(*flags.split(), "--log-every", 1)[0] == 0
    rows = log(tmp_path / "run")
    assert [float(row["lambda"]) for row in rows] == [0] * 5 + [0.5, 1, 1]
    assert [row["err_jump"] == "nan" for row in rows] == [True] * 4 + [False] * 4
    assert training(*flags.split(), "--log-every", 3, out="coarse")[0] == 0
    coarse = log(tmp_path / "coarse")  # its row of steps 4 to 6 has the mean of steps 5 and 6
    mean = sum(float(rows[i]["err_jump"]) for i in (4, 5)) / 2
    assert [row["step"] for row in coarse] == ["1", "3", "6", "8"]
    assert float(coarse[2]["err_jump"]) == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize(
    "flags, tangent, shares",
    [
        ("", "conditional", [0, 0.5]),
        ("--lambda-schedule linear --jump-share 0.25", "marginal", [0, 0.25]),
        ("--lambda-schedule linear --tangent conditional", "conditional", [0, 0.5]),
        ("--lambda-schedule constant --lambda-max 0", "conditional", [0, 0.5]),
        ("--tangent marginal --flow-first 0", "marginal", [0.5, 0.5]),
    ],
)
def test_settings_reach_the_step(training, monkeypatch, flags, tangent, shares):
    seen, forward = [], Objective.forward

    def recorded(self, x0, lam, y, *, reference, jump_share):
        of_self = self.tangent, self.guidance, self.times
        seen.append((*of_self, jump_share, len(x0), len(reference[0])))
        return forward(self, x0, lam, y, reference=reference, jump_share=jump_share)

    monkeypatch.setattr(Objective, "forward", recorded)
    others = "--t-logit 0.1 1.1 --r-logit -1 2 --batch-size 8 --class-cond --guidance 1.5"
    all_flags = f"--steps 2 --flow-first 0.5 {others} {flags}"
    assert training(*all_flags.split())[0] == 0
    times = {"t_logit": [0.1, 1.1], "r_logit": [-1.0, 2.0]}
    assert seen == [(tangent, 1.5, times, share, 8, 5) for share in shares]


def test_the_time_left_counts_that_flow_matching_is_cheaper(capsys):
    """By the README, a step with half of the samples jumping costs about 1.5 times as much."""
    args = meanflow.train_parser("", steps=100, flow_first=0.5).parse_args([])
    row = dict.fromkeys(meanflow.COLUMNS, 0.0)
    for step, pace, left in (10, 2.0, "3:50"), (50, 2.0, "2:30"), (60, 3.0, "2:00"):
        meanflow.report(row | {"step": step}, args, 50, pace)
        assert capsys.readouterr().out.endswith(f"  {left} left\n")


def test_the_sampler_draws_from_the_checkpoint(training, call, tmp_path):
    assert training("--steps", 6, "--class-cond", "--ema", 0, "--lr", 0.1)[0] == 0
    checkpoint, drawn = tmp_path / "run" / "checkpoint.pt", {}
    for name, flags in ("a", ()), ("b", ()), ("c", ("--seed", 1)), ("d", ("--steps", 2)), (
        "e", ("--label", 2)):  # fmt: skip
        out = tmp_path / f"{name}.png"
        status, said, error = call(meanflow.main, checkpoint, "--num", 20, *flags, "--out", out)
        assert (status, error) == (0, "") and str(out) in said
        drawn[name] = Image.open(out).tobytes()
    assert Image.open(tmp_path / "a.png").size == (10 * 10 + 2, 2 * 10 + 2)
    assert drawn["a"] == drawn["b"] and len(set(drawn.values())) == 4
    net, x1 = meanflow.load_model(checkpoint), meanflow.draw(UNet(1, size=8), 20)
    # x1 is the noise, as the last layer of a new UNet is zero
    assert torch.equal(meanflow.draw(net, 20, label=2), sample(net, x1, y=torch.full((20,), 2)))
    many = tmp_path / "samples-v1.0"
    assert call(meanflow.main, checkpoint, "--num", 3, "--out", many)[0] == 0
    assert sorted(file.name for file in many.iterdir()) == [f"{i:06}.png" for i in range(3)]
    assert Image.open(many / "000002.png").size == (8, 8)
    assert "holds files" in one_line(call(meanflow.main, checkpoint, "--num", 2, "--out", many))
    jpeg = call(meanflow.main, checkpoint, "--out", tmp_path / "x.jpg")
    assert "x.jpg must end in .png" in one_line(jpeg) and not (tmp_path / "x.jpg").exists()
    assert "3 classes" in one_line(call(meanflow.main, checkpoint, "--label", 3))
    net = UNet(1, size=8)
    torch.save({"unet": net.config, "ema": net.state_dict()}, checkpoint)
    assert "0 classes" in one_line(call(meanflow.main, checkpoint, "--label", 0))


def test_many_images_are_drawn_from_one_noise_and_the_classes_in_turn():
    net = small_unet(classes=3).float()
    x1 = torch.randn(502, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    last = sample(net.eval(), x1[499:], y=torch.tensor([1, 2, 0]))
    assert_close(meanflow.draw(net, 502, seed=5)[499:], last)


@pytest.mark.parametrize("channels", [2, 4])
def test_channels_that_are_no_colours_are_drawn_side_by_side(tmp_path, channels):
    image = torch.full((channels, 5, 3), -1.0)
    image[-1] = 1
    meanflow.save_images(image, tmp_path / "image.png")
    pixels = pil_to_tensor(Image.open(tmp_path / "image.png"))[0]
    assert (pixels[:, :-3] == 0).all() and (pixels[:, -3:] == 255).all()
    assert pixels.shape[1] == 3 * channels


def test_meanflow_py_works_alone_and_can_be_cut_where_training_begins(tmp_path):
    shutil.copy(ROOT / "meanflow.py", tmp_path)
    command = sys.executable, "meanflow.py", ROOT / "assets" / "mnist.pt", "--num", "10"
    env = {name: value for name, value in COMMAND.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=300)
    assert result.returncode == 0 and not result.stderr
    assert Image.open(tmp_path / "samples.png").size == (302, 32)
    names = {"__name__": "cut"}
    exec((tmp_path / "meanflow.py").read_text().split("# Training. ")[0], names)
    x, net = torch.randn(4, 1, 8, 8), names["UNet"](1, size=8, width=8)
    loss, _ = names["Objective"](net)(x, lam=0.5)
    assert loss > 0 and names["sample"](net, x).shape == x.shape and "argparse" not in names


def test_the_digits_that_come_along_are_in_their_place():
    """Of real digits, the mean image of their class is the nearest of the ten in four of five."""
    images, labels = train_mnist.digits()
    assert images.shape == (10_000, 1, 28, 28) and labels.bincount().tolist() == [1000] * 10
    images = images.float().flatten(1)
    means = torch.stack([images[labels == digit].mean(0) for digit in range(10)])
    assert (torch.cdist(images, means).argmin(1) == labels).float().mean() > 0.8
    edges = images.view(-1, 28, 28)[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (edges == 0).all()  # no image is cut: all corners are black


@pytest.mark.parametrize("script", [train_mnist, train_cifar])
def test_the_scripts_train_and_draw(script, call, tmp_path, monkeypatch):
    name, size = ("MNIST", 28) if script is train_mnist else ("CIFAR10", 32)
    pixels, labels = torch.randint(0, 256, (100, size, size, 3)).byte(), torch.arange(100) % 10

    class Dataset:  # of torchvision
        def __init__(self, folder, **options):
            assert folder == "there"
            grey = name == "MNIST"
            self.data = pixels[..., 0] if grey else pixels.numpy()
            self.targets = labels if grey else labels.tolist()

    given, train = {}, script.train
    record = lambda *args: given.update(enumerate(args)) or train(*args)
    monkeypatch.setattr(script, name, Dataset)
    monkeypatch.setattr(script, "train", record)
    flags = "--steps 2 --batch-size 8 --device cpu --reference 0 --data there --class-cond"
    flags += " --preset tiny" if script is train_cifar else ""
    assert call(script.main, *flags.split(), "--out", tmp_path / "run")[0] == 0
    channels = given[0].shape[0]
    assert torch.equal(given[1], pixels.permute(0, 3, 1, 2)[:, :channels])
    assert torch.equal(given[2], labels) and given[3].flip == (script is train_cifar)
    width = 10 * (size + 2) + 2
    assert Image.open(tmp_path / "run" / "samples.png").size == (width, 12 * (size + 2) + 2)


def test_batches_are_mirrored_and_lose_labels_as_asked():
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    images[..., 0], labels = 255, torch.tensor([2, 2])
    x0, y = meanflow.draw_batch(images, labels, 5000, flip=True, guidance=2.0)
    assert x0.min() == -1 and x0.max() == 1 and set(y.tolist()) == {-1, 2}
    left, right = x0[..., 0] == 1, x0[..., -1] == 1
    assert torch.equal(left, ~right) and abs(left[:, 0, 0].double().mean() - 0.5) < 0.04
    assert abs((y == -1).double().mean() - 0.1) < 0.02
    x0, y = meanflow.draw_batch(images, labels, 100, flip=False)
    assert (x0[..., 0] == 1).all() and (y == 2).all()
    assert meanflow.draw_batch(images, None, 3, flip=False)[1] is None


def test_muon_takes_the_inner_kernels_and_adam_the_rest():
    """Adam's first step is lr everywhere; Muon's largest singular value gives it that size, too."""
    net = small_unet(size=8).float().to(memory_format=torch.channels_last)
    muon = meanflow.Muon(net)
    adam = torch.optim.Adam(net.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    loss = 1e4 * Objective(net)(torch.randn(8, 1, 8, 8), 0.0)[0]
    grads = torch.autograd.grad(loss, net.parameters(), retain_graph=True)
    norm = meanflow.update(loss, net, adam, muon, scaler, lr=0.01)
    assert_close(norm, torch.stack([g.norm() for g in grads]).norm())  # as it was, but
    used = [state["exp_avg"] / (1 - 0.9) for state in adam.state.values()]
    assert torch.stack([g.norm() for g in used]).norm() < 20 < norm / 100  # it is clipped
    grads = dict(zip(before, grads, strict=True))
    inner = {name for name, p in net.named_parameters() if any(p is k for k in muon.kernels)}
    assert "levels.down.0.conv1.weight" in inner and not inner & {"first.weight", "last.weight"}
    for name, parameter in net.named_parameters():
        if name not in inner:
            step = parameter - before[name]
            assert_close(step.abs().max(), torch.tensor(0.01), rtol=0.01, atol=0)
            assert (step * grads[name]).sum() < 0
            continue
        step = (parameter - (1 - 0.1 * 0.025) * before[name]).detach().flatten(1)
        lengths = torch.linalg.svdvals(step) / (0.2 * 0.025 * max(step.shape) ** 0.5)
        assert 0.6 < lengths.max() < 1.3, (name, lengths)
        left, _, right = torch.linalg.svd(grads[name].flatten(1), full_matrices=False)
        likeness = F.cosine_similarity(step.flatten(), -(left @ right).flatten(), dim=0)
        assert likeness > 0.5, (name, likeness)  # Muon leaves small singular values small


# Training that can be trusted: precision, processes, resuming, faults ---------------------------


class FixedTimes(Objective):
    """An Objective that two processes can share: its samples bring their noise and times."""

    def forward(self, given, lam):
        x_t, v, r, t = given
        along = marginal_velocity(self.model, x_t, t) if self.tangent == "marginal" else v
        return meanflow_loss(self.model, x_t, v, r, t, lam, direction=along)


CASES = [*itertools.product((0.0, 1.0), TANGENTS)]


def joined_gradient(rank, world, lam, tangent):
    """The gradient of a fixed batch, of which this rank sees its part, through DDP if world > 1."""
    torch.manual_seed(0)
    net, (given, _) = small_unet(), batch(n=8, shape=(1, 8, 8), jumps=8)
    objective = FixedTimes(net, tangent=tangent)
    if world > 1:
        objective = nn.parallel.DistributedDataParallel(objective)
    objective([z[rank::world] for z in given], lam)[0].backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def worker(folder):
    """One of the processes that torchrun starts: two trainings, then the gradients of CASES."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    images, nets = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8), []
    nn.Module.compile = functools.partialmethod(nn.Module.compile, backend="eager")
    settings = {"flow_first": 0.5, "reference": 5, "log_every": 1, "batch_size": 8}

    def run(out, steps=2, **more):
        torch.manual_seed(rank)  # the processes need not start alike
        args = meanflow.train_parser("", steps=steps, out=out, **settings, **more).parse_args([])
        net = UNet(1, size=4, width=8, multipliers=(1,), attention=0)
        meanflow.train(net, images, None, args)
        return net.state_dict()

    nets = [run(folder / "eager"), run(folder / "compiled", compile=True)]
    grads = [joined_gradient(rank, world, *case) for case in CASES]
    torch.save((grads, nets), folder / f"{rank}.pt")
    apart = [folder / "eager", folder / "nowhere"][rank]
    with pytest.raises(meanflow.UserError, match=r"\[2, 0\].*--out"):
        run(apart, resume=True)


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
    assert_close({**checkpoint_of(tmp_path / "eager")["model"]}, {**eager}, rtol=0, atol=0)


def test_every_step_and_every_process_draws_its_own_batch(training, monkeypatch):
    seen, draw_batch = [], meanflow.draw_batch

    def recorded(*args):
        assert args[3]  # --flip
        seen.append((*draw_batch(*args), torch.randn(3)))
        return seen[-1][:2]

    monkeypatch.setattr(meanflow, "draw_batch", recorded)
    monkeypatch.setattr(meanflow, "distributed", lambda objective, device, start: objective)
    for rank, port in (0, "1"), (1, "1"), (1, "1"), (0, ""):  # the last one is no torchrun
        launched = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for name, value in launched.items():
            monkeypatch.setenv(name, str(value))
        flags = "--steps", 2, "--batch-size", 8, "--reference", 0, "--flip"
        assert training(*flags, out=f"{rank}{len(seen)}")[0] == 0
    assert [len(x0) for x0, *_ in seen] == [4] * 6 + [8] * 2
    for part in 0, 2:
        for (i, one), (j, other) in itertools.combinations(enumerate(seen[:6]), 2):
            assert torch.equal(one[part], other[part]) == ((i, j) in {(2, 4), (3, 5)})


STEPS = "--steps 14 --log-every 1 --save-every 5 --lambda-schedule linear --class-cond"


def test_a_killed_training_resumes_to_the_same_bits_log_and_pictures(training, tmp_path):
    assert training(*STEPS.split(), out="whole")[0] == 0
    flags = [*STEPS.split(), "--out", str(tmp_path / "run")]
    command = sys.executable, "-c", f"import test_meanflow; test_meanflow.small({flags})"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=COMMAND) as process:
        for line in process.stdout:
            if line.startswith(("8/14", "9/14")):
                process.kill()
    assert process.returncode == -9
    assert checkpoint_of(tmp_path / "run")["row"]["step"] == 5
    assert training(*STEPS.split(), "--resume")[0] == 0
    assert same(tmp_path / "run", tmp_path / "whole")
    assert without_speed(log(tmp_path / "run")) == without_speed(log(tmp_path / "whole"))
    for picture in (tmp_path / "whole").glob("*.png"):
        assert picture.read_bytes() == (tmp_path / "run" / picture.name).read_bytes()


def test_ctrl_c_ends_at_once_and_the_last_checkpoint_counts(training, tmp_path, monkeypatch):
    def interrupt(x0):
        raise KeyboardInterrupt

    at_step(7, monkeypatch, interrupt)
    status, _, error = training(*STEPS.split())
    assert (status, error) == (130, "") and checkpoint_of(tmp_path / "run")["row"]["step"] == 5


@pytest.mark.parametrize("module, name", [(meanflow, "draw_batch"), (torch, "save")])
def test_a_first_step_that_fails_leaves_nothing_in_the_way(training, monkeypatch, module, name):
    def fail(*args):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(module, name, fail)
        training("--steps", 2)
    assert training("--steps", 2)[0] == 0


def test_a_folder_serves_one_training(training, tmp_path):
    assert training("--steps", 2)[0] == 0
    before = {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    assert "--resume" in one_line(training("--steps", 2))
    changes = {"steps": 3, "guidance": 1.5, "flow-first": 0.5, "seed": 1, "batch-size": 8}
    changes |= {"lambda-schedule": "linear", "ema": 0.9, "amp": "bf16"}
    for name, value in changes.items():
        flags = "--steps", 2, "--class-cond" if name == "guidance" else "--resume"
        error = one_line(training(*flags, f"--{name}", value, "--resume"))
        name = "classes" if name == "guidance" else name.replace("-", "_")
        assert f"{name} was" in error or "guidance was" in error
    with filelock.FileLock(tmp_path / "run" / ".lock"):
        assert str(tmp_path / "run") in one_line(training("--steps", 2, "--resume"))
    assert before == {file: file.read_bytes() for file in before}
    may = "--resume --lr 0.1 --log-every 3 --save-every 7 --device cpu --no-compile"
    assert training("--steps", 2, *may.split())[0] == 0  # after the end it changes nothing
    after = tmp_path / "run" / "checkpoint.pt"
    assert after.read_bytes() == before[after]
    after.unlink()
    assert "log.csv" in one_line(training("--steps", 2, "--resume"))
    assert before[tmp_path / "run" / "log.csv"] == (tmp_path / "run" / "log.csv").read_bytes()


@pytest.mark.parametrize("was, now", [("adam", "muon"), ("muon", "adam")])
def test_the_optimizer_stays_that_of_the_checkpoint(training, was, now):
    assert training("--steps", 2, "--optimizer", was)[0] == 0
    error = one_line(training("--steps", 2, "--optimizer", now, "--resume"))
    assert f"optimizer was {was}, not {now}" in error


def test_log_and_pictures_that_cannot_be_written_are_said_and_end_nothing(training, tmp_path):
    (tmp_path / "run" / "log.csv").mkdir(parents=True)
    (tmp_path / "run" / "samples.png").mkdir()
    assert "log.csv exists" in one_line(training("--steps", 2))
    shutil.rmtree(tmp_path / "run" / "log.csv")
    (tmp_path / "run" / "log.csv").symlink_to(tmp_path / "nowhere" / "log.csv")
    status, out, error = training("--steps", 2)
    assert (status, error) == (0, "") and out.count("cannot write") == 3
    assert checkpoint_of(tmp_path / "run")["row"]["step"] == 2


def test_an_isolated_nan_skips_that_update(training, tmp_path, monkeypatch):
    at_step([2, 4, 5, 6], monkeypatch, lambda x0: x0.fill_(math.nan))
    flags = "--steps", 9, "--log-every", 3, "--save-every", 3, "--amp", "bf16"
    assert training(*flags)[0] == 0
    rows = log(tmp_path / "run")
    assert [int(row["skipped"]) for row in rows] == [0, 1, 3, 0]
    finite = [math.isfinite(float(row["err_flow"])) for row in rows]
    assert finite == [True, True, False, True]  # means over the other steps
    assert all(value.isfinite().all() for value in weights(tmp_path / "run"))
    checkpoint = checkpoint_of(tmp_path / "run")
    assert {int(parameter["step"]) for parameter in checkpoint["adam"]["state"].values()} == {5}
    momenta = [kernel["momentum_buffer"] for kernel in checkpoint["muon"]["state"].values()]
    net = UNet(**checkpoint["unet"]).to(memory_format=torch.channels_last)
    assert len(momenta) == len(meanflow.Muon(net).kernels)
    assert all(momentum.isfinite().all() for momentum in momenta)


def test_lasting_nans_end_training_and_a_lower_rate_goes_on(training, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(range(4, 99), patch, lambda x0: x0.fill_(math.nan))
        error = one_line(training("--steps", 60, "--log-every", 7))
    assert "in 21 steps to 28: a lower --lr?" in error
    assert all(value.isfinite().all() for value in weights(tmp_path / "run"))
    assert training("--steps", 60, "--lr", 1e-4, "--resume")[0] == 0


def test_a_full_disk_leaves_the_last_checkpoint(training, tmp_path):
    resource = pytest.importorskip("resource")
    assert training("--steps", 2)[0] == 0
    names = "checkpoint.pt", "step-000002.png"
    before = [(tmp_path / "run" / name).read_bytes() for name in names]
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, usual[1]))  # bytes in a file
    try:
        with pytest.raises(meanflow.UserError, match=r"checkpoint\.pt: File too large"):
            meanflow.save(checkpoint, tmp_path / "run" / "checkpoint.pt")
        with pytest.raises(OSError):
            meanflow.save_images(torch.rand(1, 300, 300), tmp_path / "run" / "step-000002.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert before == [(tmp_path / "run" / name).read_bytes() for name in names]
    assert {file.name for file in (tmp_path / "run").glob(".*")} == {".lock"}


# On a GPU, if there is one ------------------------------------------------------------------------

gpu = pytest.mark.skipif(DEVICES == ["cpu"], reason="needs a GPU")


@gpu
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("tangent", TANGENTS)
def test_a_step_compiled_for_a_gpu_has_the_eager_gradient(tangent, amp):
    net = small_unet(attention=2).float().cuda()
    given = [z.float().cuda() for z in batch(shape=(1, 8, 8), jumps=12)[0]]
    objective = FixedTimes(net, tangent=tangent)
    torch.compiler.reset()
    compiled = torch.compile(objective, fullgraph=True, dynamic=False)
    for lam in 0.0, torch.tensor(0.7).cuda():
        grads = []
        for module in objective, compiled:
            with torch.autocast("cuda", torch.bfloat16, enabled=amp):
                loss, _ = module(given, lam)
            grads.append(gradients(loss, net))
        assert torch.cosine_similarity(*grads, dim=0) > (0.98 if amp else 0.9999)


@gpu
@pytest.mark.parametrize("flags", ["", "--amp fp16 --no-compile", "--amp off --no-compile"])
def test_a_training_on_a_gpu_resumes_to_the_same_bits(training, tmp_path, monkeypatch, flags):
    flags = *STEPS.split(), *flags.split(), "--device", "cuda"
    assert training(*flags, out="whole")[0] == 0
    with monkeypatch.context() as patch:
        at_step(7, patch, lambda x0: os.kill(os.getpid(), 2))
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
    "foreign": lambda file: torch.save({"state_dict": {}}, file),
    "weights only": lambda file: shutil.copy(ROOT / "assets" / "mnist.pt", file),
    "a list": lambda file: torch.save([1, 2], file),
}


def test_what_is_no_checkpoint_is_named_and_kept(training, call, tmp_path):
    assert training("--steps", 1)[0] == 0
    for damage in NO_CHECKPOINTS:
        run = tmp_path / damage
        shutil.copytree(tmp_path / "run", run)
        NO_CHECKPOINTS[damage](run / "checkpoint.pt")
        before = {file: file.read_bytes() for file in run.iterdir()}
        if damage != "weights only":
            drawn = call(meanflow.main, run / "checkpoint.pt", "--out", tmp_path / "new.png")
            assert "checkpoint.pt" in one_line(drawn) and not (tmp_path / "new.png").exists()
        resumed = training("--steps", 1, "--resume", out=damage)
        assert ("log.csv" if damage == "missing" else "checkpoint.pt") in one_line(resumed)
        assert before == {file: file.read_bytes() for file in run.iterdir()}


def test_a_picture_is_there_before_its_checkpoint(training, tmp_path, monkeypatch):
    """Which a kill between the two must not leave behind without it."""
    monkeypatch.setattr(meanflow, "save", lambda content, file: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training("--steps", 1)
    assert (tmp_path / "run" / "step-000001.png").exists()


def test_an_edited_network_is_no_damaged_file(training, tmp_path, monkeypatch):
    assert training("--steps", 1)[0] == 0
    init = UNet.__init__

    def edited(self, *args, **options):
        init(self, *args, **options)
        self.more = nn.Linear(1, 1)

    monkeypatch.setattr(UNet, "__init__", edited)
    with pytest.raises(RuntimeError, match=r"more\.weight"):
        meanflow.load_model(tmp_path / "run" / "checkpoint.pt")


def test_a_network_that_its_checkpoint_could_not_build_is_refused_at_once(tmp_path):
    images, args = torch.zeros(4, 1, 8, 8).byte(), ["--out", str(tmp_path / "run")]
    net = UNet(1, size=8, width=8)
    nn.utils.parametrizations.weight_norm(net.first)
    with pytest.raises(RuntimeError, match=r"first\.parametrizations"):
        meanflow.train(net, images, None, meanflow.train_parser("").parse_args(args))
    numpy = pytest.importorskip("numpy")
    net = UNet(1, size=numpy.int64(8), width=8, multipliers=numpy.array([1, 2]))
    odd = {"batch_size": numpy.int64(4), "lr": numpy.float32(1e-3), "flip": numpy.bool_(True)}
    args = meanflow.train_parser("", **odd, optimizer=numpy.str_("muon"))
    args = args.parse_args(["--steps", "1", "--out", str(tmp_path / "run")])
    meanflow.train(net, images, None, args)
    assert meanflow.load_model(tmp_path / "run" / "checkpoint.pt").shape == (1, 8, 8)


@pytest.mark.parametrize(
    "flags",
    """--steps 0; --steps 1.5; --steps 99999999999999999999; --lr 0; --lr nan; --ema 1
    --lambda-max 1.1; --guidance -1; --reference -1; --lambda-schedule sine; --jump-share nan
    --seed 4294967296; --device gpu; --lambda-shedule linear; --lambda linear
    --t-logit nan 1; --r-logit 0; --flow-first 1.1; --guidance 2; --out ''; --data there
    --jump-share 0.1 --batch-size 4""".replace("\n", ";").split(";"),
)
def test_a_wrong_flag_ends_with_one_line_and_nothing_written(training, tmp_path, flags):
    flags = flags.replace("''", " ").split(" ") if "''" in flags else flags.split()
    name = flags[0] or flags[1]
    assert name.strip("-") in one_line(training(*filter(None, flags))).replace("_", "-")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "recipe",
    [{"jump_shar": 0.9}, {"lr": -1}, {"steps": 1.5}, {"optimizer": ["muon"]}, {"flip": [True]}],
)
def test_a_wrong_recipe_is_refused_like_a_flag(recipe):
    with pytest.raises(meanflow.UserError, match=next(iter(recipe))):
        meanflow.train_parser("", **recipe)
    for pair in 0.5, (0.0,), (1, 2, 3):
        with pytest.raises((TypeError, ValueError)):
            meanflow.train_parser("", t_logit=pair)


def test_only_mistakes_of_the_user_lose_their_traceback(call):
    def main(argv):
        import nowhere  # noqa: F401

    with pytest.raises(ImportError):
        call(main)


@pytest.mark.parametrize("main", [train_mnist.main, train_cifar.main, meanflow.main])
def test_help_needs_no_unicode(main, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert out.isascii() and "--steps" in out


def test_data_that_are_not_there_are_named_and_nothing_is_written(call, tmp_path, monkeypatch):
    for name in "http_proxy", "https_proxy":
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    place = "--data", tmp_path / "data", "--out", tmp_path / "run"
    assert str(tmp_path / "data") in one_line(call(train_mnist.main, *place, "--steps", 1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (torch.zeros(4, 1, 8, 8), torch.arange(3), r"images must be uint8 \(N, 1, 8, 8\).*float32"),
        (torch.zeros(4, 3, 8, 8).byte(), torch.arange(3), r"images must be uint8.*\(4, 3, 8, 8\)"),
        (torch.zeros(3, 1, 8, 8).byte(), None, "need each other"),
        (torch.zeros(3, 1, 8, 8).byte(), torch.zeros(4).long(), "labels must be 3 int64"),
        (torch.zeros(4, 1, 8, 8).byte(), torch.arange(4), "from 0 to 2"),
        (torch.zeros(2, 1, 8, 8).byte(), torch.tensor([0, -1]), "from 0 to 2"),
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


def test_the_loop_of_the_readme_runs():
    names = {"steps": 8, "batch": lambda n: (torch.randn(n, 1, 28, 28), torch.arange(n) % 10)}
    exec(readme_block("average.update"), names)
    assert names["images"].shape == (64, 1, 28, 28) and names["share"] == 0.5


def test_the_check_of_the_readme_tells_a_right_derivative_from_a_wrong_one():
    class Wave(nn.Module):
        def forward(self, x, r, t):
            return x.sin() * (t if right else t.detach())[:, None]

    for right in True, False:
        names = {"model": Wave(), "x0": torch.randn(4, 3)}
        exec(readme_block("central"), names)
        assert (names["difference"] < 1e-3) == right


def test_a_rule_of_the_users_is_used(monkeypatch):
    calls = []

    def rule(x, dx, beta=1, threshold=20):
        calls.append(x)
        return torch.sigmoid(beta * x) * dx

    monkeypatch.setitem(meanflow.RULES, F.softplus, rule)
    (x, v, r, t), _ = batch(n=5, jumps=5)
    for layer in F.softplus, nn.Softplus(beta=3):
        u = lambda x, r, t, layer=layer: layer(x)
        _, dudt = total_derivative(u, x, r, t, v)
        assert_close(dudt, difference(u, x, r, t, v), rtol=1e-6, atol=1e-6)
    assert len(calls) == 2


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_activation_checkpointing_of_the_readme_gives_the_same_gradients(lam):
    exec(readme_block("def checkpointed"), names := {})
    part, runs = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double(), []

    def counted(x, c):
        runs.append(x)
        return part(x + c)

    plain = lambda x, r, t: part(part(x) + t[:, None])
    saving = lambda x, r, t: names["checkpointed"](counted, part(x), expand(t, x).expand_as(x))
    given, _ = batch()
    grads = [gradients(meanflow_loss(u, *given, lam, jumps=6)[0], part) for u in (plain, saving)]
    assert_close(*grads)
    assert len(runs) == 4  # r < t and r = t, each again in the backward pass


def test_the_weights_that_come_along_draw_digits():
    """Of real digits, the mean image of their class is the nearest of the ten in four of five."""
    net, y = meanflow.load_model(ROOT / "assets" / "mnist.pt"), torch.arange(200) % 10
    images = torch.cat([meanflow.draw(net, 100, steps=steps) for steps in (1, 8)]).clamp(-1, 1)
    assert 0.05 < (images > 0).float().mean() < 0.3  # ink; 0.5 in noise, 0.13 in real digits
    own = torch.stack([images[:100][y[:100] == digit].mean(0) for digit in range(10)])
    nearest = torch.cdist(images[100:].flatten(1), own.flatten(1)).argmin(1)
    assert (nearest == y[100:]).float().mean() > 0.6  # each label has a look of its own
    real, labels = train_mnist.digits()
    means = torch.stack([real[labels == digit].float().mean(0) for digit in range(10)]) / 127.5 - 1
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
