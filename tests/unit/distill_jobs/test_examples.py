"""The example that the README submits."""

from pathlib import Path

import yaml

from distill_jobs import spec

EXAMPLE = Path(__file__).parents[3] / "examples" / "shapes-fast.yaml"


def test_the_example_is_the_demo_s_job() -> None:
    assert spec.parse(yaml.safe_load(EXAMPLE.read_text())) == spec.parse(spec.preset("shapes-fast"))
