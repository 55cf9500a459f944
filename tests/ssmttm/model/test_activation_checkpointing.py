import torch

from ssmttm.model.loss import codebook_cross_entropy
from tests.benchmarks.scan import peak_bytes
from tests.ssmttm.small import ARCHITECTURES, small_config, small_model, text_for, tokens_for


def step_of(config):
    """Return a model in training, with dropout, and a function that computes its loss and gradients."""
    model = small_model(config).train()
    tokens, text = tokens_for(config, 2, 60), text_for(config, ["calm piano", "x"], [False, True])

    def step():
        model.zero_grad()
        torch.manual_seed(3)
        loss = codebook_cross_entropy(model(tokens, text), tokens)[0].sum()
        loss.backward()
        return loss.item(), torch.get_rng_state()

    return model, step


def test_loss_gradients_and_random_numbers_are_the_same_to_the_bit(architecture):
    model, step = step_of(small_config(architecture, dropout=0.3))
    loss, state = step()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.checkpoints_activations = True
    again, state_after = step()
    assert again == loss
    assert torch.equal(state_after, state)
    assert all(torch.equal(parameter.grad, gradients[name]) for name, parameter in model.named_parameters())


def test_memory_holds_one_block_instead_of_all():
    model, step = step_of(small_config(ARCHITECTURES[1], n_blocks=8, codebook_size=8))
    kept = peak_bytes(step)
    model.checkpoints_activations = True
    assert peak_bytes(step) < kept / 3
