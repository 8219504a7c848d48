"""What a MeanFlow step costs, as a ratio to a flow-matching step of the same network.

Forward, backward and Adam on random images. All ways take turns in one process; the table has the
median of the rounds (of processor time on a CPU), their quartiles, the ratio that counting gives
and how far the measured one is above it. A backward pass counts as two forward passes, a tangent as
one. So flow matching is 3, λ = 0 is 3 + q and λ > 0 is 3 + 3 q with a share q of samples at r < t;
the marginal tangent adds q.
Memory is the peak of what a step allocates, as a ratio, too; "first" is the seconds of the first
step, which compiles. "without the rules" leaves every derivative to PyTorch, which works in float32
and without --compile only; "usual layout" is contiguous, and without the rule for SiLU. --ours
leaves out the rows without the rules and those of other implementations.

    python benchmarks/step.py                      # bf16 on a GPU; float32 on a CPU, in minutes
    python benchmarks/step.py --compile            # the loss compiled: minutes a row
    python benchmarks/step.py --contiguous         # not in the layout that `train` uses
    python benchmarks/step.py --network cifar      # the default network of train_cifar.py
    python benchmarks/step.py --network diffusers  # a UNet2DModel; needs `pip install diffusers`
    python benchmarks/step.py --profile            # besides, where a step's time goes
"""

import argparse
import copy
import statistics
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent))

import meanflow
import train_cifar
import train_mnist

NETWORKS = {  # name: (channels, size, options of our U-Net)
    "mnist": (1, 28, {"classes": 10, **train_mnist.NETWORK}),
    "cifar-tiny": (3, 32, train_cifar.TINY_NETWORK),
    "cifar": (3, 32, train_cifar.NETWORK),
    "diffusers": (3, 32, None),
}


class Diffusers(torch.nn.Module):
    """A UNet2DModel of diffusers, which knows one time; it gets r as a channel of the image."""

    def __init__(self, channels, size):
        super().__init__()
        from diffusers import UNet2DModel

        self.net = UNet2DModel(
            sample_size=size,
            in_channels=channels + 1,
            out_channels=channels,
            block_out_channels=(64, 128),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )

    def forward(self, x, r, t):
        return self.net(torch.cat((x, meanflow.expand(r, x).expand_as(x[:, :1])), 1), t).sample


def build(network):
    """Return the network and the shape of its images."""
    channels, size, options = NETWORKS[network]
    if options is None:
        return Diffusers(channels, size), (channels, size, size)
    return meanflow.UNet(channels, size=size, **options), (channels, size, size)


class WithoutRules(torch.nn.Module):
    """A loss whose derivatives are all PyTorch's own."""

    def __init__(self, objective):
        super().__init__()
        self.objective = objective

    def forward(self, *args):
        with patch.dict(meanflow.RULES, clear=True):
            return self.objective(*args)


class UsualLayout(torch.nn.Module):
    """A loss of the network in the usual layout, and without a rule for SiLU."""

    def __init__(self, net, share):
        super().__init__()
        net = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
        self.objective = meanflow.Objective(net, jump_share=share)
        self.rules = {f: rule for f, rule in meanflow.RULES.items() if f is not F.silu}

    def forward(self, *args):
        with patch.dict(meanflow.RULES, self.rules, clear=True):
            return self.objective(*args)


class WholeBatch(torch.nn.Module):
    """The loss as other implementations compute it: all samples through the JVP `derive`."""

    def __init__(self, net, derive):
        super().__init__()
        self.net, self.derive = net, derive

    def forward(self, x0, lam):
        r, t = meanflow.sample_times(len(x0), len(x0) // 4, device=x0.device)
        x_t, v = meanflow.path(x0, torch.randn_like(x0), t)
        with sdpa_kernel(SDPBackend.MATH):
            directions = v, torch.zeros_like(r), torch.ones_like(t)
            u, dudt = self.derive(self.net, (x_t, r, t), directions)
        dudt = dudt if lam else dudt.detach()  # for λ = 0 the target is a constant
        e = u + meanflow.expand(t - r, u) * meanflow.sg_lambda(dudt, lam) - v
        square = e.square().sum((1, 2, 3))
        return (square / (square.detach() + 1e-3) ** 0.75).mean(), square.detach()


def double_backward(net, primals, directions):
    return torch.autograd.functional.jvp(net, primals, directions, create_graph=True)


def in_float32(net, primals, directions):
    with torch.autocast(primals[0].device.type, enabled=False):
        return torch.func.jvp(net, primals, directions)


def ways(net, shares, compiled, amp, ours_only):
    """Return {name: (objective, λ, theory)} of all that is compared, flow matching first."""
    ours = {q: meanflow.Objective(net, jump_share=q) for q in (0.0, *shares)}
    table = {"flow matching": (ours[0.0], 0.0, 1.0)}
    counted = {(0.0, q): 1 + q / 3 for q in shares} | {(1.0, q): 1 + q for q in shares}
    for (lam, q), theory in counted.items():
        table[f"λ = {lam:.0f}, q = {q}"] = ours[q], lam, theory
    for q in shares:
        marginal = meanflow.Objective(net, jump_share=q, tangent="marginal")
        table[f"λ = 1, q = {q}, marginal tangent"] = marginal, 1.0, 1 + q * 4 / 3
    if compiled:  # where rules are not to be taken away
        return table
    table["flow matching, usual layout"] = UsualLayout(net, 0.0), 0.0, 1.0
    for (lam, q), theory in counted.items():
        table[f"λ = {lam:.0f}, q = {q}, usual layout"] = UsualLayout(net, q), lam, theory
    if ours_only:
        return table
    if amp:  # without the rules, tangents in float32 meet weights in bf16
        others = {"func.jvp in float32": in_float32}
    else:
        others = {"func.jvp": torch.func.jvp}
        for (lam, q), theory in counted.items():
            table[f"λ = {lam:.0f}, q = {q}, without the rules"] = WithoutRules(ours[q]), lam, theory
    others["autograd.functional.jvp"] = double_backward
    for lam, (name, derive) in product((0.0, 1.0), others.items()):
        table[f"λ = {lam:.0f}, torch.{name}, whole batch"] = WholeBatch(net, derive), lam, None
    return table


def step(objective, optimizer, x0, lam, amp):
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=amp):
        loss, _ = objective(x0, lam)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def seconds(work, device):
    wait, clock = lambda: None, time.process_time
    if device == "cuda":
        wait, clock = torch.cuda.synchronize, time.perf_counter
    wait()
    start = clock()
    work()
    wait()
    return clock() - start


def peak_memory(work, device):
    """Bytes by which the tensors alive at once exceed those alive before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def print_profile(name, work, device):
    activity, spent = {
        "cpu": (torch.profiler.ProfilerActivity.CPU, "self_cpu_time_total"),
        "cuda": (torch.profiler.ProfilerActivity.CUDA, "self_device_time_total"),
    }[device]
    with torch.profiler.profile(activities=[activity]) as result:
        work()
    rows = sorted(result.key_averages(), key=lambda row: -getattr(row, spent))
    total = sum(getattr(row, spent) for row in rows)
    print(f"\n{name}\n\n| share | calls | operation |\n|---|---|---|")
    for row in rows[:8]:
        print(f"| {getattr(row, spent) / total:.0%} | {row.count} | {row.key} |")


def rate(per_second):
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def compare(args, device):
    network, batch, shares, rounds = args.network, args.batch_size, args.shares, args.rounds
    compiled, amp = args.compile, args.amp
    layout = torch.contiguous_format if args.contiguous else torch.channels_last
    torch.manual_seed(0)
    net, shape = build(network)
    net = net.to(device, memory_format=layout).train()
    x0 = torch.randn(batch, *shape, device=device).contiguous(memory_format=layout)
    table = ways(net, shares, compiled, amp, args.ours)
    works = {}
    for name, (objective, lam, _) in table.items():
        optimizer = torch.optim.Adam(objective.parameters(), 1e-4, fused=True)
        if compiled:
            objective.compile(dynamic=False)
            lam = lam and torch.tensor(lam, device=device)
        works[name] = partial(step, objective, optimizer, x0, lam, amp)
    memory, first, times = {}, {}, {name: [] for name in works}
    for name, work in works.items():
        first[name] = seconds(work, device)
        memory[name] = peak_memory(work, device)
        print(f"{name}: first step after {first[name]:.1f} s", file=sys.stderr, flush=True)
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    base, base_memory = statistics.median(times["flow matching"]), memory["flow matching"]
    how = f"{'compiled' if compiled else 'eager'}, {'bf16' if amp else 'float32'}"
    gigabytes = f"flow matching takes {base_memory / 2**30:.2g} GiB"
    how += ", contiguous" if args.contiguous else ", channels_last"
    gigabytes += f", {base * 1e3:.0f} ms"
    print(f"\n**{network}**, batch {batch}, {how}, {rounds} rounds; {gigabytes}\n")
    print("| | by counting | measured | above it | quartiles | memory | images/s | first |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (*_, theory) in table.items():
        low, middle, high = (q / base for q in statistics.quantiles(times[name], n=4))
        counted = f"{theory:.2f}" if theory else ""
        above = f"{middle / theory - 1:.0%}" if theory else ""
        row = counted, f"{middle:.2f}", above, f"{low:.2f} to {high:.2f}"
        row += f"{memory[name] / base_memory:.2f}", rate(batch / base / middle)
        row += (f"{first[name]:.0f}",)
        print("|", name, "|", " | ".join(row), "|", flush=True)
    for name in [*works][: 1 + 3 * len(shares)] if args.profile else ():
        print_profile(name, works[name], device)


def sampling(network, device, sizes):
    net, shape = build(network)
    net = net.to(device)
    print(f"\n**{network}**, one-step samples, float32\n\n| batch | images/s |\n|---|---|")
    for size in sizes:
        x1 = torch.randn(size, *shape, device=device)
        work = lambda x1=x1: meanflow.sample(net, x1)
        work()
        fastest = min(seconds(work, device) for _ in range(3))
        print(f"| {size} | {rate(size / fastest)} |", flush=True)
        if fastest > 10:  # seconds; larger batches take minutes
            break


def main():
    cuda = torch.cuda.is_available()
    switch = argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", choices=NETWORKS, default="cifar" if cuda else "mnist")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30 if cuda else 15, help="at least 2")
    parser.add_argument("--compile", action=switch, default=False, help="compile the loss")
    parser.add_argument("--amp", action=switch, default=cuda, help="bf16 instead of float32")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0],
                        help="shares q of samples at r < t")  # fmt: skip
    parser.add_argument("--contiguous", action="store_true", help="not the layout of `train`")
    parser.add_argument("--ours", action="store_true", help="nothing but the loss as it is")
    parser.add_argument("--profile", action="store_true", help="print the costliest operations")
    args = parser.parse_args()
    device = "cuda" if cuda else "cpu"
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # a graph for each share and λ
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else 'CPU'}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    compare(args, device)
    if not args.ours:
        sampling(args.network, device, [1, 4, 16, 64, 256, 1024])


if __name__ == "__main__":
    main()
