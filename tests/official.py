"""Small files in the form of the official benchmarks: names, types and encodings are theirs, contents are made here.

Questions and pictures are the bundled model's, so that it can answer them (``--protocol bare``).
"""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from visiontrim import zoo
from visiontrim.evaluate.benchmarks.base import LETTER, OCR, SHORT, UNANSWERABLE

SCENES = 2
FINE = {"quality": 100, "subsampling": 0}
"""Of JPEG: with less the small model misreads its own scenes."""


@cache
def samples() -> tuple[Any, ...]:
    return tuple(zoo.SPLITS["standard"].samples(SCENES))


def pairs(kinds: Sequence[str] = ("color", "shape", "count")) -> list[tuple[int, str, str]]:
    """Scene, question and right answer."""
    return [(s.scene_seed, s.question, s.answer) for s in samples() if s.type in kinds]


def scene(seed: int) -> Image.Image:
    return next(sample.image for sample in samples() if sample.scene_seed == seed)


def yes_or_no() -> list[tuple[int, str, str]]:
    return pairs(("exist", "rel"))


def lines(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def pictures(folder: Path, name: Callable[[int], str], format: str = "JPEG") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in dict.fromkeys(sample.scene_seed for sample in samples()):
        scene(seed).save(folder / name(seed), format, **FINE)


def gqa(root: Path) -> Path:
    home, found = root / "gqa", {}
    for number, (seed, question, answer) in enumerate(pairs()):
        found[f"{number:09d}"] = {
            "question": question,
            "imageId": f"n{seed}",
            "answer": answer,
            "isBalanced": True,
            "types": {"structural": ("query", "verify")[number % 2], "semantic": "attr", "detailed": "x"},
            "groups": {"global": "color" if number % 3 else None, "local": "1"},
            "semantic": [
                {"operation": "select", "argument": "star (1)", "dependencies": []},
                {"operation": "exist", "argument": "?", "dependencies": [0]},
            ],
        }
    save(home / "data" / "testdev_balanced_questions.json", found)
    asked = [
        {
            "question_id": id,
            "image": f"{row['imageId']}.jpg",
            "text": f"{row['question']}\n{SHORT}",
            "category": "default",
        }
        for id, row in found.items()
    ]
    lines(home / "llava_gqa_testdev_balanced.jsonl", asked)
    pictures(home / "data" / "images", lambda seed: f"n{seed}.jpg")
    return root


def scienceqa(root: Path) -> Path:
    home, entries, problems = root / "scienceqa", [], {}
    for number, (seed, question, answer) in enumerate(pairs(), 1):
        seen, hint = number % 2 == 1, "It is a drawing." if number == 1 else ""
        choices = ["green hills", answer, "blue sky"]
        text = (
            (f"Context: {hint}\n" if hint else "")
            + question
            + "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABC", choices, strict=True))
        )
        turns = [{"from": "human", "value": ("<image>\n" if seen else "") + text}, {"from": "gpt", "value": "B"}]
        entries.append({"id": str(number), "conversations": turns} | ({"image": f"{number}/image.png"} if seen else {}))
        problems[str(number)] = {
            "question": question,
            "choices": choices,
            "answer": 1,
            "hint": hint,
            "image": "image.png" if seen else None,
            "grade": f"grade{number + 4}",
            "subject": "natural science",
            "topic": "physics",
        }
        if seen:
            (home / "images" / "test" / str(number)).mkdir(parents=True)
            scene(seed).save(home / "images" / "test" / str(number) / "image.png")
    save(home / "llava_test_CQM-A.json", entries)
    save(home / "problems.json", problems)
    save(home / "pid_splits.json", {"test": list(problems), "val": []})
    return root


def textvqa(root: Path) -> Path:
    home = root / "textvqa"
    data, asked = [], []
    for number, (seed, question, answer) in enumerate(pairs(("read", "color"))):
        ids = f"{seed:016x}"
        tokens = "" if number == 0 else "STOP, 2"
        asked.append(
            {
                "question_id": ids,
                "image": f"{ids}.jpg",
                "text": f"{question.capitalize()}\n{OCR}{tokens}\n{SHORT}",
                "category": "default",
            }
        )
        data.append({"question": question, "question_id": 34_602 + number, "image_id": ids, "answers": [answer] * 10})
    lines(home / "llava_textvqa_val_v051_ocr.jsonl", asked)
    save(home / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": data})
    pictures(home / "train_images", lambda seed: f"{seed:016x}.jpg")
    return root


def two_questions(folder: Path) -> Path:
    """A file of two questions about a picture beside it, the second without an answer."""
    (seed, first, answer), (_, second, _) = pairs()[:2]
    scene(seed).save(folder / "a.png")
    rows = [
        {"image": "a.png", "question": first, "answer": answer},
        {"image": "a.png", "question": second, "answer": None},
    ]
    lines(folder / "q.jsonl", rows)
    return folder / "q.jsonl"


def pope(root: Path, later: bool = False) -> Path:
    """``later`` spells a question of the random file otherwise, as POPE's later labels do."""
    home, asked = root / "pope", []
    for place, category in enumerate(("adversarial", "popular", "random")):
        rows = []
        for number, (seed, question, label) in enumerate(yes_or_no(), 1):
            image = f"COCO_val2014_{seed:012d}.jpg"
            text = f"{question} imange" if later and category == "random" and number == 1 else question
            rows.append({"question_id": number, "image": image, "text": text, "label": label})
            asked.append(
                {
                    "question_id": place * 10_000_000 + number,
                    "image": image,
                    "text": f"{question}\n{SHORT}",
                    "category": category,
                }
            )
        lines(home / "coco" / f"coco_pope_{category}.json", rows)
    lines(home / "llava_pope_test.jsonl", asked)
    pictures(home / "val2014", lambda seed: f"COCO_val2014_{seed:012d}.jpg")
    return root


MMBENCH = "index question hint A B C D answer category image source l2-category comment split".split()  # noqa: SIM905


def mmbench(root: Path, chinese: bool = False) -> Path:
    """Rotations as rows, one pair of them no plain rotation; a hint with a new line; a picture that two rows share."""
    home = root / ("mmbench_cn" if chinese else "mmbench")
    home.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (seed, question, answer) in enumerate(pairs(), 241):
        buffer = io.BytesIO()
        scene(seed).save(buffer, "JPEG", **FINE)
        image = base64.b64encode(buffer.getvalue()).decode()
        for turn, options in enumerate((["hills", answer, "sky"], [answer, "sky", "hills"], ["sky", "hills", answer])):
            if number == 242 and turn == 2:
                continue
            rows.append(
                {
                    "index": number + turn * 1_000_000,
                    "question": question,
                    "hint": 'Two "lines"\nof a hint' if number == 241 else "nan",
                    "A": options[0],
                    "B": options[1],
                    "C": options[2],
                    "D": "",
                    "answer": "ABC"[options.index(answer)],
                    "category": "object_localization",
                    "image": image if turn == 0 else str(number),
                    "source": "made",
                    "l2-category": "finegrained_perception",
                    "comment": "",
                    "split": "dev",
                }
            )
    name = "mmbench_dev_cn_20231003.tsv" if chinese else "mmbench_dev_20230712.tsv"
    with (home / name).open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, MMBENCH, delimiter="\t")
        table.writeheader()
        table.writerows(rows)
    return root


def seed_bench(root: Path) -> Path:
    """The first two pictures share an id, as 49914 does; the last question is about a video."""
    home, questions, asked = root / "seed_bench", [], []
    for number, (seed, question, answer) in enumerate(pairs()):
        video = number == len(pairs()) - 1
        id = "v1" if video else str(max(number, 1))
        text = f"{question}\nA. hills\nB. {answer}\nC. sky\nD. sea\n{LETTER}"
        picture = f"SEED-Bench-video-image/{id}.png" if video else f"SEED-Bench-image/{seed}"
        asked.append({"question_id": id if video else int(id), "image": picture, "text": text, "category": "1"})
        questions.append(
            {
                "question_id": id,
                "question": question,
                "choice_a": "hills",
                "choice_b": answer,
                "choice_c": "sky",
                "choice_d": "sea",
                "answer": "B",
                "data_id": str(seed),
                "data_type": "video" if video else "image",
                "question_type_id": 10 if video else 1,
            }
        )
    types = {"Scene Understanding": 1, "Action Recognition": 10}
    save(home / "SEED-Bench.json", {"questions": questions, "question_type": types})
    lines(home / "llava-seed-bench.jsonl", asked)
    pictures(home / "SEED-Bench-image", str, "PNG")
    pictures(home / "SEED-Bench-video-image", lambda seed: "v1.png", "PNG")
    return root


def mm_vet(root: Path) -> Path:
    home, found, asked = root / "mm-vet", {}, []
    for number, (seed, question, answer) in enumerate(pairs()):
        capability = ["rec", "ocr"] if number % 2 else ["math"]
        found[f"v1_{number}"] = {
            "imagename": f"v1_{seed}.png",
            "question": question,
            "answer": f"{answer} <AND> {answer}<OR>nothing",
            "capability": capability,
        }
        row = {"question_id": number, "image": f"v1_{seed}.png", "text": question, "category": "default"}
        asked.append(row)
    save(home / "mm-vet.json", found)
    lines(home / "llava-mm-vet.jsonl", asked)
    pictures(home / "images", lambda seed: f"v1_{seed}.png", "PNG")
    return root


def vqav2(root: Path) -> Path:
    home = root / "vqav2"
    asked = [
        {
            "question_id": 262_144_000 + n,
            "image": f"COCO_test2015_{seed:012d}.jpg",
            "text": f"{q}\n{SHORT}",
            "category": "d",
        }
        for n, (seed, q, _) in enumerate(pairs())
    ]
    lines(home / "llava_vqav2_mscoco_test-dev2015.jsonl", asked)
    lines(home / "llava_vqav2_mscoco_test2015.jsonl", [{**asked[0], "question_id": 1}, *asked])
    pictures(home / "test2015", lambda seed: f"COCO_test2015_{seed:012d}.jpg")
    questions = [{"image_id": seed, "question": q, "question_id": n} for n, (seed, q, _) in enumerate(pairs())]
    labels = [
        {
            "question_id": n,
            "image_id": seed,
            "question_type": "what",
            "answer_type": "other",
            "answers": [{"answer": a if k else "?", "answer_confidence": "yes", "answer_id": k} for k in range(10)],
        }
        for n, (seed, _, a) in enumerate(pairs())
    ]
    save(home / "v2_OpenEnded_mscoco_val2014_questions.json", {"data_subtype": "val2014", "questions": questions})
    save(home / "v2_mscoco_val2014_annotations.json", {"annotations": labels})
    pictures(home / "val2014", lambda seed: f"COCO_val2014_{seed:012d}.jpg")
    return root


def vizwiz(root: Path) -> Path:
    home = root / "vizwiz"
    names = {seed: f"VizWiz_test_{n:08d}.jpg" for n, seed in enumerate(dict.fromkeys(s.scene_seed for s in samples()))}
    text = "{}\n" + UNANSWERABLE + "\n" + SHORT
    asked = [
        {"question_id": n, "image": names[seed], "text": text.format(q), "category": "default"}
        for n, (seed, q, _) in enumerate(pairs())
    ]
    lines(home / "llava_test.jsonl", asked)
    pictures(home / "test", lambda seed: names[seed])
    answers = [{"answer_confidence": "yes"} | {"answer": a} for _, _, a in pairs()]
    save(
        home / "val.json",
        [
            {"image": names[seed], "question": q, "answers": [answers[n]] * 10, "answer_type": "other", "answerable": 1}
            for n, (seed, q, _) in enumerate(pairs())
        ],
    )
    pictures(home / "val", lambda seed: names[seed])
    return root


def mme(root: Path) -> Path:
    """A category with files side by side, and one with folders and two spaces before the last sentence."""
    release, asked = root / "MME" / "MME_Benchmark_release_version", []
    for seed in dict.fromkeys(seed for seed, _, _ in yes_or_no()):
        for category, text_home, image_home in (
            ("existence", "existence", "existence"),
            ("artwork", "artwork/questions_answers_YN", "artwork/images"),
        ):
            mine = [(q, a) for s, q, a in yes_or_no() if s == seed][:2]
            space = " " if category == "existence" else "  "
            path = release / text_home / f"{seed}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{q}{space}Please answer yes or no.\t{a.title()}\n" for q, a in mine))
            (release / image_home).mkdir(parents=True, exist_ok=True)
            scene(seed).save(release / image_home / f"{seed}.jpg", **FINE)
            image = f"{image_home}/{seed}.jpg"
            asked += [
                {"question_id": image, "image": image, "text": f"{q}\n{SHORT}", "category": category} for q, _ in mine
            ]
    lines(root / "MME" / "llava_mme.jsonl", asked)
    return root


def frames(folder: Path, seed: int) -> None:
    """A video as a folder of two frames."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(2):
        scene(seed).save(folder / f"{number:03d}.png")


def open_questions(root: Path, folder: str = "MSVD_Zero_Shot_QA", videos: str = "videos") -> Path:
    """Of Video-ChatGPT's four sets, which differ in the folder of their videos."""
    home = root / "GPT_Zero_Shot_QA" / folder
    asked = [{"video_name": f"v{s}", "question": q, "question_id": f"q{n}"} for n, (s, q, _) in enumerate(pairs())]
    truths = [{"answer": a, "question_id": f"q{n}"} for n, (_, _, a) in enumerate(pairs())]
    save(home / "test_q.json", asked)
    save(home / "test_a.json", truths[::-1])  # joined by id, so the order says nothing
    for seed, _, _ in pairs():
        frames(home / videos / f"v{seed}", seed)
    return root


def tgif(root: Path) -> Path:
    """Its videos are animations: each is one file of two frames."""
    open_questions(root, "TGIF_Zero_Shot_QA", "mp4")
    home = root / "GPT_Zero_Shot_QA" / "TGIF_Zero_Shot_QA" / "mp4"
    for folder in list(home.iterdir()):
        first, *rest = (Image.open(path).quantize(256) for path in sorted(folder.iterdir()))
        first.save(home / f"{folder.name}.gif", save_all=True, append_images=rest, duration=[100, 200])
        shutil.rmtree(folder)
    return root


def videos(root: Path) -> Path:
    open_questions(root)
    mv = [{"video": f"v{s}", "question": q, "candidates": ["hills", a], "answer": a} for s, q, a in pairs()]
    save(root / "mvbench" / "json" / "action_count.json", mv[:3])
    save(root / "mvbench" / "json" / "moving_count.json", mv[3:])
    mme_rows = [
        {
            "question_id": f"{n:03d}-1",
            "videoID": f"v{s}",
            "duration": ("short", "long")[n % 2],
            "domain": "Knowledge",
            "sub_category": "Law",
            "task_type": "Counting Problem",
            "question": q,
            "options": ["A. hills.", f"B. {a}."],
            "answer": "B",
        }
        for n, (s, q, a) in enumerate(pairs())
    ]
    lines(root / "videomme" / "videomme.jsonl", mme_rows)
    for seed, _, _ in pairs():
        frames(root / "mvbench" / "video" / "perception" / f"v{seed}", seed)
        frames(root / "videomme" / "data" / f"v{seed}", seed)
    (root / "videomme" / "subtitle").mkdir()
    for seed, _, _ in pairs():
        (root / "videomme" / "subtitle" / f"v{seed}.srt").write_text("1\n00:00:01,0 --> 00:00:02,0\n<i>Look!</i>\n")
    return root


WRITERS = {
    "gqa": gqa,
    "scienceqa": scienceqa,
    "scienceqa-img": scienceqa,
    "textvqa": textvqa,
    "textvqa-no-ocr": textvqa,
    "pope": pope,
    "mmbench": mmbench,
    "mmbench-cn": lambda root: mmbench(root, chinese=True),
    "seed": seed_bench,
    "seed-image": seed_bench,
    "mm-vet": mm_vet,
    "vqav2": vqav2,
    "vqav2-val": vqav2,
    "vizwiz": vizwiz,
    "vizwiz-val": vizwiz,
    "mme": mme,
    "mme-perception": mme,
    "msvd-qa": videos,
    "msrvtt-qa": lambda root: open_questions(root, "MSRVTT_Zero_Shot_QA", "videos/all"),
    "tgif-qa": tgif,
    "activitynet-qa": lambda root: open_questions(root, "Activitynet_Zero_Shot_QA", "all_test"),
    "mvbench": videos,
    "videomme": videos,
    "videomme-subtitles": videos,
}
