"""The networks of the papers: one file a model, no training code."""
