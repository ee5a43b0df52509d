"""An answerer without a model, in a module of its own: a worker that loads it need not load torch."""

from __future__ import annotations

import os


class Echo:
    def make(self):
        return self

    def __call__(self, rows, number):
        if rows == ["die"]:
            os._exit(9)
        return [number, *rows]
