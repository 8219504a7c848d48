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
from itertools import pairwise

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F


class UserError(ValueError):
    """A mistake of the caller's or the user's; scripts show it in one line."""


def require(condition, message, *values):
    """Raise UserError where a condition does not hold; only then is the message formatted."""
    if not condition:
        raise UserError(message.format(*values) if values else message)


def _require_like(name, value, like):
    wanted, got = ((tuple(z.shape), z.dtype) if torch.is_tensor(z) else z for z in (like, value))
    require(got == wanted, "{} must be a tensor of {}, got {}", name, wanted, got)


def _like(t, x):
    return t.view(-1, *[1] * (x.ndim - 1))  # (B,) -> (B, 1, ...)


def _u(model, x, r, t, y):
    u = model(x, r, t) if y is None else model(x, r, t, y)
    require(u.shape == x.shape, "model must return {}, returned {}", tuple(x.shape), tuple(u.shape))
    return u


# The path from data to noise, and pairs of times on it -------------------------------------------


def path(x0, x1, t):
    """Return x_t = (1 - t) x0 + t x1 and its velocity v = x1 - x0, both shaped like x0 (B, ...).

    The Modular MeanFlow paper divides by t - r in its loss, which is right if x0 and x1 are the
    states at r and t. For the ends of the whole path, as here, dx_t/dt is x1 - x0 itself.
    """
    t = _like(t, x0)
    return (1 - t) * x0 + t * x1, x1 - x0


def sample_times(n, *, jump_share=0.25, t_logit=(-0.4, 1.0), r_logit=None, device=None, dtype=None):
    """Draw n pairs of times 0 <= r <= t <= 1 and return (r, t), both (n,).

    n           number of pairs, at least 1
    jump_share  the first round(jump_share * n) pairs are for r < t, the others r = t; in [0, 1]
    t_logit     mean and standard deviation of the normal draws of logit(t)
    r_logit     the same for r, then clipped to t; None: r and t are two draws of t_logit, sorted
    Raises ValueError for values outside these ranges.
    """
    require(isinstance(n, int) and n >= 1, "n must be a positive integer, got {!r}", n)
    require(0 <= jump_share <= 1, "jump_share must be in [0, 1], got {!r}", jump_share)
    draws = []
    for name, (mean, std) in ("t_logit", t_logit), ("r_logit", r_logit or t_logit):
        require(std >= 0, "{} must have a standard deviation >= 0, got {!r}", name, std)
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
    """Return the curriculum step -> λ, which changes until step `warmup` and is constant then.

    name     one of LAMBDA_SCHEDULES: "constant" is `maximum` throughout, "linear" the paper's
             min(1, step / warmup) times it, "cosine" rises, too, "falling" goes from it to 0
    warmup   number of steps, at least 0; with 0 every schedule stays at its end
    maximum  the largest λ, in [0, 1]
    Raises ValueError for anything else.
    """
    require(name in _CURVES, "name must be one of {}, got {!r}", ", ".join(_CURVES), name)
    require(warmup >= 0, "warmup must be at least 0, got {!r}", warmup)
    require(0 <= maximum <= 1, "maximum must be in [0, 1], got {!r}", maximum)
    return lambda step: maximum * _CURVES[name](min(1.0, step / warmup) if warmup else 1.0)


# The MeanFlow identity v = u + (t - r) du/dt as a loss -------------------------------------------

_tangents_have_gradients = True
TANGENTS = ("conditional", "marginal", "mixed")


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
    model, x0, lam, y=None, *, x1=None, r=None, t=None, jump_share=0.25, t_logit=(-0.4, 1.0),
    r_logit=None, tangent="conditional", guidance=1.0, p=0.75, c=1e-3,
):  # fmt: skip
    """Return the loss E[w ||e||²], e = u + (t - r) SG_λ[du/dt] - v, w = stopgrad(||e||² + c)^-p.

    model     callable (x, r, t) or, where labels are given, (x, r, t, y) -> u, shaped like x; it
              must treat samples one by one (no batch norm) and have forward-mode derivatives
    x0, y     data (B, ...), its dtype and device those of x1, r and t, and labels (B, ...) or None
    lam       λ in [0, 1], float or 0-dim tensor: 0 is MeanFlow's loss, 1 differentiates all of e
    x1        noise, shaped like x0; if not given, drawn from N(0, I)
    r, t      times (B,), 0 <= r <= t <= 1; if not given, drawn by `sample_times` with jump_share,
              t_logit and r_logit, r < t for the first samples of the batch, so shuffle it; then
              nothing in here waits for the device
    tangent   direction of du/dt: "conditional", the paper's v; "marginal", u(x_t, t, t), with
              which, for p = 0, the true u is stationary for every λ, at one more forward pass
              where r < t (in which dropout draws a mask of its own); "mixed", conditional for the
              float λ = 0, which needs no other, and marginal otherwise
    guidance  ω, for labels (B,): where y >= 0, ω v + (1 - ω) u(x_t, t, t) stands for v, at one more
              forward pass, model(x, r, t) without labels, which y < 0 must teach; 1 is none
    p, c      power >= 0 and offset > 0 of the adaptive weight; p = 0 is the plain squared error,
              others move its minimum from the mean towards the mode
    Returns the scalar loss and, for a log, the detached mean of e² in each sample, (B,).
    Raises ValueError that names the argument.
    """
    _check_arguments(x0, y, lam, tangent, guidance, p, c)
    x1 = torch.randn_like(x0) if x1 is None else x1
    _require_like("x1", x1, x0)
    r, t, jump, stay = _pairs(x0, r, t, jump_share=jump_share, t_logit=t_logit, r_logit=r_logit)

    x_t, v = path(x0, x1, t)
    if guidance != 1:
        with torch.no_grad():
            unlabelled = _u(model, x_t, t, t, None).to(v.dtype)
        v = torch.where(_like(y >= 0, v), guidance * v + (1 - guidance) * unlabelled, v)
    e = -v
    if len(x_t[jump]):
        times = r[jump].clone(), t[jump].clone()  # not views, for compile
        args = x_t[jump], *times, v[jump], None if y is None else y[jump]
        e[jump] += _implied_velocity(model, *args, lam, tangent)
    if len(x_t[stay]):  # t - r = 0: du/dt does not matter
        e[stay] += _u(model, x_t[stay], r[stay], t[stay], None if y is None else y[stay])
    square = e.flatten(1).square().sum(1)  # ||e||², (B,)
    weight = (square.detach() + c) ** -p
    return (weight * square).mean(), square.detach() / e[0].numel()


def _implied_velocity(model, x_t, r, t, v, y, lam, tangent):
    """Return u + (t - r) SG_λ[du/dt], by the identity the velocity that the network's u implies."""
    keep = torch.is_tensor(lam) or lam > 0
    if tangent == "marginal" or (tangent == "mixed" and keep):
        with torch.no_grad():
            v = _u(model, x_t, t, t, y).to(x_t.dtype)
    u, dudt = total_derivative(model, x_t, r, t, v, y, gradients=keep)
    return u + _like(t - r, u) * sg_lambda(dudt, lam)


def _pairs(x0, r, t, **options):
    """Return r and t, drawn if not given, and where r < t and where r = t: slices or indices."""
    if r is None and t is None:
        n, share = len(x0), options["jump_share"]
        r, t = sample_times(n, **options, device=x0.device, dtype=x0.dtype)
        jumps = round(share * n)
        require(jumps or share == 0, "jump_share {!r} of {} samples is not one", share, n)
        return r, t, slice(jumps), slice(jumps, None)
    require(r is not None and t is not None, "r and t must be given together")
    _require_like("r", r, x0.flatten(1)[:, 0])
    _require_like("t", t, x0.flatten(1)[:, 0])
    ordered = ((r >= 0) & (r <= t) & (t <= 1)).all()
    require(ordered, "need 0 <= r <= t <= 1, got r={}, t={}", r, t)
    return r, t, (r < t).nonzero().flatten(), (r == t).nonzero().flatten()


def _check_arguments(x0, y, lam, tangent, guidance, p, c):
    require(torch.is_tensor(x0) and x0.is_floating_point(), "x0 must be a float tensor: {!r}", x0)
    require(x0.ndim > 1 and len(x0), "x0 must be (B, ...), got shape {}", tuple(x0.shape))
    labels = y is None or (torch.is_tensor(y) and len(y) == len(x0))
    require(labels, "y must be a tensor with a label for each of x0, got {!r}", y)
    number = lam.ndim == 0 if torch.is_tensor(lam) else isinstance(lam, int | float)
    unread = torch.is_tensor(lam) and (lam.is_cuda or torch.compiler.is_compiling())
    require(number and (unread or 0 <= lam <= 1), "lam must be a number in [0, 1], got {!r}", lam)
    require(tangent in TANGENTS, "tangent must be one of {}, got {!r}", TANGENTS, tangent)
    labels = y is not None and y.ndim == 1
    require(guidance == 1 or labels, "guidance {!r} needs labels y of shape (B,)", guidance)
    require(p >= 0 and c > 0, "p must be >= 0 and c > 0, got p={!r}, c={!r}", p, c)


class Objective(nn.Module):
    """`meanflow_loss` of a model as a module (x0, lam, y=None) -> (loss, err).

    Wrap this in DistributedDataParallel or `compile`, not the model: the JVP is then on the inside.
    options  keyword arguments of `meanflow_loss`
    """

    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x0, lam, y=None):
        return meanflow_loss(self.model, x0, lam, y, **self.options)


# Sampling, in one step or in several -------------------------------------------------------------


@torch.no_grad()
def sample(model, x1, *, steps=1, y=None):
    """Return x0 (B, ...), generated from the noise x1 by jumps x_r = x_t - (t - r) u(x_t, r, t).

    model  as in `meanflow_loss`; a Module is evaluated in eval mode, its own mode is restored
    x1     noise (B, ...) ~ N(0, I); device and dtype of all that follows
    steps  number of jumps and network evaluations, at least 1, on an even grid from t = 1 to 0
    y      labels (B, ...) for a model that takes them
    Raises ValueError that names the argument.
    """
    require(torch.is_tensor(x1) and x1.ndim > 1, "x1 must be a tensor (B, ...), got {!r}", x1)
    require(isinstance(steps, int) and steps >= 1, "steps must be at least 1, got {!r}", steps)
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


class Conv2d(nn.Conv2d):
    """Convolution with a derivative of its own, dy = W * dx: `jvp` by itself would also convolve
    with the tangent of W, which is zero."""

    def forward(self, x):
        x, dx = forward_ad.unpack_dual(x)
        return _dual(super().forward(x), dx, lambda dx: self._conv_forward(dx, self.weight, None))


class SiLU(nn.SiLU):
    """SiLU with a derivative of its own, dy = (s + y (1 - s)) dx, s = sigmoid(x), y = s x, which is
    the kernel of the backward where it needs no gradient."""

    def forward(self, x):
        x, dx = forward_ad.unpack_dual(x)

        def slope(dx):
            if not torch.is_grad_enabled():
                return torch.ops.aten.silu_backward(dx, x)
            s = torch.sigmoid(x)
            return torch.addcmul(s, s * x, 1 - s) * dx

        return _dual(F.silu(x), dx, slope)


class GroupNorm(nn.GroupNorm):
    """Group norm in groups of 8 channels and the precision of its weights, with a derivative.

    y = w n + b,  n = (x - mean) / std,  dy = w (dx - mean(dx) - n mean(n dx)) / std; the Jacobian
    of n is symmetric, so where the derivative needs no gradient it is the kernel of the backward.
    """

    def __init__(self, channels):
        super().__init__(channels // 8, channels)

    def forward(self, x):
        x, dx = forward_ad.unpack_dual(x.to(self.weight.dtype))
        # the kernels want x and dx laid out alike; on a CPU what follows is fastest channels-last
        layout = torch.channels_last if x.device.type == "cpu" else torch.contiguous_format
        x = x.contiguous(memory_format=layout)
        shape = len(x), x.shape[1], x[0, 0].numel(), self.num_groups
        y, mean, rstd = torch.native_group_norm(x, self.weight, self.bias, *shape, self.eps)

        def slope(dx):
            if torch.is_grad_enabled():
                dn = self._written_out(x, dx)
            else:
                kernel, wanted = torch.ops.aten.native_group_norm_backward, [True, False, False]
                dx = dx.contiguous(memory_format=layout)
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
        self.label = nn.Embedding(1 + classes, features)  # the first row is "no label"
        self.time = Conv2d(4 * len(self.frequencies), features, 1)
        self.mix = Conv2d(features, features, 1)
        self.silu = SiLU()

    def forward(self, r, t, y):
        angles = torch.stack((t, t - r), 1)[..., None] * self.frequencies  # (B, 2, F)
        times = torch.cat((angles.cos(), angles.sin()), 1).flatten(1)
        label = self.label(1 + y.clamp(min=-1))[:, :, None, None]
        times = self.time(times[:, :, None, None])
        return self.silu(self.mix(self.silu(times + label)))


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
        self.silu, self.dropout = SiLU(), nn.Dropout(dropout)
        self.conv2 = _zero(Conv2d(outputs, outputs, 3, padding=1))
        self.skip = Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = Attention(outputs) if attend else nn.Identity()

    def forward(self, x, embedding):
        scale, shift = self.modulate(embedding).chunk(2, 1)
        h = self.conv1(self.silu(self.norm1(x)))
        h = self.conv2(self.dropout(self.silu(torch.addcmul(shift, self.norm2(h), scale))))
        return self.attention(self.skip(x) + h)


class Attention(nn.Module):
    """Self-attention over the pixels, one head. The softmax is written out because
    `scaled_dot_product_attention` has no forward-mode derivative in its default backend."""

    def __init__(self, channels):
        super().__init__()
        self.norm = GroupNorm(channels)
        self.qkv = Conv2d(channels, 3 * channels, 1)
        self.out = _zero(Conv2d(channels, channels, 1))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, 1)  # (B, C, H W)
        attention = torch.bmm(q.mT * q.shape[1] ** -0.5, k).softmax(-1)  # (B, H W, H W)
        return x + self.out(torch.bmm(attention, v.mT).mT.unflatten(2, x.shape[2:]))


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
        require(size % unit == 0, "size must be a multiple of {}, got {!r}", unit, size)
        require(not any(w % 8 for w in widths), "widths must be multiples of 8, got {}", widths)
        self.embedding = Embedding(4 * width, classes)
        self.first = Conv2d(channels * patch**2, widths[0], 3, padding=1)
        self.levels = Level(widths, blocks, attention, 4 * width, dropout)
        self.norm, self.silu = GroupNorm(widths[0]), SiLU()
        self.last = _zero(Conv2d(widths[0], channels * patch**2, 3, padding=1))

    def forward(self, x, r, t, y=None):
        """Return u shaped like x (B, channels, size, size); r, t: (B,); y: (B,) below classes."""
        require(x.shape[1:] == self.shape, "x must be (B, *{}), got {}", self.shape, tuple(x.shape))
        if y is None:
            y = torch.full_like(r, -1, dtype=torch.long)
        h = self.first(F.pixel_unshuffle(x, self.patch))
        h = self.levels(h, self.embedding(r, t, y))
        return F.pixel_shuffle(self.last(self.silu(self.norm(h))), self.patch)


if __name__ == "__main__":  # python meanflow.py CHECKPOINT draws samples
    import training

    training.run(training.main)
