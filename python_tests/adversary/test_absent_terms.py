"""A coefficient that is given as the number 0 is absent from the computation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lnl_ext import BiasAdversary

NAMES = ("reversal", "entropy_weight", "confusion_weight")


def absent(**others) -> BiasAdversary:
    return BiasAdversary(nn.Linear(3, 2), **{**dict.fromkeys(NAMES, 0.0), **others})


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 3, requires_grad=True), torch.randint(2, (6,))


@pytest.mark.parametrize("name", NAMES)
def test_it_stands_in_the_state_dict_as_zero(name: str):
    adversary = absent()
    assert adversary.known_zero(name)
    state = adversary.state_dict()
    assert set(NAMES) <= state.keys()
    assert state[name] == getattr(adversary, name) == 0
    adversary.load_state_dict(copy.deepcopy(state))
    adversary.load_state_dict(copy.deepcopy(state), assign=True)
    whole = nn.ModuleDict({"a": adversary})
    whole.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert f"{name}=0" in repr(adversary)
    adversary(*inputs()).backward()
    del state[name]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        adversary.load_state_dict(state)
    adversary.load_state_dict(state, strict=False)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_loading_another_value_raises(name: str, assign: bool):
    state = absent(**{name: 0.5}).state_dict()
    adversary = absent()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"{name} is 0.5, but .* made with the number 0"):
            adversary.load_state_dict(state, strict=strict, assign=assign)
    adversary(*inputs())


@pytest.mark.parametrize("name", NAMES)
def test_a_write_raises_at_the_next_forward(name: str):
    adversary = absent()
    adversary(*inputs())
    getattr(adversary, name).fill_(0.5)
    with pytest.raises(RuntimeError, match=f"{name}=torch.tensor"):
        adversary(*inputs())
    getattr(adversary, name).zero_()
    adversary(*inputs())


@pytest.mark.parametrize("value", [torch.tensor(0.0), lambda t: t, "ramp"])
def test_what_can_become_another_value_is_not_absent(value):
    adversary = BiasAdversary(nn.Linear(3, 2), entropy_weight=value)
    assert not adversary.known_zero("entropy_weight")
    adversary.entropy_weight.fill_(0.5)
    x, target = inputs()
    expected = BiasAdversary(adversary.head, entropy_weight=0.5)(x, target)
    torch.testing.assert_close(adversary(x, target), expected)


CHANGES = {
    "copy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "dtype": lambda m: m.double().float(),
    "half": lambda m: m.half().float(),
    "device": lambda m: m.to("cpu"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_stays_absent(change: str):
    adversary = CHANGES[change](absent(reversal=0.1))
    assert [adversary.known_zero(name) for name in NAMES] == [False, True, True]
    adversary(*inputs()).backward()
    adversary.entropy_weight.fill_(0.5)
    with pytest.raises(RuntimeError, match=r"entropy_weight is 0\.5"):
        adversary(*inputs())


class Operations(TorchDispatchMode):
    """Counts the matrix products of a backward."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("terms", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1)], ids=str)
def test_nothing_is_computed_twice_without_terms(terms):
    head = nn.ModuleList([nn.Linear(3, 3) for _ in range(4)])
    head.forward = lambda x: head[3](head[2](head[1](head[0](x))))
    adversary = BiasAdversary(head, entropy_weight=terms[0], confusion_weight=terms[1])
    x, target = inputs()
    loss = adversary(x, target)
    with Operations() as seen:
        loss.backward()
    # A product for the weights of each layer and one for its input; and these again.
    assert seen.products == (8 if terms == (0.0, 0.0) else 12)


def test_the_first_layer_makes_the_gradient_of_its_input_once():
    head = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Tanh())
    x, target = inputs()
    loss = BiasAdversary(head)(x, target)
    with Operations() as seen:
        loss.backward()
    assert seen.products == 8
