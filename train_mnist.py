"""Train Modular MeanFlow on MNIST: digits in one step, after a good quarter of an hour on a CPU."""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torchvision.datasets import MNIST
from torchvision.transforms.functional import pil_to_tensor

from meanflow import UNet, load_dataset, run, train, train_parser

DIGITS = Path(__file__).parent / "assets" / "mnist-10k.png"
RECIPE = {
    "out": "runs/mnist",
    "steps": 4_600,
    "batch_size": 32,
    "optimizer": "muon",
    "lr": 2.2e-3,
    "lr_decay": True,
    "beta2": 0.99,
    "ema": 0.997,
    "flow_first": 0.4,  # flow matching, then MeanFlow with λ = 0
    "reference": 1024,  # for the mean of v, over about 100 images of a digit
    "save_every": 200,
}
NETWORK = {  # 0.7M parameters
    "patch": 2,  # pixels become 2x2 patches: convolutions at 14x14 and 7x7
    "width": 24,
    "multipliers": (1, 2),
    "blocks": 4,
    "attention": 0,  # in so short a training, more steps are worth more
}


def digits():
    """Return the 10,000 images that come along, uint8 (N, 1, 28, 28), and their labels (N,)."""
    sheet = pil_to_tensor(Image.open(DIGITS))  # (1, 2800, 2800), ten rows of each digit
    images = sheet.unfold(1, 28, 28).unfold(2, 28, 28)  # (1, 100, 100, 28, 28)
    return images.reshape(-1, 1, 28, 28), torch.arange(10).repeat_interleave(1000)


def mnist(folder):
    """Return torchvision's MNIST in the folder, or download it there."""
    names = "train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"
    files = ", ".join(f"MNIST/raw/{name}-ubyte" for name in names)
    return load_dataset(MNIST, folder, files)


def main(argv=None):
    parser = train_parser(__doc__, **RECIPE)
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    flag("--data", help="folder of all 60,000 images, downloaded if absent")
    flag("--class-cond", action=switch, default=True, help="condition on the labels")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    if args.data is None:
        images, labels = digits()
    else:
        whole = mnist(args.data)
        images, labels = whole.data[:, None], whole.targets
    model = UNet(channels=1, size=28, classes=10 if args.class_cond else 0, **NETWORK)
    train(model, images, labels if args.class_cond else None, args)


if __name__ == "__main__":
    run(main)
