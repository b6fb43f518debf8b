"""The dtype table: one object per type, and the same type in every spelling."""

from __future__ import annotations

import copy
import pickle

import ml_dtypes
import numpy as np
import pytest

from flashmoe_cupy import dtypes
from flashmoe_cupy.dtypes import ALL, DType
from flashmoe_cupy.errors import CompileError, DependencyError, FlashMoEError, UnsupportedProblem


def test_codes_are_the_kernels_own() -> None:
    """cuda_src/attention/params.cuh spells these numbers out."""
    first = [dtypes.BF16, dtypes.FP16, dtypes.FP32, dtypes.FP64, dtypes.BOOL, dtypes.INT32, dtypes.INT64]
    first += [dtypes.FP8_E4M3, dtypes.FP8_E5M2, dtypes.UINT8]
    assert [d.code for d in first] == list(range(10))
    for attribute in ("name", "cuda", "code", "dlpack"):
        assert len({getattr(d, attribute) for d in ALL}) == len(ALL), attribute


@pytest.mark.parametrize("dtype", ALL, ids=repr)
def test_every_spelling_leads_back(dtype: DType) -> None:
    assert dtypes.from_name(dtype.name) is dtype
    assert dtypes.from_dlpack(*dtype.dlpack) is dtype
    as_numpy = dtypes.to_numpy(dtype)
    assert dtypes.from_numpy(as_numpy) is dtype
    assert as_numpy.name == dtype.name
    assert as_numpy.itemsize == dtype.itemsize == dtype.dlpack[1] // 8


@pytest.mark.parametrize("name", ["float16", "float32", "float64", "int32", "int64", "uint8", "int8", "bool"])
def test_dlpack_codes_match_numpy_own_export(name: str) -> None:
    """NumPy writes the codes itself: read back what it exports."""
    kinds = {"i": 0, "u": 1, "f": 2, "b": 6}
    n = np.dtype(name)
    assert dtypes.from_numpy(n).dlpack == (kinds[n.kind], 8 * n.itemsize)


def test_small_floats() -> None:
    assert dtypes.to_numpy(dtypes.BF16) == np.dtype(ml_dtypes.bfloat16)
    assert dtypes.to_numpy(dtypes.FP8_E4M3) == np.dtype(ml_dtypes.float8_e4m3fn)
    assert dtypes.to_numpy(dtypes.FP8_E5M2) == np.dtype(ml_dtypes.float8_e5m2)
    assert dtypes.BF16.dlpack == (4, 16)
    assert (dtypes.FP8_E4M3.dlpack, dtypes.FP8_E5M2.dlpack, dtypes.FP8_E8M0.dlpack) == ((10, 8), (12, 8), (14, 8))


def test_one_object_per_type() -> None:
    for dtype in ALL:
        assert pickle.loads(pickle.dumps(dtype)) is dtype
        assert copy.deepcopy(dtype) is dtype
    with pytest.raises(AttributeError, match="immutable"):
        dtypes.BF16.code = 3
    with pytest.raises(AttributeError, match="immutable"):
        del dtypes.BF16.code
    assert dtypes.BF16.code == 0


def test_unknown_spellings() -> None:
    with pytest.raises(ValueError, match=r"bf17.*bfloat16"):
        dtypes.from_name("bf17")
    with pytest.raises(ValueError, match="complex64"):
        dtypes.from_numpy(np.dtype(np.complex64))
    with pytest.raises(ValueError, match=r"byte order.*float32"):
        dtypes.from_numpy(np.dtype(np.float32).newbyteorder("S"))
    with pytest.raises(ValueError, match="code 17 with 4 bits"):
        dtypes.from_dlpack(17, 4)


def test_errors_show_everything_and_survive_pickling() -> None:
    error = UnsupportedProblem("attention of two socks", ["no head", "no tail"], "buy a cat")
    assert isinstance(error, (ValueError, FlashMoEError))
    for text in ("attention of two socks", "no head", "no tail", "buy a cat"):
        assert text in str(error)
    same = pickle.loads(pickle.dumps(error))
    assert (same.asked, same.reasons, same.hint, str(same)) == (error.asked, error.reasons, error.hint, str(error))

    broken = CompileError("kernel a does not compile", "a.cuh(3): error: x", "a.cu")
    assert isinstance(broken, RuntimeError)
    assert "a.cuh(3): error: x" in str(broken) and "a.cu" in str(broken)
    again = pickle.loads(pickle.dumps(broken))
    assert (again.message, again.log, again.source_path) == ("kernel a does not compile", "a.cuh(3): error: x", "a.cu")
    assert str(again) == str(broken)
    assert CompileError("short").source_path is None
    assert issubclass(DependencyError, ImportError)
