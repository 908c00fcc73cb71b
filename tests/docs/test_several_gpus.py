"""The table of docs/several_gpus.md: each cell names a test that shows it, and the case of that test.

A cell has a mark where two GPUs were compared with one, over NCCL, and gave what it says.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from recipes.benchmarks.common.report_parts import sharded_table

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "several_gpus.md"
RESULTS = REPOSITORY / "recipes" / "benchmarks" / "results"
NCCL = RESULTS / "nccl-nvidia-h200.json"
MARK = "✓"
COLUMNS = ("DDP", "FSDP2", "ZeRO 1", "ZeRO 2", "ZeRO 3")


class Proof(NamedTuple):
    """What a cell says, the test that shows it, and a key of the dict of cases that this test runs."""

    word: str
    test: str
    cases: str = ""
    case: str = ""


SHARDING, TRAINER = "tests.optimizer.test_sharding:", "tests.trainer.test_trainer:"
ZERO, ENGINE = "tests.zero.test_trainer:", "tests.zero.test_engine:test_every_process_agrees_with_one_process"


def ddp(case: str) -> Proof:
    return Proof("bits", "tests.optimizer.test_ddp:test_two_processes_have_the_bits_of_one", "ddp_worker:CASES", case)


def fsdp2(word: str, case: str) -> Proof:
    return Proof(word, f"{SHARDING}test_features_follow_one_process", "sharding_trainer_worker:FEATURES", case)


def zero(word: str, case: str) -> list[Proof]:
    test = f"{ZERO}test_features_follow_one_process"
    words = (word, word, "near")
    return [Proof(w, test, "zero_trainer_worker:FEATURES", f"{case} {stage}") for stage, w in enumerate(words, 1)]


def engine(case: str) -> list[Proof]:
    return [Proof("bits", ENGINE, "zero_worker:CASES", f"zero {stage}{case}") for stage in (1, 2)]


NOT_FSDP2 = Proof("refused", f"{TRAINER}test_what_fsdp2_cannot_be_combined_with_is_refused")
NOT_ZERO = [Proof("refused", f"{ZERO}test_options_that_need_whole_weights_are_refused")] * 3
NEAR = Proof("near", f"{ZERO}test_zero_3_follows_one_process_within_the_rounding_of_its_gradients")
NO_INT8 = [Proof("refused", f"{ZERO}test_int8_weights_are_refused")] * 3
RELEASE = "tests.optimizer.test_release_processes:"


def micro(word: str, case: str) -> list[Proof]:
    test = f"{RELEASE}test_micro_batches_of_several_processes_have_the_bits_of_one"
    return [Proof(word, test, "release_accumulation_worker:CASES", case)] * 2 + NOT_ZERO


ON, OVER = (
    "tests.optimizer.test_ddp:test_a_checkpoint_of_two_processes_goes_on_in_two_and_in_one",
    (f"{SHARDING}test_checkpoints_go_on_exactly_in_2_then_1_then_4_processes"),
)
MUON = f"{SHARDING}test_muons_matrices_have_the_bits_of_one_process"
ZEROS = f"{ZERO}test_every_step_has_the_bits_of_one_process"
STEPS = f"{SHARDING}test_every_step_has_the_bits_of_one_process"

ROWS: dict[str, list[Proof | None]] = {
    "`foam`": [ddp("default"), fsdp2("near", "default"), Proof("bits", ZEROS), Proof("bits", ZEROS), NEAR],
    "`foam`, `embedding_rule=block`": [Proof("bits", STEPS), Proof("bits", STEPS), *engine(""), NEAR],
    "`foam_mini` (`level=row`)": [
        ddp("default, row"),
        fsdp2("near", "default, mini"),
        *engine(", row"),
        zero("near", "mini")[2],
    ],
    "`foam_mini`, `embedding_rule=block`": [
        ddp("row"),
        fsdp2("bits", "mini"),
        *engine(", row"),
        zero("near", "mini")[2],
    ],
    "`second_moment=factored`": [ddp("factored"), fsdp2("near", "factored"), *NOT_ZERO],
    "`foam_muon`": [ddp("muon"), fsdp2("near", "muon"), *NOT_ZERO],
    "`foam_muon`, embeddings and head plain": [ddp("muon, embeddings and head plain"), Proof("bits", MUON), *NOT_ZERO],
    "`foam_adam_mini`": [ddp("adam_mini"), NOT_FSDP2, *NOT_ZERO],
    "`plain_state=8bit`": [ddp("plain_state=8bit"), NOT_FSDP2, *NOT_ZERO],
    "INT8 weights": [
        Proof("bits", "tests.int8.test_int8_trainer:test_two_processes_give_the_weights_of_one"),
        Proof("bits", "tests.int8.test_sharding:test_runs_go_on_exactly_in_2_then_1_then_4_processes"),
        *NO_INT8,
    ],
    "gradient release": [
        Proof("bits", f"{RELEASE}test_release_that_averages_has_the_bits_of_ddp"),
        Proof("bits", f"{RELEASE}test_release_under_fsdp2_has_the_bits_of_fsdp2_without_it"),
        *NOT_ZERO,
    ],
    "release and accumulation": [
        ddp("release, accumulation"),
        fsdp2("bits", "release, accumulation"),
        *NOT_ZERO,
    ],
    "release and clipping": micro("near", "clipping"),
    "release and INT8 weights": micro("bits", "INT8"),
    "release and LoRA": micro("bits", "LoRA"),
    "release and checkpointing": micro("bits", "checkpointing"),
    "accumulation": [ddp("accumulation"), fsdp2("bits", "accumulation"), *zero("bits", "accumulation")],
    "clipping": [ddp("clipping"), fsdp2("near", "clipping"), *zero("near", "clipping")],
    "LoRA": [ddp("lora"), fsdp2("bits", "lora"), *zero("bits", "lora")],
    "optimizer in host memory": [None, NOT_FSDP2, *zero("bits", "offload")],
    "resume, as many processes": [Proof("bits", ON), Proof("bits", OVER), *[Proof("bits", ENGINE)] * 3],
    "resume, another number": [Proof("bits", ON), Proof("bits", OVER), *[Proof("refused", ENGINE)] * 3],
}


MICRO = "DDP and FSDP2, release and accumulation"
RESUMED = ["DDP, resume 2 -> 1 -> 2", "FSDP2 SHARDED_STATE_DICT, resume 2 -> 1 -> 2"]
# Cells -> their case in the results of tests/support/nccl_worker.py.
OVER_NCCL: dict[str, list[str]] = {
    # Measured by version 0.3.0, whose default was the block rule; that of ZeRO is.
    "`foam`": ["", "", "ZeRO 1", "ZeRO 2", "ZeRO 3, Trainer"],
    "`foam`, `embedding_rule=block`": ["DDP, float32", "FSDP2, float32", "ZeRO 1", "ZeRO 2", "ZeRO 3, Trainer"],
    "`foam_mini` (`level=row`)": ["", "", "ZeRO 1, row", "ZeRO 2, row", "ZeRO 3, mini"],
    "`foam_mini`, `embedding_rule=block`": ["DDP, row", "FSDP2, mini", "ZeRO 1, row", "ZeRO 2, row", "ZeRO 3, mini"],
    "`second_moment=factored`": ["DDP, factored", "FSDP2, factored"],
    "`foam_muon`": ["DDP, muon", "FSDP2, muon"],
    "`foam_muon`, embeddings and head plain": ["DDP, muon, embeddings and head plain"],
    "`foam_adam_mini`": ["DDP, adam_mini"],
    "`plain_state=8bit`": ["DDP, plain_state=8bit"],
    "INT8 weights": ["DDP, INT8", "FSDP2, INT8"],
    "gradient release": ["DDP, release, float32", "FSDP2, release, block"],
    "release and accumulation": ["DDP, release, accumulation", "FSDP2, release, accumulation"],
    "release and clipping": [f"{MICRO}, clipping"] * 2,
    "release and INT8 weights": [f"{MICRO}, INT8"] * 2,
    "release and LoRA": [f"{MICRO}, LoRA"] * 2,
    "release and checkpointing": [f"{MICRO}, checkpointing"] * 2,
    "accumulation": [f"{engine}, accumulation" for engine in COLUMNS],
    "clipping": [f"{engine}, clipping" for engine in COLUMNS],
    "LoRA": [f"{engine}, lora" for engine in COLUMNS],
    "resume, as many processes": [*RESUMED, *(f"ZeRO {stage}, resume by hand" for stage in (1, 2, 3))],
    "resume, another number": RESUMED,
}


def word_of(row: str, column: int, proof: Proof | None, found: dict[str, str]) -> str:
    if proof is None:
        return ""
    case = [*OVER_NCCL.get(row, []), *[""] * len(COLUMNS)][column]
    over_nccl = found.get(case, "").split(":")[0]
    return f"{proof.word} {MARK}" if over_nccl == proof.word or over_nccl == "bits" else proof.word


def test_the_table_says_what_the_tests_show() -> None:
    table = re.search(r"<!-- table: each cell.*?-->\n(.*?)\n<!--", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert table
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]
    assert tuple(header[1:]) == COLUMNS
    shown = {row[0]: row[1:] for row in rows}
    found = {row["case"]: row["found"] for row in json.loads(NCCL.read_text())["rows"]}
    expected = {row: [word_of(row, i, proof, found) for i, proof in enumerate(ROWS[row])] for row in ROWS}
    assert shown == expected
    differing = max(float(found[f"ZeRO {stage}"].split()[1].strip(",")) for stage in (1, 2, 3))
    assert f"{differing:.1e}".replace("e-0", "e-") in PAGE.read_text(encoding="utf-8")


def test_measured_rows_are_those_of_the_results() -> None:
    rows = json.loads((RESULTS / "sharded_speed-nvidia-h200.json").read_text())["rows"]
    page = PAGE.read_text(encoding="utf-8")
    table = re.search(r"<!-- measured: .*?-->\n(.*?)\n<!-- end of measured", page, re.DOTALL)
    assert table and len(table[1].splitlines()) > 10
    measured = sharded_table(rows).splitlines()
    assert [line for line in table[1].splitlines() if line not in measured] == []
    for case in ("fsdp2-foam", "fsdp2-adamw"):
        found = [f"{row['optimizer_ms']:.2f}" for row in by_gpus(rows, case)]
        assert f"{found[0]}, {found[1]} and {found[2]}" in " ".join(page.split()), (case, found)


def by_gpus(rows: list[dict[str, Any]], case: str) -> list[dict[str, Any]]:
    return sorted((r for r in rows if r["case"] == case and r["layers"] == 8), key=lambda row: row["gpus"])


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_every_cell_names_a_test_and_a_case_that_exist(row: str) -> None:
    proofs = [proof for proof in ROWS[row] if proof]
    assert len(ROWS[row]) == len(COLUMNS)
    for proof in proofs:
        module, name = proof.test.split(":")
        assert callable(getattr(importlib.import_module(module), name, None)), proof
        if proof.cases:
            assert proof.case in cases_of(proof.cases), proof


def cases_of(where: str) -> Any:
    """The keys of a dict of cases; those of ZeRO's features are followed by a stage."""
    module, name = where.split(":")
    cases = getattr(importlib.import_module(f"tests.support.{module}"), name)
    if module == "zero_trainer_worker":
        return [f"{case} {stage}" for case, (stages, *_) in cases.items() for stage in stages]
    return cases
