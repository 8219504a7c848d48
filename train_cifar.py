"""Train Modular MeanFlow on CIFAR-10: the published MeanFlow recipe, scaled to one GPU."""

import argparse

import torch
from torchvision.datasets import CIFAR10

from meanflow import UNet, load_dataset, run, train, train_parser

RECIPE = {  # beside it, what the authors of MeanFlow published with their code for 8 GPUs, which
    # also augments images as EDM does. Here they are only mirrored; besides, gradients are clipped
    # at 20, and bf16 is the default where a GPU has it (--amp off for float32)
    "out": "runs/cifar",
    "steps": 400_000,  # 800,000
    "batch_size": 256,  # 1024
    "lr": 3e-4,  # 6e-4; halved, as the square root of the batch size. Warm-up 8,000 steps; 10,000
    "ema": 0.9999,
    "jump_share": 0.75,
    "t_logit": [-0.6, 1.6],  # in arXiv:2505.13447 r and t are two sorted draws of -2, 2
    "r_logit": [-4.0, 1.6],
    "flip": True,
    "log_every": 100,
    "save_every": 5_000,
}
NETWORK = {  # 51M parameters; published: 55M, attention at 16x16 only
    "width": 128,
    "multipliers": (2, 2, 2),
    "blocks": 4,
    "attention": 2,
    "dropout": 0.2,
}
TINY = {  # for one CPU core, 90 minutes
    "out": "runs/cifar-tiny",
    "steps": 5_000,
    "batch_size": 64,
    "optimizer": "muon",
    "lr": 3e-3,
    "lr_decay": True,
    "beta2": 0.99,
    "ema": 0.998,
    "flip": True,
    "guidance": 2.0,
}
TINY_NETWORK = {"width": 32, "multipliers": (1, 2, 4), "attention": 2, "patch": 2}
PRESETS = {"gpu": (RECIPE, NETWORK), "tiny": (TINY, TINY_NETWORK)}


def main(argv=None):
    preset = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    preset.add_argument("--preset", default="gpu", choices=PRESETS)
    recipe, network = PRESETS[preset.parse_known_args(argv)[0].preset]
    parser = train_parser(__doc__, **recipe)
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    flag("--preset", choices=PRESETS, default="gpu", help="tiny: a network and recipe for a CPU")
    flag("--data", default="data", help="folder of CIFAR-10, downloaded if absent")
    labelled = recipe is TINY  # its guidance needs them
    flag("--class-cond", action=switch, default=labelled, help="condition on the labels")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    files = "cifar-10-batches-py/data_batch_1 to 5, test_batch and batches.meta"
    cifar = load_dataset(CIFAR10, args.data, files)
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
    labels = torch.tensor(cifar.targets) if args.class_cond else None
    model = UNet(channels=3, size=32, classes=10 if args.class_cond else 0, **network)
    train(model, images, labels, args)


if __name__ == "__main__":
    run(main)
