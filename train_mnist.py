"""Train Modular MeanFlow on MNIST: digits in one step, after less than an hour on a CPU."""

import argparse

import torch
from torchvision.datasets import MNIST

from meanflow import UNet, load_dataset, run, train, train_parser

RECIPE = {
    "out": "runs/mnist",
    "steps": 2_770,
    "batch_size": 64,
    "optimizer": "muon",
    "lr": 3e-3,
    "lr_decay": True,
    "beta2": 0.99,
    "ema": 0.995,
    "flow_first": 0.25,  # flow matching, then MeanFlow with λ = 0
    "reference": 1024,  # for the mean of v, over about 100 images of a digit
}
NETWORK = {  # 0.7M parameters
    "patch": 2,  # pixels become 2x2 patches: convolutions at 14x14 and 7x7
    "width": 24,
    "multipliers": (1, 2),
    "blocks": 4,
    "attention": 0,  # in so short a training, more steps are worth more
}


def main(argv=None):
    parser = train_parser(__doc__, **RECIPE)
    parser.add_argument("--data", default="data", help="folder of MNIST, downloaded if absent")
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--class-cond", action=switch, default=True, help="use the labels")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    mnist = load_dataset(MNIST, args.data)
    labels = mnist.targets if args.class_cond else None
    model = UNet(channels=1, size=28, classes=10 if args.class_cond else 0, **NETWORK)
    train(model, mnist.data[:, None], labels, args)


if __name__ == "__main__":
    run(main)
