"""Pictures of what attention does, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visiontrim.analyze.attention import BINS, POINTS, QUERIES, SIDE, Attention, Source
from visiontrim.analyze.horizon import Horizon
from visiontrim.plotting import pyplot

TITLES = {"last": "last position", "text": "text", "all": "all positions", "image": "image"}
STYLES = {
    "last": {"marker": "o", "color": "C0", "ls": "-"},
    "text": {"marker": "s", "color": "C1", "ls": "-"},
    "all": {"marker": "^", "color": "C2", "ls": "-", "lw": 2.4, "alpha": 0.6},
    "image": {"marker": "D", "color": "C4", "ls": "--"},
}
"""All positions and the image's own often look alike: the second is dashed on the first. Red is the encoder's."""
CLS_TOP = 0.005
"""Upper end of the encoder's bars, as published."""
SHOWN = (-0.01, 0.16)
"""Part of the histogram's axis that is shown, as published."""


def shift(found: Attention, file: Path, kinds: Sequence[str] = QUERIES, chosen: Sequence[int] = ()) -> list[Path]:
    """Mean maps of the encoder and of layers, a row for each kind of queries, and where each layer looks.

    A second picture, ``NAME-bars``, has the attention to each token by its index, as it is defined.
    """
    plt = pyplot()
    layers = list(chosen) or _chosen(found.layers)
    columns = len(layers) + found.sees_encoder
    rows = len(kinds)
    figure = plt.figure(figsize=(1.7 * max(columns, 4), 1.75 * rows + 2.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.75 * rows, 2.4])
    axes = upper.subplots(rows, columns, squeeze=False)
    for row, kind in enumerate(kinds):
        maps = [(f"layer {layer}", found.decoder[kind][layer].maps) for layer in layers]
        if found.sees_encoder:
            maps.insert(0, ("encoder", found.encoder.maps))
        for column, (axis, (title, values)) in enumerate(zip(axes[row], maps, strict=True)):
            if row and found.sees_encoder and not column:  # it is the same for every kind
                axis.set_axis_off()
                continue
            values = values / found.prompts * SIDE**2
            axis.imshow(values, cmap="magma", vmin=0, vmax=max(float(np.percentile(values, 99)), 1e-9))
            axis.set(xticks=[], yticks=[], title=title if row == 0 else "")
            axis.spines[:].set_visible(False)
        axes[row][int(found.sees_encoder)].set_ylabel(TITLES[kind])
    left, right = lower.subplots(1, 2)
    _curves(found, left, "height", "mean row\n0 top, 1 bottom", kinds)
    _curves(found, right, "overlap", "shared with the\nencoder's best tenth", kinds, encoder=False)
    right.autoscale(axis="y")  # few share much
    right.set_ylim(bottom=0)
    _legend(left)
    figure.savefig(file, dpi=130)
    plt.close(figure)
    bars = file.with_name(f"{file.stem}-bars{file.suffix}")
    return [file, bars] if _bars(found, bars, kinds, layers) else [file]


def _bars(found: Attention, file: Path, kinds: Sequence[str], layers: Sequence[int]) -> bool:
    """Attention to each token by its index; nothing where prompts had different numbers of tokens."""
    sources = {kind: [found.decoder[kind][layer] for layer in layers] for kind in kinds}
    if any(source.raw is None for some in sources.values() for source in some):
        return False
    plt = pyplot()
    columns = len(layers) + found.sees_encoder
    wide, high = 1.75 * columns + 0.3, 1.45 * len(kinds) + 0.6
    # Margins in inches: of so many axes, matplotlib's own layout takes longer than all the drawing
    edges = {"left": 0.4 / wide, "right": 1 - 0.1 / wide, "bottom": 0.5 / high, "top": 1 - 0.35 / high}
    figure, axes = plt.subplots(
        len(kinds),
        columns,
        figsize=(wide, high),
        squeeze=False,
        sharex=True,
        gridspec_kw=edges | {"wspace": 0.4, "hspace": 0.32},
    )
    for row, kind in enumerate(kinds):
        some: list[tuple[str, Source]] = [
            (f"layer {layer}", source) for layer, source in zip(layers, sources[kind], strict=True)
        ]
        if found.sees_encoder:
            some.insert(0, ("encoder", found.encoder))
        for column, (axis, (title, source)) in enumerate(zip(axes[row], some, strict=True)):
            if row and found.sees_encoder and not column:
                axis.set_axis_off()
                continue
            raw = np.zeros(1) if source.raw is None else source.raw / found.prompts
            # One outline, since a bar of its own for each token takes a second for every few hundred
            places = np.arange(len(raw) + 1) - 0.5
            axis.stairs(raw, places, fill=True, color="crimson" if title == "encoder" else "#3f6fb5")
            axis.set(title=title if row == 0 else "", xlim=(-0.5, len(raw) - 0.5))
            axis.tick_params(labelsize=6)
            axis.locator_params(axis="y", nbins=4)
            axis.ticklabel_format(axis="y", scilimits=(-2, 2))
            axis.yaxis.get_offset_text().set_fontsize(6)
            if title == "encoder":
                axis.tick_params(labelbottom=True)  # nothing is below it
                axis.set_ylim(0, max(CLS_TOP, float(np.percentile(raw, 90))))
        axes[row][int(found.sees_encoder)].set_ylabel(TITLES[kind])
    figure.supxlabel("vision token", fontsize=9, y=0.08 / high)
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return True


def dispersion(found: Attention, file: Path, kinds: Sequence[str] = QUERIES, chosen: Sequence[int] = ()) -> list[Path]:
    """The last position's attention, sorted and summed up, and its histogram, beside the encoder's.

    Of the ``chosen`` layers, or of layer 1, which is the published one, beside up to seven others; the histogram is of
    the first one chosen.
    """
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.6), layout="constrained")
    share = 100 * np.arange(1, POINTS + 1) / POINTS
    published = min(1, found.layers - 1)
    layers = list(chosen) or sorted({published, *_chosen(found.layers)})
    colours = plt.get_cmap("viridis")(np.linspace(0.05, 0.9, len(layers)))
    for number, (layer, colour) in enumerate(zip(layers, colours, strict=True)):
        source, style = found.decoder["last"][layer], ("-", "--", "-.", ":")[number % 4]
        left.plot(share, 100 * source.cumulative / found.prompts, style, color=colour, label=f"layer {layer}")
    if found.sees_encoder:
        left.plot(share, 100 * found.encoder.cumulative / found.prompts, color="crimson", lw=2, label="encoder")
    left.plot([0, 100], [0, 100], color="grey", lw=0.8, ls=":", label="even")
    left.set(xlabel="share of the tokens in %, best first", ylabel="share of the attention in %")
    left.set(xlim=(0, 100), ylim=(0, 101))
    left.legend(frameon=False, fontsize=7, ncols=2)
    layer = layers[0] if chosen else published
    sources = [(f"layer {layer}", found.decoder["last"][layer], "#3f6fb5")]
    if found.sees_encoder:
        sources.append(("encoder", found.encoder, "crimson"))
    for name, source, colour in sources:
        right.stairs(source.histogram, BINS, color=colour, label=name, fill=name != "encoder", alpha=0.75)
    right.set(
        yscale="log", xlim=SHOWN, xlabel="attention, 1 = the largest of all prompts", ylabel="share of the tokens"
    )
    right.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return [file]


def layers(found: Attention, file: Path, kinds: Sequence[str] = QUERIES, chosen: Sequence[int] = ()) -> list[Path]:
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
    _curves(found, axes[2], "entropy", "entropy on the image, 1 = even", kinds)
    _legend(axes[2])
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return [file]


def horizon(found: Sequence[Horizon], file: Path) -> list[Path]:
    """What random tokens from a layer on lose, a line for each type of question, and what the method's do."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    layers = [depth.layer for depth in found[0].depths]
    for number, one in enumerate(found):
        style = {"color": "black", "lw": 2.2} if not number else {"lw": 1.0, "color": f"C{(number - 1) % 10}"}
        losses = [depth.loss for depth in one.depths]
        axis.plot(
            layers, losses, marker="os^Dv<>Pph"[number % 10], ms=4, mfc="none", label=f"random, {one.type}", **style
        )
    ours = [(depth.layer, depth.method) for depth in found[0].depths if depth.method is not None]
    if ours:
        axis.plot(*zip(*ours, strict=True), color="crimson", lw=2.2, ls="--", marker="*", label="method, all")
    axis.axhline(0, color="0.6", lw=0.8, zorder=0)
    axis.set(
        xlabel="decoder layer from which on the others are gone", ylabel="points over the plain model", xticks=layers
    )
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return [file]


def _curves(found: Attention, axis: Any, name: str, label: str, kinds: Sequence[str], encoder: bool = True) -> None:
    for kind in kinds:
        values = [getattr(source, name) / found.prompts for source in found.decoder[kind]]
        axis.plot(values, **({"ms": 4, "mfc": "none", "lw": 1.2, "label": TITLES[kind]} | STYLES[kind]))
    if encoder and found.sees_encoder:
        axis.axhline(getattr(found.encoder, name) / found.prompts, color="crimson", ls="--", lw=1, label="encoder")
    axis.set(xlabel="decoder layer", ylabel=label, ylim=(0, 1.02))
    axis.xaxis.get_major_locator().set_params(integer=True)


def _legend(axis: Any) -> None:
    """Above the axis, where it hides no line."""
    axis.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)


def _chosen(layers: int) -> list[int]:
    """At most eight layers, evenly from the first to the last."""
    return sorted({round(layer) for layer in np.linspace(0, layers - 1, min(layers, 8))})
