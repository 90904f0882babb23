"""The files of a checkpoint's folder."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import transformers

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BESIDE_IMAGES = "_beside_images"  # noted in the config of a language model that is a part of one that sees images
TEXT_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]  # configs, chat templates, vocabularies


def short(value: Any, limit: int = 400) -> str:
    """The value for a message: a checkpoint's own text may have megabytes."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 60]} ... {text[-50:]}"


def read_config(folder: Path) -> transformers.PretrainedConfig:
    """The config.json of a checkpoint; no code of it is run.

    Of Gemma 3 with images that of its language model; of gpt-oss in mxfp4 that of the floats.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no config.json, only {short(sorted(os.listdir(folder)))}")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many kinds, by the field
        raise ValueError(f"transformers does not read {folder / CONFIG}: {short(str(error), 1000)}") from error
    if config.model_type == "gpt_oss" and _method(config) == "mxfp4":
        del config.quantization_config  # its codes are read as the floats that they stand for
    if config.model_type != "gemma3":
        return config
    warnings.warn(
        f"{folder} also sees images; only its language model is read, and exports are language models, too",
        stacklevel=2,
    )
    text = config.get_text_config()
    setattr(text, BESIDE_IMAGES, True)
    if found := getattr(config, "quantization_config", None):
        text.quantization_config = found
    return text


def _method(config: transformers.PretrainedConfig) -> str | None:
    found = getattr(config, "quantization_config", None) or {}
    method = (found if isinstance(found, dict) else found.to_dict()).get("quant_method")
    return getattr(method, "value", method)


def local_folder(path_or_repo: str | os.PathLike[str], revision: str | None, patterns: list[str]) -> Path:
    """The folder itself, or a repository's files of those patterns."""
    if folder := known_folder(path_or_repo, revision):
        return folder
    # Some repositories hold the weights a second time in another layout.
    twice = ["*/*.safetensors", "consolidated*.safetensors"]
    return Path(
        huggingface_hub.snapshot_download(
            os.fspath(path_or_repo), revision=revision, allow_patterns=patterns, ignore_patterns=twice
        )
    )


def known_folder(path_or_repo: str | os.PathLike[str], revision: str | None) -> Path | None:
    """The folder, or None for what can only be the id of a repository."""
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"{path} is a folder and has no revision {revision!r}")
        return path
    try:
        huggingface_hub.utils.validate_repo_id(os.fspath(path_or_repo))
    except huggingface_hub.errors.HFValidationError:
        raise FileNotFoundError(f"{path_or_repo} is neither a folder nor the id of a repository") from None
    return None


def weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor; files lie in the folder itself, whatever the index says."""
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file() and index.is_file():
        raise ValueError(f"{folder} holds both {WEIGHTS} and {INDEX}; delete the one that is not meant")
    if single.is_file():
        with open_shard(single) as shard:
            return dict.fromkeys(shard.keys(), WEIGHTS)
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS} or {INDEX}, only {short(sorted(os.listdir(folder)))}. A .bin or .pt file is a "
            "pickle, which can run code, and is never opened; where you trust it, convert it with transformers and "
            "torch: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map")
    files = sorted({str(file) for file in places.values()})
    if outside := [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]:
        raise ValueError(f"{index} names what is no safetensors file of its folder: {short(outside)}")
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise FileNotFoundError(f"{index} names files that are not there: {short(missing)}")
    return places


def open_shard(file: Path) -> Any:
    try:
        return safetensors.safe_open(file, "numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no whole safetensors file; was its download cut short? {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object")
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
