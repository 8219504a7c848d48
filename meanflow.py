"""Modular MeanFlow in one file: learn average velocities, generate in one step.

Unofficial reference implementation of
    You, Liu, He: Modular MeanFlow, 2025, https://arxiv.org/abs/2508.17426
which builds on
    Geng, Deng, Bai, Kolter, He: Mean Flows, 2025, https://arxiv.org/abs/2505.13447

Conventions, the same in the code, the docstrings and the README
    x0, x1     data in [-1, 1] and noise ~ N(0, I), of any shape (B, ...)
    r <= t     times in [0, 1], of shape (B,); t = 0 is data, t = 1 is noise
    x_t        (1 - t) x0 + t x1, the path
    v          x1 - x0, the velocity along it
    u(x, r, t) the average velocity from r to t, what the network learns: x_r = x_t - (t - r) u
    dudt       du/dt along the path, one Jacobian-vector product along (v, 0, 1)
    lam        λ in [0, 1], the share of dudt's own gradient that is kept

Use
    model = UNet(channels=1, size=28)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for x0 in batches:                                     # (B, 1, 28, 28)
        loss, err = meanflow_loss(model, x0, lam=0.0)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    images = sample(model, torch.randn(64, 1, 28, 28))     # one network evaluation
"""

import math
from contextlib import nullcontext
from itertools import pairwise
from numbers import Integral, Real

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

# The path from data to noise, and pairs of times on it -------------------------------------------


def expand(t, x):
    """Return t (B,) as (B, 1, ...), so that it multiplies the samples of x (B, ...)."""
    return t.view(-1, *[1] * (x.ndim - 1))


def path(x0, x1, t):
    """Return x_t = (1 - t) x0 + t x1 and its velocity v = x1 - x0, both shaped like x0 (B, ...).

    The Modular MeanFlow paper divides by t - r in its loss, which is right if x0 and x1 are the
    states at r and t. For the ends of the whole path, as here, dx_t/dt is x1 - x0 itself.
    """
    t = expand(t, x0)
    return (1 - t) * x0 + t * x1, x1 - x0


def sample_times(n, *, jump_share=0.25, t_logit=(-0.4, 1.0), r_logit=None, device=None, dtype=None):
    """Draw n pairs of times 0 <= r <= t <= 1 and return (r, t), both (n,).

    n           number of pairs, at least 1
    jump_share  share of pairs with r < t, in [0, 1]; they come first, the others have r = t
    t_logit     mean and standard deviation of the normal draws of logit(t)
    r_logit     the same for r, then clipped to t; None: r and t are two draws of t_logit, sorted
    Raises ValueError for values outside these ranges.
    """
    jumps = number_of_jumps(n, jump_share)
    draws = []
    for name, logit in ("t_logit", t_logit), ("r_logit", t_logit if r_logit is None else r_logit):
        pair = isinstance(logit, (tuple, list)) and len(logit) == 2
        if not (pair and all(map(math.isfinite, logit)) and logit[1] >= 0):
            raise ValueError(f"{name} must be a mean and a deviation >= 0, got {logit!r}")
        mean, std = logit
        draws.append(torch.sigmoid(mean + std * torch.randn(n, device=device, dtype=dtype)))
    t = torch.maximum(*draws) if r_logit is None else draws[0]
    r = torch.minimum(*draws)
    return torch.cat((r[:jumps], t[jumps:])), t


def number_of_jumps(n, jump_share):
    """Return how many of n samples have r < t: round(jump_share * n), but where n is too small to
    hold both kinds, the number is drawn, so that the share is right on average."""
    if not (isinstance(n, Integral) and n >= 1):
        raise ValueError(f"n must be a positive integer, got {n!r}")
    if not 0 <= jump_share <= 1:
        raise ValueError(f"jump_share must be in [0, 1], got {jump_share!r}")
    jumps = round(jump_share * n)
    if jumps in (0, n) and 0 < jump_share < 1:
        jumps = int(jump_share * n + torch.rand(()))  # on the CPU, which waits for no device
    return jumps


# Gradient modulation SG_λ and the curriculum of λ ------------------------------------------------


def sg_lambda(z, lam):
    """Return SG_λ[z] = λ z + (1 - λ) stopgrad(z): the value of z, λ times its gradient.

    z    tensor of any shape
    lam  λ in [0, 1], a number or a 0-dim tensor; the number 0 frees the graph behind z
    """
    if not torch.is_tensor(lam):
        if lam == 0:
            return z.detach()
        lam = float(lam)  # NumPy's numbers would take the multiplication over
    return z.detach() + lam * (z - z.detach())  # the same, and exact in value


CURVES = {  # of the share s of the warm-up that is over
    "constant": lambda s: 1.0,
    "linear": lambda s: s,
    "cosine": lambda s: (1 - math.cos(math.pi * s)) / 2,
    "falling": lambda s: 1 - s,
}
LAMBDA_SCHEDULES = tuple(CURVES)


def lambda_schedule(name, *, warmup, maximum=1.0):
    """Return the curriculum step -> λ, which changes until step `warmup` and is constant then.

    name     one of LAMBDA_SCHEDULES: "constant" is `maximum` throughout, "linear" the paper's
             min(1, step / warmup) times it, "cosine" rises, too, "falling" goes from it to 0
    warmup   number of steps, at least 0; with 0 every schedule stays at its end
    maximum  the largest λ, in [0, 1]
    Raises ValueError for anything else.
    """
    if name not in CURVES:
        raise ValueError(f"name must be one of {', '.join(CURVES)}, got {name!r}")
    if not warmup >= 0:
        raise ValueError(f"warmup must be at least 0, got {warmup!r}")
    if not 0 <= maximum <= 1:
        raise ValueError(f"maximum must be in [0, 1], got {maximum!r}")
    return lambda step: maximum * CURVES[name](min(1.0, step / warmup) if warmup else 1.0)


# The MeanFlow identity v = u + (t - r) du/dt as a loss -------------------------------------------


def total_derivative(model, x_t, r, t, v, y=None, *, gradients=True):
    """Return u(x_t, r, t) and du/dt = ∂u/∂x · v + ∂u/∂t, both shaped like x_t (B, ...).

    One forward-mode pass along (v, 0, 1), so dropout masks are shared by value and derivative.
    gradients=False returns du/dt as a constant, for which the rules below keep no graph.
    """
    directions = v, torch.zeros_like(r), torch.ones_like(t)
    net = lambda x, r, t: evaluate(model, x, r, t, y)
    # attention in plain mathematics, since its fused kernels have no forward mode
    with sdpa_kernel(SDPBackend.MATH), DerivativeRules(gradients):
        u, dudt = torch.func.jvp(net, (x_t, r, t), directions)
    return u, dudt if gradients else dudt.detach()


def meanflow_loss(
    model, x0, lam, y=None, *, x1=None, r=None, t=None, jump_share=0.25, t_logit=(-0.4, 1.0),
    r_logit=None, tangent="conditional", guidance=1.0, p=0.75, c=1e-3,
):  # fmt: skip
    """Return the loss E[w ||e||²], e = u + (t - r) SG_λ[du/dt] - v, w = stopgrad(||e||² + c)^-p.

    model     callable (x, r, t) or, where labels are given, (x, r, t, y) -> u, shaped like x; it
              must treat samples one by one, which batch norm in training mode does not
    x0, y     data (B, ...), its dtype and device those of x1, r and t, and labels (B, ...) or None
    lam       λ in [0, 1], number or 0-dim tensor: 0 is MeanFlow's loss, 1 differentiates all of e
    x1        noise, shaped like x0; if not given, drawn from N(0, I)
    r, t      times (B,), 0 <= r <= t <= 1; if not given, drawn by `sample_times` with jump_share,
              t_logit and r_logit: r < t for the first samples of the batch, so shuffle it
    tangent   direction of du/dt: "conditional", the paper's v; "marginal", u(x_t, t, t), with
              which, for p = 0, the true u is stationary for every λ, at one more forward pass
              where r < t (in which dropout draws a mask of its own)
    guidance  ω of `guided_velocity`, for labels (B,); 1 is none
    p, c      power >= 0 and offset > 0 of the adaptive weight; p = 0 is the plain squared error,
              others move its minimum from the mean towards the mode
    Returns the scalar loss and, for a log, the detached mean of e² in each sample, (B,).
    Raises ValueError that names the argument.
    """
    check_arguments(x0, y, lam, tangent, guidance, p, c)
    x1 = torch.randn_like(x0) if x1 is None else like("x1", x1, x0)
    times = {"jump_share": jump_share, "t_logit": t_logit, "r_logit": r_logit}
    r, t, jump, rest = split_times(x0, r, t, **times)
    x_t, v = path(x0, x1, t)
    if guidance != 1:
        v = guided_velocity(model, x_t, t, v, y, guidance)

    # u of every sample, du/dt only where r < t: elsewhere t - r = 0 multiplies it
    u = torch.empty_like(v, dtype=torch.promote_types(v.dtype, torch.float32))
    dudt = torch.zeros_like(u)
    if len(r[jump]):
        labels = None if y is None else y[jump]
        direction = v[jump]
        if tangent == "marginal":
            direction = velocity(model, x_t[jump], t[jump], labels)
        keep = torch.is_tensor(lam) or lam != 0
        u[jump], dudt[jump] = total_derivative(
            model, x_t[jump], r[jump], t[jump], direction, labels, gradients=keep
        )
    if len(r[rest]):
        labels = None if y is None else y[rest]
        u[rest] = evaluate(model, x_t[rest], r[rest], t[rest], labels)

    e = u + expand(t - r, u) * sg_lambda(dudt, lam) - v
    square = e.flatten(1).square().sum(1)  # ||e||², (B,)
    weight = 1 / (square.detach() + c) ** p
    return (weight * square).mean(), square.detach() / e[0].numel()


def evaluate(model, x, r, t, y=None):
    """Return u = model(x, r, t), or model(x, r, t, y), in float32 at least: sums of squares soon
    exceed what half precision can hold."""
    inputs = [z.clone() for z in (x, r, t)]  # a network may work in place on what it is given
    u = model(*inputs) if y is None else model(*inputs, y)
    if not torch.is_tensor(u) or u.shape != x.shape:
        raise ValueError(f"model must return a tensor {tuple(x.shape)}, got {describe(u)}")
    return u.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def velocity(model, x_t, t, y=None):
    """Return u(x_t, t, t), the network's estimate of E[v | x_t], without a gradient."""
    return evaluate(model, x_t, t, t, y).to(x_t.dtype)


def guided_velocity(model, x_t, t, v, y, guidance):
    """Return ω v + (1 - ω) u(x_t, t, t) for samples with a label y >= 0, and v for those without.

    u is that of model(x, r, t), without labels, which samples with y < 0 teach.
    """
    guided = guidance * v + (1 - guidance) * velocity(model, x_t, t)
    return torch.where(expand(y >= 0, v), guided, v)


def split_times(x0, r, t, *, jump_share, **logits):
    """Return r and t, drawn if not given, and where r < t and r = t: slices or indices."""
    if r is None and t is None:
        jumps = number_of_jumps(len(x0), jump_share)
        options = {"device": x0.device, "dtype": x0.dtype}
        r, t = sample_times(len(x0), jump_share=jumps / len(x0), **logits, **options)
        return r, t, slice(jumps), slice(jumps, None)
    if r is None or t is None:
        raise ValueError("r and t must be given together")
    one_each = x0.flatten(1)[:, 0]
    r, t = like("r", r, one_each), like("t", t, one_each)
    wrong = ~((r >= 0) & (r <= t) & (t <= 1))
    if wrong.any():
        r, t = r[wrong][0].item(), t[wrong][0].item()
        raise ValueError(f"need 0 <= r <= t <= 1, got a sample with r = {r}, t = {t}")
    return r, t, (r < t).nonzero().flatten(), (r == t).nonzero().flatten()


def check_arguments(x0, y, lam, tangent, guidance, p, c):
    if not (torch.is_tensor(x0) and x0.is_floating_point() and x0.ndim > 1 and len(x0)):
        raise ValueError(f"x0 must be a float tensor (B, ...), got {describe(x0)}")
    check_labels(y, x0)
    if guidance != 1 and (y is None or y.ndim != 1):
        raise ValueError(f"guidance {guidance!r} needs labels y of shape (B,)")
    number = lam.ndim == 0 if torch.is_tensor(lam) else isinstance(lam, Real)
    if not number or (is_free_to_read(lam) and not 0 <= lam <= 1):
        raise ValueError(f"lam must be a number in [0, 1], got {describe(lam)}")
    if tangent not in ("conditional", "marginal"):
        raise ValueError(f"tangent must be 'conditional' or 'marginal', got {tangent!r}")
    if not (p >= 0 and c > 0):
        raise ValueError(f"p must be >= 0 and c > 0, got p={p!r}, c={c!r}")


def check_labels(y, x):
    if y is not None and not (torch.is_tensor(y) and y.shape[:1] == x.shape[:1]):
        raise ValueError(f"y must be a tensor with a label for each sample, got {describe(y)}")


def is_free_to_read(z):
    """Whether the value of z can be looked at without waiting for a device or breaking a graph."""
    return not torch.is_tensor(z) or (z.device.type == "cpu" and not torch.compiler.is_compiling())


def like(name, z, wanted):
    """Return z, a tensor of the shape, dtype and device of `wanted`, or raise ValueError."""
    properties = lambda z: (z.shape, z.dtype, z.device)
    if not torch.is_tensor(z) or properties(z) != properties(wanted):
        raise ValueError(f"{name} must be {describe(wanted)}, got {describe(z)}")
    return z


def describe(z):
    """Return what an error says of z: dtype, shape and device, a number or string, or its type."""
    if torch.is_tensor(z) and z.ndim:
        return f"{z.dtype} {tuple(z.shape)} on {z.device}"
    return repr(z) if torch.is_tensor(z) or isinstance(z, Real | str) else type(z).__name__


class Objective(nn.Module):
    """`meanflow_loss` of a model as a module (x0, lam, y=None) -> (loss, err).

    Wrap this in DistributedDataParallel or `compile`, not the model: the JVP is then on the inside.
    options  keyword arguments of `meanflow_loss`; those of a call take precedence
    """

    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x0, lam, y=None, **options):
        return meanflow_loss(self.model, x0, lam, y, **self.options | options)


# Sampling, in one step or in several -------------------------------------------------------------


@torch.no_grad()
def sample(model, x1, *, steps=1, y=None, times=None):
    """Return x0 (B, ...), generated from the noise x1 by jumps x_r = x_t - (t - r) u(x_t, r, t).

    model  as in `meanflow_loss`; a Module is evaluated in eval mode, its own mode is restored
    x1     noise (B, ...) ~ N(0, I); device and dtype of all that follows
    steps  number of jumps and network evaluations, at least 1, on an even grid from t = 1 to 0
    times  in the place of `steps`, the grid itself: decreasing numbers from 1 to 0
    y      labels (B, ...) for a model that takes them
    Raises ValueError that names the argument.
    """
    if not (torch.is_tensor(x1) and x1.is_floating_point() and x1.ndim > 1):
        raise ValueError(f"x1 must be a float tensor (B, ...), got {describe(x1)}")
    check_labels(y, x1)
    x, training = x1, []
    if isinstance(model, nn.Module):
        training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        for t, r in pairwise(time_grid(steps, times)):
            u = evaluate(model, x, x.new_full(x.shape[:1], r), x.new_full(x.shape[:1], t), y)
            x = x - (t - r) * u.to(x.dtype)
    finally:
        for module in training:
            module.training = True
    return x


def time_grid(steps, times):
    """Return the decreasing list of times from 1 to 0 that either argument stands for."""
    if times is None:
        if not isinstance(steps, Integral) or steps < 1:
            raise ValueError(f"steps must be an integer of at least 1, got {describe(steps)}")
        return torch.linspace(1, 0, int(steps) + 1, dtype=torch.float64).tolist()
    if steps != 1:
        raise ValueError(f"steps {steps!r} and times exclude each other")
    grid = [float(t) for t in times]
    decreasing = all(t > r for t, r in pairwise(grid))
    if not (decreasing and grid[:1] == [1] and grid[-1:] == [0]):
        raise ValueError(f"times must decrease from 1 to 0, got {grid}")
    return grid


# Derivative rules: what PyTorch's forward mode gets wrong, lacks or does slowly ------------------


class DerivativeRules(TorchFunctionMode):
    """While active, answer calls of the functions in RULES with a forward-mode rule of our own.

    It does not matter who calls them: torch's layers, another library or a network of yours. A
    network without convolutions and norms needs none of this section.
    gradients=False keeps no graph of the tangents that the rules make, as λ = 0 allows.
    """

    def __init__(self, gradients):
        super().__init__()
        self.gradients = gradients

    def __torch_function__(self, function, types, args=(), kwargs=None):
        rule, kwargs = RULES.get(function), kwargs or {}
        if rule is None:
            return function(*args, **kwargs)
        x, *rest = args or [kwargs.pop("input")]
        x, dx = forward_ad.unpack_dual(x)
        y = function(x, *rest, **kwargs)
        if dx is None:
            return y
        with nullcontext() if self.gradients else torch.no_grad():
            dy = rule(function, x, dx, *rest, **kwargs)
        dy = forward_ad.unpack_dual(dy).primal.to(y.dtype)
        y, more = forward_ad.unpack_dual(y)  # what a weight adds that depends on x or t itself
        return forward_ad.make_dual(y, dy if more is None else dy + more)


def linear(function, x, dx, weight, bias=None, *args, **kwargs):
    """y = W x + b, a product or a convolution:  dy = W dx. PyTorch by itself may take a second one,
    of x with the tangent of W, which is zero."""
    return function(dx, weight, None, *args, **kwargs)


def normalized(x, dx, groups, eps):
    """n = (x - mean(x)) / std(x), mean and std over each of `groups` equal parts of x:
    dn = (dx - mean(dx) - n mean(n dx)) / std(x).

    PyTorch's own rules for layer norm and instance norm take mean and std for constants when dn is
    differentiated again, which is wrong; its rule for group norm does not compile.
    """
    shape, x, dx = x.shape, x.reshape(groups, 1, -1), dx.reshape(groups, 1, -1)
    if torch.is_grad_enabled():
        mean = lambda z: z.mean(2, keepdim=True)
        x = x - mean(x)
        rstd = (mean(x * x) + eps).rsqrt()
        n = x * rstd
        dn = (dx - mean(dx) - n * mean(n * dx)) * rstd
    else:  # the Jacobian of n is symmetric, so the kernel of the backward pass serves, the fastest
        sizes = groups, 1, x.shape[2], 1
        _, mean, rstd = torch.native_group_norm(x, None, None, *sizes, eps)
        backward = torch.ops.aten.native_group_norm_backward
        dn, _, _ = backward(dx, x, mean, rstd, None, *sizes, [True, False, False])
    return dn.view(shape)


def layer_norm(function, x, dx, normalized_shape, weight=None, bias=None, eps=1e-5, _=True):
    dn = normalized(x, dx, x.numel() // math.prod(normalized_shape), eps)
    return dn if weight is None else dn * weight


def group_norm(function, x, dx, num_groups, weight=None, bias=None, eps=1e-5, _=True):
    dn = normalized(x, dx, len(x) * num_groups, eps)
    return dn if weight is None else dn * expand(weight, x[0])


def batch_norm(
    function, x, dx, running_mean, running_var, weight=None, bias=None, training=False,
    momentum=0.1, eps=1e-5,
):  # fmt: skip
    """y = w (x - running mean) / running std + b, which is linear in x."""
    if training:
        raise ValueError("model must treat samples one by one; batch norm mixes them in training")
    return function(dx, 0 * running_mean, running_var, weight, None, False, momentum, eps)


def instance_norm(
    function, x, dx, running_mean=None, running_var=None, weight=None, bias=None,
    use_input_stats=True, momentum=0.1, eps=1e-5,
):  # fmt: skip
    if use_input_stats:
        return group_norm(function, x, dx, x.shape[1], weight, bias, eps)
    return function(dx, 0 * running_mean, running_var, weight, None, False, momentum, eps)


RULES = {
    F.linear: linear,
    torch.conv1d: linear,
    torch.conv2d: linear,
    torch.conv3d: linear,
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.group_norm: group_norm,
    torch.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.batch_norm: batch_norm,
}


# A U-Net for u(x, r, t), of torch's own layers ---------------------------------------------------


def zero_init(layer):
    """Return the layer with all parameters zero: at first a residual branch adds nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Embedding(nn.Module):
    """Embed the times t and t - r and the label into features (B, features).

    The frequencies stay low, since du/dt grows with them: 1/8 to 2 radians over t in [0, 1].
    """

    def __init__(self, features, classes):
        super().__init__()
        self.label = nn.Embedding(1 + classes, features)  # the first row is "no label"
        self.time = nn.Linear(20, features)
        self.mix = nn.Linear(features, features)

    def forward(self, r, t, y):
        frequencies = 2.0 ** torch.arange(-3, 2, dtype=t.dtype, device=t.device)
        angles = torch.stack((t, t - r), 1)[:, :, None] * frequencies  # (B, 2, 5)
        waves = torch.cat((angles.cos(), angles.sin()), 1).flatten(1)  # (B, 20)
        return F.silu(self.mix(F.silu(self.time(waves) + self.label(1 + y.clamp(min=-1)))))


class Block(nn.Module):
    """Residual block: norm, SiLU, convolution, twice, the second norm scaled and shifted by the
    embedding; then, if asked for, self-attention over all pixels."""

    def __init__(self, inputs, outputs, features, dropout, attend):
        super().__init__()
        self.norm1 = nn.GroupNorm(inputs // 8, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulate = nn.Linear(features, 2 * outputs)
        nn.init.ones_(self.modulate.bias[:outputs])
        self.norm2 = nn.GroupNorm(outputs // 8, outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = Attention(outputs) if attend else nn.Identity()

    def forward(self, x, embedding):
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = F.silu(self.norm2(h) * scale + shift)
        h = self.conv2(self.dropout(h))
        return self.attention(self.skip(x) + h)


class Attention(nn.Module):
    """Self-attention over the pixels, one head."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(channels // 8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT[:, None].chunk(3, -1)  # (B, 1, H W, C)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h[:, 0].mT.reshape(x.shape))


class Level(nn.Module):
    """One resolution of the U-Net: blocks, the lower resolutions, blocks with skip connections."""

    def __init__(self, widths, blocks, attention, features, dropout):
        super().__init__()
        width, *lower = widths
        attend = len(widths) <= attention
        block = lambda inputs: Block(inputs, width, features, dropout, attend)
        self.down = nn.ModuleList(block(width) for _ in range(blocks))
        self.up = nn.ModuleList(block(2 * width) for _ in range(blocks))
        if lower:
            self.shrink = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * width, lower[0], 1))
            self.inner = Level(lower, blocks, attention, features, dropout)
            self.grow = nn.Sequential(nn.Conv2d(lower[0], 4 * width, 1), nn.PixelShuffle(2))
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
        widths = [width * multiplier for multiplier in multipliers]
        unit = patch * 2 ** (len(widths) - 1)
        if size % unit:
            raise ValueError(f"size must be a multiple of {unit}, got {size!r}")
        if any(width % 8 for width in widths):
            raise ValueError(f"widths must be multiples of 8, got {widths}")
        self.embedding = Embedding(4 * width, classes)
        self.first = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        self.levels = Level(widths, blocks, attention, 4 * width, dropout)
        self.norm = nn.GroupNorm(widths[0] // 8, widths[0])
        self.last = zero_init(nn.Conv2d(widths[0], channels * patch**2, 3, padding=1))

    def forward(self, x, r, t, y=None):
        """Return u shaped like x (B, channels, size, size); r, t: (B,); y: (B,) below classes."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"x must be (B, *{self.shape}), got {describe(x)}")
        if y is None:
            y = torch.full_like(r, -1, dtype=torch.long)
        else:
            self.check_labels(y, r)
        h = self.first(F.pixel_unshuffle(x, self.patch))
        h = self.levels(h, self.embedding(r, t, y))
        return F.pixel_shuffle(self.last(F.silu(self.norm(h))), self.patch)

    def check_labels(self, y, r):
        integer = torch.is_tensor(y) and y.dtype in (torch.int32, torch.int64)
        if not (integer and y.shape == r.shape and self.classes):
            wanted = f"int64 {tuple(r.shape)}" if self.classes else "left out, without classes"
            raise ValueError(f"y must be {wanted}, got {describe(y)}")
        if is_free_to_read(y) and y.max() >= self.classes:
            raise ValueError(f"y must be below {self.classes}, got {y.max()}")


if __name__ == "__main__":  # python meanflow.py CHECKPOINT draws samples
    import training

    training.run(training.main)
