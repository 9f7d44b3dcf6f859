import itertools
import json
import math
import re
import statistics
from pathlib import Path

import pytest

from bench.load import arrivals
from bench.peers import workloads
from bench.peers.pictures import Ask, Config, Kind
from bench.peers.servers import FEWSTEP, PEERS, SERVERS, TOLD, Running, measures
from bench.peers.workloads import CELLS, MIXES, QUICK, capacity_cell, requests

ROOT = Path(__file__).parents[3]
CAPTIONS = [f"caption {index}" for index in range(20_000)]
ENGINE_PACKAGES = (
    "torch", "openvino", "onnxruntime", "numpy", "safetensors", "transformers", "diffusers", "onnx", "onnxscript",
    "msgspec", "pillow",
)  # fmt: skip


@pytest.mark.parametrize("mix", MIXES)
def test_kinds_come_in_their_shares(mix: str) -> None:
    shares = MIXES[mix]
    assert sum(shares.values()) == pytest.approx(1)
    asked = requests(shares, CAPTIONS, 3)
    for kind, share in shares.items():
        deviation = math.sqrt(share * (1 - share) / len(asked))
        assert sum(one.kind == kind for one in asked) / len(asked) == pytest.approx(share, abs=4 * deviation + 1e-9)


def test_the_same_seed_asks_the_same_and_another_one_does_not() -> None:
    mix = MIXES["50/30/20"]
    assert requests(mix, CAPTIONS[:500], 1) == requests(mix, CAPTIONS[:500], 1)
    assert requests(mix, CAPTIONS[:500], 1) != requests(mix, CAPTIONS[:500], 2)


def test_every_request_has_its_own_caption_and_seed() -> None:
    asked = requests(MIXES["90/10"], CAPTIONS[:2000], 1)
    assert len({one.prompt for one in asked}) == len({one.seed for one in asked}) == 2000


def test_poisson_arrivals_keep_their_rate_and_spread() -> None:
    times = [0.0, *itertools.islice(arrivals(40.0, 7), 20_000)]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 40, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 40, rel=0.03)  # exponential: deviation and mean are equal


def test_arrivals_are_those_of_their_seed() -> None:
    first, again, other = (list(itertools.islice(arrivals(5.0, seed), 20)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("cells", [CELLS, QUICK])
def test_what_a_poisson_load_is_a_percent_of_is_measured_before_it(cells: tuple[workloads.Cell, ...]) -> None:
    for place, cell in enumerate(cells):
        if cell.mode == "poisson":
            assert capacity_cell(cell) in cells[:place]


def test_forms_that_are_the_same_on_one_kind_are_measured_once() -> None:
    one, mixed = MIXES["1-step"], MIXES["50/30/20"]
    assert all(measures(server, mixed) for server in SERVERS if server != TOLD)
    assert measures(FEWSTEP, one)
    assert not measures("litserve grouped", one)
    assert measures("fastapi grouped", one)  # which batches, where its naive form does not
    assert all(measures(f"{peer} naive", one) for peer in PEERS)


def test_fewstep_is_measured_once_more_where_requests_say_when_their_answer_is_of_no_use_any_more() -> None:
    assert measures(TOLD, MIXES["90/10"], closed=False)
    assert not measures(TOLD, MIXES["90/10"])
    kinds = {"1": Kind("shapes@1", 1, "shapes")}
    config = Config(registry="", cache="", kinds=kinds, backend="eager", precision="fp32", batches=(1,), threads=1)
    here = Running(1, [], config, fewstep=True)
    assert "timeout_ms" not in json.loads(here.body(Ask("1", "a ring", 1)))
    here.within_ms = {"1": 21.7}
    assert json.loads(here.body(Ask("1", "a ring", 1)))["timeout_ms"] == 21


@pytest.mark.parametrize("package", ENGINE_PACKAGES)
def test_peers_run_the_engine_on_the_versions_that_fewstep_runs_it_on(package: str) -> None:
    pins = [
        re.search(rf"^{package}==\S+$", (ROOT / path).read_text(), re.MULTILINE | re.IGNORECASE)
        for path in ("constraints.txt", "bench/peers/requirements.txt")
    ]
    ours, theirs = (pin and pin[0].lower() for pin in pins)
    assert ours is not None
    assert theirs == ours
