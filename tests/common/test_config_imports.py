"""Reading a preset imports neither DeepSpeed nor diffusers: a wrong value is named within a second or two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
READ = """
import sys
from common.config import load_section
from {module} import {name}
load_section("configs/tiny.yaml", "{section}", {name})
print(",".join(sorted({{"deepspeed", "diffusers", "ray", "transformers"}} & sys.modules.keys())))
"""


@pytest.mark.parametrize(
    ("section", "module", "name"),
    [
        ("model", "pipeline.model.config", "ModelConfig"),
        ("storage", "common.storage", "StorageConfig"),
        ("datagen", "datagen.config", "DatagenConfig"),
        ("trainer", "trainer.config", "TrainerConfig"),
        ("preference", "preference.config", "PreferenceConfig"),
    ],
)
def test_reading_a_section_imports_no_framework(section: str, module: str, name: str) -> None:
    code = READ.format(section=section, module=module, name=name)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_cpu_tasks_of_datagen_import_no_pytorch() -> None:
    """Each is a process of its own, and there is one per core."""
    code = "import sys, datagen.encode.ray_jobs, datagen.survey.survey_cache; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
