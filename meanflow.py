"""Modular MeanFlow in one file: learn average velocities, generate in one step.

Unofficial reference implementation of
    You, Liu, He: Modular MeanFlow, 2025, https://arxiv.org/abs/2508.17426
which builds on
    Geng, Deng, Bai, Kolter, He: Mean Flows for One-step Generative Modeling, 2025,
    https://arxiv.org/abs/2505.13447

Conventions, the same in the code, the docstrings and the README
    x0, x1     data in [-1, 1] and noise ~ N(0, I), of any shape (B, ...)
    r <= t     times in [0, 1], of shape (B,); t = 0 is data, t = 1 is noise
    x_t        (1 - t) x0 + t x1, the path
    v          x1 - x0, the velocity along it
    u(x, r, t) the average velocity from r to t, what the network learns: x_r = x_t - (t - r) u
    dudt       du/dt along the path, one Jacobian-vector product along (v, 0, 1)
    lam        λ in [0, 1], the share of the gradient that passes through dudt

Use
    model = UNet(channels=1, size=28)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for x0 in batches:                                     # (B, 1, 28, 28)
        loss, err = meanflow_loss(model, x0, lam=0.0)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    images = sample(model, torch.randn(64, 1, 28, 28))     # one network evaluation
"""

import argparse
import math
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class UserError(ValueError):
    """A mistake of the caller's or the user's; scripts show it in one line."""


def _require(condition, message):
    if not condition:
        raise UserError(message)


def _require_like(name, value, like):
    wanted, got = ((tuple(z.shape), z.dtype) if torch.is_tensor(z) else z for z in (like, value))
    _require(got == wanted, f"{name} must be a tensor of {wanted}, got {got}")


def _like(t, x):
    return t.view(-1, *[1] * (x.ndim - 1))  # (B,) -> (B, 1, ...)


def _u(model, x, r, t, y):
    u = model(x, r, t) if y is None else model(x, r, t, y)
    _require(u.shape == x.shape, f"model must return {tuple(x.shape)}, returned {tuple(u.shape)}")
    return u


# The path from data to noise, and pairs of times on it -------------------------------------------


def path(x0, x1, t):
    """Return x_t = (1 - t) x0 + t x1 and its velocity v = x1 - x0, both shaped like x0 (B, ...).

    The Modular MeanFlow paper divides by t - r in its loss: there x0 and x1 are the states at r
    and t. For the ends of the whole path, as here, dx_t/dt is x1 - x0 itself.
    """
    t = _like(t, x0)
    return (1 - t) * x0 + t * x1, x1 - x0


def sample_times(n, *, jump_share=0.25, t_logit=(-0.4, 1.0), r_logit=None, device=None, dtype=None):
    """Draw n pairs of times 0 <= r <= t <= 1 and return (r, t), both (n,).

    n           number of pairs, at least 1
    jump_share  the first round(jump_share * n) pairs have r < t, the others r = t; in [0, 1]
    t_logit     mean and standard deviation of logit(t), which is normally distributed
    r_logit     the same for r, which is then clipped to t; None: two draws from t_logit, sorted
    Raises ValueError for values outside these ranges.
    """
    _require(isinstance(n, int) and n >= 1, f"n must be a positive integer, got {n!r}")
    _require(0 <= jump_share <= 1, f"jump_share must be in [0, 1], got {jump_share!r}")
    draws = []
    for name, (mean, std) in ("t_logit", t_logit), ("r_logit", r_logit or t_logit):
        _require(std >= 0, f"{name} must have a standard deviation >= 0, got {std!r}")
        draws.append(torch.sigmoid(mean + std * torch.randn(n, device=device, dtype=dtype)))
    t = torch.maximum(*draws) if r_logit is None else draws[0]
    r = torch.minimum(*draws)
    jumps = round(jump_share * n)
    return torch.cat((r[:jumps], t[jumps:])), t


# Gradient modulation SG_λ and the curriculum of λ ------------------------------------------------


def sg_lambda(z, lam):
    """Return SG_λ[z] = λ z + (1 - λ) stopgrad(z): the value of z, λ times its gradient.

    z    tensor of any shape
    lam  λ in [0, 1], a float or a 0-dim tensor; the float 0 frees the graph behind z
    """
    if not torch.is_tensor(lam) and lam == 0:
        return z.detach()
    return z.detach() + lam * (z - z.detach())  # the same, and exact in value


_CURVES = {
    "constant": lambda s: 1.0,
    "linear": lambda s: s,
    "cosine": lambda s: (1 - math.cos(math.pi * s)) / 2,
    "falling": lambda s: 1 - s,
}
LAMBDA_SCHEDULES = tuple(_CURVES)


def lambda_schedule(name, *, warmup, maximum=1.0):
    """Return the curriculum step -> λ: `maximum` throughout, or on its way until `warmup`.

    name     one of LAMBDA_SCHEDULES; "linear" is the paper's λ = min(1, step / warmup), "cosine"
             rises, too, and "falling" goes from `maximum` to 0
    warmup   number of steps, at least 0; with 0 every schedule stays at its end
    maximum  the largest λ, in [0, 1]
    Raises ValueError for anything else.
    """
    _require(name in _CURVES, f"name must be one of {', '.join(_CURVES)}, got {name!r}")
    _require(warmup >= 0, f"warmup must be at least 0, got {warmup!r}")
    _require(0 <= maximum <= 1, f"maximum must be in [0, 1], got {maximum!r}")
    return lambda step: maximum * _CURVES[name](min(1.0, step / warmup) if warmup else 1.0)


# The MeanFlow identity v = u + (t - r) du/dt as a loss -------------------------------------------

_tangents_have_gradients = True
TANGENTS = ("conditional", "marginal")


def total_derivative(model, x_t, r, t, v, y=None, *, gradients=True):
    """Return u(x_t, r, t) and du/dt = ∂u/∂x · v + ∂u/∂t, both shaped like x_t (B, ...).

    One forward-mode pass along (v, 0, 1), so dropout masks are shared by value and derivative.
    gradients=False tells layers with a derivative of their own, see `Conv2d`, not to keep a graph.
    """
    global _tangents_have_gradients
    directions = v, torch.zeros_like(r), torch.ones_like(t)
    _tangents_have_gradients = gradients
    try:
        return torch.func.jvp(lambda x, r, t: _u(model, x, r, t, y), (x_t, r, t), directions)
    finally:
        _tangents_have_gradients = True


def meanflow_loss(
    model, x0, lam, y=None, *, x1=None, r=None, t=None, tangent="conditional", guidance=1.0,
    p=0.75, c=1e-3,
):  # fmt: skip
    """Return the loss E[w ||e||²], e = u + (t - r) SG_λ[du/dt] - v, w = stopgrad(||e||² + c)^-p.

    model    callable (x, r, t) or, where labels are given, (x, r, t, y) -> u, shaped like x
    x0, y    data (B, ...), whose dtype and device all else shares, and labels (B, ...) or None
    lam      λ in [0, 1], float or 0-dim tensor: 0 is MeanFlow's loss, 1 differentiates all of e
    x1       noise, shaped like x0; if not given, drawn from N(0, I)
    r, t     times (B,), 0 <= r <= t <= 1; if not given, drawn by `sample_times`
    tangent  direction of du/dt: "conditional", the paper's v, or "marginal", u(x_t, t, t), which
             leaves the true u a minimum for every λ, at one more forward pass where r < t
    guidance ω, for labels only: where y >= 0, ω v + (1 - ω) u(x_t, t, t) stands for v, at one more
             forward pass without labels; 1 is none. Needs some y < 0, "no label", to learn from
    p, c     power >= 0 and offset > 0 of the adaptive weight; p = 0 is the plain squared error
    Returns the scalar loss and, for a log, the detached mean of e² in each sample, (B,).
    Raises ValueError that names the argument.
    """
    _require(torch.is_tensor(x0) and x0.is_floating_point(), f"x0 must be a float tensor: {x0!r}")
    _require(x0.ndim > 1 and len(x0), f"x0 must be (B, ...), got shape {tuple(x0.shape)}")
    _require(y is None or len(y) == len(x0), f"y must have a label for each of x0, got {y!r}")
    number = isinstance(lam, int | float) or (torch.is_tensor(lam) and lam.ndim == 0)
    _require(number and 0 <= lam <= 1, f"lam must be a number in [0, 1], got {lam!r}")
    _require(tangent in TANGENTS, f"tangent must be one of {', '.join(TANGENTS)}, got {tangent!r}")
    _require(guidance == 1 or y is not None, f"guidance needs labels y, got {guidance!r} and none")
    _require(p >= 0 and c > 0, f"p must be >= 0 and c > 0, got p={p!r}, c={c!r}")
    _require((r is None) == (t is None), "r and t must be given together")
    if x1 is None:
        x1 = torch.randn_like(x0)
    if t is None:
        r, t = sample_times(len(x0), device=x0.device, dtype=x0.dtype)
    _require_like("x1", x1, x0)
    _require_like("r", r, x0.flatten(1)[:, 0])
    _require_like("t", t, x0.flatten(1)[:, 0])
    _require(((r >= 0) & (r <= t) & (t <= 1)).all(), f"need 0 <= r <= t <= 1, got r={r}, t={t}")

    jump, stay = (r < t).nonzero().flatten(), (r == t).nonzero().flatten()
    return _loss(model, x0, x1, r, t, y, lam, jump, stay, tangent, guidance, p, c)


def _loss(model, x0, x1, r, t, y, lam, jump, stay, tangent, guidance, p, c):
    """`meanflow_loss` with samples `jump` at r < t, `stay` at r = t: indices or slices."""
    x_t, v = path(x0, x1, t)
    if guidance != 1:
        with torch.no_grad():
            unlabelled = _u(model, x_t, t, t, None).to(v.dtype)
        v = torch.where(_like(y >= 0, v), guidance * v + (1 - guidance) * unlabelled, v)
    e = -v
    if len(x_t[jump]):
        args = x_t[jump], r[jump], t[jump], v[jump], None if y is None else y[jump]
        e[jump] += _implied_velocity(model, *args, lam, tangent)
    if len(x_t[stay]):  # t - r = 0: du/dt does not matter
        e[stay] += _u(model, x_t[stay], r[stay], t[stay], None if y is None else y[stay])
    square = e.flatten(1).square().sum(1)  # ||e||², (B,)
    weight = (square.detach() + c) ** -p
    return (weight * square).mean(), square.detach() / e[0].numel()


def _implied_velocity(model, x_t, r, t, v, y, lam, tangent):
    """Return u + (t - r) SG_λ[du/dt], by the identity the velocity that the network's u implies."""
    if tangent == "marginal":
        with torch.no_grad():
            v = _u(model, x_t, t, t, y).to(x_t.dtype)
    keep = torch.is_tensor(lam) or lam > 0
    u, dudt = total_derivative(model, x_t, r, t, v, y, gradients=keep)
    return u + _like(t - r, u) * sg_lambda(dudt, lam)


# Sampling, in one step or in several -------------------------------------------------------------


@torch.no_grad()
def sample(model, x1, *, steps=1, y=None):
    """Return x0 (B, ...), generated from the noise x1 by jumps x_r = x_t - (t - r) u(x_t, r, t).

    model  as in `meanflow_loss`; evaluated in eval mode, its own mode is restored
    x1     noise (B, ...) ~ N(0, I); device and dtype of all that follows
    steps  number of jumps and network evaluations, at least 1, on an even grid from t = 1 to 0
    y      labels (B, ...) for a model that takes them
    Raises ValueError that names the argument.
    """
    _require(torch.is_tensor(x1) and x1.ndim > 1, f"x1 must be a tensor (B, ...), got {x1!r}")
    _require(isinstance(steps, int) and steps >= 1, f"steps must be at least 1, got {steps!r}")
    x, grid = x1, torch.linspace(1, 0, steps + 1, device=x1.device, dtype=x1.dtype)
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    try:
        for module in training:
            module.training = False
        for t, r in pairwise(grid):
            x = x - (t - r) * _u(model, x, r.expand(len(x)), t.expand(len(x)), y)
    finally:
        for module in training:
            module.training = True
    return x


# A U-Net for u(x, r, t), every layer of which has a forward-mode derivative ----------------------


def _zero(layer):
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _dual(y, dx, slope):
    """y, with the derivative slope(dx) if x has one; for λ = 0 no graph of it is kept."""
    if dx is None:
        return y
    with torch.set_grad_enabled(torch.is_grad_enabled() and _tangents_have_gradients):
        dy = slope(dx)
    return forward_ad.make_dual(y, dy)


def _scaled(x, factor):
    """x * factor; `jvp` by itself would also multiply x by the factor's derivative, zero."""
    x, dx = forward_ad.unpack_dual(x)
    return _dual(x * factor, dx, lambda dx: dx * factor)


class Conv2d(nn.Conv2d):
    """Convolution with a derivative of its own, dy = W * dx: `jvp` by itself would also convolve
    with the derivative of W, which is zero."""

    def forward(self, x):
        x, dx = forward_ad.unpack_dual(x)
        return _dual(super().forward(x), dx, lambda dx: self._conv_forward(dx, self.weight, None))


class GroupNorm(nn.GroupNorm):
    """Group norm over 8 channels, in the precision of its weights, with a derivative of its own.

    y = w n + b,  n = (x - mean) / std,  dy = w (dx - mean(dx) - n mean(n dx)) / std; the Jacobian
    of n is symmetric, so where the derivative needs no gradient it is the kernel of the backward.
    """

    def __init__(self, channels):
        super().__init__(channels // 8, channels)

    def forward(self, x):
        x, dx = forward_ad.unpack_dual(x.to(self.weight.dtype))
        shape = len(x), x.shape[1], x[0, 0].numel(), self.num_groups
        y, mean, rstd = torch.native_group_norm(x, self.weight, self.bias, *shape, self.eps)

        def slope(dx):
            if torch.is_grad_enabled():
                dn = self._written_out(x, dx)
            else:
                kernel, wanted = torch.ops.aten.native_group_norm_backward, [True, False, False]
                dn = kernel(dx, x, mean, rstd, None, *shape, wanted)[0]
            return dn * self.weight[:, None, None]

        return _dual(y, dx, slope)

    def _written_out(self, *x_dx):
        x, dx = (z.unflatten(1, (self.num_groups, -1)) for z in x_dx)
        average = lambda z: z.mean((2, 3, 4), keepdim=True)
        x = x - average(x)
        rstd = (average(x * x) + self.eps).rsqrt()
        n = x * rstd
        return ((dx - average(dx) - n * average(n * dx)) * rstd).flatten(1, 2)


class Embedding(nn.Module):
    """Embed the times t and t - r and the label into features (B, features, 1, 1).

    The frequencies stay low, since du/dt grows with them: 1/8 to 2 radians over t in [0, 1].
    """

    def __init__(self, features, classes):
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(-3, 2), persistent=False)
        self.label = nn.Embedding(classes + 1, features)  # the last row is "no label"
        self.time = Conv2d(4 * len(self.frequencies), features, 1)
        self.mix = Conv2d(features, features, 1)

    def forward(self, r, t, y):
        angles = _scaled(torch.stack((t, t - r), 1)[..., None], self.frequencies)  # (B, 2, F)
        times = torch.cat((angles.cos(), angles.sin()), 1).flatten(1)
        label = self.label(torch.where(y < 0, self.label.num_embeddings - 1, y))
        times, label = self.time(times[:, :, None, None]), label[:, :, None, None]
        return F.silu(self.mix(F.silu(times + label)))


class Block(nn.Module):
    """Residual block: norm, SiLU, convolution, twice, the second norm scaled and shifted by the
    embedding; then, if asked for, self-attention over all pixels."""

    def __init__(self, inputs, outputs, features, dropout, attend):
        super().__init__()
        self.norm1 = GroupNorm(inputs)
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1)
        self.modulate = Conv2d(features, 2 * outputs, 1)
        nn.init.ones_(self.modulate.bias[:outputs])
        self.norm2 = GroupNorm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zero(Conv2d(outputs, outputs, 3, padding=1))
        self.skip = Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = Attention(outputs) if attend else nn.Identity()

    def forward(self, x, embedding):
        scale, shift = self.modulate(embedding).chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(torch.addcmul(shift, self.norm2(h), scale))))
        return self.attention(self.skip(x) + h)


class Attention(nn.Module):
    """Self-attention over the pixels, one head. The softmax is written out because
    `scaled_dot_product_attention` has no forward-mode derivative."""

    def __init__(self, channels):
        super().__init__()
        self.norm = GroupNorm(channels)
        self.qkv = Conv2d(channels, 3 * channels, 1)
        self.out = _zero(Conv2d(channels, channels, 1))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, 1)  # (B, C, H W)
        attention = torch.bmm(_scaled(q.mT, q.shape[1] ** -0.5), k).softmax(-1)  # (B, H W, H W)
        return x + self.out(torch.bmm(v, attention.mT).view_as(x))


class Level(nn.Module):
    """One resolution of the U-Net: blocks, the lower resolutions, blocks with skip connections."""

    def __init__(self, widths, blocks, attention, features, dropout):
        super().__init__()
        (width, *lower), attend = widths, len(widths) <= attention
        block = lambda inputs: Block(inputs, width, features, dropout, attend)
        self.down = nn.ModuleList(block(width) for _ in range(blocks))
        self.up = nn.ModuleList(block(2 * width) for _ in range(blocks))
        if lower:
            self.shrink = nn.Sequential(nn.PixelUnshuffle(2), Conv2d(4 * width, lower[0], 1))
            self.inner = Level(lower, blocks, attention, features, dropout)
            self.grow = nn.Sequential(Conv2d(lower[0], 4 * width, 1), nn.PixelShuffle(2))
        else:
            self.shrink, self.inner, self.grow = nn.Identity(), block(width), nn.Identity()

    def forward(self, h, embedding):
        skips = []
        for block in self.down:
            h = block(h, embedding)
            skips.append(h)
        h = self.grow(self.inner(self.shrink(h), embedding))
        for block in self.up:
            h = block(torch.cat((h, skips.pop()), 1), embedding)
        return h


class UNet(nn.Module):
    """U-Net for u(x, r, t) or u(x, r, t, y) on square images.

    channels     channels of the images
    size         height and width of the images, a multiple of patch * 2 ** (levels - 1)
    width        channels of the network, times `multipliers` at each level; multiples of 8
    multipliers  one for each level; a level has half the resolution of the one before
    blocks       residual blocks of each level on the way down, and on the way up; one in the middle
    attention    number of levels with self-attention, counted from the lowest
    patch        side of the square of pixels that becomes one pixel of the first level
    classes      number of labels, 0 for none; a missing or negative y is "no label"
    dropout      probability in [0, 1)
    Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self, channels, *, size, width=32, multipliers=(1, 2), blocks=1, attention=1, patch=1,
        classes=0, dropout=0.0,
    ):  # fmt: skip
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config = config  # what a checkpoint needs to build the network again
        self.shape, self.patch, self.classes = (channels, size, size), patch, classes
        widths, unit = [width * m for m in multipliers], patch * 2 ** (len(multipliers) - 1)
        _require(size % unit == 0, f"size must be a multiple of {unit}, got {size!r}")
        _require(not any(w % 8 for w in widths), f"widths must be multiples of 8, got {widths}")
        self.embedding = Embedding(4 * width, classes)
        self.first = Conv2d(channels * patch**2, widths[0], 3, padding=1)
        self.levels = Level(widths, blocks, attention, 4 * width, dropout)
        self.norm = GroupNorm(widths[0])
        self.last = _zero(Conv2d(widths[0], channels * patch**2, 3, padding=1))

    def forward(self, x, r, t, y=None):
        """Return u shaped like x (B, channels, size, size); r, t: (B,); y: (B,) below classes."""
        _require(x.shape[1:] == self.shape, f"x must be (B, *{self.shape}), got {tuple(x.shape)}")
        if y is None:
            y = torch.full_like(r, -1, dtype=torch.long)
        h = self.first(F.pixel_unshuffle(x, self.patch))
        h = self.levels(h, self.embedding(r, t, y))
        return F.pixel_shuffle(self.last(F.silu(self.norm(h))), self.patch)


# Training on images; who has a training loop cuts the file off here ------------------------------

DefaultsShown = argparse.ArgumentDefaultsHelpFormatter
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
CUDA = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
DEVICES = ["cuda", *CUDA, "cpu"] if CUDA else ["cpu"]
FORMAT = "meanflow 3"  # of checkpoints
LABEL_DROPOUT = 0.1  # share of labels that guidance takes away
PATIENCE = 20  # steps in a row without a finite gradient
UNREADABLE = OSError, EOFError, RuntimeError, ValueError, AssertionError, pickle.UnpicklingError
RESUMABLE = {"data", "out", "device", "resume", "compile", "tensorboard"}  # settings that may
RESUMABLE |= {"log_every", "sample_every", "checkpoint_every"}  # change when training goes on


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def run(main):
    """Call main() for a script: what the user can mend ends it with one line and status 2."""
    warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)  # torch's own affair
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it
    try:
        main()
    except (UserError, OSError) as error:
        _Parser().error(error)
    except KeyboardInterrupt:
        sys.exit(130)


def _number(kind, low, high=math.inf):
    """Return the argparse type of finite numbers from low to high, both included."""

    def number(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, got {text}")
        return value

    return number


COUNT, STEPS, POSITIVE = _number(int, 1), _number(int, 0), _number(float, 1e-12)
SHARE, DECAY = _number(float, 0, 1), _number(float, 0, 1 - 1e-9)


def train_parser(description, **defaults):
    """Return the command line of a training script, which may set defaults of its own."""
    parser = _Parser(description=description, formatter_class=DefaultsShown)
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    normal = {"type": float, "nargs": 2, "metavar": ("MEAN", "STD")}
    flag("--data", default="data", help="folder of the data set, downloaded there if absent")
    flag("--out", default="runs", help="folder for checkpoint.pt, log.csv and pictures")
    flag("--steps", type=COUNT, default=100_000, help="training steps")
    flag("--batch-size", type=COUNT, default=64, help="images per step, over all processes")
    flag("--lr", type=POSITIVE, default=1e-3, help="peak learning rate of Adam")
    flag("--lr-warmup", type=STEPS, help="steps in which it rises; without it a 50th of all")
    flag("--lr-decay", action=switch, default=False, help="let it fall to 0 along a cosine")
    flag("--beta2", type=DECAY, default=0.999, help="decay of Adam's second moment")
    flag("--clip", type=POSITIVE, default=20.0, help="largest norm of the gradient")
    flag("--ema", type=DECAY, default=0.999, help="decay of the averaged weights, per step")
    flag("--lambda-schedule", choices=LAMBDA_SCHEDULES, help="curriculum of λ; without it λ = 0")
    flag("--lambda-max", type=SHARE, default=1.0, help="largest λ of the curriculum")
    flag("--lambda-warmup", type=STEPS, help="steps in which λ changes; without it half of all")
    flag("--tangent", choices=TANGENTS, default="conditional", help="direction of du/dt")
    flag("--jump-share", type=SHARE, default=0.25, help="share of samples with r < t")
    flag("--t-logit", **normal, default=[-0.4, 1.0], help="normal distribution of logit(t)")
    flag("--r-logit", **normal, help="of logit(r), clipped to t; without it sorted draws of t")
    flag("--p", type=_number(float, 0), default=0.75, help="power of the weight's base")
    flag("--c", type=POSITIVE, default=1e-3, help="offset of the weight (||e||² + c)^-p")
    flag("--class-cond", action=switch, default=False, help="condition on the labels")
    flag("--guidance", type=_number(float, 0), default=1.0, help="ω, away from no label; 1 is off")
    flag("--seed", type=STEPS, default=0, help="seed of all random numbers")
    flag("--device", choices=DEVICES, default=DEVICES[0], help="device to train on")
    flag("--amp", choices=PRECISIONS, help="network's precision; without it float32 on a CPU")
    flag("--compile", action=switch, help="compile the loss, by default on a GPU only")
    flag("--resume", action="store_true", help="go on from the checkpoint in --out, if any")
    flag("--tensorboard", action="store_true", help="write TensorBoard's files as well")
    flag("--log-every", type=COUNT, default=20, help="steps per row of log.csv and progress line")
    flag("--sample-every", type=COUNT, default=500, help="steps between pictures of samples")
    flag("--checkpoint-every", type=COUNT, default=500, help="steps between checkpoints")
    parser.set_defaults(**defaults)
    return parser


def load_dataset(dataset, data):
    """Return torchvision's training set `dataset` in the folder `data`, downloaded if not there.

    It arrives whole or not at all. Raises ValueError where there is neither data nor network.
    """
    try:
        return dataset(data)
    except UNREADABLE:  # or not there
        folder = Path(data).absolute()
    parent = next(parent for parent in folder.parents if parent.exists())
    with tempfile.TemporaryDirectory(prefix=".download-", dir=parent) as temporary:
        try:
            dataset(temporary, download=True)
        except UNREADABLE as error:
            what = f"no complete {dataset.__name__} in {folder} and no download"
            raise UserError(f"{what}: copy it there or name its folder with --data") from error
        shutil.copytree(temporary, folder, copy_function=os.replace, dirs_exist_ok=True)
    return dataset(data)


@contextmanager
def _replacing(file):
    """Yield a temporary name, which replaces `file` when all has gone well."""
    temporary = Path(file).with_name(f".{Path(file).name}")
    try:
        yield temporary
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"cannot write {file}: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def draw(model, num, *, steps=1, seed=0):
    """Return `num` images (num, C, H, W) of a UNet from fixed noise, its labels taken in turn."""
    x1 = torch.randn(num, *model.shape, generator=torch.Generator().manual_seed(seed))
    x1 = x1.to(next(model.parameters()).device)
    y = torch.arange(num, device=x1.device) % model.classes if model.classes else None
    batches = ((x1[i : i + 500], None if y is None else y[i : i + 500]) for i in range(0, num, 500))
    return torch.cat([sample(model, x, steps=steps, y=labels) for x, labels in batches])


def save_images(images, file, *, columns=10):
    """Write images (B, C, H, W) in [-1, 1] into one PNG, `columns` in a row."""
    from torchvision.utils import save_image

    with _replacing(file) as temporary:
        save_image(images, temporary, nrow=columns, normalize=True, value_range=(-1, 1))


def load_checkpoint(file):
    """Return the dict that `train` saved. Raises ValueError for a missing or another file."""
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or "damaged, or another kind of file"
        raise UserError(f"cannot read a checkpoint from {file}: {reason}") from error
    known = isinstance(checkpoint, dict) and checkpoint.get("format") == FORMAT
    _require(known, f"{file} is not a checkpoint of this version of meanflow.py")
    return checkpoint


def load_model(file):
    """Return the UNet with the averaged weights that `train` saved."""
    checkpoint = load_checkpoint(file)
    model = UNet(**checkpoint["unet"])
    model.load_state_dict(checkpoint["ema"])
    return model


def train(model, images, labels, args, *, flip=False):
    """Train the UNet `model`; write checkpoint.pt, log.csv and pictures into args.out.

    images  uint8 (N, C, H, W)
    labels  int64 (N,), or None for an unconditional model
    args    settings, from `train_parser`
    flip    mirror each image with probability 1/2
    Under torchrun each process takes its part of the batch. Returns the model with the averaged
    weights. Raises ValueError for what the user can mend, and SystemExit after a SIGINT or SIGTERM,
    once the checkpoint is written.
    """
    args = argparse.Namespace(**vars(args))
    with _processes(args) as (rank, world), _signals() as caught:
        lam = _settle(args, model, images, labels, world)
        checkpoint = Path(args.out, "checkpoint.pt")
        run = _Run(model, args, world)
        if args.resume and checkpoint.exists():
            run.resume(checkpoint)
        log = _Log(run, rank)
        images, labels = images.to(args.device), None if labels is None else labels.to(args.device)
        n = args.batch_size // world
        while run.step < args.steps:
            torch.manual_seed(hash((args.seed, run.step, rank)))  # leaves no state to resume
            i = torch.randint(len(images), (n,), device=args.device)
            x0, y = images[i].float() / 127.5 - 1, None if labels is None else labels[i]
            if flip:
                x0 = torch.where(torch.rand_like(x0[:, :1, :1, :1]) < 0.5, x0.flip(3), x0)
            now = lam(run.step)
            run.update(x0, now, y)

            intervals = args.log_every, args.sample_every, args.checkpoint_every
            logs, draws, saves = (run.step % n == 0 or run.step == args.steps for n in intervals)
            stop = _agree(caught, world, logs, args.device)
            if logs or saves or stop:
                log.write(now)
            if draws:
                log.draw(f"step-{run.step:06}.png")
            if (saves or stop) and rank == 0:
                run.save(checkpoint)
            if stop:
                print(f"\nstopped after step {run.step}; the same command with --resume goes on")
                raise SystemExit(128 + stop)
        log.draw("samples.png", 40, steps=(1, 2, 4))
        return run.average.module


def _settle(args, model, images, labels, world):
    """Fill in settings that depend on others, refuse what cannot be, return the schedule of λ."""
    for name, default in ("lr_warmup", args.steps // 50), ("lambda_warmup", args.steps // 2):
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        setattr(args, name, default if value is None else value)
        _require((value or 0) <= args.steps, f"{flag} {value} is beyond --steps {args.steps}")
    for flag, pair in ("--t-logit", args.t_logit), ("--r-logit", args.r_logit):
        _require(not pair or pair[1] >= 0, f"{flag} {pair}: the standard deviation is below 0")
    cpu, size = args.device == "cpu", args.batch_size
    if args.amp is None:
        bf16 = not cpu and torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp = "off" if cpu else "bf16" if bf16 else "fp16"
    args.compile = not cpu if args.compile is None else args.compile
    _require(args.amp != "fp16" or not cpu, "--amp fp16 needs a GPU; --amp bf16 does not")
    _require(size % world == 0, f"--batch-size {size} does not divide by {world} processes")
    _require(not args.tensorboard or find_spec("tensorboard"), "--tensorboard: it is not installed")
    fit = images.dtype == torch.uint8 and images.shape[1:] == model.shape
    _require(fit, f"images must be uint8 (N, *{model.shape}), got {tuple(images.shape)}")
    _require(args.guidance == 1 or labels is not None, "--guidance needs labels: --class-cond")
    if labels is not None:
        low, high = int(labels.min()), int(labels.max())
        fit = low >= 0 and high < model.classes
        _require(fit, f"labels go from {low} to {high}, the model has {model.classes} classes")
    old = any(Path(args.out, name).exists() for name in ("checkpoint.pt", "log.csv"))
    _require(args.resume or not old, f"{args.out} holds a run: --resume it, or name another --out")
    maximum = args.lambda_max if args.lambda_schedule else 0.0
    schedule = args.lambda_schedule or "constant"
    return lambda_schedule(schedule, warmup=args.lambda_warmup, maximum=maximum)


@contextmanager
def _processes(args):
    """Join the processes that torchrun started, if it did; yield the rank and their number."""
    if "LOCAL_RANK" not in os.environ:
        yield 0, 1
        return
    cuda = args.device.startswith("cuda")
    if cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    if joined := not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        if joined:
            dist.destroy_process_group()


@contextmanager
def _signals():
    """Yield a list that the numbers of SIGINT and SIGTERM are appended to when they come."""
    caught, note = [], lambda number, frame: caught.append(number)
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _agree(caught, world, due, device):
    """Return the signal that came, or 0; several processes must agree, and do so when due."""
    stop = torch.tensor(max(caught, default=0))
    if world > 1 and due:
        dist.all_reduce(stop := stop.to(device), dist.ReduceOp.MAX)
    return int(stop) if world == 1 or due else 0


class Objective(nn.Module):
    """`meanflow_loss` on times of its own, as a module that never waits for the device.

    DistributedDataParallel and compile wrap it as a whole, with the JVP on the inside.
    """

    def __init__(self, model, *, jump_share, t_logit, r_logit, tangent, guidance, p, c):
        super().__init__()
        self.model, self.options, self.jump_share = model, (tangent, guidance, p, c), jump_share
        self.label_dropout = LABEL_DROPOUT if guidance != 1 else 0.0
        self.times = {"jump_share": jump_share, "t_logit": t_logit, "r_logit": r_logit}

    def forward(self, x0, lam, y=None):
        r, t = sample_times(len(x0), **self.times, device=x0.device, dtype=x0.dtype)
        jumps = round(self.jump_share * len(x0))
        parts = slice(jumps), slice(jumps, None)
        if self.label_dropout:
            y = torch.where(torch.rand_like(t) < self.label_dropout, -1, y)
        return _loss(self.model, x0, torch.randn_like(x0), r, t, y, lam, *parts, *self.options)


class _Run:
    """A training under way: what a checkpoint holds, an update of it, and its log."""

    def __init__(self, model, args, world):
        self.model, self.args, self.world = model.to(args.device).train(), args, world
        self.step, self.seconds, self.recent, self.lost = 0, 0.0, [], 0
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
        self.optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, args.beta2), fused=True)
        self.scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.amp == "fp16")
        self.parts = {"model": model, "ema": self.average.module}
        self.parts |= {"optimizer": self.optimizer, "scaler": self.scaler}
        names = "jump_share", "t_logit", "r_logit", "tangent", "guidance", "p", "c"
        self.objective = Objective(model, **{name: getattr(args, name) for name in names})
        if args.compile:
            self.objective.compile(dynamic=False)
        if world > 1:
            self.objective = nn.parallel.DistributedDataParallel(self.objective)

    def update(self, x0, lam, y):
        """Take a step, without effect if its gradient is not finite."""
        args = self.args
        if args.compile and lam > 0:
            lam = torch.full((), lam, device=x0.device)  # a number would be compiled in
        with torch.autocast(x0.device.type, PRECISIONS[args.amp], enabled=args.amp != "off"):
            loss, err = self.objective(x0, lam, y)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), args.clip)
        self.optimizer.found_inf = (~norm.isfinite()).float()  # then fused Adam changes nothing
        decay = (1 + math.cos(math.pi * self.step / args.steps)) / 2 if args.lr_decay else 1.0
        rise = min(1.0, (self.step + 1) / max(1, args.lr_warmup))
        self.optimizer.param_groups[0]["lr"] = args.lr * rise * decay
        self.optimizer.step()
        self.scaler.update()
        self.average.update_parameters(self.model)
        self.step += 1
        jumps = round(args.jump_share * len(x0))  # the samples with r < t, which come first
        means = loss.detach(), err[jumps:].mean(), err[:jumps].mean(), norm
        self.recent.append(torch.stack(means))  # on the device, which is not waited for

    def save(self, file):
        finite = all(p.isfinite().all() for p in self.model.parameters())
        _require(finite, f"weights are not finite after step {self.step}; {file} is an earlier one")
        about = {"format": FORMAT, "unet": self.model.config, "args": vars(self.args)}
        about |= {"step": self.step, "seconds": self.seconds}
        with _replacing(file) as temporary:
            torch.save(about | {k: part.state_dict() for k, part in self.parts.items()}, temporary)

    def resume(self, file):
        checkpoint = load_checkpoint(file)
        was = checkpoint["args"] | checkpoint["unet"]
        now = vars(self.args) | self.model.config
        for name in sorted(was.keys() - RESUMABLE - (set() if self.args.lr_decay else {"steps"})):
            flag = name.replace("_", "-")
            message = f"{flag} was {was[name]} in {file}, now it is {now.get(name)}"
            _require(was[name] == now.get(name), message)
        try:
            for name, part in self.parts.items():
                part.load_state_dict(checkpoint[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{file} is damaged: {str(error).splitlines()[0]}") from error
        self.step, self.seconds = checkpoint["step"], checkpoint["seconds"]
        self.average.n_averaged.fill_(self.step)  # at 0 the first update would copy the weights


class _Log:
    """log.csv, the progress line and, if asked for, TensorBoard; only the first process writes."""

    COLUMNS = ("step", "loss", "err_flow", "err_jump", "lambda", "grad_norm", "skipped",
               "images_per_second", "seconds")  # fmt: skip

    def __init__(self, run, rank):
        args, self.file, self.board = run.args, Path(run.args.out) / "log.csv", None
        self.run, self.writes, self.mark = run, rank == 0, time.perf_counter()
        if not self.writes:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        rows = self.file.read_text().splitlines(keepends=True)[1:] if self.file.exists() else []
        rows = [row for row in rows if row[-1] == "\n" and int(row.split(",")[0]) <= run.step]
        with _replacing(self.file) as temporary:
            temporary.write_text(",".join(self.COLUMNS) + "\n" + "".join(rows))
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(args.out, purge_step=run.step + 1)

    def write(self, lam):
        """Write means over the steps since the last row; raise ValueError if all goes wrong."""
        run, args, steps = self.run, self.run.args, torch.stack(self.run.recent)
        good = steps[:, 3].isfinite()
        means = steps[good].mean(0)
        if run.world > 1:
            dist.all_reduce(means)
        for finite in good.tolist():
            run.lost = 0 if finite else run.lost + 1
        loss, flow, jump, norm = (means / run.world).tolist()
        now = time.perf_counter()
        pace, self.mark, run.recent = (now - self.mark) / len(steps), now, []
        run.seconds += pace * len(steps)
        speed, left = args.batch_size / pace, round((args.steps - run.step) * pace)
        row = run.step, loss, flow, jump, lam, norm, int((~good).sum()), speed, run.seconds
        if self.writes:
            with open(self.file, "a") as file:
                print(*(f"{value:.8g}" for value in row), sep=",", file=file)
            line = f"{run.step}/{args.steps}  err {flow:.4f} (r = t) {jump:.4f} (r < t)  "
            line += f"λ {lam:.2f}  {speed:.0f} images/s  {left // 60}:{left % 60:02} left "
            print(line, end="\r" if sys.stdout.isatty() and left else "\n", flush=True)
        for name, value in zip(self.COLUMNS, row, strict=True) if self.board else ():
            self.board.add_scalar(name, value, run.step)
        lost = f"no finite gradient in {run.lost} steps up to step {run.step}"
        _require(run.lost < PATIENCE, f"{lost}; the checkpoint in {args.out} is good")

    def draw(self, name, num=80, steps=(1,)):
        """Write a picture of `num` samples in each number of steps."""
        if not self.writes:
            return
        model, seed = self.run.average.module, self.run.args.seed
        images = torch.cat([draw(model, num, steps=n, seed=seed) for n in steps])
        save_images(images, self.file.with_name(name))
        if self.board:
            self.board.add_images("samples", images.clamp(-1, 1) / 2 + 0.5, self.run.step)


def main():
    """Draw samples from a checkpoint, into one PNG or into a folder with one for each."""
    parser = _Parser(description=main.__doc__, formatter_class=DefaultsShown)
    parser.add_argument("checkpoint", help="file that training wrote")
    parser.add_argument("--steps", type=COUNT, default=1, help="network evaluations per image")
    parser.add_argument("--num", type=COUNT, default=80, help="number of images")
    parser.add_argument("--out", default="samples.png", help="a .png for a grid, or a folder")
    parser.add_argument("--seed", type=STEPS, default=0, help="seed of the noise")
    parser.add_argument("--device", choices=DEVICES, default=DEVICES[0], help="device to draw on")
    args = parser.parse_args()
    model, out = load_model(args.checkpoint).to(args.device), Path(args.out)
    images, grid = draw(model, args.num, steps=args.steps, seed=args.seed), out.suffix == ".png"
    (out.parent if grid else out).mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate([images] if grid else images):
        save_images(picture, out if grid else out / f"{i:06}.png")


if __name__ == "__main__":
    run(main)
