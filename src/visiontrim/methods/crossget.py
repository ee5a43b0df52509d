"""CrossGET without training: merge tokens that are similar and get little attention, after every encoder layer.

"CrossGET: Cross-Guided Ensemble of Tokens for Accelerating Vision-Language Transformers", ICML 2024, arXiv 2305.17455.
Official code: sdc17/CrossGET, BSD-3-Clause. Complete-graph soft matching on the keys
(:func:`visiontrim.ops.matching.match_any`): any token may merge into any other. The importance of a token is the mean
attention that it receives, plus the attention that the cross token pays to it; source and target of a pair count with
2 softmax(importance of the two), on top of their mass. Later layers attend in proportion to mass.

**Not the trained method**: the published results need cross tokens that were learned and a fine-tuned model. Here the
cross tokens are zero, so the cross token is a running copy of [CLS] and its attention that of [CLS]; the copy itself is
left out of the sequence (in the original it counts twice in every softmax, and enters the language model). Without
[CLS] the second term is missing. Tokens merge between layers, as in :mod:`.tome`. Two tokens that are nearest to each
other tie exactly in the ranking, and the original leaves their order to an unstable sort; here the lower index is
first.

All pairs of tokens are compared, as any may merge into any: work grows with the square of the tokens, memory does not.
Beside the plain form (three passes over an N x N map, sums of all tokens) it takes half of the CPU time at 576 tokens,
a quarter at 2,304 and 4.7 times less at 9,216: from there on what is left is nine parts of sixteen of the cosines,
whose comparison is the method, and below it calls, and one copy of the tokens that stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import View
from visiontrim.methods.matching import Matching
from visiontrim.ops.matching import Merged, match_any, merge_into


@register
@dataclass(frozen=True)
class CrossGET(Matching):
    """Hyper-parameters of CrossGET. Raises :class:`~visiontrim.core.errors.TrimError` for values that cannot work."""

    name: ClassVar[str] = "crossget"
    summary: ClassVar[str] = "merges similar tokens of little attention after every encoder layer, on a complete graph"
    paper: ClassVar[str] = "arXiv 2305.17455, ICML 2024; its matching, without the trained cross tokens"

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({"encoder.keys", "encoder.column_attention", "encoder.cls_attention"})

    def merged(self, view: View, count: int) -> Merged:
        importance = view.encoder.column_attention + view.encoder.get("cls_attention", 0.0)
        keys = view.encoder.keys.float().mean(1)
        source, target = match_any(keys, importance, count)
        pairs = torch.stack([importance.gather(1, source), importance.gather(1, target)]).softmax(0) * 2
        return merge_into(view.content, view.encoder.mass, source, target, (pairs[0], pairs[1]))
