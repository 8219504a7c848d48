"""Draw the pictures that explain, into assets/. Needs `pip install matplotlib`.

One command for each picture:

    python benchmarks/pictures.py path                    # a flow, a velocity, an average velocity
    python benchmarks/pictures.py moons                   # what λ does in the plane, five minutes
    python benchmarks/pictures.py log                     # the errors of a training
    python benchmarks/pictures.py digits                  # of train_mnist.py, and with another λ
"""

import argparse
import csv
import math
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator, NullLocator
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).parent.parent))

import meanflow

ASSETS = Path(__file__).parent.parent / "assets"
DATA, NOISE, FLOW, JUMP = "#2a7f9e", "#b8b8b8", "#777777", "#d1495b"
plt.rcParams |= {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}


# A flow in one dimension -------------------------------------------------------------------------

CENTRES, DEVIATION = torch.tensor([-1.0, 1.0]), 0.12  # of the data, two narrow Gaussians


def marginal_velocity(x, t):
    """Return E[v | x_t = x] for the data above: each Gaussian's own velocity, weighted."""
    variance = (1 - t) ** 2 * DEVIATION**2 + t**2
    offset = x[:, None] - (1 - t) * CENTRES
    velocities = (t - (1 - t) * DEVIATION**2) / variance * offset - CENTRES
    weights = torch.softmax(-(offset**2) / (2 * variance), 1)
    return (weights * velocities).sum(1)


def flow_lines(x1, steps=1000):
    """Return times (steps + 1,) from 1 to 0 and the states (steps + 1, B) of the flow from x1."""
    times, states = torch.linspace(1, 0, steps + 1), [x1]
    for t in times[:-1]:
        states.append(states[-1] - marginal_velocity(states[-1], t) / steps)
    return times, torch.stack(states)


def draw_path():
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    torch.manual_seed(2)
    for _ in range(40):  # the straight paths, of which each sample has one
        x0 = CENTRES[torch.randint(2, ())] + DEVIATION * torch.randn(())
        axes.plot([0, 1], [x0, torch.randn(())], color=NOISE, linewidth=0.5, zorder=0)
    starts = torch.tensor([-1.9, -1.2, -0.7, -0.3, -0.05, 0.08, 0.3, 0.7, 1.2, 1.9])
    times, states = flow_lines(starts)
    axes.plot(times, states, color=FLOW, linewidth=1)
    line = states[:, 6]
    axes.plot(times, line, color=DATA, linewidth=2.5)

    i, j = 900, 320  # where the line is at times r and t: it bends there
    r, t, x_r, x_t = times[i], times[j], line[i], line[j]
    velocity = marginal_velocity(x_t[None], t).item()
    arrow = {"arrowstyle": "->", "linewidth": 2.5, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (r, x_r), (t, x_t), arrowprops=arrow | {"color": JUMP})
    axes.annotate("", (t - 0.42, x_t - 0.42 * velocity), (t, x_t), arrowprops=arrow)
    axes.plot([r, t], [x_r, x_t], "o", color="black")
    axes.text(t, x_t + 0.12, "$x_t$", ha="center", va="bottom")
    axes.text(r, x_r - 0.14, "$x_r$", ha="center", va="top")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
    axes.text(0.4, -0.22, r"velocity $\bar v(x_t, t)$", ha="center", bbox=box)
    axes.text(0.46, 0.62, "average velocity $u(x_t, r, t)$", ha="center", color=JUMP, bbox=box)
    axes.set(xlim=(-0.02, 1.02), ylim=(-1.7, 1.7), xticks=[0, r, t, 1], yticks=[])
    axes.set_xticklabels(["0\ndata", "r", "t", "1\nnoise"])
    axes.spines["left"].set_visible(False)
    figure.savefig(ASSETS / "path.png", dpi=160)


# λ in the plane ----------------------------------------------------------------------------------


def moons(n):
    """Return n points (n, 2) of two moons."""
    angle, upper = math.pi * torch.rand(n), torch.rand(n) < 0.5
    x = torch.where(upper, angle.cos() - 0.5, 0.5 - angle.cos())
    y = torch.where(upper, angle.sin() - 0.25, 0.25 - angle.sin())
    return torch.stack((x, y), 1) + 0.05 * torch.randn(n, 2)


class Plane(nn.Module):
    """u(x, r, t) for points (B, 2): four hidden layers."""

    def __init__(self, width=256):
        super().__init__()
        sizes = 4, width, width, width, width
        layers = [z for pair in pairwise(sizes) for z in (nn.Linear(*pair), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x, r, t):
        return self.layers(torch.cat((x, t[:, None], (t - r)[:, None]), 1))


def trained(lam, tangent, reference, steps=3000, batch=512):
    """Return a network after training on the moons with a constant λ, and the mean of v over so
    many more points."""
    torch.manual_seed(0)
    model = Plane()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    objective = meanflow.Objective(model, tangent=tangent, p=0)
    for _ in range(steps):
        more = (moons(reference), None) if reference else None
        loss, _ = objective(moons(batch), lam, reference=more)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
    return average


def draw_moons():
    figure, panels = plt.subplots(1, 5, figsize=(14, 3.2), layout="constrained")
    noise = torch.randn(1000, 2, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    data = moons(20_000)
    settings = {
        "λ = 0": (0.0, "conditional", 0),
        "λ = 1, conditional": (1.0, "conditional", 0),
        "λ = 1, marginal": (1.0, "marginal", 0),
        "λ = 1, mean over points": (1.0, "conditional", 2048),
    }
    panels[0].scatter(*data[: len(noise)].T, s=3, color=DATA)
    panels[0].set_title("data")
    for panel, (title, setting) in zip(panels[1:], settings.items(), strict=True):
        samples = meanflow.sample(trained(*setting), noise)
        off = (torch.cdist(samples, data).amin(1) > 0.1).float().mean()
        print(f"{title}: {off:.0%} of the samples are further than 0.1 from all data", flush=True)
        ends = torch.stack((noise, samples))[:, :150]  # (2, 150, 2)
        panel.plot(*ends.permute(2, 0, 1), color=NOISE, linewidth=0.5, zorder=0)
        panel.scatter(*ends[0].T, s=4, color=NOISE)
        panel.scatter(*samples.T, s=3, color=JUMP)
        panel.set_title(title)
    for panel in panels:
        panel.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal")
        panel.axis("off")
    figure.savefig(ASSETS / "moons.png", dpi=130)


# The log of a training ---------------------------------------------------------------------------


def draw_log(file="runs/mnist/log.csv"):
    with open(file, encoding="utf-8") as rows:
        log = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(rows)]
    column = lambda name: [row[name] for row in log]
    figure, errors = plt.subplots(figsize=(8, 3.6), layout="constrained")
    errors.plot(column("step"), column("err_jump"), color=JUMP, label="err_jump, r < t")
    errors.plot(column("step"), column("err_flow"), color=DATA, label="err_flow, r = t")
    errors.set(xlabel="step", yscale="log", ylabel="squared error", xlim=(0, log[-1]["step"]))
    errors.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    errors.yaxis.set_major_formatter("{x:g}")
    errors.yaxis.set_minor_locator(NullLocator())
    errors.legend(frameon=False, loc="center right")
    if math.isnan(log[0]["err_jump"]):
        jumps = [row["step"] for row in log if not math.isnan(row["err_jump"])]
        first = min(jumps, default=log[-1]["step"])
        errors.axvspan(0, first, color=NOISE, alpha=0.3, linewidth=0)
        top = {"y": 0.97, "va": "top", "transform": errors.get_xaxis_transform()}
        errors.text(first / 2, s="flow matching", ha="center", **top)
    figure.savefig(ASSETS / "log.png", dpi=130)


# Digits in one step, with and without λ ----------------------------------------------------------


def draw_digits(plain="runs/mnist/checkpoint.pt", paper="runs/paper/checkpoint.pt"):
    figure, panels = plt.subplots(1, 2, figsize=(12.4, 5.3), layout="constrained")
    titles = "λ = 0", "the paper's λ, rising from 0 to 1"
    for panel, title, file in zip(panels, titles, (plain, paper), strict=True):
        images = meanflow.draw(meanflow.load_model(file), 80).clamp(-1, 1)
        grid = make_grid(images / 2 + 0.5, nrow=10)
        panel.imshow(grid.permute(1, 2, 0), interpolation="nearest")
        panel.set_title(title, fontsize=16)
        panel.axis("off")
    figure.savefig(ASSETS / "mnist.png", dpi=100)


PICTURES = {"path": draw_path, "moons": draw_moons, "log": draw_log, "digits": draw_digits}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("picture", choices=PICTURES)
    parser.add_argument("files", nargs="*", help="what it is drawn from, as above")
    args = parser.parse_args(argv)
    PICTURES[args.picture](*args.files)


if __name__ == "__main__":
    meanflow.run(main)
