"""The state of an optimizer goes through tensors with names and back, exactly."""

import torch

from unetgn.training.optimizer import optimizer_from_tensors, optimizer_to_tensors


def test_an_optimizer_goes_on_in_the_layout_of_its_parameters() -> None:
    torch.manual_seed(0)
    module = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    module(torch.randn(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    names = [name for name, _ in module.named_parameters()]
    saved = optimizer_to_tensors(optimizer, names)
    optimizer_from_tensors(optimizer, names, saved)
    moment = optimizer.state[module.weight]["exp_avg"]
    assert moment.stride() == module.weight.stride()
    assert torch.equal(moment, saved["weight/exp_avg"])


def test_an_optimizer_goes_on_exactly_from_its_tensors() -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = torch.nn.Linear(5, 3)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)

    def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        module(torch.linspace(-1, 1, 10).view(2, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    (one, optimizer), (other, fresh) = make(), make()
    for _ in range(3):
        step(one, optimizer)
    names = [name for name, _ in one.named_parameters()]
    other.load_state_dict(one.state_dict())
    optimizer_from_tensors(fresh, names, optimizer_to_tensors(optimizer, names))
    for _ in range(3):
        step(one, optimizer)
        step(other, fresh)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
