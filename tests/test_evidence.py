"""Controls, frontiers and figures beside the tables of an evaluation, by hand and on the bundled models."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visiontrim.analyze.horizon import Depth, Horizon, pair
from visiontrim.ask import BUNDLED_QWEN, load
from visiontrim.cli import main
from visiontrim.core.errors import TrimError
from visiontrim.core.view import View
from visiontrim.evaluate import published, validity
from visiontrim.evaluate.asking import PLAIN, Cell, Examiner
from visiontrim.evaluate.benchmarks import list_benchmarks
from visiontrim.evaluate.evaluation import Block, evaluate
from visiontrim.evaluate.evidence import evidence
from visiontrim.evaluate.frontier import at, by_time, by_tokens, edge, frontier
from visiontrim.evaluate.items import Item, Suite
from visiontrim.evaluate.log import Log, Row
from visiontrim.evaluate.report import Section
from visiontrim.evaluate.scores import Answers, Score
from visiontrim.evaluate.smaller import boundless, shrunk
from visiontrim.evaluate.suites import load_suite
from visiontrim.methods.fastv import FastV

ITEMS = tuple(
    Item(f"{group}/{kind}", str(group), (), "?", (right,), kind)
    for group in range(8)
    for kind, right in (("exist", "yes" if group < 4 else "no"), ("color", "red"))
)


def answered(texts: dict[Cell, list[str]], seconds: dict[Cell, float] | None = None) -> Answers:
    """Answers to :data:`ITEMS`, in two batches of 8."""

    def row(cell: Cell, said: list[str], start: int) -> Row:
        ids = tuple(item.id for item in ITEMS[start : start + 8])
        prefill = (seconds or {}).get(cell, 0.5)
        taken = {"vision": 0.5, "method": 0.0, "prefill": prefill, "total": 0.5 + prefill}
        return Row("", "", cell.keep, "", ids, tuple(said[start : start + 8]), (1,) * 8, "", (64.0,), taken)

    rows = {cell: [row(cell, said, start) for start in (0, 8)] for cell, said in texts.items()}
    return Answers(Suite("made", ITEMS, 3), [ITEMS[:8], ITEMS[8:]], rows)


RIGHT = [item.answers[0] for item in ITEMS]
PLAINLY = Cell(PLAIN, None)
BLOCK = Block.comparison(["visiontrim"], [64], seeds=3)


@pytest.fixture(scope="module")
def made() -> tuple[Answers, list[Section]]:
    """The control of a smaller picture knows no colour, VisionTrim half of them, and says no to all but two."""
    no = ["no" if item.type == "exist" else "blue" for item in ITEMS]
    ours = [
        (text if item.group in "01" else "no") if item.type == "exist" else ("red" if int(item.group) % 2 else "blue")
        for item, text in zip(ITEMS, RIGHT, strict=True)
    ]
    seeds = [Cell("random", 64), Cell("random:seed=1000", 64), Cell("random:seed=2000", 64)]
    assert BLOCK.draws(64) == seeds
    texts = {PLAINLY: RIGHT, Cell("uniform", 64): no, Cell("downsampled", 64): no, Cell("visiontrim", 64): ours}
    texts |= {cell: RIGHT[:number] + ["x"] * (16 - number) for cell, number in zip(seeds, (8, 4, 12), strict=True)}
    assert set(texts) == {PLAINLY, *BLOCK.asked}
    found = answered(texts, {Cell("visiontrim", 64): 0.25})
    return found, evidence(BLOCK, found)


def row(section: Section, name: str) -> list[str]:
    return list(next(cells for cells in section.rows if cells[0] == name)[1:])


def test_groups_that_a_smaller_picture_divides(made):
    """The control is right about the 4 questions whose answer is no."""
    section = made[1][0]
    assert section.title == "Against a smaller picture, 64 tokens"
    assert section.header[1:3] == ("right when downsampled (4)", "wrong when downsampled (12)")
    assert row(section, "`downsampled`") == ["100.0", "0.0", ""]
    ours = row(section, "`visiontrim`")
    assert ours[:2] == ["100.0", "50.0"], "2 of 4 yes and 4 of 8 colours"
    assert ours[2].startswith("+37.5 (")
    assert row(section, "plain")[:2] == ["100.0", "100.0"]


def test_the_spread_of_random(made):
    section = next(section for section in made[1] if section.title == "Spread of random")
    assert section.rows == (("64", "50.0", "25.00", "25.0", "75.0"),)


def test_skills_are_rows(made):
    section = next(section for section in made[1] if section.title == "`visiontrim`, skill by skill")
    assert section.header == ("skill", "questions", "plain", "64 tokens")
    assert row(section, "exist")[:2] == ["8", "100.0"]
    assert row(section, "exist")[2].startswith("-25.0 (")
    assert row(section, "color")[2].startswith("-50.0 (")


def test_yes_and_no_are_scored_as_pope(made):
    section = next(section for section in made[1] if section.title == "Yes or no, 64 tokens")
    found, pope = made[0], list_benchmarks()["pope"]
    items = [Item(item.id, item.group, (), "?", item.answers, "random") for item in ITEMS if item.type == "exist"]
    for method in ("visiontrim", "uniform"):
        texts = found.where([item.type == "exist" for item in ITEMS]).texts(Cell(method, 64))
        official = pope.breakdown(items, texts).tables["category"]["random"]
        accuracy, f1, missed, yes = map(float, row(section, f"`{method}`"))
        expected = [official["accuracy"], official["F1"], 100 - official["recall"], official["yes ratio"]]
        assert [accuracy, f1, missed, yes] == pytest.approx(expected, abs=0.05)
    assert len(section.header) == 5, "colours are no yes or no"


def test_a_part_of_the_answers(made):
    found = made[0]
    part = found.where([item.type == "color" for item in ITEMS])
    again = part.where([int(item.group) % 2 == 0 for item in part.items])
    ours = Cell("visiontrim", 64)
    assert (part.score(ours).score, again.score(ours).score, again.groups) == (50.0, 0.0, 4)
    assert found.score(ours).score == pytest.approx(100 * 10 / 16), "the whole is as it was"
    assert found.score(ours).by_type["color"] == part.score(ours).score
    assert found.score(ours).time == pytest.approx(0.75)


def point(method: str, keep: int, retention: float, time: float) -> Score:
    return Score(method, keep, "", retention=retention, mean=float(keep), time=time)


def test_frontiers_and_equal_times():
    slow = [point("slow", 64, 0.99, 0.9), point("slow", 32, 0.9, 0.5)]
    controls = [point(name, keep, share, time) for name in ("random", "uniform", "downsampled")
                for keep, share, time in ((64, 0.8, 0.4), (32, 0.6, 0.3))]  # fmt: skip
    every = [*slow, *controls]
    assert [(score.method, score.keep) for score in edge(every, by_tokens)] == [("slow", 32), ("slow", 64)]
    assert [score.time for score in edge(every, by_time)] == [0.3, 0.4, 0.5, 0.9]
    assert at(slow, 0.4) is None, "its smallest budget takes longer"
    assert at(slow, 0.7) == pytest.approx((0.945, 48.0)), "half the way between its budgets"
    assert at(slow, 2.0) == (0.99, 64.0)
    block = Block.comparison(["slow"], [64, 32])
    tables = frontier(block, every)
    equal = next(section for section in tables if section.title == "At equal time")
    assert equal.header == ("method", "0.40", "0.30")
    assert row(equal, "`slow`") == ["-", "-"]
    assert row(equal, "`random`") == ["80.0 (64)", "63.0 (37)"], "0.3 and 5 % more"
    assert tables[-1].picture is not None
    assert tables[-1].picture.width > 800
    assert frontier(Block("an ablation", ("a", "b"), (64,)), every) == []


def test_a_smaller_picture_has_at_most_the_budget():
    speaker = load(BUNDLED_QWEN, device="cpu")
    (item, other), bounds = load_suite("canvases", scenes=1).items[:2], speaker.processor.image_processor.size
    free = boundless(speaker)
    for keep, tokens in ((100, 100), (0.125, 30), (20, 20)):
        small, same = shrunk([item, other], keep, free.processor)
        seen = free.processor.image_processor(images=list(small.sources), return_tensors="pt")["image_grid_thw"]
        assert int(seen.prod()) // 4 == tokens
        assert small.sources is same.sources or small.sources[0] is same.sources[0], "encoded once"
    assert shrunk([item], 999, free.processor)[0].pictures()[0].size == item.pictures()[0].size
    assert speaker.processor.image_processor.size == bounds, "the model's own processor is as it was"


def test_the_control_on_both_models(tmp_path):
    """Smaller pictures where tokens follow the size, pooled features elsewhere; each has an answer of its own."""
    for name, suite in ((None, "shapes"), (BUNDLED_QWEN, "canvases")):
        speaker, questions = load(name, device="cpu"), load_suite(suite, scenes=1)
        questions = questions.taking(questions.items[:2])
        cells = [Cell("downsampled", 30), Cell("avgpool", 30)]
        found = evaluate(Examiner(speaker, questions, Log(tmp_path / f"{suite}.jsonl"), 2), cells)
        rows = [json.loads(line) for line in (tmp_path / f"{suite}.jsonl").read_text().splitlines()]
        assert len(rows) == (2 if name is None else 3), "the plain model, and avgpool once or twice"
        assert found.score(cells[0]).mean == 30.0
        if name is None:
            assert found.texts(cells[0]) == found.texts(cells[1])
        else:
            assert json.loads(rows[1]["method"]) == {"method": "none", "downsampled": 30}
            assert rows[1]["seconds"]["vision"] < rows[0]["seconds"]["vision"]


def test_means_of_clusters():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 24, 5, generator=generator)
    kept = torch.tensor([[1, 7, 20], [0, 2, 23]])
    places = torch.stack([torch.zeros(24), torch.arange(24) // 6, torch.arange(24) % 6], 1).long().expand(2, -1, -1)
    view = View(features=features, coordinates=places, grid=(1, 4, 6), entered=24, num_layers=2)
    keep = validity.Clustered(kept, 4).select(view)
    assert keep.index.shape == (2, 7)
    assert keep.features is not None
    assert keep.complement is not None
    assert (keep.index.diff(dim=1) > 0).all()
    for b in range(2):
        rest = [j for j in range(24) if j not in kept[b]]
        middle = [rest[(2 * i + 1) * 21 // 8] for i in range(4)]
        assert set(keep.index[b].tolist()) == {*kept[b].tolist(), *middle}
        near = [
            max(middle, key=lambda m: torch.cosine_similarity(features[b, j], features[b, m], 0).item()) for j in rest
        ]
        for place, token in enumerate(keep.index[b].tolist()):
            members = [j for j, m in zip(rest, near, strict=True) if m == token] if token in middle else [token]
            torch.testing.assert_close(keep.features[b, place], features[b, members].mean(0))
            assert bool(keep.complement[b, place]) == (token in middle)


def test_rank_correlation():
    ours = np.array([3.0, 1.0, 2.0, 5.0])
    assert validity.spearman(ours, ours**3) == pytest.approx(1.0)
    assert validity.spearman(ours, -ours) == pytest.approx(-1.0)
    assert validity.spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 1.0, 4.0, 3.0])) == pytest.approx(0.6)
    # ties have the mean of their ranks: 1.5 1.5 3 4 against 1 2 3 4
    assert validity.spearman(np.array([0.0, 0.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(
        0.9487, abs=1e-4
    )
    assert validity.spearman(np.ones(4), ours) == 0.0


def test_published_averages_and_the_half_that_is_held_out():
    found, apart = published.averages(validity.MODEL), published.held_out()
    assert {number: found["visiontrim"][number] for number in (192, 128, 64)} == {192: 100.6, 128: 99.9, 64: 98.8}
    assert found["visionzip"][64] == 94.4, "the first table's"
    assert (found["fastv"][64], found["mmtok"][192]) == (75.6, 98.7)
    assert sorted(found)[1::2] == sorted(set(apart)), "every second by name, before anything was measured"
    for method in found:
        Cell(validity._named(method), 64).load()
    assert published.call("fastv") == "fastv"
    assert "keep" not in published.call("visiontrim")
    assert validity.budgets(256) == {192: 85, 128: 57, 64: 28}


def test_ranks_of_both_halves():
    known = {"divprune": {64: 3.0}, "visionzip": {64: 2.0}, "vscan": {64: 1.0}, "mmtok": {64: 5.0}, "fastv": {64: 4.0}}
    cells = {name: Cell(validity._named(name), 64) for name in known}
    number = {"divprune": 14, "visionzip": 10, "vscan": 6, "mmtok": 2, "fastv": 12}
    texts = {cells[name]: RIGHT[:right] + ["x"] * (16 - right) for name, right in number.items()}
    found = validity.ranks(answered({PLAINLY: RIGHT} | texts), {64: 64}, known)
    rhos = {(rank.half, rank.tokens): (rank.methods, rank.rho) for rank in found}
    assert rhos["held out", 64] == (3, pytest.approx(1.0))
    assert rhos["seen", 64] == (2, None), "two methods have no order"
    assert rhos["all", 64] == (5, pytest.approx(-0.1))
    assert rhos["all", None][1] == rhos["all", 64][1]


def test_the_card_prints_stored_figures(tmp_path, monkeypatch, capsys):
    one = {"retention": 66.9, "interval": [60.0, 70.0], "why": ""}
    stored = {
        "model": "bundled", "suite": "shapes/standard", "questions": 9, "groups": 8, "plain": 90.0, "tokens": 576,
        "cls": {"fastervlm": one}, "means": {"tokens": 90.0, "means": 81.0, "of": 64, "clusters": 16},
        "controls": {"random": {"retention": 50.0, "spread": [49.0, 51.0]}, "uniform": one},
        "ranks": [{"tokens": 64, "half": "held out", "methods": 7, "rho": 0.25, "interval": [0.1, 0.4]}],
        "held_out": ["vscan"], "methods": {"vscan": {"64": one | {"published": 96.8}}},
    }  # fmt: skip
    (tmp_path / "v.json").write_text(json.dumps(stored))
    monkeypatch.setattr(sys, "argv", ["visiontrim", "zoo", "card", str(tmp_path / "v.json")])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().out
    assert "| `fastervlm`, 64 of 576 tokens: retention in % | 90 and more | 66.9 (60.0 to 70.0) |" in said
    assert "loss in points of retention | 3 at most | 10.0 (90.0 to 81.0 % right) |" in said
    assert "held out, 64 of 576 | 0.70 and more | 0.25 (0.10 to 0.40), 7 methods |" in said
    assert "| `vscan`, held out |  |  |  |  | 96.8 | 66.9 (60.0 to 70.0) |" in said


def test_the_horizon_is_the_end_of_all_loss():
    def depth(layer: int, loss: float, high: float, over: float, low: float) -> Depth:
        return Depth(layer, loss, (loss - 1, high), loss + over, over, (low, over + 1))

    depths = (depth(0, -0.5, 0.5, 9, 5), depth(2, -9, -2, 8, 3), depth(4, -3, 1, 2, -1), depth(6, -1, 0, 0.5, -2))
    found = Horizon("all", 16, 100.0, depths)
    assert found.lost == 6, "layer 0 loses nothing by luck, layer 4 three points"
    assert found.chosen == 4
    assert Horizon("all", 16, 100.0, depths[:2]).lost is None
    assert json.loads(json.dumps(found.to_dict()))["layers"][1]["random"] == -9
    control, ours = pair("fastv:layer={layer},keep=[{keep}]", 3, 16)
    assert (str(control.load()), ours.load()) == ("random:keep=16,layer=3", FastV(keep=(16,), layer=3))
    with pytest.raises(TrimError, match="has no place for the layer"):
        pair("fastv", 3, 16)


def test_the_horizon_on_the_command_line(tmp_path, monkeypatch, capsys):
    arguments = ["analyze", "horizon", "--limit", "2", "--layer", "2", "--layer", "7", "--out", tmp_path / "h"]
    monkeypatch.setattr(sys, "argv", ["visiontrim", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert not stopped.value.code, err
    told = json.loads((tmp_path / "h.json").read_text())
    assert [one["layer"] for one in told["types"][0]["layers"]] == [2, 7]
    assert told["types"][0]["nothing_lost_from"] in (2, 7)
    assert "| layer | random | method | method over random |" in out
    assert Image.open(tmp_path / "h.png").width > 500


def test_the_readme_gets_its_table_from_stored_scores():
    root = Path(__file__).parent.parent
    tables = runpy.run_path(str(root / "benchmarks" / "tables.py"))

    def score(method: str, keep: int, retention: float | None, beats: bool | None) -> dict:
        return {"method": method, "keep": keep, "retention": retention, "beats_reference": beats}

    one = {"questions": 365, "groups": 44, "plain": {"score": 99.18}}
    scores = [score("random", 64, 0.508, None), score("fastv", 64, None, None), score("visionzip", 64, 0.669, False)]
    found = {name: one | {"scores": scores} for name in ("table", "hard", "canvases")}
    text = tables["block"](found)
    assert "| `random` | - | - | 50.8 | - | 50.8 | 50.8 |" in text
    assert "| `visionzip` | - | - | 66.9 † | - | 66.9 † | 66.9 † |" in text
    assert "`fastv`" not in text
    assert "the plain model's 99.2 %, on 365 questions about 44" in text
    readme = (root / "README.md").read_text()
    natural = tables["natural"](one | {"scores": [*scores, score("visionzip", 192, 0.9, True)]})
    assert "| `visionzip` | 90.0 | - | 66.9 † | 94.4 |\n| `random` | - | - | 50.8 |  |" in natural, "the best first"
    assert "`fastv`" not in natural
    for name, new in (("table", text), ("natural", natural)):
        written = tables["rewritten"](readme, new, name)
        assert new in written
        assert tables["rewritten"](written, new, name) == written
        begin = f"<!-- {name}: begin"
        assert written.split(begin)[0] == readme.split(begin)[0]
    card = (root / "src" / "visiontrim" / "zoo" / "README.md").read_text()
    assert "| x |" in tables["rewritten"](card, "| x |", "table")
