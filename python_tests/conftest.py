from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from backends import BACKENDS, Backend, cuda_missing
from hypothesis import HealthCheck, settings

# The same examples every time, so that a change is what makes a test fail; `make test-long` takes
# more of them, `pytest --hypothesis-profile=explore` looks for new ones.
for name, examples in (("default", 25), ("long", 200)):
    settings.register_profile(
        name,
        derandomize=True,
        deadline=None,
        max_examples=examples,
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.register_profile(
    "explore",
    deadline=None,
    max_examples=5000,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("default")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that take CUDA tensors, so that a machine with a GPU can run these alone."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        fixtures = getattr(item, "fixturenames", ())
        on_cuda = "cuda" in (parameters.get("backend"), parameters.get("device"))
        if on_cuda or "cuda_device" in fixtures:
            item.add_marker(pytest.mark.cuda)


@pytest.fixture(params=list(BACKENDS), scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    """A way to compute the loss and both gradients."""
    chosen = BACKENDS[request.param]
    if reason := chosen.missing():
        pytest.skip(reason)
    return chosen


@pytest.fixture(params=["cpu", "cuda"], scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """A device with kernels."""
    if request.param == "cuda" and (reason := cuda_missing()):
        pytest.skip(reason)
    return torch.device(request.param)


@pytest.fixture(scope="session")
def cuda_device() -> torch.device:
    """The CUDA device, for what only it has: streams, graphs."""
    if reason := cuda_missing():
        pytest.skip(reason)
    return torch.device("cuda")


@pytest.fixture(scope="module")
def threads_kept() -> Iterator[None]:
    """Put back the number of threads that the command sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
