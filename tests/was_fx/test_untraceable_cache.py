"""Which caches are kept out of graphs."""

import pytest
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache, QuantizedCache

from was_fx.untraceable_cache import hide_updates

CONFIG = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2)


def quanto():
    return QuantizedCache("quanto", CONFIG, nbits=4, q_group_size=16)


def offloaded():
    cache = DynamicCache()
    cache.offloading = True  # asking for it in the right way takes a GPU
    return cache


@pytest.mark.parametrize(
    ("make", "hidden"), [(lambda: None, False), (DynamicCache, False), (quanto, True), (offloaded, True)]
)
def test_only_caches_without_a_graph_are_kept_out(make, hidden):
    assert hide_updates(make()) is hidden


def test_a_cache_keeps_its_kind_and_shares_one_class_with_others():
    first, second = quanto(), quanto()
    for cache in (first, second, first):
        assert hide_updates(cache)
    assert isinstance(first, QuantizedCache)
    assert type(first).__name__ == "QuantizedCache"
    assert type(first) is type(second)
    assert type(first).__mro__[1] is QuantizedCache  # not hidden twice
