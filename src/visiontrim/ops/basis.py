"""A few tokens as a basis of all: how they are sampled, and what of a token they leave unexplained."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.ops.select import gather


def farthest_points(
    values: Float[Tensor, "batch tokens dim"], count: int, first: Int[Tensor, " batch"]
) -> Int[Tensor, "batch {count}"]:
    """Farthest-point sampling by the Euclidean distance: ``first``, then each token farthest from those before it.

    In the order of choice; of equally far ones the lower index, and none twice. float32; one step a point, each of
    which looks at all tokens once. Raises :class:`ValueError` for more points than tokens, or none.
    """
    if not 1 <= count <= values.shape[1]:
        raise ValueError(f"{count} of {values.shape[1]} tokens cannot be sampled")
    values, pick = values.float(), first
    picks, nearest = [pick], values.new_full(values.shape[:2], torch.inf)
    for _ in range(count - 1):
        squared = (values - gather(values, pick[:, None])).square().sum(-1)
        nearest = torch.minimum(nearest, squared).scatter(1, pick[:, None], -1.0)  # never again
        pick = nearest.argmax(1)
        picks.append(pick)
    return torch.stack(picks, 1)


def unexplained(
    values: Float[Tensor, "batch tokens dim"], basis: Int[Tensor, "batch basis"], ridge: float, *, relative: bool
) -> Float[Tensor, "batch tokens"]:
    """Norm of what each token keeps after its projection on the span of the tokens ``basis``, float32.

    The projection is x S^T (S S^T + r 1)^-1 S with the rows S of the basis; r is ``ridge``, times the mean squared norm
    of these rows if ``relative``. No row is left of an empty basis, so the answer is then the norm. The small system is
    solved in float64, since rows may be all but equal. Holds one copy of the values in float64.
    """
    values = values.double()
    if not basis.shape[1]:
        return torch.linalg.vector_norm(values, dim=-1).float()
    rows = gather(values, basis)
    gram = rows @ rows.mT
    scale = gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] if relative else 1.0
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    tiny = torch.finfo(gram.dtype).tiny  # rows may all be zero
    weight = torch.linalg.solve(gram + (ridge * scale + tiny) * eye, rows @ values.mT)
    return torch.linalg.vector_norm(values - weight.mT @ rows, dim=-1).float()
