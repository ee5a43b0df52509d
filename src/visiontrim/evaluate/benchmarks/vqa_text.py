"""The text rule of the VQA benchmarks, applied to answers and references alike, and their accuracy.

The rule is that of the VQA evaluation script (Antol et al., arXiv 1505.00468) behind a first step of Pythia and M4C;
the answers that LLaVA uploads for TextVQA, VizWiz and VQAv2 pass through it. It knows no benchmark and no file. Two
slips of the script are part of the rule, since scores depend on them: see :func:`_without_stops`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MARKS = ';/[]"{}()=+\\_-><@`,?!'
"""Marks that are deleted where they touch a space, and become a space elsewhere. Apostrophe, colon and others stay."""
STOPS = 32
"""Full stops that the script deletes at most: a flag of its pattern was given where a count belongs."""
NUMBERS: dict[str, str] = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
ARTICLES = {"a", "an", "the"}
_CONTRACTIONS = """
aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've couldnt've=couldn't've
didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've hadn'tve=hadn't've hasnt=hasn't havent=haven't
hed=he'd hed've=he'd've he'dve=he'd've hes=he's howd=how'd howll=how'll hows=how's Id've=I'd've I'dve=I'd've Im=I'm
Ive=I've isnt=isn't itd=it'd itd've=it'd've it'dve=it'd've itll=it'll let's=let's maam=ma'am mightnt=mightn't
mightnt've=mightn't've mightn'tve=mightn't've mightve=might've mustnt=mustn't mustve=must've neednt=needn't
notve=not've oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't
shed've=she'd've she'dve=she'd've she's=she's shouldve=should've shouldnt=shouldn't shouldnt've=shouldn't've
shouldn'tve=shouldn't've somebody'd=somebodyd somebodyd've=somebody'd've somebody'dve=somebody'd've
somebodyll=somebody'll somebodys=somebody's someoned=someone'd someoned've=someone'd've someone'dve=someone'd've
someonell=someone'll someones=someone's somethingd=something'd somethingd've=something'd've
something'dve=something'd've somethingll=something'll thats=that's thered=there'd thered've=there'd've
there'dve=there'd've therere=there're theres=there's theyd=they'd theyd've=they'd've they'dve=they'd've theyll=they'll
theyre=they're theyve=they've twas='twas wasnt=wasn't wed've=we'd've we'dve=we'd've weve=we've werent=weren't
whatll=what'll whatre=what're whats=what's whatve=what've whens=when's whered=where'd wheres=where's whereve=where've
whod=who'd whod've=who'd've who'dve=who'd've wholl=who'll whos=who's whove=who've whyll=why'll whyre=why're whys=why's
wont=won't wouldve=would've wouldnt=wouldn't wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll
y'allll=y'all'll yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've
you'dve=you'd've youll=you'll youre=you're youve=you've
"""
CONTRACTIONS: dict[str, str] = dict(re.findall(r"(\S+)=(\S+)", _CONTRACTIONS))
"""With and without apostrophe. Upper-case keys never match after lower case; two map to themselves."""


def vqa_text(text: str) -> str:
    """An answer as LLaVA uploads it for TextVQA, VizWiz and VQAv2, and as TextVQA compares it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_script_text(text)


def vqa_script_text(text: str) -> str:
    """The same without the first step: the script of VQA itself, with both of its halves in a row."""
    return words(punctuation(_line(text)))


def punctuation(text: str) -> str:
    """Marks deleted where one of their kind touches a space, else made a space; then most full stops deleted."""
    glued = re.search(r"\d,\d", text) is not None
    found = text
    for mark in MARKS:
        if f"{mark} " in text or f" {mark}" in text or glued:
            found = found.replace(mark, "")
        else:
            found = found.replace(mark, " ")
    return _without_stops(found)


def words(text: str) -> str:
    """Lower case, number words as digits, no articles, contractions with their apostrophe."""
    kept = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in kept if word not in ARTICLES)


def accuracy(answer: str, references: Sequence[str]) -> float:
    """Leave-one-out accuracy in [0, 1]: the mean over annotators of min(1, how many of the others say it / 3).

    Answer and references are compared as they stand: pass them through the rule first. 0 without references.
    """
    hits = sum(reference == answer for reference in references)
    others = [hits - (reference == answer) for reference in references]
    return sum(min(1.0, other / 3) for other in others) / len(references) if references else 0.0


def _line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_stops(text: str) -> str:
    """Without full stops that no digit follows. Meant was: that stand between no digits; the pattern is mistyped."""
    return re.sub(r"\.(?!\d)", "", text, count=STOPS)
