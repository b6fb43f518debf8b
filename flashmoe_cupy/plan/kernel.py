"""What the host knows of a kernel of `cuda_src`, whatever it computes, and a step: one launch. No GPU and no CuPy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from flashmoe_cupy.dtypes import DType
from flashmoe_cupy.jit import source
from flashmoe_cupy.jit.device import H100, DeviceProperties
from flashmoe_cupy.jit.tensormap import MAX_STRIDE, TensorMap
from flashmoe_cupy.plan.params import Params
from flashmoe_cupy.plan.step import Step, Values

DEFAULT_SMS = H100.multiprocessors  # where no device is at hand
EMPTY = "a dimension is 0: the copy engine has no empty arrays"  # why a fast kernel does not run; nothing is slow then
MAX_TILES = 2**31 - 2**16  # tiles of a launch: a block counts them in 32 bits, up to one grid beyond the last

if TYPE_CHECKING:  # a Protocol takes long to make

    class AnyConfig(Protocol):
        """One specialisation of a kernel: what is compiled once and then serves every shape."""

        @property
        def name(self) -> str:
            """For people, and different from all others of its kernel."""

        @property
        def struct(self) -> str:
            """The C++ type inside namespace fm."""

        @property
        def threads(self) -> int:
            """Threads of a block."""

        @property
        def min_blocks(self) -> int:
            """Blocks per SM that the compiler must leave registers for."""

        @property
        def cluster(self) -> int:
            """Blocks of a cluster."""

        @property
        def smem_bytes(self) -> int:
            """Dynamic shared memory of a block."""

    class Problem(Protocol):
        """What a kernel is asked to compute."""

        @property
        def dtype(self) -> DType:
            """Of the arrays that the kernel's speed depends on."""

        @property
        def rows_aligned(self) -> bool:
            """Whether strides keep every row at a multiple of 16 bytes, if the arrays begin there."""

        def describe(self) -> str:
            """One line for people."""


P = TypeVar("P", bound="Problem")
C = TypeVar("C", bound="AnyConfig")


class Kernel(ABC, Generic[P, C]):
    """What all kernels share. A subclass says which problems it runs, and in which configuration."""

    op: str
    """What `warmup` and the command line call the family: "attention", "moe" and so on, or one declared elsewhere."""
    task: str
    """What it computes. Of the kernels of one task, the first of the registry that takes a problem runs it."""
    name: str
    """Different from those of all other kernels."""
    header: str
    """Its file, below cuda_src: "attention/fwd_sm80.cuh"."""
    summary: str
    """What it runs on and for which GPUs, in one line for people."""
    params: Params
    """The struct that its header declares, or includes."""
    clears = False  # whether it can write the rows of no sequence
    waits = False  # whether it waits for the launch in front of it by itself (griddepcontrol.wait): it may start early

    @abstractmethod
    def configs(self, arch: str) -> Sequence[C]:
        """The closed set for one architecture: warming these up leaves nothing to compile."""

    @abstractmethod
    def why_not(self, problem: P, arch: str, aligned: bool = True) -> list[str]:
        """Every reason why the problem cannot run on `arch`; empty = it runs. aligned: as for `choose`."""

    @abstractmethod
    def choose(self, problem: P, arch: str, aligned: bool = True, device: DeviceProperties = H100) -> C:
        """The configuration for a problem on such a device.

        aligned: every row of the arrays that go by rows starts at a multiple of 16 bytes.
        """

    @abstractmethod
    def grid(self, problem: P, config: C, sms: int = DEFAULT_SMS) -> int:
        """Blocks of a launch on a device of `sms` multiprocessors."""

    @abstractmethod
    def values(self, problem: P, config: C, aligned: bool, sms: int = DEFAULT_SMS) -> Values:
        """What Params holds between the pointers and the tensor maps: the same for every call with this problem.

        A step may add what only its operation knows.
        """

    def at_once(self, problem: P, config: C, sms: int = DEFAULT_SMS) -> bool:  # noqa: ARG002
        """Whether blocks wait for each other, so that all of them have to run at once."""
        return False

    def counter_at(self, problem: P) -> int:  # noqa: ARG002
        """Where in Params the address of a counter of tiles belongs; 0: the kernel wants none."""
        return 0

    def map_arguments(self, problem: P, config: C) -> tuple[TensorMap, ...]:  # noqa: ARG002
        """The tensor maps that end Params, as far as this configuration has them, in their order."""
        return ()

    def before(self, step: Step, config: C, odd: Sequence[str]) -> tuple[list[Step], dict[str, int]]:  # noqa: ARG002
        """The step, perhaps changed, behind steps that prepare it for this kernel.

        odd: arrays that do not start at a multiple of 16 bytes. With it bytes of arrays in the workspace that the
        operation may not have made room for.
        """
        return [step], {}

    def reasons(self, problem: P, config: C, device: DeviceProperties = H100) -> list[str]:  # noqa: ARG002
        """Why `choose` took this configuration on such a device, in sentences."""
        return []

    def slow(self, problem: P, aligned: bool) -> str:  # noqa: ARG002
        """What makes the problem slow here, and what would be faster; "": nothing that the caller can change."""
        return ""

    def params_of(self, config: C) -> str:  # noqa: ARG002
        """The C++ type of Params, inside namespace fm."""
        return self.params.name

    def fields(self, config: C) -> dict[str, Any]:
        """The numbers of a configuration, for people."""
        return config._asdict() if hasattr(config, "_asdict") else {}

    def title(self, config: C) -> str:
        """A name for people that is different from those of all other kernels."""
        return config.name

    def source(self, config: C) -> str:
        """The translation unit of one configuration."""
        return source.render(
            self.header, config.struct, self.params_of(config), self.params.size, config.threads, config.min_blocks,
            params_align=self.params.align, cluster=config.cluster,
        )  # fmt: skip


def far_strides(names: Sequence[str], maps: Sequence[TensorMap]) -> list[str]:
    """Why the copy engine cannot fetch or store these arrays; empty: it can."""
    return [
        f"{name} has a stride that is negative, or 1 TiB or more: the copy engine cannot follow it"
        for name, of in zip(names, maps, strict=True)
        if min(of.strides) < 0 or max(of.strides) >= MAX_STRIDE
    ]
