"""Loading models and tokenizers through transformers: safetensors only, no remote code."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch

from ..errors import PMCError
from ..ops.dispatch import why_refused
from . import context
from .fsdp import fsdp_launched
from .joined_weights import join_weights
from .recognition import positions_are_computed

ParamDtype = Literal["auto", "float32", "bfloat16"]


@dataclass(slots=True)
class LoadedModel:
    """A model, the precision that it computes in and the one that it is saved in."""

    model: Any
    autocast_dtype: torch.dtype | None  # None: no autocast, it computes in its parameters' dtype
    checkpoint_dtype: torch.dtype

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which the model computes."""
        return context.autocast(self.model.device, self.autocast_dtype)


def resolve_device(name: str) -> torch.device:
    """Return the device of a name. "auto" is cuda if there is a GPU, each local process's own, else cpu."""
    local = os.environ.get("LOCAL_RANK")
    found = ("cuda" if local is None else f"cuda:{local}") if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(found if name == "auto" else name)
    except RuntimeError as error:
        raise PMCError(f"device is {name!r}: use auto, cpu, cuda or cuda:1") from error
    if why := why_refused(device):
        raise PMCError(f"device is {name!r}: {why}")
    if name == "auto":
        return device
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise PMCError(
            f"device is {name!r} but torch {torch.__version__} sees {count} CUDA devices: use cpu or another"
        )
    return device


def load_tokenizer(source: str) -> Any:
    """Load the tokenizer of a local directory or hub id."""
    return _load("AutoTokenizer", source)


def max_positions(source: str) -> int | None:
    """Return a model's number of positions from its config alone, or None if it does not name one."""
    return getattr(_load("AutoConfig", source).get_text_config(), "max_position_embeddings", None)


def load_generation_config(source: str) -> Any:
    """Load a model's generation settings without its weights: eos ids may be there alone."""
    import transformers

    try:
        return transformers.GenerationConfig.from_pretrained(source)
    except OSError:  # no such file
        return transformers.GenerationConfig.from_model_config(_load("AutoConfig", source))


def check_config(source: str, tokenizer: Any, max_length: int) -> list[str]:
    """Refuse, from a model's config alone, a tokenizer or length that does not fit; return warnings."""
    config = _load("AutoConfig", source).get_text_config()
    _require_rows(config.vocab_size, tokenizer, source)
    return check_positions(config, max_length)


def check_positions(config: Any, max_length: int) -> list[str]:
    """Refuse sequences longer than a model's table of positions; return a warning if its positions are computed."""
    config = config.get_text_config()
    known = getattr(config, "max_position_embeddings", None)
    if not known or max_length <= known:
        return []
    if positions_are_computed(config):
        return [
            f"max_length is {max_length} but the model was trained for {known} positions: later tokens may be "
            f"nonsense; lower --max-length to {known}"
        ]
    raise PMCError(f"max_length is {max_length} but the model has {known} positions: lower --max-length to {known}")


def check_source(source: str, device: str) -> tuple[int, torch.dtype]:
    """Refuse a model that can't be loaded or trained, before any weight is read.

    Returns
    -------
    parameters : int
        Their number.
    dtype : torch.dtype
        As they came.
    """
    import transformers

    resolve_device(device)
    config = _load("AutoConfig", source)
    if getattr(config, "is_encoder_decoder", False):
        raise PMCError(
            f"model {source} is an encoder-decoder ({config.model_type}): PMC needs a causal language model"
        )
    if quantisation := getattr(config, "quantization_config", None):
        kind = quantisation.get("quant_method", "") if isinstance(quantisation, dict) else type(quantisation).__name__
        raise PMCError(f"model {source} is quantised ({kind}): give the model as it was before")
    if Path(source).is_dir():
        _check_files(Path(source))
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # of the modelling file, or no such architecture
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PMCError(f"model {source} can't be made from its config.json: {reason}") from error
    return sum(p.numel() for p in model.parameters()), checkpoint_dtype(config)


def _check_files(directory: Path) -> None:
    """Refuse a directory without complete safetensors weights."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
        _check_header(directory / "model.safetensors")
        return
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, LookupError, AttributeError) as error:
            raise PMCError(f"model {directory}: {index.name} can't be read: download it again") from error
        if missing := sorted(shard for shard in shards if not (directory / shard).is_file()):
            raise PMCError(
                f"model {directory} lacks {', '.join(missing[:3])}, which {index.name} names: download it again"
            )
        for shard in sorted(shards):
            _check_header(directory / shard)
        return
    others = sorted(
        p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors")
    )
    found = f"{others[0]} can't be loaded" if others else "no weights"
    raise PMCError(
        f"model {directory} has no model.safetensors ({found}): pmc_fast reads safetensors alone; save it with "
        "save_pretrained"
    )


def _check_header(file: Path) -> None:
    """Refuse a safetensors file that is truncated or has a damaged header; no weight is read."""
    try:
        safetensors.safe_open(file, "pt")
    except Exception as error:  # SafetensorError, OSError
        raise PMCError(f"model {file.parent} can't be loaded: {file.name} is damaged ({error})") from error


def low_precision(dtype: str, device: torch.device) -> bool:
    """Return whether a model is to compute in bfloat16. auto: on cuda."""
    return dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")


def checkpoint_dtype(config: Any) -> torch.dtype:
    """Return the dtype that a model is saved in, by its config; float32 if it does not say."""
    return getattr(config, "dtype", None) or torch.float32


def resolve_param_dtype(
    param_dtype: ParamDtype, dtype: str, device: torch.device, source: str
) -> Literal["float32", "bfloat16"]:
    """Return what the parameters of the model `source` are kept in.

    auto is bfloat16 on cuda where the model computes in it and is saved in it, so that no weight is rounded; else
    float32, also under accelerate's FSDP: it shards what the optimizer steps, and masters are copies of their own.
    """
    if param_dtype != "auto":
        return param_dtype
    if device.type != "cuda" or not low_precision(dtype, device):
        return "float32"
    if fsdp_launched():
        return "float32"
    return "bfloat16" if checkpoint_dtype(load_config(source)) == torch.bfloat16 else "float32"


def rounding_warning(param_dtype: str, source: str, saved: torch.dtype) -> list[str]:
    """Return a warning if bfloat16 parameters are not the weights of the model `source`, saved in the dtype `saved`."""
    if param_dtype != "bfloat16" or saved == torch.bfloat16:
        return []
    name = str(saved).removeprefix("torch.")
    return [
        f"param_dtype is bfloat16 but {source} is saved in {name}: its weights are rounded before they are measured and "
        "trained; --param-dtype float32 keeps them"
    ]


def load_config(source: str) -> Any:
    """Load a model's config alone."""
    return _load("AutoConfig", source)


def autocast_dtype(param_dtype: str, dtype: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast, or None: bfloat16 parameters compute in bfloat16 by themselves."""
    return torch.bfloat16 if param_dtype == "float32" and low_precision(dtype, device) else None


def load_model(
    source: str, *, device: torch.device, dtype: str = "auto", param_dtype: ParamDtype = "float32"
) -> LoadedModel:
    """Load a causal language model for training.

    Parameters
    ----------
    source : str
        A directory or hub id with safetensors weights.
    device : torch.device
        Where to put it.
    dtype : {"auto", "float32", "bfloat16"}
        What it computes in. auto: bfloat16 (autocast) on cuda, float32 on the CPU.
    param_dtype : {"auto", "float32", "bfloat16"}
        What its parameters are kept in; see `resolve_param_dtype`.
    """
    config = _load("AutoConfig", source)
    param_dtype = resolve_param_dtype(param_dtype, dtype, device, source)
    how: dict[str, Any] = {"dtype": getattr(torch, param_dtype), "use_safetensors": True, "output_loading_info": True}
    model, found = _load("AutoModelForCausalLM", source, **how)
    if missing := sorted(found["missing_keys"]):  # transformers would initialise them at random, and print a table
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise PMCError(f"model {source} lacks weights that its config.json asks for ({missing[0]}{more}): fix it")
    model = model.to(device)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise PMCError(f"{source} holds NaN or infinite weights in {name}: use a sound checkpoint")
    if device.type == "cuda":  # on the CPU rollouts would gain nothing
        join_weights(model)
    _make_savable(model.generation_config, source)
    model.eval()
    return LoadedModel(model, autocast_dtype(param_dtype, dtype, device), checkpoint_dtype(config))


def _make_savable(generation_config: Any, source: str) -> None:
    """Repair or refuse contradicting flags now: save_pretrained would refuse them after training."""
    try:
        generation_config.validate(strict=True)
    except ValueError:
        generation_config.do_sample = True  # temperature or top_p without it: the common case
        try:
            generation_config.validate(strict=True)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise PMCError(f"{source}: generation_config.json can't be saved again ({reason}): fix it") from error


def check_fit(model: Any, tokenizer: Any, source: str) -> None:
    """Refuse a tokenizer with tokens for which the model has no embedding."""
    _require_rows(model.get_input_embeddings().weight.shape[0], tokenizer, source)


def _require_rows(rows: int, tokenizer: Any, source: str) -> None:
    if len(tokenizer) > rows:
        raise PMCError(f"{source}: the tokenizer has {len(tokenizer)} tokens but the model embeds {rows}")


def weights_hash(
    model: Any, dtype: torch.dtype | None = None, state: Mapping[str, torch.Tensor] | None = None
) -> str:
    """Return a hash of a model's weights: names, dtypes, shapes and bytes, shared ones once.

    With `dtype` floating ones count as if they were cast to it: a bfloat16 checkpoint has one hash in both dtypes. `state`
    has the tensors by their names, if they are not those of `model.state_dict()`.

    Names are those of transformers: a version that renames parameters gives another hash. Every byte is read: about a
    second a gigabyte on one core (135M parameters in float32: 0.5 s).
    """
    content, seen = hashlib.sha256(), set()
    for name, tensor in sorted((model.state_dict() if state is None else state).items()):
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        content.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if hasattr(tensor, "full_tensor"):  # FSDP2; collective
            tensor = tensor.full_tensor()
        content.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return content.hexdigest()


def _load(loader: str, source: str, **options: Any) -> Any:
    import transformers

    path = Path(source)
    if not source:
        raise PMCError("model is not given: --model takes a directory or a hub id")
    if path.is_dir() and not (path / "config.json").is_file():
        raise PMCError(f"model {source} has no config.json: give a directory saved by save_pretrained")
    if not path.is_dir() and (path.is_absolute() or source.startswith(".") or source.count("/") > 1):
        raise PMCError(f"model directory {source} does not exist")
    try:
        return getattr(transformers, loader).from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, SafetensorError, ...
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise PMCError(f"model {source} can't be loaded by {loader}: {reason}") from error
