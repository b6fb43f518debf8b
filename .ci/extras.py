"""Each extra beside the newest torch, in an environment of its own: pip must not go back to an older torch.

    python .ci/extras.py PIP        # PIP: the command of a recent pip, which reads metadata without whole wheels

Nothing is installed: `pip install --dry-run --report` says what would be. What pip takes for `torch` alone is the
newest that the index, the constraints and this Python allow; with an extra it has to be the same.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("cuda12", "cuda13", "torch", "jax", "transformers", "test")
CUDA = re.compile(r"(?:cupy-|nvidia-cuda-|cuda-bindings$|torch$)")  # what the two CUDA majors could quarrel about


def resolve(pip: str, wanted: list[str]) -> dict[str, str]:
    """Name -> version of all that pip would install into an empty environment. Raises RuntimeError when it cannot."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [pip, "install", "--quiet", "--dry-run", "--ignore-installed", "--use-feature=fast-deps"]
        done = subprocess.run([*command, "--report", str(report), *wanted], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pip cannot resolve {' '.join(wanted)}:\n{done.stderr}")
        chosen = [each["metadata"] for each in json.loads(report.read_text(encoding="utf-8"))["install"]]
    return {re.sub(r"[-_.]+", "-", each["name"]).lower(): each["version"] for each in chosen}


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = project["dependencies"]
    wanted = {"": ["torch"]}
    wanted |= {name: ["torch", *base, *project["optional-dependencies"][name]] for name in EXTRAS}
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(wanted, pool.map(lambda words: resolve(sys.argv[1], words), wanted.values()), strict=True))
    newest = found[""]["torch"]
    print(f"torch alone: {newest}")
    for name in EXTRAS:
        shown = (f"{package} {version}" for package, version in sorted(found[name].items()) if CUDA.match(package))
        print(f"[{name}]: {', '.join(shown)}")
    older = {name: found[name]["torch"] for name in EXTRAS if found[name]["torch"] != newest}
    for name, version in older.items():
        print(f"[{name}] goes back to torch {version}; alone it is {newest}", file=sys.stderr)
    return 1 if older else 0


if __name__ == "__main__":
    sys.exit(main())
