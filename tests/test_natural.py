"""Natural scenes: pictures, questions, how they are asked and scored, and how a model is trained on them."""

import hashlib
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from visiontrim import ask
from visiontrim.commands.evaluate import _split_of
from visiontrim.core.errors import TrimError
from visiontrim.evaluate.evidence import _pointing
from visiontrim.evaluate.suites import load_suite
from visiontrim.zoo.loading import NATURAL_DIR, load
from visiontrim.zoo.natural_questions import (
    CELL,
    CELLS,
    LONGEST,
    NATURAL_TYPES,
    NATURAL_WORDS,
    ask_natural,
    ask_pair,
    normalise_natural,
    overlap,
    parse_cell,
)
from visiontrim.zoo.natural_scenes import NATURAL, STRING, draw_natural, glyphs_of, natural_objects
from visiontrim.zoo.questions import CHARACTERS, WORDS, normalise
from visiontrim.zoo.scenes import COLORS, GRID, KINDS, PATCH, SIZE
from visiontrim.zoo.suite import SPLITS, answer, digest
from visiontrim.zoo.training.loop import train
from visiontrim.zoo.training.reading import (
    ReadingRun,
    ReadingStage,
    bundled_decoder,
    can_ask,
    clustered,
    lost,
    pooled,
    subset,
)
from visiontrim.zoo.training.seeing import Facts, SeeingRun, SeeingStage, wanted_tokens
from visiontrim.zoo.training.symbolic import WORD_ID, word_embeddings

WEIGHTS = {
    "llava": "0359f79e44fe59e66e821c6bce8b148bea97f2b73f3dec70cc56f5a9f7632a70",
    "clip": "e685133db51417228b3a5a674ab1e124ddcc6b08b4915979ef9c8839473aea72",
}
SCENES = [draw_natural(seed) for seed in range(40)]


# --- weights


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_the_measured_ones(name):
    assert hashlib.sha256((NATURAL_DIR / name / "model.safetensors").read_bytes()).hexdigest() == WEIGHTS[name]


def test_weights_are_small():
    assert sum((NATURAL_DIR / name / "model.safetensors").stat().st_size for name in WEIGHTS) <= 12e6


def test_the_model_loads_and_answers():
    speaker = ask.load("bundled-natural", device="cpu")
    assert speaker.processor.tokenizer.get_vocab() == {word: number for number, word in enumerate(NATURAL_WORDS)}
    assert speaker.text_tower.tokenizer.get_vocab() == speaker.processor.tokenizer.get_vocab()
    ours, theirs = speaker.model.model.vision_tower.state_dict(), speaker.text_tower.model.vision_model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    samples = [sample for sample in SPLITS["natural"].samples(3) if sample.type in ("pos", "rel", "shape")]
    said = answer(speaker.model, speaker.processor, samples)
    assert sum(text == sample.answer for text, sample in zip(said, samples, strict=True)) >= 6


# --- pictures


def test_split_is_the_measured_one():
    split = SPLITS["natural"]
    assert split.world is NATURAL
    assert digest(split.samples(20)) == split.digest


def test_scenes_are_deterministic_and_differ():
    again = draw_natural(3)
    assert again.image.tobytes() == SCENES[3].image.tobytes()
    assert again.objects == SCENES[3].objects == natural_objects(3)
    assert again.image.tobytes() != SCENES[4].image.tobytes()
    assert again.image.size == (SIZE, SIZE)


def test_patches_know_their_object_and_character():
    for scene in SCENES:
        assert set(scene.patch_owner) == set(range(len(scene.objects) + 1))
        for patch in range(GRID**2):
            owner, character, middle = scene.patch_owner[patch], scene.patch_character[patch], scene.patch_middle[patch]
            if not owner:
                assert character == ""
                assert middle.tolist() == [PATCH * (patch % GRID + 0.5), PATCH * (patch // GRID + 0.5)]
                continue
            obj = scene.objects[owner - 1]
            if obj.kind == STRING:
                assert character in [glyph.character for glyph in glyphs_of(obj)]
                assert abs(middle[0] - PATCH * (patch % GRID + 0.5)) < 20  # of this character, not of the whole string
            else:
                assert character == (obj.value or "")
                assert middle.tolist() == [obj.x, obj.y]


def test_objects_are_large_beside_small_ones():
    shapes = [(o, (s.patch_owner == n).sum()) for s in SCENES for n, o in enumerate(s.objects, 1) if not o.value]
    sizes = np.array([size for _, size in shapes])
    assert (sizes >= 20).mean() > 0.4
    assert (sizes <= 8).mean() > 0.2
    assert sizes.max() > 60
    assert all(2 <= len(o.value) <= 4 for s in SCENES for o in s.objects if o.kind == STRING)


def test_background_has_contrast_at_every_scale():
    spectra = []
    for scene in SCENES[:12]:
        gray = np.asarray(scene.image.convert("L"), np.float64)
        power = np.abs(np.fft.fft2(gray - gray.mean())) ** 2
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIZE), np.fft.fftfreq(SIZE))) * SIZE
        spectra.append([power[(frequency >= low) & (frequency < 2 * low)].sum() for low in (3, 6, 12, 24)])
    octaves = np.mean(spectra, axis=0)
    assert octaves.max() / octaves.min() < 12  # of white noise it would be 64, of a plain next to nothing


# --- questions


def _find(objects, words):
    """The objects that the words of a noun phrase name."""
    found = list(objects)
    for word in words:
        if word in COLORS:
            found = [o for o in found if o.color == word]
        elif word in (*KINDS, STRING):
            found = [o for o in found if o.kind == word]
        elif word in CHARACTERS:
            found = [o for o in found if o.value == word]
    return found


def _solve(type, text, objects):
    """The answer, by other means than the code that asked."""
    words = text.split()[:-1]
    plain = [o for o in objects if o.kind != STRING]
    if type == "exist":
        return "yes" if _find(plain, words[3:]) else "no"
    if type == "count":
        return str(len(_find(objects, words[2:3])))
    if type == "shape":
        return next(o.kind for o in plain if o.color == words[-1] and not o.value)
    if type in ("read", "string", "pos", "point"):
        (one,) = _find(objects, words[2:] if type != "point" else words[4:])
        if type == "pos":
            return f"{'top' if one.y < 96 else 'bottom'} {'left' if one.x < 96 else 'right'}"
        if type == "point":
            return f"row {1 + int(one.y / 32)} column {1 + int(one.x / 32)}"
        return " ".join(one.value)
    if type == "color":
        (one,) = _find(plain, words[4:])
        return one.color
    if type == "hop":
        (one,) = _find(plain, words[7:])
        (other,) = [
            o
            for o in plain
            if o is not one and o.color == one.color and (o.kind == words[1] or (words[1] == "shape" and not o.value))
        ]
        return other.value or other.kind
    relation = next(word for word in ("left", "right", "above", "below") if word in words)
    at = words.index(relation)
    (right,) = _find(plain, words[at + 1 :])
    key = {"left": lambda o: o.x < right.x, "right": lambda o: o.x > right.x}
    key |= {"above": lambda o: o.y < right.y, "below": lambda o: o.y > right.y}
    left = _find(plain, words[2 if type == "rel" else 4 : at])
    if type == "rel":
        return "yes" if key[relation](left[0]) else "no"
    (one,) = [o for o in left if key[relation](o)]
    return one.color


def test_answers_are_right():
    seen = set()
    for seed in range(150):
        objects = natural_objects(seed)
        for type in NATURAL_TYPES:
            question = ask_natural(random.Random(f"{seed} {type}"), objects, type)
            if question is not None:
                assert question.answer == _solve(type, question.text, objects), (seed, question)
                assert set(question.text.split()) | set(question.answer.split()) <= set(NATURAL_WORDS)
                assert len(question.answer.split()) < LONGEST
                seen.add(type)
    assert seen == set(NATURAL_TYPES)


def test_pairs_have_both_answers():
    samples = [sample for sample in SPLITS["natural"].samples(12) if sample.type == "exist"]
    by_scene = {}
    for sample in samples:
        by_scene.setdefault(sample.scene_seed, []).append(sample.answer)
    assert all(sorted(answers) == ["no", "yes"] for answers in by_scene.values())
    orders = [ask_pair(random.Random(seed), natural_objects(seed))[0].answer for seed in range(40)]
    assert 5 < orders.count("yes") < 35


def test_suite_names_every_question_once_and_leaves_room_for_answers():
    suite = load_suite("shapes", "natural", scenes=6)
    assert len({item.id for item in suite.items}) == len(suite.items)
    assert suite.max_new_tokens == LONGEST
    assert load_suite("shapes", "standard", scenes=1).max_new_tokens == 3


def test_words():
    assert NATURAL_WORDS[: len(WORDS)] == WORDS
    assert normalise_natural("What is the red String?") == "what is the red string ?"
    with pytest.raises(TrimError, match="'string'"):
        normalise("What is the red string?")


def test_a_model_without_the_words_is_refused():
    assert _split_of("bundled-natural", None) == "natural"
    assert _split_of(None, None) is None
    assert _split_of("some/dir", "natural") == "natural"
    with pytest.raises(TrimError, match="--model bundled-natural"):
        _split_of(None, "natural")


# --- pointing


def test_cells():
    assert CELL * CELLS == SIZE
    assert parse_cell("row 3 column 5") == (3, 5)
    for said in ("row 3", "row 3 column 7", "row A column 1", "column 3 row 5", "3 5", ""):
        assert parse_cell(said) is None
    assert overlap("row 3 column 5", "row 3 column 5") == 1
    assert overlap("row 3 column 4", "row 3 column 5") == pytest.approx(6 / 12)
    assert overlap("row 2 column 4", "row 3 column 5") == pytest.approx(4 / 14)
    assert overlap("row 3 column 2", "row 3 column 5") == 0
    assert overlap("red", "row 3 column 5") == 0


def test_pointing_is_a_table():
    class Given:
        def __init__(self, items):
            self.items = items

        def where(self, which):
            return Given([item for item, chosen in zip(self.items, which, strict=True) if chosen])

        def error(self, cell):
            return ""

        def texts(self, cell):
            said = ["row 1 column 1", "row 1 column 3"] if cell.keep is None else ["row 1 column 2", "no"]
            return said[: len(self.items)]

    class Asked:
        methods = ("random",)

    items = [item for item in load_suite("shapes", "natural", scenes=4).items if item.type == "point"][:2]
    items = [replace(item, answers=(f"row 1 column {column}",)) for item, column in zip(items, (1, 3), strict=True)]
    section = _pointing(Asked(), Given(items), 64)
    assert section.rows == (("plain", "100.0", "100.0"), ("`random`", "0.0", "25.0"))
    assert _pointing(Asked(), Given([]), 64) is None


# --- training


def test_every_patch_of_an_object_has_the_same_target():
    facts = Facts.of(SCENES[:3])
    words = word_embeddings(192, len(NATURAL_WORDS))
    tokens = wanted_tokens(facts, words)
    for row, scene in enumerate(SCENES[:3]):
        for number, obj in enumerate(scene.objects, 1):
            own = tokens[row][facts.owner[row] == number]
            assert (own @ words[WORD_ID[obj.color]] - 1).abs().max() < 1e-4
            if obj.kind != STRING:
                assert (own - own[0]).abs().max() == 0


def test_a_subset_keeps_features_and_pooling_takes_means():
    features = torch.randn(2, GRID**2, 5, generator=torch.Generator().manual_seed(0))
    place = torch.tensor([[3, 50, 400], [0, 1, 575]])
    assert torch.equal(subset(place)(features), features.gather(1, place[..., None].expand(-1, -1, 5)))
    squares = pooled(2, 2)
    expected = features[0, [0, 1, GRID, GRID + 1]].mean(0)
    assert torch.allclose(squares(features)[0, 0], expected)
    assert squares.place.shape == (2, 144)
    assert (squares.goes_to == squares.goes_to[0]).all()


def test_clusters_hold_every_place_once():
    features = torch.randn(1, GRID**2, 8, generator=torch.Generator().manual_seed(1))
    place = torch.arange(0, GRID**2, 9)[None]
    reduced = clustered(place, features, random.Random(0))
    assert torch.equal(reduced.goes_to[0, place[0]], torch.arange(place.shape[1]))
    assert reduced(features).isfinite().all()


def test_what_is_gone_is_not_asked():
    scenes = SCENES[:6]
    facts = Facts.of(scenes)
    everything = torch.arange(GRID**2).expand(6, -1)
    assert not any(map(any, lost(scenes, facts, subset(everything))))
    without_first = torch.stack([(owner != 1).float().topk(400).indices.sort().values for owner in facts.owner])
    gone = lost(scenes, facts, subset(without_first))
    assert all(row[0] for row in gone)
    for scene, row in zip(scenes, gone, strict=True):
        for seed in range(30):
            question = ask_natural(random.Random(seed), scene.objects, NATURAL_TYPES[seed % len(NATURAL_TYPES)])
            if question is None or not can_ask(question, scene.objects, row):
                continue
            left = [o for o, away in zip(scene.objects, row, strict=True) if not away]
            assert question.answer == _solve(question.type, question.text, left)


def test_stages_learn_and_go_on_where_they_were_stopped(tmp_path):
    torch.set_num_threads(1)
    seeing = SeeingStage(steps=4, scenes=2, whole=0.0, pool=2, patches=64, log_every=2, warmup=1, text_every=3)
    lines = list(train(SeeingRun(seeing), tmp_path / "whole"))
    assert lines[-1]["error"] < lines[0]["error"]
    assert next(train(SeeingRun(seeing), tmp_path / "parts"))["step"] == 2
    list(train(SeeingRun(seeing), tmp_path / "parts"))  # from its checkpoint
    assert _same(tmp_path, "whole", "parts", "towers")

    start = tmp_path / "whole" / "checkpoint.pt"
    reading = ReadingStage(
        steps=2, scenes=1, whole_scenes=1, pool=1, log_every=1, warmup=1, most=60, tower_every=2, text_tokens=40
    )
    lines = list(train(ReadingRun(reading, start), tmp_path / "read"))
    assert "error" in lines[0]
    assert "error" not in lines[1]  # the tower is trained in every second step alone
    next(train(ReadingRun(reading, start), tmp_path / "read in parts"))
    list(train(ReadingRun(reading, start), tmp_path / "read in parts"))
    assert _same(tmp_path, "read", "read in parts", "model")
    steps = [json.loads(line)["step"] for line in (tmp_path / "read in parts" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2]

    # another part goes on with the towers of one run and the decoder of another
    both = ReadingRun(replace(reading, seed=1), start, tmp_path / "read" / "checkpoint.pt")
    decoder = torch.load(tmp_path / "read" / "checkpoint.pt")["model"]
    assert all(torch.equal(weight, decoder[name]) for name, weight in both.model.state_dict().items())
    towers = torch.load(start)["towers"]
    assert all(torch.equal(weight, towers[name]) for name, weight in both.towers.state_dict().items())


def _same(folder, first, second, module):
    ends = [torch.load(folder / name / "checkpoint.pt")[module] for name in (first, second)]
    return ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_start_is_the_bundled_model_with_more_words():
    decoder = bundled_decoder(ReadingStage().shape)
    old = load().model
    size = len(WORDS)
    assert decoder.lm_head.weight.shape[0] == len(NATURAL_WORDS)
    assert torch.equal(decoder.lm_head.weight[:size], old.lm_head.weight)
    ours, theirs = decoder.model.state_dict(), old.model.language_model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(weight[: len(theirs[name])], theirs[name]) for name, weight in ours.items())
