"""The list of keys: no name twice, the page made from it, and what asked and built are called."""

from __future__ import annotations

import subprocess
import sys

from src.spec import metric_keys
from src.spec.config import ModelRequest, to_dict
from tests import ROOT


def test_no_key_stands_twice_and_both_tables_hold_all():
    names = [key.name for keys in metric_keys.SECTIONS.values() for key in keys]
    assert len(names) == len(set(names))
    assert sorted({*metric_keys.SUMMARY, *metric_keys.DETAILS}) == sorted(names)
    assert set(metric_keys.SUMMARY) & set(metric_keys.DETAILS) == {"run"}


def test_every_request_of_the_yaml_has_an_asked_and_a_built_key_and_no_other_use():
    for quantity in metric_keys.REQUESTS:
        assert (
            quantity.request in to_dict(ModelRequest()) and quantity.request not in metric_keys.KEYS
        )
        assert {quantity.asked, quantity.built} <= set(metric_keys.KEYS)


def test_the_page_is_made_from_the_list():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/document_keys.py"), "--check"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_key_outside_the_list_is_kept_and_a_missing_one_is_null():
    metrics = metric_keys.complete({"run": "a", "of_tomorrow": 1})
    assert metrics["of_tomorrow"] == 1 and metrics["dev_loss"] is None
    assert set(metrics) == {*metric_keys.STORED, "of_tomorrow"}
