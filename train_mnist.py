"""Train Modular MeanFlow on MNIST: digits in one step, after about ten minutes on two CPU cores."""

import torch
from torchvision.datasets import MNIST

import training
from meanflow import UNet


def main():
    parser = training.train_parser(
        __doc__,
        out="runs/mnist",
        steps=4_000,
        batch_size=64,
        lr=3e-3,
        lr_decay=True,
        beta2=0.99,
        ema=0.995,
        class_cond=True,
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    mnist = training.load_dataset(MNIST, args.data)
    model = UNet(
        channels=1,
        size=28,
        patch=2,  # pixels become 2x2 patches: convolutions at 14x14 and 7x7
        width=32,
        multipliers=(1, 2),
        classes=10 if args.class_cond else 0,
    )
    labels = mnist.targets if args.class_cond else None
    training.train(model, mnist.data[:, None], labels, args)


if __name__ == "__main__":
    training.run(main)
