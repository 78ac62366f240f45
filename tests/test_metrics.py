"""Metrics against other libraries."""

import pytest
import torch

from dfa_lens.data import metrics


def test_divergence_is_that_of_torch_distributions():
    clean, logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    categorical = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(categorical(logits=clean), categorical(logits=logits))
    found = metrics.divergence(clean.log_softmax(-1), logits.log_softmax(-1))
    torch.testing.assert_close(found, expected)
    assert float(metrics.divergence(clean.log_softmax(-1), clean.log_softmax(-1)).abs().max()) == pytest.approx(0)
