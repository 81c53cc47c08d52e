"""The best strengths of a study, in a training loop of one's own: plain PyTorch, one model.

It asks the service for what the study of examples/digits.yaml has found, and trains the same
network with it, on the same rows. What differs is what no two programs share: initial weights, the
order of the rows, and which units are dropped.

    make up                                                      # and in another terminal
    .venv/bin/regtune submit examples/digits.yaml --watch
    .venv/bin/python examples/own_loop.py
"""

import copy

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from regtune.client import Client


def main() -> None:
    """Train with a study's best strengths; print how well."""
    with Client() as api:  # at REGTUNE_URL, by default on this machine
        strengths = api.best("digits")["params"]
        training = api.study("digits")["spec"]["training"]
    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    rest, test = split(y)
    train, validation = (rest[part] for part in split(y[rest]))
    x = x.float()
    x = (x - x[train].mean()) / x[train].std()

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 128, bias=False),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Dropout(strengths["dropout"]),
        nn.Linear(128, 10),
    )
    # What is decayed and shrunk: weights, no biases and no norms. The study names them.
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": weights, "weight_decay": strengths["weight_decay"]},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=strengths["learning_rate"],
    )
    best_loss, best_epoch, best_weights = float("inf"), 0, model.state_dict()
    for epoch in range(1, training["max_epochs"] + 1):
        model.train()
        for rows in train[torch.randperm(len(train))].split(training["batch_size"]):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            shrink(weights, strengths["learning_rate"] * strengths["l1_lambda"])
        loss, _ = evaluate(model, x[validation], y[validation])
        if loss < best_loss:
            best_loss, best_epoch = loss, epoch
            best_weights = copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= strengths["patience"]:
            break
    model.load_state_dict(best_weights)
    _, accuracy = evaluate(model, x[test], y[test])
    print(f"validation loss {best_loss:.4f} in epoch {best_epoch}, test accuracy {accuracy:.2%}")


def split(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers of four fifths of the rows and of one fifth, alike in classes."""
    parts = train_test_split(torch.arange(len(y)), test_size=0.2, stratify=y, random_state=0)
    return parts[0], parts[1]


@torch.no_grad()
def shrink(weights: list[nn.Parameter], threshold: float) -> None:
    """Take the proximal step of L1, after the optimizer's: what is smaller becomes zero."""
    for weight in weights:
        weight.sub_(weight.clamp(-threshold, threshold))


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return loss and accuracy, with dropout off."""
    model.eval()
    logits = model(x)
    loss = nn.functional.cross_entropy(logits, y).item()
    return loss, (logits.argmax(1) == y).double().mean().item()


if __name__ == "__main__":
    main()
