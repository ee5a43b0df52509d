"""Official benchmarks end to end: from their files to scores, uploads, published numbers and a judge."""

from __future__ import annotations

import json

import pytest
import torch

import official
from visiontrim.ask import Speaker, load
from visiontrim.evaluate.asking import Cell, Examiner
from visiontrim.evaluate.benchmarks import list_benchmarks, open_benchmark
from visiontrim.evaluate.evaluation import evaluate
from visiontrim.evaluate.given import join, read_given
from visiontrim.evaluate.items import Item
from visiontrim.evaluate.log import NAME, Log
from visiontrim.evaluate.protocol import PROTOCOLS
from visiontrim.evaluate.scores import Answers
from visiontrim.evaluate.suites import load_suite


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return load(device="cpu")


@pytest.mark.parametrize("name", list_benchmarks())
def test_a_benchmark_from_its_files_to_its_uploads(name, cli, tmp_path, monkeypatch, speaker):
    """Plain, VisionTrim and controls; the answers are written and scored again, and so are the uploads."""
    monkeypatch.setattr("visiontrim.commands.evaluate.load_speaker", lambda *_: speaker)
    for drawn in ("frontier", "examples"):
        monkeypatch.setattr(f"visiontrim.evaluate.output.{drawn}", lambda *_: [])
    official.WRITERS[name](tmp_path)
    out, suite = tmp_path / "out", f"{name}:{tmp_path}"
    command = ("eval", "--suite", suite, "--keep", 64, "--scenes", 1, "--seeds", 1, "--frames", 1, "--answer", 3)
    code, said, err = cli(*command, "--protocol", "bare", "--batch", 8, "--out", out, "--json")
    assert code == 0, err
    told = json.loads(said)
    assert [score["method"] for score in told["scores"]] == ["random", "uniform", "downsampled", "visiontrim"]
    benchmark, files = open_benchmark(suite)
    items = benchmark.read(files)
    for method in ("plain", "random-64", "visiontrim-64"):
        (upload,) = (out / "uploads").glob(f"{method}*")
        answers = out / "answers" / f"{method}.jsonl"
        again = tmp_path / f"again{upload.suffix}"
        code, said, err = cli("score", suite, answers, "--partial", "--upload", again, "--json")
        assert code == 0, err
        (first, *_), scored = json.loads(said).get("scores", [None]), told["plain"]
        if method != "plain":
            scored = told["scores"][0 if method == "random-64" else 3]
        if name in ("vqav2", "vizwiz"):
            assert first is None, "only a server has the labels"
        else:
            assert first["score"] == pytest.approx(scored["score"])
        if upload.is_dir():
            pairs = [(path.read_bytes(), (again / path.name).read_bytes()) for path in upload.iterdir()]
            assert pairs
            assert all(one == other for one, other in pairs)
        elif upload.suffix != ".xlsx":  # a spreadsheet holds the time of its making
            assert again.read_bytes() == upload.read_bytes()
        # Read back, the upload holds every answer in the form that is compared, and nothing else
        wanted = join(benchmark, items, read_given(answers), answers, partial=True)
        found = join(benchmark, items, read_given(upload), upload, partial=True)
        assert wanted.texts
        asked = [item for item in found.items if name != "vqav2" or item in wanted.items]
        assert asked == list(wanted.items)
        texts = dict(zip(found.items, found.texts, strict=True))
        assert [benchmark.parse(item, texts[item]) for item in asked] == [
            benchmark.parse(item, text) for item, text in zip(asked, wanted.texts, strict=True)
        ]
        code, said, err = cli("score", suite, upload, "--partial", "--json")
        if first is None:
            assert code == 2
        else:
            assert code == 0, err
            assert json.loads(said)["scores"][0]["score"] == pytest.approx(scored["score"])
    if name == "scienceqa":
        rows = [json.loads(line) for line in (out / NAME).read_text().splitlines()]
        assert sum(not row["per_layer"] for row in rows) in (0, 1), "without a picture only the plain model is asked"


def test_the_default_protocol_says_what_the_bundled_model_needs(cli, tmp_path):
    official.pope(tmp_path)
    code, _, err = cli("eval", "--suite", f"pope:{tmp_path}", "--out", tmp_path / "o", "--device", "cpu")
    assert code == 2
    assert err.strip().endswith("--protocol bare sends the question alone")
    assert len(err.strip().splitlines()) == 1


def test_reproduce_prints_published_beside_measured(cli, tmp_path):
    official.pope(tmp_path)
    official.scienceqa(tmp_path)
    official.vqav2(tmp_path)
    command = (
        "reproduce",
        "visionzip",
        "--root",
        tmp_path,
        "--benchmarks",
        "pope,scienceqa-img,vqav2,gqa",
        "--tokens",
        64,
    )
    code, said, err = cli(*command, "--limit", 1, "--out", tmp_path / "r", "--device", "cpu", "--json")
    assert code == 0, err
    assert "answers, about" in err
    told = json.loads(said)
    assert "the bundled model is none of the published models" in told["excuse"]
    rows = {(row["benchmark"], row["method"]): row for row in told["rows"]}
    assert rows["pope", "visionzip"]["published"] == 77.0
    assert rows["pope", "visionzip"]["published_retention"] == pytest.approx(77.0 / 85.9)
    assert rows["pope", "visionzip"]["difference"] is None
    assert rows["pope", "none"]["measured"] is not None
    assert "server" in rows["vqav2", "none"]["reason"]
    assert "GQA lacks" in rows["gqa", "none"]["reason"]
    report = (tmp_path / "r" / "reproduce.md").read_text()
    assert "| pope | 77 |" in report
    assert "not comparable" in report
    code, _, err = cli(*command, "--limit", 1, "--out", tmp_path / "r", "--device", "cpu", "--json")
    assert "answers, about" not in err, "nothing is asked twice"
    code, _, err = cli("reproduce", "nothing", "--root", tmp_path, "--benchmarks", "pope", "--out", tmp_path / "r")
    assert code == 2
    assert "nothing is printed for 'nothing' on llava-1.5-7b: choose sparsevlm, visionzip" in err


def test_what_is_comparable(monkeypatch):
    """SEED image beside image + video, MME's halves, TextVQA without tokens, a strange ScienceQA, a part of one."""
    from visiontrim.evaluate import reproduce
    from visiontrim.evaluate.published import budgets, cells, model_of, setting, usual

    assert budgets("llava-1.5-7b", "visiontrim") == [192, 128, 64, 32, 16, 8, 4, 1]
    assert usual("llava-1.5-7b", "visiontrim") == [192, 128, 64]
    assert [cell.value for cell in cells("llava-1.5-7b", "visiontrim", 64) if cell.column == "POPE"] == [86.2]
    assert setting("llava-1.5-7b", "sparsevlm", 128).call == "sparsevlm:keep=[303,110,36]"
    next_ = setting("llava-next-7b", "visiontrim", 640)
    assert (next_.per, next_.call[:23]) == ("tile", "visiontrim:keep=128,spl")
    config = type("C", (), {"model_type": "llava", "hidden_size": 4096, "num_hidden_layers": 32})
    assert model_of(config) == "llava-1.5-7b"
    config.hidden_size = 1
    assert model_of(config) is None
    for cell in cells("llava-1.5-7b", "none", 576):
        assert cell.source
        assert (cell.needs == "server") == (cell.benchmark in ("vqav2", "vizwiz"))

    def row(name: str, score: float, asked: int = 10, plain: float = 66.9) -> reproduce.Compared:
        class Found:
            labelled = 10
            items = [0] * asked
            whole = type("S", (), {"score": plain})

            def score(self, cell: Cell) -> object:
                return type(
                    "S",
                    (),
                    {"error": "", "score": score, "interval": None, "retention": 0.9, "retention_interval": None},
                )

        measured = {name: reproduce.Measured(Found(), 10)}
        return reproduce.compare("llava-1.5-7b", [setting("llava-1.5-7b", "visiontrim", 64)], measured)[1]

    assert row("gqa", 58.0).difference == pytest.approx(-0.8)
    assert row("gqa", 58.0).published_retention == pytest.approx(58.8 / 61.9)
    assert row("scienceqa-img", 70.0).difference == pytest.approx(-1.0)
    assert "neither 66.8 nor 69.5" in row("scienceqa-img", 70.0, plain=60.0).reason
    assert row("scienceqa-img", 70.0, plain=60.0).difference is None
    for name, words in (
        ("seed-image", "of image \\+ video"),
        ("mme-perception", "of perception \\+ cognition"),
        ("textvqa-no-ocr", "of val, with OCR tokens"),
        ("scienceqa", "of IMG"),
    ):
        assert row(name, 50.0).difference is None
        assert row(name, 50.0).reason == f"the published number is {words}".replace("\\", "")
    assert row("gqa", 58.0, asked=5).reason == "5 of 10 questions"
    assert row("mm-vet", 30.0).measured is None
    means = reproduce.average([row("gqa", 58.0), row("pope", 80.0)])
    assert means["visiontrim", 64][1:] == (0.9, 2)


def test_a_judge_grades_and_goes_on(cli, tmp_path):
    """A server on this machine that speaks as OpenAI's does; grades are kept, and asked for once."""
    import http.server
    import threading

    replies = []

    class Judge(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            replies.append(body)
            text = "0.5 I think" if "ground truth" in body["messages"][0]["content"] else "{'pred': 'yes', 'score': 4}"
            answer = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: object) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        for name, count in (("mm-vet", 6), ("msvd-qa", 6)):
            official.WRITERS[name](tmp_path)
            rows = [{"question_id": n if name == "mm-vet" else f"q{n}", "text": "a"} for n in range(count)]
            official.lines(tmp_path / "a.jsonl", rows)
            command = [
                "score",
                f"{name}:{tmp_path}",
                tmp_path / "a.jsonl",
                "--grades",
                tmp_path / f"{name}.json",
                "--json",
            ]
            code, said, err = cli(
                *command, "--judge", f"http://127.0.0.1:{server.server_port}/v1", "--judge-model", "made"
            )
            assert code == 0, err
            graded = json.loads(said)["graded"]["tables"]
            before = len(replies)
            code, again, _ = cli(*command)
            assert json.loads(again)["graded"]["tables"] == graded
            assert len(replies) == before
            code, alone, _ = cli("score", f"{name}:{tmp_path}", "--grades", tmp_path / f"{name}.json", "--json")
            assert json.loads(alone)["graded"]["tables"] == graded, "the grades of a file need no answers"
            if name == "mm-vet":
                assert graded["all"]["total"]["total"] == 50.0
            else:
                assert graded["judged"]["all"] == {"accuracy": 100.0, "score": 4.0, "questions": 6.0}
        assert {reply["model"] for reply in replies} == {"made"}
        code, _, err = cli("score", f"mm-vet:{tmp_path}", tmp_path / "a.jsonl", "--judge", "http://127.0.0.1:9")
        assert code == 2
    finally:
        server.shutdown()
        server.server_close()


def test_one_answer_sheet_beside_another(cli, tmp_path):
    official.gqa(tmp_path)
    labels = json.loads((tmp_path / "gqa/data/testdev_balanced_questions.json").read_text())
    for name, wrong in (("plain", 0), ("ours", 3)):
        rows = [
            {"question_id": id, "text": "wrong" if number < wrong else label["answer"]}
            for number, (id, label) in enumerate(labels.items())
        ]
        official.lines(tmp_path / f"{name}.jsonl", rows)
    code, said, err = cli("score", f"gqa:{tmp_path}", tmp_path / "plain.jsonl", tmp_path / "ours.jsonl")
    assert code == 0, err
    assert "-50.00, retention 50.0 %" in said
    code, said, _ = cli("score", f"gqa:{tmp_path}")
    assert "6 to be asked about 2 pictures; 6 have a label" in said
    code, said, _ = cli("eval", "--list", "--json")
    assert json.loads(said)["pope"]["metric"] == "mean F1"


def test_answers_know_what_a_type_is_worth(speaker, tmp_path):
    official.pope(tmp_path)
    suite = load_suite(f"pope:{tmp_path}")
    rows = Examiner(speaker, suite, Log(tmp_path / NAME), 64, PROTOCOLS["bare"])
    found: Answers = evaluate(rows, [])
    assert set(found.whole.by_type) == {"adversarial", "popular", "random"}
    assert found.whole.by_type["random"] == pytest.approx(found.whole.score)


def test_the_likelihood_of_an_answer(speaker):
    """With all tokens it is the model's own loss; the right answer is likelier than another, also compressed."""
    from visiontrim.core.registry import load_method
    from visiontrim.evaluate.asking import encode
    from visiontrim.evaluate.likelihood import likelihood

    seed, question, answer = official.pairs(("color",))[0]
    item = Item("1", "1", (official.scene(seed),), question, (answer,), "color")
    whole, greedy = likelihood(speaker, item, answer, load_method("random:keep=1.0"))
    assert greedy
    inputs = encode(speaker, [item])
    ids = speaker.processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    inputs["attention_mask"] = torch.ones(1, inputs["input_ids"].shape[1] + ids.shape[1], dtype=torch.long)
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    labels = inputs["input_ids"].clone()
    labels[:, :length] = -100
    with torch.inference_mode():
        expected = speaker.model(**{k: v for k, v in inputs.items() if k != "mm_token_type_ids"}, labels=labels).loss
    assert whole == pytest.approx(float(expected), abs=1e-5)
    ours = likelihood(speaker, item, answer, load_method("visiontrim:keep=64,variant=lean"))
    other = likelihood(speaker, item, "star", load_method("visiontrim:keep=64,variant=lean"))
    assert ours[0] < other[0]
    assert ours[1]
    assert not other[1]
    text = Item("2", "2", (), question, (answer,), "color")
    assert likelihood(speaker, text, answer, load_method("visiontrim:keep=64,variant=lean"))[0] > 0
