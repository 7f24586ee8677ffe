"""Benchmarks by name: what is asked, what is right, and how replies are judged.

catalog.py has them all in a table; `load` makes prompts of one, from files or
from the hub; `measure` says how the replies did, by category and by accuracy.
"""

from eval.benchmarks.benchmark import Benchmark as Benchmark
from eval.benchmarks.benchmark import load as load
from eval.benchmarks.catalog import NAMES as NAMES
from eval.benchmarks.measurement import measure as measure
from eval.benchmarks.measurement import to_table as to_table
