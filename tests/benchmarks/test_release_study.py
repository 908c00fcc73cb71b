"""The page of the study of gradient release holds the numbers of its results, and these meet what was asked for."""

from __future__ import annotations

import json
import statistics

from recipes.benchmarks.quality import release_table


def content(name: str) -> dict:
    return json.loads((release_table.RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def test_the_page_has_the_tables_of_the_results() -> None:
    page = release_table.PAGE.read_text(encoding="utf-8")
    for name, rows in release_table.TABLES.items():
        assert release_table.markdown(rows(content(name))) in page


def test_accumulation_costs_at_most_five_thousandths_of_loss() -> None:
    for name, arm, least in (("release_study", "release, share squares", 12), ("release_shipped", "release", 11)):
        study, compared = content(name), 0
        for kind in ("bf16, 4 x 4", "bf16, 16 x 1", "INT8, 4 x 4", "INT8, 16 x 1"):
            for dataset in ("gsm8k", "alpaca"):
                if mine := release_table.losses(study, dataset, f"{arm}, {kind}"):
                    plain = release_table.losses(study, dataset, f"plain, {kind}")
                    found, count = release_table.difference(mine, plain)
                    assert found <= 0.005
                    compared += count
        assert compared >= least


def test_after_a_spike_release_ends_where_true_clipping_does() -> None:
    study = content("release_spikes")
    true, release = (
        [
            loss
            for factor in ("10 x", "1000 x")
            for loss in release_table.losses(study, "gsm8k", f"{factor}, {way}").values()
        ]
        for way in ("true clipping", "release")
    )
    assert abs(statistics.fmean(true) - statistics.fmean(release)) < statistics.stdev(true)
