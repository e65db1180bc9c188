"""An agent from its run folder, where its class is known."""

from __future__ import annotations

import os
from typing import Any

import torch

from ctrlrl.engine import runfolder
from ctrlrl.types import EnvSpec


def rebuild(
    cls: Any,
    folder: str | os.PathLike[str],
    checkpoint: str = "last",
    env: Any = None,
    device: str | None = None,
    encoder: Any = None,
) -> Any:
    """The agent of class ``cls`` that was saved in ``folder``; see :func:`ctrlrl.load`, which finds the class.

    An environment must be recorded or given, but for offline methods.
    """
    document = runfolder.read_config(folder)
    if env is None and document["env"] is not None:
        wrappers = tuple((path, dict(kwargs)) for path, kwargs in document["env"]["wrappers"])
        env = EnvSpec(**{**document["env"], "wrappers": wrappers})
    settings: dict[str, Any] = {} if cls.method else {"method": document["method"]}
    for name, value in document["config"].items():
        settings |= value if isinstance(value, dict) else {name: value}
    if encoder is not None:
        settings["encoder"] = encoder
    if device is not None:
        settings["device"] = device
    elif str(settings["device"]).startswith("cuda") and not torch.cuda.is_available():
        settings["device"] = "cpu"
    settings["cudagraphs"] = settings["cudagraphs"] and not str(settings["device"]).startswith("cpu")
    settings |= document[cls.own_name]
    agent = cls.from_document(document, env, settings)
    agent.load_checkpoint(folder, checkpoint)
    return agent
