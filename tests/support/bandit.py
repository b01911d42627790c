"""A prompt with 144 answers of two tokens each, their rewards and a reference, all known: small
enough for the policy that maximizes E[r] - beta KL(pi || pi_ref), pi_ref exp(r / beta), to be
written down.
"""

import torch

VOCABULARY = 12
A = VOCABULARY**2
BETA = 0.5
# KL from a policy to where it must arrive, in nats, that counts as reached; the reference is 0.07
# nats and more away from any of these places
REACHED = 1e-8


def random(*shape, seed):
    """Return normal draws in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


REWARDS = random(A, seed=0)
REFERENCE = (0.5 * random(A, seed=1)).log_softmax(0)
