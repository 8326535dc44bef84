"""`generate()` of a sparsified model in each of its modes, against the oracle; and what is built on it."""

import copy
import threading

import pytest
import torch
from torch._dynamo.utils import counters
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

EAGER = {"lowering": "eager"}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "initializer_range": 0.1,
    "sliding_window": 8,
}


@pytest.fixture
def schedule(calibration):
    return was_fx.uniform(calibration, 0.5)


def greedy(model, prompt, **arguments):
    torch.manual_seed(0)
    given = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    return model.generate(prompt, **copy.deepcopy({**given, **arguments}))  # transformers takes things out of them


def graphs():
    return counters["stats"]["unique_graphs"]


QUANTO = {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 4}
HQQ = {**QUANTO, "backend": "hqq", "axis_key": 1, "axis_value": 1}


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"cache_implementation": "quantized", "cache_config": QUANTO},
        {"cache_implementation": "quantized", "cache_config": HQQ},
        {"do_sample": True, "top_k": 20},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["beams", "quanto", "HQQ", "sampling", "static", "n-gram guesses"],
)
def test_modes_equal_the_oracle(llama, schedule, oracle, tokens, arguments):
    expected, dense = oracle(llama, schedule), copy.deepcopy(llama)
    counters.clear()
    was_fx.sparsify(llama, schedule, prefill="all")
    got = greedy(llama, tokens[:1, :16], **arguments)
    assert got.equal(greedy(expected, tokens[:1, :16], **arguments))
    assert not got.equal(greedy(dense, tokens[:1, :16], **arguments))
    assert greedy(llama, tokens[:1, :16], **arguments).equal(got)
    assert graphs() == 0  # nothing is compiled on a CPU


@pytest.mark.parametrize(("blocks", "cache"), [("every", "dynamic"), ("some", "static")])
def test_sliding_windows_equal_the_oracle(oracle, tokens, blocks, cache):
    torch.manual_seed(0)
    if blocks == "every":
        model = MistralForCausalLM(MistralConfig(**SMALL)).eval()
    else:
        layers = ["sliding_attention", "full_attention"]
        model = Gemma3ForCausalLM(Gemma3TextConfig(head_dim=16, layer_types=layers, **SMALL)).eval()
    schedule = was_fx.uniform(was_fx.calibrate(model, tokens[:, :32]), 0.5)
    expected = oracle(model, schedule)
    was_fx.sparsify(model, schedule, prefill="all")
    prompt = tokens[:2, :20]  # longer than the window
    got = greedy(model, prompt, cache_implementation=cache)
    assert got.equal(greedy(expected, prompt, cache_implementation=cache))


def test_a_compile_config_with_the_backend_compiles_once(llama, schedule, oracle, tokens):
    """transformers compiles the decode step itself, on a GPU or where it is told to."""
    expected = greedy(oracle(llama, schedule), tokens[:1, :16], cache_implementation="static")
    was_fx.sparsify(llama, schedule, prefill="all")
    config = CompileConfig(backend="was", mode=None, options=EAGER)
    config._compile_all_devices = True
    seen = []
    for _ in range(3):
        got = greedy(llama, tokens[:1, :16], cache_implementation="static", compile_config=config)
        assert got.equal(expected)
        seen.append(graphs())
    assert 0 < seen[0] == seen[1] == seen[2]


def test_pipeline_and_streamer():
    tokenizer = AutoTokenizer.from_pretrained(embedded.path())
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**{**SMALL, "vocab_size": 4096, "num_hidden_layers": 1})).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    schedule = was_fx.uniform(was_fx.calibrate(model, embedded.tokens("calibration", 128, 2)), 0.5)
    was_fx.sparsify(model, schedule)
    prompts = ["It was a dark night", "The old man said that he had never"]
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        texts.append(tokenizer.decode(ids[0], skip_special_tokens=True))

    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    arguments = {"max_new_tokens": 8, "max_length": None, "do_sample": False}
    assert [pipe(prompt, **arguments)[0]["generated_text"] for prompt in prompts] == texts
    together = pipe(prompts, batch_size=2, **arguments)  # padded on the left
    assert [found[0]["generated_text"] for found in together] == texts

    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True, timeout=60)
    inputs = tokenizer(prompts[0], return_tensors="pt")
    arguments = {**inputs, "streamer": streamer, "max_new_tokens": 8, "do_sample": False}
    thread = threading.Thread(target=model.generate, kwargs=arguments)
    thread.start()
    assert "".join(streamer) == texts[0]
    thread.join()
