"""visiontrim eval, tune and map on the bundled model: numbers that can be checked by hand, and logs to go on from."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer import BadParameter

import visiontrim as vt
from visiontrim import zoo
from visiontrim.ask import Speaker, load
from visiontrim.commands.options import amounts_of, methods_of
from visiontrim.core.errors import TrimError
from visiontrim.evaluate.asking import PLAIN, Cell, Examiner, answers, encode
from visiontrim.evaluate.bootstrap import resample
from visiontrim.evaluate.evaluation import ABLATIONS, Block, ablation, ablations, all_methods, evaluate
from visiontrim.evaluate.files import read_items
from visiontrim.evaluate.items import Item, RightAnswers, Suite
from visiontrim.evaluate.log import Log
from visiontrim.evaluate.report import markdown, page, sections
from visiontrim.evaluate.scores import Score
from visiontrim.evaluate.suites import load_suite
from visiontrim.evaluate.tune import Tuned


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return load()


@pytest.fixture(scope="module")
def suite() -> Suite:
    return load_suite("shapes", scenes=1)


def test_a_list_of_methods_is_split_at_the_commas_between_methods():
    assert methods_of("a,b:x=1,y=[2,3],c, d:z=1") == ["a", "b:x=1,y=[2,3]", "c", "d:z=1"]
    assert amounts_of("64,0.5") == [64, 0.5]
    with pytest.raises(BadParameter, match="neither a number"):
        amounts_of("many")


def test_the_bundled_qwen_answers_canvases(tmp_path):
    suite = load_suite("canvases", "12x16", scenes=2)
    assert suite.name == "canvases/12x16"
    everything = Cell("random", 1.0)
    examiner = Examiner(load("bundled-qwen", device="cpu"), suite, Log(tmp_path / "log.jsonl"), 16)
    found = evaluate(examiner, [everything])
    assert found.score(everything).mean == 12 * 16
    assert (found.whole.score or 0) > 90
    assert found.texts(everything) == found.texts(Cell(PLAIN, None))
    with pytest.raises(TrimError, match="canvas 'standard' is no size"):
        load_suite("canvases", "standard")


def test_batches_hold_whole_scenes_in_order():
    items = tuple(Item(str(n), group, (), "", (), "t") for n, group in enumerate("aaabbbbbcd"))
    sizes = [[item.group for item in batch] for batch in Suite("s", items, 1).batches(4)]
    assert sizes == [["a", "a", "a"], ["b", "b", "b", "b"], ["b", "c", "d"]]


def test_questions_of_a_file_in_both_forms(tmp_path):
    zoo.draw_scene(3).image.save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    rows = [
        {"image": "a.png", "question": "how many?", "answer": ["2", "two"], "type": "count"},
        {"id": 7, "image": "a.png", "conversations": turns},
        {"conversations": turns},
        {"image": "a.png", "question": "who?"},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    first, second, third = read_items(path)
    assert (first.answers, first.type, first.id) == (("2", "two"), "count", 1)
    assert (second.question, second.answers, second.id) == ("What is it?", ("A cat.",), 7)
    assert third.answers == ()
    assert first.is_right("Two.")
    assert second.is_right("a  cat")
    assert not first.is_right("3")
    assert first.pictures()[0].size == (192, 192)
    assert load_suite(str(path)).labelled == 2
    path.write_text("{}\n")
    with pytest.raises(TrimError, match="line 1: it asks nothing"):
        list(read_items(path))


def test_equal_pictures_of_a_batch_are_encoded_once_with_the_same_result(speaker, suite):
    items = suite.items[:4]
    inputs, seen = encode(speaker, items), []
    tower = speaker.model.model.vision_tower
    handle = tower.encoder.layers[0].register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    try:
        for method in ("visiontrim:keep=32", "vispruner:keep=32", "none"):
            chosen = vt.load_method(method)
            said = answers(speaker, items, inputs, chosen, 3)
            ours, run = list(said.texts), said.run
            questions, tower_of_text = [item.question for item in items], speaker.text_tower
            with vt.trim(speaker.model, chosen, question=questions, text_tower=tower_of_text) as plain:
                model = speaker.model
                output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            texts = speaker.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert ours == [text.strip() for text in texts]
            for a, b in zip(run.trace.images, plain.trace.images, strict=True):
                assert all(x.index.equal(y.index) for x, y in zip(a.stages, b.stages, strict=True))
    finally:
        handle.remove()
    assert seen == [1, 4] * 3


def test_scores_of_the_controls_and_of_keeping_everything(speaker, suite, tmp_path):
    block = Block.comparison(["visiontrim", "fastv"], [576, 32])
    found = evaluate(Examiner(speaker, suite, Log(tmp_path / "log.jsonl"), 8), block.cells)
    scores = {(score.method, score.keep): score for score in block.scores(found)}
    for method in block.methods:
        full = scores[method, 576]
        assert (full.retention, full.agreement, full.mean) == (1.0, 1.0, 576.0)
    assert "cannot be reached" in scores["fastv", 32].error
    ours, control = scores["visiontrim", 32], scores["random", 32]
    assert ours.mean == 31.75  # the nearest that two stages in eight layers reach
    assert len(ours.per_layer) == 8
    right = [item.is_right(text) for item, text in zip(suite.items, found.texts(Cell("visiontrim", 32)), strict=True)]
    assert ours.score == pytest.approx(100 * np.mean(right))
    assert ours.gain == pytest.approx(ours.score - control.score)
    assert (ours.gain_interval, ours.beats_reference) == (None, None), "one scene says nothing"
    assert ours.length == np.mean([len(text.split()) for text in found.texts(Cell("visiontrim", 32))])
    assert 0 < ours.method_time < 1
    tables = sections(block, found, list(scores.values()))
    assert "| `fastv` | **100.0** | - |" in markdown("t", ["x"], tables)
    assert '<td data-value="fastv"><code>fastv</code></td><td data-value="100.0" class=best>100.0</td>' in page(
        "t", ["x"], tables
    )


def test_a_log_is_gone_on_with(speaker, suite, tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    cells = [Cell("random", 32)]
    whole = evaluate(Examiner(speaker, suite, Log(path), 4), cells)
    lines = path.read_text().splitlines()
    assert len(lines) == 2 * len(suite.batches(4))
    assert {json.loads(lines[1])["method"]} == {json.dumps(vt.Random(keep=32).to_dict())}, "defaults are written out"
    path.write_text("\n".join(lines[:-1]) + "\n")
    asked = []
    monkeypatch.setattr(
        Examiner, "_ask", lambda self, method, *rest: asked.append(str(method)) or ask(self, method, *rest)
    )
    again = evaluate(Examiner(speaker, suite, Log(path), 4), cells)
    assert asked == [f"random:keep=32,seed={len(suite.batches(4)) - 1}"]
    assert again.texts(cells[0]) == whole.texts(cells[0])
    stopped = evaluate(Examiner(speaker, suite, Log(path), 4), cells, minutes=0)
    assert len(stopped.items) == len(suite.batches(4)[0])


ask = Examiner._ask


def difference(ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray):
    """Gain of right answers and its interval, as shares."""

    def sample(right: np.ndarray):
        return resample(RightAnswers(), np.stack([right, np.ones(len(right))], axis=1).astype(float), groups)

    gain, ends = sample(ours).over(sample(theirs))
    return gain / 100, None if ends is None else tuple(end / 100 for end in ends)


def test_the_interval_of_a_difference_is_of_groups():
    ours, theirs = np.array([1, 1, 1, 0], bool), np.array([0, 0, 1, 1], bool)
    assert difference(ours, theirs, np.array([0, 0, 1, 1])) == (0.25, None)  # too few to say more
    many, none = np.tile(ours, 4), np.tile(theirs, 4)
    gain, (low, high) = difference(many, none, np.arange(16))
    assert gain == 0.25
    assert -0.25 < low < 0.25 < high < 0.75  # +- 1.96 sqrt(0.6875 / 16) = +- 0.41
    # asking every question three times adds no evidence
    thrice = difference(many.repeat(3), none.repeat(3), np.arange(16).repeat(3))
    assert thrice == (gain, (low, high))
    assert difference(many, many, np.arange(16)) == (0.0, (0.0, 0.0))


def test_the_frontier_and_the_cheapest_setting():
    def score(keep: int, retention: float, low: float) -> Score:
        return Score("random", keep, "", retention=retention, retention_interval=(low, 1.0), mean=float(keep))

    scores = (score(16, 0.7, 0.4), score(32, 0.6, 0.5), score(64, 0.99, 0.95), score(128, 1.0, 1.0))
    tuned = Tuned(0.95, scores, 80, 8)
    assert [point.keep for point in tuned.frontier] == [16, 64, 128]
    assert tuned.chosen is scores[2]
    assert tuned.is_sure(scores[3])
    assert tuned.is_sure(scores[2])
    unsure = Tuned(0.96, scores, 80, 8)
    assert unsure.chosen is scores[2]
    assert not unsure.is_sure(scores[2])
    assert unsure.sure is scores[3]
    assert "down to 95.0 % on 80 questions" in unsure.advice
    assert Tuned(1.01, scores, 80, 8).chosen is None
    few = Tuned(0.95, scores, 2, 1)
    assert few.chosen is None, "two questions recommend nothing"
    assert "2 questions about 1 picture are too few" in few.advice


def test_every_ablation_names_methods_that_exist():
    for name in ablations():
        for cell in ablation(name).cells:
            cell.load()
    assert {"fusion", "stages", "tgvc", "layer", "split", "window", "iterations"} <= set(ablations())
    assert ablation(f"{ABLATIONS}:split") == ablation("split")
    with pytest.raises(TrimError, match="there is no ablation 'colour'"):
        ablation("colour")


def test_all_means_every_method_for_pictures():
    names = {name.partition(":")[0] for name in all_methods()}
    assert {"visiontrim", "fastv", "tome", "luvc", "vscan"} <= names
    assert not names & {PLAIN, "random", "uniform", "fastvid"}


def test_every_method_of_the_table_meets_its_mean_or_says_why(speaker, suite, tmp_path):
    block = Block.comparison(all_methods(), [192])
    examiner = Examiner(speaker, Suite("one", suite.items[:1], 3), Log(tmp_path / "log.jsonl"), 2)
    scores = block.scores(evaluate(examiner, block.cells))
    failed = {score.method for score in scores if score.error}
    assert failed <= {"fade", "ficoco-l", "holitom-inner", "ivc-prune"}  # their first layers alone cost more
    assert all("cannot be reached" in score.error for score in scores if score.error)
    assert all(abs(score.mean - 192) <= 4 for score in scores if score.mean is not None)


def test_eval_on_the_command_line(cli, tmp_path):
    command = (
        "eval",
        "--methods",
        "visiontrim",
        "--keep",
        32,
        "--scenes",
        1,
        "--seeds",
        2,
        "--out",
        tmp_path,
        "--json",
    )
    code, out, err = cli(*command)
    assert code == 0, err
    found = json.loads(out)
    assert found["plain"]["retention"] == 1.0
    assert [score["method"] for score in found["scores"]] == ["random", "uniform", "downsampled", "visiontrim"]
    assert [score["method"] for score in found["draws"]] == ["random", "random:seed=1000"]
    assert found == json.loads((tmp_path / "scores.json").read_text())
    table = (tmp_path / "table.md").read_text()
    assert "†" not in table, "one scene marks nothing"
    assert "Fewer than 8 groups" in table
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    code, _, err = cli("eval", "--split", "colour", "--out", tmp_path)
    assert code == 2
    assert "there is no split 'colour'" in err


def test_an_ablation_on_the_command_line(cli, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("mine: {title: Two splits, keep: [32], methods: ['visiontrim:split=0.5', 'visiontrim:split=1.0']}")
    code, out, err = cli("eval", "--ablation", f"{path}:mine", "--scenes", 1, "--out", tmp_path)
    assert code == 0, err
    assert "## Two splits" in out
    assert "| `visiontrim:split=0.5` |" in out


def test_several_methods_in_one_map(cli, tmp_path):
    zoo.draw_scene(3).image.save(tmp_path / "a.png")
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    base = ("map", tmp_path / "a.png", "what color is the star?", "--keep", 64)
    assert cli(*base, "-o", one)[0] == 0
    assert cli(*base, "--methods", "visiontrim:split=0.5,iterations=1,random,none", "-o", two)[0] == 0
    from PIL import Image

    assert Image.open(two).width > 3 * Image.open(one).width
