"""Signals of the vision encoder that published methods read are the model's own, and their answers reach its prompt."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import tiny
import visiontrim as vt
from peers import cosines, ranked
from test_signals import spy
from tiny import both_attentions, close, llava, prompts, sample
from visiontrim import zoo

pytestmark = pytest.mark.usefixtures("no_grad")
every_tower = pytest.mark.parametrize("tower", ["clip", "siglip"])
ROWS = [(3, "image", 5), (1, "image", 2, "image", 7), (6,)]
QUESTION = "what shape is blue ?"

METHODS = [
    vt.AvgPool(keep=6),
    vt.CDPruner(keep=6),
    vt.DivPrune(keep=6),
    vt.FasterVLM(keep=6),
    vt.HiPrune(keep=6, middle=1),
    vt.HiPrune(keep=6, middle=-3, share=1.0, variant="release"),
    vt.MMTok(keep=6),
    vt.PruMerge(keep=6, neighbours=3),
    vt.PruMerge(keep=6, neighbours=3, variant="release"),
    vt.PruMergePlus(keep=6, neighbours=3),
    vt.PruneSID(keep=6),
    vt.PruneSID(keep=6, variant="release"),
    vt.VisPruner(keep=6),
    vt.VisionZip(keep=6, split=0.5),
    vt.VisionZip(keep=6, split=0.5, variant="release"),
    vt.VScan(keep=6, shallow=1, window=2, stages="vision"),
    vt.VScan(keep=(6, 3), shallow=1, window=2, layer=2),
]


def layer(attention: str, tower: str, index: int, inputs):
    """The input of an encoder layer after its norm, and the same layer of an eager model, which tells its map."""
    model = llava(attention, tower=tower).model.vision_tower
    states = model(inputs["pixel_values"], output_hidden_states=True).hidden_states
    block = llava("eager", tower=tower).model.vision_tower.encoder.layers[index]
    return block.layer_norm1(states[index]), block.self_attn


@both_attentions
@every_tower
@pytest.mark.parametrize("index", [None, 1, -1])
def test_attention_and_keys_of_any_layer(attention, tower, index):
    """The layer whose output is projected is number 2 of 4."""
    inputs, special = prompts(*ROWS), 1 if tower == "clip" else 0
    names = [f"encoder.{name}" for name in ("column_attention", "keys", "cls_attention")]
    view = spy(llava(attention, tower=tower), inputs, *(names if index is None else [(name, index) for name in names]))
    hidden, module = layer(attention, tower, 2 if index is None else index % 4, inputs)
    attention_map = module(hidden, attention_mask=None)[1].mean(1)
    close(view.encoder["column_attention", index], attention_map.mean(1)[:, special:], 1e-6)
    keys = module.k_proj(hidden)[:, special:].view(3, tiny.PATCHES, 4, 8).transpose(1, 2)
    close(view.encoder["keys", index], keys)
    if special:
        close(view.encoder["cls_attention", index], attention_map[:, 0, 1:], 1e-6)
    else:
        assert ("cls_attention", index) not in view.encoder
        received = view.encoder["received_attention", index]
        patches = attention_map.clone()
        patches.diagonal(dim1=1, dim2=2).zero_()
        close(received, patches.sum(1) / (tiny.PATCHES - 1), 1e-6)


def test_attention_of_cls_with_all_heads_as_one():
    inputs = prompts(*ROWS)
    view = spy(llava(), inputs, ("encoder.cls_attention_wide", -1))
    hidden, module = layer("sdpa", "clip", 3, inputs)
    scores = module.q_proj(hidden)[:, :1] @ module.k_proj(hidden).mT * 32**-0.5
    close(view.encoder["cls_attention_wide", -1], scores.softmax(-1)[:, 0, 1:], 1e-6)
    bare = llava(tower="siglip")
    with (
        pytest.raises(vt.TrimError, match=r"does not give the signal \('encoder\.cls_attention_wide', -1\)"),
        vt.trim(bare, vt.PruMerge(keep=6, variant="release")),
    ):
        bare(**inputs)


def test_a_layer_that_is_not_there():
    model = llava()
    with (
        pytest.raises(vt.TrimError, match="column_attention of encoder layer 8, but the encoder has 4"),
        vt.trim(model, vt.HiPrune(keep=6)),
    ):
        model(**prompts(*ROWS))


def test_projected_tokens():
    inputs, model = prompts(*ROWS), llava()
    view = spy(model, inputs, "encoder.projected")
    close(view.encoder.projected, model.model.multi_modal_projector(view.features))


def test_the_question_as_words_and_as_a_summary():
    bundle = zoo.load()
    picture = torch.rand(1, 3, 192, 192)
    inputs = bundle.processor(text=zoo.PROMPT.format(question=QUESTION), images=picture[0], return_tensors="pt")
    both = {"question": QUESTION, "text_tower": bundle.text_tower, "processor": bundle.processor}
    view = spy(bundle.model, inputs, "text.words", "text.question", "text.joint_normalised", **both)
    ids = bundle.processor.tokenizer(QUESTION, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert view.text.words.tokens.equal(bundle.model.get_input_embeddings()(ids))
    assert view.text.words.mask.all()
    tower = bundle.text_tower.model
    normalised = bundle.model.model.vision_tower.post_layernorm(view.features)
    close(view.text.joint_normalised, tower.visual_projection(normalised))
    ids = bundle.text_tower.tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    close(view.text.question.tokens[view.text.question.ends], tower.get_text_features(input_ids=ids).pooler_output)
    embeddings = spy(
        bundle.model,
        inputs,
        "text.question",
        "text.joint_normalised",
        question=QUESTION,
        processor=bundle.processor,
    )
    assert embeddings.text.question.ends is None
    close(embeddings.text.joint_normalised, bundle.model.model.multi_modal_projector(view.features))
    alone = spy(bundle.model, inputs, "text.words")
    assert "words" not in alone.text
    with pytest.raises(vt.TrimError, match="pass processor="):
        spy(bundle.model, inputs, "text.words", question=QUESTION, text_tower=bundle.text_tower)


def test_every_window_of_a_long_question_has_its_end():
    bundle = zoo.load()
    long = " ".join(["what shape is blue ?"] * 20)
    text = bundle.text_tower.encode([QUESTION, long])
    assert text.ends is not None
    windows = bundle.text_tower._windows(long)
    assert text.ends.sum(1).tolist() == [1, len(windows)]
    assert len(windows) == 3
    assert text.ends[1].nonzero()[:, 0].tolist() == [
        sum(len(window) for window in windows[: number + 1]) - 1 for number in range(3)
    ]


@dataclass(frozen=True)
class AfterTheProjector(vt.Random):
    """Answers twice the projected features."""

    name = "after-the-projector"

    @property
    def needs(self):
        return frozenset({"encoder.projected"})

    def select(self, view: vt.View) -> vt.Keep:
        index = super().select(view).index
        projected = view.encoder.projected
        return vt.Keep(index, projected=2 * torch.stack([projected[b, row] for b, row in enumerate(index)]))


def entering(model, inputs):
    """What enters the first decoder layer."""
    seen: list[torch.Tensor] = []
    first = model.model.language_model.layers[0]
    handle = first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("keep", [6, 1.0])
def test_outputs_after_the_projector_enter_the_language_model(keep):
    inputs, model = sample(prompts(*ROWS), 1), llava()
    plain = entering(model, inputs)
    with vt.trim(model, AfterTheProjector(keep=keep)) as run:
        trimmed = entering(model, inputs)
    image = (inputs["input_ids"][0] == tiny.IMAGE).nonzero()[:, 0].split(tiny.PATCHES)
    places = torch.cat([of[trace.stages[0].index] for of, trace in zip(image, run.trace.images, strict=True)])
    text = (inputs["input_ids"][0] != tiny.IMAGE).nonzero()[:, 0]
    expected = plain[0].clone()
    expected[places] *= 2
    close(trimmed[0], expected[torch.cat([places, text]).sort().values])


def test_vscan_merges_after_the_projector():
    inputs, model = sample(prompts(*ROWS), 0), llava()
    projected = spy(model, inputs, "encoder.projected").encoder.projected[0]
    with vt.trim(model, vt.VScan(keep=6, shallow=1, window=2, stages="vision")) as run:
        entered = entering(model, inputs)[0, 4:10]
    index, cosine = run.trace.images[0].stages[0].index.tolist(), cosines(projected)
    for output, centre in enumerate(index):
        members = [n for n in range(16) if n not in index and index[ranked([cosine[n][k] for k in index])[0]] == centre]
        close(entered[output], projected[[centre, *members]].mean(0))


@both_attentions
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_methods_in_a_batch_of_images(method, attention):
    """Exact budgets, and a padded batch equals its samples one by one."""
    inputs, model = prompts(*ROWS), llava(attention)
    with vt.trim(model, method) as run:
        logits = model(**inputs).logits[:, -1]
        assert [image.entered for image in run.trace.images] == [6, 6, 6]
        for row in range(3):
            close(model(**sample(inputs, row)).logits[0, -1], logits[row], 1e-4)


def sees_wide_cls(method: vt.Method) -> bool:
    return any("encoder.cls_attention_wide" in need for need in method.steps()[0].needs if isinstance(need, tuple))


@pytest.mark.parametrize("method", [method for method in METHODS if not sees_wide_cls(method)], ids=str)
def test_methods_without_cls(method):
    inputs, model = prompts(*ROWS), llava(tower="siglip")
    with vt.trim(model, method) as run:
        model(**inputs)
    assert [image.entered for image in run.trace.images] == [6, 6, 6]
