"""Models: finding, loading, placing and exporting them; a batch in, log-probabilities or scores
out.

Losses, optimizers and the training loop do not belong here.
"""
