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
    u(x, r, t) average velocity from r to t, which the network learns: x_r = x_t - (t - r) u
    dudt       du/dt, one Jacobian-vector product along (v, 0, 1)
    lam        λ in [0, 1], the share of dudt's own gradient that is kept

Use, with PyTorch 2.11 or newer (older ones can lose gradients under autocast)
    model = UNet(channels=1, size=28)
    objective = Objective(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for x0 in batches:                                     # (B, 1, 28, 28)
        loss, err = objective(x0, lam=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images = sample(model, torch.randn(64, 1, 28, 28))     # one network evaluation
For a training loop of your own you need nothing below "Training".
"""

import math
import operator
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

# The path from data to noise, and pairs of times on it ---------------------------------


def expand(t, x):
    """Return t (B,) as (B, 1, ...), so that it multiplies the samples of x (B, ...)."""
    return t.view(-1, *[1] * (x.ndim - 1))


def path(x0, x1, t):
    """Return x_t = (1 - t) x0 + t x1 and its velocity v = x1 - x0, shaped like x0 (B, ...).

    The loss in the Modular MeanFlow paper has v = (x1 - x0) / (t - r), which is right if x0
    and x1 are the states at r and t. For the ends of the path, dx_t/dt is x1 - x0 itself.
    """
    if not x0.is_floating_point():
        raise ValueError(f"x0 must be floating point, in [-1, 1], got {x0.dtype}")
    t = expand(t, x0)
    return (1 - t) * x0 + t * x1, x1 - x0


def sample_times(
    n, jumps, *, t_logit=(0.0, 1.6), r_logit=(-4.0, 1.6), device=None, dtype=None
):  # fmt: skip
    """Draw n pairs of times 0 <= r <= t <= 1 and return (r, t), both (n,).

    jumps    how many may have r < t; they come first, the others have r = t
    t_logit  mean and standard deviation of the normal draws of logit(t)
    r_logit  the same for r, which is then clipped to t, so that a few of the first have
             r = t, too; None: t is the larger and r the smaller of two draws of t_logit
    The defaults come near r = 0 and t = 1, the ends of a one-step jump. MeanFlow's for
    ImageNet are t_logit=(-0.4, 1.0), r_logit=None.
    """
    normal = lambda mean, std: mean + std * torch.randn(n, device=device, dtype=dtype)
    t, other = normal(*t_logit).sigmoid(), normal(*(r_logit or t_logit)).sigmoid()
    r = torch.minimum(t, other)
    if r_logit is None:
        t = torch.maximum(t, other)  # in all pairs, those with r = t, too
    return torch.cat((r[:jumps], t[jumps:])), t


# Gradient modulation SG_λ and the curriculum of λ --------------------------------------


def sg_lambda(z, lam):
    """Return SG_λ[z] = λ z + (1 - λ) stopgrad(z): the value of z, λ times its gradient.
    λ is in [0, 1], a number or a 0-dim tensor."""
    return z.detach() + lam * (z - z.detach())  # finite values stay to the last bit


LAMBDA_SCHEDULES = {  # s is the part of the warm-up that is done
    "none": lambda s: 0.0,
    "constant": lambda s: 1.0,
    "linear": lambda s: s,
    "cosine": lambda s: (1 - math.cos(math.pi * s)) / 2,
}


def lambda_schedule(name, *, warmup, maximum=1.0):
    """Return the curriculum step -> λ, which changes from step 0 to step `warmup`.

    name     one of LAMBDA_SCHEDULES; "linear" is maximum * min(1, step / warmup), the paper's
    warmup   number of steps; with 0 the curriculum is at its end from the start
    maximum  the largest λ, in [0, 1]
    Raises ValueError for another name.
    """
    if name not in LAMBDA_SCHEDULES:
        raise ValueError(f"name must be one of {[*LAMBDA_SCHEDULES]}, got {name!r}")
    done = lambda step: min(1.0, max(0, step) / warmup) if warmup else 1.0
    return lambda step: maximum * LAMBDA_SCHEDULES[name](done(step))


# The MeanFlow identity v = u + (t - r) du/dt as a loss ---------------------------------

# A model is a callable u(x, r, t) or, with labels, u(x, r, t, y), shaped like x. It must
# - treat samples one by one, which batch norm in training mode does not;
# - be smooth in r and t, with low frequencies only, since du/dt grows with them;
# - take all that belongs to a sample as y: a step calls it on parts of the batch;
# - keep nothing between these calls, some in torch.func.jvp and some without a graph: no
#   caches, stored losses, lazy weights, backward hooks or parametrize.cached.


def evaluate(model, x, r, t, y=None):
    """Return u = model(x, r, t) or, with labels, model(x, r, t, y), in float32 at least.

    Raises ValueError for a u that is not shaped like x (B, ...).
    """
    inputs = (x, r, t) if y is None else (x, r, t, y)
    u = model(*(z.clone() for z in inputs))  # it may work in place, as nn.ReLU(True) does
    if not torch.is_tensor(u) or u.shape != x.shape:
        got = tuple(u.shape) if torch.is_tensor(u) else type(u).__name__
        raise ValueError(f"model must return a tensor {tuple(x.shape)}, got {got}")
    return u.to(torch.promote_types(x.dtype, torch.float32))  # squares overflow in half


def total_derivative(model, x_t, r, t, direction, y=None, *, gradients=True):
    """Return u(x_t, r, t) and du/dt = ∂u/∂x · direction + ∂u/∂t, both shaped like x_t.

    One forward-mode pass along (direction, 0, 1), so that value and derivative share their
    dropout masks. gradients=False returns du/dt as a constant, of which no graph is kept.
    Not for torch.inference_mode(), in which PyTorch 2.11 makes du/dt zero.
    """
    net = lambda x, r, t: evaluate(model, x, r, t, y)
    tangents = direction, torch.zeros_like(r), torch.ones_like(t)
    with DerivativeRules(gradients):
        u, dudt = torch.func.jvp(net, (x_t, r, t), tangents)
    return u, (dudt if gradients else dudt.detach())


def meanflow_loss(
    model, x_t, v, r, t, lam, y=None, *, jumps=None, direction=None, p=0.75, c=1e-3
):  # fmt: skip
    """Return E[w ||e||²], e = u + (t - r) SG_λ[du/dt] - v, w = stopgrad(||e||² + c)^-p.

    x_t, v     points (B, ...) and their velocities, from `path`
    r, t       times (B,), 0 <= r <= t <= 1, from `sample_times`
    lam        λ in [0, 1]: 0 is MeanFlow's loss, 1 differentiates all of e. A number or a
               0-dim tensor; the number 0 is cheaper than a tensor that holds 0
    y          labels (B, ...) for a model that takes them
    jumps      how many samples, the first ones, may have r < t; None: all. For the others
               t - r = 0, so that their du/dt is not needed
    direction  velocity (jumps, ...) along which du/dt is taken; None: v, the paper's
    p, c       power and offset of the adaptive weight; p = 0 is the plain squared error
    Returns the scalar loss and, for a log, the detached mean of e² in each sample, (B,).
    Raises ValueError for other shapes, and for λ or times on the CPU that are out of range.
    """
    k = len(t) if jumps is None else jumps
    if not (v.shape == x_t.shape and r.shape == t.shape == x_t.shape[:1]):
        shapes = [tuple(z.shape) for z in (x_t, v, r, t)]
        raise ValueError(f"x_t, v must be (B, ...), r, t (B,), got {shapes}")
    if is_at_hand(lam) and not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1], got {lam}")
    if is_at_hand(t) and ((r < 0) | (r > t) | (t > 1)).any() | (r < t)[k:].any():
        raise ValueError(f"need 0 <= r <= t <= 1, r = t from sample {k} on, got {r}, {t}")
    y_jump, y_flow = (None, None) if y is None else (y[:k], y[k:])
    predicted = []  # u + (t - r) SG_λ[du/dt], which should be v
    if k:
        direction = v[:k] if direction is None else direction
        keep = torch.is_tensor(lam) or lam != 0  # a tensor, maybe on a GPU, is not read
        at = x_t[:k], r[:k], t[:k]
        u, dudt = total_derivative(model, *at, direction, y_jump, gradients=keep)
        predicted.append(u + expand(t - r, x_t)[:k] * sg_lambda(dudt, lam))
    if k < len(t):
        predicted.append(evaluate(model, x_t[k:], r[k:], t[k:], y_flow))
    e = torch.cat(predicted) - v

    square = e.flatten(1).square().sum(1)  # ||e||², (B,)
    weight = (square.detach() + c) ** -p
    err = square.detach() / e[0].numel()  # mean of e² in each sample
    return (weight * square).mean(), err


def is_at_hand(z):
    """Whether a value can be read without waiting for a GPU or breaking a compiled graph."""
    on_cpu = not torch.is_tensor(z) or z.device.type == "cpu"
    return on_cpu and not torch.compiler.is_compiling()


class Objective(nn.Module):
    """A training step up to its loss, as a module (x0, lam, y=None) -> (loss, err).

    Compile this, with dynamic=False, or wrap it in DistributedDataParallel, so that the JVP
    runs inside. Pass a changing λ as a tensor: each new number would be compiled anew.

    jump_share  share of the batch, its first samples, with r < t; MeanFlow: 0.25 on ImageNet
    tangent     direction of du/dt: "conditional", the paper's v, or "marginal", the mean of
                v that the network estimates, `marginal_velocity`
    guidance    ω of `guided_velocity`, which needs labels; 1 is off
    A call may have another jump_share and a `reference`, images and their labels or None,
    for `mean_velocity`. Raises ValueError for another tangent, and for a jump_share that is
    not in [0, 1] or, rounded, none or all of a batch though it is neither 0 nor 1.
    """

    def __init__(
        self, model, *, jump_share=0.5, t_logit=(0.0, 1.6), r_logit=(-4.0, 1.6),
        tangent="conditional", guidance=1.0, p=0.75, c=1e-3,
    ):  # fmt: skip
        super().__init__()
        if tangent not in ("conditional", "marginal"):
            raise ValueError(f"tangent is conditional or marginal, got {tangent!r}")
        self.model, self.tangent, self.guidance = model, tangent, guidance
        self.jump_share, self.weight = jump_share, {"p": p, "c": c}
        self.times = {"t_logit": t_logit, "r_logit": r_logit}

    def forward(self, x0, lam, y=None, *, reference=None, jump_share=None):
        share = self.jump_share if jump_share is None else jump_share
        n, k = len(x0), round(share * len(x0))
        if not 0 <= share <= 1 or (k in (0, n) and 0 < share < 1):
            raise ValueError(f"jump_share={share} lets {k} of {n} samples jump")

        x1 = torch.randn_like(x0)
        r, t = sample_times(n, k, **self.times, device=x0.device, dtype=x0.dtype)
        x_t, v = path(x0, x1, t)
        if reference is not None:
            v = mean_velocity(x_t, t, v, x0, y, reference)
        if self.guidance != 1:
            v = guided_velocity(self.model, x_t, t, v, y, self.guidance)
        direction = None  # v itself
        if self.tangent == "marginal" and k:
            y_jump = None if y is None else y[:k]
            direction = marginal_velocity(self.model, x_t[:k], t[:k], y_jump)
        return meanflow_loss(
            self.model, x_t, v, r, t, lam, y, jumps=k, direction=direction, **self.weight
        )


# Other velocities than a sample's own --------------------------------------------------


@torch.no_grad()
def marginal_velocity(model, x_t, t, y=None):
    """Return u(x_t, t, t), the network's estimate of E[v | x_t], shaped like x_t.

    As the direction of du/dt, it makes the true u a stationary point of the loss for every
    λ (with p = 0). After improved MeanFlow, arXiv:2512.02012.
    """
    return evaluate(model, x_t, t, t, y).to(x_t.dtype)  # a tangent needs its input's dtype


@torch.no_grad()
def mean_velocity(x_t, t, v, x0, y, reference):
    """Return E[v | x_t, images], the images being the batch x0 (B, ...) and `reference`.

    v is (x_t - x0) / t. Each image may be x0, with a probability in proportion to the density
    N(0, I) of the noise (x_t - (1 - t) image) / t that takes it to x_t: so their mean takes
    the place of x0. Given x_t, the result has the same mean as v and varies less. After Xu,
    Tong, Jaakkola 2023, arXiv:2302.00670, who do this for the score.

    y          integer labels (B,) or None. Samples with y >= 0 count images of their label
    reference  more images (M, ...) and their labels (M,) or None, drawn as x0 is drawn and
               anew in each step: fixed images would bias v
    Holds B + M float64 numbers per pixel in memory. Where t < 0.001 the result is v.
    """
    more, more_y = reference
    if not more.is_floating_point():
        raise ValueError(f"reference must be floating point like x0, got {more.dtype}")
    images = torch.cat((x0, more)).flatten(1).double()  # t may be small: float32 won't do
    x, s = x_t.flatten(1).double(), t.double()[:, None]
    square = x.square().sum(1, True) - 2 * (1 - s) * (x @ images.T)
    square = square + (1 - s) ** 2 * images.square().sum(1)  # ||x_t - (1 - t) image||²
    log_density = -square / (2 * s**2)  # (B, B + M)
    if y is not None:
        other = has_label(y)[:, None] & (y[:, None] != torch.cat((y, more_y)))
        log_density = log_density.masked_fill(other, -math.inf)
    mean = log_density.softmax(1) @ images
    better = v - ((mean - images[: len(x)]) / s).to(v.dtype).view_as(v)
    return torch.where(expand(t >= 1e-3, v), better, v)


def guided_velocity(model, x_t, t, v, y, guidance):
    """Return ω v + (1 - ω) u(x_t, t, t) for samples with y >= 0, and v for the others.

    MeanFlow's guidance in its basic form, which needs no second evaluation when sampling.
    u is evaluated without labels, but trained on samples with y < 0, about a tenth: so the
    model must treat a negative label like a missing one. y: integer labels (B,).
    """
    guided = guidance * v + (1 - guidance) * marginal_velocity(model, x_t, t)
    return torch.where(expand(has_label(y), v), guided, v)


def has_label(y):
    """Return y >= 0. Raises ValueError unless y are integers (B,)."""
    if y is None or y.is_floating_point() or y.ndim != 1:
        got = y if y is None else f"{y.dtype} {tuple(y.shape)}"
        raise ValueError(f"y must be integer labels (B,), got {got}")
    return y >= 0


# Sampling, in one step or in several ---------------------------------------------------


@torch.no_grad()
def sample(model, x1, *, steps=1, y=None, times=None):
    """Return x0 (B, ...), made from the noise x1 by steps x_r = x_t - (t - r) u(x_t, r, t).

    model  as above; a Module that trains is put into eval mode and, as a whole, back again
    x1     noise (B, ...) ~ N(0, I), which sets device and dtype
    steps  number of network evaluations, at least 1, on an even grid from t = 1 to 0
    y      labels (B, ...) for a model that takes them
    times  instead of `steps`, the grid itself: numbers that decrease from 1 to 0
    Raises ValueError for other times.
    """
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    grid = [float(t) for t in (even if times is None else times)]
    if grid[:1] + grid[-1:] != [1, 0] or not all(r < t for t, r in pairwise(grid)):
        raise ValueError(f"times must decrease from 1 to 0, got {grid}")
    at = lambda time: x1.new_full(x1.shape[:1], time)
    x = x1  # from the first step on in float32 at least, as u is
    training = isinstance(model, nn.Module) and model.training
    if training:
        model.eval()
    try:
        for t, r in pairwise(grid):
            x = x - (t - r) * evaluate(model, x.to(x1.dtype), at(r), at(t), y)
    finally:
        if training:
            model.train()
    return x.to(x1.dtype)


# Derivative rules: what PyTorch's forward mode gets wrong, lacks or does slowly --------


class DerivativeRules(TorchFunctionMode):
    """While active, answer calls of the functions in RULES with a forward-mode rule.

    PyTorch's derivatives of layer norm and instance norm take mean and deviation for
    constants when differentiated again, as λ > 0 does; that of group norm does not compile;
    those of linear layers and convolutions waste time on the tangent of the weights, which
    is zero; that of SiLU takes eight kernels for one. Attention is left to `attention`, all
    else to PyTorch. It does not matter who calls the functions, torch's layers or your
    network; only calls that torch's own functions make are not seen.
    gradients=False keeps no graph of the tangents that the rules make, as λ = 0 allows.
    Raises NotImplementedError for operators of other libraries without forward mode.
    """

    def __init__(self, gradients):
        super().__init__()
        self.gradients = gradients

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in ATTENTION:
            return attention(function, args, kwargs)
        rule, foreign = RULES.get(function), is_foreign(function)
        rule = None if kwargs.get("inplace") else rule  # which would change x before its rule
        if not (rule or foreign) or not has_tangent(*args, *kwargs.values()):
            return function(*args, **kwargs)
        if foreign:
            y = function(*args, **kwargs)
            if torch.is_tensor(y) and not has_tangent(y):
                raise NotImplementedError(f"{function} has no forward mode")
            return y
        x, *rest = args or [kwargs.pop("input")]
        x, dx = unpacked(x)
        primal = lambda z: unpacked(z)[0]  # so that PyTorch adds no derivative of its own
        named = {name: primal(z) for name, z in kwargs.items()}
        y = function(x, *map(primal, rest), **named)
        dx = torch.zeros_like(x) if dx is None else dx
        with nullcontext() if self.gradients else torch.no_grad():
            dy = rule(x, dx, *rest, **kwargs).to(y.dtype)
        if not self.gradients:
            dy = dy.detach()  # a view made under no_grad would refuse work in place
        return forward_ad.make_dual(y, dy)


def unpacked(z):
    """Return z without its tangent, and the tangent or None; z may be anything."""
    primal, tangent = forward_ad.unpack_dual(z) if torch.is_tensor(z) else (z, None)
    # z itself if it has none: autocast caches the casts of weights, but not of views of them
    return (z if tangent is None else primal), tangent


def has_tangent(*values):
    return any(unpacked(z)[1] is not None for z in values)


def is_foreign(function):
    """Whether this is an operator of another library, as far as one can see when compiling."""
    operators = torch._ops.OpOverload, torch._ops.OpOverloadPacket
    return not torch.compiler.is_compiling() and isinstance(function, operators)


ATTENTION = F.scaled_dot_product_attention, F.multi_head_attention_forward


def attention(function, args, kwargs):
    """Call attention by its math backend, the only one with forward mode, with its arguments
    cast as autocast would. Left on in the JVP, autocast would cast each operation of that
    backend and make the softmax of bf16 scores float32, which PyTorch 2.11 can't
    differentiate on a GPU.
    """
    device = next(z.device.type for z in (*args, *kwargs.values()) if torch.is_tensor(z))
    with sdpa_kernel(SDPBackend.MATH):
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        low = torch.get_autocast_dtype(device)
        castable = torch.float32, torch.float16, torch.bfloat16  # but not float64
        cast = lambda z: z.to(low) if torch.is_tensor(z) and z.dtype in castable else z
        named = {name: cast(z) for name, z in kwargs.items()}
        with torch.autocast(device, enabled=False):
            return function(*map(cast, args), **named)


# A rule takes x without its tangent, the tangent dx and the function's further arguments,
# and returns the tangent of y. Weights that depend on x or t come with their tangents.


def linear_rule(function, x, dx, weight, bias=None, *args, **kwargs):
    """y = W x + b, W a matrix or a kernel:  dy = W dx + dW x + db."""
    (weight, dweight), (_, dbias) = unpacked(weight), unpacked(bias)
    dy = function(dx, weight, None, *args, **kwargs)
    if dweight is None and dbias is None:
        return dy
    dweight = torch.zeros_like(weight) if dweight is None else dweight
    return dy + function(x, dweight, dbias, *args, **kwargs)


def norm_rule(x, dx, size, weight, bias, shape, eps):
    """y = w n + b, n = (x - mean(x)) / std(x), over each `size` neighbouring elements of x,
    w and b viewed in the shape:  dn = (dx - mean(dx) - n mean(n dx)) / std(x).

    dn is a symmetric matrix times dx. So the backward pass of a layer norm, a product with
    the transpose, computes it, too, and of that PyTorch has the right derivative.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, drows = (z.to(wide).reshape(-1, size) for z in (x, dx))
    n, mean, rstd = torch.native_layer_norm(rows, [size], None, None, eps)
    backward, wanted = torch.ops.aten.native_layer_norm_backward, [True, False, False]
    dn, _, _ = backward(drows, rows, [size], mean, rstd, None, None, wanted)
    n, dn = n.view(x.shape), dn.view(x.shape)
    (weight, dweight), (_, dbias) = unpacked(weight), unpacked(bias)
    dy = dn if weight is None else weight.view(shape) * dn
    dy = dy if dweight is None else dy + dweight.view(shape) * n
    return dy if dbias is None else dy + dbias.view(shape)


def layer_norm_rule(x, dx, shape, weight=None, bias=None, eps=1e-5):
    return norm_rule(x, dx, math.prod(shape), weight, bias, shape, eps)


def group_norm_rule(x, dx, num_groups, weight=None, bias=None, eps=1e-5):
    size, per_channel = x.shape[1:].numel() // num_groups, (-1, *[1] * (x.ndim - 2))
    return norm_rule(x, dx, size, weight, bias, per_channel, eps)


def instance_norm_rule(x, dx, running_mean=None, running_var=None, weight=None, bias=None,
                       use_input_stats=True, momentum=0.1, eps=1e-5):  # fmt: skip
    if not use_input_stats:
        raise NotImplementedError("instance norm with running statistics")
    return group_norm_rule(x, dx, x.shape[1], weight, bias, eps)


def silu_rule(x, dx, *, inplace=False):
    """y = x s, s = 1 / (1 + exp(-x)):  dy = s (1 + x (1 - s)) dx."""
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(dx, x)  # in one kernel, which has no derivative
    s = torch.sigmoid(x)
    return dx * torch.addcmul(s, x * s, 1 - s)


RULES = {f: partial(linear_rule, f) for f in (F.linear, F.conv1d, F.conv2d, F.conv3d)}
RULES[F.layer_norm] = layer_norm_rule
RULES[F.group_norm] = group_norm_rule
RULES[F.instance_norm] = instance_norm_rule
RULES[F.silu] = silu_rule


# A U-Net for u(x, r, t), of torch's own layers -----------------------------------------


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
        self.time = nn.Linear(20, features)  # cos, sin of 5 angles of 2 times
        self.mix = nn.Linear(features, features)

    def forward(self, r, t, y):
        frequencies = 2.0 ** torch.arange(-3, 2, dtype=t.dtype, device=t.device)
        angles = torch.stack((t, t - r), 1)[:, :, None] * frequencies  # (B, 2, 5)
        waves = torch.cat((angles.cos(), angles.sin()), 1).flatten(1)  # (B, 20)
        h = F.silu(self.time(waves) + self.label(1 + y.clamp(min=-1)))
        return F.silu(self.mix(h))


class Attention(nn.Module):
    """Self-attention over the pixels, one head."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(channels // 8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        pixels = self.qkv(self.norm(x)).flatten(2).mT  # (B, H W, 3 C)
        q, k, v = pixels[:, None].chunk(3, -1)  # (B, 1, H W, C)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h[:, 0].mT.reshape(x.shape))


class Block(nn.Module):
    """Residual block: norm, SiLU, convolution, twice, the second norm scaled and shifted by
    the embedding; then, if asked for, self-attention over all pixels."""

    def __init__(self, inputs, outputs, features, dropout, attend):
        super().__init__()
        self.norm1 = nn.GroupNorm(inputs // 8, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulate = nn.Linear(features, 2 * outputs)
        nn.init.ones_(self.modulate.bias[:outputs])  # the scale starts around 1
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


class Level(nn.Module):
    """One resolution: blocks, the lower resolutions, blocks with skip connections."""

    def __init__(self, widths, blocks, attention, features, dropout):
        super().__init__()
        width, *lower = widths
        attend = len(widths) <= attention  # that many levels, the lowest, have attention
        block = lambda inputs: Block(inputs, width, features, dropout, attend)
        self.down = nn.ModuleList(block(width) for _ in range(blocks))
        self.up = nn.ModuleList(block(2 * width) for _ in range(blocks))
        if lower:
            conv = partial(nn.Conv2d, kernel_size=1)
            self.shrink = nn.Sequential(nn.PixelUnshuffle(2), conv(4 * width, lower[0]))
            self.inner = Level(lower, blocks, attention, features, dropout)
            self.grow = nn.Sequential(conv(lower[0], 4 * width), nn.PixelShuffle(2))
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
    width        channels of the network, times `multipliers`, at each level; multiples of 8
    multipliers  one for each level; a level has half the resolution of the one before
    blocks       residual blocks of each level on the way down, and as many up; one between
    attention    number of levels with self-attention, counted from the lowest
    patch        side of the square of pixels that becomes one pixel of the first level
    classes      number of labels, 0 for none; a missing or negative y is "no label"
    dropout      probability, as in nn.Dropout
    Raises ValueError for a size that is no integer.
    """

    def __init__(
        self, channels, *, size, width=32, multipliers=(1, 2), blocks=1, attention=1, patch=1,
        classes=0, dropout=0.0,
    ):  # fmt: skip
        super().__init__()
        sizes = dict(channels=channels, size=size, width=width, blocks=blocks, patch=patch,
                     attention=attention, classes=classes)  # fmt: skip
        for name, value in sizes.items():
            if not hasattr(value, "__index__"):
                raise ValueError(f"{name} must be an integer, got {value!r}")
        # plain numbers, of which a checkpoint can build the network again
        self.config = {name: operator.index(value) for name, value in sizes.items()}
        channels, size, width, blocks, patch, attention, classes = self.config.values()
        multipliers = [operator.index(multiplier) for multiplier in multipliers]
        self.config |= {"multipliers": multipliers, "dropout": float(dropout)}
        widths = [width * multiplier for multiplier in multipliers]
        self.shape, self.patch, self.classes = (channels, size, size), patch, classes
        self.embedding = Embedding(4 * width, classes)
        self.first = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        self.levels = Level(widths, blocks, attention, 4 * width, dropout)
        self.norm = nn.GroupNorm(widths[0] // 8, widths[0])
        self.last = zero_init(nn.Conv2d(widths[0], channels * patch**2, 3, padding=1))

    def forward(self, x, r, t, y=None):
        """Return u shaped like x (B, channels, size, size); r, t: (B,); y: int (B,)."""
        y = torch.full_like(r, -1, dtype=torch.long) if y is None else y
        if y.shape != r.shape:
            raise ValueError(f"y must be labels {tuple(r.shape)}, got {tuple(y.shape)}")
        h = self.first(F.pixel_unshuffle(x, self.patch))
        h = self.levels(h, self.embedding(r, t, y))
        return F.pixel_shuffle(self.last(F.silu(self.norm(h))), self.patch)


# Training. If you have a loop of your own, cut the file here ---------------------------

import argparse
import atexit
import copy
import io
import os
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import copytree

from filelock import FileLock  # which torch itself requires
from torch import distributed as dist
from torch.optim.swa_utils import get_ema_multi_avg_fn

DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
COUNT, SEED = (1, 10**9), (0, 2**32 - 1)  # PyTorch's CPU generator takes 32 bits of a seed
SHARE, DECAY, SWITCH = (0, 1), (0, 1 - 1e-9), [True, False, None]

SETTINGS = {  # name: default, range or choices, meaning; recipes and flags change the value
    "out": ("runs", None, "folder for checkpoint, log and pictures"),
    "resume": (False, SWITCH, "go on from the checkpoint in --out, if any"),
    "steps": (100_000, COUNT, "training steps"),
    "batch_size": (64, COUNT, "images per step, over all processes"),
    "flip": (False, SWITCH, "mirror each image with probability 1/2"),
    "optimizer": ("adam", ["adam", "muon"], "muon: Muon for the inner convolutions"),
    "lr": (1e-3, (1e-12, 1e6), "peak learning rate of Adam"),
    "lr_warmup": (0.02, SHARE, "share of the steps in which it rises"),
    "lr_decay": (False, SWITCH, "let it fall to 0 along a cosine"),
    "beta2": (0.999, DECAY, "decay of Adam's second moment"),
    "ema": (0.999, DECAY, "decay of the averaged weights, per step"),
    "lambda_schedule": ("none", [*LAMBDA_SCHEDULES], "curriculum; none: lambda is 0"),
    "lambda_max": (1.0, SHARE, "largest lambda of the curriculum"),
    "lambda_warmup": (0.25, SHARE, "share of the steps in which lambda changes"),
    "tangent": ("auto", ["auto", "conditional", "marginal"], "direction of du/dt; auto: "
                "marginal with a --lambda-schedule, else conditional"),
    "flow_first": (0.0, SHARE, "share of the steps, the first, that are flow matching"),
    "jump_share": (0.5, SHARE, "share of samples that jump, with r < t, after those steps"),
    "t_logit": ([0.0, 1.6], (-100, 100), "normal draws of logit(t)"),
    "r_logit": ([-4.0, 1.6], (-100, 100), "normal draws of logit(r), clipped to t"),
    "reference": (0, (0, 10**6), "images besides the batch, for the mean of v; 0 is off"),
    "guidance": (1.0, (0, 100), "guidance to learn; 1 is off"),
    "seed": (0, SEED, "seed of all random numbers"),
    "device": (DEVICES[0], DEVICES, "device to train on"),
    "amp": ("auto", ["auto", *PRECISIONS], "precision; auto: bf16 on a GPU, off on a CPU"),
    "compile": (None, SWITCH, "compile the loss; without the flag on a GPU only"),
    "log_every": (20, COUNT, "steps per row of log.csv and line of progress"),
    "save_every": (500, COUNT, "steps between checkpoints with a picture"),
}  # fmt: skip
COLUMNS = "step", "loss", "err_flow", "err_jump", "grad_norm", "lambda", "skipped"  # of the log
COLUMNS += "images_per_second", "seconds"
# what --resume may change; all else, and the network, must be as in the checkpoint
MAY_CHANGE = {"out", "resume", "lr", "device", "compile", "log_every", "save_every"}


class UserError(argparse.ArgumentTypeError):
    """A mistake of the user's, which argparse and `run` show in one line."""


def train(model, images, labels, args):
    """Train the UNet `model`; write checkpoint.pt, log.csv and pictures into args.out.

    images  uint8 (N, C, H, W)
    labels  int64 (N,), or None for an unconditional model
    args    the SETTINGS, as parsed by `train_parser`
    Under torchrun each process takes its part of the batch, and the first one writes.
    Returns the model with the averaged weights, in eval mode. Raises UserError for what the
    user can mend.
    """
    settings = {name: checked(name, *SETTINGS[name], getattr(args, name)) for name in SETTINGS}
    args, out = argparse.Namespace(**settings), Path(settings["out"])
    names = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"  # torchrun sets them all
    launched = all(os.environ.get(name) for name in names)
    rank, world = (int(os.environ[name]) for name in names[:2]) if launched else (0, 1)
    check_data(model, images, labels, args, world)
    UNet(**model.config).load_state_dict(model.state_dict())  # or load_model would fail later
    lock = FileLock(out / ".lock")  # against another training in the folder
    if rank == 0:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
    try:
        return fit(model, images, labels, args, rank, world)
    finally:
        lock.release()


def fit(model, images, labels, args, rank, world):
    """The training itself, by process `rank` of `world`, in a folder that is locked."""
    out, device, n = Path(args.out), torch.device(args.device), args.batch_size // world
    if world > 1 and device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    images, labels = images.to(device), None if labels is None else labels.to(device)
    model.to(device, memory_format=torch.channels_last).train()  # faster convolutions
    average = copy.deepcopy(model)
    adam = torch.optim.Adam(model.parameters(), betas=(0.9, args.beta2), fused=True)
    muon = Muon(model) if args.optimizer == "muon" else None
    low = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    auto = low if device.type == "cuda" else "off"
    amp = auto if args.amp == "auto" else args.amp
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    parts = {"model": model, "ema": average, "adam": adam, "scaler": scaler}
    parts |= {"muon": muon} if muon else {}
    setup = {"unet": model.config, "settings": vars(args) | {"processes": world}}
    start, seconds = resume(out, parts, setup, rank)

    modulated = args.lambda_schedule != "none" and args.lambda_max > 0
    auto = "marginal" if modulated else "conditional"  # along which λ > 0 costs variety
    tangent = auto if args.tangent == "auto" else args.tangent
    times = {"t_logit": args.t_logit, "r_logit": args.r_logit}
    objective = Objective(model, tangent=tangent, guidance=args.guidance, **times)
    compiled = device.type == "cuda" if args.compile is None else args.compile
    if compiled:
        torch._dynamo.config.optimize_ddp = False  # it would split the graph in the JVP
        objective.compile(dynamic=False)
    if world > 1:
        objective = distributed(objective, device, start)
    flow_steps = round(args.flow_first * args.steps)
    warmup = args.lambda_warmup * args.steps
    schedule = lambda_schedule(args.lambda_schedule, warmup=warmup, maximum=args.lambda_max)

    recent, stuck, mark = [], 0, time.perf_counter()
    for done in range(start, args.steps):
        # seeded by the step, so that there is no state of random numbers to save
        torch.manual_seed(hash((args.seed, done, rank)))
        x0, y = draw_batch(images, labels, n, args.flip, args.guidance)
        more = draw_batch(images, labels, args.reference, args.flip) if args.reference else None
        share = args.jump_share if done >= flow_steps else 0.0
        lam = schedule(done - flow_steps)  # flow matching has no use for it
        if compiled and modulated:  # each new number would be compiled anew
            lam = torch.tensor(lam, device=device)
        with torch.autocast(device.type, PRECISIONS[amp], enabled=amp != "off"):
            loss, err = objective(x0, lam, y, reference=more, jump_share=share)
        norm = update(loss, model, adam, muon, scaler, learning_rate(done, args))
        # a short average at first, which soon forgets the initial weights
        blend = get_ema_multi_avg_fn(min(args.ema, done / (done + 9)))
        blend([*average.parameters()], [*model.parameters()], None)

        step, k = done + 1, round(share * n)
        recent.append(torch.stack((loss.detach(), err[k:].mean(), err[:k].mean(), norm)))
        saves = step in (1, args.steps) or step % args.save_every == 0
        if not (saves or step % args.log_every == 0):
            continue
        measured = torch.stack(recent).cpu()  # only here, a GPU is waited for
        elapsed = time.perf_counter() - mark
        seconds, pace = seconds + elapsed, elapsed / len(recent)
        finite = measured[:, 3].isfinite()
        stuck = 0 if finite.any() else stuck + len(recent)
        if stuck >= 20:
            raise UserError(f"no finite gradient in {stuck} steps to {step}: a lower --lr?")
        means = measured[finite].nanmean(0).tolist()  # err_jump is nan if nothing jumps
        others = float(lam), int((~finite).sum()), args.batch_size / pace, seconds
        row = dict(zip(COLUMNS, (step, *means, *others), strict=True))
        if rank == 0:
            if saves:  # the picture first, as a later one would not make up for it
                with writing(out, needed=False):
                    save_images(draw(average, 80, seed=args.seed), out / f"step-{step:06}.png")
                states = {name: part.state_dict() for name, part in parts.items()}
                save(setup | states | {"row": row}, out / "checkpoint.pt")
            with writing(out, needed=False):
                append(out / "log.csv", row)
            report(row, args, flow_steps, pace)
        recent, mark = [], time.perf_counter()  # saving is no part of the pace
    if rank == 0:
        with writing(out, needed=False):
            grids = [draw(average, 40, steps=count, seed=args.seed) for count in (1, 2, 4)]
            save_images(torch.cat(grids), out / "samples.png")
        print(f"{args.steps} steps in {seconds:.0f} s: {out / 'samples.png'}", flush=True)
    return average.eval()


def check_data(model, images, labels, args, world):
    """Raise UserError for data and settings that do not fit the model or each other."""
    n, share, classes = args.batch_size // world, args.jump_share, model.classes
    if images.dtype != torch.uint8 or images.shape[1:] != model.shape:
        wanted, got = ("N", *model.shape), (type(images), images.dtype, tuple(images.shape))
        raise UserError(f"images must be uint8 ({', '.join(map(str, wanted))}), got {got}")
    if (labels is None) == (classes > 0) or (labels is None and args.guidance != 1):
        raise UserError("labels, a UNet with classes and --guidance need each other")
    one_each = classes and labels.dtype == torch.int64 and labels.shape == images.shape[:1]
    if classes and not (one_each and labels.min() >= 0 and labels.max() < classes):
        raise UserError(f"labels must be {len(images)} int64 from 0 to {classes - 1}")
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} is no multiple of {world} processes")
    if 0 < share < 1 and round(share * n) in (0, n):
        raise UserError(f"--jump-share {share} of {n} images is none or all of them")


def distributed(objective, device, start):
    """Return the objective in DistributedDataParallel, if all processes start alike."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    starts = [None] * dist.get_world_size()
    dist.all_gather_object(starts, start)
    if len({*starts}) > 1:
        raise UserError(f"processes start at steps {starts}: --out must be one folder for all")
    return nn.parallel.DistributedDataParallel(objective)


def draw_batch(images, labels, n, flip, guidance=1.0):
    """Return n random images x0 in [-1, 1] and labels, of which guidance drops a tenth."""
    i = torch.randint(len(images), (n,), device=images.device)
    x0 = images[i].float() / 127.5 - 1
    y = None if labels is None else labels[i]
    if flip:
        x0 = torch.where(torch.rand_like(x0[:, :1, :1, :1]) < 0.5, x0.flip(3), x0)
    if guidance != 1:
        y = torch.where(torch.rand(n, device=y.device) < 0.1, -1, y)
    return x0, y


def learning_rate(step, args):
    """Return the rate of a step, counted from 0: it rises at first, and may decay."""
    rise = min(1.0, (step + 1) / max(1, round(args.lr_warmup * args.steps)))
    decay = (1 + math.cos(math.pi * step / args.steps)) / 2 if args.lr_decay else 1.0
    return args.lr * rise * decay


def update(loss, model, adam, muon, scaler, lr):
    """Take a step and return the gradient's norm; if that is not finite, change nothing."""
    adam.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(adam)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 20.0)
    finite = norm.isfinite()
    if muon:
        muon.param_groups[0]["lr"] = 2.5 * lr
        muon.step(finite)
    adam.param_groups[0]["lr"] = lr
    adam.found_inf = (~finite).float()  # which makes fused Adam change nothing
    adam.step()
    scaler.update()
    return norm


class Muon(torch.optim.Muon):
    """torch's Muon for the convolutions of a UNet between the first and the last one.

    It sees each kernel as a matrix (outputs, all else) that shares the kernel's storage,
    which `train` lays out as channels_last. At the same rate, which `update` makes 2.5 times
    Adam's, updates have the size (RMS) of Adam's, after Liu et al. 2025, arXiv:2502.16982.
    """

    def __init__(self, model):
        inner = model.levels.parameters()
        self.kernels = [z for z in inner if z.ndim == 4 and z.requires_grad]
        matrices = [z.detach().permute(0, 2, 3, 1).view(len(z), -1) for z in self.kernels]
        matrices = [nn.Parameter(matrix) for matrix in matrices]
        options = {"momentum": 0.9, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
        super().__init__(matrices, **options)

    def step(self, finite):
        """Use up the kernels' gradients, so that Adam finds none; step if `finite`."""
        for matrix, kernel in zip(self.param_groups[0]["params"], self.kernels, strict=True):
            matrix.grad, kernel.grad = kernel.grad.permute(0, 2, 3, 1).flatten(1), None
        if finite:  # this waits for a GPU, unlike Adam's found_inf
            with Float32OnCPU():
                super().step()


class Float32OnCPU(TorchFunctionMode):
    """Keep float32 where torch's Muon calls .bfloat16(), which many CPUs emulate."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.bfloat16 and args[0].device.type == "cpu":
            return args[0].clone()  # Muon goes on in place
        return function(*args, **kwargs or {})


# The log, checkpoints, data and pictures -----------------------------------------------


def report(row, args, flow_steps, pace):
    """Print a row of the log and the time left. A step with a share q of jumps costs 1 + q
    steps of flow matching, or 1 + 2 q with a λ schedule, as measured on a CPU."""
    step, cost = row["step"], 1 + args.jump_share * (1 + (args.lambda_schedule != "none"))
    flow = max(0, flow_steps - step)  # steps of flow matching that are left
    left = (flow + cost * (args.steps - step - flow)) / (1 if step <= flow_steps else cost)
    minutes, seconds = divmod(round(left * pace), 60)
    errors = f"err_flow {row['err_flow']:.4f}  err_jump {row['err_jump']:.4f}"
    speed = f"{row['images_per_second']:.0f} images/s  {minutes}:{seconds:02} left"
    print(f"{step}/{args.steps}  {errors}  lambda {row['lambda']:.2f}  {speed}", flush=True)


def append(log, row):
    """Add a row to log.csv, and begin it where there is none."""
    lines = [row.keys()] if not log.exists() else []
    lines.append(f"{z:.8g}" for z in row.values())
    with open(log, "a", encoding="utf-8") as file:
        file.writelines(",".join(line) + "\n" for line in lines)


def resume(out, parts, setup, rank):
    """Return the step and seconds to start from, after loading `parts` if --resume asks.

    Raises UserError if this would overwrite a training, or go on with another network or
    other settings than those in `setup`.
    """
    file, log = out / "checkpoint.pt", out / "log.csv"
    existing = [each for each in (file, log) if each.exists()]
    if not (setup["settings"]["resume"] and file in existing):
        if existing and rank == 0:
            raise UserError(f"{existing[0]} exists: --resume, or name another --out")
        return 0, 0.0
    checkpoint = load_checkpoint(file, *setup, *(parts.keys() - {"muon"}), "row")
    was, now = (each["unet"] | each["settings"] for each in (checkpoint, setup))
    for name in now.keys() - MAY_CHANGE:
        if was.get(name) != now[name]:
            change = f"{name} was {was.get(name)}, not {now[name]}"
            raise UserError(f"cannot go on from {file}: {change}")
    for name, part in parts.items():
        if checkpoint[name]:  # not that of a scaler that was off
            part.load_state_dict(checkpoint[name])
    row = checkpoint["row"]
    if rank == 0 and log in existing:  # it ends with the checkpoint's row: others will come
        with writing(log, needed=False):
            lines = log.read_text(errors="replace").splitlines()
            step = lambda line: line.split(",")[0]
            lines = [z for z in lines if step(z).isdigit() and int(step(z)) < row["step"]]
            replace(log, "\n".join([",".join(COLUMNS), *lines, ""]).encode())
            append(log, row)
    return row["step"], row["seconds"]


def save(content, file):
    torch.save(content, buffer := io.BytesIO())
    with writing(file):
        replace(file, buffer.getvalue())


def replace(file, content):
    """Write the bytes in one move, so that a kill or a full disk leaves the old file whole."""
    temporary = file.with_name(f".{file.name}.partial")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(place, needed=True):
    """Name the place where writing fails: in a UserError or, if not `needed`, in a line."""
    try:
        yield
    except OSError as error:
        message = f"cannot write {place}: {error.strerror or error}"
        if needed:
            raise UserError(message) from error
        print(message, flush=True)


def load_checkpoint(file, *names):
    """Return what `train` saved, which must hold the names. Raises UserError for another file."""
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        if not checkpoint.keys() >= {*names}:
            raise KeyError(*names)
        return checkpoint
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except Exception as error:  # torch.load raises anything for what it does not know
        raise UserError(f"{file} is no checkpoint of a training, or damaged") from error


def load_model(file):
    """Return the UNet with the averaged weights that `train` saved, in eval mode."""
    checkpoint = load_checkpoint(file, "unet", "ema")
    model = UNet(**checkpoint["unet"])
    model.load_state_dict(checkpoint["ema"])
    return model.eval()


def load_dataset(dataset, folder, files):
    """Return torchvision's training set `dataset` in the folder, or download it there.

    Nothing is written before the download is complete. If it fails, a UserError says which
    `files` belong into the folder.
    """
    try:
        with suppress(RuntimeError):  # it is not there
            return dataset(folder)
        with tempfile.TemporaryDirectory() as temporary:
            dataset(temporary, download=True)
            copytree(temporary, folder, dirs_exist_ok=True)
        return dataset(folder)
    except Exception as error:  # as many kinds as there are faults of servers and of files
        missing = f"no complete {dataset.__name__} in {folder}, and no download ({error})"
        raise UserError(f"{missing}: put {files} into {folder}") from error


def draw(model, num, *, steps=1, seed=0, label=-1):
    """Return `num` images (num, C, H, W) of a UNet from fixed noise, all of one label or,
    without it, of each of its classes in turn."""
    x1 = torch.randn(num, *model.shape, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(num) % max(1, model.classes) if label < 0 else torch.full((num,), label)
    device, images = next(model.parameters()).device, []
    for x, labels in zip(x1.to(device).split(500), y.to(device).split(500), strict=True):
        images.append(sample(model, x, steps=steps, y=labels if model.classes else None))
    return torch.cat(images)


def save_images(images, file):
    """Write images (B, C, H, W), ten in a row, or one image (C, H, W), in [-1, 1], as PNG.

    Channels, unless they are three, become grey pictures side by side.
    """
    from torchvision.utils import save_image

    if images.shape[-3] != 3:
        images = images.movedim(-3, -2).flatten(-2).unsqueeze(-3)  # (B, 1, H, C W)
    buffer = io.BytesIO()
    save_image(images, buffer, "png", nrow=10, normalize=True, value_range=(-1, 1))
    replace(Path(file), buffer.getvalue())


# The command line ----------------------------------------------------------------------


def checked(name, default, allowed, meaning, value):
    """Return the value of a setting, a flag's text or a recipe's value, in its plain type.
    The first four arguments are a row of SETTINGS. Raises UserError for a wrong value."""
    if isinstance(default, list) and not isinstance(value, str):  # both numbers of a pair
        first, second = value
        return [checked(name, default, allowed, meaning, str(z)) for z in (first, second)]
    if isinstance(allowed, tuple):
        kind = type(default[0] if isinstance(default, list) else default)
        with suppress(ValueError):
            value = kind(str(value))  # 1.5 is no int
        right = isinstance(value, kind) and allowed[0] <= value <= allowed[1]
    elif allowed:
        right = value in allowed
        value = allowed[allowed.index(value)] if right else value  # not one of numpy's
    else:
        value = str(value).strip()
        right = value != ""
    if not right:
        wanted = f"in {allowed}" if allowed else "a name"
        raise UserError(f"{name} must be {wanted}, got {value!r}")
    return value


def command_line(description, settings):
    """Return a parser with a flag for each setting {name: (default, allowed, meaning)}. Its
    errors are one line, as it has no usage to print before them."""
    parser = argparse.ArgumentParser(
        description=description, usage=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    for name, (default, allowed, meaning) in settings.items():
        how = {"type": partial(checked, name, default, allowed, meaning)}
        if allowed is SWITCH:
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, list):
            how |= {"nargs": 2, "metavar": ("MEAN", "STD")}
        elif isinstance(allowed, list):
            how |= {"choices": allowed}
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, default=default, help=meaning, **how)
    return parser


def train_parser(description, **recipe):
    """Return the command line of a training script whose recipe replaces defaults of
    SETTINGS. Raises UserError for an unknown name or a wrong value in it."""
    if unknown := recipe.keys() - SETTINGS.keys():
        raise UserError(f"no such settings: {', '.join(unknown)}")
    recipe = {name: checked(name, *SETTINGS[name], value) for name, value in recipe.items()}
    settings = {name: (recipe.get(name, row[0]), *row[1:]) for name, row in SETTINGS.items()}
    return command_line(description, settings)


def run(main, argv=None):
    """Call main(argv) for a script: a user's mistake ends it with one line and status 2."""
    warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)  # torch's own
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it
    try:
        main(argv)
    except UserError as error:
        command_line(None, {}).error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit(130)


DRAWING = {  # settings of `main`, like SETTINGS
    "steps": (1, (1, 10_000), "network evaluations per image"),
    "num": (80, COUNT, "number of images"),
    "label": (-1, (-1, 10**9), "class of all images; -1: each class in turn"),
    "out": ("samples.png", None, "a .png for a grid, or a new folder for single images"),
    "seed": (0, SEED, "seed of the noise"),
    "device": (DEVICES[0], DEVICES, "device to draw on"),
}


def main(argv=None):
    """Draw samples from a checkpoint, into one PNG or into a folder with a PNG for each."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    parser = command_line(main.__doc__, DRAWING)
    parser.add_argument("checkpoint", help="file that training wrote")
    args, begin = parser.parse_args(argv), time.perf_counter()
    out = Path(args.out)
    grid = out.suffix.lower() == ".png"
    if not grid and out.suffix.lower() in IMG_EXTENSIONS:
        raise UserError(f"--out {out} must end in .png, or be a folder")
    if not grid and out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out} holds files, which would pass for samples")
    model = load_model(args.checkpoint).to(args.device)
    if args.label >= model.classes:
        raise UserError(f"--label {args.label}: the model has {model.classes} classes")
    images = draw(model, args.num, steps=args.steps, seed=args.seed, label=args.label)
    with writing(out):
        (out.parent if grid else out).mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate([images] if grid else images):
            save_images(picture, out if grid else out / f"{i:06}.png")
    print(f"{args.num} images in {time.perf_counter() - begin:.1f} s: {out}")


if __name__ == "__main__":  # python meanflow.py CHECKPOINT
    run(main)
