"""AdamW against its equations in numpy."""

import numpy as np
import torch
from torch import nn

from bitray.optim import AdamW


def test_follows_the_equations():
    rng = np.random.default_rng(0)
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(rng.normal(size=(3, 4))))
        model.bias.copy_(torch.tensor(rng.normal(size=3)))
    settings = AdamW(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3)
    optimizer = settings.build(model)
    expected = [p.detach().double().numpy() for p in (model.weight, model.bias)]
    moments = [[np.zeros_like(x), np.zeros_like(x)] for x in expected]
    for step in range(1, 5):
        gradients = [rng.normal(size=x.shape) for x in expected]
        model.weight.grad, model.bias.grad = (torch.tensor(g).float() for g in gradients)
        optimizer.step()
        for i, (gradient, (m, v), decay) in enumerate(
            zip(gradients, moments, (0.3, 0.0), strict=True)  # biases do not decay
        ):
            m[:] = 0.8 * m + 0.2 * gradient
            v[:] = 0.9 * v + 0.1 * gradient**2
            update = (m / (1 - 0.8**step)) / (np.sqrt(v / (1 - 0.9**step)) + 1e-3)
            expected[i] = expected[i] - 0.1 * decay * expected[i] - 0.1 * update
    np.testing.assert_allclose(model.weight.detach().numpy(), expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.bias.detach().numpy(), expected[1], rtol=1e-5, atol=1e-6)
