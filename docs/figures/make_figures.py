"""Draws the figures of docs/algorithm.md and prints the numbers in them.

    python docs/figures/make_figures.py [NAME ...] [--output-dir DIR] [--format svg|png]

Without a NAME, all: advantage, tracker, variance, difficulty. They are written beside this file (less than a minute).
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # before pyplot: no display is needed

import matplotlib.pyplot as plt
import measurements as m
import numpy as np
import torch
from matplotlib.figure import Figure

from verl.trainer.ppo.registry import one_thread
from verl.trainer.ppo.risk import score_advantage

INK, MUTED, FAINT = "#24292f", "#6e7781", "#d0d7de"
BLUE, ORANGE, GREEN, PURPLE, GOLD = "#0969da", "#d1570f", "#1a7f37", "#8250df", "#bf8700"
DASHED = (0, (4, 2))
# An opaque white ground: the figure reads the same on a light and on a dark page.
STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
    "svg.hashsalt": "riskpo",  # the same file at every run
}


# ------------------------------------------------------------------------------------------------------- advantage
Q_ALPHA, Q_BETA = 2.0, 4.0
OBJECTIVES = (
    ("MVaR (RiskPO)", (1 + m.OMEGA, 1.0, 0.0), BLUE),
    ("RVaR", (0.0, 1.0, 0.0), GREEN),
    ("CVaR", (1.0, 0.0, 0.0), PURPLE),
    ("risk-seeking", (0.0, 1.0, 1 + m.OMEGA), ORANGE),
)


def advantage() -> Figure:
    """A(z) of each objective beside that of the mean."""
    figure, axes = plt.subplots(1, len(OBJECTIVES), figsize=(9.2, 2.9), sharey=True)
    z = torch.linspace(0, m.BUNDLE_SIZE, 501, dtype=torch.float64)
    lattice = torch.arange(m.BUNDLE_SIZE + 1, dtype=torch.float64)
    mean = score_advantage(z, Q_ALPHA, Q_BETA, (1, 1, 1))
    for axis, (name, weights, colour) in zip(axes, OBJECTIVES, strict=True):
        axis.axvspan(Q_ALPHA, Q_BETA, color=FAINT, alpha=0.35, linewidth=0)
        axis.plot(z, mean, color=MUTED, linewidth=1.2, linestyle=DASHED)
        axis.plot(z, score_advantage(z, Q_ALPHA, Q_BETA, weights), color=colour)
        axis.plot(lattice, score_advantage(lattice, Q_ALPHA, Q_BETA, weights), "o", color=colour, markersize=4.5)
        axis.set_title(name)
        axis.set_xticks([0, 1, Q_ALPHA, 3, Q_BETA, 5], ["0", "1", "$q_α$", "3", "$q_β$", "5"])
        axis.set_xlabel("bundle score z")
        low, mid, high = weights
        axis.text(5, -5, f"weights {low:g}, {mid:g}, {high:g}", ha="right", va="center", color=MUTED)
        print(f"advantage of {name} at z = 0..5:", score_advantage(lattice, Q_ALPHA, Q_BETA, weights).tolist())
    axes[0].set_ylabel("advantage A(z)")
    axes[0].text(4.6, 1.1, "mean", ha="right", va="center", color=MUTED)
    return figure


# --------------------------------------------------------------------------------------------------------- tracker
def tracker() -> Figure:
    """Both trackers on a lattice distribution that jumps, and on one that drifts."""
    runs = {
        "Success rate jumps from 0.3 to 0.6": np.where(np.arange(160) < 40, 0.3, 0.6),
        "Success rate drifts from 0.2 to 0.8": np.linspace(0.2, 0.8, 160),
    }
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.4), sharey=True)
    for axis, (title, success) in zip(axes, runs.items(), strict=True):
        track = m.follow(success)
        axis.plot(track.truth, color=INK, linewidth=1.2, linestyle=DASHED, drawstyle="steps-mid")
        for name, colour in (("sgd", ORANGE), ("ema", BLUE)):
            axis.plot(track.tracked[name], color=colour, linewidth=1.6, alpha=0.9)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_yticks(range(m.BUNDLE_SIZE + 1))
        errors = ", ".join(f"{name} {error:.3f}" for name, error in track.scale_error.items())
        print(f"{title}: error of the gradient's scale {errors}")
    axes[0].set_ylabel("quantile of the bundle score")
    for level, height in (("α = 0.2", 2.15), ("β = 0.8", 4.2)):
        axes[0].text(159, height, f"level {level}", ha="right", color=MUTED)
    for name, colour in (("true quantile", INK), ("tracker=sgd", ORANGE), ("tracker=ema", BLUE)):
        axes[0].plot([], [], color=colour, linestyle=DASHED if colour == INK else "-", linewidth=1.6, label=name)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


# -------------------------------------------------------------------------------------------------------- variance
SIZES = ((5, 5), (5, 10), (8, 16))
VARIANCE_BARS = {
    "paired": ("one pairing (the paper)", FAINT),
    "exact": ("all pairings", "#a5c8f0"),
    "paired + leave-one-out": ("one pairing, leave-one-out", "#8c959f"),
    "exact + leave-one-out": ("all pairings, leave-one-out (riskpo)", BLUE),
}


def variance() -> Figure:
    """Variance of the gradient under each pairing and baseline."""
    simulated = [m.variances(*size) for size in SIZES]
    figure, axis = plt.subplots(figsize=(9.2, 3.2))
    width = 0.2
    for k, (name, (label, colour)) in enumerate(VARIANCE_BARS.items()):
        values = [found[name] for found in simulated]
        place = np.arange(len(SIZES)) + (k - 1.5) * width
        bars = axis.bar(place, values, width * 0.92, color=colour, label=label)
        axis.bar_label(bars, [f"{v:.3f}" for v in values], padding=2, fontsize=8.5, color=INK)
    groups = []
    for (size, responses), found in zip(SIZES, simulated, strict=True):
        paper, centred, best = (found[k] for k in ("paired", "paired + leave-one-out", "exact + leave-one-out"))
        groups.append(f"B = {size}, G = {responses}\n{paper / best:.1f} times less under riskpo")
        rounded = {name: round(value, 3) for name, value in found.items()}
        print(
            f"B={size}, G={responses}: {rounded}; {paper / best:.1f} times less, {centred / best:.1f} by pairing alone"
        )
    axis.set_xticks(range(len(SIZES)), groups, color=INK)
    axis.tick_params(axis="x", length=0)
    axis.set_ylabel("summed variance of the gradient")
    axis.margins(y=0.1)
    axis.legend(loc="upper right")
    return figure


# ------------------------------------------------------------------------------------------------------ difficulty
def difficulty() -> Figure:
    """Weight of a question in the expected gradient by its success rate."""
    found = m.weights_by_difficulty(steps=300)
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.6), sharey=True)
    panels = (
        (
            "riskpo (MVaR), by bundling",
            {
                "same_question": ("same_question", ORANGE),
                "difficulty": ("difficulty", GREEN),
                "random": ("random (default)", BLUE),
            },
        ),
        (
            "published estimator, and GRPO",
            {
                "published, std": ("credit_assign_mode=std", PURPLE),
                "published, uniform": ("credit_assign_mode=uniform", GOLD),
                "grpo": ("grpo", MUTED),
            },
        ),
    )
    for axis, (title, lines) in zip(axes, panels, strict=True):
        for name, (label, colour) in lines.items():
            axis.plot(m.SUCCESS_RATES, found[name][0], color=colour, label=label)
        axis.axhline(1, color=INK, linewidth=1.0, linestyle=DASHED, label="mean objective (rloo)")
        axis.set_title(title)
        axis.set_xlabel("success rate of the question (hard to easy)")
        axis.legend()
    axes[0].set_ylabel("weight in the expected gradient")
    axes[0].set_ylim(0)
    for name, (weight, cosine) in found.items():
        shown = ", ".join(f"{p:.2f}: {w:.2f}" for p, w in zip(m.SUCCESS_RATES, weight, strict=True))
        print(f"{name}: cosine with the mean {cosine:.4f}; weights by success rate {shown}")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {f.__name__: f for f in (advantage, tracker, variance, difficulty)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    options = parser.parse_args()
    for name in options.names:
        if name not in FIGURES:
            parser.error(f"there is no figure {name}; there are {', '.join(FIGURES)}")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name in options.names or FIGURES:
        with plt.rc_context(STYLE), one_thread():
            figure = FIGURES[name]()
            path = options.output_dir / f"{name}.{options.format}"
            figure.savefig(path, dpi=110, metadata={"Date": None} if options.format == "svg" else None)
            plt.close(figure)
        print(path)


if __name__ == "__main__":
    main()
