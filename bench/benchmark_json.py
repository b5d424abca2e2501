"""The interleaved samples in pytest-benchmark's JSON, so that its `compare`, tables and histograms read them.

pytest-benchmark times one function until it is done and then the next; its numbers of A and B are minutes apart. The
numbers of record therefore come from the interleaved timer, and its tools are used on them:

    pytest-benchmark compare before/benchmark.json after/benchmark.json --group-by=group
    pytest-benchmark compare linear_benchmark.json --group-by=group --histogram
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.records import Record
from lora_kernels.benchmarking.report import case_of
from lora_kernels.benchmarking.timer import Samples


def case_id(case: LinearCase) -> str:
    """`bert-base.up-M1024-r16-bf16-p0.1-forward`: one word, as pytest names a test."""
    graph = "-graph" if case.graph else ""
    return f"{case.name}-M{case.M}-r{case.R}-{case.dtypes}-p{case.dropout_p:g}-{case.mode}{graph}"


def write_benchmark_json(records: Sequence[Record], samples: Mapping[LinearCase, Samples], path: Path) -> None:
    """One benchmark per timed record, grouped by case, with the record as its extra_info; nothing if none was timed."""
    # The plugin's own statistics, so that each field means what its tools take it for.
    from pytest_benchmark.stats import Stats

    benchmarks = []
    for record in records:
        case = case_of(record)
        ms = samples[case].ms.get(record.provider) if case in samples else None
        if not ms:
            continue
        stats = Stats()
        for value in ms:
            stats.update(value / 1e3)
        name = f"{record.provider}[{case_id(case)}]"
        benchmarks.append(
            {
                "group": case_id(case),
                "name": name,
                "fullname": f"bench/linear.py::{name}",
                "params": None,
                "param": None,
                "extra_info": dataclasses.asdict(record),
                "options": {"interleaved": True, "warmup": True},
                "stats": stats.as_dict() | {"data": list(stats.data), "iterations": 1},
            }
        )
    if not benchmarks:
        return
    last = records[-1]
    machine = {"node": last.device, "processor": last.device, "python_version": last.python, "torch": last.torch}
    commit = {"id": last.commit.partition("+")[0], "dirty": "+" in last.commit, "branch": "", "project": "lora-kernels"}
    document = {
        "machine_info": machine | {"driver": last.driver, "threads": last.threads, "cpu": {}},
        "commit_info": commit | {"time": last.date},
        "benchmarks": benchmarks,
        "datetime": last.date,
        "version": version("pytest-benchmark"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
