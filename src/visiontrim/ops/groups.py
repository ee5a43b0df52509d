"""Groups of tokens: principal components over the token axis, ranks and suppression inside groups, quotas, counts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from visiontrim.ops.select import gather


def principal_loadings(
    values: Float[Tensor, "batch tokens dim"], components: int
) -> Float[Tensor, "batch tokens {components}"]:
    """Absolute loadings of the tokens on the first ``components`` principal directions of the token axis, float32.

    The columns are the absolute eigenvectors of V V^T [tokens x tokens], largest eigenvalue first; ``values`` come
    centred as the caller wants them. Exact, where randomised methods need a seed: the work is the cube of the tokens or
    of ``dim``, whichever are fewer, of which all eigenvectors are computed. Directions beyond these are 0.
    """
    values = values.float()
    tokens, dim = values.shape[1:]
    if tokens <= dim:
        return torch.linalg.eigh(values @ values.mT).eigenvectors[..., -components:].flip(-1).abs()
    size, vectors = torch.linalg.eigh(values.mT @ values)
    used = min(components, dim)
    size, vectors = size[..., -used:].flip(-1)[..., None, :], vectors[..., -used:].flip(-1)
    within = size > torch.finfo(size.dtype).eps * tokens * size[..., :1]  # what is left is rounding
    loadings = (values @ vectors).abs() * torch.where(within, size, torch.inf).rsqrt()
    return F.pad(loadings, (0, components - used))


def rank_within(
    group: Int[Tensor, "batch tokens"],
    score: Float[Tensor, "batch tokens"],
    behind: Bool[Tensor, "batch tokens"] | None = None,
) -> Int[Tensor, "batch tokens"]:
    """Rank of each token in its group by falling score, from 0, ties by index; tokens marked ``behind`` come last."""
    order = score.sort(dim=1, descending=True, stable=True).indices
    if behind is not None:
        order = order.gather(1, behind.long().gather(1, order).sort(dim=1, stable=True).indices)
    order = order.gather(1, group.gather(1, order).sort(dim=1, stable=True).indices)
    sorted_group = group.gather(1, order)
    place = torch.arange(group.shape[1], device=group.device).expand_as(group)
    begins = F.pad(sorted_group[:, 1:] != sorted_group[:, :-1], (1, 0), value=True)
    start = torch.where(begins, place, 0).cummax(1).values
    return torch.empty_like(group).scatter(1, order, place - start)


def first_members(
    group: Int[Tensor, "batch tokens"], score: Float[Tensor, "batch tokens"], groups: int, count: int
) -> Int[Tensor, "batch {groups} {count}"]:
    """The ``count`` tokens of each group with the highest score, ties by index; a smaller group begins anew.

    ``group`` numbers the groups from 0; a group without tokens gets -1.
    """
    rank = rank_within(group, score)
    place = torch.where(rank < count, group * count + rank, groups * count)  # the last entry: all further members
    table = torch.full_like(group[:, :1], -1).repeat(1, groups * count + 1)
    table.scatter_(1, place, torch.arange(group.shape[1], device=group.device).expand_as(group))
    size = torch.zeros_like(table[:, :groups]).scatter_add_(1, group, torch.ones_like(group))
    turn = torch.arange(count, device=group.device) % size[..., None].clamp(min=1)
    return table[:, :-1].view(len(group), groups, count).gather(2, turn)


def suppressed(
    unit: Float[Tensor, "batch tokens dim"],
    group: Int[Tensor, "batch tokens"],
    score: Float[Tensor, "batch tokens"],
    threshold: Float[Tensor, " batch"],
) -> Bool[Tensor, "batch tokens"]:
    """Non-maximum suppression in groups: a token goes if a better one that stays is more like it than ``threshold``.

    ``unit`` are normalised features; tokens are taken by falling score, ties by index. Groups stand side by side, each
    as wide as the largest, whose size the host reads. Work and memory grow with the square of that, and at most of the
    tokens.
    """
    batch, tokens = group.shape
    rank = rank_within(group, score)
    groups, largest = (int(value) + 1 for value in torch.stack([group.max(), rank.max()]).tolist())
    if groups * largest * largest > tokens * tokens:  # most are in one group: all stand in one line
        order = score.sort(dim=1, descending=True, stable=True).indices
        group, unit = group.gather(1, order), gather(unit, order)
        rivals = (unit @ unit.mT > threshold[:, None, None]) & (group[:, :, None] == group[:, None])
        return torch.zeros_like(group, dtype=torch.bool).scatter(1, order, _suppressed(rivals.tril(-1)))
    place = group * largest + rank
    table = torch.zeros(batch, groups * largest, dtype=torch.long, device=group.device)
    table.scatter_(1, place, torch.arange(tokens, device=group.device).expand_as(group))
    filled = torch.zeros_like(table, dtype=torch.bool).scatter(1, place, True).view(-1, largest)
    lines = gather(unit, table).view(batch * groups, largest, -1)
    rivals = lines @ lines.mT > threshold.repeat_interleave(groups)[:, None, None]
    rivals &= filled[:, None] & filled[..., None]
    return _suppressed(rivals.tril(-1)).view(batch, -1).gather(1, place)


def _suppressed(rivals: Bool[Tensor, "lines length length"]) -> Bool[Tensor, "lines length"]:
    """Which places of lines go, if ``rivals[l, i, j]`` says that place i goes where the earlier place j stays.

    In rounds: a place stays once all its rivals go, and goes once one of them stays, so each round decides at least the
    first open place of a line. Most are decided after a few; the host asks after every eighth.
    """
    stays = torch.zeros(rivals.shape[:2], dtype=torch.bool, device=rivals.device)
    goes = stays.clone()
    for turn in range(rivals.shape[1]):
        stays = stays | ~(goes | (rivals & ~goes[:, None]).any(-1))
        goes = goes | (rivals & stays[:, None]).any(-1)
        if turn % 8 == 7 and bool((stays | goes).all()):
            break
    return goes


def quotas(
    sizes: Int[Tensor, "batch groups"], survivors: Int[Tensor, "batch groups"], count: int, cap: int
) -> Int[Tensor, "batch groups"]:
    """``count`` tokens shared out over groups of ``sizes`` tokens, of which ``survivors`` were not suppressed.

    Every group that has a token gets one. The others are shared in proportion to the survivors, at most ``cap`` and the
    survivors each; where these limits leave less than ``count``, all are raised by the same number, up to the sizes.
    What the limits cut off goes to the groups with the most survivors, each filled before the next. Needs
    groups <= count <= sum of sizes.
    """
    least = sizes.clamp(max=1)
    limit = torch.minimum(survivors.clamp(max=cap), sizes)
    raised = torch.arange(count + 1, device=sizes.device)[:, None]
    enough = torch.minimum(limit[:, None] + raised, sizes[:, None]).sum(-1) >= count
    raise_by = enough.long().argmax(1, keepdim=True)  # the first that is enough
    limit = torch.minimum(limit + raise_by, sizes)
    free = (count - least.sum(1, keepdim=True)).clamp(min=0)
    so_far = (free * survivors.cumsum(1) / survivors.sum(1, keepdim=True).double()).round().long()
    share = torch.minimum(least + so_far.diff(dim=1, prepend=torch.zeros_like(so_far[:, :1])), limit)
    order = survivors.sort(dim=1, descending=True, stable=True).indices
    room = (limit - share).gather(1, order)
    missing = count - share.sum(1, keepdim=True)
    given = torch.minimum((missing - (room.cumsum(1) - room)).clamp(min=0), room)
    return share + torch.zeros_like(share).scatter(1, order, given)


def nearest_counts(
    targets: Float[Tensor, "batch groups"], sizes: Int[Tensor, "batch groups"], count: int, least: int = 0
) -> Int[Tensor, "batch groups"]:
    """Whole numbers that sum up to ``count`` and are as near to ``targets`` as can be, by the sum of squares.

    Each is at most the size of its group and at least ``least`` (or the size). Where the targets sum up to ``count``,
    this is rounding with the largest remainders, ties to the earlier group. Needs groups x least <= count <= sum of
    sizes. Holds groups x largest size numbers.
    """
    token = torch.arange(1, int(sizes.max()) + 1, device=sizes.device)
    gain = targets.double()[..., None] - token  # by which the j-th token brings a group nearer
    gain = gain.masked_fill(token <= least, torch.inf).masked_fill(token > sizes[..., None], -torch.inf)
    best = gain.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(sizes).scatter_add(1, best // len(token), torch.ones_like(best))
