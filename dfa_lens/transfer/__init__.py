"""Carrying scores to a larger model: training, what W is made of, what is minimised, likeness of nodes, controls."""
