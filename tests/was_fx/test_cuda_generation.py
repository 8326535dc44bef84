"""`generate()` on a CUDA device in each of its modes, compiled, against the oracle."""

import copy
import threading

import pytest
import torch
from transformers import (
    AutoTokenizer,
    CompileConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    TextIteratorStreamer,
    pipeline,
)

import was_fx
from was_fx import embedded
from was_fx.sparse.drafting import acceptance

pytestmark = [
    pytest.mark.gpu,
    # Inductor says that fp32 products could be faster and less exact.
    pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning"),
    # So does torch of a graph of its own, when transformers compiles.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

QUANTO = {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 4}
MODES = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "offloaded cache": {"cache_implementation": "offloaded"},
    "offloaded static cache": {"cache_implementation": "offloaded_static"},
    "quantised cache": {"cache_implementation": "quantized", "cache_config": QUANTO},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams, static cache": {"num_beams": 3, "cache_implementation": "static"},
    "sampling": {"do_sample": True, "top_p": 0.9, "temperature": 0.8},
    "sampling, static cache": {"do_sample": True, "top_k": 20, "cache_implementation": "static"},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "n-gram guesses": {"prompt_lookup_num_tokens": 3},
}


def by_oracle(model, prompt, mask=None, **arguments):
    """With a static cache transformers would compile the oracle too."""
    kind = arguments.pop("cache_implementation", "")
    kind = {"cache_implementation": kind} if kind == "quantized" else {}
    return generate(model, prompt, mask, **arguments, **kind)


def generate(model, prompt, mask=None, **arguments):
    torch.manual_seed(0)
    given = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompt) if mask is None else mask
    return model.generate(prompt, attention_mask=mask, **{**given, **arguments})


def pair(model, tokens, oracle):
    """(sparsified by 50 % and compiled, the oracle), both on the device."""
    model = model.to("cuda")
    schedule = was_fx.uniform(was_fx.calibrate(model, tokens), 0.5)
    expected = oracle(model, schedule)
    return was_fx.sparsify(model, schedule, prefill="all"), expected


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_gpu_that_is_not_torchs_current_one(llama, tokens, weights):
    schedule = was_fx.uniform(was_fx.calibrate(llama, tokens), 0.5)
    texts = []
    for device in ("cuda:0", "cuda:1"):
        model = was_fx.sparsify(copy.deepcopy(llama).to(device), schedule, prefill="all", weights=weights)
        texts += [generate(model, tokens[:1, :16].to(device)).cpu() for _ in range(4)]
    assert all(text.equal(texts[0]) for text in texts)


@pytest.mark.parametrize("arguments", MODES.values(), ids=MODES.keys())
def test_modes_equal_the_oracle(llama, tokens, oracle, arguments):
    if arguments.get("cache_implementation") == "quantized":
        pytest.importorskip("optimum.quanto")
    if arguments.get("cache_implementation") == "offloaded_static" and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 crashes when transformers compiles this cache, whatever the model")
    dense = copy.deepcopy(llama).cuda()
    model, expected = pair(llama, tokens, oracle)
    prompt = tokens[:1, :16].cuda()
    first = generate(model, prompt, **arguments)
    assert first.equal(by_oracle(expected, prompt, **arguments))
    assert not first.equal(by_oracle(dense, prompt, **arguments))
    assert generate(model, prompt, **arguments).equal(first), "the second call"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_batches_padded_on_the_left_equal_the_oracle(llama, tokens, oracle, cache):
    model, expected = pair(llama, tokens, oracle)
    prompt, mask = tokens[:3, :16].cuda(), torch.ones(3, 16, dtype=torch.long, device="cuda")
    for row, padding in enumerate((0, 5, 9)):
        prompt[row, :padding], mask[row, :padding] = 0, 0
    got = generate(model, prompt, mask, cache_implementation=cache)
    assert got.equal(by_oracle(expected, prompt, mask))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("blocks", ["every", "some"])
def test_sliding_windows_equal_the_oracle(tokens, oracle, blocks, cache):
    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "vocab_size": 128, "initializer_range": 0.1, "sliding_window": 8}
    if blocks == "every":
        model = MistralForCausalLM(MistralConfig(**small)).eval()
    else:
        layers = ["sliding_attention", "full_attention"]
        model = Gemma3ForCausalLM(Gemma3TextConfig(head_dim=16, layer_types=layers, **small)).eval()
    model, expected = pair(model, tokens, oracle)
    prompt = tokens[:2, :20].cuda()  # longer than the window
    got = generate(model, prompt, cache_implementation=cache)
    assert got.equal(by_oracle(expected, prompt))


def test_a_compile_config_with_the_backend(llama, tokens, oracle):
    model, expected = pair(llama, tokens, oracle)
    prompt = tokens[:1, :16].cuda()
    arguments = {"cache_implementation": "static", "compile_config": CompileConfig(backend="was", mode=None)}
    got = [generate(model, prompt, **arguments) for _ in range(2)]
    wanted = by_oracle(expected, prompt)
    assert got[0].equal(wanted)
    assert got[1].equal(wanted)


@pytest.mark.filterwarnings("ignore:the schedule was made with weights not quantised")
@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_draft_keeps_the_dense_text(llama, tokens, weights):
    model = llama.to("cuda")
    prompts = tokens[:3, :12].cuda()
    alone = generate(copy.deepcopy(model), prompts[:1])
    schedule = was_fx.uniform(was_fx.calibrate(model, tokens), 0.6)
    sparse = was_fx.draft(model, schedule, tokens=4, weights=weights)
    found = acceptance(model, sparse, prompts, max_new_tokens=13)
    assert found.equal
    assert 1 <= found.tokens_per_step <= 5
    assert generate(model, prompts[:1], assistant_model=sparse).equal(alone)
    assert [step.declined for step in (sparse.generate.step, *model.generate._steps.values())] == ["", ""]


def test_pipeline_and_streamer():
    model, tokenizer = embedded.load(torch.float32)
    model = model.to("cuda")
    was_fx.sparsify(model, was_fx.uniform(was_fx.calibrate(model, embedded.tokens("calibration", 128, 2)), 0.5))
    prompts = ["It was a dark night", "The old man said that he had never"]
    arguments = {"max_new_tokens": 8, "do_sample": False}
    texts = []
    for prompt in prompts:
        ids = model.generate(**tokenizer(prompt, return_tensors="pt").to("cuda"), **arguments)
        texts.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    pipe = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(embedded.path()))
    together = pipe(prompts, batch_size=2, max_length=None, **arguments)
    assert [found[0]["generated_text"] for found in together] == texts
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True, timeout=60)
    inputs = tokenizer(prompts[0], return_tensors="pt").to("cuda")
    thread = threading.Thread(target=model.generate, kwargs={**inputs, "streamer": streamer, **arguments})
    thread.start()
    assert "".join(streamer) == texts[0]
    thread.join()
