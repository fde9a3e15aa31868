"""Figures, with matplotlib (in the extra `recipes`)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def reliability_diagram(probs: dict[str, Tensor], targets: Tensor, num_bins: int = 15) -> "Figure":
    """Accuracy against confidence of several predictives, with the share of predictions in each bin below.

    Args:
        probs: name -> class probabilities (n, C).
        targets: class indices (n,).
        num_bins: equally wide bins of the confidence.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="perfect")
    for shift, (name, predicted) in enumerate(probs.items()):
        place = shift / len(probs), 0.9 / len(probs)  # of the bar, in shares of its bin
        _draw_reliability(upper, lower, name, predicted.cpu(), targets.cpu(), num_bins, place)
    upper.set(ylabel="accuracy", ylim=(0, 1.02), title="Reliability: on the line is right")
    upper.legend(loc="lower right")
    lower.set(xlabel="confidence (largest probability)", ylabel="share", xlim=(0, 1.02))
    return figure


def calibration_under_shift(errors: dict[str, list[float]], label: str = "ECE") -> "Figure":
    """A figure of several predictives as the data move away from those of the training.

    Args:
        errors: name -> a number for each severity, 0 for none first.
        label: what the number is.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in errors.items():
        axes.plot(range(len(values)), values, marker="o", markersize=4, label=name)
    axes.set(xlabel="severity of the corruption (0: none)", ylabel=label, title="Calibration under shift: low is right")
    axes.set_xticks(range(max(map(len, errors.values()))))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize="small")
    return figure


def risk_coverage(probs: dict[str, Tensor], targets: Tensor) -> "Figure":
    """Error rate among the most certain predictions, against their share (Geifman and El-Yaniv 2017).

    Args:
        probs: name -> class probabilities (n, C).
        targets: class indices (n,).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, predicted in probs.items():
        confidence, labels = predicted.cpu().max(1)
        wrong = (labels != targets.cpu())[confidence.argsort(descending=True, stable=True)].double()
        count = torch.arange(1, len(wrong) + 1)
        axes.plot(count / len(wrong), wrong.cumsum(0) / count, linewidth=1.2, label=name)
    axes.set(xlabel="coverage: share of predictions kept", ylabel="error rate among them", xlim=(0, 1))
    axes.set_title("Risk and coverage: low is right")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize="small")
    return figure


def eigenvalue_spectrum(eigenvalues: Tensor) -> "Figure":
    """Eigenvalues of the neural tangent kernel along the kept directions: is the rank high enough?"""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(range(1, len(eigenvalues) + 1), eigenvalues.cpu(), marker="o", markersize=4)
    axes.set(xlabel="direction k", ylabel="kernel eigenvalue / M", title=f"Leading {len(eigenvalues)} eigenvalues")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    return figure


def _draw_reliability(
    upper: "Axes", lower: "Axes", name: str, probs: Tensor, targets: Tensor, num_bins: int, place: tuple[float, float]
) -> None:
    confidence, predicted = probs.max(1)
    bins = (confidence * num_bins).long().clamp_max(num_bins - 1)
    count = bins.bincount(minlength=num_bins)
    right = bins.bincount((predicted == targets).double(), num_bins) / count
    mean = bins.bincount(confidence.double(), num_bins) / count
    filled = count > 0
    (line,) = upper.plot(mean[filled], right[filled], marker="o", markersize=4, label=name)
    shift, width = place
    edges = [(b + shift) / num_bins for b in range(num_bins)]
    lower.bar(edges, count / count.sum(), width / num_bins, align="edge", color=line.get_color())
