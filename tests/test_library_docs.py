"""Every example of the library's page runs, in the order in which it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.tools import MIB, create, qemu_img, qemu_io

ROOT = Path(__file__).parents[1]
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("page", "least"), [("docs/library.md", 5), ("README.md", 1)])
def test_the_examples_run(page: str, least: int, tmp_path: Path) -> None:
    examples = EXAMPLE.findall((ROOT / page).read_text())
    assert len(examples) >= least
    image = create(tmp_path / "vm.qcow2", 8 * MIB)
    qemu_io(image, "write -q -P 7 1M 64k")
    qemu_img("snapshot", "-c", "before-upgrade", image)
    text = "\n".join(examples)
    words = [sys.executable, "-W", "error", "-c", text]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "bytes" in result.stdout or "b'" in result.stdout
    qemu_img("check", image)
