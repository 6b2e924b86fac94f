"""PMC as a TRL trainer: PMCTrainer with TRL's base classes and conventions."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TrainerCallback, set_seed
from transformers.utils import is_torch_bf16_gpu_available, logging

try:
    from trl.trainer.base_config import _BaseConfig
    from trl.trainer.base_trainer import _BaseTrainer
    from trl.trainer.utils import create_model_from_path, get_config_model_id
except ImportError as error:  # not installed, or a version with its base classes elsewhere
    raise ImportError(f"{error}: pmc_fast.integrations.trl needs TRL 1.16: pip install 'pmc_fast[trl]'") from error

from .. import config
from ..errors import PMCError
from ..pmc.reward import Reward
from ..trainer import trainer
from ..trainer.arguments import PublishedDefaults

logger = logging.get_logger(__name__)

CITATION = r"""@misc{scholten2025modelcollapse,
  title         = {Model Collapse Is Not a Bug but a Feature in Machine Unlearning for LLMs},
  author        = {Yan Scholten and Sophie Xhonneux and Leo Schwinn and Stephan G{\"u}nnemann},
  year          = {2025},
  eprint        = {2507.04219},
  archivePrefix = {arXiv},
  primaryClass  = {cs.LG},
  url           = {https://arxiv.org/abs/2507.04219},
}"""


@dataclass
class PMCConfig(PublishedDefaults, config.PMCConfig, _BaseConfig):
    """The settings of PMC and of its training in one class, as in TRL.

    Fields, help texts and defaults of PMC are those of `pmc_fast.PMCConfig` and `pmc_fast.PMCArguments`. TRL's are
    logging_steps 10, gradient checkpointing, and bf16 where it is unset, but only on accelerators that compute in it: on
    most CPUs it is much slower than float32. `seed` is that of PMC and of the Trainer, 0 by default.

    Raises
    ------
    PMCError
        A setting of PMC is out of its range.
    """

    _VALID_DICT_FIELDS = [*_BaseConfig._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "for from_pretrained, where the trainer's model is a string, as JSON"}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run the code in a model's or tokenizer's hub repository"}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:  # type: ignore[has-type]  # a field of TRL's, whose types are not read
            self.bf16 = not (self.fp16 or self.use_cpu) and is_torch_bf16_gpu_available()
        self.validate()
        _BaseConfig.__post_init__(self)  # reads the JSON
        self.init_kwargs()

    def validate(self) -> None:
        """Raise PMCError for the first setting of PMC that is out of its range."""
        self.pmc_config()

    def init_kwargs(self) -> dict[str, Any]:
        """Return model_init_kwargs as a dict."""
        given = self.model_init_kwargs or {}
        if not isinstance(given, dict):
            raise PMCError(f"model_init_kwargs is {given!r}: it must be a JSON object")
        return given

    def pmc_config(self) -> config.PMCConfig:
        """Return the settings of PMC alone."""
        return config.PMCConfig(**self.algorithm())


class PMCTrainer(trainer.PMCTrainer, _BaseTrainer):
    """Unlearns with Partial Model Collapse; `pmc_fast.PMCTrainer` with TRL's conventions.

    Parameters
    ----------
    model : str, Path, transformers.PreTrainedModel or peft.PeftModel
        A name or directory is loaded with `args.model_init_kwargs`, in float32 unless they set another dtype.
    args : PMCConfig, optional
        This module's. By default the published settings, written to "<model>-PMC".
    forget_dataset : datasets.Dataset or iterable
        Rows with a ``prompt``, standard or conversational, or with ``messages``. Completions are not read.
    retain_dataset : datasets.Dataset or iterable
        Rows with ``prompt`` and ``completion``, or with ``messages``; for other forms see `pmc_fast.PMCTrainer`.
    processing_class : transformers.PreTrainedTokenizerBase, optional
        By default loaded from the model's origin.
    callbacks, optimizers
        As of the Trainer.
    peft_config : peft.PeftConfig, optional
        Wraps the model.
    reward : callable, optional
        See `pmc_fast.PMC`.
    **more
        eval_dataset, compute_metrics and other arguments of `pmc_fast.PMCTrainer`.

    Notes
    -----
    Rows are encoded in `args.prompt_format`. A conversation keeps its turns and its system turn (`args.system_prompt` is
    for those without one). Its last turn is the answer, all turns before it are the question. Like TRL's own trainers it
    sends TRL's anonymous usage ping, without names or texts; HF_HUB_DISABLE_TELEMETRY=1 turns it off.
    """

    _tag_names = ["trl", "pmc-fast", "unlearning"]  # noqa: RUF012
    _name = "PMC"
    _paper = {  # noqa: RUF012
        "title": "Model Collapse Is Not a Bug but a Feature in Machine Unlearning for LLMs",
        "id": "2507.04219",
        "citation": CITATION,
    }

    def __init__(
        self,
        model: Any,
        args: PMCConfig | None = None,
        forget_dataset: Iterable[Any] | None = None,
        retain_dataset: Iterable[Any] | None = None,
        processing_class: Any = None,
        *,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        reward: Reward | None = None,
        **more: Any,
    ) -> None:
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        if not isinstance(model, (str, torch.nn.Module)):
            raise PMCError(f"model is a {type(model).__name__}: it must be a model, or the name or directory of one")
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = PMCConfig(f"{Path(name).name or 'model'}-PMC")
        if not isinstance(args, PMCConfig):
            kind = f"{type(args).__module__}.{type(args).__qualname__}"
            raise PMCError(f"args is a {kind}: it must be a PMCConfig of {__name__}")
        set_seed(args.seed)  # an adapter's first weights are random
        model = _load(model, args)
        if processing_class is None:
            processing_class = _tokenizer_of(model, args)
        if peft_config is not None:
            model = _with_adapter(model, peft_config)
        super().__init__(
            model, args, forget_dataset, retain_dataset, args.pmc_config(), processing_class,
            callbacks=callbacks, optimizers=optimizers, reward=reward, **more,
        )  # fmt: skip
        self.model.add_model_tags(self._tag_names)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and its model card into `args.output_dir`."""
        if not _internal_call:  # a checkpoint has written it
            self._write_card()
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._write_card()
        super()._save_checkpoint(model, trial)

    def _write_card(self) -> None:
        self.create_model_card(model_name=Path(self.args.hub_model_id or self.args.output_dir).name)


def _load(model: Any, args: PMCConfig) -> Any:
    if not isinstance(model, str):
        if args.model_init_kwargs is not None:
            logger.warning("model_init_kwargs is not used: the model is already there")
        return model
    # the Trainer moves the model; device_map="auto" would spread it over several GPUs
    options = {"device_map": None, "trust_remote_code": args.trust_remote_code} | args.init_kwargs()
    return create_model_from_path(model, **options)


def _tokenizer_of(model: Any, args: PMCConfig) -> Any:
    name, revision = get_config_model_id(model.config), args.init_kwargs().get("revision")
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise PMCError(f"no tokenizer is found at {name!r}, the model's origin: pass processing_class") from error


def _with_adapter(model: Any, peft_config: Any) -> Any:
    try:
        import peft
    except ImportError as error:
        raise PMCError("peft_config needs peft: pip install 'pmc_fast[lora]'") from error
    if not isinstance(peft_config, peft.PeftConfig):
        raise PMCError(f"peft_config is {type(peft_config).__name__}: it must be a peft.PeftConfig, as LoraConfig")
    if isinstance(model, peft.PeftModel):
        raise PMCError("peft_config is given but the model has an adapter: merge and unload it, or leave one out")
    return peft.get_peft_model(model, peft_config)
