"""What λ does on a Gaussian, where the answer is exact: the spread of one-step samples.

Data ~ N(0.7, 0.5²). The network is u(x, r, t) = a(r, t) x + b(r, t), a family that holds the true
u, so that one step could give exactly the data. Prints the standard deviation of 100,000 samples
for constant λ and either tangent.

    python benchmarks/gaussian.py  # three minutes
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import meanflow


def deviation(lam, tangent, *, steps=3000, batch=1024):
    """Return the standard deviation of one-step samples after training with a constant λ."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def u(x, r, t):
        a, b = net(torch.stack((r, t), 1)).chunk(2, 1)
        return a * x + b

    for _ in range(steps):
        r, t = torch.rand(2, batch).sort(0).values
        x0 = 0.7 + 0.5 * torch.randn(batch, 1)
        x_t, v = meanflow.path(x0, torch.randn_like(x0), t)
        along = meanflow.marginal_velocity(u, x_t, t) if tangent == "marginal" else v
        loss, _ = meanflow.meanflow_loss(u, x_t, v, r, t, lam, direction=along, p=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return meanflow.sample(u, torch.randn(100_000, 1)).std().item()


def main(argv=None):
    tangents = "conditional", "marginal"
    print("| λ |", " | ".join(tangents), "|\n|---|---|---|\n| exact | 0.50 | 0.50 |")
    for lam in 0.0, 0.25, 1.0:
        found = " | ".join(f"{deviation(lam, tangent):.2f}" for tangent in tangents)
        print(f"| {lam:g} | {found} |", flush=True)


if __name__ == "__main__":
    meanflow.run(main)
