"""Modular MeanFlow in one file: learn average velocities, generate in one step.

Unofficial reference implementation of
    You, Liu, He: Modular MeanFlow, 2025, https://arxiv.org/abs/2508.17426
which builds on
    Geng, Deng, Bai, Kolter, He: Mean Flows, 2025, https://arxiv.org/abs/2505.13447

Conventions, the same in the code, the docstrings and the README
    x0, x1     data in [-1, 1] and noise ~ N(0, I), of any shape (B, ...)
    r <= t     times in [0, 1], of shape (B,); t = 0 is data, t = 1 is noise
    x_t        (1 - t) x0 + t x1, the path
    v          x1 - x0, the velocity along it; with a `reference`, its mean over images
    u(x, r, t) the average velocity from r to t, what the network learns: x_r = x_t - (t - r) u
    dudt       du/dt, one Jacobian-vector product along (v, 0, 1) or along (u(x, t, t), 0, 1)
    lam        λ in [0, 1], the share of dudt's own gradient that is kept
    jumps      samples that may have r < t, or their number; only they need du/dt

Use, with PyTorch 2.11 or newer (older ones can lose gradients under autocast)
    model = UNet(channels=1, size=28)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for x0 in batches:                                     # (B, 1, 28, 28)
        loss, err = meanflow_loss(model, x0, lam=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images = sample(model, torch.randn(64, 1, 28, 28))     # one network evaluation
One-step samples are better if training draws times near 1, see `sample_times`, and if they are
drawn with an average of the weights, as in `train`. For a training loop of your own you need
nothing below "Training" but, if you like, `load_model` and `save_images`.
"""

import math
from contextlib import nullcontext
from functools import partial
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
    return t.view(t.shape + (1,) * (x.ndim - 1))


def path(x0, x1, t):
    """Return x_t = (1 - t) x0 + t x1 and its velocity v = x1 - x0, both shaped like x0 (B, ...).

    For v, the loss in the Modular MeanFlow paper has (x1 - x0) / (t - r), which is right if x0 and
    x1 are the states at r and t. For the ends of the path, as here, dx_t/dt is x1 - x0 itself.
    """
    t = expand(t, x0)
    return (1 - t) * x0 + t * x1, x1 - x0


def sample_times(n, jumps, *, t_logit=(-0.4, 1.0), r_logit=None, device=None, dtype=None):
    """Draw n pairs of times 0 <= r <= t <= 1 and return (r, t), both (n,).

    n        number of pairs, at least 1
    jumps    how many may have r < t, from 0 to n; they come first, the others have r = t
    t_logit  mean and standard deviation of the normal draws of logit(t)
    r_logit  the same for r, which is then clipped to t, so that a few of the first have r = t, too;
             None: t is the larger and r the smaller of two draws of t_logit
    The defaults, MeanFlow's for ImageNet, hardly reach t = 1, where one-step sampling starts:
    train_mnist.py takes t_logit=(0, 1.6), r_logit=(-4, 1.6) and half of the pairs as jumps.
    Raises ValueError for values outside these ranges.
    """
    if not (isinstance(n, Integral) and n >= 1):
        raise ValueError(f"n must be a positive integer, got {n!r}")
    if not (isinstance(jumps, Integral) and 0 <= jumps <= n):
        raise ValueError(f"jumps must be an integer from 0 to {n}, got {jumps!r}")
    check_logit("t_logit", t_logit)
    logit_normal = lambda mean, std: torch.sigmoid(
        mean + std * torch.randn(n, device=device, dtype=dtype)
    )
    t = logit_normal(*t_logit)
    if r_logit is None:  # sorted first, so that pairs with r = t get the larger draw, too
        other = logit_normal(*t_logit)
        r, t = torch.minimum(t, other), torch.maximum(t, other)
    else:
        check_logit("r_logit", r_logit)
        r = torch.minimum(t, logit_normal(*r_logit))
    return torch.cat((r[:jumps], t[jumps:])), t


def number_of_jumps(n, jump_share):
    """Return how many of n samples jump: the share, rounded. If that is none or all of them though
    the share is neither, it is rounded up or down at random, so that the mean is right."""
    if not is_number(jump_share, 0, 1):
        raise ValueError(f"jump_share must be in [0, 1], got {describe(jump_share)}")
    jumps = round(jump_share * n)
    if jumps in (0, n) and 0 < jump_share < 1:
        jumps = int(jump_share * n + torch.rand((), device="cpu"))  # int() of a GPU's would wait
    return jumps


# Gradient modulation SG_λ and the curriculum of λ ------------------------------------------------


def sg_lambda(z, lam):
    """Return SG_λ[z] = λ z + (1 - λ) stopgrad(z): the value of z, λ times its gradient.

    z    tensor of any shape
    lam  λ in [0, 1], a number or a 0-dim tensor
    """
    return z.detach() + lam * (z - z.detach())  # so written, its value is that of z to the last bit


LAMBDA_SCHEDULES = {  # s is the part of the warm-up that is done
    "constant": lambda s: 1.0,
    "linear": lambda s: s,
    "cosine": lambda s: (1 - math.cos(math.pi * s)) / 2,
    "falling": lambda s: 1 - s,
}


def lambda_schedule(name, *, warmup, maximum=1.0):
    """Return the curriculum step -> λ, which changes up to step `warmup` and is constant after it.

    name     one of LAMBDA_SCHEDULES: "constant" is `maximum` throughout, "linear" is
             maximum * min(1, step / warmup), the paper's, "cosine" rises smoothly to the maximum,
             "falling" goes linearly from it to 0
    warmup   number of steps, at least 0; with 0 the curriculum is at its end from the start
    maximum  the largest λ, in [0, 1]
    Raises ValueError for anything else.
    """
    if name not in LAMBDA_SCHEDULES:
        raise ValueError(f"name must be one of {', '.join(LAMBDA_SCHEDULES)}, got {name!r}")
    if not is_number(warmup, 0):
        raise ValueError(f"warmup must be at least 0, got {warmup!r}")
    if not is_number(maximum, 0, 1):
        raise ValueError(f"maximum must be in [0, 1], got {maximum!r}")
    curve = LAMBDA_SCHEDULES[name]
    return lambda step: maximum * curve(min(1.0, step / warmup) if warmup else 1.0)


# The MeanFlow identity v = u + (t - r) du/dt as a loss -------------------------------------------


def evaluate(model, x, r, t, y=None):
    """Return u = model(x, r, t), or model(x, r, t, y) where there are labels.

    In float32 at least, whatever autocast makes of it: sums of squares soon exceed what half
    precision can hold.
    """
    inputs = (x, r, t) if y is None else (x, r, t, y)
    u = model(*(z.clone() for z in inputs))  # the model may work in place, as nn.ReLU(True) does
    if not torch.is_tensor(u) or u.shape != x.shape:
        raise ValueError(f"model must return a tensor {tuple(x.shape)}, got {describe(u)}")
    return u.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def marginal_velocity(model, x_t, t, y=None):
    """Return u(x_t, t, t), the network's estimate of E[v | x_t], without a gradient."""
    return evaluate(model, x_t, t, t, y).to(x_t.dtype)  # a tangent must have the dtype of x_t


@torch.no_grad()
def mean_velocity(x_t, t, v, x0, y, reference):
    """Return E[v | x_t, images], the images being the batch x0 (B, ...) and `reference`.

    v is (x_t - x0) / t. Suppose that we know the images, but not which of them is x0. Then each has
    a probability in proportion to the density N(0, I) of the noise (x_t - (1 - t) image) / t that
    it needs to get to x_t, and the mean of the images takes the place of x0. Where there are
    labels, a sample with y >= 0 counts images of its own label only, one with y < 0 all of them.
    Given x_t, the mean of the result is E[v | x_t], as that of v is, for any number of images that
    are drawn as x0 is; but it varies less. No gradient passes through. Where t < 0.001 it is v.
    After Xu, Tong, Jaakkola 2023, arXiv:2302.00670, who do this for the score.
    """
    more, more_y = reference
    images = torch.cat((x0, more)).flatten(1).double()  # float32 will not do where t is small
    x, s = x_t.flatten(1).double(), t.double()[:, None]
    square = x.square().sum(1, True) - 2 * (1 - s) * (x @ images.T)
    square = square + (1 - s) ** 2 * images.square().sum(1)  # ||x_t - (1 - t) image||², (B, B + M)
    log_density = -square / (2 * s**2)
    if y is not None:
        other = (y[:, None] >= 0) & (y[:, None] != torch.cat((y, more_y)))
        log_density = log_density.masked_fill(other, -math.inf)
    mean = log_density.softmax(1) @ images
    better = v - ((mean - images[: len(x)]) / s).to(v.dtype).view_as(v)
    return torch.where(expand(t >= 1e-3, v), better, v)


def guided_velocity(model, x_t, t, v, y, guidance):
    """Return ω v + (1 - ω) u(x_t, t, t) for samples with a label y >= 0, and v for those without.

    This is MeanFlow's guidance in its basic form, which needs no second evaluation when sampling. u
    is evaluated without labels, but trained on samples with y < 0, so the model must treat a
    negative label like a missing one.
    """
    guided = guidance * v + (1 - guidance) * marginal_velocity(model, x_t, t)
    return torch.where(expand(y >= 0, v), guided, v)


def total_derivative(model, x_t, r, t, v, y=None, *, gradients=True):
    """Return u(x_t, r, t) and du/dt = ∂u/∂x · v + ∂u/∂t, both shaped like x_t (B, ...).

    One forward-mode pass along (v, 0, 1), so dropout masks are shared by value and derivative. v is
    a velocity of x_t, that of the sample or a mean of many.
    gradients=False returns du/dt as a constant, of which no graph is kept.
    Raises RuntimeError in inference mode.
    """
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        # inference mode would make du/dt zero on torch 2.11
        raise RuntimeError("a derivative needs torch.no_grad(), not torch.inference_mode()")
    net = lambda x, r, t: evaluate(model, x, r, t, y)
    directions = v, torch.zeros_like(r), torch.ones_like(t)
    # attention by torch's math backend, as the fused kernels have no forward mode
    with sdpa_kernel(SDPBackend.MATH), DerivativeRules(gradients):
        u, dudt = torch.func.jvp(net, (x_t, r, t), directions)
    return u, (dudt if gradients else dudt.detach())


def meanflow_loss(
    model, x0, lam, y=None, *, x1=None, r=None, t=None, jump_share=0.25, t_logit=(-0.4, 1.0),
    r_logit=None, reference=None, tangent="conditional", guidance=1.0, p=0.75, c=1e-3,
):  # fmt: skip
    """Return the loss E[w ||e||²], e = u + (t - r) SG_λ[du/dt] - v, w = stopgrad(||e||² + c)^-p.

    model     callable (x, r, t) or, where labels are given, (x, r, t, y) -> u, shaped like x. It
              must treat samples one by one, which batch norm in training mode does not, and embed
              times in low frequencies, since du/dt grows with them
    x0        data (B, ...); x1, r and t must have its dtype and device
    lam       λ in [0, 1], number or 0-dim tensor: 0 is MeanFlow's loss, 1 differentiates all of e.
              The number 0 is cheaper than a tensor that holds 0
    y         labels (B, ...) for a model that takes them
    x1        noise, shaped like x0; if not given, drawn from N(0, I)
    r, t      times (B,), 0 <= r <= t <= 1; if not given, drawn by `sample_times` with t_logit,
              r_logit and jump_share, the share of the batch, in [0, 1], that jumps. The first
              samples jump, so shuffle the batch. Their number is rounded; where that would leave
              only one kind of sample, it is drawn, so that the share is right on average
    reference a pair: more images (M, ...), and their labels (M,), or None where y is not given.
              With it, `mean_velocity` takes the place of v, as target and as conditional tangent,
              which gave better one-step samples. Draw them as x0 is drawn, anew in each step: fixed
              images would bias v, as would all of the data, in which x0 is counted once more. M may
              be 0, and should be many times the number of labels. y must be integers (B,). Takes
              (B + M) numbers of float64 per pixel
    tangent   direction of du/dt: "conditional", the paper's v, with which λ > 0 made one-step
              samples lose their variety, or "marginal", u(x_t, t, t), as in improved MeanFlow
              (arXiv 2512.02012). With the latter, for p = 0, the true u is a stationary point for
              every λ. It takes one more forward pass of the jumps, with a dropout mask of its own
    guidance  ω; unless it is 1, `guided_velocity` takes the place of v in the same way, at one more
              forward pass, which calls the model without labels. Needs labels y (B,), about a
              tenth of them -1, which the model must treat like a missing y
    p, c      power >= 0 and offset > 0 of the adaptive weight; p = 0 is the plain squared error, a
              larger p shifts the solution from the mean towards the mode
    The default times are those of MeanFlow for ImageNet; the default p is the one for CIFAR-10.
    Returns the scalar loss and, for a log, the detached mean of e² in each sample, (B,).
    Raises ValueError naming the argument; values of tensors on a GPU, or under torch.compile, are
    not read, so they are not checked.
    """
    check_arguments(x0, y, lam, tangent, guidance, p, c)
    check_reference(reference, x0, y)
    x1 = torch.randn_like(x0) if x1 is None else alike("x1", x1, x0)
    n = len(x0)
    if r is None and t is None:
        k = number_of_jumps(n, jump_share)
        like = {"device": x0.device, "dtype": x0.dtype}
        r, t = sample_times(n, k, t_logit=t_logit, r_logit=r_logit, **like)
    else:
        check_times(r, t, x0)
        k = n  # any of them may jump

    x_t, v = path(x0, x1, t)
    if reference is not None:
        v = mean_velocity(x_t, t, v, x0, y, reference)
    if guidance != 1:
        v = guided_velocity(model, x_t, t, v, y, guidance)

    # u of all samples, du/dt of the k that jump: elsewhere t - r = 0
    u = torch.empty_like(v, dtype=torch.promote_types(v.dtype, torch.float32))
    dudt = torch.zeros_like(u)
    y_jump, y_flow = (None, None) if y is None else (y[:k], y[k:])
    if k:
        x_jump, r_jump, t_jump, direction = x_t[:k], r[:k], t[:k], v[:k]
        if tangent == "marginal":
            direction = marginal_velocity(model, x_jump, t_jump, y_jump)
        gradients = torch.is_tensor(lam) or lam != 0  # a tensor may be on a GPU: it is not read
        u[:k], dudt[:k] = total_derivative(
            model, x_jump, r_jump, t_jump, direction, y_jump, gradients=gradients
        )
    if k < n:
        u[k:] = evaluate(model, x_t[k:], r[k:], t[k:], y_flow)

    e = u + expand(t - r, u) * sg_lambda(dudt, lam) - v
    square = e.flatten(1).square().sum(1)  # ||e||², (B,)
    weight = (square.detach() + c) ** -p
    err = square.detach() / e[0].numel()  # mean of e² in each sample
    return (weight * square).mean(), err


class Objective(nn.Module):
    """`meanflow_loss` of a model as a module (x0, lam, y=None) -> (loss, err).

    Compile this or wrap it in DistributedDataParallel, not the model, so that the JVP runs inside.
    Compile with dynamic=False, since forward mode does not compile with symbolic sizes, and pass a
    changing λ as a tensor, since each new number would mean another compilation.
    options  keyword arguments of `meanflow_loss`; those of a call take precedence
    """

    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x0, lam, y=None, **options):
        return meanflow_loss(self.model, x0, lam, y, **(self.options | options))


# Sampling, in one step or in several -------------------------------------------------------------


@torch.no_grad()
def sample(model, x1, *, steps=1, y=None, times=None):
    """Return x0 (B, ...), generated from the noise x1 in steps x_r = x_t - (t - r) u(x_t, r, t).

    model  as in `meanflow_loss`; a Module is run in eval mode and then restored, for any other
           callable set the mode yourself
    x1     noise (B, ...) ~ N(0, I), which sets device and dtype
    steps  number of network evaluations, at least 1, on an even grid from t = 1 to 0
    y      labels (B, ...) for a model that takes them
    times  instead of `steps`, the grid itself: decreasing numbers from 1 to 0
    Raises ValueError naming the argument.
    """
    if not (torch.is_tensor(x1) and x1.is_floating_point() and x1.ndim > 1):
        raise ValueError(f"x1 must be a float tensor (B, ...), got {describe(x1)}")
    check_label_count(y, x1)
    x = x1
    modules = model.modules() if isinstance(model, nn.Module) else ()
    # one by one, as model.train() would also switch parts that were in eval mode before
    training = [module for module in modules if module.training]
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
    grid = times.tolist() if hasattr(times, "tolist") else times  # of a tensor or an array
    numbers = isinstance(grid, (list, tuple)) and len(grid) > 1 and all(map(is_number, grid))
    decreasing = numbers and all(t > r for t, r in pairwise(grid))
    if not (decreasing and grid[0] == 1 and grid[-1] == 0):
        raise ValueError(f"times must be numbers that decrease from 1 to 0, got {times!r}")
    return [float(t) for t in grid]


# Derivative rules: what PyTorch's forward mode gets wrong, lacks or does slowly ------------------


class DerivativeRules(TorchFunctionMode):
    """While active, answer calls of the functions in RULES with a forward-mode rule of our own.

    Two rules are needed for right gradients: PyTorch's derivatives of layer norm and instance norm
    treat mean and deviation as constants when differentiated again, as λ > 0 does. Its derivatives
    of group norm and batch norm do not compile. Those of linear layers and convolutions waste time
    on the tangent of the weights, which is zero. Attention is called without autocast. All else is
    left to PyTorch.
    It does not matter who calls the functions: torch's layers, another library or your network.
    Only the calls that torch's own functions make, such as the linear layers in
    F.multi_head_attention_forward, are not seen.
    gradients=False keeps no graph of the tangents that the rules make, as λ = 0 allows.
    """

    def __init__(self, gradients):
        super().__init__()
        self.gradients = gradients

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in ATTENTION:
            return without_autocast(function, args, kwargs)
        rule = RULES.get(function)
        if rule is None or all(unpacked(z)[1] is None for z in (*args, *kwargs.values())):
            return function(*args, **kwargs)
        x, *rest = args or [kwargs.pop("input")]
        x, dx = unpacked(x)
        primal = lambda z: unpacked(z)[0]  # so that PyTorch makes no derivative of its own
        y = function(x, *map(primal, rest), **{name: primal(z) for name, z in kwargs.items()})
        dx = torch.zeros_like(x) if dx is None else dx
        with nullcontext() if self.gradients else torch.no_grad():
            dy = rule(x, dx, *rest, **kwargs).to(y.dtype)
        if not self.gradients:
            dy = dy.detach()  # a view made under no_grad would refuse to be changed in place
        return forward_ad.make_dual(y, dy)


ATTENTION = F.scaled_dot_product_attention, F.multi_head_attention_forward


def without_autocast(function, args, kwargs):
    """Cast the arguments as autocast would, and call the function without it.

    Usually autocast acts on attention as a whole. In torch.func.jvp it acts on each operation that
    attention consists of, and makes the softmax of bf16 scores float32; on a GPU, PyTorch 2.11
    refuses the backward pass of that. Without autocast the math backend computes in float32, as
    usual.
    """
    device = next(z.device.type for z in (*args, *kwargs.values()) if torch.is_tensor(z))
    if device == "meta" or not torch.is_autocast_enabled(device):
        return function(*args, **kwargs)
    low = torch.get_autocast_dtype(device)
    castable = torch.float32, torch.float16, torch.bfloat16  # autocast leaves float64 alone
    cast = lambda z: z.to(low) if torch.is_tensor(z) and z.dtype in castable else z
    with torch.autocast(device, enabled=False):
        return function(*map(cast, args), **{name: cast(z) for name, z in kwargs.items()})


def unpacked(z):
    """Return a tensor without its tangent, and the tangent; of anything else itself, and None."""
    primal, tangent = forward_ad.unpack_dual(z) if torch.is_tensor(z) else (z, None)
    # z itself, as autocast caches the casts of weights, but not of a view such as primal
    return (z if tangent is None else primal), tangent


# A rule takes x without its tangent, the tangent dx and the function's further arguments, and
# returns the tangent of y. Weights that the network computes from x or t come with their tangents.


def linear_rule(function, x, dx, weight, bias=None, *args, **kwargs):
    """y = W x + b, W a matrix or a kernel:  dy = W dx + dW x + db."""
    (weight, dweight), (_, dbias) = unpacked(weight), unpacked(bias)
    dy = function(dx, weight, None, *args, **kwargs)
    if dweight is None and dbias is None:
        return dy
    dweight = torch.zeros_like(weight) if dweight is None else dweight
    return dy + function(x, dweight, dbias, *args, **kwargs)


def normalized(x, dx, size, eps):
    """n = (x - mean(x)) / std(x), mean and std over each `size` neighbouring elements of x:
    dn = (dx - mean(dx) - n mean(n dx)) / std(x). Returns n and dn.

    dn is a symmetric matrix times dx. So the backward pass of a layer norm, which multiplies by the
    transpose, computes it, too, and of that PyTorch has the right derivative.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, drows = (z.to(wide).reshape(-1, size) for z in (x, dx))
    n, mean, rstd = torch.native_layer_norm(rows, [size], None, None, eps)
    backward, wanted = torch.ops.aten.native_layer_norm_backward, [True, False, False]
    dn, _, _ = backward(drows, rows, [size], mean, rstd, None, None, wanted)
    return n.view(x.shape), dn.view(x.shape)


def affine(n, dn, weight, bias, shape):
    """y = w n + b, with w and b viewed in the shape. Returns dy = w dn + dw n + db."""
    (weight, dweight), (_, dbias) = unpacked(weight), unpacked(bias)
    dy = dn if weight is None else weight.view(shape) * dn
    dy = dy if dweight is None else dy + dweight.view(shape) * n
    return dy if dbias is None else dy + dbias.view(shape)


def per_channel(x):
    """Return the shape (C, 1, ...) in which weights (C,) multiply x (B, C, ...)."""
    return -1, *[1] * (x.ndim - 2)


def layer_norm_rule(x, dx, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    n, dn = normalized(x, dx, math.prod(normalized_shape), eps)
    return affine(n, dn, weight, bias, normalized_shape)


def group_norm_rule(x, dx, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    n, dn = normalized(x, dx, x.shape[1:].numel() // num_groups, eps)
    return affine(n, dn, weight, bias, per_channel(x))


def batch_norm_rule(x, dx, running_mean, running_var, weight=None, bias=None, training=False,
                    momentum=0.1, eps=1e-5, cudnn_enabled=True):  # fmt: skip
    """y = w n + b, n = (x - running mean) / running std:  dn = dx / running std."""
    if training:
        raise ValueError("model must treat samples one by one; batch norm mixes them in training")
    shape = per_channel(x)
    mean, rstd = running_mean.view(shape), (running_var + eps).rsqrt().view(shape)
    return affine((x - mean) * rstd, dx * rstd, weight, bias, shape)


def instance_norm_rule(x, dx, running_mean=None, running_var=None, weight=None, bias=None,
                       use_input_stats=True, momentum=0.1, eps=1e-5,
                       cudnn_enabled=True):  # fmt: skip
    if use_input_stats:
        return group_norm_rule(x, dx, x.shape[1], weight, bias, eps)
    return batch_norm_rule(x, dx, running_mean, running_var, weight, bias, eps=eps)


def reordered(rule):
    """Return the rule of F's function for torch's of the same name, which takes weights first."""

    def reorder(x, dx, weight, bias, running_mean, running_var, *rest, **named):
        return rule(x, dx, running_mean, running_var, weight, bias, *rest, **named)

    return reorder


LINEAR = F.linear, torch.conv1d, torch.conv2d, torch.conv3d
RULES = {  # F.conv2d is torch.conv2d, but norms exist twice
    **{function: partial(linear_rule, function) for function in LINEAR},
    F.layer_norm: layer_norm_rule,
    torch.layer_norm: layer_norm_rule,
    F.group_norm: group_norm_rule,
    torch.group_norm: group_norm_rule,
    F.instance_norm: instance_norm_rule,
    torch.instance_norm: reordered(instance_norm_rule),
    F.batch_norm: batch_norm_rule,
    torch.batch_norm: reordered(batch_norm_rule),
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
        self.time = nn.Linear(20, features)  # sine and cosine of two times, in five frequencies
        self.mix = nn.Linear(features, features)

    def forward(self, r, t, y):
        frequencies = 2.0 ** torch.arange(-3, 2, dtype=t.dtype, device=t.device)
        angles = torch.stack((t, t - r), 1)[:, :, None] * frequencies  # (B, 2, 5)
        waves = torch.cat((angles.cos(), angles.sin()), 1).flatten(1)  # (B, 20)
        return F.silu(self.mix(F.silu(self.time(waves) + self.label(1 + y.clamp(min=-1)))))


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


class Block(nn.Module):
    """Residual block: norm, SiLU, convolution, twice, the second norm scaled and shifted by the
    embedding; then, if asked for, self-attention over all pixels."""

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
    dropout      probability, as in nn.Dropout
    Raises ValueError for sizes that are not positive or do not divide.
    """

    def __init__(
        self, channels, *, size, width=32, multipliers=(1, 2), blocks=1, attention=1, patch=1,
        classes=0, dropout=0.0,
    ):  # fmt: skip
        super().__init__()
        config = dict(
            channels=channels, size=size, width=width, multipliers=multipliers, blocks=blocks,
            attention=attention, patch=patch, classes=classes, dropout=dropout,
        )  # fmt: skip
        self.config = config  # what a checkpoint needs to build the network again
        self.shape, self.patch, self.classes = (channels, size, size), patch, classes
        widths = [width * multiplier for multiplier in multipliers]
        if not widths or min(channels, size, patch, blocks, *widths) < 1 or classes < 0:
            raise ValueError(f"sizes must be positive, got {config}")
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
        if not self.classes:
            raise ValueError(f"y must be left out: no classes, got {describe(y)}")
        if not (torch.is_tensor(y) and y.dtype == torch.int64 and y.shape == r.shape):
            raise ValueError(f"y must be int64 {tuple(r.shape)}, got {describe(y)}")
        if is_free_to_read(y) and y.max() >= self.classes:
            raise ValueError(f"y must be below {self.classes}, got {y.max()}")


# Arguments: what is refused, and in which words -------------------------------------------------


def check_arguments(x0, y, lam, tangent, guidance, p, c):
    if not (torch.is_tensor(x0) and x0.is_floating_point() and x0.ndim > 1 and x0.numel()):
        raise ValueError(f"x0 must be a float tensor (B, ...), got {describe(x0)}")
    check_label_count(y, x0)
    if not is_number(guidance):
        raise ValueError(f"guidance must be a number, got {describe(guidance)}")
    if guidance != 1 and (y is None or y.ndim != 1):
        raise ValueError(f"guidance {guidance!r} needs labels y of shape (B,)")
    if torch.is_tensor(lam):
        right = lam.ndim == 0 and (not is_free_to_read(lam) or 0 <= lam <= 1)
    else:
        right = is_number(lam, 0, 1)
    if not right:
        raise ValueError(f"lam must be a number in [0, 1], got {describe(lam)}")
    if tangent not in ("conditional", "marginal"):
        raise ValueError(f"tangent must be 'conditional' or 'marginal', got {tangent!r}")
    if not (is_number(p, 0) and is_number(c, 0) and c > 0):
        raise ValueError(f"p must be >= 0 and c > 0, got p={describe(p)}, c={describe(c)}")


def check_reference(reference, x0, y):
    if reference is None:
        return
    if not (isinstance(reference, (tuple, list)) and len(reference) == 2):
        raise ValueError(f"reference must be (images, labels), got {describe(reference)}")
    images, labels = reference
    n = len(images) if torch.is_tensor(images) and images.ndim else 0
    alike("images of reference", images, x0[:1].expand(n, *x0.shape[1:]))
    if y is None and labels is not None:
        raise ValueError("reference has labels, but y is missing")
    if y is not None and (y.ndim != 1 or y.is_floating_point()):
        raise ValueError(f"reference needs integer labels y of shape (B,), got {describe(y)}")
    if y is not None:
        alike("labels of reference", labels, y[:1].expand(n))


def check_logit(name, logit):
    pair = isinstance(logit, (tuple, list)) and len(logit) == 2
    if not (pair and is_number(logit[0]) and is_number(logit[1], 0)):
        raise ValueError(f"{name} must be a mean and a deviation >= 0, got {logit!r}")


def check_times(r, t, x0):
    if r is None or t is None:
        raise ValueError("r and t must be given together")
    one_each = x0.new_empty(len(x0))
    alike("r", r, one_each)
    alike("t", t, one_each)
    wrong = ~((r >= 0) & (r <= t) & (t <= 1))
    if is_free_to_read(wrong) and wrong.any():
        pair = f"r = {r[wrong][0].item()}, t = {t[wrong][0].item()}"
        raise ValueError(f"need 0 <= r <= t <= 1, got a sample with {pair}")


def check_label_count(y, x):
    if y is not None and not (torch.is_tensor(y) and y.shape[:1] == x.shape[:1]):
        raise ValueError(f"y must be a tensor with a label for each sample, got {describe(y)}")


def alike(name, z, wanted):
    """Return z if it has the shape, dtype and device of the tensor `wanted`."""
    properties = lambda z: (z.shape, z.dtype, z.device)
    if not torch.is_tensor(z) or properties(z) != properties(wanted):
        raise ValueError(f"{name} must be {describe(wanted)}, got {describe(z)}")
    return z


def is_number(z, low=-math.inf, high=math.inf):
    """Whether z is a finite number from low to high, both included."""
    return isinstance(z, Real) and low <= z <= high and abs(z) < math.inf


def is_free_to_read(z):
    """Whether the tensor's value can be seen without waiting for a device or breaking a graph."""
    return z.device.type == "cpu" and not torch.compiler.is_compiling()


def describe(z):
    """Return what an error says of z: dtype, shape and device, a number or string, or its type."""
    if torch.is_tensor(z) and z.ndim:
        return f"{z.dtype} {tuple(z.shape)} on {z.device}"
    return repr(z) if torch.is_tensor(z) or isinstance(z, Real | str) else type(z).__name__


# Training. If you have a loop of your own, cut the file here -------------------------------------

import argparse
import atexit
import copy
import json
import os
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

from torch import distributed as dist
from torch.optim.swa_utils import get_ema_multi_avg_fn

FORMAT = "meanflow 6"  # of checkpoints
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
CLIP = 20.0  # largest norm of the gradient
MUON_RATE = 2.5  # learning rate of Muon as a multiple of Adam's
LABEL_DROPOUT = 0.1  # share of labels that guidance takes away
# steps in a row without a finite gradient, after which training ends at the next row of the log
PATIENCE = 20
# settings that may change on --resume, besides the steps where nothing depends on their number
MAY_CHANGE = {"data", "out", "device", "compile", "resume", "log_every", "save_every"}


class UserError(ValueError):
    """A mistake of the user's, which `run` shows in one line."""


def train(model, images, labels, args, *, flip=False):
    """Train the UNet `model`; write checkpoint.pt, log.csv and pictures into args.out.

    images  uint8 (N, C, H, W)
    labels  int64 (N,), or None for an unconditional model
    args    settings, from `train_parser`
    flip    mirror each image with probability 1/2
    Under torchrun each process takes its part of the batch, and the first one writes. Returns the
    model with the averaged weights, in eval mode. Raises UserError for what the user can mend, and
    SystemExit after SIGINT or SIGTERM, once the checkpoint is written.
    """
    launched = all(os.environ.get(k) for k in ("RANK", "WORLD_SIZE"))  # by torchrun or its like
    rank, world = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE")) if launched else (0, 1)
    args = completed(args, world)
    args.world, args.flip = world, flip  # saved, as --resume must find them the same
    check_data(model, images, labels, args)
    device, out = torch.device(args.device), Path(args.out)
    images = images.to(device)
    labels = None if labels is None else labels.to(device)
    model.to(device).train()
    average, blend = copy.deepcopy(model), get_ema_multi_avg_fn(args.ema)
    adam = torch.optim.Adam(model.parameters(), betas=(0.9, args.beta2), fused=True)
    muon = Muon(model) if args.optimizer == "muon" else None
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    parts = {"model": model, "ema": average, "adam": adam, "scaler": scaler}
    if muon:
        parts["muon"] = muon

    with sole_user(out, rank), noted_signals(world) as signals:
        state = resume(out, parts, args, rank)
        objective = prepared_objective(model, args, device, world)
        if args.compile and rank == 0:
            show("compiling: the first step can take minutes")
        recent, mark = [], time.perf_counter()
        skipped = torch.zeros((), device=device)  # steps in a row, up to now, without an update
        for done in range(state["step"], args.steps):
            # seeded by the step, so that there is no state of random numbers to save
            torch.manual_seed(hash((args.seed, done, rank)))
            x0, y = draw_batch(images, labels, args.batch_size // world, flip, args.guidance)
            more = draw_batch(images, labels, args.reference, flip) if args.reference else None
            share = args.jump_share if done >= flow_steps(args) else 0.0
            lam, tangent = lambda_and_tangent(done, args)
            with torch.autocast(device.type, PRECISIONS[args.amp], enabled=args.amp != "off"):
                loss, err = objective(x0, lam, y, tangent=tangent, jump_share=share, reference=more)
            norm = update(loss, model, adam, muon, scaler, learning_rate(done, args))
            skipped = torch.where(norm.isfinite(), 0, skipped + 1)
            if done == 0:  # the average starts from here, not from the initial weights
                average.load_state_dict(model.state_dict())
            else:
                blend([*average.parameters()], [*model.parameters()], None)
            state["step"] = step = done + 1

            jumps = number_of_jumps(len(x0), share)
            means = loss.detach(), err[jumps:].mean(), err[:jumps].mean(), norm
            recent.append(torch.stack(means))  # stays on the device, so nothing waits for it
            signalled = signals[0] if signals else None  # read once: it may come any time
            saves = signalled or step in (1, args.steps) or step % args.save_every == 0
            if not (saves or step % args.log_every == 0):
                continue
            measured = torch.stack(recent).cpu()
            seconds = time.perf_counter() - mark
            state["seconds"] += seconds
            report(state, measured, lam, seconds / len(measured), args, rank)
            lost = skipped >= PATIENCE
            if rank == 0 and saves and not lost:
                save_checkpoint(out, parts, args, state)
            if rank == 0:
                write_log(state["log"], out)  # second: --resume refuses a log without a checkpoint
            if lost:
                message = f"no finite gradient in {skipped:.0f} steps to {step}: a lower --lr?"
                raise UserError(message)
            if rank == 0 and saves:
                save_images(draw(average, 80, seed=args.seed), out / f"step-{step:06}.png")
            if signalled and step < args.steps:
                show(f"\nstopped after step {step}; the same command with --resume goes on")
                raise SystemExit(128 + signalled)
            recent, mark = [], time.perf_counter()  # saving is no part of the pace
        if rank == 0:
            grids = [draw(average, 40, steps=n, seed=args.seed) for n in (1, 2, 4)]
            save_images(torch.cat(grids), out / "samples.png")
    return average.eval()


def prepared_objective(model, args, device, world):
    """Return the Objective of the model, compiled and distributed as the settings say."""
    names = "t_logit", "r_logit", "guidance"
    objective = Objective(model, **{name: getattr(args, name) for name in names})
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # it would split the graph within the JVP
        objective.compile(dynamic=False)
    if world == 1:
        return objective
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return nn.parallel.DistributedDataParallel(objective)


def draw_batch(images, labels, n, flip, guidance=1.0):
    """Return n random images x0 in [-1, 1] and their labels, a share of which guidance drops."""
    i = torch.randint(len(images), (n,), device=images.device)
    x0 = images[i].float() / 127.5 - 1
    y = None if labels is None else labels[i]
    if flip:
        x0 = torch.where(torch.rand_like(x0[:, :1, :1, :1]) < 0.5, x0.flip(3), x0)
    if guidance != 1:
        y = torch.where(torch.rand(n, device=y.device) < LABEL_DROPOUT, -1, y)
    return x0, y


def flow_steps(args):
    """Return for how many steps, at the start, training is flow matching: no sample jumps."""
    return round(args.flow_first * args.steps)


def lambda_and_tangent(step, args):
    """Return λ of a step, counted from 0, and the direction of du/dt.

    λ is a number. If the loss is compiled, for which every number would mean another compilation,
    it is a tensor unless it stays 0.
    """
    curriculum = {"warmup": args.lambda_warmup, "maximum": args.lambda_max}
    schedule = lambda_schedule(args.lambda_schedule, **curriculum)
    lam = schedule(max(0, step - flow_steps(args)))  # flow matching has no use for λ
    modulated = max(lam, schedule(args.steps)) > 0  # or will be, so that a rising λ needs one graph
    tangent = args.tangent
    if tangent == "mixed":  # λ > 0 along the conditional one costs variety, see the README
        tangent = "marginal" if modulated else "conditional"
    if args.compile and modulated:
        lam = torch.full((), lam, device=args.device)
    return lam, tangent


def learning_rate(step, args):
    """Return the rate of a step, counted from 0: it rises during the warm-up, and may decay."""
    rise = min(1.0, (step + 1) / args.lr_warmup)
    decay = (1 + math.cos(math.pi * step / args.steps)) / 2 if args.lr_decay else 1.0
    return args.lr * rise * decay


def update(loss, model, adam, muon, scaler, lr):
    """Take a step and return the gradient's norm; where that is not finite, change nothing."""
    adam.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(adam)
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    finite = norm.isfinite()
    if muon:
        muon.param_groups[0]["lr"] = MUON_RATE * lr
        muon.step(finite)
    adam.param_groups[0]["lr"] = lr
    adam.found_inf = (~finite).float()  # which makes fused Adam change nothing
    adam.step()
    scaler.update()
    return norm


class Muon(torch.optim.Muon):
    """torch's Muon for the convolutions of a UNet between the first and the last one.

    It sees each kernel as a matrix (outputs, all else) that shares the kernel's storage. Updates
    have the size (RMS) of Adam's, after Liu et al. 2025, arXiv:2502.16982. The momentum of 0.9 was
    a little better than torch's default of 0.95 in short trainings on MNIST. Weights decay by the
    default of 0.1.
    """

    def __init__(self, model):
        layers = [layer for layer in model.levels.modules() if isinstance(layer, nn.Conv2d)]
        self.kernels = [layer.weight for layer in layers]
        matrices = [nn.Parameter(kernel.detach().view(len(kernel), -1)) for kernel in self.kernels]
        super().__init__(matrices, momentum=0.9, adjust_lr_fn="match_rms_adamw")

    def step(self, finite):
        """Use up the kernels' gradients, so that Adam finds none; step if they are `finite`."""
        for matrix, kernel in zip(self.param_groups[0]["params"], self.kernels, strict=True):
            matrix.grad, kernel.grad = kernel.grad.flatten(1), None
        if finite:  # this waits for a GPU, unlike Adam's found_inf
            with Float32OnCPU():
                super().step()


class Float32OnCPU(TorchFunctionMode):
    """Keep float32 where torch's Muon calls .bfloat16(), as many CPUs emulate it, slowly."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.bfloat16 and args[0].device.type == "cpu":
            return args[0].clone()  # Muon goes on in place
        return function(*args, **kwargs or {})


def report(state, measured, lam, pace, args, rank):
    """Add a row to the log in `state`, of the steps whose gradient is finite, and print it.

    measured  loss, both errors and the gradient's norm of each step since the last row, (n, 4); of
              several processes, those of this one
    pace      seconds a step took
    """
    step, finite = state["step"], measured[:, 3].isfinite()
    loss, flow, jump, norm = measured[finite].nanmean(0).tolist()  # without jumps, jump is nan
    row = {"step": step, "loss": loss, "err_flow": flow, "err_jump": jump, "lambda": float(lam)}
    row |= {"grad_norm": norm, "skipped": int((~finite).sum())}
    row |= {"images_per_second": args.batch_size / pace, "seconds": state["seconds"]}
    state["log"].append(row)
    if rank == 0:
        left = round((args.steps - step) * pace)
        line = f"{step}/{args.steps}  err {flow:.4f} (r = t)"
        if not math.isnan(jump):
            line += f" {jump:.4f} (r < t)  lambda {lam:.2f}"
        if step > 1:  # the first step is slower, above all if it compiles
            line += f"  {args.batch_size / pace:.0f} images/s  {left // 60}:{left % 60:02} left "
        terminal = sys.stdout is not None and sys.stdout.isatty()
        show(line, end="\033[K\r" if terminal and left else "\n")


def show(line, end="\n"):
    """Print a line. If that fails, as after Ctrl-C in `train_mnist.py | tee`, fall silent."""
    try:
        print(line, end=end, flush=True)
    except OSError:
        sys.stdout = None  # where print writes nothing


def write_log(rows, out):
    lines = [",".join(rows[0]), *(",".join(f"{z:.8g}" for z in row.values()) for row in rows)]
    with replacing(out / "log.csv") as file:
        file.write_text("\n".join([*lines, ""]), encoding="utf-8")


@contextmanager
def sole_user(out, rank):
    """Lock the folder against another training; the lock ends with the process, however it ends."""
    from filelock import FileLock, Timeout  # which torch itself requires

    if rank:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(out / ".lock").acquire(timeout=0)
    except Timeout:
        raise UserError(f"another training is at work in {out}") from None
    with lock:
        yield


@contextmanager
def noted_signals(world):
    """Yield a list that SIGINT and SIGTERM are appended to when they come. Several processes could
    not agree on the step to stop at: there a signal ends them, and the last checkpoint counts."""
    kinds = (signal.SIGINT, signal.SIGTERM) if world == 1 else ()
    usual = {kind: signal.getsignal(kind) for kind in kinds}
    noted = []

    def note(kind, frame):
        noted.append(kind)
        for each, handler in usual.items():  # so that a second one of either ends it at once
            signal.signal(each, handler)

    for kind in kinds:
        signal.signal(kind, note)
    try:
        yield noted
    finally:
        for kind, handler in usual.items():
            signal.signal(kind, handler)


# Checkpoints, data and pictures ------------------------------------------------------------------


def save_checkpoint(out, parts, args, state):
    if not all(p.isfinite().all() for p in parts["model"].parameters()):
        raise UserError(f"weights are not finite after step {state['step']}, so they are not saved")
    content = {"format": FORMAT, **settings(parts["model"], args), **state}
    content |= {name: part.state_dict() for name, part in parts.items()}
    with replacing(out / "checkpoint.pt") as temporary:
        torch.save(content, temporary)


def settings(model, args):
    """Return the settings of network and training in the types that any checkpoint can hold."""
    return json.loads(json.dumps({"unet": model.config, "args": vars(args)}, default=str))


def resume(out, parts, args, rank):
    """Return the state to start from: step, seconds and log; load that of `parts`, if there is one.

    Raises UserError where this would overwrite a training, or go on with other settings.
    """
    state = {"step": 0, "seconds": 0.0, "log": []}
    file, log = out / "checkpoint.pt", out / "log.csv"
    if args.resume and file.exists():
        checkpoint, new = load_checkpoint(file), settings(parts["model"], args)
        with reading(file):
            # older checkpoints know nothing of these two
            was = {"flow_first": 0.0, "reference": 0} | checkpoint["unet"] | checkpoint["args"]
            now = new["unet"] | new["args"]
            extendable = not (args.lr_decay or args.flow_first)
            free = MAY_CHANGE | {"steps"} if extendable else MAY_CHANGE
            for name in sorted(was.keys() - free):
                if was[name] != now.get(name):
                    change = f"{name.replace('_', '-')} was {was[name]}, not {now.get(name)}"
                    raise UserError(f"cannot go on from {file}: {change}")
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
            return {name: checkpoint[name] for name in state}
    if rank == 0 and file.exists():
        raise UserError(f"{file} exists: --resume its training, or name another --out")
    if rank == 0 and log.exists():
        raise UserError(f"{log} exists, but no checkpoint.pt beside it: name another --out")
    return state


def load_checkpoint(file):
    """Return the dict that `train` saved. Raises UserError for a missing or another file."""
    with reading(file), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about other kinds of files, which get an error anyway
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        if checkpoint["format"] != FORMAT:
            raise UserError(f"{file} was written by another version of meanflow.py")
    return checkpoint


def load_model(file):
    """Return the UNet with the averaged weights that `train` saved, in eval mode."""
    checkpoint = load_checkpoint(file)
    with reading(file):
        model = UNet(**checkpoint["unet"])
        model.load_state_dict(checkpoint["ema"])
    return model.eval()


@contextmanager
def reading(file):
    """Name the file in whatever goes wrong while its content is taken for a checkpoint."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # other files and damaged ones can make torch.load raise anything
        if is_lack_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or "damaged, or another kind of file"
        raise UserError(f"cannot read a checkpoint from {file}: {reason}") from error


@contextmanager
def replacing(file):
    """Yield a temporary name, which replaces `file` in one move when all has gone well."""
    temporary = Path(file).with_name(f".{Path(file).name}.partial")
    try:
        yield temporary
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter
        reason = getattr(error, "strerror", None) or f"is the disk full? {error}"
        raise UserError(f"cannot write {file}: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_dataset(dataset, folder):
    """Return torchvision's training set `dataset` in the folder, downloaded if it is not there."""
    from filelock import FileLock

    try:
        try:
            return dataset(folder)
        except RuntimeError:  # it is not there; of several processes, one downloads
            Path(folder).mkdir(parents=True, exist_ok=True)
            with FileLock(Path(folder) / ".download.lock"):
                return dataset(folder, download=True)
    except Exception as error:  # as many kinds as there are faults of servers and of files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        missing = f"no complete {dataset.__name__} in {folder} and no download ({reason})"
        raise UserError(f"{missing}: copy it there, or name its folder with --data") from error


def check_data(model, images, labels, args):
    uint8 = torch.is_tensor(images) and images.dtype == torch.uint8
    if not (uint8 and images.shape[1:] == model.shape and len(images)):
        raise UserError(f"images must be uint8 (N, *{model.shape}), got {describe(images)}")
    if labels is None:
        if model.classes or args.guidance != 1:
            raise UserError("--guidance and a model with classes need labels: --class-cond")
        return
    int64 = torch.is_tensor(labels) and labels.dtype == torch.int64
    if not (int64 and labels.shape == images.shape[:1]):
        raise UserError(f"labels must be int64 ({len(images)},), got {describe(labels)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= model.classes:
        raise UserError(f"labels go from {low} to {high}, the model has {model.classes} classes")


def draw(model, num, *, steps=1, seed=0, label=None):
    """Return `num` images (num, C, H, W) of a UNet from fixed noise, its classes taken in turn or
    all of one label."""
    x1 = torch.randn(num, *model.shape, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(num) % max(1, model.classes) if label is None else torch.full((num,), label)
    device, images = next(model.parameters()).device, []
    for x, labels in zip(x1.to(device).split(500), y.to(device).split(500), strict=True):
        images.append(sample(model, x, steps=steps, y=labels if model.classes else None))
    return torch.cat(images)


def save_images(images, file):
    """Write images (B, C, H, W), ten in a row, or one image (C, H, W), in [-1, 1], into a PNG."""
    from torchvision.utils import save_image

    with replacing(file) as temporary:
        save_image(images, temporary, nrow=10, normalize=True, value_range=(-1, 1), format="png")


# The command line --------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def __init__(self, description):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")  # without the usage


def run(main, argv=None):
    """Call main(argv) for a script: a mistake of the user's ends it with one line and status 2."""
    warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)  # of torch's own code
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it
    try:
        main(argv)
    except (UserError, OSError, ImportError) as error:
        Parser(None).error(str(error))
    except RuntimeError as error:
        if not is_lack_of_memory(error):
            raise
        Parser(None).error(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def is_lack_of_memory(error):
    """Whether the error is PyTorch's for too little memory, of a GPU or of the CPU."""
    return any(words in str(error) for words in ("out of memory", "can't allocate memory"))


def number(kind, low, high):
    """Return the argparse type of numbers from low to high, which nan is not."""

    def checked(text):
        value = kind(text)
        if not is_number(value, low, high):
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, got {text}")
        return value

    checked.__name__ = kind.__name__  # which argparse calls it if `kind` raises ValueError
    return checked


def not_empty(text):
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def devices():
    """Return what --device may name, its default first."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cuda", *gpus, "cpu"] if gpus else ["cpu"]


COUNT, SEED = number(int, 1, 10**9), number(int, 0, 2**63 - 1)
POSITIVE, SHARE, DECAY = number(float, 1e-12, 1e6), number(float, 0, 1), number(float, 0, 1 - 1e-9)


def train_parser(description, **defaults):
    """Return the command line of a training script, which may set defaults of its own."""
    parser = Parser(description)
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    normal = {"type": number(float, -100, 100), "nargs": 2, "metavar": ("MEAN", "STD")}
    flag("--data", type=not_empty, default="data", help="folder of the data, downloaded if absent")
    flag("--out", type=not_empty, default="runs", help="folder for checkpoint, log and pictures")
    flag("--steps", type=COUNT, default=100_000, help="training steps")
    flag("--batch-size", type=COUNT, default=64, help="images per step, over all processes")
    flag("--optimizer", choices=["adam", "muon"], default="adam", help="muon: Muon for the inner "
         "convolutions, Adam for the rest")  # fmt: skip
    flag("--lr", type=POSITIVE, default=1e-3, help="peak learning rate of Adam")
    flag("--lr-warmup", type=COUNT, help="steps of its rise; without it a 50th of all")
    flag("--lr-decay", action=switch, default=False, help="let it fall to 0 along a cosine")
    flag("--beta2", type=DECAY, default=0.999, help="decay of Adam's second moment")
    flag("--ema", type=DECAY, default=0.999, help="decay of the averaged weights, per step")
    flag("--lambda-schedule", choices=LAMBDA_SCHEDULES, help="curriculum; without it lambda is 0")
    flag("--lambda-max", type=SHARE, help="largest lambda; without it 1; 0 is lambda = 0")
    flag("--lambda-warmup", type=COUNT, help="steps of the change, after those of --flow-first; "
         "without it a quarter of all")  # fmt: skip
    flag("--reference", type=number(int, 0, 10**6), default=0, help="images that a process draws "
         "besides its batch, for the mean of v over all of them; 0 is off")  # fmt: skip
    tangents = "conditional", "marginal", "mixed"
    flag("--tangent", choices=tangents, default="mixed", help="direction of du/dt; mixed: marginal "
         "while lambda is, or will be, above 0, otherwise conditional")  # fmt: skip
    flag("--flow-first", type=SHARE, default=0.0, help="share of the steps, at the start, that "
         "train flow matching: no sample jumps, err_jump is nan, and lambda waits")  # fmt: skip
    flag("--jump-share", type=SHARE, default=0.25, help="share of samples that jump, with r < t; "
         "at 0 and 1 one of the two errors is nan")  # fmt: skip
    flag("--t-logit", **normal, default=[-0.4, 1.0], help="normal draws of logit(t)")
    flag("--r-logit", **normal, help="of logit(r), clipped to t; without it sorted draws of t")
    flag("--class-cond", action=switch, default=False, help="condition on the labels")
    flag("--guidance", type=number(float, 0, 100), default=1.0, help="guidance to learn; 1 is off")
    flag("--seed", type=SEED, default=0, help="seed of all random numbers")
    flag("--device", choices=devices(), default=devices()[0], help="device to train on")
    flag("--amp", choices=PRECISIONS, help="precision of the network, off: float32; without it "
         "off on a CPU, bf16 on a GPU that has it, otherwise fp16")  # fmt: skip
    flag("--compile", action=switch, help="compile the loss; by default on a GPU only")
    flag("--resume", action="store_true", help="go on from the checkpoint in --out, if any")
    flag("--log-every", type=COUNT, default=20, help="steps per row of log.csv and progress line")
    flag("--save-every", type=COUNT, default=500, help="steps between checkpoints with a picture")
    parser.set_defaults(**defaults)
    return parser


def completed(args, world):
    """Return the settings with those filled in that depend on others; refuse what cannot be."""
    args = argparse.Namespace(**vars(args))
    cuda = args.device.startswith("cuda")
    if cuda and world > 1:
        args.device = f"cuda:{os.environ.get('LOCAL_RANK') or 0}"
    if args.amp is None:
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp = "bf16" if bf16 else "fp16" if cuda else "off"
    if args.compile is None:
        args.compile = cuda
    if args.amp == "fp16" and not cuda:
        raise UserError("--amp fp16 needs a GPU; --amp bf16 does not")
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} is not divisible by {world} processes")
    each = args.batch_size // world
    if 0 < args.jump_share < 1 and round(args.jump_share * each) in (0, each):
        raise UserError(f"--jump-share {args.jump_share} of {each} images is none or all of them")
    if args.lambda_schedule is None:
        if (args.lambda_max, args.lambda_warmup) != (None, None):
            raise UserError("--lambda-max and --lambda-warmup need a --lambda-schedule")
        args.lambda_schedule, args.lambda_max = "constant", 0.0
    if args.lambda_max is None:
        args.lambda_max = 1.0
    if args.lambda_schedule == "constant":
        args.lambda_warmup = 1  # unused; the same for --resume, whatever the number of steps
    args.lambda_warmup = args.lambda_warmup or max(1, args.steps // 4)
    args.lr_warmup = args.lr_warmup or max(1, args.steps // 50)
    if args.lr_warmup > args.steps:
        raise UserError(f"--lr-warmup {args.lr_warmup} is beyond --steps {args.steps}")
    left = args.steps - flow_steps(args)
    if args.lambda_schedule != "constant" and args.lambda_warmup > left:
        raise UserError(f"--lambda-warmup {args.lambda_warmup}: only {left} steps are left for it")
    for flag, pair in ("--t-logit", args.t_logit), ("--r-logit", args.r_logit):
        if pair is not None and pair[1] < 0:
            raise UserError(f"{flag} {pair[0]} {pair[1]}: the standard deviation is below 0")
    return args


def main(argv=None):
    """Draw samples from a checkpoint, into one PNG or into a folder with a PNG for each."""
    parser = Parser(main.__doc__)
    flag = parser.add_argument
    flag("checkpoint", help="file that training wrote")
    flag("--steps", type=COUNT, default=1, help="network evaluations per image")
    flag("--num", type=COUNT, default=80, help="number of images")
    flag("--label", type=number(int, 0, 10**9), help="class of all images; without it in turn")
    flag("--out", type=not_empty, default="samples.png", help="a .png for a grid, or a new folder")
    flag("--seed", type=SEED, default=0, help="seed of the noise")
    flag("--device", choices=devices(), default=devices()[0], help="device to draw on")
    args = parser.parse_args(argv)
    out = Path(args.out)
    grid = out.suffix.lower() == ".png"
    if not grid and out.suffix and not out.is_dir():
        raise UserError(f"--out {out} must end in .png, or be a folder")
    if not grid and out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out} holds files, which would pass for samples")
    model = load_model(args.checkpoint).to(args.device)
    if args.label is not None and args.label >= model.classes:
        raise UserError(f"--label {args.label}: the model has {model.classes} classes")
    (out.parent if grid else out).mkdir(parents=True, exist_ok=True)
    images = draw(model, args.num, steps=args.steps, seed=args.seed, label=args.label)
    for i, picture in enumerate([images] if grid else images):
        save_images(picture, out if grid else out / f"{i:06}.png")


if __name__ == "__main__":  # python meanflow.py CHECKPOINT
    run(main)
