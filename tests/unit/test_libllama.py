"""The C declarations alone, in a process of their own, because imports are for good."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from runtime.libllama import import_declarations
library = import_declarations()
assert library is import_declarations()
assert "numpy" not in sys.modules and "llama_cpp" not in sys.modules
print(library.llama_print_system_info().decode()[:3])
import llama_cpp
assert llama_cpp.Llama and llama_cpp.llama_cpp is library
assert library is import_declarations()
"""


def test_only_the_declarations_are_imported_and_the_package_is_whole_afterwards() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_missing_package_is_told() -> None:
    script = "from runtime.libllama import import_declarations as load; load()"
    without_site = [sys.executable, "-S", "-c", script]
    done = subprocess.run(without_site, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "No module named 'llama_cpp'" in done.stderr
