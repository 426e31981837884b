"""Configuration of early-exit models: one class per architecture."""

from huggingface_hub.dataclasses import strict
from transformers import (
    BeitConfig,
    BertConfig,
    CamembertConfig,
    DebertaConfig,
    DebertaV2Config,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
    ViTConfig,
    XLMRobertaConfig,
)

from .exit_config import EarlyExitConfigMixin, EarlyExitImageConfigMixin
from .registries import ExitConfigurationError


@strict
class EarlyExitBertConfig(EarlyExitConfigMixin, BertConfig):
    """`BertConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_bert"
    stock_model_type = "bert"


class _PositionsAfterPadding:
    """Positions start after the index of the padding token."""

    @property
    def max_input_length(self) -> int:
        return self.max_position_embeddings - self.pad_token_id - 1


@strict
class EarlyExitRobertaConfig(_PositionsAfterPadding, EarlyExitConfigMixin, RobertaConfig):
    """`RobertaConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_roberta"
    stock_model_type = "roberta"


@strict
class EarlyExitXLMRobertaConfig(_PositionsAfterPadding, EarlyExitConfigMixin, XLMRobertaConfig):
    """`XLMRobertaConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_xlm-roberta"
    stock_model_type = "xlm-roberta"


@strict
class EarlyExitCamembertConfig(_PositionsAfterPadding, EarlyExitConfigMixin, CamembertConfig):
    """`CamembertConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_camembert"
    stock_model_type = "camembert"


@strict
class EarlyExitDistilBertConfig(EarlyExitConfigMixin, DistilBertConfig):
    """`DistilBertConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_distilbert"
    stock_model_type = "distilbert"


@strict
class EarlyExitElectraConfig(EarlyExitConfigMixin, ElectraConfig):
    """`ElectraConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_electra"
    stock_model_type = "electra"


@strict
class EarlyExitMPNetConfig(EarlyExitConfigMixin, MPNetConfig):
    """`MPNetConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_mpnet"
    stock_model_type = "mpnet"

    @property
    def max_input_length(self) -> int:
        return self.max_position_embeddings - 2  # positions start at 2, whatever the padding token is


@strict
class EarlyExitModernBertConfig(EarlyExitConfigMixin, ModernBertConfig):
    """`ModernBertConfig` with the fields of `EarlyExitConfigMixin`; the stock head pools by `classifier_pooling`."""

    model_type = "een_modernbert"
    stock_model_type = "modernbert"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for rope in self.rope_parameters.values():
            if rope["rope_type"] in ("dynamic", "longrope"):
                raise ExitConfigurationError(
                    f"rope_parameters have rope_type {rope['rope_type']!r}: the answer to a text then depends on the "
                    "longest text of its batch, and so on which examples have exited: use another, such as 'yarn'."
                )

    @property
    def stock_pooling(self) -> str:
        return self.classifier_pooling


class _RelativePositions:
    @property
    def max_input_length(self) -> int | None:
        return self.max_position_embeddings if self.position_biased_input else None


@strict
class EarlyExitDebertaConfig(_RelativePositions, EarlyExitConfigMixin, DebertaConfig):
    """`DebertaConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_deberta"
    stock_model_type = "deberta"


@strict
class EarlyExitDebertaV2Config(_RelativePositions, EarlyExitConfigMixin, DebertaV2Config):
    """`DebertaV2Config` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_deberta-v2"
    stock_model_type = "deberta-v2"


@strict
class EarlyExitViTConfig(EarlyExitImageConfigMixin, ViTConfig):
    """`ViTConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_vit"
    stock_model_type = "vit"


@strict
class EarlyExitDeiTConfig(EarlyExitImageConfigMixin, DeiTConfig):
    """`DeiTConfig` with the fields of `EarlyExitConfigMixin`.

    Args:
        distillation_head: whether the last exit averages two classifiers, one on the class token and one on the
            distillation token. Default: as in the checkpoint.
    """

    model_type = "een_deit"
    stock_model_type = "deit"
    num_prefix_tokens = 2

    distillation_head: bool = False

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        if "DeiTForImageClassificationWithTeacher" in (config_dict.get("architectures") or []):
            config_dict = {"distillation_head": True, **config_dict}
        return super().from_dict(config_dict, **kwargs)

    @property
    def last_exit_poolings(self) -> tuple[str, ...]:
        return ("cls",) if self.distillation_head else ("cls", "mean")

    @property
    def stock_architecture(self) -> str:
        """The name of the stock class, of which there are two."""
        return f"DeiTForImageClassification{'WithTeacher' * self.distillation_head}"


@strict
class EarlyExitDinov2Config(EarlyExitImageConfigMixin, Dinov2Config):
    """`Dinov2Config` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_dinov2"
    stock_model_type = "dinov2"
    stock_pooling = "cls_mean"
    last_exit_poolings = ("cls_mean",)


@strict
class EarlyExitDinov2WithRegistersConfig(EarlyExitImageConfigMixin, Dinov2WithRegistersConfig):
    """`Dinov2WithRegistersConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_dinov2_with_registers"
    stock_model_type = "dinov2_with_registers"
    stock_pooling = "cls_mean"
    last_exit_poolings = ("cls_mean",)

    @property
    def num_prefix_tokens(self) -> int:
        return 1 + self.num_register_tokens


@strict
class EarlyExitBeitConfig(EarlyExitImageConfigMixin, BeitConfig):
    """`BeitConfig` with the fields of `EarlyExitConfigMixin`; the stock head pools by `use_mean_pooling`."""

    model_type = "een_beit"
    stock_model_type = "beit"

    @property
    def stock_pooling(self) -> str:
        return "mean" if self.use_mean_pooling else "cls"

    @property
    def last_exit_poolings(self) -> tuple[str, ...]:
        return (self.stock_pooling,)
