"""Images with what is said about them, and what the processor of a multimodal model makes of that."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from was_fx.cli.input.conversation import has_chat_template
from was_fx.cli.input.models import Loaded

QUESTION = "Describe this image."
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_KEYS = ("image", "prompt", "answer")


@dataclass(frozen=True)
class Example:
    """A conversation about images.

    Attributes:
        where: the file, or the line of one, that it comes from.
        images: files.
        prompt: what is asked.
        answer: what the model is to say; None if that is open.
    """

    where: str
    images: tuple[Path, ...]
    prompt: str = QUESTION
    answer: str | None = None


def read_examples(path: Path) -> list[Example]:
    """What `--images` stands for: the images of a folder, each with the answer in a text file of its name if there is
    one; or a file of JSON lines {"image": file or files, "prompt": …, "answer": …}, the files from its folder on.

    Raises:
        ValueError: there are none, one can't be read, or a line is not of that form.
        OSError: there is no such folder or file.
    """
    found = list(_of_a_folder(path) if path.is_dir() else _of_lines(path))
    if not found:
        what = f"no file that ends in {', '.join(_SUFFIXES)}" if path.is_dir() else "no line"
        raise ValueError(f"{path} has {what}; give a folder with images, or JSON lines that name them")
    for each in dict.fromkeys(image for example in found for image in example.images):
        _check_image(each)
    return found


def _of_a_folder(path: Path) -> Iterator[Example]:
    for each in sorted(path.iterdir()):
        if each.suffix.lower() in _SUFFIXES:
            said = each.with_suffix(".txt")
            yield Example(str(each), (each,), answer=_read(said).strip() if said.exists() else None)


def _of_lines(path: Path) -> Iterator[Example]:
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is no JSON ({error}); {_FORM}") from None
        if not isinstance(entry, dict) or not entry.get("image") or not set(entry) <= set(_KEYS):
            raise ValueError(f"{where} has {', '.join(entry) if isinstance(entry, dict) else line[:40]}; {_FORM}")
        images = [entry["image"]] if isinstance(entry["image"], str) else entry["image"]
        texts = [entry[key] for key in _KEYS[1:] if entry.get(key) is not None]
        if not isinstance(images, list) or not all(isinstance(each, str) for each in [*images, *texts]):
            raise ValueError(f"{where} has something else than text; {_FORM}")
        files = tuple(path.parent / each for each in images)
        yield Example(where, files, entry.get("prompt") or QUESTION, entry.get("answer"))


_FORM = 'expected {"image": "file.png", "prompt": "…", "answer": "…"}, of which the last two may be left out'


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error


def _check_image(path: Path) -> None:
    """Say before the model is loaded what can't be read."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError("images need the package Pillow: pip install pillow") from error
    if not path.is_file():
        raise FileNotFoundError(2, "there is no such image", str(path))
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError) as error:  # PIL has SyntaxError for a damaged PNG
        raise ValueError(f"{path} can't be read as an image ({error}); fetch it again, or leave it out") from error


class Conversations(Sequence[Any]):
    """What a model is given for each of some examples, made when it is asked for.

    Args:
        loaded: the model.
        processor: its.
        items: examples, and LongTensors [n] of text, which stay as they are.
    """

    def __init__(self, loaded: Loaded, processor: Any, items: Sequence[Any]) -> None:
        self._loaded, self._processor, self._items = loaded, processor, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Conversations(self._loaded, self._processor, self._items[index])
        item = self._items[index]
        return self._inputs(item) if isinstance(item, Example) else item

    def after(self, texts: Iterable[Any]) -> "Conversations":
        """These, with texts before them."""
        return Conversations(self._loaded, self._processor, [*texts, *self._items])

    def within(self, tokens: int) -> "Conversations":
        """The first of these, until there are so many tokens; one at least."""
        count = 0
        for number in range(len(self)):
            count += self[number]["input_ids"].shape[1]
            if count >= tokens:
                return self[: number + 1]
        return self

    def _inputs(self, example: Example) -> Mapping[str, Any]:
        import jinja2
        from PIL import Image

        images = [Image.open(each).convert("RGB") for each in example.images]
        try:
            talks = has_chat_template(self._processor)
            inputs = self._templated(example, images) if talks else self._plain(example, images)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(f"{example.where}: the processor of {self._loaded.name} refuses this: {error}") from error
        count, most = inputs["input_ids"].shape[1], self._loaded.positions
        if most is not None and count > most:
            raise ValueError(
                f"{example.where} has {count} tokens with its images, and {self._loaded.name} takes {most}; give "
                "smaller images or less text"
            )
        return inputs

    def _templated(self, example: Example, images: list[Any]) -> Any:
        asked = [*({"type": "image", "image": each} for each in images), {"type": "text", "text": example.prompt}]
        turns: list[dict[str, Any]] = [{"role": "user", "content": asked}]
        if example.answer is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": example.answer}]})
        return self._processor.apply_chat_template(
            turns, add_generation_prompt=example.answer is None, tokenize=True, return_dict=True, return_tensors="pt"
        )

    def _plain(self, example: Example, images: list[Any]) -> Any:
        sign = getattr(self._processor, "image_token", None)
        if not sign:
            raise ValueError("it has neither a chat template nor a token that stands for an image")
        said = "" if example.answer is None else f" {example.answer}"
        text = f"{str(sign) * len(images)}\n{example.prompt}{said}"
        return self._processor(images=images, text=text, return_tensors="pt")
