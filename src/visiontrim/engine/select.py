"""Images in a forward of the language model: where their tokens are, and what a step between layers sees of them.

It knows the places of tokens and asks a step which stay; it does not drop any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.core.method import DecoderLayer, Step
from visiontrim.core.signals import DecoderSignals, MissingSignal, TextSignals
from visiontrim.core.view import Keep, View
from visiontrim.engine.context import Exact
from visiontrim.engine.forward import Prefill
from visiontrim.engine.groups import Group
from visiontrim.engine.hearing import Asked
from visiontrim.models.family import Family, Kind


def place_groups(prefill: Prefill, family: Family) -> None:
    """Find the tokens of every image of the call in the chunk.

    When generate() has expanded the batch (beams, several sequences), each row gets its own copy of the groups.
    Raises :class:`TrimError` if placeholders and images do not fit.
    """
    call, ids = prefill.call, prefill.call.forward_ids
    copies = len(ids) // call.rows
    prefill.groups = [expanded(group, copies) for group in call.groups]
    numbers = torch.tensor([row for group in prefill.groups for row in group.rows], dtype=torch.long, device=ids.device)
    prefill.rows = list(numbers.split([len(group.rows) for group in prefill.groups]))
    wanted = sum(group.places.numel() + group.marks.numel() for group in prefill.groups)
    there = call.counted
    if there is not None and there.covers(ids):
        found = sum(map(sum, there.placeholders.values())) * (len(ids) // there.rows)
    else:
        found = int(family.placeholders(ids).sum())
    if not wanted or found != wanted:
        raise TrimError(
            f"this forward holds {found} image placeholders but {wanted} vision tokens were encoded in this "
            "run: pass pixel_values, and the whole prompt in one forward"
        )
    # placeholders of each row in order, then everything else
    order = {kind: (~family.placeholders(ids, kind)).long().argsort(dim=1, stable=True) for kind in family.kinds}
    for group, rows in zip(prefill.groups, prefill.rows, strict=True):
        prefill.alive.columns.append(order[group.part.kind][rows[:, None], group.places])
        prefill.alive.marks.append(order[group.part.kind][rows[:, None], group.marks])
    prefill.whole = prefill.entered = prefill.alive.columns


def checked_select(step: Step, view: View) -> Keep:
    """What ``step`` keeps of ``view``; between decoder layers it may be nothing.

    Raises :class:`TrimError` for an answer whose shapes cannot belong to the view.
    """
    try:
        keep = step.select(view)
    except MissingSignal as missing:
        if missing.signal in step.needs:
            raise
        raise TrimError(f"{step} reads the signal {missing.signal!r}, which its needs do not list: add it") from None
    batch, tokens, dim = view.features.shape
    kept = keep.index.shape[-1]
    width = view.encoder.projected.shape[-1] if "projected" in view.encoder else None
    fewest = 0 if isinstance(step.site, DecoderLayer) else 1
    shapes = {
        "index": (keep.index, (batch, kept)),
        "features": (keep.features, (batch, kept, dim)),
        "assignment": (keep.assignment, (batch, tokens)),
        "complement": (keep.complement, (batch, kept)),
        "marked": (keep.marked, (batch, kept)),
        "noted": (keep.noted, (batch, kept)),
        "projected": (keep.projected, None if width is None else (batch, kept, width)),
    }
    for name, (given, wanted) in shapes.items():
        if (given is not None and tuple(given.shape) != wanted) or not fewest <= kept <= tokens:
            raise TrimError(
                f"the method {step} answered {name} of shape {tuple(given.shape) if given is not None else None} for "
                f"{batch} images of {tokens} tokens of width {dim}: give {wanted}, and between {fewest} and {tokens} "
                "tokens"
            )
    return keep


def expanded(group: Group, copies: int) -> Group:
    """The group once every row of the batch is followed by its copies, ``copies`` in all."""
    if copies == 1:
        return group
    rows, images = zip(
        *(
            (row * copies + copy, image)
            for row in sorted(set(group.rows))
            for copy in range(copies)
            for image, owner in enumerate(group.rows)
            if owner == row
        ),
        strict=True,
    )
    return group.select(list(images), rows)


def select_between_layers(
    prefill: Prefill,
    steps: Mapping[Kind, Step],
    hidden: Float[Tensor, "batch tokens dim"],
    num_layers: int,
    norm: Callable[[Tensor], Tensor],
    exact: Exact,
) -> tuple[Tensor, Bool[Tensor, "batch tokens"], list[Tensor] | None, list[Tensor]]:
    """Let a step select among the tokens of its kind that are left; ``norm`` is the input norm of the coming layer.

    Returns the hidden states (with merged ones written in), which of their tokens stay, and for every group the places
    of its surviving tokens (None for all groups if all stay) and marks.
    """
    alive = prefill.alive
    keep = torch.ones_like(alive.valid)
    seen = exact(hidden)
    asked = {step: Asked(prefill, step, seen, norm) for step in dict.fromkeys(steps.values())}
    columns, marks, groups, merged = [], [], [], hidden
    for number, (group, rows, column, mark) in enumerate(
        zip(prefill.groups, prefill.rows, alive.columns, alive.marks, strict=True)
    ):
        step = steps.get(group.part.kind)
        if step is None:
            columns.append(column)
            marks.append(mark)
            groups.append(group)
            continue
        decoder, text = asked[step].of_group(number) if group.kept else (DecoderSignals(), TextSignals())
        view = View(
            features=seen[rows[:, None], column],
            coordinates=group.coordinates,
            grid=group.grid,
            entered=group.entered,
            num_layers=num_layers,
            whole=group.part.whole,
            before=group.part.before,
            marked=group.now.marked,
            noted=group.now.noted,
            decoder=decoder,
            text=text,
        )
        kept = checked_select(step, view) if group.kept else Keep.everything(view)
        stays = column.gather(1, kept.index.sort(-1).values)
        if kept.features is not None:
            merged = merged.clone() if merged is hidden else merged
            merged[rows[:, None], stays] = kept.features.to(hidden.dtype)
        keep[rows[:, None], column] = False
        keep[rows[:, None], stays] = True
        columns.append(stays)
        groups.append(group.after(kept, step.site))
        left = groups[-1].marks_beside(groups[-1].kept)
        keep[rows[:, None], mark[:, left:]] = False
        marks.append(mark[:, :left])
    unchanged = all(new.kept == old.kept for new, old in zip(groups, prefill.groups, strict=True))
    prefill.groups = groups
    return merged, keep, None if unchanged else columns, marks
