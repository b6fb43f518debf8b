"""The errors of the library. Each one says what was asked, why it cannot run, and what would run."""

from __future__ import annotations

from collections.abc import Sequence


class FlashMoEError(Exception):
    """Base of every error that the library raises on purpose."""


class UnsupportedProblem(FlashMoEError, ValueError):
    """The arguments describe something that cannot run.

    Attributes: asked (the problem in one line), reasons (every reason, not only the first), hint (what would run).
    """

    def __init__(self, asked: str, reasons: Sequence[str], hint: str = "") -> None:
        self.asked = asked
        self.reasons = tuple(reasons)
        self.hint = hint
        lines = [f"cannot run {asked}", *(f"  - {reason}" for reason in self.reasons)]
        if hint:
            lines.append(f"  hint: {hint}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[UnsupportedProblem], tuple[str, tuple[str, ...], str]]:
        return type(self), (self.asked, self.reasons, self.hint)


class CompileError(FlashMoEError, RuntimeError):
    """NVRTC refused a kernel. Attributes: log (the compiler's whole log), source_path (the source on disk, or None)."""

    def __init__(self, message: str, log: str = "", source_path: str | None = None) -> None:
        self.message = message
        self.log = log
        self.source_path = source_path
        text = message
        if source_path:
            text += f"\nsource: {source_path}"
        if log:
            text += f"\ncompiler log:\n{log.rstrip()}"
        super().__init__(text)

    def __reduce__(self) -> tuple[type[CompileError], tuple[str, str, str | None]]:
        return type(self), (self.message, self.log, self.source_path)


class DependencyError(FlashMoEError, ImportError):
    """Something outside the library is missing or too old. The message holds the command that repairs it."""
