"""Attribution: :func:`~dfa_lens.attribution.attribute.attribute.attribute` and the methods that it knows."""
