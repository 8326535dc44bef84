"""Which caches are kept out of graphs."""

import pytest
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache, QuantizedCache

from was_fx.untraceable_cache import cut_at_untraceable_cache

CONFIG = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2)


def quanto():
    return QuantizedCache("quanto", CONFIG, nbits=4, q_group_size=16)


def offloaded():
    cache = DynamicCache()
    cache.offloading = True  # asking for it in the right way takes a GPU
    return cache


@pytest.mark.parametrize(
    ("make", "whole"), [(lambda: None, True), (DynamicCache, True), (quanto, False), (offloaded, False)]
)
def test_only_caches_without_a_graph_run_in_parts(make, whole):
    class Model:
        def run(self, past_key_values):
            return "in parts"

    call = cut_at_untraceable_cache(lambda past_key_values: "whole", Model().run, {"executor": "eager"})
    assert call(past_key_values=make()) == ("whole" if whole else "in parts")


def test_a_cache_keeps_its_kind_and_shares_one_class_with_others():
    first, second = quanto(), quanto()
    call = cut_at_untraceable_cache(lambda **_: None, lambda past_key_values: None, {"executor": "eager"})
    for cache in (first, second, first):
        call(past_key_values=cache)
    assert isinstance(first, QuantizedCache)
    assert type(first).__name__ == "QuantizedCache"
    assert type(first) is type(second)
    assert type(first).__mro__[1] is QuantizedCache  # not hidden twice
