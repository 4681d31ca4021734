from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel

from headstart import attention


@pytest.fixture
def bert() -> BertModel:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertModel(BertConfig(vocab_size=50, **size)).eval()


@pytest.mark.parametrize("tokens", [1, 7, attention.SHORT, attention.SHORT + 1])
def test_short_attention_says_what_the_network_says_without_it(bert: BertModel, tokens: int) -> None:
    ids = torch.randint(1, 50, (5, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.ones_like(ids)
    mask[0, (tokens + 1) // 2 :] = 0
    with torch.inference_mode():
        expected = bert(input_ids=ids, attention_mask=mask)[0]
        attention.shorten(bert)
        found = bert(input_ids=ids, attention_mask=mask)[0]
    kept = mask.bool()
    assert bert.config._attn_implementation == attention.NAME
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-4, atol=1e-5)


def test_a_text_of_nothing_but_padding_gives_no_nan(bert: BertModel) -> None:
    attention.shorten(bert)
    ids = torch.ones(2, 6, dtype=torch.int64)
    mask = torch.tensor([[1] * 6, [0] * 6])
    with torch.inference_mode():
        assert bert(input_ids=ids, attention_mask=mask)[0].isfinite().all()


def test_a_network_whose_attention_is_its_own_stays_as_it_is() -> None:
    network = torch.nn.Linear(2, 2)
    attention.shorten(network)
    assert network(torch.ones(1, 2)).shape == (1, 2)
