"""Positional preservation: members, chunks, and the rotary encoding that decoder layers get, against slow loops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from transformers import LlamaConfig, Qwen2_5_VLTextConfig, Qwen3VLTextConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

import visiontrim as vt
from families import IMAGE, Prompts, build
from peers import answer, make_view
from tiny import generate
from views import changed
from visiontrim.engine.members import Members, chunks, nearest_members
from visiontrim.engine.survivors import Survivors
from visiontrim.methods import PPE
from visiontrim.models.qwen_vl import QwenVL
from visiontrim.ops.groups import first_members
from visiontrim.ops.recycle import density_peaks

pytestmark = pytest.mark.usefixtures("no_grad")


def test_members_in_the_order_of_the_released_code():
    """The last ones in raster order, walking back and round; group 3 has nobody."""
    group = torch.tensor([[0, 1, 0, 0, 1, 2, 0, 0]])
    found = first_members(group, torch.arange(8.0)[None], 4, 4)
    assert found[0].tolist() == [[7, 6, 3, 2], [4, 1, 4, 1], [5, 5, 5, 5], [-1, -1, -1, -1]]


def test_nearest_members_by_hand():
    """A grid of 3 x 3; survivor 0 stands for the middle and carries the first row and it, survivor 1 is 6 with 8 and 3;
    survivor 2 has place 7, which went to nobody. 5 is gone too."""
    survivors = Survivors(
        torch.tensor([[4, 6, 7]]), torch.tensor([[0, 0, 0, 1, 0, -1, 1, -1, 1]]), torch.zeros(1, 3, dtype=torch.bool)
    )
    assert nearest_members(survivors, (1, 3, 3), 4)[0].tolist() == [[4, 1, 0, 2], [6, 3, 8, 6], [7, 7, 7, 7]]
    assert nearest_members(survivors, (1, 3, 3), 2)[0].tolist() == [[4, 1], [6, 3], [7, 7]]
    assert nearest_members(survivors, (9, 1, 1), 4)[0, 1].tolist() == [6, 8, 3, 6]  # three frames away


HEAD = {"hidden_size": 256, "num_attention_heads": 2, "head_dim": 128}


def sines_of(rotary, axes):
    positions = torch.eye(axes, dtype=torch.long)[:, None] if axes > 1 else torch.ones(1, 1, dtype=torch.long)
    return rotary(torch.zeros(1), positions)[1][0]


def test_chunks_of_llama():
    """64 pairs, 8 for each of 8 members; a pair is the entries p and p + 64."""
    found = chunks(sines_of(LlamaRotaryEmbedding(LlamaConfig(**HEAD)), 1))
    assert found.number == 8
    assert found.member.tolist() == [pair // 8 for pair in range(64)] * 2


def test_chunks_of_qwen_2_5():
    """2 pairs for t, 3 for h and 3 for w per member."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    config = Qwen2_5_VLTextConfig(**HEAD, rope_parameters=rope)
    found = chunks(sines_of(Qwen2_5_VLRotaryEmbedding(config), 3))
    members = [k for pairs in (2, 3, 3) for k in range(8) for _ in range(pairs)]
    assert found.number == 8
    assert found.member.tolist() == members * 2


def test_chunks_of_qwen_3():
    """Interleaved axes, 24 + 20 + 20 pairs: every axis is cut within its own list of pairs, into 4."""
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    found = chunks(sines_of(Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(**HEAD, rope_parameters=rope)), 3))
    rows, columns = list(range(1, 60, 3)), list(range(2, 60, 3))
    times = [pair for pair in range(64) if pair not in rows + columns]
    members = [0] * 64
    for pairs in (times, rows, columns):
        for place, pair in enumerate(pairs):
            members[pair] = place // (len(pairs) // 4)
    assert found.number == 4
    assert found.member.tolist() == members * 2


@dataclass(frozen=True)
class Halves(vt.Step):
    """Each token takes up the next one, between decoder layers."""

    name: ClassVar[str] = "halves"

    @property
    def site(self):
        return vt.DecoderLayer(2)

    def select(self, view):
        batch, tokens, _ = view.features.shape
        index = torch.arange(0, tokens, 2).expand(batch, -1)
        return vt.Keep(index, view.features[:, ::2], torch.arange(tokens).expand(batch, -1) // 2)


class Watched:
    """What decoder layers 0 and 3 get as rotary encoding, and the language model as positions."""

    def __init__(self, model):
        self.model = model.model.language_model
        self.rotary: dict[int, list] = {0: [], 3: []}
        self.positions: list[Any] = []

    def __enter__(self):
        self.handles = [self.model.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True)]
        for layer in self.rotary:
            hook = self.at(layer)
            self.handles.append(self.model.layers[layer].register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def enter(self, module, args, kwargs):
        self.positions.append(kwargs["position_ids"])

    def at(self, layer):
        def hook(module, args, kwargs):
            self.rotary[layer].append(kwargs["position_embeddings"])

        return hook


def expected(model, positions, places, members, axes):
    """Angles [tokens, pairs], float64, of tokens at ``places`` of the prompt; ``members``: places, of merged ones."""
    frequencies = model.model.language_model.rotary_emb.inv_freq.double().tolist()
    angles = []
    for place in places:
        row = []
        for axis, pairs in enumerate(axes):
            for order, pair in enumerate(pairs):
                own = members.get(place, [place])
                count = math.gcd(8, *map(len, axes))
                member = own[(order // (len(pairs) // count)) % len(own)]
                row.append((pair, float(positions[axis, member]) * frequencies[pair]))
        angles.append([angle for _, angle in sorted(row)])
    return torch.tensor(angles, dtype=torch.float64)


@pytest.mark.parametrize(
    ("family", "axes"),
    [("llava", [range(8)]), ("qwen2_5_vl", [range(4), range(4, 6), range(6, 8)])],
    ids=["llava", "qwen2_5_vl"],
)
def test_decoder_layers_get_the_places_of_members(family, axes):
    """One image; its members by hand from the trace, at the seam and after a second merge between decoder layers."""
    model, inputs = build(family), Prompts(family, (3, "image", 5)).batch()
    plan = vt.AvgPool(keep=6) | Halves()
    with vt.trim(model, plan, positions="members") as run, Watched(model) as seen:
        generate(model, inputs, max_new_tokens=2)
    (image,) = run.trace.images
    first = int((inputs["input_ids"][0] == IMAGE).nonzero()[0])
    length, positions = inputs["input_ids"].shape[1], seen.positions[0]
    positions = positions.reshape(-1, length)[-len(axes) :]
    columns = image.grid[2]
    for layer, stage in ((0, image.stages[0]), (3, image.stages[1])):
        slots, members = sorted(stage.index.tolist()), {}
        for number, slot in enumerate(slots):
            own = [token for token in range(image.total) if stage.assignment[token] == number]
            centre = int(stage.index[number])

            def away(token, centre=centre):
                return (token // columns - centre // columns) ** 2 + (token % columns - centre % columns) ** 2

            members[first + slot] = [first + token for token in sorted(own, key=away)]
        assert max(map(len, members.values())) > 2
        alive = [p for p in range(length) if not first <= p < first + image.total or p in members]
        angles = expected(model, positions, alive, members, axes)
        cosines, sines = seen.rotary[layer][0]
        torch.testing.assert_close(cosines[0].double(), angles.cos().repeat(1, 2), rtol=0, atol=5e-6)
        torch.testing.assert_close(sines[0].double(), angles.sin().repeat(1, 2), rtol=0, atol=5e-6)
        later = positions[:, -1:] + 1  # the first new token: what follows the uncompressed prompt
        angles = expected(model, later, [0], {}, axes)
        torch.testing.assert_close(seen.rotary[layer][1][0][0].double(), angles.cos().repeat(1, 2), rtol=0, atol=5e-6)


def test_scores_are_sums_over_chunks():
    """q at the places of 8 members times k at one place: the sum over chunks of what single positions give."""
    model = build("llava")
    with vt.trim(model, vt.AvgPool(keep=2), positions="members") as run:
        members = cast(Any, run._session._stages[2])._members
        rotary, member = model.model.language_model.rotary_emb, members._chunks.member
        places, place = [11, 3, 4, 19, 30, 2, 1, 0], 40
        query, key = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).double()
        single = [rotary(torch.zeros(1), torch.tensor([[p]])) for p in (*places, place)]
        mixed = [
            torch.stack([single[int(member[entry])][part][0, 0, entry] for entry in range(16)]).double()
            for part in range(2)
        ]
    turned = query * mixed[0] + torch.cat([-query[8:], query[:8]]) * mixed[1]
    other = key * single[-1][0][0, 0] + torch.cat([-key[8:], key[:8]]) * single[-1][1][0, 0]
    total = 0.0
    for pair, frequency in enumerate(rotary.inv_freq.double().tolist()):  # a chunk is one pair here
        q, k = complex(query[pair], query[pair + 8]), complex(key[pair], key[pair + 8])
        angle = frequency * (places[pair] - place)
        total += (q * k.conjugate() * complex(math.cos(angle), math.sin(angle))).real
    assert float(turned @ other) == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_without_merging_nothing_changes(family):
    """K times the same member is the ordinary encoding, bit for bit, and keeping everything the plain model."""
    model, inputs = build(family), Prompts(family, (3, "image", 5), (6,)).batch()
    logits = {}
    for positions in ("keep", "members"):
        with vt.trim(model, vt.Random(keep=0.5) | vt.Random(keep=0.5, layer=2), positions=positions):
            logits[positions] = torch.stack(generate(model, inputs, max_new_tokens=3).logits)
    assert torch.equal(logits["keep"], logits["members"])
    plain = torch.stack(generate(model, inputs, max_new_tokens=3).logits)
    with vt.trim(model, "ppe", keep=1.0):
        assert torch.equal(torch.stack(generate(model, inputs, max_new_tokens=3).logits), plain)
    assert torch.equal(torch.stack(generate(model, inputs, max_new_tokens=3).logits), plain)


def test_the_rule_of_the_method():
    assert vt.PPE().positions == "members"
    assert (vt.AvgPool(keep=9) | vt.FastV()).positions == "compact"
    assert (vt.PPE() | vt.FastV()).positions == "members"
    assert vt.load_method(str(vt.PPE(keep=260))) == vt.PPE(keep=260)
    model, inputs = build("qwen2_5_vl"), Prompts("qwen2_5_vl", (3, "image", 5)).batch()
    logits = []
    for method, positions in (("ppe", None), ("ppe", "members"), ("ppe", "keep")):
        with vt.trim(model, method, keep=4, positions=positions):
            logits.append(model(**inputs).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[1], logits[2])


@pytest.mark.parametrize(("grid", "count", "shares"), [((1, 6, 7), 19, [19]), ((3, 3, 4), 17, [5, 6, 6])])
def test_clusters(grid, count, shares):
    """Every token is in the cluster of the nearest centre of its frame, and clusters become their means."""
    view = make_view(grid=grid)
    kept, places = answer(vt.PPE(keep=count), view), grid[1] * grid[2]
    for b in range(2):
        x, centres = view.encoder.projected[b].double(), kept.index[b].tolist()
        assert centres == sorted(set(centres))
        assert [sum(c // places == frame for c in centres) for frame in range(grid[0])] == shares
        for token, output in enumerate(kept.assignment[b].tolist()):
            rivals = [c for c in centres if c // places == token // places]
            assert token not in rivals or centres[output] == token
            assert token in rivals or centres[output] == min(rivals, key=lambda c, t=token: float((x[t] - x[c]).norm()))
        for output in range(count):
            own = [token for token in range(view.total) if kept.assignment[b, token] == output]
            torch.testing.assert_close(kept.projected[b, output].double(), x[own].mean(0), rtol=1e-5, atol=1e-5)
            assert bool(kept.complement[b, output]) == (len(own) > 1)


def test_fewer_tokens_than_frames():
    kept = answer(vt.PPE(keep=2), make_view(grid=(3, 3, 4)))
    frames = (kept.index // 12).tolist()
    assert frames == [[1, 2]] * 2
    assert (kept.assignment[:, :12] == -1).all()
    assert (kept.assignment[:, 12:] >= 0).all()


def test_what_cannot_work_is_refused(monkeypatch):
    with pytest.raises(vt.TrimError, match=r"which \[2, 3, 3\] pairs cannot be: use 'keep'"):
        chunks(torch.block_diag(torch.tensor([[1.0, 0.5]]), *torch.tensor([[[1.0, 0.5, 0.25]]] * 2)))
    with pytest.raises(vt.TrimError, match="Gemma3ForConditionalGeneration has several rotary encodings"):
        vt.trim(build("gemma3"), vt.AvgPool(), positions="members")
    model, inputs = build("qwen2_5_vl"), Prompts("qwen2_5_vl", (3, "image", 5)).batch()
    monkeypatch.setattr(QwenVL, "mrope", False)
    with vt.trim(model, "ppe"), pytest.raises(vt.TrimError, match="a position of this model is 3 numbers"):
        model(**inputs)
    axes = torch.zeros(3, 1, 3, 16)
    rotary = SimpleNamespace(inv_freq=torch.ones(8), forward=lambda like, position_ids: (axes, axes))
    language = SimpleNamespace(language_model=SimpleNamespace(rotary_emb=rotary), mrope=True, axes=3)
    with pytest.raises(vt.TrimError, match="leaves the 3 axes of a position to the decoder layers"):
        Members(cast(Any, language), cast(Any, None))


def test_few_centres_are_measured_by_fewer_neighbours():
    """Of n < 5 centres of a frame min(3, max(n // 2, 1)) neighbours, itself counted, make the density."""
    differ = 0
    for seed in range(6):
        tokens = torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(seed))
        view = changed(make_view(grid=(1, 5, 6), batch=1, width=8), {"encoder.projected": tokens})
        for count, neighbours in ((1, 1), (2, 1), (3, 1), (4, 2), (5, 5), (6, 5)):
            kept = answer(PPE(keep=count), view)
            assert torch.equal(kept.index, density_peaks(tokens, count, neighbours).centres)
            differ += not torch.equal(kept.index, density_peaks(tokens, count, 5).centres)
    assert differ
