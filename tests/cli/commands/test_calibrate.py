"""`was calibrate`."""

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from was_fx import Calibration, Score


def test_writes_a_calibration_and_says_what_to_do_next(was, tmp_path):
    out = tmp_path / "c.safetensors"
    outcome = was("calibrate", "embedded", "--tokens", 600, "--length", 256, "--score", "teal", "--out", out)
    assert outcome.code == 0
    found = Calibration.load(out)
    assert (found.tokens, found.text, found.score) == (512, "embedded:calibration", Score.named("teal"))
    assert "42 Linears, 512 tokens" in outcome.stdout
    assert f"was make {out} --target" in outcome.stdout.replace("'", "")


def test_measures_a_model_directory_on_a_file_with_an_own_score(was, tmp_path, other_model, text):
    out = tmp_path / "c.safetensors"
    arguments = ("--text", text, "--exponent", 0.5, "--norm", 2, "--out", out, "--json")
    outcome = was("calibrate", other_model, *arguments)
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["score"] == {"exponent": 0.5, "norm": 2}
    assert outcome.json["linears"] == 14
    assert outcome.json["tokens"] % 128 == 0  # windows are no longer than the model's positions
    assert Calibration.load(out).tokens == outcome.json["tokens"]


def test_an_existing_file_is_replaced_with_force_only(was, tmp_path, other_model, text):
    out = tmp_path / "c.safetensors"
    out.write_bytes(b"mine")
    outcome = was("calibrate", other_model, "--text", text, "--out", out)
    assert outcome.code == 1
    assert "--force" in outcome.error
    assert out.read_bytes() == b"mine"
    assert was("calibrate", other_model, "--text", text, "--out", out, "--force").code == 0
    Calibration.load(out)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["embedded", "--text", "{tmp}/none.txt"], 1, "No such file"),
        (["embedded", "--text", "embedded:tset"], 1, "validation"),
        (["embedded", "--text", "{tmp}/latin1.txt"], 1, "not UTF-8"),
        (["embedded", "--text", "{tmp}/short.txt"], 1, "has 3 tokens"),
        (["embedded", "--length", "2000"], 1, "at most 1024"),
        (["embedded", "--tokens", "100"], 1, "less than one window of 512"),
        (["embeded"], 2, "needs a text"),
        (["embeded", "--text", "{tmp}/short.txt"], 1, "did you mean 'embedded'"),
        (["./nowhere", "--text", "{tmp}/short.txt"], 1, "no model directory"),
        (["nobody/nothing", "--text", "{tmp}/short.txt"], 1, "could not be loaded"),
        (["{tmp}/short.txt", "--text", "{tmp}/short.txt"], 1, "is a file, not a model"),
        (["{tmp}", "--text", "{tmp}/short.txt"], 1, "could not be loaded"),
        (["embedded", "--device", "toaster"], 1, "expected cpu, cuda"),
        (["embedded", "--score", "wsa"], 2, "teal"),
        (["embedded", "--score", "was", "--norm", "2"], 2, "either a name"),
        (["embedded", "--exponent", "-1"], 2, "--exponent"),
        (["embedded", "--out", "{tmp}/short.txt/c.safetensors"], 1, "short.txt/c.safetensors"),
        (["embedded", "--out", "{tmp}"], 1, "is a directory"),
    ],
)
def test_refusals(was, tmp_path, arguments, code, message):
    (tmp_path / "short.txt").write_text("Too short", encoding="utf-8")
    (tmp_path / "latin1.txt").write_bytes("déjà".encode("latin-1"))
    before = sorted(tmp_path.iterdir())
    arguments = [each.replace("{tmp}", str(tmp_path)) for each in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "c.safetensors")]
    outcome = was("calibrate", *arguments)
    assert outcome.code == code, outcome
    text = outcome.error if code == 1 else outcome.stderr
    assert message in " ".join(text.replace("│", " ").split())
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_weights_that_the_model_multiplies_by_itself_are_told_with_their_share(was, tmp_path, text):
    from transformers import AutoTokenizer

    from was_fx import embedded
    from was_fx.coverage.tiny_models import tiny_config

    config = tiny_config("mamba")
    config.vocab_size = 4096
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    AutoTokenizer.from_pretrained(embedded.path()).save_pretrained(tmp_path / "mamba")
    arguments = ("calibrate", tmp_path / "mamba", "--text", text, "--tokens", 128, "--length", 64)
    outcome = was(*arguments, "--out", tmp_path / "c.safetensors")
    assert outcome.code == 0, outcome.stderr
    told = re.search(
        r"2 Linears of the decoder stay dense, such as \S+dt_proj: ([\d.]+) % of the bytes", outcome.stdout
    )
    outcome = was(*arguments, "--out", tmp_path / "c.safetensors", "--force", "--json")
    assert outcome.json["excluded"] == [f"backbone.layers.{i}.mixer.dt_proj" for i in range(2)]
    assert float(told[1]) == pytest.approx(100 * outcome.json["excluded_share"], abs=0.06)
    assert outcome.json["excluded_share"] > 0


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A folder with a small Llava and its processor: 4 tokens for an image."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer, CLIPImageProcessor, LlavaProcessor

    from was_fx import embedded
    from was_fx.coverage.tiny_models import tiny_config

    folder = tmp_path_factory.mktemp("llava")
    tokenizer = AutoTokenizer.from_pretrained(embedded.path())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = tiny_config("llava")
    config.image_token_index = config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config.text_config.vocab_size = len(tokenizer)
    side = config.vision_config.image_size
    config.vision_config.patch_size = side // 2
    config.text_config.max_position_embeddings = 1024
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    more = {"patch_size": side // 2, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(CLIPImageProcessor(**sizes), tokenizer, chat_template=TEMPLATE, **more)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    """A folder with two images, of which one has a caption."""
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(folder / "a.png")
    Image.linear_gradient("L").save(folder / "b.JPG")
    (folder / "a.txt").write_text("A red thing.\n", encoding="utf-8")
    (folder / "notes.md").write_text("no image", encoding="utf-8")
    return folder


def test_images_of_a_folder_with_their_captions(was, tmp_path, llava, photos):
    from transformers import AutoTokenizer

    out = tmp_path / "c.safetensors"
    outcome = was("calibrate", llava, "--images", photos, "--out", out, "--json")
    assert outcome.code == 0, outcome.stderr
    tokenizer = AutoTokenizer.from_pretrained(llava)
    image = "<image>" * 4
    said = [f"user: {image}Describe this image.assistant: A red thing."]
    said += [f"user: {image}Describe this image.assistant: "]
    assert outcome.json["tokens"] == sum(len(tokenizer(each)["input_ids"]) for each in said)
    assert (outcome.json["linears"], outcome.json["text"]) == (14, str(photos))
    assert was("make", out, "--target", "50%", "--out", tmp_path / "s.was.safetensors").code == 0
    outcome = was("check", llava, "--schedule", tmp_path / "s.was.safetensors", "--json")
    assert outcome.code == 0, outcome.stderr


def test_fisher_weights_are_corrected_on_request(was, tmp_path):
    found = {}
    size = ("--tokens", 4096, "--length", 256)
    for name, more in {"plain": (), "corrected": ("--correct",)}.items():
        out = tmp_path / f"{name}.safetensors"
        outcome = was("calibrate", "embedded", "--fisher", *more, *size, "--out", out, "--json")
        assert outcome.code == 0, outcome.stderr
        assert outcome.json["corrected"] is bool(more)
        found[name] = Calibration.load(out)
    assert found["plain"].thresholds.keys() == found["corrected"].thresholds.keys()
    weights = [each.fisher.weights for each in found.values()]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("more", "what"), [((), "found no --fisher"), (("--fisher", "--images", "x"), "found --images")]
)
def test_only_fisher_weights_of_a_text_are_corrected(was, tmp_path, more, what):
    outcome = was("calibrate", "embedded", "--correct", *more, "--out", tmp_path / "c.safetensors")
    assert (outcome.code, what in outcome.stderr) == (2, True)
    assert not (tmp_path / "c.safetensors").exists()


def test_images_of_json_lines_with_a_text(was, tmp_path, llava, photos, text):
    lines = [
        {"image": "photos/a.png", "prompt": "What is it?", "answer": "A thing."},
        {"image": ["photos/a.png", "photos/b.JPG"]},
    ]
    file = tmp_path / "shown.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    arguments = ("calibrate", llava, "--images", file, "--json", "--force", "--out", tmp_path / "c.safetensors")
    alone = was(*arguments).json["tokens"]
    outcome = was(*arguments, "--text", text, "--tokens", 64, "--length", 64, "--fisher")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["tokens"] == alone + 64
    assert outcome.json["text"] == f"{text} and {file}"
    assert was(*arguments, "--tokens", 2).json["tokens"] < alone


def test_a_processor_that_gives_kinds_of_tokens_too(was, tmp_path, photos):
    """That of Gemma 3, in which image tokens see each other."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer, Gemma3ImageProcessor, Gemma3Processor

    from was_fx import embedded
    from was_fx.coverage.tiny_models import tiny_config

    folder, out = tmp_path / "gemma3", tmp_path / "c.safetensors"
    names = {"image_token": "<image>", "boi_token": "<begin>", "eoi_token": "<end>"}
    tokenizer = AutoTokenizer.from_pretrained(embedded.path(), extra_special_tokens=names)
    config = tiny_config("gemma3")
    config.image_token_id = tokenizer.image_token_id
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.max_position_embeddings = 1024
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    side = config.vision_config.image_size
    images = Gemma3ImageProcessor(size={"height": side, "width": side})
    template = TEMPLATE.replace("<image>", "<begin>")
    Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4).save_pretrained(folder)
    outcome = was("calibrate", folder, "--images", photos, "--out", out)
    assert outcome.code == 0, outcome.stderr
    assert "14 Linears, " in outcome.stdout
    assert f"tokens of {photos}, " in outcome.stdout.replace("\n", "")
    assert "Linears outside of the text decoder are left out" in outcome.stdout


def test_a_processor_without_a_chat_template(was, tmp_path, llava, photos):
    folder = shutil.copytree(llava, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    outcome = was("calibrate", folder, "--images", photos, "--out", tmp_path / "c.safetensors", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["tokens"] > 8


@pytest.mark.parametrize(
    ("model", "images", "message"),
    [
        ("llava", "{tmp}/none", "No such file"),
        ("llava", "{tmp}/empty", "has no file that ends in .png"),
        ("llava", "{tmp}/bad.jsonl", "bad.jsonl, line 2 is no JSON"),
        ("llava", "{tmp}/keys.jsonl", "keys.jsonl, line 1 has image, caption; expected"),
        ("llava", "{tmp}/number.jsonl", "line 1 has something else than text"),
        ("llava", "{tmp}/nowhere.jsonl", "there is no such image"),
        ("llava", "{tmp}/broken", "broken/c.png can't be read as an image"),
        ("llava", "{tmp}/long.jsonl", "long.jsonl, line 1 has"),
        ("./nowhere", "{tmp}/photos", "no model directory"),
        ("embedded", "{tmp}/photos", "embedded has no processor for images"),
    ],
)
def test_images_that_are_refused(was, tmp_path, llava, photos, model, images, message):
    for name, content in {
        "bad.jsonl": '{"image": "photos/a.png"}\n{"image',
        "keys.jsonl": '{"image": "photos/a.png", "caption": "red"}',
        "number.jsonl": '{"image": "photos/a.png", "answer": 3}',
        "nowhere.jsonl": '{"image": "photos/z.png"}',
        "long.jsonl": json.dumps({"image": "photos/a.png", "prompt": "word " * 2000}),
    }.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    whole = (photos / "a.png").read_bytes()
    (tmp_path / "broken" / "c.png").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "c.safetensors"
    name = llava if model == "llava" else model
    outcome = was("calibrate", name, "--images", images.replace("{tmp}", str(tmp_path)), "--out", out)
    assert outcome.code == 1, outcome
    assert message in " ".join(outcome.error.split())
    assert not out.exists()


def test_a_multimodal_model_has_its_decoder_measured(was, tmp_path, text):
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from was_fx import embedded
    from was_fx.coverage.tiny_models import tiny_config

    config = tiny_config("llava")
    config.text_config.vocab_size = 4096
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "llava")
    AutoTokenizer.from_pretrained(embedded.path()).save_pretrained(tmp_path / "llava")
    out, schedule = tmp_path / "c.safetensors", tmp_path / "s.was.safetensors"
    outcome = was("calibrate", tmp_path / "llava", "--text", text, "--length", 64, "--out", out)
    assert outcome.code == 0, outcome.stderr
    assert "14 Linears, " in outcome.stdout
    assert "14 Linears outside of the text decoder are left out" in outcome.stdout
    assert was("make", out, "--out", schedule, "--target", "50%").code == 0
    outcome = was("check", tmp_path / "llava", "--schedule", schedule, "--json")
    assert outcome.code == 0, outcome.stderr
    assert all(row["name"].startswith("model.language_model.") for row in outcome.json["linears"])
