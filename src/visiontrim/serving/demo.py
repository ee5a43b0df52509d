"""A page to try methods on: a picture and a question, two methods side by side, answers, token maps and numbers.

Knows gradio; one model, asked by one visitor at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
from PIL import Image

from visiontrim.ask import Answer, Speaker, answer
from visiontrim.core.errors import TrimError
from visiontrim.core.registry import list_methods

WAITING = 16
"""Visitors that may wait."""


def page(speaker: Speaker, examples: Sequence[tuple[Image.Image, str]] = (), keep: int = 64, most: int = 576) -> Any:
    """The page; ``launch()`` serves it. ``most`` is the end of the slider."""

    def ask(image: Image.Image | None, question: str, first: str, second: str, keep: float) -> tuple[Any, ...]:
        if image is None:
            raise gr.Error("Give a picture first.")
        if not question.strip():
            raise gr.Error("Ask a question.")
        said = []
        try:
            for method in (first, second):
                budget = None if method == "none" else int(keep)
                said.append(answer(speaker, [image], question, method, budget, max_new_tokens=32))
        except TrimError as error:
            raise gr.Error(f"{error}.") from None
        shown: list[Any] = []
        for method, one in zip((first, second), said, strict=True):
            shown += [gr.update(value=one.text, label=f"{method} answers"), one.run.picture(image), _numbers(one)]
        return tuple(shown)

    methods = list(list_methods())
    with gr.Blocks(title="visiontrim") as blocks:
        gr.Markdown(
            "## Fewer vision tokens, the same answer?\nClear squares are kept, tinted ones merged, dark ones gone."
        )
        with gr.Row():
            with gr.Column(min_width=280):
                image = gr.Image(type="pil", label="Picture", elem_id="picture", height=280)
            with gr.Column(min_width=280):
                question = gr.Textbox(label="Question", elem_id="question")
                amount = gr.Slider(1, most, value=keep, step=1, label="Vision tokens kept", elem_id="keep")
                with gr.Row():
                    names = [
                        gr.Dropdown(methods, value=value, label=label, elem_id=label.lower(), min_width=120)
                        for label, value in (("First", "visiontrim"), ("Second", "random"))
                    ]
                button = gr.Button("Ask", variant="primary", elem_id="ask")
        with gr.Row():
            outputs = []
            for number in (1, 2):
                with gr.Column(min_width=280):
                    outputs += [
                        gr.Textbox(label="Answer", elem_id=f"answer{number}"),
                        gr.Image(label="Token map", elem_id=f"map{number}", height=300),
                        gr.Markdown(elem_id=f"numbers{number}"),
                    ]
        if examples:
            gr.Examples([[picture, text] for picture, text in examples], [image, question], label="Try one of these")
        given = [image, question, *names, amount]
        gr.on([button.click, question.submit], ask, given, outputs, concurrency_limit=1, api_name="ask")
    return blocks.queue(max_size=WAITING)


def _numbers(said: Answer) -> str:
    report = said.run.report
    return "\n".join(
        (
            "| | plain | here |",
            "|---|---:|---:|",
            f"| vision tokens | {report.input_tokens:,.0f} | {report.kept_tokens:,.0f} |",
            f"| mean of layers | {report.input_tokens:,.0f} | {report.mean:,.1f} |",
            f"| KV cache, MB | {report.kv_bytes_plain / 1e6:,.2f} | {report.kv_bytes / 1e6:,.2f} |",
            f"| seconds | | {said.seconds['total']:.2f} |",
        )
    )
