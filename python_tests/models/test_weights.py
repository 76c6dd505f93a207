"""Weights as training scripts leave them: within wrappers, averaged, in safetensors files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lnl_ext.errors import UserError
from lnl_ext.models.backbones import build_network
from lnl_ext.models.weights import load_weights, put_weights, read_weights, unwrapped

ARCH = "shufflenet_v2_x0_5"


class _Wrapper(nn.Module):
    """What DataParallel and DistributedDataParallel do to names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def _block_compiled(network: nn.Module) -> nn.Module:
    network.stage2 = torch.compile(network.stage2)
    return network


def _in_a_model(network: nn.Module) -> nn.Module:
    return nn.ModuleDict({"model": nn.ModuleDict({"backbone": network})})


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda network: network,
    "parallel": _Wrapper,
    "compiled": torch.compile,
    "parallel, compiled": lambda network: torch.compile(_Wrapper(network)),
    "compiled, parallel": lambda network: _Wrapper(torch.compile(network)),
    "averaged": AveragedModel,
    "averaged, with statistics": lambda network: AveragedModel(network, use_buffers=True),
    "averaged, parallel, compiled": lambda n: AveragedModel(_Wrapper(torch.compile(n))),
    "parallel, averaged": lambda network: _Wrapper(AveragedModel(network)),
    "a block compiled": _block_compiled,
    "in a model of one's own": _in_a_model,
}


def network(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return build_network(ARCH, classes)


def write(path: Path, state: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_within_wrappers_load(tmp_path: Path, wrapper: str, suffix: str) -> None:
    expected = {name: value.clone() for name, value in network().state_dict().items()}
    path = write(tmp_path / f"w.{suffix}", WRAPPERS[wrapper](network()).state_dict())
    torch.manual_seed(1)
    loaded = build_network(ARCH, 3)
    assert load_weights(loaded, ARCH, str(path)) is None
    state = loaded.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    # Of other classes: the last layer keeps its own weights.
    assert load_weights(build_network(ARCH, 5), ARCH, str(path)) == "fc"


def test_names_that_belong_to_the_network_stay() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

        def forward(self, features: Tensor) -> Tensor:
            output: Tensor = self.module(features)
            return output

    given, own = Named(), Named()
    put_weights(own, _Wrapper(given).state_dict(), "here", new_output=False)
    assert torch.equal(own.module.weight, given.module.weight)
    assert list(unwrapped(given.state_dict(), own, "here")) == ["module.weight", "module.bias"]


def test_a_prefix_of_a_part_is_named() -> None:
    state = {f"net.{name}": value for name, value in network().state_dict().items()}
    state["loss.weight"] = torch.ones(2)
    message = (
        r"w.pt hold more .* names of the network begin with 'net\.', beside others \(loss\.weight\)"
    )
    with pytest.raises(UserError, match=message):
        put_weights(network(), state, "w.pt", new_output=False)


def test_another_network_is_named_by_what_it_lacks() -> None:
    state = _Wrapper(build_network("squeezenet1_1", 3)).state_dict()
    with pytest.raises(UserError, match=r"w.pt do not fit the network: the file lacks conv1.0"):
        put_weights(network(), state, "w.pt", new_output=False)


def test_safetensors_that_cannot_be_read_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"w.safetensors cannot be loaded as a state_dict: it is d"):
        read_weights(path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError) as error:
        read_weights(path)
    assert str(error.value) == f"{path} needs the package safetensors: pip install safetensors"
