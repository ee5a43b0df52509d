"""Whether a model and the installed releases work together: versions, what is possible, and the promises, kept or not.

It knows names, directories and configurations, and makes of them a model that is small enough to try and prompts for
it; what is promised, and how that is checked, is in :mod:`visiontrim.promises`.
"""

from __future__ import annotations

import difflib
import platform
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from visiontrim import promises, zoo
from visiontrim.ask import Speaker, encode
from visiontrim.core.errors import TrimError
from visiontrim.core.method import Method
from visiontrim.engine.contract import facts
from visiontrim.engine.upstream import RELEASES, Upstream
from visiontrim.measure.noise import noise_prompt
from visiontrim.measure.shapes import PRESETS, Shape, preset_names
from visiontrim.methods import Random
from visiontrim.models.family import Family, Generic
from visiontrim.promises import Result, checked
from visiontrim.run import trim

BUNDLED = {
    "bundled": zoo.MODEL_DIR,
    "bundled-qwen": zoo.QWEN_DIR,
    "bundled-natural": zoo.NATURAL_DIR / "llava",
    "bundled-video": zoo.VIDEO_DIR,
}
"""Models that ship with the package, and where."""
SMALL = 2**29
"""Bytes of weights on the disk up to which a model is tried itself; of a larger one, two layers are."""
WIDE = 100_000_000
"""Parameters up to which these two layers have the widths of the model; above, they are narrow."""
UNITS = 16
"""Vision tokens along a side of a picture, where the encoder takes pictures of any size."""
WORDS = (24, 17)
"""Text tokens of the rows of a batch, so that the second one is padded."""
SECONDS = 5.0
"""How long the hub may take to say whether it has a model."""


@dataclass(frozen=True, slots=True)
class Possible:
    """Something that a run may do with a model, and whether it can with this one."""

    what: str
    possible: bool
    why: str
    """The limit, or the reason."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that was found out; ``to_dict()`` for JSON."""

    versions: dict[str, str]
    accelerator: str
    model: str
    tried: str
    """What the promises ran on."""
    family: str
    possible: tuple[Possible, ...]
    promises: tuple[Result, ...]

    @property
    def sound(self) -> bool:
        """Whether every promise was kept."""
        return all(result.kept for result in self.promises)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        found = {key: getattr(self, key) for key in ("versions", "accelerator", "model", "tried", "family")}
        lists = {key: [asdict(one) for one in getattr(self, key)] for key in ("possible", "promises")}
        return found | {"known_to_work": list(RELEASES)} | lists | {"sound": self.sound}


@torch.no_grad()
def diagnose(name: str | None = None, device: str | torch.device = "cpu") -> Diagnosis:
    """Try the model ``name``: bundled, a preset, a directory, a configuration file, or a hub name.

    Of a large model, and of one that is not on the disk, two layers with random weights are tried, on ``device``, in
    float32. Raises :class:`TrimError` for names of nothing, and for models that see no pictures.
    """
    name, device = name or "bundled", torch.device(device)
    whole = _shape(name)
    model, shape, tried = _patient(name, whole, device)
    try:
        family = facts(model)
    except TrimError as error:
        refused = Result("its parts are where a run looks for them", False, str(error), 0.0)
        return Diagnosis(versions(), accelerator(), name, tried, "none", (), (refused,))
    known = "generic facts" if isinstance(family, Generic) else f"{type(family).__name__} ({family.checkpoints})"
    possible = tuple(_possible(_whole(whole) or family))
    kept = tuple(_promises(family, shape, name))
    return Diagnosis(versions(), accelerator(), name, tried, known, possible, kept)


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    packages = {package: version(package) for package in ("visiontrim", "torch", "transformers")}
    return {"python": platform.python_version(), **packages}


def accelerator() -> str:
    """The first one there is, in words."""
    if not torch.accelerator.is_available():
        return "none, only the CPU"
    device = torch.accelerator.current_accelerator()
    name = torch.cuda.get_device_name() if device is not None and device.type == "cuda" else ""
    return f"{device} {name}".strip()


def _whole(shape: Shape) -> Family | None:
    """Facts about the whole model, which has no weights; None where it takes weights to build it."""
    with suppress(Exception):
        family = facts(shape.build("meta", torch.float32))
        text = family.language_model
        text.rotary_emb = type(text.rotary_emb)(config=text.config)  # whose frequencies rules of positions look at
        return family
    return None


def _patient(name: str, shape: Shape, device: torch.device) -> tuple[Any, Shape, str]:
    """A model to try, its shape, and in words what it is."""
    directory = BUNDLED.get(name, Path(name))
    if directory.is_dir() and 0 < _weights(directory) <= SMALL:
        try:
            model: Any = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
        except Exception as error:  # of damaged files, readers raise whatever they like
            raise TrimError(f"the weights in {name} cannot be loaded ({_line(error)}): copy the files again") from error
        return model.eval().to(device), shape, "the model itself, in float32"
    try:
        count = _enough(shape)
        shape = shape.sliced(count)
        wide = sum(part.numel() for part in shape.build("meta", torch.float32).parameters()) <= WIDE
        shape = shape if wide else shape.narrow()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model = shape.build(str(device), torch.float32)
            _liven(model)
    except Exception as error:  # configurations that nobody has seen
        raise TrimError(
            f"no model of two layers can be made from the configuration of {name} ({_line(error)}): give a directory "
            f"with weights of at most {SMALL // 2**20} MB, which are tried themselves"
        ) from error
    widths = "" if wide else ", narrow"
    return model, shape, f"{count} decoder layers of its configuration{widths}, random weights, float32"


def _shape(name: str) -> Shape:
    """The configuration, from the presets or the disk if it is there, else from the hub."""
    directory = BUNDLED.get(name, Path(name))
    if (PRESETS / f"{name}.json").is_file():
        return _seeing_little(Shape.load(name))
    if not directory.exists():
        _ask_hub(name)
    try:
        config = AutoConfig.from_pretrained(str(directory) if directory.exists() else name)
    except Exception as error:
        raise TrimError(
            f"the configuration of {name} cannot be read ({_line(error)}): give a directory, or a hub name, of a model "
            "of transformers"
        ) from error
    return _seeing_little(Shape.of_config(name, config))


def _seeing_little(shape: Shape) -> Shape:
    """With a small picture, where the encoder takes pictures of any size."""
    vision: Any = shape.config.vision_config
    if hasattr(vision, "image_size") or not hasattr(vision, "spatial_merge_size"):
        return shape
    side = UNITS * vision.patch_size * vision.spatial_merge_size
    return shape.seeing(side, side, 0)


def _ask_hub(name: str) -> None:
    """Raise :class:`TrimError`, without a wait, if ``name`` is no name of a hub's model, or the hub has none of it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    known = [*preset_names(), *BUNDLED]
    near = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(Path(name).name, known, n=1)
    way_out = f"did you mean {near[0]}?" if near else f"presets are {', '.join(known)}"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise TrimError(f"there is no directory, file or preset {name!r}: {way_out}")
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=SECONDS)
    except Exception as error:  # of the client's own library, which differs between releases
        raise TrimError(
            f"there is no directory {name!r}, and the hub does not give it ({_line(error)}): {way_out}"
        ) from error


def _weights(directory: Path) -> int:
    """Bytes of the weights in a directory."""
    return sum(path.stat().st_size for kind in ("safetensors", "bin") for path in directory.glob(f"*.{kind}"))


def _enough(shape: Shape) -> int:
    """The fewest decoder layers, two or more, with every kind of layer that there is."""
    kinds = list(getattr(shape.config.text_config, "layer_types", None) or ())
    first = max((kinds.index(kind) + 1 for kind in set(kinds)), default=2)
    return min(max(first, 2), shape.config.text_config.num_hidden_layers)


def _liven(model: torch.nn.Module) -> None:
    """Weights under which signals keep their size from layer to layer, so that attention is not flat."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)


def _possible(family: Family) -> Iterator[Possible]:
    """What a run can do with the model, found out by opening one."""
    model: Any = family.model
    decoder = len(family.language_model.layers)

    def tried(what: str, method: Method, said: str = "", **options: Any) -> Possible:
        try:
            trim(model, method, **options)
        except TrimError as error:
            return Possible(what, False, str(error))
        return Possible(what, True, said)

    yield tried("a stage at the vision encoder's output", Random(keep=0.5), _signals(family))
    inside = bool(family.encoder_layers("image"))
    yield Possible("stages inside the vision encoder", inside, family.merging if inside else "its layers are not known")
    between = Random(keep=0.5, layer=1)
    yield tried("a stage between decoder layers", between, f"before layers 1 to {decoder - 1}")
    several = "a position is several numbers here, so that survivors keep their own"
    yield Possible('positions="compact"', not family.mrope, several if family.mrope else "consecutive")
    yield tried('positions="members"', Random(keep=0.5), "those of up to 8 tokens that merged", positions="members")
    yield tried('positions="unmerged"', Random(keep=0.5), "those of all tokens that merged", positions="unmerged")
    yield Possible(
        "further turns on the cache", family.turns, "" if family.turns else "the model knows one turn of conversation"
    )
    layers = {type(layer).__name__ for layer in Upstream(family.language_model).cache_layers}
    yield Possible("dynamic, offloaded and quantised caches", True, ", ".join(sorted(layers)))
    yield Possible(
        "static caches", True, "for one number of tokens in all layers: stages at the encoder's output or in it"
    )
    yield Possible("prefill in chunks", False, "a method is shown the whole prompt at once")


def _signals(family: Family) -> str:
    """What the encoder takes, and shows of its tokens."""
    kinds = " and ".join(f"{kind}s" for kind in family.kinds)
    guides = "a text tower or embeddings" if family.text_tower else "embeddings"
    return f"{kinds}; scores: {family.scores}; guided by {guides}"


def _opens(model: Any, method: Method) -> bool:
    try:
        trim(model, method)
    except TrimError:
        return False
    return True


def _prompts(family: Family, shape: Shape, name: str) -> list[dict[str, Tensor]]:
    """Rows of a batch, one at a time: as the facts say, or by the model's own processor if it is on the disk."""
    try:
        return [noise_prompt(family, shape.picture, text, 1, seed) for seed, text in enumerate(WORDS)]
    except Exception as error:
        try:
            processor = AutoProcessor.from_pretrained(str(BUNDLED.get(name, Path(name))), local_files_only=True)
        except Exception:
            raise TrimError(
                f"how {type(family.model).__name__} is given pictures is not known ({_line(error)}), and no processor "
                "is on the disk: give a directory that has one"
            ) from error
    size = (shape.picture.width, shape.picture.height)
    noise = torch.Generator().manual_seed(0)
    speaker, rows = Speaker(name, family.model, processor, None), []
    for text in WORDS:
        pixels = torch.randint(256, (*size[::-1], 3), dtype=torch.uint8, generator=noise)
        rows.append(dict(encode(speaker, [Image.fromarray(pixels.numpy())], " ".join(["word"] * text))))
    return rows


def _promises(family: Family, shape: Shape, name: str) -> Iterator[Result]:
    """Every promise, kept or not, on two rows of noise."""
    model: Any = family.model
    rows: list[dict[str, Tensor]] = []

    def prompts() -> str:
        rows.extend(_prompts(family, shape, name))
        return f"{' and '.join(str(row['input_ids'].shape[1]) for row in rows)} tokens"

    made = checked("pictures of noise pass through the vision encoder", prompts)
    yield made
    if not made.kept:
        return
    between = _opens(model, Random(keep=0.5, layer=1))
    recurrent = not all("attention" in kind and "linear" not in kind for kind in Upstream(family.language_model).kinds)
    padding, words = model.generation_config.pad_token_id, model.get_input_embeddings().weight.shape[0]
    known = isinstance(padding, int) and 0 <= padding < words  # of a default for another vocabulary, which is not
    together = promises.left_padded(rows, padding if known else 0, family.joined)
    half: Method = Random(keep=0.5) | Random(keep=0.5, layer=1) if between else Random(keep=0.5)
    whole: list[Method] = [Random(keep=1.0)]
    if between:
        whole.append(Random(keep=1.0) | Random(keep=1.0, layer=1))
    yield checked(
        "keeping everything is bit-identical",
        lambda: promises.everything_is_bit_identical(model, together, whole),
    )
    if recurrent:
        yield checked(
            "removal equals feeding what is left",
            lambda: promises.removal_equals_feeding(model, rows[0], Random(keep=0.5)),
        )
    else:
        yield checked("removal equals masking", lambda: promises.removal_equals_masking(model, together, half))
    yield checked(
        "a padded batch equals its rows",
        lambda: promises.batch_equals_rows(model, rows, together, half),
    )
    if family.turns:
        question = rows[0]["input_ids"][:, :3].flip(1)
        yield checked(
            "a second turn equals one shot",
            lambda: promises.turn_equals_one_shot(model, rows[0], question, half),
        )
    yield checked(
        "the cache is as long as reported",
        lambda: promises.cache_is_as_reported(model, together, half),
    )


def _line(error: BaseException) -> str:
    """The first line of a message, without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
