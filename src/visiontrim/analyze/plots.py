"""Pictures of what attention does, with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from visiontrim.analyze.attention import BINS, POINTS, QUERIES, SIDE, Attention
from visiontrim.plotting import pyplot

TITLES = {"last": "last position", "text": "text", "all": "all positions"}


def shift(found: Attention, file: Path) -> None:
    """Mean maps of the encoder and of chosen layers, one row for each kind of queries, and where each layer looks."""
    plt = pyplot()
    layers = _chosen(found.layers)
    columns = len(layers) + found.sees_encoder
    figure, axes = plt.subplots(4, columns, figsize=(1.7 * columns, 7.6), layout="constrained", squeeze=False)
    for row, kind in enumerate(QUERIES):
        maps = [(f"layer {layer}", found.decoder[kind][layer].maps) for layer in layers]
        if found.sees_encoder:
            maps.insert(0, ("encoder", found.encoder.maps))
        for axis, (title, values) in zip(axes[row], maps, strict=True):
            values = values / found.prompts * SIDE**2
            axis.imshow(values, cmap="magma", vmin=0, vmax=max(float(np.percentile(values, 99)), 1e-9))
            axis.set(xticks=[], yticks=[], title=title if row == 0 else "")
            axis.spines[:].set_visible(False)
        axes[row][0].set_ylabel(TITLES[kind])
    for axis in axes[3]:
        axis.remove()
    grid = axes[3][0].get_gridspec()
    half = max(1, columns // 2)
    left, right = figure.add_subplot(grid[3, :half]), figure.add_subplot(grid[3, half:])
    _curves(found, left, "height", "mean row: 0 top, 1 bottom")
    _curves(found, right, "overlap", "best tenth shared with encoder", encoder=False)
    right.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def dispersion(found: Attention, file: Path) -> None:
    """Cumulative curves of sorted attention and its histogram: the encoder against layers, last position."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    share = np.arange(1, POINTS + 1) / POINTS
    layers = _chosen(found.layers)
    sources = [(f"layer {layer}", found.decoder["last"][layer]) for layer in layers]
    colours = plt.get_cmap("viridis")(np.linspace(0.05, 0.9, len(layers)))
    for (name, source), colour in zip(sources, colours, strict=True):
        left.plot(share, source.cumulative / found.prompts, color=colour, label=name)
        right.stairs(source.histogram / found.prompts, BINS, color=colour)
    if found.sees_encoder:
        left.plot(share, found.encoder.cumulative / found.prompts, color="crimson", lw=2, label="encoder")
        right.stairs(found.encoder.histogram / found.prompts, BINS, color="crimson", lw=2)
    left.plot([0, 1], [0, 1], color="grey", lw=0.8, ls=":", label="even")
    left.set(xlabel="share of the tokens, best first", ylabel="share of the attention", xlim=(0, 1), ylim=(0, 1.01))
    left.legend(frameon=False, fontsize=8)
    right.set(xscale="log", xlabel="attention, 1 = even", ylabel="share of the tokens")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def layers(found: Attention, file: Path) -> None:
    """Where the attention of each layer goes (before, to and after the image), and how even it is on the image."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.2), layout="constrained")
    number = np.arange(found.layers)
    for axis, kind in zip(axes[:2], ("last", "text"), strict=True):
        shares = np.stack([source.shares for source in found.decoder[kind]]).T / found.prompts
        bottom = np.zeros(found.layers)
        for name, values, colour in zip(
            ("before", "image", "after"), shares, ("#9aa5b1", "#e07a3f", "#3f6fb5"), strict=True
        ):
            axis.bar(number, values, bottom=bottom, color=colour, label=name, width=0.85)
            bottom += values
        axis.set(xlabel="decoder layer", ylabel=f"attention of the {TITLES[kind]}", ylim=(0, 1))
    axes[0].legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    _curves(found, axes[2], "entropy", "entropy on the image, 1 = even")
    axes[2].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _curves(found: Attention, axis: Any, name: str, label: str, encoder: bool = True) -> None:
    for kind in QUERIES:
        values = [getattr(source, name) / found.prompts for source in found.decoder[kind]]
        axis.plot(values, marker="o", ms=3, label=TITLES[kind])
    if encoder and found.sees_encoder:
        axis.axhline(getattr(found.encoder, name) / found.prompts, color="crimson", ls="--", lw=1, label="encoder")
    axis.set(xlabel="decoder layer", ylabel=label, ylim=(0, 1.02))


def _chosen(layers: int) -> list[int]:
    """At most eight layers, evenly from the first to the last."""
    return sorted({round(layer) for layer in np.linspace(0, layers - 1, min(layers, 8))})
