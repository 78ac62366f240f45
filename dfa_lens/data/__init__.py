"""Values that travel, and know no model: node sets, prompt pairs, scores, alignments, curves, and what they share."""
