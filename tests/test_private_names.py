"""The parts of torch that have no public name: a version that renames one shows it here, not by another answer."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.torch


def test_names_that_answers_depend_on() -> None:
    """A missing one would let a forward-mode tangent, a functional transform or a dispatch mode pass unseen."""
    assert torch.autograd.forward_ad._current_level == -1
    with torch.autograd.forward_ad.dual_level():
        assert torch.autograd.forward_ad._current_level == 0
    x = torch.zeros(3)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(x)
    torch.func.vmap(lambda y: y.clone() if torch._C._functorch.is_functorch_wrapped_tensor(y) else 1 / 0)(x)
    assert torch._C._len_torch_dispatch_stack() == 0


def test_names_that_only_save_time() -> None:
    """Without them calls are right and slower."""
    guards = torch._C._dynamo.guards
    x = torch.zeros(3)
    check = guards.TensorGuards(x, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    assert check(torch.ones(3)) and not check(torch.zeros(4))
    assert callable(guards._empty_strided_cuda)


@pytest.mark.gpu
def test_names_on_a_gpu() -> None:
    device, stream = torch._C._cuda_getDevice(), torch.cuda.Stream()
    assert device == torch.cuda.current_device()
    with torch.cuda.stream(stream):
        assert torch._C._cuda_getCurrentRawStream(device) == stream.cuda_stream
    assert torch._C._cuda_isCurrentStreamCapturing() is False
