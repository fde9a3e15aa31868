"""Figures, with matplotlib (in the extra `recipes`)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .predictions import Prediction


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


def calibration_under_shift(
    errors: dict[str, list[float]], label: str = "ECE", severities: Sequence[str] | None = None
) -> "Figure":
    """A figure of several predictives as the data move away from those of the training.

    Args:
        errors: name -> a number for each severity, 0 for none first.
        label: what the number is.
        severities: what they are called; 0, 1, 2, … by default.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in errors.items():
        axes.plot(range(len(values)), values, marker="o", markersize=4, label=name)
    axes.set(xlabel="severity of the corruption (0: none)", ylabel=label, title="Calibration under shift: low is right")
    axes.set_xticks(range(max(map(len, errors.values()))), severities)
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
        axes.plot((count / len(wrong)).numpy(), (wrong.cumsum(0) / count).numpy(), linewidth=1.2, label=name)
    axes.set(xlabel="coverage: share of predictions kept", ylabel="error rate among them", xlim=(0, 1))
    axes.set_title("Risk and coverage: low is right")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize="small")
    return figure


def confidence_histograms(probs: dict[str, Tensor], targets: Tensor, num_bins: int = 20) -> "Figure":
    """How sure several predictives are where they are right and where they are wrong, a panel each.

    Args:
        probs: name -> class probabilities (n, C).
        targets: class indices (n,).
        num_bins: equally wide bins of the confidence.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.5 * len(probs), 3.2), layout="constrained")
    panels = figure.subplots(1, len(probs), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, predicted) in zip(panels, probs.items(), strict=True):
        confidence, labels = predicted.cpu().max(1)
        right = labels == targets.cpu()
        for kind, meaning in ((right, "right"), (~right, "wrong")):
            share = f"{meaning}: {float(kind.double().mean()):.1%}"
            axes.hist(confidence[kind].numpy(), num_bins, range=(0, 1), histtype="step", linewidth=1.5, label=share)
        axes.set(title=name, xlabel="confidence", yscale="log")
        axes.legend(loc="best", fontsize="small")
    panels[0].set_ylabel("predictions")
    return figure


def tuning_curves(curves: dict[str, tuple[Tensor, Tensor]], chosen: dict[str, float]) -> "Figure":
    """NLL on unseen points against each scale, the others as chosen: is the minimum sharp, and was it found?

    Args:
        curves: name of a scale -> its values (n,) and the NLL there (n,).
        chosen: name of a scale -> the value that was chosen.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(curves), 3), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (name, (values, losses)) in zip(panels, curves.items(), strict=True):
        axes.plot(values.cpu().numpy(), losses.cpu().numpy(), marker="o", markersize=3)
        axes.set_xscale("log" if values.max() > 10 * values.min() else "linear")
        axes.axvline(chosen[name], color="0.5", linestyle="--", linewidth=1, label=f"chosen: {chosen[name]:.3g}")
        axes.set(xlabel=name.replace("_", " "))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    panels[0].set_ylabel("NLL on unseen points")
    return figure


def image_grid(images: Tensor, captions: list[str], columns: int = 6) -> "Figure":
    """Images with what is said of them.

    Args:
        images: (n, 3 or 1, H, W), in [0, 1].
        captions: n, a few short lines each.
        columns: images in a row.
    """
    from matplotlib.figure import Figure

    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.9 * columns, 2.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.axis("off")
    for axes, image, caption in zip(panels, images.cpu(), captions, strict=False):
        axes.imshow(image.movedim(0, -1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(caption, fontsize=8)
    return figure


def eigenvalue_spectrum(eigenvalues: Tensor) -> "Figure":
    """Eigenvalues of the neural tangent kernel along the kept directions: is the rank high enough?"""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(range(1, len(eigenvalues) + 1), eigenvalues.cpu().numpy(), marker="o", markersize=4)
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
    (line,) = upper.plot(mean[filled].numpy(), right[filled].numpy(), marker="o", markersize=4, label=name)
    shift, width = place
    edges = [(b + shift) / num_bins for b in range(num_bins)]
    lower.bar(edges, (count / count.sum()).tolist(), width / num_bins, align="edge", color=line.get_color())


def fan_chart(
    x: Tensor, prediction: "Prediction", targets: Tensor | None = None, seen: Tensor | None = None
) -> "Figure":
    """A regression of one number on one number: mean, 50, 80 and 95 % intervals, and the data.

    Args:
        x: where the prediction is, (n,).
        prediction: of outputs (n, 1) or (n,).
        targets: what was measured, (m,).
        seen: where, (m,); `x` by default.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    order = x.cpu().argsort()
    line = lambda values: values.detach().cpu().reshape(-1)[order]  # noqa: E731
    for level in (0.95, 0.8, 0.5):
        low, high = prediction.interval(level)
        axes.fill_between(
            line(x), line(low), line(high), color="tab:blue", alpha=0.2, label=f"{level:.0%}", linewidth=0
        )
    axes.plot(line(x), line(prediction.mean), color="tab:blue", label="mean")
    if targets is not None:
        places = (x if seen is None else seen).detach().cpu()
        axes.plot(places, targets.detach().cpu().reshape(-1), ".", color="0.2", markersize=3, label="data")
    axes.set(xlabel="x", ylabel="y", title="Intervals that should hold their share of the data")
    axes.legend(loc="best", fontsize="small")
    return figure


def coverage_curve(predictions: Mapping[str, "Prediction"], targets: Tensor) -> "Figure":
    """Share of the targets in central intervals against the probability that these claim.

    Args:
        predictions: name -> of targets in the shape of the network's outputs.
        targets: what was measured.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="perfect")
    levels = torch.linspace(0.05, 0.95, 19)
    for name, prediction in predictions.items():
        shares = []
        for level in levels.tolist():
            low, high = prediction.interval(level)
            seen = targets.reshape(low.shape).to(low)
            shares.append(float(((seen >= low) & (seen <= high)).float().mean()))
        axes.plot(levels, shares, marker="o", markersize=3, label=name)
    axes.set(xlabel="claimed", ylabel="share of targets inside", title="Coverage: on the line is right")
    axes.legend(loc="upper left", fontsize="small")
    return figure
