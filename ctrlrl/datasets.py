"""Recorded experience: ``ctrlrl.datasets.load("hopper-medium-v2")``; D4RL and Minari, ids and files."""

from __future__ import annotations

from ctrlrl.data.dataset import Dataset as Dataset
from ctrlrl.data.dataset import DatasetError as DatasetError
from ctrlrl.data.dataset import DatasetInfo as DatasetInfo
from ctrlrl.data.dataset import Episode as Episode
from ctrlrl.data.load import load as load
