"""Options, budgets and answers of the methods, and the ways to write a method down."""

import dataclasses
import functools
import json

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from peers import rows
from views import changed, grouped, showing
from visiontrim.core.errors import TrimError
from visiontrim.core.method import DecoderLayer, Layers, Plan, VisionOutput
from visiontrim.core.registry import list_methods, load_method
from visiontrim.core.signals import Text
from visiontrim.core.view import Keep, View
from visiontrim.methods import NoTrim, Random, Uniform, VisionTrim
from visiontrim.ops.affinity import local_affinity, nearest_affinity
from visiontrim.ops.complement import complement
from visiontrim.ops.select import gather, leftovers, top_k


def make_view(seed=0, grid=(1, 6, 7), batch=2, dim=8, words=5, tokens=None, entered=None, num_layers=32):
    """A view with every signal; with ``tokens``, of survivors of an earlier stage. The last question is padded."""
    generator = torch.Generator().manual_seed(seed)
    total = grid[0] * grid[1] * grid[2]
    tokens = total if tokens is None else tokens

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    index = torch.stack([torch.randperm(total, generator=generator)[:tokens].sort().values for _ in range(batch)])
    features = noise(batch, tokens, dim)
    mask = torch.ones(batch, words, dtype=torch.bool)
    mask[-1, -1] = False
    at_output = tokens == total and entered is None
    signals = {
        "encoder.cls_attention": noise(batch, tokens).softmax(-1),
        "encoder.received_attention": noise(batch, tokens).softmax(-1),
    }
    if at_output:
        joint = features @ noise(dim, 4)
        signals |= {"text.joint": joint, "text.joint_last": joint}
    signals["text.question"] = Text(noise(batch, words, 4 if at_output else dim), mask, 14.0)
    signals["decoder.query"] = noise(batch, dim)
    return View(
        features=features,
        coordinates=gather(torch.cartesian_prod(*map(torch.arange, grid)).expand(batch, -1, -1), index),
        grid=grid,
        entered=total if entered is None else entered,
        num_layers=num_layers,
        **grouped(signals),
    )


def answer(method, view):
    (step,) = method.steps()
    return step.select(view)


def same(a: Keep, b: Keep):
    return all(
        (x is None and y is None) or torch.equal(x, y)
        for x, y in ((getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Keep))
    )


vision = functools.partial(VisionTrim, stages="vision")
"""The paper's method in the vision stage alone."""
VISION = [
    vision(keep=12),
    vision(keep=0.5, normalise="z-scores", merge="mean"),
    vision(keep=12, fusion="cls", merge="uniform", iterations=1),
    vision(keep=12, fusion="local", sigma="entries", centre=True, border="window"),
    vision(keep=12, weight="higher", global_score="received", window=5, iterations=2),
    vision(keep=12, similarity="dot", sign=-1, iterations=1),
    vision(keep=12, patch_space="last", scale=3.0, iterations=0),
    vision(keep=12, guidance="none"),
    VisionTrim(keep=12, variant="release"),
    Random(keep=12),
    Uniform(keep=12),
]
LANGUAGE = [
    VisionTrim(keep=12, stages="language"),
    VisionTrim(keep=12, stages="language", iterations=1),
    VisionTrim(keep=12, stages="language", layer=4, neighbourhood="nearest", merge="add", iterations=3),
    VisionTrim(keep=0.25, stages="language", fusion="local"),
    VisionTrim(keep=12, stages="language", fusion="cls", guidance="none"),
    Random(keep=12, layer=2),
    Uniform(keep=0.3, layer=2),
]
CASES = [(method, make_view()) for method in VISION] + [
    (method, make_view(tokens=tokens, entered=tokens)) for method in LANGUAGE for tokens in (42, 30)
]
every_case = pytest.mark.parametrize(("method", "view"), CASES, ids=lambda x: str(x) if not isinstance(x, View) else "")


# answers


@every_case
def test_answer_is_whole(method, view):
    """Shapes, order, and an assignment that sends every token to an output or nowhere, every output to itself."""
    keep = answer(method, view)
    batch, tokens, dim = view.features.shape
    kept = keep.index.shape[1]
    assert 1 <= kept < tokens
    assert all(len(set(row)) == kept and min(row) >= 0 and max(row) < tokens for row in keep.index.tolist())
    if method.positions == "keep":
        assert torch.equal(keep.index, keep.index.sort(1).values)
    if keep.features is None:
        assert keep.assignment is None
        assert keep.complement is None
        return
    assert keep.features.shape == (batch, kept, dim)
    assert torch.isfinite(keep.features).all()
    assert keep.assignment.shape == (batch, tokens)
    assert keep.complement.shape == (batch, kept)
    assert torch.equal(gather(keep.assignment, keep.index), torch.arange(kept).expand(batch, kept))
    assert keep.assignment.max() == kept - 1
    assert keep.assignment.min() >= -1
    untouched = torch.where(keep.complement[..., None], keep.features, gather(view.features, keep.index))
    assert torch.equal(keep.features, untouched)
    takers = keep.assignment.clamp(min=0).gather(1, leftovers(keep.index, tokens))
    assert keep.complement.gather(1, takers).all() or method.iterations == 0  # only complement tokens take up others


@every_case
def test_answer_is_pure(method, view):
    before = view.features.clone()
    assert same(answer(method, view), answer(method, view))
    assert torch.equal(view.features, before)


@every_case
def test_needs_are_all_that_is_read(method, view):
    (step,) = method.steps()
    assert same(step.select(showing(view, step.needs)), step.select(view))


@every_case
def test_batch_equals_single(method, view):
    batch = answer(method, view)
    single = answer(method, rows(view, [0]))
    assert torch.equal(single.index, batch.index[:1])
    if batch.features is not None:
        torch.testing.assert_close(single.features, batch.features[:1])


def test_needs():
    def needs(**options):
        return tuple(step.needs for step in VisionTrim(**options).steps())

    assert needs(stages="vision") == ({"encoder.cls_attention", "text.joint", "text.question"},)
    assert needs(stages="vision", guidance="none") == ({"encoder.cls_attention"},)
    assert needs(stages="vision", guidance="none", fusion="local") == (set(),)
    assert needs(stages="vision", global_score="received", patch_space="last") == (
        {"encoder.received_attention", "text.joint_last", "text.question"},
    )
    assert needs() == needs(stages="both")
    assert needs(variant="lean") == needs(stages="vision")
    assert needs(variant="release") == (
        {"encoder.cls_attention", "encoder.received_attention", "text.joint", "text.question"},
    )
    assert needs(stages="language") == ({"decoder.query", "text.question"},)
    assert needs(stages="language", guidance="none") == ({"decoder.query"},)
    assert needs(stages="both") == (
        {"encoder.cls_attention", "text.joint", "text.question"},
        {"decoder.query", "text.question"},
    )
    assert Random().needs == Uniform(layer=3).needs == set()


def test_defaults_are_the_paper_with_both_stages_where_the_model_has_them():
    """Sections 3.1 to 3.3: both scores by their variances, three rounds of eq. 10, before and inside the decoder."""
    method = VisionTrim()
    assert (method.fusion, method.iterations, method.merge) == ("adaptive", 3, "add")
    assert method.steps() == VisionTrim(stages="both").steps()
    alone = VisionTrim(stages="vision").steps()
    assert method.steps_for(Layers(encoder=23, decoder=32, between=False)) == alone
    assert method.steps_for(Layers(encoder=23, decoder=2)) == alone
    assert (method | Random(keep=0.5, layer=2)).steps()[0] == alone[0]


def test_lean_is_cls_attention_and_unmerged_complement():
    steps = VisionTrim(stages="vision", fusion="cls", iterations=0).steps()
    assert VisionTrim(variant="lean").steps() == steps
    both = VisionTrim(stages="both", fusion="cls", iterations=0).steps()
    assert VisionTrim(variant="lean", stages="both").steps() == both


def test_clusters_are_merged_into_their_centre():
    """Uniform merging, one round: a complement token is its centre plus the mean of the others that went to it."""
    view = make_view()
    keep = answer(vision(keep=12, merge="uniform", iterations=1), view)
    for image, output in keep.complement.nonzero().tolist():
        centre = keep.index[image, output].item()
        members = [i for i in (keep.assignment[image] == output).nonzero()[:, 0].tolist() if i != centre]
        expected = view.features[image, centre]
        if members:
            expected = expected + view.features[image, members].mean(0)
        torch.testing.assert_close(keep.features[image, output], expected)


def test_dominant_tokens_are_the_top_of_the_score():
    view = make_view()
    method = vision(keep=12, fusion="cls")
    keep = answer(method, view)
    for image in range(2):
        assert (
            keep.index[image][~keep.complement[image]].tolist() == top_k(view.encoder.cls_attention, 9)[image].tolist()
        )
    local = answer(vision(keep=12, fusion="local", guidance="none"), view)
    assert torch.equal(local.index, top_k(local_affinity(view.features, view.coordinates, view.grid), 12))


def test_without_a_question_all_of_the_budget_is_dominant():
    view = changed(make_view(), {"text.question": None})
    keep = answer(vision(keep=12), view)
    assert same(keep, answer(vision(keep=12, guidance="none"), make_view()))
    assert keep.index.shape == (2, 12)
    assert keep.features is None
    assert same(answer(vision(keep=12, split=1.0), make_view()), keep)


def test_without_cls_the_attention_received_decides():
    bare = changed(make_view(), {"encoder.cls_attention": None})
    assert same(answer(vision(keep=12), bare), answer(vision(keep=12, global_score="received"), make_view()))
    for method in (vision(keep=12, global_score="cls"), VisionTrim(keep=12, variant="release")):
        with pytest.raises(TrimError):
            answer(method, bare)
    with pytest.raises(TrimError, match=r"does not give the signal 'encoder\.cls_attention'"):
        answer(vision(keep=12), changed(bare, {"encoder.received_attention": None}))


def test_global_score_of_the_language_stage():
    """Eq. 12."""
    view = make_view(tokens=30, entered=30)
    (step,) = VisionTrim(keep=12, stages="language", fusion="cls").steps()
    expected = torch.stack([(view.features[b] @ view.decoder.query[b] / 8**0.5).softmax(0) for b in range(2)])
    torch.testing.assert_close(step.score(view), expected)


def test_language_stage_measures_by_dot_products_and_survivors():
    view = make_view(tokens=30, entered=30)
    (step,) = VisionTrim(
        keep=12, stages="language", fusion="local", neighbourhood="nearest", merge="mean", iterations=1
    ).steps()
    score = nearest_affinity(view.features, view.coordinates, neighbours=8)
    torch.testing.assert_close(step.score(view), score)
    keep = step.select(view)
    dominant, added = 8, 3  # 11 tokens from layer 2 on make the mean 12
    rest = leftovers(top_k(score, dominant), 30)
    merged = complement(
        gather(view.features, rest),
        gather(view.features, rest),
        view.text.question.tokens,
        view.text.question.mask,
        added,
        scale=8**-0.5,
        cosine=False,
        merge="mean",
        iterations=1,
    )
    assert keep.complement.sum(1).tolist() == [added] * 2
    for image in range(2):
        marked = keep.complement[image]
        assert torch.equal(keep.index[image][marked], gather(rest, merged.centres)[image])
        torch.testing.assert_close(keep.features[image][marked], merged.features[image])


def test_question_changes_what_is_kept():
    view = make_view()
    question = view.text.question
    other = changed(view, {"text.question": Text(-question.tokens, question.mask, question.scale)})
    ours, theirs = answer(vision(keep=12), view), answer(vision(keep=12), other)
    assert not torch.equal(ours.index, theirs.index)
    inverted = answer(vision(keep=12, sign=-1), other)
    assert same(inverted, ours)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_come_back_in_their_dtype(dtype):
    view = make_view()
    half = dataclasses.replace(view, features=view.features.to(dtype))
    assert answer(vision(keep=12), half).features.dtype == dtype


# budgets


@pytest.mark.parametrize("keep", [1.0, 42])
@pytest.mark.parametrize("kind", ["vision", "language", "both", "release", "random", "uniform"])
def test_everything_is_untouched(keep, kind):
    method = {
        "release": VisionTrim(keep=keep, variant="release"),
        "random": Random(keep=keep),
        "uniform": Uniform(keep=keep),
    }.get(kind) or VisionTrim(keep=keep, stages=kind)
    view = make_view()
    for step in method.steps():
        assert same(step.select(view), Keep.everything(view))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6)))
def test_count_is_exact(data, grid):
    total = grid[0] * grid[1] * grid[2]
    count = data.draw(st.integers(1, total))
    split = data.draw(st.sampled_from([0.1, 0.5, 0.75, 0.875, 1.0]))
    view = make_view(grid=grid)
    for method in (vision(keep=count, split=split), Random(keep=count), Uniform(keep=count)):
        assert answer(method, view).index.shape == (2, count)
    keep = answer(vision(keep=count, split=split), view)
    added = 0 if keep.complement is None else keep.complement.sum(1).tolist()
    assert added in (0, [count - max(1, round(split * count))] * 2)


@pytest.mark.parametrize(
    ("keep", "split", "dominant", "added"),
    [
        (32, 0.75, 24, 8),  # LLaVA-1.5
        (64, 0.75, 48, 16),
        (128, 0.75, 96, 32),
        (192, 0.75, 144, 48),
        (32, 0.875, 28, 4),  # LLaVA-NeXT, per tile
        (64, 0.875, 56, 8),
        (128, 0.875, 112, 16),
    ],
)
def test_budgets_of_the_paper(keep, split, dominant, added):
    ours = answer(vision(keep=keep, split=split), make_view(grid=(1, 24, 24)))
    assert ours.complement.sum(1).tolist() == [added] * 2
    assert (~ours.complement).sum(1).tolist() == [dominant] * 2


@pytest.mark.parametrize(("keep", "mean"), [(64, 64), (128, 128), (192, 192), (0.1, 58)])
@pytest.mark.parametrize(("layer", "funnel"), [(2, 4.0), (8, 2.0), (16, 4.0)])
def test_two_stages_meet_the_mean(keep, mean, layer, funnel):
    vision, language = VisionTrim(keep=keep, stages="both", layer=layer, funnel=funnel).steps()
    assert (vision.site, language.site) == (VisionOutput(), DecoderLayer(layer))
    first = vision.select(make_view(grid=(1, 24, 24))).index.shape[1]
    second = language.select(make_view(grid=(1, 24, 24), tokens=first, entered=first)).index.shape[1]
    assert second < first
    assert abs((layer * first + (32 - layer) * second) / 32 - mean) <= 0.5
    assert first == pytest.approx(min(576, funnel * second), rel=0.05)


def test_language_stage_alone_meets_the_mean():
    (step,) = VisionTrim(keep=64, stages="language").steps()
    kept = step.select(make_view(grid=(1, 24, 24), entered=576)).index.shape[1]
    assert kept == 30
    assert (2 * 576 + 30 * kept) / 32 == pytest.approx(64, abs=0.5)
    with pytest.raises(TrimError, match="cannot be reached"):
        VisionTrim(keep=32, stages="language").steps()[0].select(make_view(grid=(1, 24, 24), entered=576))


def test_counts_of_both_stages_can_be_given():
    vision, language = VisionTrim(keep=(192, 48), stages="both").steps()
    assert vision.select(make_view(grid=(1, 24, 24))).complement.sum(1).tolist() == [48, 48]
    ours = language.select(make_view(grid=(1, 24, 24), tokens=192, entered=192))
    assert ours.index.shape == (2, 48)
    assert ours.complement.sum(1).tolist() == [12, 12]


@pytest.mark.parametrize("method", [vision(keep=43), Random(keep=43), Uniform(keep=43)])
def test_more_tokens_than_there_are(method):
    view = make_view()
    assert answer(method, view).index.tolist() == Keep.everything(view).index.tolist()


# controls


def test_random_is_its_seed():
    view = make_view()
    first, second = answer(Random(keep=12), view), answer(Random(keep=12, seed=1), view)
    assert not torch.equal(first.index, second.index)
    assert torch.equal(first.index[0], first.index[1])


def test_uniform_strides_over_what_is_left():
    ours = answer(Uniform(keep=5, layer=2), make_view(tokens=30))
    assert ours.index.tolist() == [[3, 9, 15, 21, 27]] * 2


def test_controls_stand_where_they_are_put():
    assert Random().site == VisionOutput()
    assert Uniform(layer=3).site == DecoderLayer(3)
    assert NoTrim().steps() == ()


# options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep=0 keeps nothing"),
        ({"keep": 1.5}, r"keep=1.5 is not a fraction in \(0, 1\]"),
        ({"keep": "many"}, "keep='many' is not a number"),
        ({"keep": (192, 48), "stages": "vision"}, "stages='vision'"),
        ({"keep": (48, 192), "stages": "both"}, r"keep=\(48, 192\) cannot be kept one after the other"),
        ({"keep": (48, 0), "stages": "both"}, r"keep=\(48, 0\) cannot be kept"),
        ({"keep": (192, 0.5), "stages": "both"}, "is no pair of counts"),
        ({"keep": (3, 2, 1), "stages": "both"}, "is no pair of counts"),
        ({"stages": "three"}, "stages='three' is no choice: choose from 'auto', 'vision', 'language', 'both'"),
        ({"split": 0.0}, r"split=0.0 is no share: give a number in \(0, 1\]"),
        ({"split": 1.2}, "split=1.2 is no share"),
        ({"split": "half"}, "split='half': give a number"),
        ({"guidance": "text"}, "guidance='text' is no choice"),
        ({"fusion": "sum"}, "fusion='sum' is no choice: choose from 'adaptive'"),
        ({"global_score": "query"}, "global_score='query' is no choice"),
        ({"window": 4}, "window=4 has no centre and ring: give an odd number of at least 3"),
        ({"window": 1}, "window=1 has no centre and ring"),
        ({"window": 3.0}, "window=3.0: give a whole number"),
        ({"w1": 0}, "w1=0 divides"),
        ({"w2": -1.0}, "w2=-1.0 divides"),
        ({"w2": float("nan")}, "w2=nan: give a number"),
        ({"w3": -0.5}, "w3=-0.5 would reward distance"),
        ({"sigma": "all"}, "sigma='all' is no choice"),
        ({"centre": "yes"}, "centre='yes': give true or false"),
        ({"border": "zero"}, "border='zero' is no choice"),
        ({"neighbourhood": "far"}, "neighbourhood='far' is no choice"),
        ({"similarity": "l2"}, "similarity='l2' is no choice"),
        ({"scale": 0.0}, "scale=0.0: give a number above 0"),
        ({"scale": "clip"}, "scale='clip': give a number"),
        ({"sign": 0}, "sign=0 is no choice: choose from 1, -1"),
        ({"patch_space": "first"}, "patch_space='first' is no choice"),
        ({"merge": "mean", "iterations": 0}, "merge='mean' has nothing to say with iterations=0: give iterations=3"),
        ({"fusion": "cls", "normalise": "z-scores"}, "normalise='z-scores' has nothing to say with fusion='cls'"),
        ({"fusion": "max", "weight": "higher"}, "weight='higher' has nothing to say with fusion='max'"),
        ({"variant": "lean", "iterations": 1}, "variant='lean' has no iterations=1: leave one of the two out"),
        ({"iterations": -1}, "iterations=-1 is no number of rounds"),
        ({"iterations": True}, "iterations=True: give a whole number"),
        ({"merge": "max"}, "merge='max' is no choice: choose from 'add', 'mean', 'uniform'"),
        ({"layer": 0}, "layer=0"),
        ({"funnel": 0.5}, "funnel=0.5 would add tokens"),
        ({"variant": "fast"}, "variant='fast' is no choice"),
        ({"variant": "release", "fusion": "max"}, "variant='release' has no fusion='max'"),
        ({"variant": "release", "stages": "both"}, "variant='release' has no stages='both'"),
    ],
)
def test_option_that_cannot_work(options, message):
    with pytest.raises(TrimError, match=message) as caught:
        VisionTrim(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("control", [Random, Uniform])
def test_control_that_cannot_work(control):
    with pytest.raises(TrimError, match="keep=0"):
        control(keep=0)
    with pytest.raises(TrimError, match="layer=0"):
        control(layer=0)
    with pytest.raises(TrimError, match="seed='x'"):
        Random(seed="x")


def test_whole_numbers_are_numbers():
    assert VisionTrim(w1=2, scale=4, funnel=3, split=1) == VisionTrim(w1=2.0, scale=4.0, funnel=3.0, split=1.0)


def test_methods_can_be_keys_and_do_not_change():
    assert len({VisionTrim(keep=64), VisionTrim(), VisionTrim(keep=32), *VisionTrim().steps()}) == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        VisionTrim().keep = 3


# recipes

WRITTEN = [
    VisionTrim(),
    VisionTrim(keep=0.25, fusion="max", sign=-1, centre=True, scale=2.5),
    VisionTrim(keep=(192, 48), stages="both", layer=3),
    VisionTrim(variant="release", keep=32),
    Random(keep=128, seed=3),
    Uniform(keep=0.5, layer=2),
    NoTrim(),
    Random(keep=128) | VisionTrim(keep=64, stages="language"),
]


@pytest.mark.parametrize("method", WRITTEN, ids=str)
@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_recipe_file_round_trip(method, suffix, tmp_path):
    recipe = json.loads(json.dumps(method.to_dict()))  # YAML has no tuples either
    path = tmp_path / f"recipe{suffix}"
    path.write_text(json.dumps(recipe) if suffix == ".json" else yaml.safe_dump(recipe))
    assert load_method(path) == load_method(str(path)) == load_method(recipe) == method
    assert load_method(method.to_dict()) == method


@pytest.mark.parametrize("method", [m for m in WRITTEN if not isinstance(getattr(m, "keep", None), tuple)], ids=str)
def test_text_round_trip(method):
    assert load_method(str(method)) == method


def test_spellings():
    assert load_method("visiontrim") == VisionTrim()
    assert load_method("visiontrim:keep=32,fusion=max,centre=true") == VisionTrim(keep=32, fusion="max", centre=True)
    assert load_method("visiontrim", keep=0.5) == load_method(VisionTrim(), keep=0.5) == VisionTrim(keep=0.5)
    assert load_method("random:keep=128 | visiontrim:stages=language") == Plan(
        (Random(keep=128), VisionTrim(stages="language"))
    )
    assert {"visiontrim", "random", "uniform", "none"} <= set(list_methods())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("visiontrin", "unknown method 'visiontrin': did you mean 'visiontrim'"),
        ("visiontrim:kep=3", "visiontrim has no option 'kep': did you mean 'keep'"),
        ("visiontrim:keep", "'keep' is no option"),
        ("visiontrim:fusion=maximum", "fusion='maximum' is no choice"),
        ("visiontrim | random:keep=12", "order them from the vision encoder"),
        ("missing.yaml", "missing.yaml cannot be read"),
        ({"keep": 3}, "a recipe names its method"),
    ],
)
def test_spelling_that_cannot_work(spec, message):
    with pytest.raises(TrimError, match=message):
        load_method(spec)


@pytest.mark.parametrize("sizes", [(576, 1728), (16, 7, 9), (5, 5, 5, 5)])
@pytest.mark.parametrize("keep", [8, 64, 321])
def test_the_segments_of_an_image_share_a_number_exactly(sizes, keep):
    keep = min(keep, sum(sizes))
    counts, before = [], 0
    for size in sizes:
        view = View(torch.zeros(1, size, 2), torch.zeros(1, size, 3).long(), (1, 1, size), size, 4, sum(sizes), before)
        counts.append(view.count(keep))
        before += size
    assert sum(counts) == keep
    assert all(abs(count - keep * size / sum(sizes)) < 1 for count, size in zip(counts, sizes, strict=True))


def test_a_segment_that_would_get_nothing_is_refused():
    view = View(torch.zeros(1, 4, 2), torch.zeros(1, 4, 3).long(), (1, 2, 2), 4, 4, whole=400, before=0)
    with pytest.raises(TrimError, match="keep=8 leaves nothing for a part of 4 of the image's 400"):
        view.count(8)
    assert view.count(0.5) == 2
